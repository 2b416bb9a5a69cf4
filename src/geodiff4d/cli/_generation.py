"""What animate, synthesize and reconstruct share: reading portrait, driver, model and sampling options."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from geodiff4d.heads import Head
    from geodiff4d.pipeline import Driving, Track
    from geodiff4d.presets import Preset
    from geodiff4d.video.generate import Portrait
    from geodiff4d.video.model import VideoModel
    from geodiff4d.video.sample import SampleConfig


@dataclass(frozen=True, kw_only=True)
class GenerationArgs:
    """Options that animate, synthesize and reconstruct have in common."""

    portrait: Path
    """Picture of one face, or a tracked folder."""
    driving: Path
    """Video of one face, or a tracked or synthetic clip folder."""
    generator: Literal["diffusion", "warp"] = "diffusion"
    """diffusion: the video model. warp: the portrait's texture on the head, without a model."""
    preset: Literal["debug", "embedded"] = "embedded"
    model: Path | None = None
    """Video model folder; by default the one that ships."""
    head: str = "openhead"
    """openhead, your FLAME file (.pkl; docs/FLAME.md) or an .npz head; a tracked folder must be on it."""
    steps: int | None = None
    """Sampling steps; by default the preset's."""
    guidance: float | None = None
    """Classifier-free guidance on the expression; by default the preset's."""
    sampler: Literal["ddim", "unipc", "dpm++"] | None = None
    memory: Literal["fast", "offload"] = "fast"
    """offload: what a stage does not need waits in the host's memory, guidance takes two passes and frames are decoded
    one by one."""
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """Everything a generating command needs."""

    preset: "Preset"
    head: "Head"
    model: "VideoModel | None"
    portrait: "Portrait"
    driving: "Driving"
    sample: "SampleConfig"


def prepare(args: GenerationArgs, progress: "Track", limit: int | None = None, tracked_to: Path | None = None) -> Job:
    """Load a job's parts; the cheap checks come before the slow ones."""
    from geodiff4d.core.errors import UserError
    from geodiff4d.heads import load_head
    from geodiff4d.pipeline import DEFAULT_CROP, load_driving, load_model, load_portrait, tracked
    from geodiff4d.presets import preset

    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise UserError(f"--steps is {args.steps}: expected 1 to 1000")
    for flag in ("portrait", "driving"):
        if not getattr(args, flag).exists():
            raise UserError(
                f"--{flag} {getattr(args, flag)} does not exist: expected a picture, a video or a tracked folder"
            )
    p, head = preset(args.preset), load_head(args.head)
    model = load_model(args.model) if args.generator == "diffusion" else None
    size = model.config.size if model else p.model.size
    portrait = load_portrait(tracked(args.portrait, head, size, 1, progress, tracked_to), size)
    crop = model.config.expression.size if model else DEFAULT_CROP
    driving = load_driving(tracked(args.driving, head, size, limit, progress), head, crop, limit, progress)
    wanted = {k: getattr(args, k) for k in ("steps", "guidance", "sampler") if getattr(args, k) is not None}
    if args.memory == "offload":
        wanted |= {"offload": True, "together": False, "chunk": 1}
    return Job(p, head, model, portrait, driving, replace(p.sample, seed=args.seed, **wanted))
