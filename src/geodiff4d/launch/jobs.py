"""Jobs of a fleet: commands of this program, one a line, each with a folder of its own.

A job's folder has `job.json` once the job is done, written last, by the job's own process: whatever dies, a job that is
done is known to be, and one that is not has left nothing that counts.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.jsontext import parse_json

DONE = "job.json"
OUT = "{out}"
"""In a command: the folder that it writes to."""
GRACE_SECONDS = 60.0
"""What a process that is told to stop has to finish its step and write a checkpoint."""


RESERVED = ("fleet.jsonl", "failed.json", "ray.log")
"""What a fleet itself writes beside its jobs' folders."""


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    """Of its folder."""
    command: tuple[str, ...]
    """What follows `geodiff4d`; `{out}` stands for the job's own folder OUT/NAME/out."""

    def words(self, folder: Path) -> list[str]:
        """Return the command's words for a fleet that writes to `folder`."""
        return [word.replace(OUT, str(folder / self.name / "out")) for word in self.command]

    def done(self, folder: Path) -> bool:
        """Say whether this very command has been carried out below `folder`."""
        try:
            return parse_json((folder / self.name / DONE).read_text())["job"] == fingerprint(self)
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt."""

    name: str
    code: int
    """The command's exit code; 0 is done, negative a signal's."""
    seconds: float
    said: str
    """Its last line, where it failed."""
    host: str = ""

    @property
    def repeatable(self) -> bool:
        """Whether another attempt may end otherwise: not where the input is wrong."""
        return self.code not in (0, 2)


def lost(job: Job, reason: str) -> Outcome:
    """Return what came of an attempt whose machine or process was lost."""
    return Outcome(job.name, -9, 0.0, f"the machine or process that carried it out was lost ({reason})")


def read_jobs(path: Path, commands: Sequence[str]) -> list[Job]:
    """Read a file with one JSON object a line: `{"name": "anna", "run": "track anna.jpg --out {out}"}`.

    `run` may be a list of words.

    Raises:
        UserError: a line is no job, a name stands twice or is no file name, or a command is not one of `commands`.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): expected one JSON object a line") from None
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            given = parse_json(line)
            name, run = given["name"], given["run"]
            words = shlex.split(run) if isinstance(run, str) else [str(word) for word in run]
        except (ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f'{where} is no job ({reason}): expected {{"name": "anna", "run": "track anna.jpg --out {OUT}"}}'
            ) from None
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.\-]{0,120}", name):
            raise UserError(f"{where}: {name!r} is no name for a folder: expected letters, digits, '_', '-' and '.'")
        if name in RESERVED:
            raise UserError(f"{where}: {name} is a file of the fleet's own: give the job another name")
        if name in jobs:
            raise UserError(f"{where}: the name {name!r} stands twice: every job needs one of its own")
        if not words or words[0] not in commands:
            raise UserError(f"{where}: {words[:1]} is no command of a fleet: expected one of {', '.join(commands)}")
        if not any(OUT in word for word in words):
            raise UserError(f"{where}: the command does not write to {OUT}: jobs may only write to their own folders")
        jobs[name] = Job(name, tuple(words))
    if not jobs:
        raise UserError(f"{path} has no jobs: expected one JSON object a line")
    return list(jobs.values())


def run_job(
    job: Job, folder: Path, environment: Mapping[str, str], stop: threading.Event | None = None,
    where: Path | None = None,
) -> Outcome:  # fmt: skip
    """Carry a job out in a process of its own, unless it is done, and say what came of it.

    The process ends when this one does, however that ends. Told to `stop`, it has `GRACE_SECONDS` to save what it has.
    `OUT/NAME/log.txt` has what all attempts printed.
    Relative names in a command are looked for in `where`, by default this process's folder.
    """
    started = time.monotonic()
    if job.done(folder):
        return Outcome(job.name, 0, 0.0, "")
    place = folder / job.name
    place.mkdir(parents=True, exist_ok=True)
    given = json.dumps({"words": job.words(folder), "done": str(place / DONE), "job": fingerprint(job)})
    with (place / "log.txt").open("ab") as log:
        # A session of its own: an interrupt is the driver's to handle. Its input ends when the driver does.
        child = subprocess.Popen(
            [sys.executable, "-m", "geodiff4d.launch.child", given], stdin=subprocess.PIPE, stdout=log, stderr=log,
            env=os.environ | dict(environment), cwd=where, start_new_session=True,
        )  # fmt: skip
        assert child.stdin is not None
        with child.stdin:
            while (code := child.poll()) is None and not (stop and stop.is_set()):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(0.5)
            if code is None:
                child.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE_SECONDS)
        # Closing its input ends a child that did not stop when it was told to.
        code = child.wait() if code is None else code
    lines = [line for line in (place / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    said = (lines[-1] if lines else "")[:300] if code else ""
    return Outcome(job.name, code, round(time.monotonic() - started, 2), said, os.uname().nodename)


def described(job: Job, outcome: Outcome, attempts: int) -> dict[str, object]:
    """Return what a fleet notes of a job that failed."""
    return {**asdict(outcome), "command": shlex.join(job.command), "attempts": attempts}
