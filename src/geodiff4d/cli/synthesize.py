"""Make the avatar's training clip: several cameras, the driver's expressions, RGB, normals and expression tokens."""

from dataclasses import dataclass
from pathlib import Path

from geodiff4d.cli._generation import (
    GenerationArgs,
    clip_extent,
    devices_of,
    inputs_of,
    motion_of,
    prepare,
    set_up,
    stated,
)
from geodiff4d.cli._signing import sealer


@dataclass(frozen=True, kw_only=True)
class Args(GenerationArgs):
    """Options of `geodiff4d synthesize`."""

    out: Path
    """Clip folder to write."""
    views: int | None = None
    """How many of the 16 capture cameras; by default the preset's."""
    frames: int | None = None
    """Frames over all cameras, as many for each of them; by default the preset's."""
    processes: int | None = None
    """Processes that generate, a GPU each; by default one per GPU, and one where there is none."""
    driver_only: bool = False
    """Train with what the driver shows alone. By default two thirds of the clip show everything a face does (visemes,
    smiles, lids, gaze, tongue), played by a person of the open world, so that the avatar has seen it when others drive
    it; on FLAME, which that person is not made for, it is the driver alone."""


def run(args: Args) -> None:
    from geodiff4d.cli.progress import bar
    from geodiff4d.core.files import refuse_foreign
    from geodiff4d.pipeline import plan_clip, synthesize

    refuse_foreign(args.out, *inputs_of(args))
    signer, setup = sealer(args), set_up(args)
    views, frames = clip_extent(setup, args.views, args.frames)
    devices = devices_of(args, setup, args.processes)
    request = prepare(args, setup, bar, frames)
    plan = plan_clip(request, views, frames, motion_of(args, setup, args.driver_only), setup.preset.azimuth_deg)
    clip = synthesize(plan, setup.generator, args.out, bar, devices)
    signer.seal(args.out, stated(args, setup.generator))
    print(f"{clip.folder}: {len(clip)} frames, {len(clip.camera_indices)} cameras, {len(clip.timesteps)} expressions")
