"""Draw 32 people of the open world with four expressions each; count the frontal tiles where MediaPipe finds a face.

Seeds are consecutive, none is chosen. The first expression is nearly neutral, the others are drawn. The sheet shows
them from the front, −30°, 25° and 45°; all four are also drawn from the front, and those are what is counted.

    .venv/bin/python tools/world_sheet.py --out docs/images/world.jpg [--frontal frontal.jpg] [--no-count]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geodiff4d.core.images import to_uint8
from geodiff4d.heads import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import orbit, world_region
from geodiff4d.tracking.detect import MediaPipeDetector
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.subject import SyntheticSubject

VIEWS_DEG = (0.0, -30.0, 25.0, 45.0)
CALM = 0.1
"""How much of its first expression a person shows."""
COLUMNS = 4
"""People beside each other on the sheet, four tiles each."""


def expressions(subject: SyntheticSubject, seed: int) -> HeadParams:
    """Return four of them, the first nearly neutral."""
    expr, jaw, eyes = random_expression(seed, len(VIEWS_DEG))
    weight = torch.tensor([CALM, *[1.0] * (len(VIEWS_DEG) - 1)])[:, None]
    return subject.params(weight * expr, jaw_pose=weight * jaw, eyes_pose=eyes)


def tiles(subject: SyntheticSubject, params: HeadParams, azimuth_deg: Tensor, size: int) -> Tensor:
    """Render the canonical crop of each, seen from an azimuth [4, 3, size, size]."""
    points = subject.vertices(params)[:, world_region()]
    cameras = orbit(azimuth_deg, torch.zeros_like(azimuth_deg), size)
    cameras = [canonical_crop(cameras[i], points[i]) for i in range(len(points))]
    return subject.render(params, type(cameras[0]).stack(cameras)).rgb


def sheet(people: list[Tensor], side: int) -> Image.Image:
    """Lay out [4, 3, size, size] per person, `COLUMNS` people a row."""
    strips = [torch.cat(list(person), -1) for person in people]
    rows = [torch.cat(strips[i : i + COLUMNS], -1) for i in range(0, len(strips), COLUMNS)]
    picture = Image.fromarray(to_uint8(torch.cat(rows, -2)))
    size = people[0].shape[-1]
    return picture.resize((picture.width * side // size, picture.height * side // size), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the sheet")
    parser.add_argument("--frontal", type=Path, default=None, help="a sheet of the tiles that are counted")
    parser.add_argument("--first", type=int, default=100, help="seed of the first person")
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--size", type=int, default=256, help="what is rendered and looked at [px]")
    parser.add_argument("--side", type=int, default=144, help="a tile on the sheet [px]")
    parser.add_argument("--no-count", action="store_true", help="draw only")
    args = parser.parse_args()

    shown: list[Tensor] = []
    frontal: list[Tensor] = []
    for seed in range(args.first, args.first + args.people):
        subject = SyntheticSubject(seed, args.split)
        params = expressions(subject, seed)
        front = tiles(subject, params, torch.zeros(len(VIEWS_DEG)), args.size)
        turned = tiles(subject, params[slice(1, None)], torch.tensor(VIEWS_DEG[1:]), args.size)
        frontal.append(front)
        shown.append(torch.cat([front[:1], turned]))
        print(f"seed {seed}", flush=True)
    for path, people in ((args.out, shown), (args.frontal, frontal)):
        if path is not None:
            sheet(people, args.side).save(path, quality=88)
    if args.no_count:
        return
    detections = MediaPipeDetector(masks=False).detect(torch.cat(frontal))
    found = np.array([d is not None for d in detections]).reshape(-1, len(VIEWS_DEG))
    missed = [f"seed {args.first + i}, expression {j}" for i, j in zip(*np.nonzero(~found), strict=True)]
    print(
        f"a face in {found.sum()} of {found.size} frontal tiles; missed, seed (expression): {', '.join(missed) or '-'}"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
