"""Clothes: where they begin, how thick they lie, and what is printed on them."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.world.canvas import Canvas, noise, smoothstep
from geodiff4d.world.paint import Paint
from geodiff4d.world.skin import Bank
from geodiff4d.world.traits import Traits

THICKNESS_M = 0.006
NECKLINES = {
    # height at the throat [m], slope toward the shoulders
    "crew": (-0.128, 0.12), "v": (-0.150, 0.62), "turtle": (-0.106, 0.0), "scoop": (-0.142, 0.30),
    "shirt": (-0.140, 0.75), "hood": (-0.125, 0.20),
}  # fmt: skip


def _neckline(position: Float[Tensor, "n 3"], rng: np.random.Generator) -> tuple[str, Float[Tensor, " n"]]:
    """Return the kind of neckline and how far below it points lie [m]."""
    x, y, z = position.unbind(1)
    kind = str(rng.choice(list(NECKLINES)))
    height, slope = NECKLINES[kind]
    # Necklines rise over the shoulders and toward the nape.
    line = height + float(rng.normal(0, 0.004)) + slope * (x.abs() - (0.02 if slope < 0.5 else 0.004)).clamp(0, 0.06)
    return kind, line + 0.28 * (0.05 - z).clamp(0, 0.12) - y


def cloth_thickness(position: Float[Tensor, "n 3"], rng: np.random.Generator) -> Float[Tensor, " n"]:
    """Return how far the clothes stand off the skin at template points [m]: a rim at the neckline, folds below."""
    kind, below = _neckline(position, rng)
    folds = noise(position, rng, 0.05, 2)
    rim = {"turtle": 0.4, "hood": 1.6, "shirt": 0.8}.get(kind, 0.3) * torch.exp(-(((below - 0.011) / 0.010) ** 2))
    return THICKNESS_M * smoothstep(0.0, 0.008, below) * (1 + rim + 0.35 * folds[:, 0] + 0.2 * folds[:, 1].abs())


def paint_clothes(c: Canvas, paint: Paint, traits: Traits, bank: Bank, rng: np.random.Generator) -> None:
    """Paint the bust's clothes: neckline, cloth and pattern, with folds where the mesh has them."""
    i = c.areas["body"]
    p = c.position[i]
    kind, below = _neckline(p, rng)
    # The same draws as for the thickness: folds are lit where they are.
    folds = noise(p, rng, 0.05, 2)
    x, y, _ = p.unbind(1)
    first, second, third = traits.cloth
    layer, texture = _pattern(p, {w: f[i] for w, f in bank.items()}, rng)
    colour = torch.lerp(first.expand(len(x), 3), second.expand(len(x), 3), layer[:, None])
    weave = 1 + 0.06 * torch.sin(2 * np.pi * y / 0.004) * torch.sin(2 * np.pi * x / 0.004) + texture
    hem = smoothstep(0.020, 0.017, below)
    if kind in ("shirt", "hood", "crew") and rng.random() < 0.6:  # a collar or a ribbed hem of another colour
        colour = torch.lerp(colour, third.expand_as(colour), 0.85 * hem[:, None])
    if kind == "shirt":  # buttons and their placket
        placket = smoothstep(0.011, 0.0095, x.abs()) * smoothstep(0.018, 0.022, below)
        colour = colour * (1 - 0.18 * placket * smoothstep(0.007, 0.0095, x.abs()))[:, None]
        button = smoothstep(0.0042, 0.0034, torch.hypot(x, (y + 0.01).remainder(0.045) - 0.0225))
        colour = torch.lerp(
            colour, torch.tensor([0.6, 0.58, 0.55]).expand_as(colour), 0.9 * (button * placket)[:, None]
        )
    seam = torch.exp(-(((below - 0.018) / 0.0012) ** 2)) + 0.8 * torch.exp(-(((below - 0.001) / 0.002) ** 2))
    shade = (1 - 0.30 * seam) * (1 + 0.05 * folds[:, 0])
    sharp = smoothstep(0.0015, 0.0035, below)
    paint.mix(colour * (weave * shade)[:, None], sharp, i)
    paint.set_gloss(float(rng.choice([0.01, 0.015, 0.04])), sharp, i)
    bump = 0.08 * bank[18][i, :3] + 0.10 * bank[40][i, :3] + 0.05 * bank[2][i, :3]
    paint.bump[i] = torch.lerp(paint.bump[i], bump, sharp[:, None])


def _pattern(p: Float[Tensor, "n 3"], bank: Bank, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return where the second colour is (0 to 1) and the cloth's own unevenness."""
    x, y, _ = p.unbind(1)
    pitch = float(rng.uniform(0.008, 0.03))
    down, across = y + 0.35 * x.abs(), x
    if rng.random() < 0.3:
        turn = float(rng.uniform(-0.8, 0.8))
        down, across = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn)
    rows = smoothstep(-0.1, 0.1, torch.sin(2 * np.pi * down / pitch))
    columns = smoothstep(-0.1, 0.1, torch.sin(2 * np.pi * across / pitch))
    plain = torch.zeros_like(x)
    dots = smoothstep(0.3, 0.24, torch.hypot((across / pitch).frac().abs() - 0.5, (down / pitch).frac().abs() - 0.5))
    thin = smoothstep(0.90, 0.97, torch.sin(2 * np.pi * down / pitch))
    layers = (
        plain, plain, plain, rows, thin, columns, 0.5 * (rows + columns), dots, smoothstep(0.2, 0.4, bank[18][:, 2]),
        smoothstep(-0.5, 0.5, bank[40][:, 3]) * 0.8, smoothstep(-0.012, 0.012, y + 0.19),
    )  # fmt: skip
    knit = 0.08 * torch.sin(2 * np.pi * across / 0.006).abs() if rng.random() < 0.3 else plain
    return layers[int(rng.integers(len(layers)))], 0.05 * bank[18][:, 1] + 0.05 * bank[2][:, 1] - knit
