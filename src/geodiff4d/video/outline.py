"""Outlines of generated frames (ours): where a model is unsure of one, it paints a mean of outlines, half background.

How much of a pixel is surface stands in the generated normals, whose background is grey. That share is turned into a
mask with a line for an edge, and the grey is taken out of the colours inside it.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from geodiff4d.video.finish import FinishContext
from geodiff4d.video.frames import SampledFrames

BARE, SOLID = 0.25, 0.5
"""Coverage at which a pixel is background, and foreground: an outline that the model is unsure of becomes a line."""
FULL = 0.9
"""Coverage that counts as all."""
LEAST = 0.55
"""Below this coverage no more grey is taken out, for what is left is noise."""


@dataclass(frozen=True)
class FreeOutline:
    """Make the mask from how much the generated normals cover, and take the grey out of the colours inside it.

    Frames without normals stay as they are.
    """

    gap: float = 0.03
    """Gaps in the coverage up to this share of the image's side are closed."""
    reach: float = 0.016
    """Colours stay between what they were and those of a full surface within this share of the image's side."""

    def __call__(self, frames: SampledFrames, context: FinishContext) -> SampledFrames:
        """Return the frames with other colours at their outlines, and with a mask that is soft there."""
        if frames.normals is None:
            return frames
        rgb, mask = freed(frames.rgb, coverage(frames.normals, self.gap), self.reach)
        return replace(frames, rgb=rgb, mask=mask)


def coverage(normals: Float[Tensor, "t 3 height width"], gap: float = 0.03) -> Float[Tensor, "t 1 height width"]:
    """Read off encoded normals how much of a pixel a surface covers: grey is "no surface", so a normal's length tells.

    Where the model wavers between two surfaces, their mean is short: gaps up to `gap` of the image's side are closed.
    """
    length = (normals * 2 - 1).square().sum(1, keepdim=True).sqrt().clamp(max=1)
    grown = _highest(length, round(gap * normals.shape[-1]))
    return -_highest(-grown, round(gap * normals.shape[-1]))


def freed(
    rgb: Float[Tensor, "t 3 height width"], cover: Float[Tensor, "t 1 height width"], reach: float = 0.016
) -> tuple[Float[Tensor, "t 3 height width"], Float[Tensor, "t 1 height width"]]:
    """Take the grey background out of decoded frames in [0, 1]: (colours, mask in [0, 1]).

    A colour that was not mixed after all would come out too strong, a dark or glaring line: within `reach` of the
    image's side of a full surface, colours stay between that surface's and what they were.
    """
    pure = (rgb - 0.5) / (cover / FULL).clamp(LEAST, 1) + 0.5
    radius = round(reach * rgb.shape[-1])
    full = cover >= FULL
    # Where no full surface is near, both bounds are infinite.
    high, low = (_highest(torch.where(full, sign * rgb, -torch.inf), radius) for sign in (1, -1))
    near = high > -torch.inf
    bounded = torch.minimum(torch.maximum(pure, torch.minimum(-low, rgb)), torch.maximum(high, rgb))
    mask = ((cover - BARE) / (SOLID - BARE)).clamp(0, 1)
    return torch.where(near, bounded, pure).clamp(0, 1), mask


def _highest(x: Float[Tensor, "t c height width"], radius: int) -> Float[Tensor, "t c height width"]:
    side = 2 * radius + 1
    return max_pool2d(max_pool2d(x, (side, 1), 1, (radius, 0)), (1, side), 1, (0, radius))
