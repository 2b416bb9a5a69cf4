"""Augmentation of driving crops, and of nothing else (Sec. 3.1): pixelwise and spatial.

Ranges are ours (the paper names the operations only); `docs/PAPER.md` lists them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample


@dataclass(frozen=True)
class AugmentConfig:
    """Half-widths of uniform ranges; the identity is always inside."""

    brightness: float = 0.2
    contrast: float = 0.4
    saturation: float = 0.6
    noise: float = 0.05
    blur: float = 0.3
    """Probability of a 3×3 box blur."""
    scale: float = 0.12
    rotation: float = 0.2
    """[rad]"""
    translation: float = 0.08
    """As a share of the crop's side."""


def augment_crops(
    crops: Float[Tensor, "n 3 size size"], config: AugmentConfig, generator: torch.Generator
) -> Float[Tensor, "n 3 size size"]:
    """Change how a driving crop looks and where the face sits in it, but not its expression."""
    n = len(crops)

    def uniform(half: float) -> Tensor:
        return (torch.rand(n, generator=generator).to(crops) * 2 - 1) * half

    zoom, turn = 1 + uniform(config.scale), uniform(config.rotation)
    dx, dy = 2 * uniform(config.translation), 2 * uniform(config.translation)
    theta = torch.stack([zoom * turn.cos(), -zoom * turn.sin(), dx, zoom * turn.sin(), zoom * turn.cos(), dy], -1).view(
        n, 2, 3
    )
    x = grid_sample(
        crops, affine_grid(theta, list(crops.shape), align_corners=False), padding_mode="border", align_corners=False
    )

    def column(v: Shaped[Tensor, " n"]) -> Shaped[Tensor, "n 1 1 1"]:
        return v[:, None, None, None]

    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * column(1 + uniform(config.saturation))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * column(1 + uniform(config.contrast)) + column(uniform(config.brightness))
    blurred = torch.rand(n, generator=generator).to(x) < config.blur
    x = torch.where(column(blurred), avg_pool2d(x, 3, 1, 1, count_include_pad=False), x)
    strength = column(uniform(config.noise).abs())
    return (x + torch.randn(x.shape, generator=generator).to(x) * strength).clamp(0, 1)
