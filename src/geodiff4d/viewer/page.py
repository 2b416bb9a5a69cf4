"""One self-contained page for one avatar: the files below `web/`, the avatar's numbers, and nothing from elsewhere.

A page's own files stay readable apart: markup, a style sheet, scripts, shaders. They are put into one file as they
are, scripts one after the other in one scope (`SCRIPTS` is their order). Its content security policy forbids every
request, so that what is opened from a disk also stays there.
"""

import base64
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from geodiff4d.avatar.drive import Performance
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file
from geodiff4d.viewer.scene import pack

WEB = Path(__file__).parent / "web"
SCRIPTS = (
    "scene.js", "rig.js", "camera.js", "sorter.js", "renderer.js", "motions.js", "performance.js", "stage.js",
    "layout.js", "webcam.js", "panel.js", "remote.js", "main.js",
)  # fmt: skip
SHADERS = ("splat.vert", "splat.frag", "resolve.vert", "resolve.frag")
WORKER = "sort_worker.js"
ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\-]+(:\d+)?|https?://\[[0-9A-Fa-f:]+\](:\d+)?")
NOTHING = "'none'"


@dataclass(frozen=True)
class PageConfig:
    """What a page says and whom it listens to."""

    title: str = "geodiff4d"
    """The page's title."""
    origins: tuple[str, ...] = ()
    """Origins whose pages may drive this one by messages, beside its own; `*` is every page."""
    live: bool = False
    """Whether the page asks its own server for live poses (`geodiff4d view`)."""
    play: bool = False
    """Whether the performance plays from the start."""
    tracker: Mapping[str, str] | None = None
    """MediaPipe's files (`face_tracker.packed_tracker`), by which a webcam drives the head."""

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not ORIGIN.fullmatch(origin):
                raise UserError(
                    f"{origin!r} is no origin: expected a scheme and a host, such as https://example.org, or * for all"
                )


def page(avatar: Avatar, performance: Performance, config: PageConfig = PageConfig()) -> str:
    """Return the page of an avatar with a performance to play, as HTML.

    Raises:
        UserError: the avatar has networks or another head, which the page cannot draw.
    """
    data = base64.b64encode(pack(avatar, performance)).decode()
    settings = {"origins": list(config.origins), "live": config.live, "play": config.play}
    scripts = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    shaders = {name: (WEB / f"{name}.glsl").read_text(encoding="utf-8") for name in SHADERS}
    asked = {
        "TITLE": html.escape(config.title),
        "CONNECT": _connects(config),
        # WebAssembly counts as evaluation.
        "EVALUATE": " 'wasm-unsafe-eval'" if config.tracker else "",
        "STYLE": (WEB / "page.css").read_text(encoding="utf-8"),
        "SETTINGS": _script_json(settings),
        "SHADERS": _script_json(shaders),
        "WORKER": _script_json((WEB / WORKER).read_text(encoding="utf-8")),
        "TRACKER": _script_json(config.tracker),
        "AVATAR": data,
        "SCRIPTS": scripts,
    }
    text = (WEB / "page.html").read_text(encoding="utf-8")
    # In one pass, so that nothing inside a part is taken for a place of another.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: asked[place[1]], text)


def write_page(avatar: Avatar, performance: Performance, path: Path, config: PageConfig = PageConfig()) -> int:
    """Write an avatar's page, whole or not at all; returns its size [bytes].

    Raises:
        UserError: as `page`.
    """
    text = page(avatar, performance, config).encode()
    with fresh_file(path) as temporary:
        temporary.write_bytes(text)
    return len(text)


def _connects(config: PageConfig) -> str:
    """Return what the page's scripts may fetch: its own server's poses, and the parts of a tracker that it carries."""
    asked = [word for word, wanted in (("'self'", config.live), ("blob:", config.tracker)) if wanted]
    return " ".join(asked) or NOTHING


def _script_json(value: object) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    return json.dumps(value).replace("<", "\\u003c")
