"""Training footage behind one interface: here the interface and rendered stores, in `clip_footage` clips.

A piece of footage is a list of takes (one person, some instants, some views, with holes) and a way to decode frames of
one take and view to what the video model reads: picture on plain grey, normals, pose map, focus. Nothing is decoded
before it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate as resized

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import decode_normals
from geodiff4d.data.store import Store, carried_pixels

Kind = Literal["multi-view", "video", "images"]
ARKIT = 52
"""Expression weights of OpenHead."""


class FrameKey(NamedTuple):
    """A frame of some footage."""

    take: int
    instant: int
    """Position among the take's timesteps."""
    view: int
    """Position among the take's cameras."""


@dataclass(frozen=True)
class Take:
    """One person in front of some cameras for some time."""

    subject: str
    timesteps: np.ndarray
    """[instants], ascending."""
    present: np.ndarray
    """[instants, views] bool: holes are False."""
    temporal: bool
    """Instants follow each other; off, they are single pictures of the same person."""
    fps: float = 24.0
    """Rate of the instants, whatever their timesteps count."""


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one take, on the canonical crop."""

    rgb: Float[Tensor, "n 3 size size"]
    """On plain grey."""
    mask: Float[Tensor, "n 1 size size"]
    normal: Float[Tensor, "n 3 size size"]
    """Normal image, grey on the background and where the footage has none."""
    has_normal: bool
    pose: Float[Tensor, "n 3 size size"]
    """Pose map (Sec. 3.2)."""
    focus: Float[Tensor, "n 1 size size"]
    """1 on mouth, eyes and brows."""
    expr: Float[Tensor, "n 52"]
    """ARKit weights; NaN where the head's expressions are others."""


@runtime_checkable
class Footage(Protocol):
    """What a mixture draws from."""

    name: str
    takes: list[Take]

    def reference_views(self, take: int) -> Sequence[int]:
        """Views that show the face well enough for a portrait, the most frontal first; never empty."""
        ...

    def driving_views(self, take: int) -> Sequence[int]:
        """Views that show the expression; may be empty."""
        ...

    def frames(self, take: int, view: int, instants: Sequence[int], size: int) -> Frames:
        """Decode frames of one view."""
        ...

    def driving(self, take: int, view: int, instants: Sequence[int], size: int) -> Float[Tensor, "n 3 size size"]:
        """Cut the face from frames of one view."""
        ...

    def warped(
        self, reference: FrameKey, take: int, view: int, instants: Sequence[int], size: int, surroundings: bool = False
    ) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 2 size size"]]:
        """Carry a reference to frames' expressionless heads: the picture; what the portrait shows, and the head.

        With `surroundings`, hair and shoulders beside the mesh too.
        """
        ...


def kind_of(footage: Footage) -> Kind:
    """Say what footage is, by its largest takes."""
    if any(t.present.shape[1] > 1 for t in footage.takes):
        return "multi-view"
    return "video" if any(t.temporal for t in footage.takes) else "images"


class StoreFootage:
    """A rendered store: independent instants, every view everywhere. `size` must be the store's or it is resampled."""

    def __init__(self, folder: Path):
        """Open a store.

        Raises:
            UserError: it holds tracks, whose frames carry no texture.
        """
        self.name, self.folder = str(folder), Path(folder)
        if (self.folder / "track.json").exists():
            raise UserError(f"{folder} holds tracks: expected single pictures; tracks are for `train video` alone")
        self._store: Store | None = None
        subjects, instants, views = self.store.config.shape
        whole, steps = np.ones((instants, views), bool), np.arange(instants)
        self.takes = [Take(f"{s}", steps, whole, temporal=False) for s in range(subjects)]

    def __getstate__(self) -> dict[str, Any]:
        # Memory-mapped arrays would travel to workers as copies.
        return self.__dict__ | {"_store": None}

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store(self.folder)
        return self._store

    def reference_views(self, take: int) -> Sequence[int]:
        return range(min(self.store.config.reference_views, self.store.config.views))

    def driving_views(self, take: int) -> Sequence[int]:
        return range(self.store.config.views)

    def _rows(self, name: str, take: int, view: int, instants: Sequence[int]) -> Float[Tensor, "n *row"]:
        rows = np.array(getattr(self.store, name)[take][list(instants), view])
        return torch.from_numpy(rows).float() / 255

    def frames(self, take: int, view: int, instants: Sequence[int], size: int) -> Frames:
        where = (take, view, instants)
        normal = self._rows("normal", *where)
        mask = (decode_normals(normal).square().sum(1, keepdim=True) > 0.5).float()
        focus = self._rows("focus", *where)[:, None]
        expr = torch.from_numpy(np.array(self.store.expr[take][list(instants)]))
        rgb, pose = self._rows("rgb", *where), self._rows("pose", *where)
        rgb, mask, normal, pose = (_at(x, size) for x in (rgb, mask, normal, pose))
        return Frames(rgb, mask, normal, True, pose, resized(focus, (size, size)), expr)

    def driving(self, take: int, view: int, instants: Sequence[int], size: int) -> Float[Tensor, "n 3 size size"]:
        return _at(self._rows("crop", take, view, instants), size)

    def warped(
        self, reference: FrameKey, take: int, view: int, instants: Sequence[int], size: int, surroundings: bool = False
    ) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 2 size size"]]:
        n = len(instants)
        target = (np.full((1, n), take), np.array(instants)[None], np.full((1, n), view))
        ref = tuple(np.array([i]) for i in reference)
        warp, visibility = carried_pixels(self.store, ref, target, surroundings=surroundings)
        return _at(warp[0].transpose(0, 1), size), _at(visibility[0].transpose(0, 1), size)


def _at(images: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n c size size"]:
    if images.shape[-1] == size:
        return images
    return resized(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
