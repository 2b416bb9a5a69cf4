"""What a face reader says of faces, and how it is steadied over a video."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

REACH = 4
"""Frames before and after that steady a frame."""
TIME_SIGMA = 2.0
"""Width of the window [frames]."""
ALIKE = 2.5
"""Frames whose readings differ by more than this many times the noise are different expressions, and are not mixed."""


@dataclass(frozen=True)
class Reading:
    """What crops of faces show; the standard deviations are the reader's own doubt, `targets` 52 + 3 + 6."""

    expr: Float[Tensor, "b 52"]
    """OpenHead's coefficients, from 0; strong people go beyond 1."""
    jaw_pose: Float[Tensor, "b 3"]
    """Axis-angle [rad], beside what `jawOpen` and its neighbours do."""
    eyes_pose: Float[Tensor, "b 6"]
    """Axis-angle [rad] of the left and the right eye in the head."""
    expr_sigma: Float[Tensor, "b 52"]
    jaw_sigma: Float[Tensor, "b 3"]
    eyes_sigma: Float[Tensor, "b 6"]
    blend: Float[Tensor, "b 2 3 targets"]
    """How a fit to landmarks, and one whose pixels were aligned, are each brought together with this reading
    (`blend.py`): slopes of fit and reading, and what is added."""

    def __len__(self) -> int:
        return len(self.expr)

    @staticmethod
    def cat(parts: "Sequence[Reading]") -> "Reading":
        """Join readings along the batch."""
        return Reading(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Reading)))


def steadied(values: Float[Tensor, "frames n"], noise: Float[Tensor, " n"]) -> Float[Tensor, "frames n"]:
    """Average each series over neighbouring frames that say nearly the same (a bilateral filter over time).

    What rests becomes still, and a blink of four frames goes through unharmed: its frames differ from their neighbours
    by many times the noise.

    Args:
        noise: standard deviation of each series from frame to frame where nothing happens.
    """
    frames = len(values)
    if frames == 1:
        return values
    total, weight = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(-REACH, REACH + 1):
        near = torch.arange(frames).add(step)
        there = ((near >= 0) & (near < frames)).to(values.dtype)[:, None]
        other = values[near.clamp(0, frames - 1)]
        alike = torch.exp(-0.5 * ((other - values) / (ALIKE * noise).clamp(min=1e-6)).square())
        w = there * alike * torch.exp(torch.tensor(-0.5 * (step / TIME_SIGMA) ** 2))
        total, weight = total + w * other, weight + w
    return total / weight


def frame_noise(values: Float[Tensor, "frames n"]) -> Float[Tensor, " n"]:
    """Estimate each series' noise from frame to frame by its median second difference, which events do not move."""
    if len(values) < 3:
        return torch.zeros_like(values[0])
    bends = values[2:] - 2 * values[1:-1] + values[:-2]
    # White noise of unit variance has second differences of variance 6, and a median of .6745 σ.
    return bends.abs().median(0).values / (0.6745 * 6**0.5)
