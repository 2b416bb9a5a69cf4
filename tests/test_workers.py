"""Workers end with whoever started them, however that ends."""

import os
import signal
import subprocess
import sys
import time

from geodiff4d.core.workers import ONE_THREAD, in_workers

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
    for name in ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    seen: list[dict[str, str | None]] = []

    def items():
        seen.append({name: os.environ.get(name) for name in ONE_THREAD})
        yield from ()

    assert list(in_workers(print, items(), 2)) == []
    assert seen == [dict.fromkeys(ONE_THREAD, "1") | {"MKL_NUM_THREADS": "3"}], "what somebody said counts"
    assert [name for name in ONE_THREAD if name in os.environ] == ["MKL_NUM_THREADS"]


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
