"""Render an avatar as a video, driven by a clip's head parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d render`."""

    avatar: Annotated[Path, tyro.conf.Positional]
    """Avatar folder, from fit."""
    out: Path
    """Video to write (MP4)."""
    driving: Path | None = None
    """Clip folder whose expressions drive the avatar; without it, the sequence that it was fitted to."""
    camera: str = "orbit"
    """orbit (±60° around the head), front, or the path of a transforms.json."""
    normals: bool = False
    """Render camera-space normals instead of colours."""
    size: int | None = None
    """Height of the picture [px]; without it, that of the clip the avatar was fitted to."""
    frames: int | None = None
    """Render so many frames, repeating the driving sequence; without it, each once."""


def run(args: Args) -> None:
    from itertools import islice

    import torch

    from geodiff4d.avatar.drive import cameras, driving_params, normal_image, render_sequence
    from geodiff4d.avatar.model import Avatar
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.video import write_video
    from geodiff4d.data.clip import Clip

    for name, value, least in (("--size", args.size, 16), ("--frames", args.frames, 1)):
        if value is not None and not least <= value <= 8192:
            raise UserError(f"{name} is {value}: expected {least} to 8192")
    if args.out.suffix.lower() != ".mp4" or args.out.is_dir():
        raise UserError(f"--out {args.out} is not a video: expected a file name ending in .mp4")
    avatar = Avatar.load(args.avatar)
    clip = None if args.driving is None else Clip(args.driving)
    own_cameras = args.camera not in ("orbit", "front")
    params = avatar.sequence if clip is None else driving_params(avatar, clip, "driver" if own_cameras else "fixed")
    count = args.frames or params.batch[0]
    params = params[torch.arange(count) % params.batch[0]]
    frames = render_sequence(avatar, params, cameras(avatar, args.camera, count, args.size))
    pictures = (normal_image(f) if args.normals else f.rgb.clamp(0, 1) for f in islice(frames, count))
    write_video(args.out, progress.track(pictures, "rendering", count), avatar.fps if clip is None else clip.fps)
    print(f"{args.out}: {count} frames")
