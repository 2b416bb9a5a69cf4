"""Work shared out to processes."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.progress import Progress, advancing
from geodiff4d.core.threads import THREADS

Result = TypeVar("Result")
Item = TypeVar("Item")

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


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int = 2) -> Iterator[Result]:
    """Yield `function(item)` in the items' order; threads work ahead, as far as numerical libraries let go of Python.

    torch computes with one thread in each meanwhile: two teams of threads on the same cores would wait for each other.
    Functions that need no gradients say so themselves, since `torch.no_grad` holds in one thread only.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with _one_thread(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def streamed(function: Callable[..., Iterable[Any]], *arguments: Any) -> Generator[Any, None, None]:
    """Yield what `function(*arguments)` yields in a process of its own, which makes the next item while one is used.

    Items may be tensors and dataclasses of them; they are copied. The process computes with one thread, ends with this
    one, and is ended when the iterator is closed.

    Raises:
        UserError: the function raised it, or the process was ended.
        RuntimeError: the function raised anything else, whose traceback it tells.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with _told_one_thread():
        process = context.Process(target=_stream, args=(theirs, function, arguments), daemon=True)
        process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield _unpacked(value)
    except EOFError:
        raise UserError("a process was ended before its work was done: is there enough memory?") from None
    finally:
        # Ended first: nobody may be left to write to a pipe that is closed.
        process.terminate()
        process.join()
        ours.close()


def _stream(out: Connection, function: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    _alone()
    try:
        for item in function(*arguments):
            out.send(("item", _packed(item)))
        out.send(("end", None))
    except UserError as error:
        out.send(("error", error))
    except Exception:
        out.send(("error", RuntimeError(traceback.format_exc())))


def _packed(value: Any) -> Any:
    """Take tensors to arrays, whose bytes a pipe takes: tensors would go by a file in memory each."""
    if isinstance(value, torch.Tensor):
        return _Packed(torch.Tensor, {"values": value.numpy()})
    if is_dataclass(value) and not isinstance(value, type):
        return _Packed(type(value), {f.name: _packed(getattr(value, f.name)) for f in fields(value)})
    return value


def _unpacked(value: Any) -> Any:
    if not isinstance(value, _Packed):
        return value
    if value.kind is torch.Tensor:
        return torch.from_numpy(value.values["values"])
    return value.kind(**{k: _unpacked(v) for k, v in value.values.items()})


@dataclass(frozen=True)
class _Packed:
    """A tensor or a dataclass on its way to another process."""

    kind: type
    values: dict[str, Any]


def start_worker(started: Any) -> None:
    """Set a process up; it takes the number that follows those started before."""
    global number
    with started.get_lock():
        number = started.value
        started.value += 1
    _alone()


def _alone() -> None:
    """Let a process compute with one thread, ignore Ctrl-C, which is its parent's, and end with its parent."""
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
    told = [name for name in THREADS if name not in os.environ]
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
