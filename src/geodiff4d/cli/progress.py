"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from geodiff4d.core.progress import Description, Item

if TYPE_CHECKING:
    from geodiff4d.core.rundir import OnRecord

LINE_SECONDS = float(os.environ.get("GEODIFF4D_PROGRESS_SECONDS", "10"))
"""Time between two lines [s]; the studio, which shows them, asks for one a second."""


def bar(items: Iterable[Item], description: Description = "", total: int | None = None) -> Iterator[Item]:
    """Pass items through and show on stderr how far they are.

    This is the commands' `core.progress.Progress`. `total` defaults to the length of `items` where it has one. Away
    from a terminal (logs, CI), work shorter than ten seconds prints nothing.

    Example:
        >>> for frame in bar(frames, "rendering"):
        ...     write(frame)
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    console = Console(stderr=True)
    return _bar(items, description, total, console) if console.is_terminal else _lines(items, description, total)


def record_lines(steps: int) -> "OnRecord":
    """Return what prints a line for every record of a run of so many steps: where it is, its figures, the time left."""

    def show(record: dict[str, Any]) -> None:
        shown = {k: v for k, v in record.items() if k not in ("step", "eta")}
        words = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
        left = [f"{record['eta'] // 60:.0f} min left"] if "eta" in record else []
        print("  ".join([f"step {record.get('step', 0) + 1}/{steps}", *words, *left]), flush=True)

    return show


def _bar(items: Iterable[Item], description: Description, total: int | None, console: Console) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(_said(description), total=total)
        for item in items:
            yield item
            progress.update(task, advance=1, description=_said(description))


def _lines(items: Iterable[Item], description: Description, total: int | None) -> Iterator[Item]:
    start = last = time.monotonic()
    done, printed = 0, False
    for item in items:
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
