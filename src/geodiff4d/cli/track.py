"""Track a portrait or a video: fit the head to its landmarks, cut out the foreground, write a clip."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d track`."""

    input: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image (PNG, JPEG, WebP) or video (MP4, MOV, WebM) of one face. Several images or videos are tracked together, as
    portraits of one person."""
    out: Path
    """Clip folder to write; it replaces an older one, and nothing else."""
    head: str = "openhead"
    """`openhead`, your FLAME file (.pkl; docs/FLAME.md), or an .npz head (docs/OPENHEAD.md)."""
    detector: Literal["embedded", "mediapipe"] | None = None
    """Detector of the landmarks: the package's own network, or MediaPipe (`make track-env` installs it); by default the
    network if it is shipped."""
    portrait: bool = False
    """Take the best frames of a video as portraits of one person, as `synthesize --portrait` does."""
    size: int = 256
    """Side of the square crop that is written [px]."""
    limit: int | None = None
    """Largest number of frames of a video that are tracked."""
    focal_px: float | None = None
    """Focal length of the uncut image; by default from EXIF, else assumed."""
    mask: Path | None = None
    """Your own cut-out of an image: one of the same size, the person in white on black."""
    matting: Path | None = None
    """Your own matting network to cut the person out with, an ONNX file (MODNet, U²-Net, BiRefNet, say; needs the extra
    `onnx`), instead of the one that ships."""
    points: Path | None = None
    """Where named points of an image's face are, if the overlay is wrong: a JSON object of [x, y] in its pixels, by
    name (docs/TRACKING.md; the clip's transforms.json has those that were found, under `points`)."""


def run(args: Args) -> None:
    from geodiff4d.core.threads import leave_a_core

    leave_a_core()  # To the threads that frames are shared out to; before anything numerical is imported.
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.files import refuse_foreign
    from geodiff4d.heads import load_head
    from geodiff4d.tracking.detect import MediaPipeDetector
    from geodiff4d.tracking.embedded import EmbeddedDetector
    from geodiff4d.tracking.together import track_together
    from geodiff4d.tracking.track import TrackingConfig, default_detector, track

    if not args.input:
        raise UserError("no input: expected an image or a video of one face")
    first, *others = args.input
    refuse_foreign(args.out, first, *others)
    together = args.portrait or bool(others)
    if args.mask is not None and args.matting is not None:
        raise UserError("--mask and --matting both say what the foreground is: leave one out")
    own = (("--mask", args.mask), ("--points", args.points), ("--matting", args.matting))
    for option, given in (*own, ("--limit", args.limit), ("--focal-px", args.focal_px)):
        if together and given is not None:
            raise UserError(f"{option} is for one image or video: several portraits are tracked as they are")
    config = TrackingConfig(
        size=args.size, limit=args.limit, focal_px=args.focal_px, mask=args.mask, points=args.points,
        matting=args.matting,
    )  # fmt: skip
    chosen = {"mediapipe": MediaPipeDetector, "embedded": EmbeddedDetector, None: default_detector}
    detector = chosen[args.detector]()
    if together:
        clip = track_together(args.input, args.out, load_head(args.head), detector, config, progress.bar)
    else:
        clip = track(first, args.out, load_head(args.head), detector, config, progress.bar)
    for note in clip.extra["notes"]:
        print(f"note: {note}", file=sys.stderr)
    show = "overlay.mp4" if (clip.folder / "overlay.mp4").exists() else "overlay.png"
    if together:
        print(f"{clip.folder}: {len(clip)} portraits of one person; look at {show}")
        return
    error, focal, origin = (clip.extra[k] for k in ("error_px_at_256", "focal_px", "focal_source"))
    print(
        f"{clip.folder}: {len(clip)} frame{'s' if len(clip) > 1 else ''}, landmarks {error:.2f} px off at 256 px, "
        f"focal length {focal:.0f} px ({origin}); look at {show}"
    )
