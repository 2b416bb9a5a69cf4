"""The studio's web server: a page, its projects as JSON, uploads and downloads.

It is `viewer.local_server`, which answers to this machine's own names and to no other page, and asks for a token
besides: the address that is printed has it, and the browser keeps it as a cookie.
"""

import hmac
import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import replace
from http import cookies
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from geodiff4d.core.errors import UserError
from geodiff4d.core.jsontext import parse_json
from geodiff4d.studio.lanes import Lane
from geodiff4d.studio.projects import (
    CANCELLED,
    MAX_BYTES,
    MAX_PORTRAITS,
    Kind,
    Project,
    Refused,
    Store,
    asked_again,
    asked_for,
    corrected,
    gone_back,
    looked_for,
)
from geodiff4d.studio.steps import FILES, StudioConfig, forget, look_again, progress, steps_of
from geodiff4d.viewer.local_server import LocalHandler, LocalServer

WEB = Path(__file__).parent / "web"
STATIC = {
    "/": ("studio.html", "text/html; charset=utf-8"),
    "/studio.css": ("studio.css", "text/css; charset=utf-8"),
    "/correct.js": ("correct.js", "text/javascript; charset=utf-8"),
    "/camera.js": ("camera.js", "text/javascript; charset=utf-8"),
    "/studio.js": ("studio.js", "text/javascript; charset=utf-8"),
}
COOKIE = "geodiff4d-studio"
MAX_BODY = 4096
MAX_POINTS = 64
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WITHOUT_TOKEN = b"Please open the address that `geodiff4d studio` printed: it ends in a token.\n"
CHUNK = 1 << 20


class StudioServer(LocalServer):
    """Serves one store; its lanes work as long as it is open."""

    def __init__(self, folder: Path, host: str, port: int, config: StudioConfig):
        """Open the folder, then the port.

        Raises:
            UserError: another studio works in the folder, the port is taken, or the address is not this machine's.
        """
        self.store, self.config, self._stack = Store(folder), config, ExitStack()
        self._stack.callback(self.store.close)
        try:
            super().__init__(host, port, StudioHandler)
        except UserError:
            self._stack.close()
            raise
        self.looking, self.making = Lane(self.store, "look", config), Lane(self.store, "make", config)
        for lane in (self.looking, self.making):
            self._stack.enter_context(lane)

    def server_close(self) -> None:
        """Close the port, stop the work, which the next server goes on with, and leave the folder."""
        super().server_close()
        self._stack.close()

    def cancel(self, name: str) -> None:
        """Stop a project's work, whoever does it."""
        for lane in (self.looking, self.making):
            lane.cancel(name)

    def state(self) -> dict[str, Any]:
        """Return all that the page shows, for JSON."""
        queue = [p.name for p in self.making.queued()]
        return {
            "projects": [self._shown(p, queue) for p in self.store.all()],
            "limits": {"portraits": MAX_PORTRAITS, "bytes": MAX_BYTES},
        }

    def _shown(self, project: Project, queue: list[str]) -> dict[str, Any]:
        place = self.store.place(project.name)
        shown = {
            k: getattr(project, k) for k in ("name", "title", "stage", "problem", "portraits", "driver", "consent")
        }
        shown |= {"seconds": project.seconds, "cancelled": project.problem == CANCELLED}
        shown["files"] = [key for key, (path, *_) in FILES.items() if (place / path).is_file()]
        if project.waiting:
            shown["progress"] = progress(steps_of(project, place, self.config), place)
            shown["ahead"] = queue.index(project.name) if project.name in queue else 0
        if project.stage == "check":
            shown |= _found(place)
        return shown


class StudioHandler(LocalHandler):
    """Handles the requests of the studio's page."""

    server: StudioServer
    protocol_version = "HTTP/1.1"

    def known(self) -> bool:
        """Return whether a request comes from our page and brings the token; answer 403 if not."""
        if not self.welcome():
            self.close_connection = True
            return False
        token = self.server.store.token
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        try:
            kept = cookies.SimpleCookie(self.headers.get("Cookie", ""))[COOKIE].value
        except (cookies.CookieError, KeyError):
            kept = ""
        if any(hmac.compare_digest(token.encode(), one.encode()) for one in (given, kept)):
            return True
        self.close_connection = True
        self.send("text/plain; charset=utf-8", WITHOUT_TOKEN, 403)
        return False

    def do_GET(self) -> None:
        if not self.known():
            return
        path = urlsplit(self.path).path
        if path in STATIC:
            name, kind = STATIC[path]
            keep = f"{COOKIE}={self.server.store.token}; Path=/; HttpOnly; SameSite=Strict"
            # A link's token moves to the cookie; the page takes it out of the address.
            self.send(kind, (WEB / name).read_bytes(), Content_Security_Policy=POLICY, Set_Cookie=keep)
        elif path == "/state":
            self.answer(self.server.state())
        elif match := re.fullmatch(r"/projects/([0-9a-f]{12})/files/(\w+)", path):
            self._file(*match.groups())
        elif match := re.fullmatch(r"/projects/([0-9a-f]{12})/log", path):
            self._log(match[1])
        else:
            self.refuse(Refused("there is no such page", 404))

    def do_PUT(self) -> None:
        if not self.known():
            return
        match = re.fullmatch(
            r"/projects/([0-9a-f]{12})/(portraits|driver|mask)/([^/]{1,300})", urlsplit(self.path).path
        )
        length = self.headers.get("Content-Length", "")
        # Whatever is refused has a body that nobody reads: the connection ends with it.
        self.close_connection = True
        try:
            if not match:
                raise Refused("there is no such place", 404)
            if not length.isdigit():
                raise Refused("expected a file with a length", 411)
            kind = cast(Kind, match[2])
            project = self.server.store.upload(match[1], kind, unquote(match[3]), self.rfile.read, int(length))
        except Refused as error:
            self.refuse(error)
        except OSError:
            pass  # the browser left, or the disk is full: nothing was kept
        else:
            self.close_connection = False
            self.answer({"name": project.name, "portraits": project.portraits, "driver": project.driver})

    def do_POST(self) -> None:
        if not self.known():
            return
        length, path = self.headers.get("Content-Length", ""), urlsplit(self.path).path
        self.close_connection = True
        try:
            if self.headers.get_content_type() != "application/json":
                raise Refused("expected JSON", 415)
            if not length.isdigit() or int(length) > MAX_BODY:
                raise Refused("expected a short request", 413)
            asked = parse_json(self.rfile.read(int(length)) or b"{}")
            if not isinstance(asked, dict):
                raise Refused("expected an object", 400)
            self.close_connection = False
            if path == "/projects":
                self.answer({"name": self.server.store.new().name})
            elif match := re.fullmatch(r"/projects/([0-9a-f]{12})/(\w+)", path):
                self._act(match[1], match[2], asked)
                self.answer({})
            else:
                raise Refused("there is no such request", 404)
        except Refused as error:
            self.refuse(error)
        except ValueError:
            self.refuse(Refused("expected JSON", 400))

    def _act(self, name: str, what: str, asked: dict[str, Any]) -> None:
        """Do what a button asks for.

        Raises:
            Refused: it is no request, or it does not fit the project.
        """
        store = self.server.store
        if what == "look":
            store.change(name, looked_for)
        elif what == "make":
            store.change(name, lambda p: asked_for(p, asked.get("consent"), asked.get("driver") is True))
        elif what == "correct":
            points = checked_points(asked.get("points"))

            def again(project: Project) -> Project:
                changed = corrected(project, bool(points))
                look_again(store.place(name), points)
                return changed

            store.change(name, again)
        elif what == "again":
            store.change(name, asked_again)
        elif what == "cancel":
            store.change(name, lambda p: replace(p, problem=CANCELLED) if p.waiting else p)
            self.server.cancel(name)
        elif what == "back":
            project = store.change(name, gone_back)
            forget(store.place(name), look=project.stage == "portrait")
        elif what == "delete":
            # In this order, or its next step is begun once it has been stopped.
            store.delete(name)
            self.server.cancel(name)
        else:
            raise Refused("there is no such request", 404)

    def _file(self, name: str, key: str) -> None:
        """Send one of a project's files, as a download if asked for."""
        try:
            project = self.server.store.get(name)
            path, kind, ending = FILES[key]
            file = (self.server.store.place(name) / path).open("rb")
        except (Refused, KeyError, OSError):
            self.refuse(Refused("there is no such file", 404))
            return
        with file:
            size = file.seek(0, 2)
            file.seek(0)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(size))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if "download" in parse_qs(urlsplit(self.path).query, keep_blank_values=True):
                saved = quote(f"{project.title}{ending}")
                self.send_header("Content-Disposition", f"attachment; filename*=UTF-8''{saved}")
            self.end_headers()
            shutil.copyfileobj(file, self.wfile, CHUNK)

    def _log(self, name: str) -> None:
        """Send what a project's commands printed."""
        logs = sorted(self.server.store.place(name).glob("*/log.txt"), key=lambda p: p.stat().st_mtime)
        text = "\n".join(f"== {p.parent.name}\n{p.read_text(errors='replace')[-20_000:]}" for p in logs)
        self.send("text/plain; charset=utf-8", text.encode())

    def answer(self, value: Any, status: int = 200) -> None:
        """Answer with JSON."""
        self.send("application/json", json.dumps(value).encode(), status)

    def refuse(self, error: Refused) -> None:
        """Answer with what is wrong, as JSON."""
        self.answer({"error": str(error)}, error.status)


def checked_points(given: Any) -> dict[str, list[float]]:
    """Return a user's points by name, as a command will read them.

    Raises:
        Refused: they are no such thing.
    """
    if given is None:
        return {}
    wrong = Refused("expected points by name, each of two numbers", 400)
    if not isinstance(given, dict) or len(given) > MAX_POINTS:
        raise wrong
    for name, place in given.items():
        if len(name) > 40 or not isinstance(place, list) or len(place) != 2:
            raise wrong
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in place):
            raise wrong
    return given


def _found(place: Path) -> dict[str, Any]:
    """Return what the tracker noted about the portraits, and of a single one what a user can correct."""
    try:
        extra = parse_json((place / "portrait" / "out" / "transforms.json").read_text())["geodiff4d"]["extra"]
        out: dict[str, Any] = {"notes": [str(note) for note in extra["notes"]]}
        if isinstance(extra.get("points"), dict):
            out["found"] = {"points": extra["points"], "crop": extra["crop"], "size": extra["source_size"]}
        return out
    except (OSError, ValueError, KeyError, TypeError):
        return {"notes": []}
