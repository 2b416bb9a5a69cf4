"""Single photographs as training footage: seen from the side, as far as they show that, they are their own portraits.

A photograph has no other view of its person. But its tracked head carries it to a turned view (warp-back), where only
what the photograph shows is kept; taken for the portrait, with the photograph as the truth, that makes real skin, hair,
ears and teeth the truth for what a portrait hides. What hidden hair looks like is not asked for where nothing of it was
carried (`counts`): a network asked for that would paint a halo around everybody. Clothes are, because everybody has
shoulders on both sides. Two photographs of one person, named `ID_…` beside each other, are portraits for each other
too.

Ours: the paper's data sets have many views.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from geodiff4d.core.camera import Camera, turned
from geodiff4d.core.errors import UserError
from geodiff4d.data.footage.clips import ClipFootage
from geodiff4d.data.footage.take import DecodedFrames, FrameKey, of_mesh
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.relief import LiftedPortrait, lift_portrait, seen_from
from geodiff4d.world.seeds import generator

TURNS = 8
"""Turned views of each photograph, as far as:"""
TURN_DEG, TILT_DEG = 60.0, 12.0
NEAR_DEG = 10.0
"""The first of them is nearly the photograph's own view: what is known is to be kept."""
FRAMINGS = 3
"""Ways to cut each photograph: the canonical crop, and others moved and zoomed a little."""
SHIFT, ZOOM = 0.05, 0.1
NEAR = 0.03
"""Beyond this distance from the head's mesh (share of the side) a photograph's truth counts only where its portrait
shows something."""
CHIN = 8
"""Number of the chin's tip among the 68 points."""
RECENT = 8
"""Portraits that are kept: a sample asks for its own twice."""
LIFTED = 512
"""Lifted photographs that are kept, 2 MB each at 256 px: lifting takes a third of a sample's time."""

_Drawn = tuple[Tensor, Tensor, Camera]
"""Image on grey, mask and camera."""


class PhotographFootage(ClipFootage):
    """A folder of tracked photographs (`import portraits`): each is a take of targets, and one of turned portraits.

    Takes `0 … n − 1` are the photographs, their views ways to cut them; takes `n … 2n − 1` are the same seen from the
    side, their instants the turned views. What lies in a folder `val` below is left out, or, with `held_out`, all there
    is.

    Raises:
        UserError: there is no tracked photograph.
    """

    def __init__(self, folder: Path, held_out: bool = False):
        super().__init__(folder, held_out=held_out)
        single = [(t, w) for t, w in zip(self.takes, self._where, strict=True) if t.present.size == 1]
        people = [_person(w.folder) for _, w in single]
        count, framings, turns = Counter(people), np.ones((1, FRAMINGS), bool), np.ones((TURNS, 1), bool)
        self.takes = [
            replace(t, subject=who, present=framings, portraits=count[who] > 1, partial=True)
            for (t, _), who in zip(single, people, strict=True)
        ]
        self.photographs = len(self.takes)
        self._portraits: OrderedDict[tuple[FrameKey, int], _Drawn] = OrderedDict()
        self._whole_portraits: OrderedDict[tuple[int, int], tuple[LiftedPortrait, Camera]] = OrderedDict()
        self.takes += [
            replace(t, timesteps=np.arange(TURNS), present=turns, targets=False, portraits=True) for t in self.takes
        ]
        wheres = [w for _, w in single]
        self._where = [replace(w, cameras=w.cameras * FRAMINGS) for w in wheres] + wheres
        if not self.takes:
            raise UserError(f"{folder} has no single photographs: expected clips of `geodiff4d import portraits`")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_portraits": OrderedDict(), "_whole_portraits": OrderedDict()}

    def _own(self, take: int) -> int:
        """Return the take of the photograph that a turned take shows."""
        return take % self.photographs

    def params(self, take: int, instants: Sequence[int]) -> HeadParams:
        """Return what the tracker found in the photograph: turned views have a turned camera, and the same head."""
        return super().params(self._own(take), [0] * len(instants))

    def _of_all(self, what: str, take: int) -> HeadParams:
        # A tracker's errors are in a photograph's parameters already.
        return self.params(take, range(len(self.takes[take].timesteps)))

    def reference_views(self, take: int) -> Sequence[int]:
        return (0,)

    def driving_views(self, take: int) -> Sequence[int]:
        return (0,)

    def crop_box(self, take: int, view: int) -> tuple[float, float, float] | None:
        box = super().crop_box(self._own(take), 0)
        if view == 0:
            return box
        rng = generator("framing", self._where[take].folder.name, view)
        left, top, side = box or (0.0, 0.0, float(self._cameras(self._own(take), 0, [0]).width))
        (x, y), wide = rng.uniform(-SHIFT, SHIFT, 2).tolist(), side * (1 + float(rng.uniform(-ZOOM, ZOOM)))
        return left + x * side + (side - wide) / 2, top + y * side + (side - wide) / 2, wide

    def frames(self, keys: Sequence[FrameKey], size: int) -> DecodedFrames:
        plain = super().frames
        parts = [plain([k], size) if k.take < self.photographs else self._turned_frame(k, size) for k in keys]
        return DecodedFrames(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(DecodedFrames)))

    def _turned_frame(self, key: FrameKey, size: int) -> DecodedFrames:
        image, mask, camera = self._portrait(key, size)
        head, grey = self._head(key.take), torch.full_like(image, 0.5)
        still = head.pose(self.params(key.take, [0]).without_expression())
        pose, focus = of_mesh(head, still, Camera.stack([camera]))
        return DecodedFrames(image[None], mask[None], grey[None], torch.tensor([False]), pose, focus)

    def driving(self, keys: Sequence[FrameKey], size: int) -> Float[Tensor, "n 3 size size"]:
        return super().driving([FrameKey(self._own(k.take), 0, 0) for k in keys], size)

    def motion(self, keys: Sequence[FrameKey]) -> HeadParams | None:
        return super().motion([FrameKey(self._own(k.take), 0, 0) for k in keys])

    def chins(self, keys: Sequence[FrameKey]) -> Float[Tensor, " n"]:
        """Return how far down in their frames the chins are (0 at the upper border, 1 at the lower one)."""
        found = []
        for key in keys:
            cameras = self._cameras(key.take, key.view, [0])
            box = self.crop_box(key.take, key.view) or (0.0, 0.0, float(cameras.width))
            found.append(chin_heights(self._head(key.take), self.params(key.take, [0]), cameras.cropped(*box, 1)))
        return torch.cat(found)

    def _portrait(self, key: FrameKey, size: int) -> _Drawn:
        if (key, size) not in self._portraits:
            self._portraits[key, size] = self._drawn(key, size)
            while len(self._portraits) > RECENT:
                self._portraits.popitem(last=False)
        return self._portraits[key, size]

    def _drawn(self, key: FrameKey, size: int) -> _Drawn:
        if key.take < self.photographs:
            return super()._portrait(key, size)
        lifted, camera = self._lifted(self._own(key.take), size)
        mesh = self._head(key.take).pose(self.params(key.take, [0]))
        rng = generator("turned", self._where[key.take].folder.name, key.instant)
        low, high = (NEAR_DEG, TURN_DEG) if key.instant else (0.0, NEAR_DEG)
        yaw, pitch = float(rng.choice((-1, 1)) * rng.uniform(low, high)), float(rng.uniform(-TILT_DEG, TILT_DEG))
        cameras = Camera.stack([turned(camera, mesh.vertices[0].mean(0), yaw, pitch)])
        seen, shown = seen_from(lifted, mesh, cameras)
        return seen[0], shown[0], cameras[0]

    def _lifted(self, take: int, size: int) -> tuple[LiftedPortrait, Camera]:
        """Return a photograph's lifted portrait, of which all its turned views are drawn, and its camera."""
        if (take, size) not in self._whole_portraits:
            image, mask, camera = self._portrait(FrameKey(take, 0, 0), size)
            head = self._head(take)
            lifted = lift_portrait(head, image, mask, head.pose(self.params(take, [0])[0]), camera, size)
            self._whole_portraits[take, size] = lifted, camera
            while len(self._whole_portraits) > LIFTED:
                self._whole_portraits.popitem(last=False)
        return self._whole_portraits[take, size]


def chin_heights(head: Head, params: HeadParams, cameras: Camera) -> Float[Tensor, " t"]:
    """Return how far down in their images the chins of posed heads are (0 at the upper border, 1 at the lower one)."""
    xy, _ = cameras.project(head.landmarks68.on(head.pose(params).vertices, head.faces))
    return xy[:, CHIN, 1] / cameras.height


def told(
    mask: Float[Tensor, "n 1 size size"], visibility: Float[Tensor, "n 2 size size"], chins: Float[Tensor, " n"]
) -> Float[Tensor, "n 1 size size"]:
    """Say where a photograph's truth counts: not where its foreground is above the chin, and neither shown by the
    portrait nor near the head's mesh.

    Args:
        chins: how far down the chins are (0 at the upper border, 1 at the lower one).
    """
    side = 2 * max(1, round(NEAR * mask.shape[-1])) + 1
    shown, inside = visibility.split(1, 1)
    around = max_pool2d(max_pool2d(inside, (side, 1), 1, (side // 2, 0)), (1, side), 1, (0, side // 2))
    rows = (torch.arange(mask.shape[-2], device=mask.device) + 0.5) / mask.shape[-2]
    below = (rows > chins[:, None]).to(mask.dtype)[:, None, :, None].expand_as(mask)
    return torch.stack([shown, around, 1 - mask, below]).amax(0)


def _person(folder: Path) -> str:
    """Name the person of a photograph: those named `ID_…` in one folder share theirs."""
    who = folder.name.split("_")[0]
    return str(folder.parent / who if who != folder.name else folder)
