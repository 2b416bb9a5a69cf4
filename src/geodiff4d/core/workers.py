"""Work shared out to processes."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


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
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
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


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
