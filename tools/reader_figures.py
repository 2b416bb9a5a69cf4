"""Measure the face reader as users meet it: on performances of people not seen, found by the detector in H.264 films.

    python tools/reader_figures.py --reader RUN/reader --out FILE.md
    python tools/reader_figures.py --reader RUN/reader --split test --people 10 --sizes 256 512 --out FILE.md

Each person of the split performs a mixed track, seen from the front and from 30° aside, filmed at the given sizes. The
table has, by region, correlation and gain (the reading regressed on the truth) over all frames, each person's and
camera's own mean taken off, since a film is read relative to its person's rest; then the same of the skin's motion, and
how many milliseconds of CPU time a frame takes beside the detector's.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from geodiff4d.cli.progress import bar
from geodiff4d.core.files import fresh_file
from geodiff4d.core.video import read_video, write_video
from geodiff4d.render.viewpoints import openhead, orbit
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.reader import FaceReader, load_reader, read_faces
from geodiff4d.tracking.reader_data import visible_coefficients, visible_skin
from geodiff4d.tracking.reader_measure import agreement
from geodiff4d.world import SyntheticSubject
from geodiff4d.world.expressions import expression_track, head_track
from geodiff4d.world.subject import plain_seed

FIRST_SEED = 33_000
AZIMUTHS_DEG = (0.0, 30.0)


@dataclass(frozen=True)
class Args:
    """Options."""

    reader: Path
    out: Path
    split: Literal["val", "test"] = "val"
    people: int = 4
    frames: int = 48
    sizes: tuple[int, ...] = (256, 512)


def main(args: Args) -> None:
    reader = load_reader(args.reader)
    rows = [row for size in args.sizes for row in measured(reader, args, size)]
    lines = ["| film | region | corr | gain |", "|---|---|---|---|", *rows]
    with fresh_file(args.out) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def measured(reader: FaceReader, args: Args, size: int) -> list[str]:
    """Return the table's rows of one size of film."""
    said, true, seconds, lost = [], [], 0.0, 0
    for k in bar(range(args.people), f"reading films of {size} px"):
        subject = SyntheticSubject(plain_seed(k, args.split, FIRST_SEED), args.split)
        for azimuth in AZIMUTHS_DEG:
            truth, images = film(subject, k, args.frames, size, azimuth)
            detections = EmbeddedDetector().detect(images, video=True)
            seen = [i for i, d in enumerate(detections) if d is not None]
            lost += len(images) - len(seen)
            began = time.process_time()
            reading = read_faces(reader, [images[i] for i in seen], [d for d in detections if d is not None])
            seconds += time.process_time() - began
            value = torch.cat([reading.expr, reading.jaw_pose, reading.eyes_pose], 1)
            for out, x in ((said, value), (true, truth[seen])):
                out.append(x - x.mean(0))
    value, truth = torch.cat(said), torch.cat(true)
    result = agreement(value, truth)
    rows = [f"| {size} px | {name} | {result.corr[name]:.2f} | {result.gain[name]:.2f} |" for name in result.corr]
    basis = openhead().expr_basis[visible_skin()].flatten(0, 1)
    moved, should = value[:, :52] @ basis.T, truth[:, :52] @ basis.T
    product = float((moved * should).sum())
    corr, gain = product / float(moved.norm() * should.norm()), product / float(should.square().sum())
    each = 1000 * seconds / max(len(value), 1)
    return [*rows, f"| {size} px | skin ({len(value)} frames, {lost} lost, {each:.1f} ms) | {corr:.2f} | {gain:.2f} |"]


def film(subject: SyntheticSubject, k: int, frames: int, size: int, azimuth: float) -> tuple[Tensor, list[Tensor]]:
    """Return what is to be read [frames, targets] and the frames after H.264."""
    drawn, jaw, eyes = expression_track("mixed", frames, k)
    params = subject.params(drawn, head_track("mixed", frames, k), None, jaw, eyes)
    camera = orbit(torch.full((frames,), azimuth), torch.zeros(frames), size)
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "film.mp4", subject.render(params, camera).rgb)
        images = list(read_video(Path(folder) / "film.mp4"))
    return torch.cat([visible_coefficients(subject.rig, drawn), jaw, eyes], 1), images


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Args))
