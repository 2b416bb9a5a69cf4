"""Portraits of a single tone, black-and-white or sepia (ours): their frames keep to it.

The model has learnt that lips and tongues are red and shirts have colours, and paints them so where a portrait does not
show them.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.video.frames import SampledFrames
from geodiff4d.video.inputs import Portrait

LEAST = 200
"""Fewest pixels of a surface that tell a tone."""
AWAY = 0.02
"""Nine in ten pixels of a portrait of one tone lie nearer to a line of colours; in colour they are 0.06 to 0.2 off."""


@dataclass(frozen=True)
class KeepTone:
    """Move the colours of frames to the portrait's tone, if it has a single one; in colour they stay as they are."""

    def __call__(self, frames: SampledFrames, portrait: Portrait) -> SampledFrames:
        """Return the frames in the portrait's tone."""
        tone = tone_of(portrait.image, portrait.mask)
        return frames if tone is None else replace(frames, rgb=tone.kept(frames.rgb))


@dataclass(frozen=True)
class Tone:
    """A line through the cube of colours."""

    mean: Float[Tensor, " 3"]
    axis: Float[Tensor, " 3"]
    """Of unit length."""

    def kept(self, rgb: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
        """Return the nearest colours on the line."""
        off = rgb - self.mean.view(3, 1, 1)
        along = (off * self.axis.view(3, 1, 1)).sum(-3, keepdim=True)
        return (self.mean.view(3, 1, 1) + along * self.axis.view(3, 1, 1)).clamp(0, 1)


def tone_of(image: Float[Tensor, "3 height width"], mask: Float[Tensor, "1 height width"]) -> Tone | None:
    """Return the line on which the colours of a portrait's surface lie, or None: it is in colour."""
    colours = image[:, mask[0] > 0.95].T
    if len(colours) < LEAST:
        return None
    mean = colours.mean(0)
    axis = torch.linalg.eigh((colours - mean).T @ (colours - mean)).eigenvectors[:, -1]
    tone = Tone(mean, axis)
    away = (tone.kept(colours.T[..., None])[..., 0].T - colours).norm(dim=1)
    return tone if away.kthvalue(round(0.9 * len(away))).values < AWAY else None
