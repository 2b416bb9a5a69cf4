"""A small web server for the viewer, in two kinds.

An avatar that a browser can draw is served as its page (`viewer.page`), with live poses as server-sent events. For
others there is a page with a stream of images (MJPEG) and an endpoint that sets the view.

It binds to this machine alone unless told otherwise, and answers only to its own names, so that no web page elsewhere
can reach it through a browser (DNS rebinding, cross-site requests).
"""

import ipaddress
import json
import math
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from geodiff4d.core.errors import UserError
from geodiff4d.viewer.live import Feed
from geodiff4d.viewer.studio import MAX_PITCH_DEG, ZOOM, Studio, View

PAGE = Path(__file__).parents[1] / "assets" / "viewer.html"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 16 * 1024
BOUNDARY = "image"
AGAIN_SECONDS, KEEP_SECONDS = 0.2, 5.0
"""Seconds after which a still image is sent again: first soon, so that browsers show it, then as a keep-alive."""
FIRST_SECONDS = 120.0
"""Timeout of the first image, which waits for the rasteriser to be compiled."""


class Server(ThreadingHTTPServer):
    """HTTP server of one avatar: of a feed, or of a studio."""

    daemon_threads = True

    def __init__(self, source: Studio | Feed, host: str, port: int):
        """Open the port.

        Raises:
            UserError: it is taken, or the address is not this machine's.
        """
        self.source = source
        self.local = host in LOOPBACK
        self.names = {*LOOPBACK, host.lower()} | (set() if self.local else own_names())
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), FeedHandler if isinstance(source, Feed) else StudioHandler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --port or --host") from None

    def link(self, host: str) -> str:
        """Return the address that a browser opens; of a server that listens on all of them, this machine's own."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
        name = everywhere.get(host, host)
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}/"

    def service_actions(self) -> None:
        """Raise the source's failure, if it has one, which ends `serve_forever`."""
        if self.source.failure is not None:
            raise self.source.failure

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: a browser that disconnects during an image is no error."""


class Handler(BaseHTTPRequestHandler):
    """What both kinds have in common: who is answered, and how."""

    server: Server
    timeout = 60

    def welcome(self) -> bool:
        """Return whether a request was meant for this server and sent by its own page; answer 403 if not."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        name = (host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host).strip("[]").lower()
        # No page elsewhere can make a browser send a bare address as Host, only a name of its own.
        known = name in self.server.names or (not self.server.local and is_address(name))
        if known and origin in (None, f"http://{host}"):
            return True
        self.send_error(403)
        return False

    def send(self, kind: str, data: bytes) -> None:
        """Answer with a whole document."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def begin(self, kind: str) -> None:
        """Begin an answer that goes on until one side leaves."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Print nothing."""


class FeedHandler(Handler):
    """Handles the requests of an avatar's page."""

    def do_GET(self) -> None:
        if not self.welcome():
            return
        feed = self.server.source
        assert isinstance(feed, Feed)
        path = self.path.partition("?")[0]
        if path == "/":
            self.send("text/html; charset=utf-8", feed.page)
        elif path == "/live":
            self._live(feed)
        else:
            self.send_error(404)

    def _live(self, feed: Feed) -> None:
        """Send each latest pose as an event; a comment now and then finds out who has gone."""
        self.begin("text/event-stream")
        seen = 0
        while not feed.stopped:
            last = seen
            pose, seen = feed.wait(seen, KEEP_SECONDS)
            self.wfile.write(f"data: {pose}\n\n".encode() if seen > last else b": waiting\n\n")


class StudioHandler(Handler):
    """Handles the requests of the page that shows rendered images."""

    @property
    def studio(self) -> Studio:
        assert isinstance(self.server.source, Studio)
        return self.server.source

    def do_GET(self) -> None:
        if not self.welcome():
            return
        studio = self.studio
        path = self.path.partition("?")[0]
        if path == "/":
            self.send("text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/about":
            self.send("application/json", json.dumps(about(studio)).encode())
        elif path == "/image.jpg":
            self.send("image/jpeg", studio.wait(0, FIRST_SECONDS)[0])
        elif path == "/stream":
            self._stream(studio)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        if not self.welcome():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/view" or self.headers.get_content_type() != "application/json":
            self.send_error(404 if self.path != "/view" else 415)
        elif not length.isdigit() or int(length) > MAX_BODY:
            self.send_error(413)
        else:
            try:
                self.studio.show(view_from(json.loads(self.rfile.read(int(length))), self.studio))
            except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
                self.send_error(400, " ".join(str(error).split())[:100])
            else:
                self.send_response(204)
                self.end_headers()

    def _stream(self, studio: Studio) -> None:
        self.begin(f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        # Browsers show an image when the next one begins: the last of a row is sent twice.
        edge, seen, again = f"\r\n--{BOUNDARY}\r\n".encode(), 0, 0
        self.wfile.write(edge[2:])
        while not studio.stopped:
            last = seen
            image, seen = studio.wait(seen, AGAIN_SECONDS if again == 0 else KEEP_SECONDS)
            again = again + 1 if seen == last else 0
            if not image:
                continue
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
            self.wfile.write(head.encode() + image + edge)


def own_names() -> set[str]:
    """Return this machine's host names, also with `.local`, as phones on the same network use."""
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"}


def is_address(name: str) -> bool:
    """Return whether a host is an IP address and not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def about(studio: Studio) -> dict[str, Any]:
    """Return what the page needs: sliders, sizes and the state, for JSON."""
    low, high = studio.range
    return {
        "sliders": list(studio.sliders), "low": low, "high": high, "frames": len(studio.performance),
        "width": studio.camera.width, "height": studio.camera.height, "gaussians": len(studio.avatar.local),
        "rate": round(studio.rate, 1), "play": studio.view.play,
    }  # fmt: skip


def view_from(value: Any, studio: Studio) -> View:
    """Return the view that a page sent, with all values clamped to their limits.

    Raises:
        ValueError: a value is not a finite number, or an expression is unknown.
    """

    def number(item: Any, low: float, high: float) -> float:
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            raise ValueError(f"expected a number, got {str(item)[:40]}")
        return min(max(float(item), low), high)

    expressions = {}
    for name, weight in value.get("expressions", {}).items():
        if name not in studio.sliders:
            raise ValueError(f"no expression {name[:40]!r}")
        expressions[name] = number(weight, *studio.range)
    return View(
        yaw_deg=number(value.get("yaw", 0), -1e6, 1e6),
        pitch_deg=number(value.get("pitch", 0), -MAX_PITCH_DEG, MAX_PITCH_DEG),
        zoom=number(value.get("zoom", 1), *ZOOM),
        expressions=expressions,
        play=bool(value.get("play", False)),
        normals=bool(value.get("normals", False)),
    )
