"""Finishing touches: what is done to decoded frames before they are handed out (ours, beyond the paper).

`SampleConfig.finish` lists them in order, each a frozen dataclass of one signature, such as `KeepTone` (`tone.py`). The
paper has none. What the portrait itself gives to frames is the guided decoder's (`decoder.py`), before any touch.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from geodiff4d.video.frames import SampledFrames
from geodiff4d.video.inputs import Portrait


@runtime_checkable
class Finish(Protocol):
    """A finishing touch; implementations are frozen dataclasses, so that a configuration says all about them."""

    def __call__(self, frames: SampledFrames, portrait: Portrait) -> SampledFrames:
        """Return the finished frames. Every frame is finished alone: which others come along must not matter."""
        ...


def surface_mask(normals: Float[Tensor, "t 3 height width"]) -> Float[Tensor, "t 1 height width"]:
    """Return 1 where the normal that an image encodes is at least half a unit long, else 0.

    A surface's normals have unit length, and the background's grey encodes the zero vector.
    """
    return ((normals * 2 - 1).square().sum(1, keepdim=True) >= 0.25).float()
