"""Normals as a monocular estimator would give them: what training without exact synthetic normals has (Table 2)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from geodiff4d.core.images import encode_normals

BLUR = 0.06
"""How far relief is smeared, as a share of the picture's side."""
TILT = 0.15
"""Deviation of the error that neighbouring pixels share, per coordinate of the normal; with the blur some 12° in all,
as our own estimator's (docs/TRACKING.md)."""
PATCHES = 8
"""Over so many patches along a side that error changes."""


def as_estimated(normals: Float[Tensor, "n 3 height width"], seed: int = 0) -> Float[Tensor, "n 3 height width"]:
    """Degrade encoded normals in [0, 1]: fine relief is lost, and what is left leans one way here and another there.

    The background stays grey. The same pictures and seed give the same error.
    """
    n = normals * 2 - 1
    mask = (n.square().sum(1, keepdim=True) > 0.25).to(n.dtype)
    side = 2 * round(BLUR * n.shape[-1] / 2) + 1
    # Three boxes are nearly a Gaussian; the foreground alone is averaged.
    smooth, weight = n * mask, mask
    for _ in range(3):
        smooth, weight = (_box(x, side) for x in (smooth, weight))
    g = torch.Generator().manual_seed(seed)
    tilt = TILT * torch.randn(len(n), 3, PATCHES, PATCHES, generator=g)
    tilt = interpolate(tilt.to(n), size=n.shape[-2:], mode="bicubic", align_corners=False)
    out = smooth / weight.clamp(min=1e-6) + tilt
    out = out * (out.square().sum(1, keepdim=True) + 1e-12).rsqrt()
    return encode_normals(out, mask)


def _box(x: Float[Tensor, "n c height width"], side: int) -> Float[Tensor, "n c height width"]:
    """Average over squares, first down and then across."""
    return avg_pool2d(avg_pool2d(x, (side, 1), 1, (side // 2, 0)), (1, side), 1, (0, side // 2))
