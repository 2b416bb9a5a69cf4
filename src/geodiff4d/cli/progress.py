"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
Description = str | Callable[[], str]
"""A function says how far the work is, each time it is asked."""
LINE_SECONDS = 10.0


def track(iterable: Iterable[Item], description: Description, total: int | None = None) -> Iterator[Item]:
    """Pass items through and show on stderr how far they are.

    `total` defaults to the length of `iterable` where it has one. Away from a terminal (logs, CI), work shorter than
    ten seconds prints nothing.

    Example:
        >>> for frame in track(frames, "rendering"):
        ...     write(frame)
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    console = Console(stderr=True)
    return _bar(iterable, description, total, console) if console.is_terminal else _lines(iterable, description, total)


def _bar(iterable: Iterable[Item], description: Description, total: int | None, console: Console) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(_said(description), total=total)
        for item in iterable:
            yield item
            progress.update(task, advance=1, description=_said(description))


def _lines(iterable: Iterable[Item], description: Description, total: int | None) -> Iterator[Item]:
    start = last = time.monotonic()
    done, printed = 0, False
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= LINE_SECONDS and done != total:
            _line(description, done, total, now - start)
            last, printed = now, True
    if printed or time.monotonic() - start >= LINE_SECONDS:
        _line(description, done, done, time.monotonic() - start)


def _said(description: Description) -> str:
    return description if isinstance(description, str) else description()


def _line(description: Description, done: int, total: int | None, seconds: float) -> None:
    of = "" if total is None else f"/{total}"
    print(f"{_said(description)}: {done}{of} in {seconds:.0f} s", file=sys.stderr, flush=True)
