"""Measure beside the truth of the open world: tracking from one picture each, or what the video model generates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d evaluate`."""

    what: Annotated[Literal["tracking", "video"], tyro.conf.Positional]
    """tracking: pictures of people that nothing was trained on, tracked by each detector (docs/TRACKING.md). video: is
    a generated frame nearest to its own person and expression, and how much does it flicker."""
    out: Path
    """Folder for metrics.json, and of tracking a sheet of overlays per detector."""
    detectors: tuple[Literal["embedded", "mediapipe"], ...] = ("embedded",)
    """Who finds the landmarks; figures stand side by side."""
    model: Path | None = None
    """Perception network of the embedded detector, or video model; by default the one that ships."""
    preset: Literal["debug", "embedded"] = "embedded"
    """How the video model samples; debug's pictures are too small to be tracked and take the disturbed truth."""
    count: int | None = None
    """People; by default 100 pictures for tracking, 10 people for video."""
    split: Literal["val", "test"] = "test"
    size: int = 256
    """Side of the canonical crop [px]."""


def run(args: Args) -> None:
    from geodiff4d.core.errors import UserError

    if args.count is not None and args.count < 1:
        raise UserError(f"--count is {args.count}: expected at least one person")
    if args.what == "tracking":
        _tracking(args, args.count or 100)
    else:
        _video(args, args.count or 10)


def _video(args: Args, count: int) -> None:
    from geodiff4d.cli import progress
    from geodiff4d.evaluate.video import VideoEvaluation, evaluate_video
    from geodiff4d.heads import load_head
    from geodiff4d.pipeline import load_model
    from geodiff4d.presets import preset

    debug = args.preset == "debug"
    config = VideoEvaluation(subjects=count, split=args.split)
    if debug:
        config = VideoEvaluation(count, 2, 4, 3, args.split, "truth")
    sample = preset(args.preset).sample
    result = evaluate_video(args.out, load_head(), load_model(args.model), sample, config, progress.track)
    print("  ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float)))
    print(f"{args.out / 'metrics.json'}: all figures")


def _tracking(args: Args, count: int) -> None:
    from geodiff4d.cli import progress
    from geodiff4d.evaluate.tracking import evaluate_tracking
    from geodiff4d.heads import load_head
    from geodiff4d.tracking.detect import Detector, MediaPipeDetector
    from geodiff4d.tracking.embedded import EmbeddedDetector
    from geodiff4d.tracking.network import SHIPPED, load_perception
    from geodiff4d.tracking.track import TrackConfig

    known: dict[str, Detector] = {}
    for name in args.detectors:
        embedded = name == "embedded"
        known[name] = EmbeddedDetector(load_perception(args.model or SHIPPED)) if embedded else MediaPipeDetector()
    result = evaluate_tracking(
        args.out, load_head(), known, count, args.split, TrackConfig(size=args.size), progress.track
    )
    for name in known:
        r = result[name]
        print(f"{name}: " + "  ".join(f"{k} {v}" for k, v in r.items() if not isinstance(v, dict)))
    print(f"{args.out / 'metrics.json'}: all figures, by yaw too")
