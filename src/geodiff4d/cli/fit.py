"""Fit a rigged Gaussian avatar to a clip."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d fit`."""

    clip: Annotated[Path, tyro.conf.Positional]
    """Clip folder, from synthesize, synth or track."""
    out: Path
    """Avatar folder to write; the same command resumes an interrupted fit."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    """debug: seconds. embedded: two minutes on two cores. paper: 100K steps on a GPU."""
    ablate: tuple[Literal["refine", "normals"], ...] = ()
    """Switch parts off: refine (trust the clip's head parameters), normals (no normal loss)."""
    iterations: int | None = None
    """Take so many steps instead of the preset's."""
    seed: int = 0


def run(args: Args) -> None:
    from geodiff4d.avatar.fit import PRESETS, fit
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.data.clip import Clip

    config = PRESETS[args.preset][1]
    for part in args.ablate:
        config = config.ablated(part)
    if args.iterations is not None:
        if args.iterations < 1:
            raise UserError(f"--iterations is {args.iterations}: expected at least 1")
        config = replace(config, iterations=args.iterations)
    metrics = fit(Clip(args.clip), args.out, config, args.seed, progress.track)
    held_out = metrics["held_out"]
    shown = ", ".join(f"{k} {v:.2f}" for k, v in held_out.items() if v is not None) or "none"
    print(
        f"{args.out}: {metrics['gaussians']} Gaussians, {metrics['iterations_per_second']:.1f} it/s, held out: {shown}"
    )
