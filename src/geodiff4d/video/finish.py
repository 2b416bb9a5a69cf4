"""Finishing touches: what is done to decoded frames before they are handed out (ours, beyond the paper).

`SampleConfig.finish` lists them in order, each a frozen dataclass of one signature, such as `KeepTone` (`tone.py`). The
paper has none. What the portrait itself gives to frames is the guided decoder's (`decoder.py`), before any touch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from geodiff4d.video.frames import SampledFrames, WarpedFrames
from geodiff4d.video.inputs import Portrait
from geodiff4d.video.model import ConditionImages


@dataclass(frozen=True)
class FinishContext:
    """What is known of the frames beside what was decoded."""

    portrait: Portrait
    warp: Callable[[], ConditionImages] | None
    """Draws the frames' condition images; None for a model that is not conditioned on the warped portrait."""

    @cached_property
    def warped(self) -> WarpedFrames | None:
        """The frames' warped portraits, drawn once for all touches; None where the model knows none."""
        if self.warp is None:
            return None
        drawn = self.warp()
        assert drawn.warp is not None
        assert drawn.visibility is not None
        assert drawn.opened is not None
        rgb, visibility, opened, pose = (
            rearrange(x, "1 c t h w -> t c h w") for x in (drawn.warp, drawn.visibility, drawn.opened, drawn.pose)
        )
        return WarpedFrames(rgb, visibility[:, :1], visibility[:, 1:], opened, pose)


@runtime_checkable
class Finish(Protocol):
    """A finishing touch; implementations are frozen dataclasses, so that a configuration says all about them."""

    def __call__(self, frames: SampledFrames, context: FinishContext) -> SampledFrames:
        """Return the finished frames. Every frame is finished alone: which others come along must not matter."""
        ...


def surface_mask(normals: Float[Tensor, "t 3 height width"]) -> Float[Tensor, "t 1 height width"]:
    """Return 1 where the normal that an image encodes is at least half a unit long, else 0.

    A surface's normals have unit length, and the background's grey encodes the zero vector.
    """
    return ((normals * 2 - 1).square().sum(1, keepdim=True) >= 0.25).float()
