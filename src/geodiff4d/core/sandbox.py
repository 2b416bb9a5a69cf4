"""Decoding in a process with limits, for image and video files that a stranger sent.

With the environment variable `GEODIFF4D_SANDBOX=1`, which jobs of a fleet have (`launch/child.py`), functions of
`stills` and `films` run in a process of their own: its memory and its processor time are bounded, it writes no file,
and it reaches no network where the system lets a process give that up (Linux, as root or with user namespaces). It
loads no torch and starts in half a second. It decodes one file after another for the process that started it, and ends
with it. Whatever comes back is checked: it is as little trusted as the file.
"""

import atexit
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from geodiff4d.core.errors import UserError
from geodiff4d.core.films import About, Frame
from geodiff4d.core.stills import MAX_PIXELS

Result = TypeVar("Result")

VARIABLE = "GEODIFF4D_SANDBOX"
MEMORY_BYTES = 4 * 1024**3
"""Address space of a limited process."""
PROCESSOR_S = 60
"""Its processor time for a file that is read at once, or between two frames of a video."""
PATIENCE_S = 600.0
"""The same by the clock, on a machine that does other things as well."""
STOP_S = 5.0
"""How long a video that is no longer wanted may keep its process."""
HEADER_BYTES = 65536
IDLE = 4
"""How many processes wait for another file at most."""
KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
"""What such a process is told of the environment."""
PACKAGES = Path(__file__).parents[2]
LEAN = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Threads that decode nothing, and address space that only many threads would need."""


END = object()
"""What a limited process answers after a stream's last item."""


def limited() -> bool:
    """Say whether files are decoded in processes with limits."""
    return os.environ.get(VARIABLE) == "1"


def decode(function: Callable[..., Result], path: Path, *arguments: Any) -> Result:
    """Return `function(path, *arguments)`, a function of `stills` or `films`; in a limited process if `limited()`.

    Raises:
        UserError: what the function raises, and that it needs more memory or time than it may have.
    """
    if not limited():
        return function(path, *arguments)
    with _asked(function, path, arguments) as child:
        return child.answer()


def decode_stream(function: Callable[..., Iterator[Result]], path: Path, *arguments: Any) -> Iterator[Result]:
    """Yield what `function(path, *arguments)` yields, as `decode`; the next item is decoded while one is used.

    Raises:
        UserError: as `decode`.
    """
    if not limited():
        yield from function(path, *arguments)
        return
    with _asked(function, path, arguments) as child:
        try:
            while True:
                child.tell("next")
                if (item := child.answer()) is END:
                    return
                yield item
        except GeneratorExit:
            with suppress(UserError):  # its process is ended then
                child.tell("stop")
                child.answer(STOP_S)
            raise


class Child:
    """The parent's side of a limited process."""

    def __init__(self):
        self.path, self.busy = Path(), False
        self.limits = f"{MEMORY_BYTES / 1024**3:.3g} GiB of memory and {PROCESSOR_S} s of processor time"
        environment = {k: os.environ[k] for k in KEPT if k in os.environ} | LEAN
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(folder).resolve()) for folder in (PACKAGES, *sys.path))
        # A session of its own: an interrupt is the parent's to handle. Its input ends when the parent does.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "geodiff4d.core.sandboxed", str(MEMORY_BYTES), str(PROCESSOR_S)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0,
            start_new_session=True,
        )  # fmt: skip

    def ask(self, function: Callable[..., Any], path: Path, arguments: tuple[Any, ...]) -> None:
        """Ask for a function of a file."""
        self.path, self.busy = path, True
        name = (function.__module__.rpartition(".")[2], function.__name__)
        self.tell(json.dumps({"do": name, "path": str(path), "arguments": arguments, "folder": str(Path.cwd())}))

    def tell(self, line: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            raise UserError(self._fate()) from None

    def answer(self, patience_s: float = PATIENCE_S) -> Any:
        """Return what was asked for, the next item of a stream, or `END`.

        Raises:
            UserError: what the function raised, or that the process has died or takes too long.
        """
        deadline = time.monotonic() + patience_s
        head = json.loads(self._line(deadline))
        kind, value = head["kind"], head["value"]
        if kind == "error":
            self.busy = False
            raise UserError(str(value))
        if kind == "frame":
            pixels = self._array(head["shape"], head["bytes"], deadline)
            (transfer, turned, left, down, aspect), times = value
            return Frame(pixels, int(transfer), bool(turned), bool(left), bool(down), float(aspect)), int(times)
        if kind == "array":
            value = self._array(head["shape"], head["bytes"], deadline)
        self.busy = False
        if kind == "about":
            return About(float(value[0]), None if value[1] is None else int(value[1]))
        return END if kind == "end" else value

    def _array(self, shape: list[int], width: int, deadline: float) -> np.ndarray:
        if not (2 <= len(shape) <= 3 and width in (1, 2) and math.prod(shape) <= 3 * MAX_PIXELS and min(shape) > 0):
            raise UserError(self._fate())
        out = np.empty(shape, np.uint8 if width == 1 else np.uint16)
        self._fill(out.reshape(-1).view(np.uint8).data, deadline)
        return out

    def _line(self, deadline: float) -> bytes:
        size = bytearray(4)
        self._fill(memoryview(size), deadline)
        length = int.from_bytes(size, "big")
        if length > HEADER_BYTES:
            raise UserError(self._fate())
        line = bytearray(length)
        self._fill(memoryview(line), deadline)
        return bytes(line)

    def _fill(self, buffer: memoryview, deadline: float) -> None:
        assert self.process.stdout is not None
        pipe, done = self.process.stdout.fileno(), 0
        while done < len(buffer):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            count = os.readv(pipe, [buffer[done:]]) if ready else 0
            if count == 0:
                raise UserError(self._fate())
            done += count

    def _fate(self) -> str:
        """End the process and say what became of it."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # one that died answers no more, and is known to be dead a moment later
        code = self.process.poll()
        self.end()
        how = "no answer" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{self.path} cannot be decoded with {self.limits} ({how}): export it again, smaller or shorter"

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


waiting: list[Child] = []
"""Processes that have nothing to do."""
_lock = threading.Lock()


def close() -> None:
    """End the processes that wait for another file."""
    with _lock:
        ended = waiting[:]
        waiting.clear()
    for child in ended:
        child.end()


atexit.register(close)
# A fork has the pipes of its parent's processes, which are not its own to use.
os.register_at_fork(after_in_child=waiting.clear)


@contextmanager
def _asked(function: Callable[..., Any], path: Path, arguments: tuple[Any, ...]) -> Iterator[Child]:
    """Ask a limited process, one that waits or a new one; it is kept if it has answered whole."""
    with _lock:
        child = waiting.pop() if waiting else None
    if child is None or child.process.poll() is not None:
        child = Child()
    try:
        child.ask(function, path, arguments)
        yield child
    finally:
        with _lock:
            kept = not child.busy and len(waiting) < IDLE
            if kept:
                waiting.append(child)
        if not kept:
            child.end()
