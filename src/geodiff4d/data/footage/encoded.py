"""Clips that were encoded into shards (`data.shards`) as footage: what `geodiff4d encode` writes, training reads.

Takes, their order and their frames are those of the clips, so a store is drawn from as its clips are, and mixes with
any other footage. There are latents and no decoded frames; warped portraits, for models that look at one, are drawn as
they come, from the images and head parameters that such a store has too.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.data.footage.clips import clip_head
from geodiff4d.data.footage.take import CachedFrames, DecodedFrames, FrameKey, at_size
from geodiff4d.data.shards import RecordConfig, Shards
from geodiff4d.heads import Head, HeadParams, load_head
from geodiff4d.render.relief import lift_portrait, render_still

PARTS = ("shape", "expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")


class EncodedFootage:
    """Stores of encoded clips, as one.

    Args:
        head: path of the head that clips on FLAME need.

    Raises:
        UserError: a store is unfinished or damaged, or they were made for different models.
    """

    def __init__(self, folders: Sequence[Path], head: str | None = None):
        self.name, self.folders, self.head_path = str(folders[0].parent if folders[1:] else folders[0]), folders, head
        self.stores = [Shards(folder) for folder in folders]
        made = [replace(s.config, heads=(), params=0, offsets=0, made_of="") for s in self.stores]
        for folder, config in zip(folders, made, strict=True):
            if config != made[0]:
                raise UserError(
                    f"{folder} was not encoded for the same model as {folders[0]}: encode one of them again"
                )
        self.estimated = made[0].estimated
        """Whether exact synthetic normals were degraded."""
        self.takes = [take for s in self.stores for take in s.index.takes]
        self._begins = np.cumsum([0, *(len(s.index.takes) for s in self.stores)]).tolist()

    def __reduce__(self) -> tuple[type, tuple[Sequence[Path], str | None]]:
        # Workers open the files by themselves.
        return type(self), (self.folders, self.head_path)

    def require(self, unfit: Callable[[RecordConfig], str | None]) -> None:
        """Check that it was encoded for a model.

        Args:
            unfit: says in which respect it was not.

        Raises:
            UserError: it was not.
        """
        if reason := unfit(self.stores[0].config):
            raise UserError(f"{self.name} was encoded {reason}: `geodiff4d encode` the clips for this model")

    def _store(self, take: int) -> tuple[int, Shards, int]:
        """Return which store has a take, and as which."""
        k = bisect_right(self._begins, take) - 1
        return k, self.stores[k], take - self._begins[k]

    def _ordered(self, take: int, what: str) -> list[int]:
        _, store, own = self._store(take)
        place = getattr(store.index, what)[int(store.index.first[own]) : int(store.index.first[own + 1])]
        return [int(v) for v in np.argsort(place, kind="stable") if place[v] >= 0]

    def reference_views(self, take: int) -> Sequence[int]:
        return self._ordered(take, "portrait")

    def driving_views(self, take: int) -> Sequence[int]:
        return self._ordered(take, "driver")

    def _runs(self, keys: Sequence[FrameKey]) -> Iterator[tuple[Shards, int, list[int]]]:
        """Yield (store, shard, records) of frames that follow each other in one shard."""

        def place(key: FrameKey) -> tuple[int, int, int]:
            k, store, own = self._store(key.take)
            recording = int(store.index.first[own]) + key.view
            before = int(self.takes[key.take].present[: key.instant, key.view].sum())
            return k, int(store.index.shard[recording]), int(store.index.row[recording]) + before

        for (k, shard), run in groupby(map(place, keys), lambda p: p[:2]):
            yield self.stores[k], shard, [row for _, _, row in run]

    def _read(self, keys: Sequence[FrameKey], field: str, scale: float = 1.0) -> Float[Tensor, "n *shape"]:
        parts = [store.read(shard, rows, field) for store, shard, rows in self._runs(keys)]
        return torch.from_numpy(np.concatenate(parts)).float().div_(scale)

    def cached(self, keys: Sequence[FrameKey]) -> CachedFrames:
        cover, focus = (self._read(keys, k, 255.0) for k in ("cover", "focus"))
        return CachedFrames(self._read(keys, "planes"), cover, focus, self._read(keys, "has_normal") > 0)

    def frames(self, keys: Sequence[FrameKey], size: int) -> DecodedFrames:
        raise UserError(f"{self.name} has latents and no images: give the clips that it was encoded from")

    def driving(self, keys: Sequence[FrameKey], size: int) -> Float[Tensor, "n 3 size size"]:
        return at_size(self._read(keys, "crop", 255.0), size)

    def motion(self, keys: Sequence[FrameKey]) -> HeadParams | None:
        if not all(self.takes[k.take].motion for k in keys):
            return None
        expr, jaw, eyes = self._read(keys, "motion").split((52, 3, 6), -1)
        return replace(load_head("openhead").neutral(len(keys)), expr=expr, jaw_pose=jaw, eyes_pose=eyes)

    def _head(self, take: int) -> Head:
        _, store, own = self._store(take)
        return clip_head(store.config.heads[int(store.index.head[own])], self.head_path)

    def _params(self, head: Head, keys: Sequence[FrameKey], field: str) -> HeadParams:
        params = unpacked(self._read(keys, field), head)
        if all(store.config.offsets for store, _, _ in self._runs(keys)):
            offset = self._read(keys, "offset")
            # Not a number where a clip has none.
            params = replace(params, static_offset=None if offset.isnan().any() else offset)
        return params

    def _cameras(self, keys: Sequence[FrameKey]) -> Camera:
        side = self.stores[0].config.size
        return Camera(self._read(keys, "T_cam_world"), self._read(keys, "K"), side, side)

    def warped(
        self, reference: FrameKey, keys: Sequence[FrameKey], size: int, surroundings: bool = False,
        moved: np.ndarray | None = None,
    ) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 2 size size"]]:  # fmt: skip
        head = self._head(reference.take)
        image, mesh = (
            self._read([reference], "image", 255.0)[0],
            head.pose(self._params(head, [reference], "params")[0]),
        )
        portrait = lift_portrait(head, image[:3], image[3:], mesh, self._cameras([reference])[0], size, surroundings)
        where = None if moved is None or not moved.any() else torch.from_numpy(moved)
        read = None if where is None else self._params(head, keys, "moved")
        return render_still(portrait, head, self._params(head, keys, "params"), self._cameras(keys), read, where)


def packed(params: HeadParams, head: Head, width: int) -> np.ndarray:
    """Lay head parameters out as rows of `width` numbers; those of lids are NaN where there are none."""
    like, n = head.neutral(1), len(params.rotation)
    row = torch.full((n, width), torch.nan)
    at = 0
    for name in PARTS:
        value, whole = getattr(params, name), getattr(like, name).shape[-1]
        row[:, at : at + whole] = torch.nn.functional.pad(value, (0, whole - value.shape[-1]))
        at += whole
    if params.eyelids is not None:
        row[:, at : at + 2] = params.eyelids
    return row.numpy()


def packed_width(head: Head) -> int:
    """Return how many numbers `packed` needs for a head."""
    like = head.neutral(1)
    return sum(getattr(like, name).shape[-1] for name in PARTS) + 2


def unpacked(rows: Float[Tensor, "n width"], head: Head) -> HeadParams:
    """Read what `packed` laid out."""
    like = head.neutral(1)
    sizes = [getattr(like, name).shape[-1] for name in PARTS]
    *values, lids, _ = rows.split((*sizes, 2, rows.shape[-1] - sum(sizes) - 2), -1)
    return HeadParams(*values, eyelids=None if lids.isnan().any() else lids)
