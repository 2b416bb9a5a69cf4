"""Projects: what somebody asked for, and how far it is, in files that outlive the server.

A project is a folder with `project.json`, written whole at every change, `uploads/`, and a folder for each step
(`launch.jobs`). Whatever is killed, the next server reads the same projects and goes on with them.
"""

import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_config, write_json

Stage = Literal["portrait", "look", "check", "make", "done"]
"""portrait: waits for files. look: the face is looked for. check: waits for the user's word. make: the avatar is in the
making."""
Consent = Literal["self", "permitted"]
Kind = Literal["portraits", "driver", "mask"]

MAX_BYTES: dict[Kind, int] = {"portraits": 40_000_000, "driver": 500_000_000, "mask": 40_000_000}
"""Largest upload [bytes]."""
MAX_PORTRAITS = 8
MAX_PROJECTS = 200
SPARE_BYTES = 1_000_000_000
"""What an upload must leave free on the disk."""
CANCELLED = "cancelled"
NAME = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Project:
    """One avatar on its way."""

    name: str
    """Of its folder: twelve hexadecimal digits."""
    title: str = "Avatar"
    stage: Stage = "portrait"
    problem: str = ""
    """Why the stage stands still: what went wrong, or `CANCELLED`."""
    portraits: tuple[str, ...] = ()
    """File names below uploads/portraits."""
    driver: str = ""
    """File name below uploads/driver, of a video that drives; without it the range of motion does."""
    mask: str = ""
    """File name below uploads/mask, of the user's own cut-out."""
    points: bool = False
    """Whether the user says where the face is, in uploads/points.json."""
    consent: Consent | None = None
    created: float = field(default_factory=time.time)
    asked: float = 0.0
    """Unix time of the last request: who asked first is served first."""
    seconds: float = 0.0
    """Time that making took."""

    @property
    def waiting(self) -> bool:
        """Whether something is to be done by the machine."""
        return self.stage in ("look", "make") and not self.problem


class Refused(UserError):
    """A request that does not fit a project; `status` is HTTP's word for it."""

    def __init__(self, message: str, status: int = 409):
        super().__init__(message)
        self.status = status


class Store:
    """All projects below one folder, for one process at a time."""

    def __init__(self, folder: Path):
        """Read what is there.

        Raises:
            UserError: another studio works there, or a project's file is damaged.
        """
        self.folder = folder
        (folder / "projects").mkdir(parents=True, exist_ok=True)
        self._lock_file = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise UserError(f"another studio works in {folder}: close it, or give --out another folder") from None
        self.changed = threading.Condition(threading.RLock())
        try:
            self._projects = {p.name: p for p in map(_read, sorted((folder / "projects").glob("*/project.json")))}
            self.token = self._token()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock_file.close()

    def _token(self) -> str:
        """Return the secret that requests must bring; it stays, so that a page outlives the server."""
        path = self.folder / "token"
        path.touch(0o600)
        if not path.read_text().strip():  # new, or from a server that was killed right here
            path.write_text(secrets.token_urlsafe(24))
        return path.read_text().strip()

    def place(self, name: str) -> Path:
        """Return a project's folder."""
        return self.folder / "projects" / name

    def all(self) -> list[Project]:
        """Return the projects, the newest first."""
        with self.changed:
            return sorted(self._projects.values(), key=lambda p: -p.created)

    def get(self, name: str) -> Project:
        """Return a project.

        Raises:
            Refused: there is none of this name.
        """
        with self.changed:
            if name not in self._projects:
                raise Refused("there is no such project", 404)
            return self._projects[name]

    def new(self) -> Project:
        """Begin a project.

        Raises:
            Refused: there are too many.
        """
        with self.changed:
            if len(self._projects) >= MAX_PROJECTS:
                raise Refused(f"there are {MAX_PROJECTS} projects already: delete some")
            project = Project(secrets.token_hex(6))
            self.place(project.name).mkdir()
            return self._keep(project)

    def change(self, name: str, how: Callable[[Project], Project]) -> Project:
        """Replace a project by what `how` makes of it; written before anybody sees it.

        Raises:
            Refused: there is none, or `how` refuses.
        """
        with self.changed:
            return self._keep(how(self.get(name)))

    def delete(self, name: str) -> None:
        """Remove a project and all of its files."""
        with self.changed:
            self.get(name)
            del self._projects[name]
            shutil.rmtree(self.place(name), ignore_errors=True)
            self.changed.notify_all()

    def upload(self, name: str, kind: Kind, file_name: str, read: Callable[[int], bytes], length: int) -> Project:
        """Take a file of a known length; it appears whole or not at all. `read` returns at most so many bytes of it.

        Raises:
            Refused: it is too large, empty or cut short, the disk is full, or the project waits for none.
        """
        self._admit(name, kind)
        if not 0 < length <= MAX_BYTES[kind]:
            raise Refused(f"the file has {length:,} bytes: expected 1 to {MAX_BYTES[kind]:,}", 413)
        if shutil.disk_usage(self.folder).free < length + SPARE_BYTES:
            raise Refused("there is too little space on the disk", 507)
        folder = self.place(name) / "uploads" / kind
        folder.mkdir(parents=True, exist_ok=True)
        part, plain = folder / f".{secrets.token_hex(4)}.part", plain_name(file_name)
        try:
            _copy(read, part, length)
            with self.changed:
                taken = self._admit(name, kind).portraits if kind == "portraits" else ()
                free = next(n for n in (plain, *(f"{k}-{plain}" for k in range(2, 99))) if n not in taken)
                os.replace(part, folder / free)
                return self.change(name, lambda project: _with_file(project, kind, free))
        finally:
            part.unlink(missing_ok=True)

    def _admit(self, name: str, kind: Kind) -> Project:
        """Return the project if it waits for such a file."""
        project = self.get(name)
        if project.stage != ("portrait" if kind == "portraits" else "check"):
            raise Refused("this project waits for no such file")
        if kind == "portraits" and len(project.portraits) >= MAX_PORTRAITS:
            raise Refused(f"there are {MAX_PORTRAITS} portraits already", 413)
        return project

    def _keep(self, project: Project) -> Project:
        write_json(self.place(project.name) / "project.json", asdict(project))
        self._projects[project.name] = project
        self.changed.notify_all()
        return project


def plain_name(given: str) -> str:
    """Return a file name that is harmless: letters, digits, `_`, `-` and `.`, no dot in front, at most 80 of them."""
    stem = re.sub(r"[^\w.\-]+", "_", given.replace("\\", "/").rpartition("/")[2], flags=re.ASCII).lstrip(".-_")
    head, dot, suffix = stem.rpartition(".")
    return f"{head[:72]}.{suffix[:7]}" if dot and head else stem[:80] or "file"


def looked_for(project: Project) -> Project:
    """Ask for the face to be looked for.

    Raises:
        Refused: there is no portrait, or it is not the time.
    """
    if project.stage != "portrait" or not project.portraits:
        raise Refused("expected a portrait first")
    return replace(project, stage="look", problem="", asked=time.time())


def asked_for(project: Project, consent: Any, driver: bool) -> Project:
    """Ask for the avatar to be made: consent is given, and the video drives or the range of motion does.

    Raises:
        Refused: consent is missing, or it is not the time.
    """
    if project.stage != "check":
        raise Refused("expected a portrait in which the face was found")
    if consent not in get_args(Consent):
        raise Refused("expected consent: self, or permitted", 400)
    if driver and not project.driver:
        raise Refused("expected a video first")
    return replace(
        project, stage="make", problem="", consent=consent, driver=project.driver if driver else "", asked=time.time()
    )


def corrected(project: Project, points: bool) -> Project:
    """Look for the face anew, with what the user corrected.

    Raises:
        Refused: it is not the time, there are several portraits, or nothing was corrected.
    """
    if project.stage != "check" or len(project.portraits) != 1:
        raise Refused("expected one portrait in which the face was found")
    if not points and not project.mask:
        raise Refused("expected points, or a cut-out", 400)
    return replace(project, stage="look", problem="", points=points or project.points, asked=time.time())


def asked_again(project: Project) -> Project:
    """Go on with what stood still.

    Raises:
        Refused: nothing does.
    """
    if not project.problem:
        raise Refused("nothing stands still")
    return replace(project, problem="", asked=time.time())


def gone_back(project: Project) -> Project:
    """Go back to the choice before: of the driver, or of the portrait (the caller removes the files).

    Raises:
        Refused: it is not the time.
    """
    if project.waiting or project.stage in ("portrait", "done"):
        raise Refused("expected a project that stands still, or waits for your word")
    if project.stage == "make":
        return replace(project, stage="check", problem="", driver="")
    return replace(project, stage="portrait", problem="", portraits=(), title="Avatar", mask="", points=False)


def _with_file(project: Project, kind: Kind, name: str) -> Project:
    if kind == "driver":
        return replace(project, driver=name)
    if kind == "mask":
        return replace(project, mask=name)
    title = project.title if project.portraits else Path(name).stem.replace("_", " ")
    return replace(project, portraits=(*project.portraits, name), title=title)


def _copy(read: Callable[[int], bytes], target: Path, length: int) -> None:
    left = length
    with target.open("xb") as file:
        while left:
            part = read(min(left, 1 << 20))
            if not part:
                raise Refused("the file was cut short on its way", 400)
            file.write(part)
            left -= len(part)


def _read(path: Path) -> Project:
    project = read_config(path, Project)
    if project.name != path.parent.name or project.stage not in get_args(Stage) or not NAME.fullmatch(project.name):
        raise UserError(f"{path} is damaged: remove its folder")
    return project
