"""Fit a rigged Gaussian avatar to a clip."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from geodiff4d.cli._device import DeviceName, chosen_device
from geodiff4d.cli._signing import SigningArgs, sealer


@dataclass(frozen=True)
class Args(SigningArgs):
    """Options of `geodiff4d fit`."""

    clip: Annotated[Path, tyro.conf.Positional]
    """Clip folder, from synthesize, synth or track."""
    out: Path
    """Avatar folder to write; the same command resumes an interrupted fit."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    """debug: seconds. embedded: two minutes on two cores. paper: 100K steps on a GPU."""
    ablate: tuple[
        Literal["refine", "normals", "normal-source", "remesh", "deformation", "dynamics", "densify"], ...
    ] = ()
    """Switch parts off: refine (trust the clip's head parameters), normals (no normal loss), normal-source (normals as
    a network sees them in single frames, not the clip's); and remesh, deformation, dynamics, densify."""
    iterations: int | None = None
    """Number of steps; by default the preset's."""
    harmonics: Literal[0, 1, 2, 3] | None = None
    """Degree of colours that depend on the view, 0 for none; by default the preset's: 3 in paper, else 0."""
    hold_out_views: int = 0
    """Number of cameras that are held out; with this or the next option, no other frames are."""
    hold_out_times: float = 0.0
    """Share of the timesteps that are held out, the clip's last."""
    device: DeviceName = "auto"
    """Device to fit on; auto: the preset's, CUDA for paper and the CPU for the others."""
    seed: int = 0


def run(args: Args) -> None:
    from geodiff4d.avatar.fit import fit
    from geodiff4d.avatar.frames import HoldOut
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.data.clip import Clip
    from geodiff4d.presets import preset
    from geodiff4d.provenance.seal import origin
    from geodiff4d.tracking.normals import normal_estimator

    config = preset(args.preset).fit
    if args.device != "auto":
        config = replace(config, device=chosen_device(args.device, splats=True).type)
    for part in args.ablate:
        config = config.ablated(part)
    if args.iterations is not None:
        if args.iterations < 1:
            raise UserError(f"--iterations is {args.iterations}: expected at least 1")
        config = replace(config, iterations=args.iterations)
    if args.harmonics is not None:
        config = replace(config, harmonics=args.harmonics)
    if args.hold_out_views < 0 or not 0 <= args.hold_out_times < 1:
        raise UserError("--hold-out-views must not be negative, and --hold-out-times be at least 0 and below 1")
    if args.hold_out_views or args.hold_out_times:
        config = replace(config, hold_out=HoldOut(0, args.hold_out_views, args.hold_out_times))
    signer, clip = sealer(args), Clip(args.clip)
    normals = normal_estimator() if config.normal_source == "estimator" else None
    metrics = fit(clip, args.out, config, args.seed, progress.bar, normals)
    signer.seal(args.out, origin(args.clip))
    speed = f"{metrics['gaussians']} Gaussians, {metrics['iterations_per_second']:.1f} it/s"
    print(f"{args.out}: {speed}, held out: {shown(metrics['held_out'])}")
    for name in ("views", "times"):
        if metrics[f"held_out_{name}"]["psnr_fg"] is not None:
            print(f"held-out {name}: {shown(metrics[f'held_out_{name}'])}")


def shown(score: dict[str, float | None]) -> str:
    """Return a score as text, "none" where nothing was held out."""
    return ", ".join(f"{k} {v:.2f}" for k, v in score.items() if v is not None) or "none"
