"""Rendered footage: stores of open-world people, subjects × instants × views, memory-mapped (`data.rowstore`).

What a store holds of a frame: the image on plain grey, exact normals, the pose map and the mesh fragments of the
*tracked* head (its parameters carry a tracker's error), where each of its vertices falls in the image, and the face
crop. So its warped portraits cost no rasterisation and its motion is exact; its latents are encoded once
(`video.encode.encode_store`). A store of tracks has the same arrays: instants 0 … frames − 1 follow each other before
cameras that stand still, those after them are portraits of the same person at other times. `render` makes both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate as resized

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_config
from geodiff4d.data.estimated import as_estimated
from geodiff4d.data.footage.take import STRANGER, CachedFrames, DecodedFrames, FrameKey, Take, at_size
from geodiff4d.data.rowstore import Arrays, RowStore, take
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.meshes import Fragments
from geodiff4d.render.relief import LiftedPortrait, Relief, cells
from geodiff4d.render.viewpoints import openhead
from geodiff4d.render.warp import Carried, CompletedHead
from geodiff4d.world.seeds import Split
from geodiff4d.world.subject import WORLD_VERSION

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Subjects, instants and views."""


@dataclass(frozen=True)
class StoreConfig:
    """What is rendered."""

    split: Split = "train"
    subjects: int = 384
    instants: int = 6
    views: int = 5
    size: int = 256
    reference_views: int = 2
    """Views, the first ones, that can serve as reference: only they carry a texture."""
    supersample: int = 2
    crop: int = 96
    """Side of the driving crop [px]."""
    texels: int = 256
    """Side of the portrait's completed texture."""
    grid: int = 16
    """Side of the latent grid, for the foreground and focus maps."""
    seed: int = 0
    world: int = WORLD_VERSION
    """Version of the open world: pictures of another are not mixed in."""
    warps: int = 3
    """Version of what a portrait is warped by: since 2, gaze moves too and `render/hidden.py` paints what is hidden;
    since 3, `render/torso.py` holds clothes."""
    parameters: Literal["disturbed", "tracked"] = "disturbed"
    """Head parameters: the truth with a tracker's error, or what our tracker sees (`tracking/relabel.py`)."""
    strangers: bool = False
    """Somebody else, the same for all instants of a person, makes each of the expressions too, to drive with."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.subjects, self.instants, self.views

    def arrays(self, verts: int = 0) -> Arrays:
        """Return shape and type of every array, by name.

        `face` and `bary` are fragments of the head at zero expression, `moved_face` and `moved_bary` as its
        driver's tracked expression and gaze move it; `relief` and `follows` are sheets of what surrounds the
        portraits' heads (`render/relief.py`), `T_world_joint` of the tracked head's root and neck.
        """
        n, half = self.shape, self.size // 2
        image = (*n, 3, self.size, self.size)
        portraits, points = (*n[:2], self.reference_views), cells(self.size) ** 2
        return {
            "rgb": (image, "u1"), "normal": (image, "u1"), "pose": (image, "u1"),
            "face": ((*n, half, half), "i2"), "bary": ((*n, 2, half, half), "u1"),
            "moved_face": ((*n, half, half), "i2"), "moved_bary": ((*n, 2, half, half), "u1"),
            "carried": ((*portraits, verts, 3), "f2"),
            "texture": ((*portraits, 3, self.texels, self.texels), "u1"),
            "relief": ((*portraits, 2, points, 3), "f2"), "follows": ((*portraits, points), "f2"),
            "T_world_joint": ((*n[:2], 2, 4, 4), "f4"), "T_cam_world": ((*n, 4, 4), "f4"), "K": ((*n, 3, 3), "f4"),
            "crop": ((*n, 3, self.crop, self.crop), "u1"),
            **({"stranger": ((*n[:2], 3, self.crop, self.crop), "u1")} if self.strangers else {}),
            "cover": ((*n, self.grid, self.grid), "u1"), "focus": ((*n, self.grid, self.grid), "u1"),
            "expr": ((*n[:2], 52), "f4"), "joints": ((*n[:2], 9), "f4"), "done": ((n[0],), "u1"),
        }  # fmt: skip


@dataclass(frozen=True)
class TrackStoreConfig:
    """How many tracks are rendered, and how long."""

    subjects: int = 96
    frames: int = 24
    """Consecutive frames of a person."""
    portraits: int = 2
    """Further instants of the person, to start from: only they carry a texture."""
    views: int = 2
    fps: float = 24.0

    def store(self, like: StoreConfig) -> StoreConfig:
        """Return the store that holds the tracks: the sizes, split and seed of `like`, portraits from the front."""
        instants = self.frames + self.portraits
        return replace(like, subjects=self.subjects, instants=instants, views=self.views, reference_views=1)


class Store(RowStore):
    """Rendered people; `StoreConfig.arrays` says what there is of each."""

    NOTE, CONFIG = "store.json", StoreConfig
    CONSTANTS = "faces", "uv", "uv_faces"
    """The mesh that fragments and carried vertices refer to."""

    def __init__(self, folder: Path, writable: bool = False):
        super().__init__(folder, writable)
        if self.config.warps != StoreConfig.warps:
            raise UserError(f"{folder} is a store of another version: remove it and build it again")
        note = self.folder / "track.json"
        self.tracks = read_config(note, TrackStoreConfig) if note.exists() else None
        """Set if its first instants follow each other."""

    def motion(self, subject: np.ndarray, instant: np.ndarray) -> HeadParams:
        """Return expression, jaw and gaze of instants; the rest is zero."""
        joints, still = take(self.joints, (subject, instant)), openhead().neutral(len(subject))
        eyes = joints[:, 3:].reshape(still.eyes_pose.shape)
        return replace(still, expr=take(self.expr, (subject, instant)), jaw_pose=joints[:, :3], eyes_pose=eyes)


class RenderedFootage:
    """A store as footage: every subject a take; in a store of tracks two, the track and the portraits.

    `estimated` gives normals as an estimator would see them (`data.estimated`) in place of the exact ones.
    """

    def __init__(self, store: Store, estimated: bool = False):
        self.store, self.estimated = store, estimated
        self.name = str(getattr(store, "folder", "rendered"))
        self.cache: Path | None = None
        """Where its latents are, once `video.encode` has encoded them."""
        self._planes: np.ndarray | None = None
        self._head: Head | None = None
        (subjects, instants, views), tracks = store.config.shape, store.tracks
        strangers = store.config.strangers

        def takes(s: int) -> list[Take]:
            if tracks is None:
                whole = np.ones((instants, views), bool)
                return [Take(f"{s}", np.arange(instants), whole, False, motion=True, strangers=strangers)]
            whole = np.ones((tracks.frames, views), bool), np.ones((tracks.portraits, views), bool)
            return [
                Take(
                    f"{s}", np.arange(tracks.frames), whole[0], True, tracks.fps, motion=True, portraits=False,
                    strangers=strangers,
                ),
                Take(f"{s}", np.arange(tracks.portraits), whole[1], False, motion=True, targets=False),
            ]  # fmt: skip

        self.takes = [t for s in range(subjects) for t in takes(s)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_planes": None, "_head": None}

    @property
    def head(self) -> Head:
        """The head whose mesh the store refers to, which outlives a new version of OpenHead."""
        if self._head is None:
            mesh = {k: torch.from_numpy(np.array(getattr(self.store, k))) for k in Store.CONSTANTS}
            head = openhead()
            # Another mesh's vertices have no names here.
            regions = head.regions if self.store.carried.shape[-2] == len(head.template) else {}
            self._head = replace(head, **mesh, regions=regions)
        return self._head

    def reference_views(self, take: int) -> Sequence[int]:
        return range(min(self.store.config.reference_views, self.store.config.views))

    def driving_views(self, take: int) -> Sequence[int]:
        return range(self.store.config.views)

    def rows(self, keys: Sequence[FrameKey]) -> Rows:
        """Return where frames are in the store."""
        take, instant, view = np.array(keys, np.int64).reshape(-1, 3).T
        if self.store.tracks is None:
            return take, instant, view
        return take // 2, instant + take % 2 * self.store.tracks.frames, view

    def frames(self, keys: Sequence[FrameKey], size: int) -> DecodedFrames:
        return self.frames_at(self.rows(keys), size)

    def frames_at(self, rows: Rows, size: int) -> DecodedFrames:
        """Decode rows of the store."""
        rgb, normal, pose = (take(getattr(self.store, k), rows, 255.0) for k in ("rgb", "normal", "pose"))
        mask = foreground(normal)
        if self.estimated:
            seeds = np.ravel_multi_index(rows, self.store.config.shape).tolist()
            normal = torch.cat([as_estimated(n[None], seed) for n, seed in zip(normal, seeds, strict=True)])
        rgb, mask, normal, pose = (at_size(x, size) for x in (rgb, mask, normal, pose))
        focus = resized(take(self.store.focus, rows, 255.0)[:, None], (size, size))
        return DecodedFrames(rgb, mask, normal, torch.ones(len(rgb), dtype=torch.bool), pose, focus)

    def cached(self, keys: Sequence[FrameKey]) -> CachedFrames | None:
        if self.cache is None:
            return None
        planes = self._planes = np.load(self.cache, mmap_mode="r") if self._planes is None else self._planes
        rows = self.rows(keys)
        cover, focus = (take(x, rows, 255.0) for x in (self.store.cover, self.store.focus))
        return CachedFrames(take(planes, rows), cover, focus, torch.ones(len(cover), dtype=torch.bool))

    def driving(self, keys: Sequence[FrameKey], size: int) -> Float[Tensor, "n 3 size size"]:
        subject, instant, view = self.rows(keys)
        crops = take(self.store.crop, (subject, instant, view.clip(0)), 255.0)
        if (other := view == STRANGER).any():
            crops[torch.from_numpy(other)] = take(self.store.stranger, (subject[other], instant[other]), 255.0)
        return at_size(crops, size)

    def warped(
        self, reference: FrameKey, keys: Sequence[FrameKey], size: int, surroundings: bool = False,
        moved: np.ndarray | None = None,
    ) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 2 size size"]]:  # fmt: skip
        store, side = self.store, self.store.config.size
        own, rows = self.rows([reference]), self.rows(keys)
        rgb, normal, texture = (take(x, own, 255.0)[0] for x in (store.rgb, store.normal, store.texture))
        seen = take(store.carried, own)[0]
        portrait = LiftedPortrait(
            CompletedHead(self.head, rgb, Carried(seen[:, :2], seen[:, 2]), texture),
            torch.cat([rgb, foreground(normal[None])[0]]),
            Relief(take(store.relief, own)[0], take(store.follows, own)[0]) if surroundings else None,
        )
        face, planes = store.face[rows], store.bary[rows]
        if moved is not None and moved.any():
            face = np.where(moved[:, None, None], store.moved_face[rows], face)
            planes = np.where(moved[:, None, None, None], store.moved_bary[rows], planes)
        two = torch.from_numpy(planes).float().div_(255)
        bary = torch.cat([two, 1 - two.sum(1, keepdim=True)], 1).movedim(1, -1)
        fragments = Fragments(torch.from_numpy(face.astype(np.int64)), bary, torch.zeros_like(bary[..., 0]))
        cameras = Camera(take(store.T_cam_world, rows), take(store.K, rows), side, side)
        warp, visibility = portrait.shown(fragments, take(store.T_world_joint, rows[:2]), cameras)
        return at_size(warp, size), at_size(visibility, size)

    def motion(self, keys: Sequence[FrameKey]) -> HeadParams:
        return self.store.motion(*self.rows(keys)[:2])


def foreground(normal: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 1 height width"]:
    """Read the foreground off exact normal images: 1 where there is a surface."""
    return ((normal * 2 - 1).square().sum(1, keepdim=True) > 0.25).float()
