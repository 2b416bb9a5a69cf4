"""The texture while it is being painted."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.world.canvas import Canvas, smoothstep


@dataclass
class Paint:
    """One row per texel of the canvas; everything changes in place, in some of the rows."""

    colour: Float[Tensor, "texels 3"]
    """Linear RGB."""
    gloss: Float[Tensor, " texels"]
    bump: Float[Tensor, "texels 3"]
    """Added to the unit normal."""

    def mix(self, colour: Tensor, amount: Float[Tensor, " some"], index: Int[Tensor, " some"]) -> None:
        """Blend toward one colour, or one per texel."""
        old = self.colour.index_select(0, index)
        self.colour[index] = torch.lerp(old, colour.expand_as(old), amount[:, None].clamp(0, 1))

    def set_gloss(self, gloss: float, amount: Float[Tensor, " some"], index: Int[Tensor, " some"]) -> None:
        old = self.gloss.index_select(0, index)
        self.gloss[index] = torch.lerp(old, torch.tensor(gloss), amount.clamp(0, 1))

    def flatten(self, amount: Float[Tensor, " some"], index: Int[Tensor, " some"]) -> None:
        """Take the bumps away."""
        self.bump[index] *= 1 - amount.clamp(0, 1)[:, None]


def gauss(position: Float[Tensor, "n 3"], centre: tuple[float, float, float], radius: float) -> Float[Tensor, " n"]:
    """A soft ball around a point of the left side, and its mirror image."""
    x, y, z = position.unbind(1)
    d = (x.abs() - centre[0]).square() + (y - centre[1]).square() + (z - centre[2]).square()
    return torch.exp(d * (-1 / radius**2))


def beard_area(position: Float[Tensor, "n 3"], kind: str) -> Float[Tensor, " n"]:
    """Where a beard of this kind grows on the template, 0 to 1."""
    x, y, z = position.unbind(1)
    x = x.abs()
    front = smoothstep(-0.012, 0.012, z)
    # Below, it ends where the chin turns into the neck.
    low = smoothstep(-0.113, -0.097, y - 0.3 * (0.075 - z - 0.7 * x).clamp(min=0))
    # The cheek's line runs from the ear's middle down to the mouth's corner.
    cheek = -0.002 - 0.036 * ((0.072 - x) / 0.045).clamp(0, 1.2)
    jaw = smoothstep(0.004, -0.006, y - cheek) * low
    jaw = jaw * front * smoothstep(0.016, 0.026, x + 0.6 * (-0.058 - y).clamp(min=0))
    sides = smoothstep(0.062, 0.068, x) * smoothstep(0.035, 0.02, y) * smoothstep(-0.03, -0.01, y)
    sides = sides * smoothstep(0.012, 0.022, z)
    # It follows the upper lip outward and down, and tapers.
    away = (y + 0.0362 + 0.30 * (x - 0.008).clamp(min=0)).abs() / (0.0062 - 0.08 * x).clamp(min=0.002)
    moustache = smoothstep(1.15, 0.7, away) * smoothstep(0.035, 0.028, x) * smoothstep(0.085, 0.09, z)
    round_ = torch.hypot(x / 0.033, (y + 0.066) / 0.034)
    around = smoothstep(1.05, 0.9, round_) * smoothstep(0.022, 0.027, x + 0.5 * (-0.06 - y).clamp(min=0)) * low
    around = around * smoothstep(-0.046, -0.052, y) * front
    chin = smoothstep(1.0, 0.75, round_) * smoothstep(-0.0645, -0.068, y) * smoothstep(0.055, 0.07, z) * low
    patch = smoothstep(0.008, 0.004, x) * smoothstep(-0.0625, -0.064, y) * smoothstep(0.09, 0.1, z) * front
    parts = {
        "none": [], "moustache": [moustache], "goatee": [0.9 * moustache, around, chin, patch],
        "stubble": [jaw, sides, moustache, around, chin, patch], "short": [jaw, sides, moustache, around, chin, patch],
        "full": [jaw, sides, moustache, around, chin, patch],
    }[kind]  # fmt: skip
    return torch.stack([torch.zeros_like(x), *parts]).amax(0)


def on_lips(c: Canvas, index: Int[Tensor, " some"]) -> Float[Tensor, " some"]:
    """Return how much each texel lies on the lips, from 0 to 1."""
    return smoothstep(0.15, 0.5, (c.regions["lips"] + c.regions["mouth"])[index])
