"""Make avatars in the browser: drop a portrait, check what was found, get the avatar."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d studio`; it runs until Ctrl-C, and goes on where it was when it is started again."""

    out: Path = Path("runs/studio")
    """Folder for portraits, avatars and their state."""
    port: int = 8090
    """Port to listen on; 0 takes any free one."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; the address that is printed has a token."""
    preset: Literal["debug", "embedded"] = "embedded"
    """debug: seconds, tiny images. embedded: a few minutes on two cores."""
    generator: Literal["diffusion", "warp"] = "diffusion"
    """diffusion: the video model. warp: the portrait's texture on the head, without a model."""
    size: int | None = None
    """Side of the generated frames [px]; by default the model's."""
    browser: bool = True
    """Open the page in a browser."""
    seconds: float | None = None
    """Stop after this many seconds."""


def run(args: Args) -> None:
    import signal
    import threading
    import webbrowser

    from geodiff4d.core.errors import UserError
    from geodiff4d.studio.server import StudioServer
    from geodiff4d.studio.steps import StudioConfig

    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}: expected 0 to 65535")
    config = StudioConfig(args.preset, args.generator, args.size)
    with StudioServer(args.out.resolve(), args.host, args.port, config) as server:
        link = f"{server.link(args.host)}?token={server.store.token}"
        print(f"open {link}\n{args.out} keeps everything; Ctrl-C ends it", flush=True)
        if args.browser:
            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()
        if args.seconds is not None:
            timer = threading.Timer(args.seconds, server.shutdown)
            timer.daemon = True
            timer.start()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        try:
            server.serve_forever(0.2)
        except KeyboardInterrupt:
            print()
