"""Cuts in a film: where one shot ends and another begins, found in frames as they pass.

A film with cuts shows other people, or the same from elsewhere: one head before one camera fits none of that. The
tracker keeps one shot (`longest`) and says which frames it left out.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

SIDE = (18, 32)
"""Rows and columns that frames are compared at."""
LEAST, OVER = 0.055, 4.0
"""A cut changes at least this much of an image [mean absolute difference, 0 to 1, without changes of brightness], and
this many times the median of the frames around it: a head that moves, or a camera that pans, does so for longer."""
AROUND = 12
"""Frames before and after whose changes are compared."""


class Shots:
    """Watches the frames of a film.

    Example:
        >>> shots = Shots()
        >>> for frame in shots.watched(frames): ...  # doctest: +SKIP
        >>> shots.spans()  # doctest: +SKIP
        [(0, 34), (34, 90)]
    """

    def __init__(self) -> None:
        self._small: list[Tensor] = []

    def watched(
        self, frames: Iterable[Float[Tensor, "3 _height _width"]]
    ) -> Iterator[Float[Tensor, "3 _height _width"]]:
        """Pass frames on, and remember a few pixels of each."""
        for frame in frames:
            small = interpolate(frame[None], SIDE, mode="area")[0]
            self._small.append(small - small.mean())
            yield frame

    def spans(self) -> list[tuple[int, int]]:
        """Return first and last frame of each shot, the last not included."""
        cuts = [0, *self._cuts(), len(self._small)]
        return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]

    def _cuts(self) -> list[int]:
        x = torch.stack(self._small) if self._small else torch.zeros(0, 3, *SIDE)
        if len(x) < 2:
            return []
        change = (x[1:] - x[:-1]).abs().mean((1, 2, 3))
        cuts = []
        for t in range(1, len(x)):
            k = t - 1
            near = torch.cat([change[max(k - AROUND, 0) : k], change[k + 1 : k + 1 + AROUND]])
            usual = float(near.median()) if len(near) else 0.0
            if float(change[k]) < max(LEAST, OVER * usual):
                continue
            # A flash comes and goes: the frame after it is like the one before.
            if t + 1 < len(x) and float((x[t + 1] - x[t - 1]).abs().mean()) < 0.5 * float(change[k]):
                continue
            if t > 1 and cuts[-1:] != [t - 1] and float((x[t] - x[t - 2]).abs().mean()) < 0.5 * float(change[k]):
                continue
            cuts.append(t)
        return cuts


def longest(spans: Sequence[tuple[int, int]], detections: Sequence[Any]) -> tuple[int, int]:
    """Return the shot with the most frames in which a face was found, the first of equals."""
    return max(spans, key=lambda s: (sum(d is not None for d in detections[s[0] : s[1]]), -s[0]))
