"""Expression weights from a table: the CSV that Live Link Face and others record, a row a frame.

The first row names the columns. Those that are ARKit's expressions are weights, in any order and case; an expression
that has no column is 0. `Timecode` (hours:minutes:seconds:frame, as Live Link Face counts) gives the frame rate. Turns
of head and eyes (`HeadYaw` …) are passed over: apps disagree about their signs, and gaze is among the weights.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from geodiff4d.avatar.stream import Line, Reader, require_names
from geodiff4d.core.errors import UserError

SUFFIX = ".csv"
IGNORED = re.compile(r"(timecode|time|timestamp|frame|blendshapecount|(head|lefteye|righteye)(yaw|pitch|roll))", re.I)
"""Columns that are no weights."""
EXPECTED = "expected a first row of names (Timecode, BlendshapeCount, EyeBlinkLeft, …)"
FASTEST = 240.0
"""Rates above this are no camera's [1/s]: the table's timecode means something else."""
MAX_BYTES = 256 * 1024**2


def read_csv_file(path: Path, names: tuple[str, ...]) -> tuple[list[Line], float | None]:
    """Read a table of weights for a head whose expressions are `names`; returns its frames and frames per second.

    The rate is None where the table has no timecode, or less than a whole second of it.

    Raises:
        UserError: missing, not text, no table, an unknown column, or a weight that is not a number from 0 to 1.
    """
    require_names(names, str(path))
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES:,} bytes: cut it into parts")
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return _frames(list(csv.reader(file)), names, str(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected a table of ARKit weights") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table ({error}): {EXPECTED}") from None


def _frames(rows: list[list[str]], names: tuple[str, ...], source: str) -> tuple[list[Line], float | None]:
    head = [word.strip() for word in rows[0]] if rows else []
    known = {name.lower() for name in names}
    used = {i: word for i, word in enumerate(head) if word and not IGNORED.fullmatch(word)}
    if not any(word.lower() in known for word in used.values()):
        raise UserError(f"{source} has no column of an ARKit expression: {EXPECTED}")
    twice = [word for word, n in Counter(word.lower() for word in used.values()).items() if n > 1]
    if twice:
        raise UserError(f"{source} has more than one column {twice[0]}: expected one for each expression")
    reader, lines = Reader(names, source), []
    for number, row in enumerate(rows[1:], 2):
        if not any(word.strip() for word in row):
            continue
        if len(row) != len(head):
            raise UserError(f"{source}, line {number}: has {len(row)} columns, expected {len(head)}: was it cut short?")
        lines.append(reader.record({word: _number(row[i]) for i, word in used.items()}, number))
    if not lines:
        raise UserError(f"{source} has no frames: expected a row of weights for each")
    place = next((i for i, word in enumerate(head) if word.lower() == "timecode"), None)
    return lines, None if place is None else frame_rate(row[place] for row in rows[1:] if len(row) > place)


def frame_rate(timecodes: Iterable[str]) -> float | None:
    """Return the frames per second of timecodes (hh:mm:ss:ff): how many rows most of the whole seconds have."""
    seconds = Counter(m[0] for m in (re.match(r"\d+:\d+:\d+", code.strip()) for code in timecodes) if m)
    whole = list(seconds.values())[1:-1]
    rate = float(median(whole)) if whole else 0.0
    return rate if 1 <= rate <= FASTEST else None


def _number(text: str) -> float | str:
    """Return a number, or the text that is none, which the reader names."""
    try:
        return float(text)
    except ValueError:
        return text
