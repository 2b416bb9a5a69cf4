"""Render an avatar as a video, driven by a clip, another video, named expressions or a stream of weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from geodiff4d.cli._device import DeviceName, chosen_device
from geodiff4d.cli._driving import DrivingArgs
from geodiff4d.cli._signing import SigningArgs, sealer

HELD_FRAMES = 48


@dataclass(frozen=True)
class Args(DrivingArgs, SigningArgs):
    """Options of `geodiff4d render`; docs/AVATAR.md says more about driving."""

    avatar: Annotated[Path, tyro.conf.Positional]
    """Avatar folder, from fit, or a compact avatar (.g4d)."""
    out: Path
    """Video to write (MP4)."""
    camera: str = "orbit"
    """orbit (±60° around the head), front, or the path of a transforms.json."""
    normals: bool = False
    """Render camera-space normals instead of colours."""
    size: int | None = None
    """Height of the video [px]; by default that of the clip that the avatar was fitted to."""
    frames: int | None = None
    """Number of frames, for which the driving sequence is repeated; by default its own length (with --set, 48)."""
    label: bool = False
    """Write "AI-generated" into a corner of every frame."""
    device: DeviceName = "auto"
    """Device to render on; auto: CUDA if there is any and gsplat is installed."""


def run(args: Args) -> None:
    from itertools import islice

    from geodiff4d.avatar.compact import open_avatar
    from geodiff4d.avatar.drive import cameras, normal_image, render_sequence
    from geodiff4d.cli import progress
    from geodiff4d.cli._driving import performance
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.images import labelled
    from geodiff4d.core.video import write_video
    from geodiff4d.provenance.seal import origin

    for name, value, least in (("--size", args.size, 16), ("--frames", args.frames, 1)):
        if value is not None and not least <= value <= 8192:
            raise UserError(f"{name} is {value}: expected {least} to 8192")
    if args.out.suffix.lower() != ".mp4" or args.out.is_dir():
        raise UserError(f"--out {args.out} is not a video: expected a file name ending in .mp4")
    signer = sealer(args)
    device, avatar = chosen_device(args.device, splats=True), open_avatar(args.avatar)
    own_cameras = args.camera not in ("orbit", "front")
    show = performance(avatar, args, "driver" if own_cameras else "fixed")
    count = args.frames or (HELD_FRAMES if args.set else len(show))
    views = cameras(avatar, args.camera, count, args.size)
    frames = render_sequence(avatar.to(device), show.looped(count), views)
    images = (normal_image(f) if args.normals else f.rgb.clamp(0, 1) for f in islice(frames, count))
    if args.label:
        images = map(labelled, images)
    write_video(args.out, progress.bar(images, "rendering", count), show.fps)
    signer.seal(args.out, origin(args.avatar))
    print(f"{args.out}: {count} frames")
