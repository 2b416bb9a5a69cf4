"""Measure one hot path and print a Markdown row, and a table of its parts if it has any."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d bench`."""

    what: Annotated[Literal["world", "unet", "fit", "render", "splat"], tyro.conf.Positional]
    """world: people drawn per second, painting them included. unet: seconds per generated frame, on CUDA if there is
    any, and the gain of each optimisation. fit: an avatar's optimiser steps per second, and what each of its parts
    costs. render: frames per second of a driven avatar. splat: milliseconds of the rasteriser and of the loss beside
    it, forward and backward."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    """The preset's sizes. Without CUDA, `unet --preset paper` counts operations and memory and runs nothing."""
    threads: int = 2
    """Number of threads."""
    json: Path | None = None
    """Also write the row to this file."""


def run(args: Args) -> None:
    from geodiff4d.bench import TARGETS, commit, hardware
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.files import write_json
    from geodiff4d.presets import preset

    if not 1 <= args.threads <= 256:
        raise UserError(f"--threads is {args.threads}: expected 1 to 256")
    if args.json is not None and args.json.is_dir():
        raise UserError(f"{args.json} is a folder: expected a file to write the row to")
    command = f"geodiff4d bench {args.what} --preset {args.preset} --threads {args.threads}"
    measured = TARGETS[args.what](preset(args.preset), args.threads)
    row = {"command": command, "commit": commit(), "hardware": hardware(), "threads": args.threads, **measured}
    if args.json is not None:
        write_json(args.json, row)
    cells = [f"{k} {_text(v)}" for k, v in row.items() if k != "rows"]
    print("| " + " | ".join(cells) + " |")
    print("".join(_table(row.get("rows", []))), end="")


def _table(rows: list[dict[str, object]]) -> list[str]:
    """Return rows of the same keys as lines of a Markdown table."""
    if not rows:
        return []
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([_text(row.get(k)) for k in heads] for row in rows)]
    return ["\n", *("| " + " | ".join(line) + " |\n" for line in lines)]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
