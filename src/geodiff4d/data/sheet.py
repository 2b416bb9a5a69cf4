"""The contact sheet of a clip: some frames as rows, each as image, mask, normals and the pose map over the image."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

from geodiff4d.core.images import encode_normals, write_image
from geodiff4d.data.clip import Clip, ClipFrame
from geodiff4d.heads import Head, HeadParams
from geodiff4d.render.meshes import pose_map

ROWS, TILE, GAP = 6, 224, 4
MISSING = 0.93
"""Grey of a tile for what a frame does not have."""


def write_sheet(folder: Path, head: Head | None, rows: int = ROWS) -> Path:
    """Write `sheet.png` beside a clip's transforms.json; frames are spread over its instants and cameras.

    Without a head that fits the clip's parameters the last column stays empty.
    """
    clip = Clip(folder)
    picked = torch.linspace(0, len(clip) - 1, min(rows, len(clip))).round().int().tolist()
    strips = []
    for i, index in enumerate(dict.fromkeys(picked)):
        strips.append(row(clip.frame(_another_camera(clip, index, i)), head))
    sheet = torch.cat([pad(strip, (0, 0, 0, GAP), value=1.0) for strip in strips], 1)
    write_image(folder / "sheet.png", sheet)
    return folder / "sheet.png"


def _another_camera(clip: Clip, index: int, turn: int) -> int:
    """Return a frame of the same instant, each row's from another camera."""
    same = [i for i, r in enumerate(clip.records) if r.timestep == clip.records[index].timestep]
    return same[turn % len(same)]


def row(frame: ClipFrame, head: Head | None) -> Float[Tensor, "3 height width"]:
    """Return one frame's four tiles side by side."""
    empty = torch.full_like(frame.image, MISSING)
    normal = empty
    if frame.normal is not None:
        normal = encode_normals(frame.normal, torch.ones_like(frame.mask))
    over = empty
    if head is not None and frame.params is not None and fits(head, frame.params):
        drawn, seen = pose_map(head, frame.params, frame.camera)
        over = torch.lerp(frame.image, drawn, 0.6 * seen)
    tiles = [frame.image, frame.mask.expand_as(frame.image), normal, over]
    return torch.cat([pad(tile(t), (0, GAP), value=1.0) for t in tiles], 2)


def fits(head: Head, params: HeadParams) -> bool:
    """Say whether the parameters may be this head's: a FLAME clip is no OpenHead clip."""
    counts = params.shape.shape[-1], params.expr.shape[-1]
    offset = params.static_offset
    if offset is not None and offset.shape[-2:] != head.template.shape:
        return False
    return counts == (head.shape_basis.shape[-1], head.expr_basis.shape[-1])


def sizes(head: Head, params: HeadParams) -> str:
    """Say how many coefficients each has."""
    offset = params.static_offset
    if offset is not None and offset.shape[-2:] != head.template.shape:
        return f"expected offsets of {len(head.template)} vertices, got {offset.shape[-2]}"
    return (
        f"expected {head.shape_basis.shape[-1]} shape and {head.expr_basis.shape[-1]} expression coefficients, "
        f"got {params.shape.shape[-1]} and {params.expr.shape[-1]}"
    )


def tile(image: Float[Tensor, "3 h w"], side: int = TILE) -> Float[Tensor, "3 side side"]:
    """Fit a picture into a square, white around it."""
    _, h, w = image.shape
    s = side / max(h, w)
    height, width = max(1, round(h * s)), max(1, round(w * s))
    small = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    left, top = (side - width) // 2, (side - height) // 2
    return pad(small, (left, side - width - left, top, side - height - top), value=1.0)
