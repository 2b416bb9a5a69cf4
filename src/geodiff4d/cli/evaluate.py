"""Measure beside the truth of the open world: how well its people are tracked from one picture each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d evaluate`."""

    what: Annotated[Literal["tracking"], tyro.conf.Positional]
    """tracking: pictures of people that nothing was trained on, tracked by each detector (docs/TRACKING.md)."""
    out: Path
    """Folder for metrics.json and a sheet of overlays per detector."""
    detectors: tuple[Literal["embedded", "mediapipe"], ...] = ("embedded",)
    """Who finds the landmarks; figures stand side by side."""
    model: Path | None = None
    """Perception network of the embedded detector; by default the one that ships."""
    count: int = 100
    """Pictures, each of another person."""
    split: Literal["val", "test"] = "test"
    size: int = 256
    """Side of the canonical crop [px]."""


def run(args: Args) -> None:
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.evaluate.tracking import evaluate_tracking
    from geodiff4d.heads import load_head
    from geodiff4d.tracking.detect import Detector, MediaPipeDetector
    from geodiff4d.tracking.embedded import EmbeddedDetector
    from geodiff4d.tracking.network import SHIPPED, load_perception
    from geodiff4d.tracking.track import TrackConfig

    if args.count < 1:
        raise UserError(f"--count is {args.count}: expected at least one picture")
    known: dict[str, Detector] = {}
    for name in args.detectors:
        embedded = name == "embedded"
        known[name] = EmbeddedDetector(load_perception(args.model or SHIPPED)) if embedded else MediaPipeDetector()
    result = evaluate_tracking(
        args.out, load_head(), known, args.count, args.split, TrackConfig(size=args.size), progress.track
    )
    for name in known:
        r = result[name]
        print(f"{name}: " + "  ".join(f"{k} {v}" for k, v in r.items() if not isinstance(v, dict)))
    print(f"{args.out / 'metrics.json'}: all figures, by yaw too")
