"""Portrait and driver in, avatar and driven video out: synthesize, fit and render in one go."""

import sys
from dataclasses import dataclass
from pathlib import Path

from geodiff4d.cli._generation import (
    GenerationArgs,
    clip_extent,
    devices_of,
    motion_of,
    prepare,
    set_up,
    stated,
)
from geodiff4d.cli._signing import sealer


@dataclass(frozen=True, kw_only=True)
class Args(GenerationArgs):
    """Options of `geodiff4d reconstruct`."""

    out: Path
    """Folder to write: portrait/ (as tracked), clip/, avatar/, avatar.mp4, report.html. The same command, on as many
    threads, keeps finished stages; another is refused."""
    views: int | None = None
    """How many of the 16 capture cameras; by default the preset's."""
    frames: int | None = None
    """Frames over all cameras, as many for each of them; by default the preset's."""
    processes: int | None = None
    """Processes that generate the clip, a GPU each; by default one per GPU, and one where there is none."""
    driver_only: bool = False
    """Train with what the driver shows alone. By default two thirds of the clip show everything a face does (visemes,
    smiles, lids, gaze, tongue), played by a person of the open world, so that the avatar has seen it when others drive
    it; on FLAME, which that person is not made for, it is the driver alone."""


def run(args: Args) -> None:
    import json

    import torch

    from geodiff4d.cli.progress import bar
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.files import refuse_foreign
    from geodiff4d.evaluate.reconstruction import finish
    from geodiff4d.pipeline import kept_stages, plan_clip, reconstruct

    begun = (args.out / "reconstruction.json").exists()
    for name in ("portrait", "clip", "avatar"):
        refuse_foreign(args.out / name)
    signer, setup = sealer(args), set_up(args)
    views, frames = clip_extent(setup, args.views, args.frames)
    devices = devices_of(args, setup, args.processes)
    if setup.preset.fit.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"preset {setup.preset.name} fits the avatar on a GPU and torch finds none: "
            "run `geodiff4d synthesize`, then `geodiff4d fit --preset embedded`"
        )
    # Before anybody knows whose reconstruction is there, nothing of it is replaced.
    tracked_to = None if begun or kept_stages(args.out) else args.out / "portrait"
    request = prepare(args, setup, bar, frames, tracked_to)
    kept = kept_stages(args.out)
    plan = plan_clip(request, views, frames, motion_of(args, setup, args.driver_only), setup.preset.azimuth_deg)
    reconstruct(plan, setup.generator, args.out, setup.preset.fit, args.seed, bar, devices)
    if kept:
        print(f"note: kept {' and '.join(kept)} of {args.out}", file=sys.stderr)
    finish(args.out, request.portrait, request.driving, args.generator, bar)
    statement = stated(args, setup.generator)
    for stage in ("clip", "avatar"):
        signer.seal_stage(args.out / stage, statement)
    for made in ("avatar.mp4", "report.html"):
        signer.seal(args.out / made, statement)
    psnr = json.loads((args.out / "avatar" / "metrics.json").read_text())["held_out"]["psnr_fg"]
    found = "too few frames to hold one out" if psnr is None else f"{psnr:.1f} dB on held-out generated frames"
    print(f"{args.out}: avatar fitted, {found}; open {args.out / 'report.html'}")
