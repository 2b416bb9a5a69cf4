"""Somebody who drives an avatar as it comes: poses out of a stream of weights or of a tracker, and their latest."""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from geodiff4d.avatar.drive import LiveDriver, Performance, held
from geodiff4d.avatar.model import Avatar
from geodiff4d.avatar.stream import Line
from geodiff4d.heads.rig import HeadParams
from geodiff4d.viewer.page import PageConfig, page
from geodiff4d.viewer.scene import pose_rows

Moment = TypeVar("Moment")
DIGITS = 5
"""Decimals of the numbers that are sent: a hundredth of a millimetre or of a milliradian."""


def newest(stream: Iterable[Moment]) -> Iterator[Moment]:
    """Yield a stream's newest moment whenever one is asked for, and leave out those that came while nobody asked.

    Whoever poses heads more slowly than lines come would fall behind further and further. What the stream raises is
    raised here, after what came before it.
    """
    changed, waiting, ended, failures = threading.Condition(), [], threading.Event(), []

    def read() -> None:
        try:
            for moment in stream:
                with changed:
                    waiting[:] = [moment]
                    changed.notify_all()
        except Exception as error:  # whatever it is, it is whoever asks who is told
            failures.append(error)
        with changed:
            ended.set()
            changed.notify_all()

    threading.Thread(target=read, daemon=True).start()
    while True:
        with changed:
            changed.wait_for(lambda: waiting or ended.is_set())
            if not waiting:
                break
            moment = waiting.pop()
        yield moment
    if failures:
        raise failures[0]


def live_poses(avatar: Avatar, stream: Iterable[Line | HeadParams]) -> Iterator[HeadParams]:
    """Yield the avatar's parameters (no batch axis) for each moment of a stream, as it comes."""
    driver = LiveDriver(avatar)
    for moment in stream:
        if isinstance(moment, Line):
            asked = held(avatar, moment.weights[None]).params[0]
            yield replace(asked, neck_pose=asked.neck_pose + moment.neck)
        else:
            yield driver(moment)


class Feed:
    """An avatar's page, and the latest pose of whoever drives it: what browsers that draw by themselves are served.

    Only the latest pose is kept. A browser that reads slowly misses some, and delays nobody.
    """

    def __init__(
        self, avatar: Avatar, performance: Performance, title: str, live: bool = False,
        tracker: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """Make the page, with a face tracker's files if there are any (`viewer.face_tracker`).

        Raises:
            UserError: the avatar is none that the page can draw.
        """
        self.avatar = avatar
        self.page = page(avatar, performance, PageConfig(title, live=True, play=not live, tracker=tracker)).encode()
        self.failure: Exception | None = None
        self._changed, self._stopped = threading.Condition(), False
        self._pose, self._number = "", 0

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def follow(self, stream: Iterable[Line | HeadParams]) -> None:
        """Send on the poses of a stream as they come; returns when it ends."""
        for params in live_poses(self.avatar, stream):
            row = pose_rows(params.map(lambda v: v[None]))[0]
            with self._changed:
                self._pose, self._number = json.dumps([round(float(x), DIGITS) for x in row]), self._number + 1
                self._changed.notify_all()
            if self._stopped:
                return

    def wait(self, seen: int, seconds: float) -> tuple[str, int]:
        """Return the latest pose (JSON) and its number, as soon as that is above `seen` or after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > seen or self._stopped, seconds)
            return self._pose, self._number
