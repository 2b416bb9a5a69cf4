"""Many browsers at once on `geodiff4d view`, some of which stall: what the others notice, and what memory does.

Usage: `.venv/bin/python tools/viewer_load.py AVATAR [--clients 100 --stalled 10 --seconds 300 --fps 24]`. Prints a
Markdown row for a run without stalled clients (a fifth as long) and one for the run with them, of all events of all
clients that read: latency from the line that was written to the program's input, and how much later than the quickest
client each read it, which does not count what the program itself takes.
"""

import asyncio
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

STEP = 1e-4
"""Turn of the neck [rad] from one line to the next: it says which line an event came from."""
LINES = 4000
"""After as many lines the turns repeat."""
NECK = 52 + 3
"""Place of the neck's first angle in a pose: after 52 weights and the head's rotation."""


@dataclass(frozen=True)
class Args:
    """Options of the measurement."""

    avatar: tyro.conf.Positional[Path]
    """Avatar folder, or a compact avatar (.g4d), that the page can draw."""
    clients: int = 100
    """Clients together."""
    stalled: int = 10
    """Clients of these that ask and never read: half of them for the page, half for poses."""
    seconds: float = 300.0
    """How long poses are sent."""
    fps: float = 24.0
    """Poses a second."""


@dataclass
class Run:
    """What one run has seen."""

    sent: list[float] = field(default_factory=list)
    """Time at which each line was written."""
    read: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each client that reads: numbers of lines, and when their events came."""
    memory_mb: list[float] = field(default_factory=list)
    """Of the program, once a second."""

    def row(self, name: str, cpu_seconds: float) -> str:
        """Return the Markdown row."""
        first: dict[int, float] = {}
        for number, time_read in itertools.chain(*self.read):
            first[number] = min(time_read, first.get(number, time_read))
        every = sorted(at - self.sent[number] for number, at in itertools.chain(*self.read))
        behind = [sorted(at - first[number] for number, at in one) for one in self.read if one]
        all_behind, worst = sorted(itertools.chain(*behind)), max(quantile(one, 0.95) for one in behind)
        events = [len(one) / len(first) for one in self.read]
        start, end = (statistics.median(part) for part in (self.memory_mb[5:15], self.memory_mb[-10:]))
        cells = [
            name, *(f"{1e3 * quantile(every, q):.0f}" for q in (0.5, 0.95)),
            *(f"{1e3 * quantile(all_behind, q):.0f}" for q in (0.5, 0.95, 0.99)), f"{1e3 * worst:.0f}",
            f"{min(events):.0%}", f"{start:.0f} → {end:.0f}", f"{cpu_seconds:.0f}",
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of numbers in order."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def reader(port: int, run: Run, ready: asyncio.Event) -> None:
    """Read the page, then poses, as a browser does."""
    for path, whole in (("/", True), ("/live", False)):
        stream, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        if whole:
            await stream.read(-1)
            writer.close()
    mine: list[tuple[int, float]] = []
    run.read.append(mine)
    base = None
    while line := await stream.readline():
        if not line.startswith(b"data: "):
            continue
        angle = json.loads(line[6:])[NECK]
        if base is None:
            # The line at rest, which waits for whoever comes.
            base = angle
            ready.set()
            continue
        number = round((angle - base) / STEP) % LINES
        # The latest line of this number that was written.
        last = len(run.sent) - 1
        mine.append((last - (last - number) % LINES, time.monotonic()))


def stalled(port: int, path: str) -> socket.socket:
    """Return a connection that asks and never reads."""
    asked = socket.socket()
    asked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asked.connect(("127.0.0.1", port))
    asked.sendall(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    return asked


def memory_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1000 if found else 0.0


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")


def write_line(child: subprocess.Popen[bytes], number: int) -> None:
    """Write one line of the driver."""
    assert child.stdin is not None
    line = {"jawOpen": 0.3, "neck": [STEP * (number % LINES), 0, 0]}
    child.stdin.write(json.dumps(line).encode() + b"\n")
    child.stdin.flush()


async def drive(child: subprocess.Popen[bytes], run: Run, seconds: float, fps: float) -> None:
    """Write lines at a steady rate, and note memory."""
    began = time.monotonic()
    for number in itertools.count():
        now = time.monotonic()
        if now - began > seconds:
            return
        run.sent.append(now)
        write_line(child, number)
        if now - began > len(run.memory_mb):
            run.memory_mb.append(memory_mb(child.pid))
        await asyncio.sleep(max(0.0, began + (number + 1) / fps - time.monotonic()))


async def measured(args: Args, clients: int, idle: int, seconds: float, name: str) -> str:
    """Start the program, connect everybody, drive; returns the row."""
    command = [sys.executable, "-m", "geodiff4d", "view", str(args.avatar), "--driving", "-", "--port", "0"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline().decode().split("/ shows")[0].rpartition(":")[2])
        lost = [stalled(port, "/live" if i % 2 else "/") for i in range(idle)]
        run, ready = Run(), [asyncio.Event() for _ in range(clients - idle)]
        tasks = [asyncio.create_task(reader(port, run, event)) for event in ready]
        write_line(child, 0)
        await asyncio.gather(*(event.wait() for event in ready))
        before = cpu_seconds(child.pid)
        await drive(child, run, seconds, args.fps)
        await asyncio.sleep(1)
        row = run.row(name, cpu_seconds(child.pid) - before)
        for task in tasks:
            task.cancel()
        for one in lost:
            one.close()
        return row
    finally:
        child.terminate()
        child.wait()


def main(args: Args) -> None:
    """Print both rows."""
    latency = ["latency p50 [ms]", "p95", "behind the quickest p50 [ms]", "p95", "p99", "p95 of the slowest client"]
    columns = ["run", *latency, "fewest poses", "memory [MB]", "CPU [s]"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for stall, seconds in ((0, args.seconds / 5), (args.stalled, args.seconds)):
        name = f"{args.clients} clients, {stall} stalled, {seconds:.0f} s"
        print(asyncio.run(measured(args, args.clients, stall, seconds, name)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
