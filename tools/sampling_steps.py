"""What sampling steps are worth: the shipped model's frames by number of steps, and what they cost (Table 4).

Usage: `.venv/bin/python tools/sampling_steps.py --out runs/sampling_steps --threads 1`. The demo's pairs: portraits of
the test split driven by others, with a tracker's error. Sampled as the preset does, and as the paper does (guidance 2.5
on the expression, a new noise for every frame; decoded and finished as in the preset). The paper also starts from the
noised reference; a schedule that ends in plain noise, as the shipped model's, shows nothing of its start.
Finished rows are kept. Prints a Markdown table.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from geodiff4d.cli import progress
from geodiff4d.core.camera import Camera
from geodiff4d.core.files import read_json, write_json
from geodiff4d.evaluate.metrics import Truth, bootstrap, paired_difference, score
from geodiff4d.evaluate.pairs import make_pair, scored_shots, truth_frames
from geodiff4d.heads import Head, load_head
from geodiff4d.pipeline import load_model
from geodiff4d.presets import preset
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import with_identity_of
from geodiff4d.video.model import VideoModel
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.tone import KeepTone

MEASURES = {"psnr_fg": 2, "psnr_face": 2, "ssim": 3, "normal_deg": 2, "sharpness": 2}
"""Digits that the table shows."""
WAYS = {"preset": preset("embedded").sample, "paper": SampleConfig(finish=(KeepTone(),))}
Shots = tuple[GenerationRequest, Camera, Truth]


@dataclass(frozen=True)
class Args:
    """Options of the comparison."""

    out: Path
    """Pairs and results."""
    model: Path | None = None
    """By default the one that ships."""
    pairs: int = 8
    frames: int = 2
    """Of a pair, from different views."""
    steps: tuple[int, ...] = (1, 2, 5, 10, 25, 50)
    threads: int | None = None


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    head, model = load_head(), load_model(args.model)
    pairs = [shots_of(args, head, model, i) for i in progress.bar(range(args.pairs), "rendering pairs")]
    rows = []
    for way, config in WAYS.items():
        for n in args.steps:
            print(f"{time.strftime('%H:%M:%S')} {way}, {n} steps", flush=True)
            found = result(args, f"{way}_{n}", replace(config, steps=n), model, pairs)
            rows.append((way, n, found))
    print("\n".join(table(rows)))


def shots_of(args: Args, head: Head, model: VideoModel, index: int) -> Shots:
    """Render a pair, and the truth of the frames that are scored."""
    size = model.config.size
    pair = make_pair(args.out / "pairs" / f"{index}", head, index, 24, size, model.config.expression.size)
    shots, params, cameras = scored_shots(pair, head, preset("embedded").views, args.frames, size)
    shots = replace(shots, params=with_identity_of(pair.portrait, shots.params))
    return GenerationRequest(pair.portrait, shots, head), cameras, truth_frames(pair, head, params, cameras)


def result(args: Args, name: str, config: SampleConfig, model: VideoModel, pairs: list[Shots]) -> dict[str, Any]:
    """Generate and score all pairs, unless their figures are there: one number a pair, and CPU seconds a frame."""
    path, described = args.out / "results" / f"{name}.json", config.described()
    if path.exists() and read_json(path).get("config") == described:
        return read_json(path)
    scores: dict[str, list[float]] = {}
    seconds = 0.0
    for request, cameras, truth in pairs:
        begun = time.process_time()
        made = DiffusionGenerator(model, config).generate(request, cameras)
        seconds += time.process_time() - begun
        for key, value in score(truth, made.rgb, made.normal).items():
            scores.setdefault(key, []).append(value)
    found = {"scores": scores, "cpu_seconds_per_frame": seconds / (args.frames * len(pairs)), "config": described}
    write_json(path, found)
    return found


def table(rows: list[tuple[str, int, dict[str, Any]]]) -> list[str]:
    """Lay means over pairs out in Markdown, and what changes against one step."""
    heads = ["sampled as", "steps", *MEASURES, "psnr_fg minus one step's", "CPU s/frame"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    first = {way: found for way, n, found in rows if n == min(n for w, n, _ in rows if w == way)}
    for way, n, found in rows:
        means = {k: bootstrap(found["scores"][k]) for k in MEASURES}
        cells = [
            f"{e.mean:.{MEASURES[k]}f} [{e.low:.{MEASURES[k]}f}, {e.high:.{MEASURES[k]}f}]" for k, e in means.items()
        ]
        base = first[way]
        e = paired_difference(found["scores"]["psnr_fg"], base["scores"]["psnr_fg"])
        change = "–" if found is base else f"{e.mean:+.2f} [{e.low:+.2f}, {e.high:+.2f}]"
        cost = f"{found['cpu_seconds_per_frame']:.2f}"
        lines.append(f"| {' | '.join([way, str(n), *cells, change, cost])} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
