"""The limited process of `core.sandbox`: decodes one file after another, as its input asks, until its input ends."""

import ctypes
import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38


def limit(memory_bytes: int) -> None:
    """Bound this process: memory, no file written, no core dump, no rights gained, and no network where that goes."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        # Root may; others may where the system allows user namespaces.
        if libc.unshare(CLONE_NEWNET) != 0:
            libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for what, bound in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (bound, bound))
        except (ValueError, OSError):
            continue  # macOS bounds no address space


def another(processor_s: int) -> None:
    """Allow so much processor time from now on; a process that takes more is ended by the system."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + processor_s, resource.RLIM_INFINITY))


def main() -> None:
    """Serve."""
    memory_bytes, processor_s = map(int, sys.argv[1:3])
    limit(memory_bytes)
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb", 1 << 16)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from geodiff4d.core import films, stills
    from geodiff4d.core.errors import UserError

    modules = {"films": films, "stills": stills}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        another(processor_s)
        try:
            os.chdir(asked["folder"])
            module, name = asked["do"]
            found = getattr(modules[module], name)(Path(asked["path"]), *asked["arguments"])
            if isinstance(found, Iterator):
                serve_stream(found, answers, processor_s)
            else:
                send(answers, found)
        except UserError as error:
            send(answers, str(error), "error")
        except Exception as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            send(answers, f"{asked['path']} cannot be decoded ({reason}): export it again", "error")


def serve_stream(items: Iterator[Any], answers: IO[bytes], processor_s: int) -> None:
    """Send an item whenever one is asked for; meanwhile the next one is decoded."""
    while True:
        failure: Exception | None = None
        try:
            item = next(items, None)
        except Exception as error:
            item, failure = None, error
        # Nothing is sent unasked: whoever asks may have had enough.
        wanted = sys.stdin.buffer.readline() == b"next\n"
        if wanted and failure:
            raise failure
        if item is None or not wanted:
            send(answers, None, "end")
            return
        send(answers, item)
        another(processor_s)


def send(answers: IO[bytes], value: Any, kind: str = "value") -> None:
    """Write a header of four bytes of length and JSON, and the bytes of an image."""
    import numpy as np

    from geodiff4d.core.films import About, Frame

    pixels: np.ndarray | None = None
    if isinstance(value, np.ndarray):
        kind, pixels, value = "array", value, None
    elif isinstance(value, About):
        kind, value = "about", astuple(value)
    elif isinstance(value, tuple) and isinstance(value[0], Frame):
        frame, times = value
        kind, pixels = "frame", frame.pixels
        value = (frame.transfer, frame.turned, frame.left, frame.down, frame.aspect), times
    head = {"kind": kind, "value": value}
    if pixels is not None:
        head |= {"shape": pixels.shape, "bytes": pixels.itemsize}
    text = json.dumps(head).encode()
    answers.write(len(text).to_bytes(4, "big") + text)
    if pixels is not None:
        answers.write(np.ascontiguousarray(pixels).data)
    answers.flush()


if __name__ == "__main__":
    main()
