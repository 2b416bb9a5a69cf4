"""Being asked to stop: by SIGTERM, which schedulers send some time before they kill, or by Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """A run was asked to stop and has kept everything it needs to go on; the command line exits with code 143."""


class StopRequest:
    """Whether somebody has asked."""

    asked = False


@contextmanager
def stop_requests(of: signal.Signals = signal.SIGTERM) -> Iterator[StopRequest]:
    """Turn the first such signal inside into a request; a second one ends the process as usual.

    Only a process's main thread may set this up: in others nothing is changed, and nobody asks.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(of)

    def ask(number: int, frame: object) -> None:
        request.asked = True
        signal.signal(of, before)

    signal.signal(of, ask)
    try:
        yield request
    finally:
        signal.signal(of, before)
