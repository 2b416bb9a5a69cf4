"""Expression weights line by line: one JSON object a line, as capture apps and web avatars exchange them.

Each line is one frame, in one of two forms:

    {"jawOpen": 0.4, "eyeBlinkLeft": 1}                    weights by name; those not named are 0
    {"names": ["jawOpen", …], "weights": [0.4, …]}         a list; names may be left out once given, or for all 52

Names are ARKit's 52, which are OpenHead's; Live Link's capital first letters do as well. Beside the weights a line may
have `neck` (axis-angle [rad], three numbers); `time`, `timecode` and `frame` are skipped. A file may also be one
object with `names` and `frames`, a list of such objects, as LAM's web avatars take it.
"""

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.jsontext import parse_json

IGNORED = {"time", "timecode", "frame", "rotation", "translation"}
"""Keys that are skipped; head poses of capture apps are in axes of their own."""
SLACK = 1e-3
"""Weights may overshoot 0 and 1 by this much: they are rounded numbers."""
MAX_LINE = 64 * 1024


@dataclass(frozen=True)
class Line:
    """One frame of a stream."""

    weights: Float[Tensor, " exprs"]
    """0 to 1, in the head's order."""
    neck: Float[Tensor, "3"]
    """Axis-angle [rad]."""


class Reader:
    """Reads lines for one head; remembers the names that a line gave.

    Example:
        >>> Reader(("jawOpen", "tongueOut")).line('{"tongueOut": 0.5}', 1).weights
        tensor([0.0000, 0.5000])
    """

    def __init__(self, names: tuple[str, ...], source: str = "stream"):
        self.names, self.source = names, source
        self._place = {name.lower(): i for i, name in enumerate(names)}
        self._order = list(range(len(names)))

    def line(self, text: str, number: int) -> Line:
        """Read one line.

        Raises:
            UserError: not one JSON object, an unknown name, or a weight that is not a number from 0 to 1.
        """
        try:
            value = parse_json(text.removeprefix("\ufeff"))
        except ValueError as error:
            raise self._bad(number, f"is not JSON ({error}): expected one object a line") from None
        return self.record(value, number)

    def record(self, value: Any, number: int) -> Line:
        """Read one frame's object, as `line` reads its text; errors name the line `number` unless it is 0."""
        if not isinstance(value, dict):
            raise self._bad(number, f"is {type(value).__name__}, expected an object such as {{'jawOpen': 0.4}}")
        value = {k: v for k, v in value.items() if k not in IGNORED}
        neck = torch.tensor(self._numbers(value.pop("neck", [0, 0, 0]), 3, number, "neck", limit=math.pi))
        if "names" in value:
            self._order = [self._index(n, number) for n in self._list(value.pop("names"), number, "names")]
        weights = torch.zeros(len(self.names))
        if "weights" in value:
            given = self._numbers(value.pop("weights"), len(self._order), number, "weights", limit=None)
            for place, weight in zip(self._order, given, strict=True):
                weights[place] = self._weight(weight, number, self.names[place])
        for name, weight in value.items():
            weights[self._index(name, number)] = self._weight(weight, number, name)
        return Line(weights, neck)

    def _index(self, name: Any, number: int) -> int:
        place = self._place.get(str(name).lower())
        if place is None:
            close = difflib.get_close_matches(str(name).lower(), list(self._place), n=1, cutoff=0.5)
            hint = f"did you mean {self.names[self._place[close[0]]]}?" if close else f"expected {self.names[0]}, …"
            raise self._bad(number, f"names {str(name)[:40]!r}, which is no expression of this head: {hint}")
        return place

    def _weight(self, value: Any, number: int, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -SLACK <= value <= 1 + SLACK:
            raise self._bad(number, f"has {name} = {str(value)[:40]}: expected a number from 0 to 1")
        return min(max(float(value), 0.0), 1.0)

    def _numbers(self, value: Any, count: int, number: int, what: str, limit: float | None) -> list[Any]:
        values = self._list(value, number, what)
        if len(values) != count:
            raise self._bad(number, f"has {len(values)} {what}: expected {count}")
        if limit is not None and not all(isinstance(v, int | float) and abs(v) <= limit for v in values):
            raise self._bad(number, f"has a {what} that is not {count} numbers within ±{limit:.2f}")
        return [float(v) for v in values] if limit is not None else values

    def _list(self, value: Any, number: int, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._bad(number, f"has {what} that are not a list: expected [ … ]")
        return value

    def _bad(self, number: int, what: str) -> UserError:
        return UserError(f"{self.source}{f', line {number}' if number else ''}: {what}")


def require_names(names: tuple[str, ...], source: str) -> None:
    """Check that a head's expressions are ARKit's.

    Raises:
        UserError: they are not, as FLAME's coefficients.
    """
    if "jawOpen" not in names:
        raise UserError(
            f"{source} gives weights by name and the avatar's head has no names (FLAME): drive it by a clip or a "
            "video, or fit it on openhead"
        )


def read_stream(lines: Iterable[str], names: tuple[str, ...], source: str = "stream") -> Iterator[Line]:
    """Yield a stream's frames as they come; empty lines are skipped.

    Raises:
        UserError: `names` are not expressions with names, or a line is bad; the message has its number.
    """
    require_names(names, source)
    reader = Reader(names, source)
    for number, text in enumerate(lines, 1):
        if len(text) > MAX_LINE and number > 1:
            raise UserError(f"{source}, line {number}: is longer than {MAX_LINE:,} characters: expected one frame")
        if not text.strip():
            continue
        whole = _whole(text) if number == 1 else None
        if whole is None:
            yield reader.line(text, number)
            continue
        # One object with all frames: "lines" are then its frames.
        names_first = {"names": whole["names"]} if "names" in whole else {}
        for i, frame in enumerate(whole["frames"], 1):
            yield reader.record({**names_first, **frame} if isinstance(frame, dict) else frame, i)
        return


def read_stream_file(path: Path, names: tuple[str, ...]) -> list[Line]:
    """Read a whole file: a line a frame, or one object with `frames`, which may span lines.

    Raises:
        UserError: as `read_stream`, or it is missing, not text, or has no frame.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected one JSON object a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: expected one JSON object a line") from None
    whole = _whole(text) if '"frames"' in text else None
    lines = list(read_stream([text] if whole else text.splitlines(), names, str(path)))
    if not lines:
        raise UserError(f"{path} has no frames: expected one JSON object a line")
    return lines


def _whole(text: str) -> dict[str, Any] | None:
    """Return the object of a file that is one object with a list of frames, or None."""
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("frames"), list) else None
