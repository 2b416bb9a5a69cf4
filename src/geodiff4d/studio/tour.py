"""What an avatar of the range of motion shows: a slow tour of single expressions, as weights over time.

Such an avatar was fitted to instants that do not follow each other; played one after the other they would flicker.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

FPS = 24
MOVE_S, HOLD_S = 0.45, 0.35
"""Time between two expressions, and at each [s]."""


def both(name: str, weight: float) -> dict[str, float]:
    """Return the weight for both sides of the face."""
    return {f"{name}Left": weight, f"{name}Right": weight}


STOPS: tuple[dict[str, float], ...] = (
    {}, both("mouthSmile", 0.8), {}, {"jawOpen": 0.5}, {"jawOpen": 0.15, "mouthFunnel": 0.5}, {"mouthPucker": 0.7}, {},
    both("eyeBlink", 1.0), {}, {"browInnerUp": 0.8, **both("browOuterUp", 0.8), **both("eyeWide", 0.5)}, {},
    {**both("browDown", 0.8), **both("eyeSquint", 0.5)}, {}, {"eyeLookOutLeft": 0.7, "eyeLookInRight": 0.7},
    {"eyeLookInLeft": 0.7, "eyeLookOutRight": 0.7}, both("eyeLookUp", 0.5), {}, both("mouthFrown", 0.6), {},
    {**both("mouthSmile", 0.6), "eyeBlinkRight": 1.0}, {"jawOpen": 0.25, **both("mouthSmile", 0.7)}, {},
)  # fmt: skip
"""The expressions of the tour, by ARKit's names; it ends as it begins."""


def tour() -> list[dict[str, Any]]:
    """Return each frame at `FPS` frames a second, as a line of a stream of weights: those that are not named are 0."""
    frames: list[dict[str, Any]] = []
    for before, after in pairwise(STOPS):
        for i in range(round((MOVE_S + HOLD_S) * FPS)):
            share = 0.5 - 0.5 * math.cos(math.pi * min(1.0, i / (MOVE_S * FPS)))
            names = {**before, **after}
            weights = {n: (1 - share) * before.get(n, 0.0) + share * after.get(n, 0.0) for n in names}
            # Somebody who turns a little while doing so: radians about x and y.
            t = len(frames) / FPS
            neck = [round(0.03 * math.sin(0.9 * t), 4), round(0.08 * math.sin(0.6 * t), 4), 0.0]
            frames.append({**{n: round(w, 4) for n, w in weights.items() if w > 1e-4}, "neck": neck})
    return frames


def write_tour(path: Path) -> None:
    """Write the tour as a stream of weights, one JSON object a line."""
    from geodiff4d.core.files import fresh_file

    with fresh_file(path) as temporary:
        temporary.write_text("".join(json.dumps(frame) + "\n" for frame in tour()))
