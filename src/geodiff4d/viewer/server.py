"""The viewer's web server, in two kinds.

An avatar that a browser can draw is served as its page (`viewer.page`), with live poses as server-sent events. For
others there is a page with a stream of images (MJPEG) and an endpoint that sets the view.
"""

import json
import math
from pathlib import Path
from typing import Any

from geodiff4d.core.jsontext import parse_json
from geodiff4d.viewer.live import Feed
from geodiff4d.viewer.live_renderer import MAX_PITCH_DEG, ZOOM, LiveRenderer, View
from geodiff4d.viewer.local_server import LocalHandler, LocalServer

PAGE = Path(__file__).parents[1] / "assets" / "viewer.html"
MAX_BODY = 16 * 1024
BOUNDARY = "image"
AGAIN_SECONDS, KEEP_SECONDS = 0.2, 5.0
"""Seconds after which a still image is sent again: first soon, so that browsers show it, then as a keep-alive."""
FIRST_SECONDS = 120.0
"""Timeout of the first image, which waits for the rasteriser to be compiled."""


class Server(LocalServer):
    """HTTP server of one avatar: of a feed, or of a renderer."""

    def __init__(self, source: LiveRenderer | Feed, host: str, port: int):
        """Open the port.

        Raises:
            UserError: it is taken, or the address is not this machine's.
        """
        self.source = source
        super().__init__(host, port, FeedHandler if isinstance(source, Feed) else RendererHandler)

    def service_actions(self) -> None:
        """Raise the source's failure, if it has one, which ends `serve_forever`."""
        if self.source.failure is not None:
            raise self.source.failure


class Handler(LocalHandler):
    """Handles requests to a server of one avatar."""

    server: Server


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


class RendererHandler(Handler):
    """Handles the requests of the page that shows rendered images."""

    @property
    def renderer(self) -> LiveRenderer:
        assert isinstance(self.server.source, LiveRenderer)
        return self.server.source

    def do_GET(self) -> None:
        if not self.welcome():
            return
        renderer = self.renderer
        path = self.path.partition("?")[0]
        if path == "/":
            self.send("text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/about":
            self.send("application/json", json.dumps(about(renderer)).encode())
        elif path == "/image.jpg":
            self.send("image/jpeg", renderer.wait(0, FIRST_SECONDS)[0])
        elif path == "/stream":
            self._stream(renderer)
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
                self.renderer.show(view_from(parse_json(self.rfile.read(int(length))), self.renderer))
            except (ValueError, TypeError, AttributeError, OverflowError) as error:
                self.send_error(400, " ".join(str(error).split())[:100])
            else:
                self.send_response(204)
                self.end_headers()

    def _stream(self, renderer: LiveRenderer) -> None:
        self.begin(f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        # Browsers show an image when the next one begins: the last of a row is sent twice.
        edge, seen, again = f"\r\n--{BOUNDARY}\r\n".encode(), 0, 0
        self.wfile.write(edge[2:])
        while not renderer.stopped:
            last = seen
            image, seen = renderer.wait(seen, AGAIN_SECONDS if again == 0 else KEEP_SECONDS)
            again = again + 1 if seen == last else 0
            if not image:
                continue
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
            self.wfile.write(head.encode() + image + edge)


def about(renderer: LiveRenderer) -> dict[str, Any]:
    """Return what the page needs: sliders, sizes and the state, for JSON."""
    low, high = renderer.range
    return {
        "sliders": list(renderer.sliders), "low": low, "high": high, "frames": len(renderer.performance),
        "width": renderer.camera.width, "height": renderer.camera.height, "gaussians": len(renderer.avatar.local),
        "rate": round(renderer.rate, 1), "play": renderer.view.play,
    }  # fmt: skip


def view_from(value: Any, renderer: LiveRenderer) -> View:
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
        if name not in renderer.sliders:
            raise ValueError(f"no expression {name[:40]!r}")
        expressions[name] = number(weight, *renderer.range)
    return View(
        yaw_deg=number(value.get("yaw", 0), -1e6, 1e6),
        pitch_deg=number(value.get("pitch", 0), -MAX_PITCH_DEG, MAX_PITCH_DEG),
        zoom=number(value.get("zoom", 1), *ZOOM),
        expressions=expressions,
        play=bool(value.get("play", False)),
        normals=bool(value.get("normals", False)),
    )
