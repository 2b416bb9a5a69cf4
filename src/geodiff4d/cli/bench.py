"""Measure one hot path and print a Markdown row."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

SIZES = {
    "debug": {"size": 32, "subjects": 1, "images": 2},
    "embedded": {"size": 256, "subjects": 4, "images": 30},
    "paper": {"size": 512, "subjects": 3, "images": 20},
}


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d bench`."""

    what: Annotated[Literal["world"], tyro.conf.Positional]
    """world: people drawn per second, painting them included."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    """Pictures of 32, 256 or 512 px."""
    threads: int = 2
    """Cores to use."""
    json: Path | None = None
    """Also write the row to this file."""


def run(args: Args) -> None:
    from geodiff4d.bench import TARGETS, commit, hardware
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.files import write_json

    if not 1 <= args.threads <= 256:
        raise UserError(f"--threads is {args.threads}: expected 1 to 256")
    if args.json is not None and args.json.is_dir():
        raise UserError(f"{args.json} is a folder: expected a file to write the row to")
    command = f"geodiff4d bench {args.what} --preset {args.preset} --threads {args.threads}"
    measured = TARGETS[args.what](SIZES[args.preset] | {"threads": args.threads})
    row = {"command": command, "commit": commit(), "hardware": hardware(), "threads": args.threads, **measured}
    if args.json is not None:
        write_json(args.json, row)
    cells = [f"{k} {_text(v)}" for k, v in row.items()]
    print("| " + " | ".join(cells) + " |")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
