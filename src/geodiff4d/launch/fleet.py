"""A fleet: jobs handed to this machine's cores and GPUs, or to a Ray cluster, until each is done or has failed."""

import json
import os
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Protocol

import torch

from geodiff4d.core.files import write_json
from geodiff4d.core.progress import Progress, advancing, silent
from geodiff4d.core.rundir import alone
from geodiff4d.launch.jobs import Job, Outcome, described, run_job


class Crew(Protocol):
    """Whoever carries jobs out."""

    places: int
    """How many at a time."""

    def start(self, job: Job) -> Any:
        """Begin a job and return a ticket."""
        ...

    def finished(self, tickets: list[Any]) -> list[tuple[Any, Outcome]]:
        """Wait for one of the tickets at least, and return those that are finished (`lost` where their place was)."""
        ...

    def close(self) -> None:
        """End what still runs."""
        ...


@dataclass(frozen=True)
class Tally:
    """What came of a fleet."""

    done: int
    skipped: int
    """Of these: done by an earlier run."""
    failed: dict[str, dict[str, Any]]


def run_fleet(jobs: list[Job], folder: Path, crew: Crew, retries: int = 2, progress: Progress = silent) -> Tally:
    """Carry jobs out below `folder`; those that are done already are not done again.

    `fleet.jsonl` gets a line for every attempt and `failed.json` says what failed and why, at any time. A job whose
    input is wrong fails at once, others after so many `retries`; a job whose place was lost (a machine that died) is
    handed out again and that counts as an attempt.

    Raises:
        UserError: another process carries out a fleet in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = deque((job, 1) for job in jobs if not job.done(folder))
    skipped = len(jobs) - len(waiting)
    failed: dict[str, dict[str, Any]] = {}
    flying: dict[Any, tuple[Job, int]] = {}
    done = skipped
    with (
        alone(folder),
        (folder / "fleet.jsonl").open("a") as journal,
        advancing(progress, lambda: f"jobs, {len(failed)} failed", len(jobs)) as advance,
    ):
        write_json(folder / "failed.json", failed)
        advance(skipped)
        while waiting or flying:
            # Some wait in line, so that no place idles.
            while waiting and len(flying) < crew.places + 2:
                job, attempt = waiting.popleft()
                flying[crew.start(job)] = job, attempt
            for ticket, found in crew.finished(list(flying)):
                job, attempt = flying.pop(ticket)
                write_line(journal, {**asdict(found), "attempt": attempt, "time": round(time.time(), 1)})
                if found.code == 0:
                    done += 1
                elif found.repeatable and attempt <= retries:
                    waiting.append((job, attempt + 1))
                    continue
                else:
                    failed[job.name] = described(job, found, attempt)
                    write_json(folder / "failed.json", failed)
                advance(1)
    return Tally(done, skipped, failed)


def write_line(journal: IO[str], record: dict[str, Any]) -> None:
    """Append one line, whole."""
    journal.write(json.dumps(record) + "\n")
    journal.flush()


class LocalCrew:
    """This machine: so many jobs at a time, each on its share of the cores, and on a GPU where there are any."""

    def __init__(self, folder: Path, workers: int | None = None):
        """`workers` is by default the number of GPUs, or of cores where there are none."""
        cores, self.gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
        # A scheduler may have given this process some of the machine's GPUs alone, by number or by name.
        given = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        self._visible = given or [str(i) for i in range(self.gpus)]
        self.folder, self.places = folder, workers or self.gpus or cores
        self.threads = str(max(1, cores // self.places))
        self._pool, self._stop = ThreadPoolExecutor(self.places), threading.Event()
        self._free: SimpleQueue[int] = SimpleQueue()
        for place in range(self.places):
            self._free.put(place)

    def start(self, job: Job) -> "Future[Outcome]":
        """Begin a job as soon as there is a place."""
        return self._pool.submit(self._run, job)

    def finished(self, tickets: list["Future[Outcome]"]) -> list[tuple["Future[Outcome]", Outcome]]:
        """Wait for one of the tickets at least, and return those that are finished."""
        return [(ticket, ticket.result()) for ticket in wait(tickets, return_when=FIRST_COMPLETED).done]

    def _run(self, job: Job) -> Outcome:
        place = self._free.get()
        try:
            gpu = {"CUDA_VISIBLE_DEVICES": self._visible[place % self.gpus]} if self.gpus else {}
            threads = {"OMP_NUM_THREADS": self.threads, "NUMBA_NUM_THREADS": self.threads}
            return run_job(job, self.folder, threads | gpu, self._stop)
        finally:
            self._free.put(place)

    def close(self) -> None:
        """End every job that runs, and begin no other."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stop.set()
        self._pool.shutdown()
