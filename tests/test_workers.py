"""Workers end with whoever started them, however that ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.threads import THREADS, leave_a_core
from geodiff4d.core.workers import in_threads, in_workers, streamed

PARENT = """
import os, sys, time
from geodiff4d.core.workers import in_workers

def work(k):
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    list(in_workers(work, [(0,), (1,)], 2))
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_are_told_of_one_thread_and_nobody_else_is(monkeypatch):
    """numba reads this again whenever it compiles: it must not stay in the process that has more."""
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    seen: list[dict[str, str | None]] = []

    def items():
        seen.append({name: os.environ.get(name) for name in THREADS})
        yield from ()

    assert list(in_workers(print, items(), 2)) == []
    assert seen == [dict.fromkeys(THREADS, "1") | {"MKL_NUM_THREADS": "3"}], "what somebody said counts"
    assert [name for name in THREADS if name in os.environ] == ["MKL_NUM_THREADS"]


def test_threads_work_at_once_and_keep_the_order():
    both, before = threading.Barrier(2, timeout=20), torch.get_num_threads()

    def work(item: int) -> tuple[int, int]:
        both.wait()  # Passes only while another item is worked on.
        return item, torch.get_num_threads()

    assert list(in_threads(work, iter(range(8)))) == [(i, 1) for i in range(8)]
    assert torch.get_num_threads() == before


def test_threads_take_a_few_items_ahead_and_end_by_the_first_error():
    taken: list[int] = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    results = in_threads(lambda i: 10 // (3 - i), items())
    assert [next(results) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(taken) < 12, "a film is not read whole while its first frames are worked on"


@dataclass(frozen=True)
class Item:
    number: int
    values: torch.Tensor
    inner: "Item | None" = None


def made(count: int, failure: str | None = None):
    for i in range(count):
        # Of a view: what a pipe takes must not be more than what is shown.
        yield Item(os.getpid() if i == 0 else i, torch.arange(6.0).view(2, 3).mT + i, Item(-i, torch.ones(1).half()))
    if failure is not None:
        raise UserError(failure)


def fails():
    yield Item(os.getpid(), torch.ones(1))
    raise KeyError("of ours")


def exits():
    os._exit(3)
    yield


def test_a_stream_comes_from_a_process_of_its_own():
    first, *rest = streamed(made, 3)
    assert first.number != os.getpid() and [i.number for i in rest] == [1, 2]
    assert torch.equal(rest[1].values, torch.arange(6.0).view(2, 3).mT + 2)
    assert rest[1].inner == Item(-2, rest[1].inner.values) and rest[1].inner.values.dtype == torch.float16
    assert not alive(first.number)


def test_a_stream_says_what_went_wrong_and_ends_when_it_is_closed():
    stream = streamed(made, 1, "no such camera")
    next(stream)
    with pytest.raises(UserError, match="no such camera"):
        next(stream)
    with pytest.raises(RuntimeError, match="KeyError: 'of ours'"):
        list(streamed(fails))
    with pytest.raises(UserError, match="ended before its work was done"):
        next(streamed(exits))
    stream = streamed(made, 1000)
    pid = next(stream).number
    assert alive(pid)
    stream.close()
    assert not alive(pid)


LEAVER = """
import os, sys
from geodiff4d.core.threads import THREADS, leave_a_core
leave_a_core()
import torch
print(*(os.environ[name] for name in THREADS), torch.get_num_threads(), len(os.sched_getaffinity(0)))
"""


def test_a_core_is_left_before_libraries_are_loaded_and_not_after(monkeypatch):
    environment = {k: v for k, v in os.environ.items() if k not in THREADS} | {"OPENBLAS_NUM_THREADS": "7"}
    done = subprocess.run([sys.executable, "-c", LEAVER], env=environment, capture_output=True, text=True, check=True)
    omp, blas, mkl, numba, torchs, cores = map(int, done.stdout.split())
    assert omp == mkl == numba == torchs == max(1, cores - 1) and blas == 7, "what somebody set stays"
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    leave_a_core()
    assert not set(THREADS) & os.environ.keys(), "numpy is loaded here"


def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))
