"""Show what avatars do under each of the head's actions, one at a time: a sheet, and how far their splats follow.

    python tools/action_sheet.py RUN/avatar [RUN2/avatar …] --out sheet.png

Every avatar has a block of tiles, its front view at rest first. Below each tile stands the action's name and how far
the splats move, over how far the mesh below them does: 1 is all the way. Only splats whose mesh moves by a tenth of a
millimetre count.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor

from geodiff4d.avatar.model import Avatar
from geodiff4d.core.camera import Camera
from geodiff4d.core.images import to_uint8
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import face_crop_box

COLUMNS, LABEL = 9, 14
MOVES_M = 1e-4


@dataclass(frozen=True)
class Args:
    """Options."""

    avatars: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path
    size: int = 128
    """Side of a tile [px]."""
    strength: float = 1.0


def main(args: Args) -> None:
    blocks = [block(Avatar.load(folder), args) for folder in args.avatars]
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for each in blocks:
        sheet.paste(each, (0, top))
        top += each.height
    sheet.save(args.out)


@torch.no_grad()
def block(avatar: Avatar, args: Args) -> Image.Image:
    """Return an avatar's tiles, and print how far its splats follow."""
    rest, names = resting(avatar), avatar.head.expression_names
    camera = face_camera(avatar, rest, args.size)
    tiles: list[tuple[str, Tensor]] = [("rest", avatar.render(rest, camera).rgb)]
    for k, name in enumerate(names):
        expr = torch.zeros_like(rest.expr)
        expr[k] = args.strength
        params = replace(rest, expr=expr)
        followed = share_followed(avatar, rest, params)
        label = name if followed is None else f"{name} {followed:.2f}"
        print(f"{args.strength:g} {label}")
        tiles.append((label, avatar.render(params, camera).rgb))
    height, rows = args.size + LABEL, -(-len(tiles) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * args.size, rows * height), "white")
    draw = ImageDraw.Draw(image)
    for i, (label, rgb) in enumerate(tiles):
        x, y = i % COLUMNS * args.size, i // COLUMNS * height
        image.paste(Image.fromarray(to_uint8(rgb.clamp(0, 1))), (x, y))
        draw.text((x + 2, y + args.size), label, fill="black")
    return image


def resting(avatar: Avatar) -> HeadParams:
    """Return the avatar's head at rest, its eyes straight ahead."""
    return avatar.sequence[0].without_expression()


def face_camera(avatar: Avatar, rest: HeadParams, size: int) -> Camera:
    """Return the avatar's own camera, cropped to its face."""
    vertices = avatar.head.pose(replace(rest, shape=avatar.shape)).vertices
    points, _ = avatar.camera.project(avatar.head.landmarks68.on(vertices, avatar.head.faces))
    return avatar.camera.cropped(*face_crop_box(points), size)


def share_followed(avatar: Avatar, rest: HeadParams, params: HeadParams) -> float | None:
    """Return the splats' mean displacement over that of the mesh's faces they are bound to; None if nothing moves."""
    before, after = avatar.posed(rest), avatar.posed(params)
    posed = (avatar.head.pose(replace(p, shape=avatar.shape)).vertices for p in (rest, params))
    still, moved = (vertices[avatar.head.faces].mean(1) for vertices in posed)
    of_mesh = (moved - still).norm(dim=-1)[before.face_index]
    moves = of_mesh > MOVES_M
    if not bool(moves.any()):
        return None
    of_splats = (after.gaussians.means - before.gaussians.means).norm(dim=-1)
    return float(of_splats[moves].mean() / of_mesh[moves].mean())


if __name__ == "__main__":
    main(tyro.cli(Args))
