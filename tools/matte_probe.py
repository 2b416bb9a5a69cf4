"""How well people are cut out before real rooms: who stands before a plain wall is put before other backgrounds.

Usage: `.venv/bin/python tools/matte_probe.py CLIPS --out DIR` with photographs tracked by `geodiff4d import portraits
PHOTOGRAPHS CLIPS --size 512`. Whose background is plain is cut out and put before pieces of the other photographs'
backgrounds and before made-up rooms, some in a colour of the person's own; then the picture is tracked from its pixels,
and the foreground compared with the known one. Prints a table and writes DIR/sheet.png: each picture, and what was cut
out.
"""

import argparse
import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.images import write_image
from geodiff4d.data.clip import Clip
from geodiff4d.data.footage.clips import clips_below
from geodiff4d.evaluate.metrics import bootstrap
from geodiff4d.heads import load_head
from geodiff4d.render.crops import crop_image
from geodiff4d.tracking.cutouts import pieces, plain_background
from geodiff4d.tracking.person_scenes import recoloured, rooms
from geodiff4d.tracking.track import TrackingConfig, track_frames

SIZE, SHOWN = 512, 200
KINDS = "a piece of a photograph", "a made-up room", "one in the person's colour"
GREEN = torch.tensor([0.0, 0.8, 0.0])[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--people", type=int, default=24, help="at most; each before three backgrounds")
    args = parser.parse_args()
    people, behind = [], []
    for path in clips_below(args.clips):
        frame = Clip(path).frame(0)
        wall = plain_background(frame.image, frame.mask)
        if wall is None:
            behind += pieces(frame.image, frame.mask)
        else:
            colour = torch.minimum((frame.image - (1 - frame.mask) * wall).clamp(min=0), frame.mask)
            people.append((path, colour, frame.mask))
    people = people[:: max(len(people) // args.people, 1)][: args.people]
    args.out.mkdir(parents=True, exist_ok=True)
    g, head, rows, shown = torch.Generator().manual_seed(0), load_head("openhead"), [], []
    for k, (path, colour, alpha) in enumerate(people):
        seen = interpolate(behind[k % len(behind)][None], alpha.shape[1:], mode="bilinear")
        room = rooms(1, alpha.shape[-1], g)
        alike = recoloured(room, colour[None], alpha[None], g)
        for kind, wall in zip(KINDS, (seen, room, alike), strict=True):
            picture = (colour + (1 - alpha) * wall[0]).clamp(0, 1)
            tracked = track_frames([picture], head, config=TrackingConfig(size=SIZE), video=False)
            truth = crop_image(alpha, tracked.located.box, SIZE, fill=0.0).clamp(0, 1)
            row = {"person": path.name, "background": kind, **compared(tracked.masks[0], truth)}
            rows.append(row)
            shown.append(panel(tracked.images[0], tracked.masks[0]))
            print(json.dumps(row), flush=True)
    print(table(rows))
    (args.out / "rows.json").write_text(json.dumps(rows, indent=1))
    rows_of_six = [torch.cat(shown[i : i + 6], -1) for i in range(0, len(shown) - 5, 6)]
    write_image(args.out / "sheet.png", torch.cat(rows_of_six, -2))


def compared(told: Float[Tensor, "1 h w"], truth: Float[Tensor, "1 h w"]) -> dict[str, float]:
    """Return the overlap, and how much of the background came along and of the person was lost, over the person."""
    a, b = told > 0.5, truth > 0.5
    person = float(truth.sum())
    return {
        "iou": float((a & b).sum() / (a | b).sum()),
        "along": float((told - truth).clamp(min=0).sum()) / person,
        "lost": float((truth - told).clamp(min=0).sum()) / person,
    }


def panel(image: Float[Tensor, "3 h w"], mask: Float[Tensor, "1 h w"]) -> Float[Tensor, "3 _ _"]:
    both = torch.cat([image, image * mask + GREEN * (1 - mask)], -1)
    return interpolate(both[None], (SHOWN, 2 * SHOWN), mode="area")[0]


def table(rows: list[dict]) -> str:
    lines = ["| background | pictures | IoU | background that came along | person lost |", "|---|---|---|---|---|"]
    for kind in KINDS:
        own = [r for r in rows if r["background"] == kind]
        cells = []
        for name in ("iou", "along", "lost"):
            mean = bootstrap([r[name] for r in own])
            cells.append(f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]")
        lines.append(f"| {kind} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
