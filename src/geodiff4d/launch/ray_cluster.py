"""A fleet on a Ray cluster: machines and the cluster's head may die and come back in mid-run."""

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from geodiff4d.core.errors import UserError, install_extra
from geodiff4d.launch.jobs import Job, Outcome, lost

AGAIN_S = 2.0
"""Between two attempts to reach a cluster that was lost."""
BEGIN_S = 60.0
"""How long a cluster that is being started may take to answer."""
LEAVE_S = 10.0
"""How long a driver may take to leave its cluster."""


class RayCrew:
    """A Ray cluster whose machines have this program, and see the fleet's folder under one name.

    Jobs that were under way when the cluster was lost are handed out again once it is back. A job that runs to its end
    on a machine that outlived the head is not done twice: its second process waits for the first (`launch/child.py`).
    """

    def __init__(
        self, folder: Path, address: str, cores: int = 1, patience_s: float = 600.0,
        tell: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        """Reach the cluster.

        Args:
            cores: how many each job takes; where the cluster has GPUs, a job takes one.
            patience_s: how long a cluster that was lost may take to come back [s].
            tell: told that the cluster was lost, and that it is back.

        Raises:
            UserError: Ray is not installed, or there is no cluster at the address.
        """
        if importlib.util.find_spec("ray") is None:
            raise UserError(f"--ray needs Ray: run `{install_extra('cluster')}`, or leave --ray out")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.address, self.cores, self.patience_s, self.tell = folder, address, cores, patience_s, tell
        self._numbers, self._under_way = itertools.count(), dict[int, Job]()
        self._driver: subprocess.Popen[str] | None = None
        if reason := self._reach_within(min(BEGIN_S, patience_s)):
            self.close()
            raise UserError(f"--ray {address}: no cluster answers ({reason}); start one with `ray start --head`")

    def start(self, job: Job) -> int:
        """Begin a job somewhere."""
        ticket = next(self._numbers)
        self._under_way[ticket] = job
        self._send(ticket)
        return ticket

    def finished(self, tickets: list[int]) -> list[tuple[int, Outcome]]:
        """Wait for one of the tickets, and return it.

        Raises:
            UserError: the cluster was lost, and did not come back.
        """
        while (said := self._hear()) is None:
            self._return()
        job = self._under_way.pop(said["ticket"])
        return [(said["ticket"], Outcome(**said["outcome"]) if "outcome" in said else lost(job, said["lost"]))]

    def close(self) -> None:
        """Leave the cluster, which ends what still runs."""
        if self._driver is not None:
            assert self._driver.stdin is not None
            assert self._driver.stdout is not None
            with suppress(OSError):
                self._driver.stdin.close()
            try:
                self._driver.wait(LEAVE_S)
            except subprocess.TimeoutExpired:  # it is still looking for a cluster
                self._driver.kill()
                self._driver.wait()
            self._driver.stdout.close()
            self._driver = None

    def _reach(self) -> str | None:
        """Start a driver; return why there is no cluster, or None if there is one."""
        self.close()
        words = ["-m", "geodiff4d.launch.ray_driver", self.address, str(self.folder), str(self.cores)]
        with (self.folder / "ray.log").open("ab") as log:
            # A session of its own: an interrupt is for the fleet to handle.
            self._driver = subprocess.Popen(
                [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        said = self._hear() or {"error": f"its driver ended, {self.folder / 'ray.log'} has what it said"}
        self.places = said.get("places", 1)
        return said.get("error")

    def _reach_within(self, seconds: float) -> str | None:
        """Try to reach the cluster for so long, once at least; return why it was in vain, or None."""
        until = time.monotonic() + seconds
        while (reason := self._reach()) and time.monotonic() < until:
            time.sleep(AGAIN_S)
        return reason

    def _return(self) -> None:
        """Wait until the cluster is back, and hand out again what was under way."""
        self.tell(f"the Ray cluster at {self.address} was lost: waiting for its head")
        if reason := self._reach_within(self.patience_s):
            raise UserError(
                f"the Ray cluster at {self.address} was lost and did not come back ({reason}): start its head, and "
                "give the same command again; jobs that are done stay done"
            )
        self.tell(f"the Ray cluster is back, {len(self._under_way)} jobs are handed out again")
        for ticket in self._under_way:
            self._send(ticket)

    def _send(self, ticket: int) -> None:
        assert self._driver is not None
        assert self._driver.stdin is not None
        job = self._under_way[ticket]
        # A driver that is gone is noticed when it is listened to.
        with suppress(BrokenPipeError):
            self._driver.stdin.write(json.dumps([ticket, job.name, job.command]) + "\n")
            self._driver.stdin.flush()

    def _hear(self) -> dict[str, Any] | None:
        """Return the driver's next line, None where it has ended."""
        assert self._driver is not None
        assert self._driver.stdout is not None
        line = self._driver.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None
