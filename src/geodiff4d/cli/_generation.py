"""What animate, synthesize and reconstruct share: portrait, driver, and the generator that the options ask for."""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from geodiff4d.cli._device import DeviceName, chosen_device
from geodiff4d.cli._signing import SigningArgs

if TYPE_CHECKING:
    import torch

    from geodiff4d.core.progress import Progress
    from geodiff4d.data.clip import Clip
    from geodiff4d.heads import Head
    from geodiff4d.presets import Preset
    from geodiff4d.provenance.statement import Statement
    from geodiff4d.video.generate import GenerationRequest, Generator
    from geodiff4d.video.inputs import Driving
    from geodiff4d.video.parts import Devices
    from geodiff4d.video.sample import SampleConfig


@dataclass(frozen=True, kw_only=True)
class GenerationArgs(SigningArgs):
    """Options that animate, synthesize and reconstruct have in common."""

    portrait: tuple[Path, ...]
    """Image of one face (PNG, JPEG, WebP, BMP, TIFF, GIF; HEIC too if pillow-heif is installed),
    or a tracked folder. Several images of the person, or a video, show more of them: what each shows best is taken,
    and the first leads (of a video, its most frontal frame)."""
    driving: Path | None = None
    """Video of one face, or a tracked or synthetic clip folder. Without it, synthesize and reconstruct lead the
    portrait through the shipped range of motion alone."""
    start: float = 0.0
    """Take the driver from this second on."""
    seconds: float | None = None
    """Take at most so many seconds of the driver; by default as many as there are frames to make."""
    size: int | None = None
    """Side of the frames [px]; by default the model's. What is larger takes a model with a guided decoder (the shipped
    one) or --generator warp: 512 shows the detail that the portrait has at that size."""
    generator: Literal["diffusion", "warp"] = "diffusion"
    """diffusion: the video model. warp: the portrait's texture on the head, without a model."""
    preset: Literal["debug", "embedded", "paper"] | None = None
    """How much is made and how it is sampled; by default as the model was trained: paper where its noise schedule is
    Stable Diffusion's, else embedded."""
    model: Path | None = None
    """Video model folder; by default the one that ships."""
    head: str = "openhead"
    """openhead, your FLAME file (.pkl; docs/FLAME.md) or an .npz head; a tracked folder must be on it."""
    steps: int | None = None
    """Sampling steps; by default the preset's."""
    guidance: float | None = None
    """Classifier-free guidance on the expression; by default the preset's."""
    sampler: Literal["ddim", "unipc", "dpm++"] | None = None
    device: DeviceName = "auto"
    """Where the video model computes; auto: on CUDA if there is any."""
    consent: Literal["self", "permitted", "not stated"] = "not stated"
    """Whose portrait it is, for the signed statement: self (yours), or permitted (you may use it)."""
    memory: Literal["fast", "offload"] = "fast"
    """offload: what a stage does not need waits in the host's memory, guidance takes two passes and frames are decoded
    one by one."""
    seed: int = 0


def inputs_of(args: GenerationArgs) -> tuple[Path, ...]:
    """Return the files and folders that a generating command reads, none of which it may replace."""
    return args.portrait if args.driving is None else (*args.portrait, args.driving)


def stated(args: GenerationArgs, generator: "Generator") -> "Statement":
    """Return what is said of what a generating command makes."""
    from geodiff4d.provenance.statement import Statement, hash_portraits

    return Statement(hash_portraits(args.portrait), generator.fingerprint(), args.consent)


@dataclass(frozen=True)
class Setup:
    """What a generating command knows before it reads portrait and driver."""

    preset: "Preset"
    head: "Head"
    generator: "Generator"
    size: int
    """Side at which the model works, and drivers are tracked [px]."""
    crop: int
    """Side of the driving crops [px]."""
    frame_size: int
    """Side of the generated images [px]."""


def set_up(args: GenerationArgs) -> Setup:
    """Check the options and load head and model."""
    from geodiff4d.core.errors import UserError
    from geodiff4d.heads import load_head
    from geodiff4d.presets import preset

    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise UserError(f"--steps is {args.steps}: expected 1 to 1000")
    if not 0 <= args.start < float("inf"):
        raise UserError(f"--start is {args.start}: expected seconds from the driver's first frame, 0 or more")
    if args.seconds is not None and not 0 < args.seconds < float("inf"):
        raise UserError(f"--seconds is {args.seconds}: expected more than 0")
    if args.driving is None and (args.start or args.seconds is not None):
        raise UserError("--start and --seconds are a driver's: expected --driving")
    for flag, path in (*(("portrait", p) for p in args.portrait), ("driving", args.driving)):
        if path is not None and not path.exists():
            raise UserError(f"--{flag} {path} does not exist: expected an image, a video or a tracked folder")
    if not args.portrait:
        raise UserError("--portrait names no file: expected one image or more, a video or a tracked folder")
    device, head = chosen_device(args.device), load_head(args.head)
    if args.generator == "diffusion":
        return _diffusion(args, head, device)
    from geodiff4d.video.generate import MOST_PX, WarpGenerator

    p = preset(args.preset or "embedded")
    side = p.model.size if args.size is None else args.size
    if side % 2 or not 16 <= side <= MOST_PX:
        raise UserError(f"--size {side}: expected an even number from 16 to {MOST_PX}")
    return Setup(p, head, WarpGenerator(), p.model.size, p.model.expression.size, side)


def _diffusion(args: GenerationArgs, head: "Head", device: "torch.device") -> Setup:
    """Load the model; it says how large images and crops are, and by which preset it is sampled."""
    from geodiff4d.pipeline import default_preset, load_model, placed_on
    from geodiff4d.presets import preset
    from geodiff4d.video.generate import DiffusionGenerator, require_frame_size

    model = placed_on(load_model(args.model, device), device)
    p = preset(args.preset) if args.preset else default_preset(model)
    generator = DiffusionGenerator(model, _sampling(args, p))
    own = model.config.size
    side = own if args.size is None else args.size
    require_frame_size(side, own, model.decoder)
    return Setup(p, head, generator, own, model.config.expression.size, side)


def _sampling(args: GenerationArgs, p: "Preset") -> "SampleConfig":
    wanted = {k: getattr(args, k) for k in ("steps", "guidance", "sampler") if getattr(args, k) is not None}
    if args.memory == "offload":
        wanted |= {"offload": True, "batched_cfg": False, "chunk": 1}
    return replace(p.sample, seed=args.seed, **wanted)


@dataclass(frozen=True)
class OnDevice:
    """Loads the model again for another process, on the GPU of its number where there are GPUs."""

    model: Path | None
    sample: "SampleConfig"
    device: DeviceName

    def __call__(self, number: int) -> "Generator":
        import torch

        from geodiff4d.pipeline import load_model, placed_on
        from geodiff4d.video.generate import DiffusionGenerator

        device = chosen_device(self.device)
        if device.type == "cuda":
            device = torch.device("cuda", number % torch.cuda.device_count())
        return DiffusionGenerator(placed_on(load_model(self.model, device), device), self.sample)


def devices_of(args: GenerationArgs, setup: Setup, processes: int | None) -> "Devices | None":
    """Return who generates a training clip beside this process; None where it does so alone.

    Raises:
        UserError: `processes` is not a number of processes, or nothing is sampled.
    """
    import torch

    from geodiff4d.core.errors import UserError
    from geodiff4d.video.parts import Devices

    sampled = args.generator == "diffusion"
    if processes is None:
        gpus = torch.cuda.device_count() if sampled and chosen_device(args.device).type == "cuda" else 1
        processes = max(1, gpus)
    if not 1 <= processes <= 64:
        raise UserError(f"--processes is {processes}: expected 1 to 64")
    if processes == 1:
        return None
    if not sampled:
        raise UserError("--processes: --generator warp needs no model and works alone: leave one of the two out")
    return Devices(processes, OnDevice(args.model, _sampling(args, setup.preset), args.device))


def clip_extent(setup: Setup, views: int | None, frames: int | None) -> tuple[int, int]:
    """Return (cameras, frames) of an avatar's training clip, by default the preset's; as many frames for each camera.

    Raises:
        UserError: there are fewer capture cameras, or fewer frames than cameras.
    """
    from geodiff4d.core.errors import UserError

    views = setup.preset.views if views is None else views
    frames = setup.preset.frames if frames is None else frames
    if not 1 <= views <= 16 or frames < views:
        raise UserError(f"--views {views} --frames {frames}: expected 1 to 16 cameras and at least one frame for each")
    return views, frames // views * views


def motion_of(args: GenerationArgs, setup: Setup, driver_only: bool) -> "Driving | None":
    """Return the range of motion that a training clip shows beside its driver; None where it shows the driver alone."""
    from geodiff4d.video.range_of_motion import range_of_motion

    alone = driver_only or args.driving is None or setup.head.name != "openhead"
    return None if alone else range_of_motion(setup.head, setup.crop)


def prepare(
    args: GenerationArgs, setup: Setup, progress: "Progress", limit: int | None, tracked_to: Path | None = None
) -> "GenerationRequest":
    """Read portrait and driver, at most `limit` frames of it; what is not tracked yet is, and not kept.

    The tracked portrait stays in `tracked_to`, if given.
    """
    from geodiff4d.pipeline import tracked_portrait
    from geodiff4d.video.generate import GenerationRequest
    from geodiff4d.video.inputs import load_portrait

    with tempfile.TemporaryDirectory(prefix="geodiff4d-") as name:
        side = setup.frame_size
        clip = tracked_portrait(args.portrait, setup.head, side, tracked_to or Path(name) / "portrait", progress)
        _tell("portrait", clip)
        shown, kept = clip.extra.get("crop", (0, 0, side))[2], clip.records[0].camera.width
        if side > setup.size and min(shown, kept) < 0.75 * side:
            of = f"its head spans {shown:.0f} px of the image"
            if kept < shown:
                of = f"it was tracked at {kept} px (`track --size {side}` keeps more)"
            print(
                f"note: portrait: {of}: frames of {side} px will not be sharper than of {setup.size}", file=sys.stderr
            )
        portrait = load_portrait(clip, side)
        if portrait.others:
            print(f"note: portrait: {1 + len(portrait.others)} images of one person are merged", file=sys.stderr)
        driving = _driver(args, setup, Path(name) / "driving", limit, progress)
    return GenerationRequest(portrait, driving, setup.head)


def _driver(args: GenerationArgs, setup: Setup, out: Path, limit: int | None, progress: "Progress") -> "Driving":
    """Read the part of the driver that was asked for, and say so if there is more of it; without a driver, the range of
    motion.
    """
    from geodiff4d.data.clip import Clip
    from geodiff4d.pipeline import tracked
    from geodiff4d.tracking.source import frame_count, frame_rate, is_video
    from geodiff4d.video.inputs import load_driving
    from geodiff4d.video.range_of_motion import range_of_motion

    source, fps, total = args.driving, 24.0, None
    if source is None:
        return range_of_motion(setup.head, setup.crop)
    if source.is_dir():
        clip = Clip(source)
        fps, total = clip.fps, len(clip.timesteps)
    elif is_video(source):
        fps, total = frame_rate(source), frame_count(source)
    skip = round(args.start * fps)
    if args.seconds is not None:
        asked = max(1, round(args.seconds * fps))
        limit = asked if limit is None else min(limit, asked)
    clip = tracked(source, setup.head, setup.size, out, limit, progress, skip)
    _tell("driving", clip)
    driving = load_driving(clip, setup.head, setup.crop, limit, progress, skip if source.is_dir() else 0)
    if total is not None and args.seconds is None and skip + len(driving) < total:
        took = f"{len(driving)} of its {total} frames, from {args.start:g} s to {args.start + len(driving) / fps:.1f} s"
        more = "--frames takes more, --start another part"
        print(f"note: driving: {source} is longer than needed: {took}; {more}", file=sys.stderr)
    return driving


def _tell(what: str, clip: "Clip") -> None:
    """Pass on what tracking noted."""
    for note in clip.extra.get("notes", ()):
        print(f"note: {what}: {note}", file=sys.stderr)
