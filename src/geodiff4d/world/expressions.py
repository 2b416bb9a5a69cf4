"""Expressions over time: speech, emotions, blinks, gaze, tongue, extremes, head turns, and a mix of them.

Tracks are sums of eased events (an action rises, holds and falls) over a little smooth noise, so they are plausible and
smooth by construction. The eyes turn by the eye joints; the look actions only move the lids along.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from geodiff4d.world.seeds import generator

TrackKind = Literal["speech", "emotions", "blinks", "gaze", "tongue", "extremes", "turns", "mixed"]
TRACK_KINDS: tuple[TrackKind, ...] = ("speech", "emotions", "blinks", "gaze", "tongue", "extremes", "turns", "mixed")
Motion = tuple[Float[Tensor, "frames 52"], Float[Tensor, "frames 3"], Float[Tensor, "frames 6"]]

_PAIRED = (
    "browDown", "browOuterUp", "cheekSquint", "eyeBlink", "eyeLookDown", "eyeLookIn", "eyeLookOut", "eyeLookUp",
    "eyeSquint", "eyeWide", "mouthDimple", "mouthFrown", "mouthLowerDown", "mouthPress", "mouthSmile", "mouthStretch",
    "mouthUpperUp", "noseSneer",
)  # fmt: skip
_SINGLE = (
    "browInnerUp", "cheekPuff", "jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose", "mouthFunnel",
    "mouthLeft", "mouthPucker", "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower",
    "mouthShrugUpper", "tongueOut",
)  # fmt: skip
ACTIONS: tuple[str, ...] = tuple(sorted([*_SINGLE, *(f"{p}{s}" for p in _PAIRED for s in ("Left", "Right"))]))
"""The 52 ARKit actions in alphabetical order: OpenHead's expression basis."""
INDEX = {name: i for i, name in enumerate(ACTIONS)}

MAX_YAW_RAD, MAX_PITCH_RAD = 0.5, 0.35
"""Farthest gaze: 29° sideways, 20° up and down."""

VISEMES: tuple[dict[str, float], ...] = (
    {"jawOpen": 0.55, "mouthLowerDown": 0.25, "mouthUpperUp": 0.15},  # a
    {"jawOpen": 0.3, "mouthStretch": 0.35, "mouthSmile": 0.25, "mouthLowerDown": 0.2},  # e
    {"jawOpen": 0.12, "mouthStretch": 0.45, "mouthSmile": 0.35, "mouthLowerDown": 0.25},  # i
    {"jawOpen": 0.35, "mouthFunnel": 0.65, "mouthPucker": 0.2},  # o
    {"jawOpen": 0.12, "mouthPucker": 0.75, "mouthFunnel": 0.3},  # u
    {"mouthPress": 0.6, "mouthRollLower": 0.45, "mouthRollUpper": 0.35},  # m b p
    {"jawOpen": 0.08, "mouthRollLower": 0.6, "mouthUpperUp": 0.25},  # f v
    {"jawOpen": 0.2, "mouthFunnel": 0.45, "mouthUpperUp": 0.2, "mouthLowerDown": 0.2},  # sh
    {"jawOpen": 0.25, "mouthLowerDown": 0.35, "mouthUpperUp": 0.2},  # l n t
    {"jawOpen": 0.12, "mouthStretch": 0.25, "mouthDimple": 0.25},  # s
)
EMOTIONS: tuple[dict[str, float], ...] = (
    {"mouthSmile": 0.85, "cheekSquint": 0.55, "eyeSquint": 0.25, "mouthDimple": 0.2},
    {
        "mouthSmile": 0.95,
        "jawOpen": 0.4,
        "cheekSquint": 0.75,
        "eyeSquint": 0.5,
        "mouthUpperUp": 0.45,
        "browOuterUp": 0.2,
    },
    {"mouthFrown": 0.75, "browInnerUp": 0.75, "mouthShrugLower": 0.4, "eyeLookDown": 0.3, "eyeSquint": 0.15},
    {"browDown": 0.9, "noseSneer": 0.45, "eyeSquint": 0.4, "mouthPress": 0.5, "mouthFrown": 0.3},
    {"browDown": 0.8, "noseSneer": 0.6, "mouthUpperUp": 0.6, "mouthLowerDown": 0.6, "jawOpen": 0.3, "eyeWide": 0.3},
    {"browInnerUp": 0.85, "browOuterUp": 0.85, "eyeWide": 0.7, "jawOpen": 0.6, "mouthFunnel": 0.25},
    {"noseSneer": 0.9, "mouthUpperUp": 0.6, "browDown": 0.45, "eyeSquint": 0.5, "mouthFrown": 0.35},
    {"browInnerUp": 0.85, "eyeWide": 0.8, "mouthStretch": 0.7, "jawOpen": 0.25, "mouthLowerDown": 0.3},
    {"mouthSmileLeft": 0.65, "mouthDimpleLeft": 0.5, "eyeSquintLeft": 0.3, "browOuterUpRight": 0.3},
    {"mouthPucker": 0.9, "eyeSquint": 0.2, "browInnerUp": 0.25},
    {"cheekPuff": 0.9, "mouthPress": 0.4, "browInnerUp": 0.2},
)


def pose_of(values: dict[str, float]) -> np.ndarray:
    """Turn {action: weight} into 52 weights; a paired name without its side moves both."""
    out = np.zeros(len(ACTIONS))
    for name, value in values.items():
        for full in (name,) if name in INDEX else (f"{name}Left", f"{name}Right"):
            out[INDEX[full]] = max(out[INDEX[full]], value)
    return out


def held(poses: Sequence[dict[str, float]], gaze: Sequence[tuple[float, float]]) -> Motion:
    """Return single instants: {action: weight} as in `pose_of`, and gaze (to the person's left, up) [rad]."""
    expr = np.stack([pose_of(p) for p in poses])
    return _finish(expr, np.zeros((len(expr), 3)), np.array(gaze, dtype=np.float64))


def random_expression(seed: int, n: int) -> Motion:
    """Draw independent expressions for training: (expr, jaw_pose [rad], eyes_pose [rad]).

    Balanced over mouth, brows, lids, cheeks, nose, tongue and gaze; a quarter of the paired actions is one-sided, about
    one in twelve expressions is nearly neutral.
    """
    rng = generator("expressions", seed)
    expr, gaze = np.zeros((n, len(ACTIONS))), np.zeros((n, 2))
    for i in range(n):
        if rng.random() < 0.08:
            continue
        expr[i] = _draw(rng)
        if rng.random() < 0.5:
            gaze[i] = rng.uniform(-1, 1, 2) * (MAX_YAW_RAD, MAX_PITCH_RAD)
    jaw = np.radians(rng.normal(0, 1.5, (n, 3)) * (1.0, 0.6, 0.3))
    return _finish(expr, jaw, gaze)


def expression_track(kind: TrackKind, frames: int, seed: int, fps: float = 24.0) -> Motion:
    """Make a smooth track: (expr in [0, 1], jaw_pose [rad], eyes_pose [rad]), starting near neutral.

    Example:
        >>> expr, jaw_pose, eyes_pose = expression_track("speech", 48, seed=0)
        >>> expr.shape
        torch.Size([48, 52])
    """
    rng = generator("track", kind, seed)
    # A quarter of a second more at the start lets every filter settle.
    expr, gaze = _mixed(frames, rng, fps) if kind == "mixed" else _KINDS[kind](frames, rng, fps)
    jaw = _noise(frames, 3, rng, fps * 0.4) * np.radians([1.2, 0.8, 0.4])
    return _finish(np.clip(expr, 0, 1), jaw, gaze)


def head_track(kind: TrackKind, frames: int, seed: int, fps: float = 24.0) -> Float[Tensor, "frames 3"]:
    """Make smooth rotations of the head [rad]: small movements, and for "turns" as far as people turn on a portrait.

    Turns reach about 35° sideways, 20° up and down and 15° of tilt, from one pose to the next with pauses.
    """
    rng = generator("head", kind, seed)
    t = np.arange(frames)[:, None] / fps
    wobble = np.sin(t * rng.uniform(0.5, 2.5, 3) + rng.uniform(0, 6, 3)) * np.radians([4.0, 7.0, 2.5])
    if kind == "turns":
        target, start = np.zeros((frames, 3)), int(rng.uniform(0.1, 0.4) * fps)
        while start < frames:
            target[start:] = np.clip(rng.normal(0, [9.0, 18.0, 6.0]), [-20, -35, -15], [20, 35, 15])
            start += max(4, int(fps * rng.uniform(0.4, 1.3)))
        wobble = 0.3 * wobble + np.radians(gaussian_filter1d(target, 0.17 * fps, axis=0, mode="nearest"))
    return torch.from_numpy(wobble.astype(np.float32))


def _finish(expr: np.ndarray, jaw: np.ndarray, gaze: np.ndarray) -> Motion:
    """Let the lids follow the gaze and turn gaze (yaw to the person's left, pitch up) into eye joints."""
    yaw, pitch = gaze[:, 0], gaze[:, 1]
    down, up = np.clip(-pitch / MAX_PITCH_RAD, 0, 1), np.clip(pitch / MAX_PITCH_RAD, 0, 1)
    expr = expr.copy()
    for side in ("Left", "Right"):
        expr[:, INDEX[f"eyeBlink{side}"]] = np.maximum(expr[:, INDEX[f"eyeBlink{side}"]], 0.4 * down)
        expr[:, INDEX[f"eyeWide{side}"]] = np.maximum(expr[:, INDEX[f"eyeWide{side}"]], 0.3 * up)
        # The joints turn the eyeballs: look actions would turn them twice.
        for look in ("Down", "In", "Out", "Up"):
            expr[:, INDEX[f"eyeLook{look}{side}"]] = 0
    eyes = np.stack([-pitch, yaw, np.zeros_like(yaw)] * 2, -1)
    to_tensor = lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))  # noqa: E731
    return to_tensor(np.clip(expr, 0, 1)), to_tensor(jaw), to_tensor(eyes)


def _draw(rng: np.random.Generator) -> np.ndarray:
    """Draw one expression: a mouth shape, and brows, lids, cheeks and nose each with some probability."""
    values: dict[str, float] = {}

    def add(p: float, *names: str, low: float = 0.25) -> None:
        if rng.random() >= p:
            return
        name, value = str(rng.choice(names)), rng.uniform(low, 1)
        if name in INDEX:
            values[name] = value
        else:
            side = rng.random()
            sides = ("Left",) if side < 0.125 else ("Right",) if side < 0.25 else ("Left", "Right")
            values.update({f"{name}{s}": float(np.clip(value * rng.uniform(0.85, 1.15), 0, 1)) for s in sides})

    if rng.random() < 0.2:
        return np.clip(pose_of(EMOTIONS[rng.integers(len(EMOTIONS))]) * rng.uniform(0.4, 1.15), 0, 1)
    add(0.45, "jawOpen", low=0.1)
    add(
        0.7,
        "mouthSmile",
        "mouthSmile",
        "mouthFrown",
        "mouthPucker",
        "mouthFunnel",
        "mouthStretch",
        "mouthDimple",
        "cheekPuff",
    )
    add(
        0.45,
        "mouthUpperUp",
        "mouthLowerDown",
        "mouthPress",
        "mouthRollLower",
        "mouthRollUpper",
        "mouthShrugLower",
        "mouthShrugUpper",
    )
    add(0.22, "mouthLeft", "mouthRight", "jawLeft", "jawRight", "jawForward")
    add(0.5, "browDown", "browInnerUp", "browOuterUp")
    add(0.35, "eyeBlink", "eyeSquint", "eyeWide")
    add(0.15, "eyeBlink", low=0.8)
    add(0.3, "noseSneer", "cheekSquint")
    if rng.random() < 0.1:
        values |= {"tongueOut": rng.uniform(0.4, 1), "jawOpen": max(values.get("jawOpen", 0), rng.uniform(0.3, 0.7))}
    if "jawOpen" in values and rng.random() < 0.15:
        values["mouthClose"] = values["jawOpen"] * rng.uniform(0.5, 0.9)
    return pose_of(values)


def _noise(frames: int, channels: int, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Smooth noise of unit standard deviation, [frames, channels]."""
    pad = int(4 * sigma) + 1
    x = gaussian_filter1d(rng.normal(size=(frames + 2 * pad, channels)), sigma, axis=0)[pad:-pad]
    return x * np.sqrt(2 * sigma * np.sqrt(np.pi))


def _bump(frames: int, start: float, rise: float, hold: float, fall: float) -> np.ndarray:
    """An eased event in frames: 0 before `start`, 1 during the hold, 0 after."""
    t = np.arange(frames) - start
    x = np.clip(np.minimum(t / rise, (rise + hold + fall - t) / fall), 0, 1)
    return x * x * (3 - 2 * x)


def _events(
    frames: int, rng: np.random.Generator, fps: float, gap: float, hold: float, ease: float,
    draw: Callable[[np.random.Generator], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Add eased poses from `draw(rng)` one after another, `gap` and `hold` seconds on average."""
    out = np.zeros((frames, len(ACTIONS)))
    start = rng.uniform(0.1, 0.6) * gap * fps
    while start < frames:
        rise, length, fall = (max(2.5, s * fps * rng.uniform(0.6, 1.4)) for s in (ease, hold, ease * 1.3))
        out = np.maximum(out, _bump(frames, start, rise, length, fall)[:, None] * draw(rng))
        start += rise + length + fall * rng.uniform(0.5, 1) + gap * fps * rng.uniform(0.3, 1.7)
    return out


def _with_blinks(expr: np.ndarray, rng: np.random.Generator, fps: float, gap: float = 2.8) -> np.ndarray:
    return np.maximum(
        expr, _events(len(expr), rng, fps, gap, 0.04, 0.11, lambda r: pose_of({"eyeBlink": r.uniform(0.9, 1.0)}))
    )


def _idle_gaze(frames: int, rng: np.random.Generator, fps: float, amount: float = 0.25, gap: float = 1.4) -> np.ndarray:
    """Saccades between fixations, [frames, (yaw, pitch)] in radians."""
    target, t = np.zeros((frames, 2)), int(rng.uniform(0.2, 1) * gap * fps)
    while t < frames:
        target[t:] = np.clip(rng.normal(0, amount, 2), -1, 1)
        t += max(3, int(gap * fps * rng.uniform(0.4, 1.6)))
    return gaussian_filter1d(target, max(1.0, 0.05 * fps), axis=0, mode="nearest") * (MAX_YAW_RAD, MAX_PITCH_RAD)


def _speech(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    expr, t = np.zeros((frames, len(ACTIONS))), rng.uniform(0.05, 0.25) * fps
    while t < frames:
        syllables = int(rng.integers(4, 14))
        for _ in range(syllables):
            length = fps * rng.uniform(0.15, 0.3)
            pose = pose_of(VISEMES[rng.integers(len(VISEMES))]) * rng.uniform(0.6, 1.3)
            expr = np.maximum(
                expr, _bump(frames, t, max(2.5, length * 0.55), length * 0.15, max(2.5, length * 0.6))[:, None] * pose
            )
            t += length
        t += fps * rng.uniform(0.1, 0.7)
    brows = _events(
        frames,
        rng,
        fps,
        1.2,
        0.3,
        0.2,
        lambda r: pose_of({"browInnerUp": r.uniform(0.1, 0.6), "browOuterUp": r.uniform(0, 0.5)}),
    )
    return _with_blinks(np.maximum(expr, brows), rng, fps), _idle_gaze(frames, rng, fps, 0.15)


def _emotions(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    expr = _events(
        frames, rng, fps, 0.25, 0.7, 0.35, lambda r: pose_of(EMOTIONS[r.integers(len(EMOTIONS))]) * r.uniform(0.6, 1.1)
    )
    return _with_blinks(expr, rng, fps), _idle_gaze(frames, rng, fps, 0.2)


def _blinks(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    poses = (
        {"eyeBlink": 1.0},
        {"eyeBlink": 0.6},
        {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.4},
        {"eyeBlinkRight": 1.0, "cheekSquintRight": 0.4},
        {"eyeWide": 0.8, "browOuterUp": 0.5},
        {"eyeSquint": 0.8, "browDown": 0.4},
    )
    expr = _events(frames, rng, fps, 0.3, 0.15, 0.14, lambda r: pose_of(poses[r.integers(len(poses))]))
    return _with_blinks(expr, rng, fps, gap=1.0), _idle_gaze(frames, rng, fps, 0.15)


def _gaze(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    expr = (
        0.08
        * np.abs(_noise(frames, len(ACTIONS), rng, fps * 0.5))
        * pose_of({"browInnerUp": 1, "mouthSmile": 1, "browOuterUp": 1})
    )
    return _with_blinks(expr, rng, fps), _idle_gaze(frames, rng, fps, 0.7, gap=0.7)


def _tongue(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    def draw(r: np.random.Generator) -> np.ndarray:
        return pose_of(
            {"tongueOut": r.uniform(0.5, 1), "jawOpen": r.uniform(0.3, 0.7), "mouthLowerDown": r.uniform(0, 0.3)}
        )

    return _with_blinks(_events(frames, rng, fps, 0.4, 0.5, 0.3, draw), rng, fps), _idle_gaze(frames, rng, fps, 0.2)


def _extremes(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    expr = _events(frames, rng, fps, 0.2, 0.4, 0.3, lambda r: np.clip(_draw(r) * 1.2, 0, 1))
    return expr, _idle_gaze(frames, rng, fps, 0.5)


def _mixed(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """Crossfade random kinds, two to four seconds (or a third of a short track) each."""
    expr, gaze = np.zeros((frames, len(ACTIONS))), np.zeros((frames, 2))
    order = list(rng.permutation([k for k in TRACK_KINDS if k != "mixed"]))
    length = min(3.0 * fps, max(frames / 3, 8))
    start, i = 0.0, 0
    while start < frames:
        weight = _bump(frames, start - length * 0.15, length * 0.3, length * 0.7, length * 0.3)[:, None]
        one_expr, one_gaze = _KINDS[str(order[i % len(order)])](frames, rng, fps)
        expr, gaze = expr + weight * one_expr, gaze + weight * one_gaze
        start, i = start + length, i + 1
    return expr, gaze


def _turns(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """A calm face: `head_track` has what moves."""
    expr = _events(frames, rng, fps, 1.0, 0.5, 0.3, lambda r: np.clip(_draw(r) * r.uniform(0.2, 0.7), 0, 1))
    return _with_blinks(expr, rng, fps), _idle_gaze(frames, rng, fps, 0.35)


_KINDS = {
    "turns": _turns,
    "speech": _speech,
    "emotions": _emotions,
    "blinks": _blinks,
    "gaze": _gaze,
    "tongue": _tongue,
    "extremes": _extremes,
}
