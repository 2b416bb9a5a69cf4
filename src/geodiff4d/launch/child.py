"""The process of one job: carries the command out, and notes as the very last thing that it is done.

It holds a lock on the job's folder while it does. A machine that was taken for lost may still be at work on a job that
was handed out again: the second process waits for the first, and finds the job done.
"""

import fcntl
import importlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from geodiff4d.core.jsontext import parse_json
from geodiff4d.core.sandbox import VARIABLE


def main(given: str) -> int:
    """Run the command and return its exit code."""
    job = parse_json(given)
    threading.Thread(target=_end_with_input, daemon=True).start()
    # What a fleet is given may come from anybody.
    os.environ.setdefault(VARIABLE, "1")
    done = Path(job["done"])
    folder = os.open(done.parent, os.O_RDONLY)
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(folder, fcntl.LOCK_EX)
    if _job_of(done) == job["job"]:
        return 0
    started = time.monotonic()
    # By name: commands lie above this package.
    code = importlib.import_module("geodiff4d.cli").main(job["words"])
    if code == 0:
        record = {"job": job["job"], "command": job["words"], "seconds": round(time.monotonic() - started, 2)}
        # Whole or absent; `core.files` would load torch, which not every command needs.
        done.with_suffix(".part").write_text(json.dumps(record) + "\n")
        os.replace(done.with_suffix(".part"), done)
    return code


def _job_of(done: Path) -> str | None:
    """Return which job a folder's note says was done, None where there is no such note."""
    try:
        return parse_json(done.read_text())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _end_with_input() -> None:
    """End as soon as whoever holds the other end of the input has gone."""
    os.read(0, 1)  # not by way of sys.stdin, whose lock would still be held when the interpreter ends
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
