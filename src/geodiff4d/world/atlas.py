"""Where everything lies in a subject's one texture: the head's atlas, then strips for what the head does not have."""

import torch
from jaxtyping import Float
from torch import Tensor

TEXTURE_SIZE = 512
STRIP_ROWS = 32
"""The shoulders' skirt."""
HAIR_TOP = TEXTURE_SIZE + STRIP_ROWS
SHELLS = 3
SHELL_ROWS = 64
"""Hair is drawn as three shells, the inner one first."""
EXTRA_TOP = HAIR_TOP + SHELLS * SHELL_ROWS
EXTRA_ROWS = 96
"""Eyes (left), plain colours (below 16 columns more), beard (the rest)."""
EYE_COLUMNS, PLAIN_COLUMNS = 96, 16
BEARD_LEFT = EYE_COLUMNS + PLAIN_COLUMNS
TEXTURE_HEIGHT = EXTRA_TOP + EXTRA_ROWS
PLAIN = ("frame", "lens")
"""Things of one colour, each a block of 16 × 16 texels."""


def place_uv(
    uv: Float[Tensor, "n 2"], top: int, rows: int, left: int = 0, columns: int = TEXTURE_SIZE
) -> Float[Tensor, "n 2"]:
    """Place unit coordinates in a block of the texture, a texel off its neighbours: bilinear reads stay inside."""
    x = (left + 1.5 + uv[:, 0] * (columns - 3)) / TEXTURE_SIZE
    return torch.stack([x, (top + 1.5 + uv[:, 1] * (rows - 3)) / TEXTURE_HEIGHT], -1)


def plain_uv(name: str, count: int) -> Float[Tensor, "n 2"]:
    """Coordinates of a one-coloured thing, `count` times."""
    row = EXTRA_TOP + 8 + 16 * PLAIN.index(name)
    return torch.tensor([[(EYE_COLUMNS + 8) / TEXTURE_SIZE, row / TEXTURE_HEIGHT]]).expand(count, 2).contiguous()


def eye_uv(local: Float[Tensor, "n 3"], radius_m: float) -> Float[Tensor, "n 2"]:
    """Coordinates of points of the eyeball relative to its centre: seen along the optical axis, z."""
    return place_uv(0.5 + 0.49 * local[:, :2] / radius_m, EXTRA_TOP, EXTRA_ROWS, 0, EYE_COLUMNS)


def eye_directions() -> Float[Tensor, "texels 3"]:
    """Unit directions of the eye block's texels, [96 · 96, 3]."""
    at = torch.arange(EYE_COLUMNS) + 0.5
    unit = ((at - 1.5) / (EYE_COLUMNS - 3) - 0.5) / 0.49
    y, x = torch.meshgrid(unit, unit, indexing="ij")
    z = (1 - x * x - y * y).clamp(min=0.01).sqrt()
    return torch.nn.functional.normalize(torch.stack([x, y, z], -1).reshape(-1, 3), dim=-1)
