"""The process that speaks to a Ray cluster for a fleet: jobs come in as lines, what came of them goes out as lines.

When the head of the cluster dies, Ray 2.60 ends its driver without a word, or keeps it waiting for ever where another
head is there soon. So the driver is a process of its own that ends when it is cut off; `launch/ray_cluster.py` starts
it, and starts it again once there is a head.
"""

import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geodiff4d.launch.jobs import Job, run_job

REACH_S = 120.0
"""A head that has not answered for so long is not there."""
LOOK_S = 2.0
"""Between two looks at the cluster."""
LOST_S = 60.0
"""A cluster that has not answered for so long is lost."""


def main(address: str, folder: str, cores: int) -> None:
    """Hand the jobs of the input to the cluster, until the input ends."""
    say = _Lines()
    if reason := _refused(address):
        say({"error": reason})
        return
    import ray

    def give_up() -> None:
        say({"error": f"no answer in {REACH_S:.0f} s"})
        os._exit(1)

    # Ray tries for minutes to reach a head that takes connections and says nothing.
    timer = threading.Timer(REACH_S, give_up)
    timer.daemon = True
    timer.start()
    known = {k: os.environ[k] for k in ("PYTHONPATH",) if k in os.environ}
    try:
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": known} if known else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        say({"error": " ".join(str(error).split())[:200]})
        return
    finally:
        timer.cancel()
    has = ray.cluster_resources()
    gpus = int(has.get("GPU", 0))
    threads = {"OMP_NUM_THREADS": str(cores), "NUMBA_NUM_THREADS": str(cores)}
    # Lost machines are ours to count, and the folder goes by name, never by value.
    remote: Any = ray.remote(num_cpus=cores, num_gpus=1 if gpus else 0, max_retries=0)(run_job)
    say({"places": gpus or max(1, int(has.get("CPU", 1)) // cores)})
    threading.Thread(target=_end_when_cut_off, daemon=True).start()
    for line in sys.stdin:
        ticket, name, command = json.loads(line)
        future = remote.remote(Job(name, tuple(command)), Path(folder), threads, None, Path.cwd()).future()
        future.add_done_callback(lambda done, ticket=ticket: say({"ticket": ticket, **_came_of(done)}))
    # What still runs ends with its driver; nobody waits for it.
    os._exit(0)


def _refused(address: str) -> str | None:
    """Return why nothing listens at `host:port`, or None: something does, or the address is of another form."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


def _end_when_cut_off() -> None:
    """End this process once the cluster has not told for a while that this machine belongs to it."""
    import ray

    here, seen = ray.get_runtime_context().get_node_id(), [time.monotonic()]

    def look() -> None:
        while True:
            if any(node["Alive"] and node["NodeID"] == here for node in ray.nodes()):
                seen[0] = time.monotonic()
            time.sleep(LOOK_S)

    # It may wait for an answer for ever.
    threading.Thread(target=look, daemon=True).start()
    while time.monotonic() - seen[0] < LOST_S:
        time.sleep(LOOK_S)
    os._exit(1)


def _came_of(done: "Future[Any]") -> dict[str, Any]:
    """Return the outcome of an attempt, or the reason why its place was lost."""
    import ray

    try:
        return {"outcome": asdict(done.result())}
    except ray.exceptions.RayError as error:
        return {"lost": type(error).__name__}


class _Lines:
    """The output, to which several threads write whole lines; what Ray prints goes to the error stream."""

    def __init__(self) -> None:
        self._out, self._lock = os.fdopen(os.dup(1), "w"), threading.Lock()
        os.dup2(2, 1)

    def __call__(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._out.write(json.dumps(record) + "\n")
            self._out.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
