"""Clips as training footage: a folder of clips, whatever made them.

Clips may be uncut: their canonical crop (docs/CONVENTIONS.md), fixed per clip and camera, is found here; a clip that is
cropped already stays as it is. Driving crops are cut around the 68 landmarks of the tracked mesh at zero expression.
Only the clips' indices are held.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import composite, encode_normals
from geodiff4d.data.clip import Clip, ClipFrame, not_a_clip, read_header
from geodiff4d.data.footage import ARKIT, Footage, FrameKey, Frames, StoreFootage, Take
from geodiff4d.data.store import FOCUS_REGIONS
from geodiff4d.heads import Head, HeadParams, load_head
from geodiff4d.render.crops import canonical_crop_box, crop_image, face_crop_box, head_region
from geodiff4d.render.meshes import interpolate, rasterize, render_normals
from geodiff4d.render.relief import lift_portrait
from geodiff4d.world.tracker_error import disturbed

REFERENCE_DEG = 60.0
"""A view this far from the face's front can still serve as the portrait."""
DRIVING_DEG = 75.0
"""A view this far from the front still shows an expression."""
BOX_INSTANTS = 9
"""Instants, spread over a clip, whose heads decide its canonical crop."""
CROPPED = 0.15
"""A square picture whose canonical crop is this close to it (share of the side) counts as cropped already."""
OPEN_CLIPS = 32


def open_footage(folder: Path, head: str | None = None) -> Footage:
    """Open a rendered store, a clip, or a folder with clips anywhere below it.

    `head` is the path of the head that clips on FLAME need.

    Raises:
        UserError: there is nothing to train on.
    """
    folder = Path(folder)
    return StoreFootage(folder) if (folder / "store.json").exists() else ClipFootage(folder, head)


@dataclass(frozen=True)
class _Where:
    """Which clip a take is, and which of its timesteps."""

    folder: Path
    cameras: tuple[int, ...]


class ClipFootage:
    """A clip, or a folder of clips, which share subjects by `subject` or `participant` in their `extra`.

    A clip whose `extra` says `"stills": true` holds another person at every timestep; each becomes a take of its own.
    Frames without head parameters cannot serve and count as holes.

    Raises:
        UserError: no clip, or none with head parameters.
    """

    def __init__(self, folder: Path, head: str | None = None):
        self.name, self.head_path = str(folder), head
        self.takes: list[Take] = []
        self._where: list[_Where] = []
        self._clips: OrderedDict[Path, tuple[Clip, dict[tuple[int, int], int]]] = OrderedDict()
        self._tracked: OrderedDict[int, HeadParams] = OrderedDict()
        self._views: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._boxes: dict[tuple[int, int], tuple[float, float, float] | None] = {}
        found = [folder] if (folder / "transforms.json").exists() else _clips_below(folder)
        if not found:
            raise UserError(
                f"{folder} has nothing to train on: expected a clip, a folder of clips (from import, synth or track) "
                "or a rendered store"
            )
        for path in found:
            self._index(path)
        if not self.takes:
            raise UserError(f"{folder} has clips without head parameters: run `geodiff4d track` on them first")

    def _index(self, path: Path) -> None:
        """Note which frames a clip has, without opening any."""
        header = read_header(path)
        try:
            pairs = [
                (int(f["timestep_index"]), int(f["camera_index"])) for f in header.frames if f.get("flame_param_path")
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise not_a_clip(path, error) from None
        if not pairs:
            return
        steps, cameras = sorted({t for t, _ in pairs}), sorted({c for _, c in pairs})
        row, column = {t: i for i, t in enumerate(steps)}, {c: i for i, c in enumerate(cameras)}
        present = np.zeros((len(steps), len(cameras)), bool)
        for t, c in pairs:
            present[row[t], column[c]] = True
        subject = str(header.extra.get("subject", header.extra.get("participant", path)))
        if header.head_name != "openhead":
            # A person tracked on two heads is two: no head can pose the other's parameters.
            subject += f" on {header.head_name}"
        where = _Where(path, tuple(cameras))
        if header.extra.get("stills"):
            for i, t in enumerate(steps):
                self.takes.append(Take(f"{path}:{t}", np.array([t]), present[i : i + 1], False, header.fps))
                self._where.append(where)
        else:
            self.takes.append(Take(subject, np.array(steps), present, len(steps) > 1, header.fps))
            self._where.append(where)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_clips": OrderedDict(), "_tracked": OrderedDict()}

    def _opened(self, take: int) -> tuple[Clip, dict[tuple[int, int], int]]:
        path = self._where[take].folder
        if path not in self._clips:
            clip = Clip(path)
            self._clips[path] = clip, {(r.timestep, r.camera_index): i for i, r in enumerate(clip.records)}
            _forget(self._clips)
        self._clips.move_to_end(path)
        return self._clips[path]

    def _clip(self, take: int) -> Clip:
        return self._opened(take)[0]

    def _head(self, take: int) -> Head:
        return _head(self._clip(take).head_name, self.head_path)

    def _records(self, take: int, view: int, instants: Sequence[int]) -> list[int]:
        """Return positions of frames in the clip."""
        camera, (_, at) = self._where[take].cameras[view], self._opened(take)
        return [at[int(self.takes[take].timesteps[i]), camera] for i in instants]

    def _params(self, take: int, instants: Sequence[int]) -> HeadParams:
        clip, steps = self._clip(take), self.takes[take].timesteps
        if clip.extra.get("params") != "truth":
            return HeadParams.stack([clip.params(int(steps[i])) for i in instants])
        # Models are trained on what a tracker would have found, not on the truth; its error drifts over the clip.
        if take not in self._tracked:
            whole = HeadParams.stack([clip.params(int(t)) for t in steps])
            self._tracked[take] = disturbed(whole, int(clip.extra.get("subject_seed", 0)))
            _forget(self._tracked)
        return self._tracked[take][torch.tensor(list(instants))]

    def _seen(self, take: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the views that can be a reference and those that can drive, by their angle to the face's front."""
        if take not in self._views:
            present = self.takes[take].present
            first = present.argmax(0)
            mesh = self._head(take).pose(self._params(take, [int(i) for i in first]))
            records = [self._records(take, v, [int(i)])[0] for v, i in enumerate(first)]
            eyes = torch.stack([self._clip(take).records[r].camera.position for r in records])
            front = mesh.T_world_joint[:, 1, :3, 2]
            toward = torch.nn.functional.normalize(eyes - mesh.vertices.mean(1), dim=-1)
            degrees = torch.rad2deg((front * toward).sum(-1).clamp(-1, 1).acos()).numpy()
            order = np.argsort(degrees, kind="stable")
            portraits = [int(v) for v in order if degrees[v] <= REFERENCE_DEG] or [int(order[0])]
            self._views[take] = tuple(portraits), tuple(int(v) for v in order if degrees[v] <= DRIVING_DEG)
        return self._views[take]

    def reference_views(self, take: int) -> Sequence[int]:
        return self._seen(take)[0]

    def driving_views(self, take: int) -> Sequence[int]:
        return self._seen(take)[1]

    def _box(self, take: int, view: int) -> tuple[float, float, float] | None:
        """Return the canonical crop of a view, None if its pictures are that already."""
        if (take, view) not in self._boxes:
            there = np.nonzero(self.takes[take].present[:, view])[0]
            picked = there[np.unique(np.linspace(0, len(there) - 1, BOX_INSTANTS).round().astype(int))].tolist()
            head = self._head(take)
            vertices = head.pose(self._params(take, picked)).vertices[:, head_region(head)]
            cameras = self._cameras(take, view, picked)
            left, top, side = box = canonical_crop_box(cameras, vertices)
            if not np.isfinite(box).all() or side < 1:
                raise UserError(
                    f"{self._where[take].folder}: the head of camera {self._where[take].cameras[view]} is not in its "
                    "picture; check cameras and head parameters"
                )
            w, h = cameras.width, cameras.height
            near = max(abs(left), abs(top), abs(left + side - w), abs(top + side - h)) < CROPPED * w
            self._boxes[take, view] = None if w == h and near else box
        return self._boxes[take, view]

    def _cameras(self, take: int, view: int, instants: Sequence[int]) -> Camera:
        clip = self._clip(take)
        return Camera.stack([clip.records[r].camera for r in self._records(take, view, instants)])

    def _cut(
        self, take: int, view: int, instants: Sequence[int], size: int
    ) -> tuple[list[ClipFrame], tuple[float, float, float], Camera]:
        """Read frames; return them with the canonical crop and its cameras."""
        clip = self._clip(take)
        read = [clip.frame(r) for r in self._records(take, view, instants)]
        box = self._box(take, view) or (0.0, 0.0, float(read[0].camera.width))
        return read, box, Camera.stack([f.camera.cropped(*box, size) for f in read])

    def frames(self, take: int, view: int, instants: Sequence[int], size: int) -> Frames:
        head, params = self._head(take), self._params(take, instants)
        read, box, cameras = self._cut(take, view, instants, size)
        rgb = torch.stack([_sampled(composite(f.image, f.mask), box, size, 0.5) for f in read])
        mask = torch.stack([_sampled(f.mask, box, size, 0.0) for f in read])
        has_normal = all(f.normal is not None for f in read)
        normal = torch.full_like(rgb, 0.5)
        if has_normal:
            cut = torch.stack([_sampled(f.normal, box, size, 0.0) for f in read if f.normal is not None])
            # torch's norm over a strided axis is slow on a CPU.
            square = cut.square().sum(1, keepdim=True)
            normal = encode_normals(cut * square.clamp(min=1e-6).rsqrt(), mask * (square > 1e-2))
        still = head.pose(params.without_expression())
        fragments = rasterize(still.vertices, still.faces, cameras)
        pose = encode_normals(*render_normals(still, cameras, fragments))
        focus = interpolate(fragments, head.faces, _focus(head)).clamp(0, 1)
        expr = params.expr if head.name == "openhead" else torch.full((len(instants), ARKIT), torch.nan)
        return Frames(rgb, mask, normal, has_normal, pose, focus, expr)

    def driving(self, take: int, view: int, instants: Sequence[int], size: int) -> Float[Tensor, "n 3 size size"]:
        head, clip = self._head(take), self._clip(take)
        # At zero expression, as when driving: an open mouth must not widen the cut that shows it.
        still = head.pose(self._params(take, instants).without_expression())
        xy, _ = self._cameras(take, view, instants).project(head.landmarks68.on(still.vertices, head.faces))
        read = (clip.frame(r) for r in self._records(take, view, instants))
        cut = [crop_image(composite(f.image, f.mask), face_crop_box(p), size) for f, p in zip(read, xy, strict=True)]
        return torch.stack(cut)

    def warped(
        self, reference: FrameKey, take: int, view: int, instants: Sequence[int], size: int, surroundings: bool = False
    ) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 2 size size"]]:
        head = self._head(take)
        (frame,), box, camera = self._cut(reference.take, reference.view, [reference.instant], size)
        image = _sampled(composite(frame.image, frame.mask), box, size, 0.5)
        mask = _sampled(frame.mask, box, size, 0.0)
        mesh = head.pose(self._params(reference.take, [reference.instant])[0])
        portrait = lift_portrait(head, image, mask, mesh, camera[0], size, surroundings)
        box = self._box(take, view) or (0.0, 0.0, float(self._cameras(take, view, instants).width))
        cameras = self._cameras(take, view, instants).cropped(*box, size)
        still = head.pose(self._params(take, instants).without_expression())
        fragments = rasterize(still.vertices, still.faces, cameras)
        return portrait.shown(fragments, still.T_world_joint, cameras)


def _sampled(
    image: Float[Tensor, "c h w"], box: tuple[float, float, float], size: int, fill: float
) -> Float[Tensor, "c size size"]:
    if box == (0.0, 0.0, float(size)) and image.shape[-2:] == (size, size):
        return image
    return crop_image(image, box, size, fill)


def _clips_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected clips (from import, synth or track) or a rendered store")
    found = (p.parent for p in folder.rglob("transforms.json"))
    # What is being written has a hidden name, and may still vanish.
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _forget(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) > OPEN_CLIPS:
        cache.popitem(last=False)


@cache
def _head(name: str, path: str | None) -> Head:
    """Load a clip's head: the file that was given, else by its name.

    Raises:
        UserError: it is FLAME and no file is known, or the file is of another model.
    """
    if path is None or name == "openhead":
        return load_head(name)
    head = load_head(path)
    if name not in ("flame", head.name):
        raise UserError(f"a clip was tracked with the head {name!r}, but {path} is {head.name!r}: give its file")
    return head


def _focus(head: Head) -> Float[Tensor, "verts 1"]:
    regions = [head.regions[r] for r in FOCUS_REGIONS if r in head.regions]
    return torch.stack(regions).any(0).float()[:, None] if regions else torch.zeros_like(head.template[:, :1])
