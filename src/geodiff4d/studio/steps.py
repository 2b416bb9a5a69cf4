"""The steps from a portrait to an avatar: commands of this program, each in a process of its own, and how far they are.

A step that is done is known to be (`launch.jobs`), so that whatever was cancelled or killed goes on where it was.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from geodiff4d.core.files import write_json
from geodiff4d.launch.jobs import OUT, Job
from geodiff4d.studio.projects import Project

DRIVER_FRAMES = 240
"""At most so many frames of a driver's video are tracked."""
TAIL_BYTES = 4096
LINE = re.compile(r"^(.*): (\d+)/(\d+) in \d+ s$", re.M)
"""What `cli.progress` prints away from a terminal."""
TOUR = "tour.jsonl"
POINTS = "uploads/points.json"
"""Where a user says that points of the face are."""


@dataclass(frozen=True)
class StudioConfig:
    """How avatars are made."""

    preset: Literal["debug", "embedded"] = "embedded"
    generator: Literal["diffusion", "warp"] = "diffusion"
    size: int | None = None
    """Side of the generated frames [px]; by default the model's."""


@dataclass(frozen=True)
class Step:
    """One command of a project."""

    job: Job
    says: str
    """What it does, for the user."""
    weight: float
    """Seconds that it takes on two idle cores at the default preset, about: shares of a bar of progress."""
    limit_s: float = 4 * 3600.0
    """Seconds after which it is stopped."""
    keeps: bool = False
    """Whether a run that was interrupted left something to go on with."""


def _sized(config: StudioConfig) -> tuple[str, ...]:
    return () if config.size is None else ("--size", str(config.size))


def looking(project: Project, place: Path, config: StudioConfig) -> list[Step]:
    """Return the steps that find the face in the portraits."""
    files = [str(place / "uploads" / "portraits" / name) for name in project.portraits]
    one = len(files) == 1 and not files[0].lower().endswith((".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"))
    own = ("--mask", str(place / "uploads" / "mask" / project.mask)) if project.mask else ()
    told = ("--points", str(place / POINTS)) if project.points else ()
    how = (*(() if one else ("--portrait",)), *_sized(config), *own, *told)
    job = Job("portrait", ("track", *files, *how, "--out", OUT))
    return [Step(job, "Looking for the face", 12, limit_s=900)]


def making(project: Project, place: Path, config: StudioConfig) -> list[Step]:
    """Return the steps from a tracked portrait to an avatar and its files."""
    portrait, driver, avatar = (str(place / step / "out") for step in ("portrait", "driver", "avatar"))
    steps, drives, shows = [], (), ("--driving", str(place / TOUR))
    if project.driver:
        source = str(place / "uploads" / "driver" / project.driver)
        limit = ("--limit", str(DRIVER_FRAMES if config.preset != "debug" else 4))
        words = ("track", source, *limit, "--out", OUT)
        steps.append(Step(Job("driver", words), "Watching who drives", 60, limit_s=3600))
        drives = shows = ("--driving", driver)
    preset = ("--preset", config.preset)
    how = (*preset, "--generator", config.generator, *_sized(config))
    # Without networks, which the page cannot run.
    plain = ("--ablate", "remesh", "deformation", "dynamics") if config.preset == "debug" else ()
    said = ("--consent", str(project.consent))
    title = ("--title", project.title)
    return [
        *steps,
        Step(Job("clip", ("synthesize", "--portrait", portrait, *drives, *how, *said, "--out", OUT)),
             "Imagining the face from all sides", 100),
        Step(Job("avatar", ("fit", str(place / "clip" / "out"), *preset, *plain, "--out", OUT)),
             "Fitting the avatar", 130, keeps=True),
        Step(Job("page", ("export", avatar, f"{OUT}/avatar.html", *title, *shows)), "Writing its page", 8),
        Step(Job("glb", ("export", avatar, f"{OUT}/avatar.glb")), "Writing glTF", 8),
        Step(Job("ply", ("export", avatar, f"{OUT}/avatar.ply", "--set", "jawOpen=0")), "Writing splats", 8),
        Step(Job("video", ("render", avatar, *shows, "--out", f"{OUT}/avatar.mp4")), "Rendering a video", 25),
    ]  # fmt: skip


def steps_of(project: Project, place: Path, config: StudioConfig) -> list[Step]:
    """Return what is to be done at a project's stage."""
    return making(project, place, config) if project.stage == "make" else looking(project, place, config)


def look_again(place: Path, points: dict[str, Any]) -> None:
    """Write down what a user corrected, and remove what was found without it."""
    if points:
        write_json(place / POINTS, points)
    shutil.rmtree(place / "portrait", ignore_errors=True)


def forget(place: Path, look: bool) -> None:
    """Remove what was made of a portrait that stays; with `look`, the portrait too."""
    kept = set() if look else {"uploads", "portrait"}
    for folder in (p for p in place.iterdir() if p.is_dir() and p.name not in kept):
        shutil.rmtree(folder, ignore_errors=True)


FILES: dict[str, tuple[str, str, str]] = {
    # key: (path below the project's folder, type, ending of the name that it is saved under)
    "overlay": ("portrait/out/overlay.png", "image/png", ".png"),
    "cutout": ("portrait/out/fg_masks/00000_00.png", "image/png", ".png"),
    "poster": ("portrait/out/reference.png", "image/png", ".png"),
    "page": ("page/out/avatar.html", "text/html; charset=utf-8", ".html"),
    "glb": ("glb/out/avatar.glb", "model/gltf-binary", ".glb"),
    "ply": ("ply/out/avatar.ply", "application/octet-stream", ".ply"),
    "video": ("video/out/avatar.mp4", "video/mp4", ".mp4"),
}
"""What the page shows and offers."""


def progress(steps: Sequence[Step], place: Path) -> dict[str, Any]:
    """Return how far a project is: `share` of the whole (0 to 1), and each step's words and state, for JSON."""
    whole = sum(step.weight for step in steps)
    done, share, shown, running = 0.0, 0.0, [], False
    for step in steps:
        state, detail = "waiting", ""
        if not running and step.job.done(place):
            state, done = "done", done + step.weight
        elif not running:
            # The first that is not done is the one that runs; its last line says how far it is.
            state, running = "running", True
            part, detail = _part(place / step.job.name / "log.txt")
            share = part * step.weight
        shown.append({"says": step.says, "state": state, "detail": detail})
    return {"share": (done + share) / whole, "steps": shown}


def _part(log: Path) -> tuple[float, str]:
    """Return the share that a step's log tells of, and its words."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return 0.0, ""
    found = LINE.findall(text)
    if not found:
        return 0.0, ""
    what, done, total = found[-1]
    return min(1.0, int(done) / max(1, int(total))), f"{what}: {done} of {total}"
