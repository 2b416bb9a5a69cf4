"""Work shared out to processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch

from geodiff4d.core.progress import Progress, advancing

Result = TypeVar("Result")

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

number = 0
"""Which of the workers this process is, from 0; it says on which device it computes."""


def in_workers(function: Callable[..., Result], items: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Result]:
    """Call `function(*item)` in several processes (one: in this one, in order); yield results as they come.

    A few items wait in line, whatever their number. Workers use one thread; an interrupt reaches the parent alone,
    which lets each of them finish its item.
    """
    if workers <= 1:
        for item in items:
            yield function(*item)
        return
    # spawn: a forked torch may wait forever for threads it does not have.
    context = multiprocessing.get_context("spawn")
    with _told_one_thread(), ProcessPoolExecutor(workers, context, start_worker, (context.Value("i", 0),)) as pool:
        waiting: set[Future[Result]] = set()
        try:
            for item in items:
                if len(waiting) >= 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                waiting.add(pool.submit(function, *item))
            yield from (future.result() for future in as_completed(waiting))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(jobs: Sequence[tuple[Any, ...]], workers: int, progress: Progress, description: str) -> list[Any]:
    """Do jobs (function, arguments …) by several processes, one thread each; return what they gave, in their order."""
    found: dict[int, Any] = {}
    with advancing(progress, description, len(jobs)) as advance, _one_thread():
        for i, result in in_workers(_numbered, enumerate(jobs), min(workers, len(jobs))):
            found[i] = result
            advance(1)
    return [found[i] for i in range(len(jobs))]


def start_worker(started: Any) -> None:
    """Set a process up; it takes the number that follows those started before."""
    global number
    with started.get_lock():
        number = started.value
        started.value += 1
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent, however it ends, and end too: nobody else would stop a worker that is left alone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _numbered(i: int, job: tuple[Any, ...]) -> tuple[int, Any]:
    function, *arguments = job
    return i, function(*arguments)


@contextmanager
def _told_one_thread() -> Iterator[None]:
    """Tell processes that are started inside to compute with one thread, unless somebody else has told them.

    torch is told when a worker starts; numpy's libraries and numba read this when they are loaded. Threads of several
    workers that share cores spin while they wait for each other. It must not stay: numba reads it again whenever it
    compiles, and this process may have more.
    """
    told = [name for name in ONE_THREAD if name not in os.environ]
    os.environ |= dict.fromkeys(told, "1")
    try:
        yield
    finally:
        for name in told:
            os.environ.pop(name, None)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
