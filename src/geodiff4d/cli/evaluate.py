"""Measure: the paper's protocols (self, cross, cross-view), pairs, photographs, driving, tracking, or what the model
generates."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from geodiff4d.cli._device import DeviceName, chosen_device

if TYPE_CHECKING:
    from geodiff4d.evaluate.protocol import Settings
    from geodiff4d.tracking.detect import Detector


@dataclass(frozen=True)
class ProtocolArgs:
    """Options of self, cross and cross-view (docs/EVALUATION.md)."""

    data: Path | None = None
    """Folder of clips (`geodiff4d import`, `synth`) to measure on; by default the open world's people are rendered into
    OUT/data."""
    results: Path | None = None
    """Another method's frames to score beside ours: RESULTS/<clip>/{00000..}_rgb.png and, if it has any, _normal.png.
    Clips and inputs are what a first run leaves in OUT."""
    methods: tuple[str, ...] = ()
    """By default all but avatar and avatar_true, which are fitted per reference and take minutes each. avatar_true is
    the upper bound: fitted to true frames instead of generated ones."""
    subjects: int | None = None
    """By default 10; 2 with --preset debug."""
    sequences: int | None = None
    """Of each subject; by default 2. Of tracking: measure H.264 videos of people who perform, instead of single
    images: 1, a performance a person."""
    cameras: int | None = None
    """That drive and are compared; by default 4."""
    frames: int | None = None
    """Of each clip, by default 16; of driving, at most so many, by default 96; of tracking's videos, by default 48."""
    people: Literal["plain", "randomised"] = "plain"
    """Of the open world: people one could meet, or those with colours that nobody has."""
    tracking: Literal["pixels", "clip"] | None = None
    """pixels: everyone gets what our tracker sees. clip: the clip's own parameters, a tracker's (true ones are
    disturbed). By default pixels, and clip with --preset debug, whose pictures are too small."""
    workers: int | None = None
    """Processes; by default one per GPU, or one per core. The figures do not depend on it."""
    head: str = "openhead"
    """openhead, or your FLAME file: clips with --tracking clip must be on it."""
    lpips: tuple[Path, ...] = ()
    """LPIPS: a state dict of AlexNet or VGG16 and LPIPS' linear weights, of yours."""
    arcface: Path | None = None
    """CSIM: an ArcFace ONNX file of yours."""
    bf16: bool = True
    """Generate in bf16 where the machine has it; --no-bf16: in float32."""
    keep: Literal["some", "all"] = "some"
    """Frames that stay in OUT/clips: four a clip, or all."""
    seed: int = 0


@dataclass(frozen=True)
class FootageArgs:
    """Options of pairs, photographs and driving: your own images and videos (docs/EVALUATION.md)."""

    portraits: tuple[Path, ...] = ()
    """Of driving: pictures of one face, or tracked folders."""
    drivers: tuple[Path, ...] = ()
    """Of driving: videos of one face, or tracked folders."""
    judges: Path | None = None
    """Folder of a Python environment with independent networks that read expressions and identities; by default
    $GEODIFF4D_JUDGES, or this environment if the extra `judges` is installed in it."""


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d evaluate`."""

    what: Annotated[
        Literal["self", "cross", "cross-view", "pairs", "photographs", "driving", "tracking", "video"],
        tyro.conf.Positional,
    ]
    """self: a person's reference driven by the same person's film from another camera. cross: by another person's.
    cross-view: one performance, seen by twelve cameras, must drive to one film. pairs: two photographs a person, of
    which the second drives the first and is the truth. photographs: single ones, seen from other sides. driving:
    portraits driven by videos. tracking: images, or with --sequences videos, of people that nothing was trained on,
    tracked by each detector (docs/TRACKING.md). video: is a generated frame nearest to its own person and expression,
    and how much does it flicker."""
    out: Path
    """Folder for metrics.json; also table.md, report.html, frames or videos, where there are any. The same command goes
    on where it was."""
    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Of pairs: images named PERSON_….jpg, two for each person; by name, the first is the portrait. Of photographs:
    images of one face each, or clips of `import portraits`."""
    detectors: tuple[Literal["embedded", "mediapipe"], ...] = ("embedded",)
    """Of tracking: who finds the landmarks; figures stand side by side."""
    model: Path | None = None
    """Video model, or of tracking the perception network; by default the one that ships."""
    preset: Literal["debug", "embedded", "paper"] | None = None
    """How the video model samples, by default as it was trained; debug's pictures are too small to be tracked and take
    the disturbed truth."""
    count: int | None = None
    """People of tracking and video; by default 100 images for tracking, 10 people for its videos and for video."""
    split: Literal["val", "test"] = "test"
    """Of the open world's people."""
    size: int = 256
    """Of tracking: side of the canonical crop, and of the videos with --sequences; of photographs: side of portraits
    and frames [px]."""
    device: DeviceName = "auto"
    """Of protocols and video: where the model computes; auto: on CUDA if there is any, protocols on all its GPUs."""
    protocol: Annotated[ProtocolArgs, tyro.conf.arg(name="")] = field(default_factory=ProtocolArgs)
    footage: Annotated[FootageArgs, tyro.conf.arg(name="")] = field(default_factory=FootageArgs)


_CROSS_VIEW = {
    "model", "preset", "split", "device", "data", "subjects", "frames", "people", "tracking", "workers", "head",
    "bf16", "seed",
}  # fmt: skip
_PROTOCOL = _CROSS_VIEW | {"results", "methods", "sequences", "cameras", "lpips", "arcface", "keep"}
_FOOTAGE = {"model", "preset", "device", "head", "methods", "bf16", "seed", "judges"}
READS = {
    "self": _PROTOCOL,
    "cross": _PROTOCOL,
    "cross-view": _CROSS_VIEW,
    "pairs": _FOOTAGE | {"folder"},
    "photographs": _FOOTAGE | {"folder", "size", "workers"},
    "driving": _FOOTAGE | {"portraits", "drivers", "frames"},
    "tracking": {"detectors", "model", "count", "split", "size", "sequences", "frames"},
    "video": {"model", "preset", "count", "split", "device"},
}
"""Options that each measurement looks at, beside `out`."""


def _require_read(args: Args) -> None:
    """Refuse options that the measurement would ignore.

    Raises:
        UserError: one was given.
    """
    from geodiff4d.core.errors import UserError

    groups = ((args, Args(args.what, args.out)), (args.protocol, ProtocolArgs()), (args.footage, FootageArgs()))
    for given, default in groups:
        for name, value in vars(given).items():
            known = [what for what, read in READS.items() if name in read]
            if known and args.what not in known and value != getattr(default, name):
                option = "FOLDER" if name == "folder" else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is for evaluate {', '.join(known)}: leave it out of evaluate {args.what}")


def run(args: Args) -> None:
    from geodiff4d.core.errors import UserError

    _require_read(args)
    if args.count is not None and args.count < 1:
        raise UserError(f"--count is {args.count}: expected at least one person")
    if args.what == "tracking" and args.protocol.sequences is not None:
        _tracking_videos(args, args.count or 10)
    elif args.what == "tracking":
        _tracking(args, args.count or 100)
    elif args.what in ("pairs", "photographs", "driving"):
        _footage(args)
    elif args.what == "video":
        _video(args, args.count or 10)
    else:
        _protocol(args, args.what)


def _protocol(args: Args, what: Literal["self", "cross", "cross-view"]) -> None:
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.evaluate.cases import Extent

    p, debug = args.protocol, args.preset == "debug"
    devices = devices_named(args.device)
    workers = workers_for(p.workers, devices)
    if p.data is not None and not p.data.is_dir():
        raise UserError(f"--data {p.data} is not a folder: expected clips (from `geodiff4d import` or `synth`)")
    small = {"subjects": 2, "sequences": 1, "cameras": 1, "frames": 3}
    full = {"subjects": 3 if what == "cross-view" else 10, "sequences": 2, "cameras": 4, "frames": 16}
    given = {k: getattr(p, k) for k in full}
    counts = {k: (small if debug else full)[k] if v is None else v for k, v in given.items()}
    extent = Extent(**counts, split=args.split, people=p.people)
    settings = settings_of(args, devices)
    if what == "cross-view":
        from geodiff4d.evaluate.cross_view import run_cross_view

        run_cross_view(settings, extent, p.data, workers, progress.bar)
    else:
        from geodiff4d.evaluate.protocol import run_protocol
        from geodiff4d.evaluate.protocol_page import write_results

        cases, found = run_protocol(what, settings, extent, p.data, workers, progress.bar)
        config = {
            "data": "open world" if p.data is None else p.data.name, "preset": settings.preset.name, **counts,
            "split": args.split, "people": p.people, "tracking": settings.tracking, "seed": p.seed, "bf16": p.bf16,
            "model": "shipped" if args.model is None else args.model.name, "methods": settings.methods,
        }  # fmt: skip
        write_results(args.out, what, cases, found, config)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    print(f"{args.out / 'report.html'}: the page to look at; metrics.json and table.md beside it")


def settings_of(args: Args, devices: tuple[str, ...]) -> "Settings":
    """Return a protocol's settings; without --preset, the video model samples as it was trained."""
    from geodiff4d.evaluate.judges import JudgeConfig
    from geodiff4d.evaluate.methods import DEFAULT_METHODS
    from geodiff4d.evaluate.protocol import Settings
    from geodiff4d.pipeline import default_preset, load_model
    from geodiff4d.presets import preset

    p, chosen = args.protocol, preset(args.preset) if args.preset else default_preset(load_model(args.model))
    tracking = p.tracking or ("pixels" if chosen.trackable else "clip")
    return Settings(
        args.out, chosen, args.model, p.head, p.methods or DEFAULT_METHODS, p.results, tracking,
        JudgeConfig(p.lpips, p.arcface), p.keep, p.seed, p.bf16, devices,
    )  # fmt: skip


def devices_named(name: DeviceName) -> tuple[str, ...]:
    """Return where processes compute, in turn: all GPUs there are, or the CPU."""
    import torch

    if chosen_device(name).type != "cuda":
        return ("cpu",)
    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))


def workers_for(asked: int | None, devices: tuple[str, ...]) -> int:
    """Return how many processes work: as many as asked for, else one per GPU or per core.

    Raises:
        UserError: none is asked for.
    """
    import os

    from geodiff4d.core.errors import UserError

    if asked is not None and asked < 1:
        raise UserError(f"--workers is {asked}: expected at least one process")
    return asked or (len(os.sched_getaffinity(0)) if devices == ("cpu",) else len(devices))


def _video(args: Args, count: int) -> None:
    from geodiff4d.cli import progress
    from geodiff4d.evaluate.video import VideoEvaluation, evaluate_video
    from geodiff4d.heads import load_head
    from geodiff4d.pipeline import default_preset, load_model, placed_on
    from geodiff4d.presets import preset

    debug = args.preset == "debug"
    config = VideoEvaluation(subjects=count, split=args.split)
    if debug:
        config = VideoEvaluation(count, 2, 4, 3, args.split, "truth")
    model = placed_on(load_model(args.model), chosen_device(args.device))
    sample = (preset(args.preset) if args.preset else default_preset(model)).sample
    result = evaluate_video(args.out, load_head(), model, sample, config, progress.bar)
    print("  ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float)))
    print(f"{args.out / 'metrics.json'}: all figures")


def _footage(args: Args) -> None:
    """Measure on photographs and videos of the user's."""
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError

    p, footage = args.protocol, args.footage
    settings = settings_of(args, devices_named(args.device))
    settings = replace(settings, methods=p.methods or ("video_model", "mesh_warp"))
    if args.what == "pairs":
        from geodiff4d.evaluate.image_pairs import run_pairs

        if args.folder is None:
            raise UserError("evaluate pairs needs a folder: expected images named PERSON_….jpg, two for each person")
        run_pairs(args.folder, settings, footage.judges, progress.bar)
    elif args.what == "photographs":
        from geodiff4d.evaluate.photographs import run_photographs

        if args.folder is None:
            raise UserError("evaluate photographs needs a folder: expected images of one face each")
        workers = workers_for(p.workers, ("cpu",))
        run_photographs(args.folder, settings, args.size, footage.judges, workers, progress.bar)
    else:
        from geodiff4d.evaluate.driving import run_driving

        frames = 96 if p.frames is None else p.frames
        if frames < 3:
            raise UserError(f"--frames is {frames}: expected at least 3, a change of expression is over time")
        run_driving(footage.portraits, footage.drivers, settings, frames, footage.judges, progress.bar)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    print(f"{args.out / 'metrics.json'}: all figures")


def _detectors(args: Args) -> "dict[str, Detector]":
    from geodiff4d.tracking.detect import Detector, MediaPipeDetector
    from geodiff4d.tracking.embedded import EmbeddedDetector
    from geodiff4d.tracking.network import SHIPPED, load_perception

    known: dict[str, Detector] = {}
    for name in args.detectors:
        embedded = name == "embedded"
        known[name] = EmbeddedDetector(load_perception(args.model or SHIPPED)) if embedded else MediaPipeDetector()
    return known


def _tracking_videos(args: Args, count: int) -> None:
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.evaluate.tracking_videos import evaluate_videos, performances
    from geodiff4d.heads import load_head
    from geodiff4d.tracking.track import TrackingConfig

    p = args.protocol
    frames = 48 if p.frames is None else p.frames
    if p.sequences != 1 or frames < 3:
        raise UserError(f"--sequences {p.sequences} --frames {frames}: expected one sequence of at least 3 frames")
    videos = performances(count, args.split, frames, args.size)
    evaluate_videos(args.out, load_head(), _detectors(args), videos, TrackingConfig(size=args.size), progress.bar)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    print(f"{args.out / 'metrics.json'}: all figures")


def _tracking(args: Args, count: int) -> None:
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.evaluate.tracking import evaluate_tracking
    from geodiff4d.heads import load_head
    from geodiff4d.tracking.track import TrackingConfig

    if args.protocol.frames is not None:
        raise UserError("--frames is for videos: add --sequences 1, or leave it out of evaluate tracking")
    known = _detectors(args)
    result = evaluate_tracking(
        args.out, load_head(), known, count, args.split, TrackingConfig(size=args.size), progress.bar
    )
    for name in known:
        r = result[name]
        print(f"{name}: " + "  ".join(f"{k} {v}" for k, v in r.items() if not isinstance(v, dict)))
        found = {k: v for k, v in r["expression"].items() if v["gain"]}
        gains = [f"{k} {v['gain']['mean']:.2f} / {v['corr']['mean']:.2f}" for k, v in found.items()]
        print(f"{name}, gain / corr: " + ("  ".join(gains) or "needs three pictures with a face"))
    print(f"{args.out / 'metrics.json'}: all figures, by yaw too")
