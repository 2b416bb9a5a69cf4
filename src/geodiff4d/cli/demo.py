"""Portrait to avatar on the embedded default: files, figures and a page to look at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geodiff4d.cli._signing import SigningArgs, sealer


@dataclass(frozen=True)
class Args(SigningArgs):
    """Options of `geodiff4d demo`."""

    out: Path = Path("runs/demo")
    """Folder to write; finished stages found there are kept."""
    preset: Literal["debug", "embedded"] = "embedded"
    """debug: seconds, tiny pictures. embedded: a few minutes on two cores."""
    model: Path | None = None
    """Video model folder; by default the one that ships."""
    pairs: int | None = None
    """Score so many pairs instead of the preset's."""
    seed: int = 0
    workers: int | None = None
    """Processes that score pairs; by default one per core, and one with --preset debug."""


def run(args: Args) -> None:
    from dataclasses import replace

    from geodiff4d.cli.evaluate import workers_for
    from geodiff4d.cli.progress import bar
    from geodiff4d.core.errors import UserError
    from geodiff4d.evaluate.demo import DEBUG, DemoConfig, run_demo
    from geodiff4d.provenance.statement import Statement

    config = replace(DEBUG if args.preset == "debug" else DemoConfig(), seed=args.seed)
    if args.pairs is not None:
        if not 2 <= args.pairs <= 100:
            raise UserError(f"--pairs is {args.pairs}: expected 2 to 100 (the shuffled control needs two)")
        config = replace(config, pairs=args.pairs)
    signer = sealer(args)
    asked = 1 if args.preset == "debug" and args.workers is None else args.workers
    metrics = run_demo(args.out, config, args.model, bar, workers_for(asked, ("cpu",)))
    # Nobody is asked: the portrait is a made-up person's.
    for stage in ("clip", "avatar"):
        signer.seal_stage(args.out / stage, Statement())
    for made in ("generated.mp4", "avatar.mp4", "overview.png", "report.html"):
        signer.seal(args.out / made, Statement())
    made, warp, avatar = metrics["generated"], metrics["mesh_warp"], metrics["avatar"]
    print(
        f"video model {made['psnr_fg']:.2f} dB, normals {made['normal_deg']:.1f}°; "
        f"mesh warp {warp['psnr_fg']:.2f} dB, {warp['normal_deg']:.1f}°"
    )
    print(
        f"avatar {avatar['psnr_fg_vs_truth']:.1f} dB, silhouette overlap {avatar['silhouette_iou_orbit']:.2f}; "
        f"{metrics['seconds']['total']:.0f} s in all"
    )
    print(f"open {args.out / 'report.html'}")
