"""Being asked to stop: SIGTERM, which schedulers send some time before they kill."""

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
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGTERM inside into a request; a second one ends the process as usual.

    Only a process's main thread may set this up: in others nothing is changed, and nobody asks.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: object) -> None:
        request.asked = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
