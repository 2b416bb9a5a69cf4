"""Make the avatar's training clip: several cameras, the driver's expressions, RGB, normals and expression tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d synthesize`."""

    portrait: Path
    """Picture of one face, or a tracked folder."""
    driving: Path
    """Video of one face, or a tracked or synthetic clip folder."""
    out: Path
    """Clip folder to write."""
    generator: Literal["diffusion", "warp"] = "diffusion"
    """diffusion: the video model. warp: the portrait's texture on the head, without a model."""
    views: int | None = None
    """Cameras, of the rig's 16; by default the preset's."""
    frames: int | None = None
    """Frames over all cameras; by default the preset's."""
    preset: Literal["debug", "embedded"] = "embedded"
    model: Path | None = None
    """Video model folder; by default the one that ships."""
    head: str = "openhead"
    steps: int | None = None
    """Sampling steps; by default the preset's."""
    guidance: float | None = None
    """Classifier-free guidance on the expression; by default the preset's."""
    sampler: Literal["ddim", "unipc", "dpm++"] | None = None
    seed: int = 0


def run(args: Args) -> None:
    from geodiff4d.cli._generation import prepare
    from geodiff4d.cli.progress import track
    from geodiff4d.core.errors import UserError
    from geodiff4d.pipeline import synthesize

    job = prepare(args, track)
    views, frames = args.views or job.preset.views, args.frames or job.preset.frames
    if not 1 <= views <= 16 or frames < views:
        raise UserError(f"--views {views} --frames {frames}: expected 1 to 16 cameras and at least one frame for each")
    clip = synthesize(
        job.portrait, job.driving, args.out, job.head, args.generator, job.model, views, frames, job.sample, track
    )
    print(f"{clip.folder}: {len(clip)} frames, {len(clip.camera_indices)} cameras, {len(clip.timesteps)} expressions")
