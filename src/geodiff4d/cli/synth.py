"""Render people of the open world as clips: pictures, exact normals, masks, cameras and head parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from geodiff4d.cli._signing import SigningArgs, sealer

SHEET_COLUMNS, SHEET_MAX = 8, 64


@dataclass(frozen=True)
class Args(SigningArgs):
    """Options of `geodiff4d synth`."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write to: one clip OUT/<split>_<seed> per person, and a contact sheet. Finished clips are kept."""
    subjects: int = 8
    """How many people."""
    frames: int = 24
    """Frames per person."""
    views: int = 4
    """How many of the 16 capture cameras per frame; the front one comes first."""
    size: int | None = None
    """Side of the square pictures [px]; without it, the preset's."""
    split: Literal["train", "val", "test"] = "train"
    """No person is in two splits."""
    seed: int = 0
    """Seed of the first person; the others follow."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    """Picture size: 64, 256 or 512."""
    workers: int = 2
    """Processes that write clips, one thread each."""


def run(args: Args) -> None:
    import torch

    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.images import read_image, write_image
    from geodiff4d.data.world_clips import is_complete, write_world
    from geodiff4d.presets import preset
    from geodiff4d.provenance.statement import Statement
    from geodiff4d.render.viewpoints import capture_views

    size = args.size or preset(args.preset).model.size
    for name, value, low, high in (
        ("--subjects", args.subjects, 1, 1_000_000),
        ("--frames", args.frames, 1, 99_999),
        ("--size", size, 16, 4096),
        ("--seed", args.seed, 0, 2**31),
        ("--workers", args.workers, 1, 256),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} is {value}: expected {low} to {high}")
    capture_views(args.views)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file: expected a folder to write clips to, or a new name")
    signer = sealer(args)
    seeds = range(args.seed, args.seed + args.subjects)
    folders = {seed: args.out / f"{args.split}_{seed}" for seed in seeds}
    todo = [seed for seed in seeds if not is_complete(folders[seed], args.frames, args.views, size)]
    writing = write_world(args.out, args.split, todo, args.frames, args.views, size, args.workers)
    written = sum(1 for _ in progress.bar(writing, "people", len(todo)))
    for folder in folders.values():
        signer.seal_stage(folder, Statement(source="algorithmicMedia"))
    fronts = [read_image(folders[seed] / "reference.png") for seed in seeds[:SHEET_MAX]]
    fronts += [torch.ones_like(fronts[0])] * (-len(fronts) % min(SHEET_COLUMNS, len(fronts)))
    columns = min(SHEET_COLUMNS, len(fronts))
    rows = [torch.cat(fronts[i : i + columns], 2) for i in range(0, len(fronts), columns)]
    sheet = args.out / f"{args.split}_sheet.png"
    write_image(sheet, torch.cat(rows, 1))
    signer.seal(sheet, Statement(source="algorithmicMedia"))
    kept = f", {args.subjects - written} were there" if written < args.subjects else ""
    print(f"{args.out}: {args.subjects} people, {args.frames} frames × {args.views} views at {size} px{kept}")
