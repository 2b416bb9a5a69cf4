"""View an avatar in the browser: drag to orbit, controls for its face, drawn there or rendered by this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from geodiff4d.cli._driving import DrivingArgs


@dataclass(frozen=True)
class Args(DrivingArgs):
    """Options of `geodiff4d view`; it runs until Ctrl-C. Lines from --driving -, and a webcam's images from
    --driving /dev/video0, move the face as they come."""

    avatar: Annotated[Path, tyro.conf.Positional]
    """Avatar folder, from fit, or a compact avatar (.g4d)."""
    port: int = 8080
    """Port to listen on; 0 takes any free one."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; there is no password."""
    size: int = 384
    """Height of the image [px] of avatars that are rendered here: those with networks, and those on FLAME."""
    face_landmarker: tuple[Path, Path] | None = None
    """MediaPipe's face_landmarker.task and the folder of its npm package @mediapipe/tasks-vision, both yours: with them
    the browser's own webcam drives the head, too."""
    seconds: float | None = None
    """Stop after this many seconds."""


def run(args: Args) -> None:
    import sys
    import threading

    from geodiff4d.core.threads import leave_a_core

    lines, camera = str(args.driving) == "-", args.driving is not None and args.driving.is_char_device()
    if camera:
        leave_a_core()  # To the process that finds faces; before anything numerical is imported.

    from geodiff4d.avatar.compact import open_avatar
    from geodiff4d.avatar.drive import own_performance
    from geodiff4d.avatar.stream import read_stream, require_names
    from geodiff4d.cli._driving import performance
    from geodiff4d.core.errors import UserError
    from geodiff4d.tracking.live import track_source
    from geodiff4d.viewer.face_tracker import packed_tracker
    from geodiff4d.viewer.live import Feed, newest
    from geodiff4d.viewer.live_renderer import LiveRenderer
    from geodiff4d.viewer.scene import obstacle
    from geodiff4d.viewer.server import Server

    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}: expected 0 to 65535")
    if not 64 <= args.size <= 2048:
        raise UserError(f"--size is {args.size}: expected 64 to 2048")
    avatar = open_avatar(args.avatar)
    names = avatar.head.expression_names
    if lines:
        require_names(names, "standard input")
    show = own_performance(avatar) if lines or camera else performance(avatar, args)
    failures: list[UserError] = []

    def follow() -> None:
        try:
            if args.driving is not None and camera:
                source.follow(frame.params for frame in track_source(args.driving, avatar.head, images=False))
            else:
                source.follow(newest(read_stream(sys.stdin, names, "standard input")))
        except UserError as error:
            failures.append(error)
            server.shutdown()

    if obstacle(avatar) is None:
        tracker = None if args.face_landmarker is None else packed_tracker(*args.face_landmarker)
        made = Feed(avatar, show, args.avatar.stem, lines or camera, tracker)
    else:
        made = LiveRenderer(avatar, show, args.size)
    with made as source, Server(source, args.host, args.port) as server:
        print(f"{server.link(args.host)} shows {args.avatar}; Ctrl-C ends it", flush=True)
        if lines or camera:
            threading.Thread(target=follow, daemon=True).start()
        if args.seconds is not None:
            timer = threading.Timer(args.seconds, server.shutdown)
            timer.daemon = True
            timer.start()
        try:
            server.serve_forever(0.2)
        except KeyboardInterrupt:
            print()
    if failures:
        raise failures[0]
