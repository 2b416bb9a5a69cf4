"""What each part of the avatar is worth: fits on clips of the open world, whose frames and normals are true.

Usage: `.venv/bin/python tools/avatar_ablation.py --out runs/ablation --subjects 3`. People of the test split who are
not domain-randomised, 12 views × 60 frames at 256 px; the last tenth of the timesteps and two views are held out.
Finished fits are kept, an interrupted one goes on, so that the same command resumes. Prints one Markdown table.

"disturbed" fits have head parameters that are off as a tracker's are (`world.tracker_error.disturbed`). A `with-` part
is one that the preset does without, a `no-` part one that it has.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from geodiff4d.avatar.config import FitConfig
from geodiff4d.avatar.deformation import DeformationConfig
from geodiff4d.avatar.dynamics import DynamicsConfig
from geodiff4d.avatar.fit import fit
from geodiff4d.avatar.frames import HoldOut, read_sequence
from geodiff4d.avatar.surface import RemeshConfig
from geodiff4d.cli import progress
from geodiff4d.core.files import fresh_folder, read_json, write_json
from geodiff4d.data.clip import Clip, write_params
from geodiff4d.data.world_clips import is_complete, track_of, write_clip
from geodiff4d.heads import load_head
from geodiff4d.presets import preset
from geodiff4d.tracking.normals import normal_estimator
from geodiff4d.world.subject import SyntheticSubject, plain_seed
from geodiff4d.world.tracker_error import disturbed

SPLIT: Literal["test"] = "test"
ADDED: dict[str, Any] = {
    "remesh": RemeshConfig(96), "deformation": DeformationConfig(), "dynamics": DynamicsConfig(),
}  # fmt: skip
"""Sizes of the parts where the preset has none."""
VARIANTS = (
    "full", "no-normals", "no-normal-source", "no-refine", "disturbed", "disturbed no-refine", "with-deformation",
    "with-dynamics", "with-remesh", "no-densify", "with-deformation with-dynamics with-remesh",
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Options of the ablation."""

    out: Path
    """Clips, avatars and results."""
    subjects: int = 3
    first: int = 0
    """Start with this person."""
    steps: int | None = None
    """Instead of the preset's."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    frames: int = 60
    views: int = 12
    size: int = 256
    variants: tuple[str, ...] = VARIANTS
    """Which fits to make; parts are separated by spaces."""
    threads: int | None = None


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for index in range(args.first, args.first + args.subjects):
        seed = plain_seed(index, SPLIT)
        clips = {False: world_clip(args, seed)}
        clips[True] = disturbed_clip(clips[False], args.out / "clips" / f"{SPLIT}_{seed}_disturbed")
        for variant in args.variants:
            rows.append({"person": seed, "fit": variant} | result(args, seed, variant, clips))
    print("\n".join(table(rows)))


def world_clip(args: Args, seed: int) -> Clip:
    """Render a person's clip, unless it is there."""
    folder = args.out / "clips" / f"{SPLIT}_{seed}"
    if not is_complete(folder, args.frames, args.views, args.size):
        print(f"rendering {folder}", flush=True)
        write_clip(folder, SyntheticSubject(seed, SPLIT), track_of(seed, SPLIT), args.frames, args.views, args.size)
    return Clip(folder)


def disturbed_clip(clip: Clip, folder: Path) -> Clip:
    """Give a clip a tracker's error (seed 0); pictures are linked, not copied."""
    if not (folder / "transforms.json").exists():
        noisy = disturbed(read_sequence(clip, load_head(clip.head_name)), seed=0)
        with fresh_folder(folder) as made:
            for name in ("images", "fg_masks", "normals"):
                (made / name).symlink_to(os.path.relpath(clip.folder / name, folder))
            (made / "flame_param").mkdir()
            for row, timestep in enumerate(clip.timesteps):
                write_params(made / f"flame_param/{timestep:05d}.npz", noisy[row])
            shutil.copy(clip.folder / "transforms.json", made)
    return Clip(folder)


def configured(args: Args, variant: str) -> FitConfig:
    """Return the preset with a variant's parts switched."""
    config = replace(preset(args.preset).fit, hold_out=HoldOut(every=0, views=2, times=0.1))
    if args.steps:
        config = replace(config, iterations=args.steps)
    for word in variant.split():
        kind, _, part = word.partition("-")
        if kind == "no":
            config = config.ablated(part)
        elif kind == "with":
            added: dict[str, Any] = {part: ADDED[part]}
            config = replace(config, **added)
    return config


def result(args: Args, seed: int, variant: str, clips: dict[bool, Clip]) -> dict[str, Any]:
    """Fit a variant, unless its figures are there, and return them."""
    config = configured(args, variant)
    name = f"{seed}_{variant.replace(' ', '_')}_{args.preset}_{config.iterations}"
    figures = args.out / "results" / f"{name}.json"
    described = json.loads(json.dumps(asdict(config)))
    if not figures.exists() or read_json(figures).get("config") != described:
        # Fitted with other settings, or not at all.
        shutil.rmtree(args.out / "avatars" / name, ignore_errors=True)
        print(f"{time.strftime('%H:%M:%S')} fitting {name}", flush=True)
        normals = normal_estimator() if config.normal_source == "estimator" else None
        clip = clips[variant.startswith("disturbed")]
        metrics = fit(clip, args.out / "avatars" / name, config, 0, progress.bar, normals)
        write_json(figures, metrics | {"config": described})
        print(json.dumps({k: metrics[k] for k in ("held_out_views", "held_out_times")}), flush=True)
    return read_json(figures)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lay the results out in Markdown."""
    heads = ("person", "fit", "views: PSNR, foreground", "views: normals", "times: PSNR, foreground", "times: normals")
    heads = (*heads, "training: PSNR", "Gaussians", "it/s")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for r in rows:
        views, times, train = r["held_out_views"], r["held_out_times"], r["train"]
        cells = [r["person"], r["fit"]]
        figures = [s[k] for s in (views, times) for k in ("psnr_fg", "normal_deg")]
        cells += ["–" if f is None else f"{f:.2f}" for f in figures]
        cells += [f"{train['psnr_fg']:.2f}", r["gaussians"], f"{r['iterations_per_second']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
