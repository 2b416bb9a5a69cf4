"""Frames between the codec and whoever asked for them, and the warped portrait beside them."""

from dataclasses import dataclass, fields

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SampledFrames:
    """Consecutive frames of a clip, as decoded or after some finishing touches."""

    rgb: Float[Tensor, "t 3 height width"]
    """In [0, 1]."""
    normals: Float[Tensor, "t 3 height width"] | None
    """As images (`encode_normals`); None if the model generates none."""
    mask: Float[Tensor, "t 1 height width"]
    """Foreground in [0, 1], at first `surface_mask`; 1 everywhere if there are no normals."""


@dataclass(frozen=True)
class WarpedFrames:
    """The warped portrait in each frame."""

    rgb: Float[Tensor, "t 3 height width"]
    seen: Float[Tensor, "t 1 height width"]
    """Where the portrait itself shows the place, 0 to 1."""
    inside: Float[Tensor, "t 1 height width"]
    """Where the head's mesh is, 0 to 1."""
    opened: Float[Tensor, "t 1 height width"]
    """Where the inside of the mouth is that the portrait hides, 0 to 1."""
    pose: Float[Tensor, "t 3 rows columns"]
    """Pose maps: the head's normals at zero expression, as images; they may be smaller."""

    def __getitem__(self, frame: int) -> "WarpedFrames":
        return WarpedFrames(*(getattr(self, f.name)[frame : frame + 1] for f in fields(self)))
