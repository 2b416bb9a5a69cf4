"""How many threads numerical libraries compute with; they are told before they are loaded, so none is imported here."""

import os
import sys

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
"""What torch, numpy's and scipy's linear algebra, and numba read when they are loaded."""


def leave_a_core() -> None:
    """Leave a core to a process that works beside this one: threads that share one wait for each other, spinning.

    What somebody has set stays, and so does everything once numpy is loaded, which would not read it any more.
    """
    if "numpy" in sys.modules:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in THREADS:
        os.environ.setdefault(name, str(max(1, cores - 1)))
