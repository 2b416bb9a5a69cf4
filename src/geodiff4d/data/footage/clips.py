"""Clips as training footage: captures from several views, films and single photographs, whatever imported them.

Clips may be uncut: their canonical crop (docs/CONVENTIONS.md), fixed per clip and camera, is found here; a clip that is
cropped already stays as it is. Driving crops are cut around the 68 landmarks of the tracked mesh at zero expression.
Only the clips' indices are held.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import groupby
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
from geodiff4d.data.estimated import as_estimated
from geodiff4d.data.footage.take import HELD_OUT, CachedFrames, DecodedFrames, FrameKey, Take, of_mesh
from geodiff4d.heads import Head, HeadParams, load_head
from geodiff4d.heads.rig import SKULL_JOINT
from geodiff4d.render.crops import canonical_crop_box, crop_image, face_crop_box, head_region
from geodiff4d.render.relief import lift_portrait, render_still
from geodiff4d.world.seeds import generator
from geodiff4d.world.tracker_error import disturbed, moved_as_tracked

REFERENCE_DEG = 60.0
"""A view this far from the face's front can still serve as the portrait."""
DRIVING_DEG = 75.0
"""A view this far from the front still shows an expression."""
BOX_INSTANTS = 9
"""Instants, spread over a clip, whose heads decide its canonical crop."""
CROPPED = 0.15
"""A square picture whose canonical crop is this close to it (share of the side) counts as cropped already."""
OPEN_CLIPS, RECENT_FRAMES = 32, 8


@dataclass(frozen=True)
class _Where:
    """Which clip a take is, and which of its timesteps."""

    folder: Path
    cameras: tuple[int, ...]
    head: str


_NOWHERE = _Where(Path(), (), "")
_NOTHING = Take("", np.zeros(0, np.int64), np.zeros((0, 0), bool), False)


class ClipFootage:
    """A clip, or a folder of clips, which share subjects by `subject` or `participant` in their `extra`.

    A clip whose `extra` says `"stills": true` holds another person at every timestep; each becomes a take of its own.
    Frames without head parameters, or whose parameters nobody read, cannot serve and count as holes. What lies in a
    folder `val` below is left out, or, with `held_out`, all there is.

    Args:
        head: path of the head that clips on FLAME need.
        estimated: give exact synthetic normals, the open world's and SynthHuman's, as an estimator would see them.

    Raises:
        UserError: no clip, or none with head parameters.
    """

    def __init__(self, folder: Path, head: str | None = None, estimated: bool = False, held_out: bool = False):
        self.name, self.head_path, self.estimated = str(folder), head, estimated
        self.takes: list[Take] = []
        self._where: list[_Where] = []
        self._clips: OrderedDict[Path, tuple[Clip, dict[tuple[int, int], int]]] = OrderedDict()
        self._whole: OrderedDict[tuple[str, int], HeadParams] = OrderedDict()
        self._frames: OrderedDict[tuple[Path, int], ClipFrame] = OrderedDict()
        self._views: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._boxes: dict[tuple[int, int], tuple[float, float, float] | None] = {}
        found = clips_below(folder, held_out)
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
                (int(f["timestep_index"]), int(f["camera_index"]))
                for f in header.frames
                if f.get("flame_param_path") and not f.get("unread")
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
        known = header.head_name == "openhead"
        if not known:
            # A person tracked on two heads is two: no head can pose the other's parameters.
            subject += f" on {header.head_name}"
        where = _Where(path, tuple(cameras), header.head_name)
        if header.extra.get("stills"):
            for i, t in enumerate(steps):
                self.takes.append(Take(f"{path}:{t}", np.array([t]), present[i : i + 1], False, header.fps, known))
                self._where.append(where)
        else:
            self.takes.append(Take(subject, np.array(steps), present, len(steps) > 1, header.fps, known))
            self._where.append(where)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_clips": OrderedDict(), "_whole": OrderedDict(), "_frames": OrderedDict()}

    def head_name(self, take: int) -> str:
        """Return the name of the head that a take's parameters are of."""
        return self._where[take].head

    def part(self, takes: Iterable[int]) -> "ClipFootage":
        """Return footage that has some takes alone, under their numbers: what a process is sent to read them."""
        chosen, part = set(takes), copy(self)
        part.__dict__.update(self.__getstate__(), _views={}, _boxes={})
        part.takes = [t if i in chosen else _NOTHING for i, t in enumerate(self.takes)]
        part._where = [w if i in chosen else _NOWHERE for i, w in enumerate(self._where)]
        return part

    def poses(self, take: int, view: int, instants: Sequence[int], size: int) -> tuple[HeadParams, HeadParams, Camera]:
        """Return heads as tracked, the same as `warped` moves them, and the cameras of the canonical crop."""
        params, cameras = self.params(take, instants), self._cameras(take, view, instants)
        moved = self._of_all("moved", take)[torch.tensor(list(instants))] if self.takes[take].motion else params
        box = self.crop_box(take, view) or (0.0, 0.0, float(cameras.width))
        return params, moved, cameras.cropped(*box, size)

    def _opened(self, take: int) -> tuple[Clip, dict[tuple[int, int], int]]:
        path = self._where[take].folder
        if path not in self._clips:
            clip = Clip(path)
            self._clips[path] = clip, {(r.timestep, r.camera_index): i for i, r in enumerate(clip.records)}
            _forget(self._clips)
        self._clips.move_to_end(path)
        return self._clips[path]

    def _frame(self, take: int, record: int) -> ClipFrame:
        """Read a frame; a sample may ask for one more than once."""
        at = self._where[take].folder, record
        if at not in self._frames:
            self._frames[at] = self._clip(take).frame(record)
            while len(self._frames) > RECENT_FRAMES:
                self._frames.popitem(last=False)
        return self._frames[at]

    def _clip(self, take: int) -> Clip:
        return self._opened(take)[0]

    def _head(self, take: int) -> Head:
        return clip_head(self._where[take].head, self.head_path)

    def _records(self, take: int, view: int, instants: Sequence[int]) -> list[int]:
        """Return positions of frames in the clip."""
        camera, (_, at) = self._where[take].cameras[view], self._opened(take)
        return [at[int(self.takes[take].timesteps[i]), camera] for i in instants]

    def params(self, take: int, instants: Sequence[int]) -> HeadParams:
        """Return what a tracker found: of clips with true parameters, what it would have found."""
        if self._clip(take).extra.get("params") == "truth":
            return self._of_all("tracked", take)[torch.tensor(list(instants))]
        return self._told(take, instants)

    def _told(self, take: int, instants: Sequence[int]) -> HeadParams:
        clip, steps = self._clip(take), self.takes[take].timesteps
        return HeadParams.stack([clip.params(int(steps[i])) for i in instants])

    def _of_all(self, what: str, take: int) -> HeadParams:
        """Return a whole take's parameters as `tracked`, or as a driver's that has `moved` them: errors drift."""
        if (what, take) not in self._whole:
            every, clip = range(len(self.takes[take].timesteps)), self._clip(take)
            if what == "tracked":
                found = disturbed(self._told(take, every), int(clip.extra.get("subject_seed", 0)))
            else:
                seed = int(generator("clip", clip.folder.name, take).integers(1 << 31))
                found = moved_as_tracked(
                    self.params(take, every), self._told(take, every), seed, self.takes[take].temporal
                )
            self._whole[what, take] = found
            _forget(self._whole)
        return self._whole[what, take]

    def _seen(self, take: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the views that can be a reference and those that can drive, by their angle to the face's front."""
        if take not in self._views:
            present = self.takes[take].present
            first = present.argmax(0)
            mesh = self._head(take).pose(self.params(take, [int(i) for i in first]))
            records = [self._records(take, v, [int(i)])[0] for v, i in enumerate(first)]
            eyes = torch.stack([self._clip(take).records[r].camera.position for r in records])
            front = mesh.T_world_joint[:, SKULL_JOINT, :3, 2]
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

    def crop_box(self, take: int, view: int) -> tuple[float, float, float] | None:
        """Return the canonical crop of a view, None if its pictures are that already."""
        if (take, view) not in self._boxes:
            there = np.nonzero(self.takes[take].present[:, view])[0]
            picked = there[np.unique(np.linspace(0, len(there) - 1, BOX_INSTANTS).round().astype(int))].tolist()
            head = self._head(take)
            vertices = head.pose(self.params(take, picked)).vertices[:, head_region(head)]
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
        read = [self._frame(take, r) for r in self._records(take, view, instants)]
        box = self.crop_box(take, view) or (0.0, 0.0, float(read[0].camera.width))
        return read, box, Camera.stack([f.camera.cropped(*box, size) for f in read])

    def frames(self, keys: Sequence[FrameKey], size: int) -> DecodedFrames:
        parts = [self._decoded(*run, size) for run in _runs(keys)]
        return DecodedFrames(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(DecodedFrames)))

    def _decoded(self, take: int, view: int, instants: list[int], size: int) -> DecodedFrames:
        head, params = self._head(take), self.params(take, instants)
        read, box, cameras = self._cut(take, view, instants, size)
        rgb = torch.stack([_sampled(composite(f.image, f.mask), box, size, 0.5) for f in read])
        mask = torch.stack([_sampled(f.mask, box, size, 0.0) for f in read])
        has_normal = torch.tensor([f.normal is not None for f in read])
        cut = [torch.zeros_like(x) if f.normal is None else _sampled(f.normal, box, size, 0.0)
               for f, x in zip(read, rgb, strict=True)]  # fmt: skip
        normal = torch.stack(cut)
        # torch's norm over a strided axis is slow on a CPU.
        square = normal.square().sum(1, keepdim=True)
        normal = encode_normals(normal * square.clamp(min=1e-6).rsqrt(), mask * (square > 1e-2))
        extra = self._clip(take).extra
        if self.estimated and (extra.get("params") == "truth" or extra.get("dataset") == "SynthHuman"):
            seeds = [int(generator("estimated", take, i, view).integers(1 << 31)) for i in instants]
            normal = torch.cat([as_estimated(n[None], seed) for n, seed in zip(normal, seeds, strict=True)])
        return DecodedFrames(
            rgb, mask, normal, has_normal, *of_mesh(head, head.pose(params.without_expression()), cameras)
        )

    def cached(self, keys: Sequence[FrameKey]) -> CachedFrames | None:
        return None

    def driving(self, keys: Sequence[FrameKey], size: int) -> Float[Tensor, "n 3 size size"]:
        out = []
        for take, view, instants in _runs(keys):
            head = self._head(take)
            # At zero expression, as when driving: an open mouth must not widen the cut that shows it.
            still = head.pose(self.params(take, instants).without_expression())
            xy, _ = self._cameras(take, view, instants).project(head.landmarks68.on(still.vertices, head.faces))
            for record, points in zip(self._records(take, view, instants), xy, strict=True):
                f = self._frame(take, record)
                out.append(crop_image(composite(f.image, f.mask), face_crop_box(points), size))
        return torch.stack(out)

    def warped(
        self, reference: FrameKey, keys: Sequence[FrameKey], size: int, surroundings: bool = False,
        moved: np.ndarray | None = None,
    ) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 2 size size"]]:  # fmt: skip
        own, (image, mask, camera) = self._head(reference.take), self._portrait(reference, size)
        mesh = own.pose(self.params(reference.take, [reference.instant])[0])
        portrait, shown, first = lift_portrait(own, image, mask, mesh, camera, size, surroundings), [], 0
        for take, view, instants in _runs(keys):
            box = self.crop_box(take, view) or (0.0, 0.0, float(self._cameras(take, view, instants).width))
            cameras = self._cameras(take, view, instants).cropped(*box, size)
            here, read = None, None
            if moved is not None and moved[first : first + len(instants)].any():
                here = torch.from_numpy(moved[first : first + len(instants)])
                read = self._of_all("moved", take)[torch.tensor(instants)]
            shown.append(render_still(portrait, own, self.params(take, instants), cameras, read, here))
            first += len(instants)
        return torch.cat([x[0] for x in shown]), torch.cat([x[1] for x in shown])

    def _portrait(
        self, key: FrameKey, size: int
    ) -> tuple[Float[Tensor, "3 size size"], Float[Tensor, "1 size size"], Camera]:
        """Return a frame as a portrait: (image on grey, mask, camera)."""
        (frame,), box, camera = self._cut(key.take, key.view, [key.instant], size)
        image = _sampled(composite(frame.image, frame.mask), box, size, 0.5)
        return image, _sampled(frame.mask, box, size, 0.0), camera[0]

    def motion(self, keys: Sequence[FrameKey]) -> HeadParams | None:
        if not all(self.takes[k.take].motion for k in keys):
            return None
        told = HeadParams.stack([self._told(k.take, [k.instant])[0] for k in keys])
        still = load_head("openhead").neutral(len(keys))
        return replace(still, expr=told.expr, jaw_pose=told.jaw_pose, eyes_pose=told.eyes_pose)


def _runs(keys: Sequence[FrameKey]) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (take, view, instants) of frames that follow each other in one view: they are decoded at once."""
    for (take, view), run in groupby(keys, lambda k: (k.take, k.view)):
        yield take, view, [k.instant for k in run]


def _sampled(
    image: Float[Tensor, "c h w"], box: tuple[float, float, float], size: int, fill: float
) -> Float[Tensor, "c size size"]:
    if box == (0.0, 0.0, float(size)) and image.shape[-2:] == (size, size):
        return image
    return crop_image(image, box, size, fill)


def clips_below(folder: Path, held_out: bool = False) -> list[Path]:
    """Return the clips in a folder: itself, or anywhere below it, through links too, each once and in order.

    Those in a folder `val` below, or linked from there, are left out; with `held_out`, they alone are returned.

    Raises:
        UserError: it is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected clips (from import, synth or track) or a rendered store")
    found: dict[bool, dict[tuple[int, int], Path]] = {False: {}, True: {}}
    seen: set[tuple[int, int, bool]] = set()

    def walk(here: Path, held: bool) -> None:
        status = here.stat()
        place = status.st_dev, status.st_ino
        if (*place, held) in seen:  # Links may lead back up, or twice to one place.
            return
        seen.add((*place, held))
        if (here / "transforms.json").exists():
            found[held][place] = here
            return
        # What is being written has a hidden name, and may still vanish.
        for path in sorted(path for path in here.iterdir() if not path.name.startswith(".")):
            if path.is_dir():
                walk(path, held or path.name == HELD_OUT)

    walk(folder, False)
    return sorted(path for place, path in found[held_out].items() if held_out or place not in found[True])


def _forget(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) > OPEN_CLIPS:
        cache.popitem(last=False)


@cache
def clip_head(name: str, path: str | None) -> Head:
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
