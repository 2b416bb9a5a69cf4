"""People cut out of clips, and pieces of real backgrounds, as training data for `person.py`.

Whose background is plain (portraits before a wall, about half of the rendered people) is cut out exactly enough to be
put before another one: the background is a smooth function of the place, so that the person's own colour is known even
in hair. All others give what they show beside the person.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip, ClipFrame
from geodiff4d.data.footage.clips import clip_head
from geodiff4d.heads.rig import Head
from geodiff4d.render import meshes
from geodiff4d.render.crops import head_region

PLAIN, MOST = 0.03, 0.9
"""Most of a plain background is no further from a smooth function than this, of 1."""
LEAST = 0.04
"""Share of the image that must be background."""
SURELY_BEHIND = 0.02
"""A mask below this is background."""
AWAY = 0.02
"""Background begins this far beyond a mask, over the image's side."""
BAR = 127 / 255, 128 / 255
"""Grey of what lies beyond a photograph's border."""
HELD_OUT = 10
"""One person of so many is held out."""
NARROWEST, LOWEST = 0.14, 0.35
"""Least width and height of a piece of background, over the image's side."""


@dataclass(frozen=True)
class Cutouts:
    """People without their backgrounds, and backgrounds without people."""

    colour: UInt8[Tensor, "n 3 size size"]
    """Times alpha."""
    alpha: UInt8[Tensor, "n 1 size size"]
    heads: UInt8[Tensor, "n 2 size size"]
    """Silhouettes of the whole tracked mesh and of the head alone, 0 or 255."""
    behind: UInt8[Tensor, "m 3 size size"]
    """Pieces of real backgrounds, stretched to squares."""

    def __len__(self) -> int:
        return len(self.colour)


def gather_cutouts(clips: Sequence[Path], size: int, progress: Progress = silent) -> Cutouts:
    """Cut people out of clips, at `size` pixels.

    Raises:
        UserError: no clip has a person before a plain background.
    """
    colour, alpha, heads, behind = [], [], [], []
    for path in progress(clips, "cutting people out"):
        clip = Clip(path)
        head = clip_head(clip.head_name, None)
        for i, record in enumerate(clip.records):
            if record.unread or record.mask_path is None or record.params_path is None:
                continue
            frame = clip.frame(i)
            image, mask = _sized(frame.image, size), _sized(frame.mask, size)
            wall = plain_background(image, mask)
            if wall is None:
                behind += [_bytes(_sized(piece, size)) for piece in pieces(image, mask)]
                continue
            colour.append(_bytes(torch.minimum(image - (1 - mask) * wall, mask)))
            alpha.append(_bytes(mask))
            heads.append(_bytes(_silhouettes(frame, head, size)))
    if not colour:
        raise UserError(
            f"none of {len(clips)} clips shows a person before a plain background, to be put before another: expected "
            "tracked photographs (`geodiff4d import portraits`) or people from `geodiff4d synth`"
        )
    none = torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return Cutouts(torch.stack(colour), torch.stack(alpha), torch.stack(heads), torch.stack(behind) if behind else none)


def is_held_out(clip: Path) -> bool:
    """Say whether a clip's person is of the tenth to validate on; `002_neutral` and `002_smiling` are one person."""
    person = clip.name.split("_")[0] if clip.name[0].isdigit() else clip.name
    return int(fingerprint(person), 16) % HELD_OUT == 0


def plain_background(image: Float[Tensor, "3 h w"], mask: Float[Tensor, "1 h w"]) -> Float[Tensor, "3 h w"] | None:
    """Return the background everywhere, also behind the person, if it is a smooth function of the place; else None.

    The function is a polynomial of second degree in each colour, fitted to what is surely not the person.
    """
    h, w = mask.shape[1:]
    there = _surely_behind(mask[0].numpy(), int(AWAY * w) + 1) & ~_bars(image.numpy())
    if there.mean() < LEAST:
        return None
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
    A, b = basis[there], image.numpy()[:, there].T.astype(np.float64)
    weight = np.ones(len(A))
    for _ in range(3):  # Shadows and marks on a wall count less.
        told = np.linalg.lstsq(A * weight[:, None], b * weight[:, None], rcond=None)[0]
        off = np.abs(A @ told - b).max(1)
        weight = 1 / np.maximum(off, PLAIN)
    if np.quantile(np.abs(A @ told - b).max(1), MOST) > PLAIN:
        return None
    return torch.from_numpy((basis @ told).clip(0, 1)).permute(2, 0, 1).float()


def pieces(image: Float[Tensor, "3 h w"], mask: Float[Tensor, "1 h w"]) -> list[Float[Tensor, "3 _h _w"]]:
    """Return the largest rectangles from the upper corners on that show nobody."""
    side = mask.shape[-1]
    free = _surely_behind(mask[0].numpy(), int(2 * AWAY * side) + 1) & ~_bars(image.numpy())
    found = []
    for mirrored in (False, True):
        rows = free[:, ::-1] if mirrored else free
        # Width that is free from the border on, in every row; the rectangle of all rows above is as wide as the least.
        inside = np.where(rows.all(1), side, rows.argmin(1))
        widths = np.minimum.accumulate(inside)
        heights = np.arange(1, side + 1)
        areas = widths * heights * (widths >= NARROWEST * side) * (heights >= LOWEST * side)
        height, width = int(areas.argmax()) + 1, int(widths[areas.argmax()])
        if areas.max() > 0:
            found.append(image[:, :height, side - width :] if mirrored else image[:, :height, :width])
    return found


def _silhouettes(frame: ClipFrame, head: Head, size: int) -> Float[Tensor, "2 size size"]:
    assert frame.params is not None
    vertices = head.pose(frame.params).vertices
    camera = frame.camera.cropped(0, 0, frame.camera.width, size)
    fragments = meshes.rasterize(vertices, head.faces, camera)
    part = meshes.interpolate(fragments, head.faces, head_region(head).float()[:, None])[0] > 0.5
    return torch.stack([fragments.mask, part]).float()


def _surely_behind(mask: np.ndarray, margin: int) -> np.ndarray:
    return np.asarray(distance_transform_edt(mask <= SURELY_BEHIND, return_indices=False)) > margin


def _bars(image: np.ndarray) -> np.ndarray:
    """Return whole rows and columns of grey at an image's border: what lies beyond a photograph."""
    grey = ((image > BAR[0] - 1e-3) & (image < BAR[1] + 1e-3)).all(0)
    bars = np.zeros(grey.shape, bool)
    for plane, bar in ((grey, bars), (grey.T, bars.T)):
        lines = np.asarray(plane.all(axis=-1))
        first, last = int(lines.argmin()), int(lines[::-1].argmin())
        bar[:first] = True
        bar[len(lines) - last :] = True
    return bars


def _sized(x: Float[Tensor, "c h w"], size: int) -> Float[Tensor, "c size size"]:
    """Return an image at another size, its sides stretched to it."""
    smaller = size <= min(x.shape[1:])
    return interpolate(x[None], (size, size), mode="area" if smaller else "bilinear")[0]


def _bytes(x: Float[Tensor, "c h w"]) -> UInt8[Tensor, "c h w"]:
    return (x.clamp(0, 1) * 255).round().byte()
