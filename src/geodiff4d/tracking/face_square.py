"""Where the face reader looks: a square around eyes and mouth, turned with them, from whatever points a detector gives.

It hangs on the means of the eyes' and the lips' outlines alone, which every detector of ours finds well and which no
expression moves far; brows, jaw and the face's outline do not enter.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.tracking.points import EYES, LIPS
from geodiff4d.tracking.squares import HeadSquare

SIDE = 2.5
"""Side of the square over the distance from eyes to mouth, or between the eyes where that is longer."""
DOWN = 0.68
"""Where its centre is, from the eyes to the mouth, in shares of the same length."""


def shows_features(index: Int[Tensor, " points"]) -> bool:
    """Return whether points of these numbers include some of both eyes and of the lips, which the square needs."""
    return all(bool(torch.isin(index, torch.tensor(numbers)).any()) for numbers in (EYES[:16], EYES[16:], LIPS))


def face_square(points: Float[Tensor, "points 2"], index: Int[Tensor, " points"]) -> HeadSquare:
    """Return the square that the reader looks at; `index` are the points' numbers as in `tracking.points`.

    From 6 cm above the pupils' line to below an open jaw on an average face.
    """
    assert shows_features(index), "every detector that ships finds eyes and lips"
    groups = [torch.isin(index, torch.tensor(numbers)) for numbers in (EYES[:16], EYES[16:], LIPS)]
    right, left, lips = (points[group].mean(0) for group in groups)
    eyes = (right + left) / 2
    down = lips - eyes
    length = max(float(down.norm()), float((right - left).norm()), 1e-3)
    ahead = down / down.norm().clamp(min=1e-6)
    centre = eyes + DOWN * length * ahead
    # Clockwise as seen, zero where the mouth is straight below the eyes.
    roll = -math.atan2(float(ahead[0]), float(ahead[1]))
    return HeadSquare(float(centre[0]), float(centre[1]), SIDE * length, roll)
