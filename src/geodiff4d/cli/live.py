"""Track images as they come, from a webcam or a video that is still being written, and drive an avatar by them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from geodiff4d.cli._signing import SigningArgs, sealer

if TYPE_CHECKING:
    from torch import Tensor

    from geodiff4d.avatar.model import Avatar
    from geodiff4d.core.stopping import StopRequest
    from geodiff4d.heads import Head
    from geodiff4d.heads.rig import HeadParams
    from geodiff4d.tracking.live import LiveFrame


@dataclass(frozen=True)
class Args(SigningArgs):
    """Options of `geodiff4d live`. It ends with its source, after --frames or at Ctrl-C; the frames so far are kept."""

    source: Annotated[Path, tyro.conf.Positional]
    """Webcam (/dev/video0), or a video file that is being written (MPEG-TS, Matroska, WebM, fragmented MP4)."""
    out: Path
    """Folder for live.mp4 (the tracked head over the image, and the avatar beside it) and params.npz."""
    avatar: Path | None = None
    """Avatar folder to drive; without it only the tracking is shown."""
    head: str = "openhead"
    """openhead, your FLAME file (.pkl; docs/FLAME.md) or an .npz head; with an avatar, the avatar's."""
    frames: int | None = None
    """Stop after this many tracked frames."""
    size: int = 256
    """Side of the panels [px]."""
    fps: float = 24.0
    """Rate that live.mp4 is played at."""


def run(args: Args) -> None:
    import signal
    import time
    from itertools import chain

    from geodiff4d.core.threads import leave_a_core

    leave_a_core()  # To the process that finds faces; before anything numerical is imported.

    from geodiff4d.avatar.model import Avatar
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.files import fresh_file
    from geodiff4d.core.stopping import stop_requests
    from geodiff4d.core.video import write_video
    from geodiff4d.heads import load_head
    from geodiff4d.heads.rig import HeadParams
    from geodiff4d.provenance.seal import origin
    from geodiff4d.tracking.live import LiveConfig, track_source

    if args.frames is not None and args.frames < 1:
        raise UserError(f"--frames is {args.frames}: expected at least 1")
    if not 16 <= args.size <= 2048:
        raise UserError(f"--size is {args.size}: expected 16 to 2048")
    signer = sealer(args)
    avatar = None if args.avatar is None else Avatar.load(args.avatar)
    head = load_head(args.head) if avatar is None else avatar.head
    tracked: list[HeadParams] = []
    began = time.monotonic()
    # A request, wherever Ctrl-C comes: what was seen so far is written. A second one ends everything.
    with stop_requests(signal.SIGINT) as request:
        frames = _until_asked(track_source(args.source, head), request, args.frames)
        # Nothing is written before there is a face.
        if (first := next(frames, None)) is None:
            raise UserError(
                f"{args.source} ended without a face: expected one, large and for {LiveConfig().warmup} frames"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        panels = _panels(chain([first], frames), head, avatar, args.size, tracked)
        write_video(args.out / "live.mp4", panels, args.fps)
    with fresh_file(args.out / "params.npz") as file, file.open("wb") as whole:
        HeadParams.stack(tracked).save(whole)
    if args.avatar is not None:
        signer.seal(args.out / "live.mp4", origin(args.avatar))
    seconds = time.monotonic() - began
    print(f"\n{args.out / 'live.mp4'}: {len(tracked)} frames in {seconds:.1f} s; params.npz beside it")


def _until_asked(frames: "Iterator[LiveFrame]", request: "StopRequest", limit: int | None) -> "Iterator[LiveFrame]":
    """Yield the frames; Ctrl-C and the limit end the video as the end of its source does."""
    for i, frame in enumerate(frames):
        yield frame
        if request.asked or (limit is not None and i + 1 >= limit):
            return


def _panels(
    frames: "Iterable[LiveFrame]", head: "Head", avatar: "Avatar | None", size: int, tracked: "list[HeadParams]"
) -> "Iterator[Tensor]":
    """Yield each frame's panels side by side; appends its parameters to `tracked` and prints the speed."""
    import sys
    import time

    import torch

    from geodiff4d.avatar.drive import LiveDriver
    from geodiff4d.core.camera import Camera
    from geodiff4d.core.images import encode_normals
    from geodiff4d.heads.rig import HeadParams
    from geodiff4d.render.crops import canonical_crop_box, crop_image, head_region
    from geodiff4d.render.meshes import rasterize, render_normals

    box, last = None, time.monotonic()
    driver = None if avatar is None else LiveDriver(avatar)
    for frame in frames:
        tracked.append(frame.params)
        mesh = head.pose(HeadParams.stack([frame.params]))
        box = box or canonical_crop_box(frame.camera, mesh.vertices[:, head_region(head)])
        camera = Camera.stack([frame.camera.cropped(*box, size)])
        normals, seen = render_normals(mesh, camera, rasterize(mesh.vertices, head.faces, camera))
        assert frame.image is not None, "asked for"
        crop = crop_image(frame.image, box, size, fill=0.5)
        over = torch.where(seen[0] > 0, 0.45 * crop + 0.55 * encode_normals(normals, seen)[0], crop)
        panels = [crop, over if frame.seen else crop]
        if avatar is not None and driver is not None:
            with torch.no_grad():
                panels.append(
                    avatar.render(driver(frame.params), avatar.camera.resized(size, size)).rgb.clamp(0, 1).cpu()
                )
        now = time.monotonic()
        state = f"{frame.error_px:.1f} px off" if frame.seen else "no face"
        print(f"\rframe {len(tracked)}: {state}, {1 / max(now - last, 1e-3):.1f} frames/s ", end="", file=sys.stderr)
        last = now
        yield torch.cat(panels, -1)
