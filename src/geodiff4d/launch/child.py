"""The process of one job: carries the command out, and notes as the very last thing that it is done."""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

from geodiff4d.core.sandbox import VARIABLE


def main(given: str) -> int:
    """Run the command and return its exit code."""
    job = json.loads(given)
    threading.Thread(target=_end_with_input, daemon=True).start()
    # What a fleet is given may come from anybody.
    os.environ.setdefault(VARIABLE, "1")
    started = time.monotonic()
    # By name: commands lie above this package.
    code = importlib.import_module("geodiff4d.cli").main(job["words"])
    if code == 0:
        done = Path(job["done"])
        record = {"job": job["job"], "command": job["words"], "seconds": round(time.monotonic() - started, 2)}
        # Whole or absent; `core.files` would load torch, which not every command needs.
        done.with_suffix(".part").write_text(json.dumps(record) + "\n")
        os.replace(done.with_suffix(".part"), done)
    return code


def _end_with_input() -> None:
    """End as soon as whoever holds the other end of the input has gone."""
    os.read(0, 1)  # not by way of sys.stdin, whose lock would still be held when the interpreter ends
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
