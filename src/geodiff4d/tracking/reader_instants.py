"""What the face reader is shown: single instants of expressions, lids, gaze, head poses and cameras.

Consecutive frames of a performance resemble each other and are half of the time nearly neutral, so nothing here is a
sequence. Every action is drawn alone and at its extremes as well as together with others, because a network learns
little of what is rare.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.render.viewpoints import orbit
from geodiff4d.world.expressions import (
    ACTIONS,
    EMOTIONS,
    INDEX,
    MAX_PITCH_RAD,
    MAX_YAW_RAD,
    VISEMES,
    pose_of,
    random_expression,
)

SIDES = ("Left", "Right")
WHOLE = ("jawLeft", "jawRight", "mouthLeft", "mouthRight")
"""Actions that are named after a direction and not after a side."""
GROUPS: tuple[str, ...] = tuple(
    dict.fromkeys(
        name if name in WHOLE else name.removesuffix("Left").removesuffix("Right")
        for name in ACTIONS
        if "eyeLook" not in name
    )
)
"""Actions without their sides; the look actions are left out, since the eye joints turn the eyes."""
GAZE_REACH = 1.15
"""How far beyond the open world's own limits eyes are turned."""
AZIMUTH_DEG, ELEVATION_DEG = 50.0, 25.0


def draw_expressions(rng: np.random.Generator, n: int) -> Float[Tensor, "n 52"]:
    """Return independent expressions in [0, 1], without what gaze does to the lids."""
    kinds: tuple[tuple[float, Callable[[np.random.Generator], np.ndarray]], ...] = (
        (0.06, lambda r: np.zeros(len(ACTIONS))), (0.24, _alone), (0.26, _sparse), (0.17, _viseme), (0.12, _emotion),
        (0.15, _subtle),
    )  # fmt: skip
    share = np.array([p for p, _ in kinds])
    drawn = [kinds[k][1](rng) for k in rng.choice(len(kinds), n, p=share / share.sum())]
    return torch.from_numpy(np.stack([_overlaid(x, rng) for x in drawn]).astype(np.float32))


def _paired(name: str, value: float, rng: np.random.Generator, one_sided: float = 0.3) -> dict[str, float]:
    """Give an action of `GROUPS` a value; one that has sides moves one alone with some probability."""
    if name in INDEX:
        return {name: value}
    sides = (SIDES[rng.integers(2)],) if rng.random() < one_sided else SIDES
    return {f"{name}{s}": float(np.clip(value * rng.uniform(0.85, 1.15), 0, 1)) for s in sides}


def _alone(rng: np.random.Generator) -> np.ndarray:
    values = _paired(str(rng.choice(GROUPS)), rng.uniform(0.3, 1), rng)
    if "mouthClose" in values:
        values["jawOpen"] = min(1.0, values["mouthClose"] * rng.uniform(1.0, 1.4))
    if "tongueOut" in values:
        values["jawOpen"] = rng.uniform(0.15, 0.7)
    return pose_of(values)


def _sparse(rng: np.random.Generator) -> np.ndarray:
    return random_expression(int(rng.integers(1 << 31)), 1)[0][0].numpy().astype(np.float64)


def _viseme(rng: np.random.Generator) -> np.ndarray:
    a, b = (pose_of(VISEMES[k]) * rng.uniform(0.4, 1.4) for k in rng.integers(len(VISEMES), size=2))
    blend = rng.uniform(0, 1) if rng.random() < 0.4 else 0.0
    return a * (1 - blend) + b * blend


def _emotion(rng: np.random.Generator) -> np.ndarray:
    return pose_of(EMOTIONS[rng.integers(len(EMOTIONS))]) * rng.uniform(0.25, 1.2)


def _subtle(rng: np.random.Generator) -> np.ndarray:
    """Many small actions at once, as a face at rest or in thought has."""
    values: dict[str, float] = {}
    for name in GROUPS:
        if name not in ("mouthClose", "tongueOut") and rng.random() < 0.25:
            values |= _paired(name, float(np.clip(abs(rng.normal(0, 0.16)), 0, 0.5)), rng)
    return pose_of(values)


def _overlaid(expr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add lids, brows and an open jaw independently of what the rest of the face does."""
    values: dict[str, float] = {}
    if rng.random() < 0.24:
        shut = 1.0 if rng.random() < 0.3 else rng.uniform(0.2, 1)
        values |= _paired("eyeBlink", shut, rng, one_sided=0.25)
    elif rng.random() < 0.2:
        values |= _paired(str(rng.choice(["eyeWide", "eyeSquint"])), rng.uniform(0.25, 1), rng, one_sided=0.15)
    if rng.random() < 0.25:
        values |= _paired(str(rng.choice(["browDown", "browInnerUp", "browOuterUp"])), rng.uniform(0.2, 1), rng)
    if rng.random() < 0.1:
        values["jawOpen"] = rng.uniform(0.15, 0.9)
    out = np.clip(np.maximum(expr, pose_of(values)), 0, 1)
    # The eye joints turn the eyes: look actions would move the lids twice.
    out[[INDEX[name] for name in ACTIONS if "eyeLook" in name]] = 0
    return out


def draw_gaze(rng: np.random.Generator, to_camera: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2 2"]:
    """Return both eyes' (yaw to the person's left, pitch up) [rad] in the head: anywhere, at the camera, or ahead.

    `to_camera` are the angles at which the head sees the camera.
    """
    n = len(to_camera)
    limit = GAZE_REACH * np.array([MAX_YAW_RAD, MAX_PITCH_RAD])
    compass = rng.integers(8, size=n) * np.pi / 4
    eight = np.stack([np.cos(compass), np.sin(compass)], 1) * rng.uniform(0.5, 1, (n, 1)) * limit
    kind = rng.random(n)[:, None]
    gaze = np.where(kind < 0.45, rng.uniform(-1, 1, (n, 2)) * limit, eight)
    gaze = np.where(kind > 0.65, to_camera.numpy() + rng.normal(0, 0.03, (n, 2)), gaze)
    gaze = np.where(kind > 0.88, rng.normal(0, 0.05, (n, 2)), gaze)
    gaze = np.clip(gaze, -limit, limit)
    # Near things make eyes converge, and some eyes do not agree exactly.
    inward = np.abs(rng.normal(0, 0.035, n)) * (rng.random(n) < 0.5)
    both = np.stack([gaze, gaze], 1) + rng.normal(0, 0.01, (n, 2, 2))
    both[:, 0, 0] -= inward
    both[:, 1, 0] += inward
    return torch.from_numpy(both.astype(np.float32))


def follow_gaze(
    expr: Float[Tensor, "n 52"], gaze: Float[Tensor, "n 2 2"], rng: np.random.Generator
) -> Float[Tensor, "n 52"]:
    """Let the lids go along with the eyes: lower when those look down, wider when they look up."""
    expr, n = expr.clone(), len(expr)
    pitch = gaze.mean(1)[:, 1] / MAX_PITCH_RAD
    down = (-pitch).clamp(0, 1) * torch.from_numpy(rng.uniform(0.25, 0.5, n)).float()
    up = pitch.clamp(0, 1) * torch.from_numpy(rng.uniform(0.1, 0.35, n)).float()
    for side in SIDES:
        for name, least in (("eyeBlink", down), ("eyeWide", up)):
            k = INDEX[f"{name}{side}"]
            expr[:, k] = torch.maximum(expr[:, k], least)
    return expr


def draw_head_turns(rng: np.random.Generator, n: int) -> Float[Tensor, "2 n 3"]:
    """Return small rotations of the whole body and of the neck, axis-angle [rad]; cameras have most of the turn."""
    return torch.from_numpy(np.deg2rad(rng.normal(0, 1, (2, n, 3)) * np.array([5.0, 6.0, 4.0])).astype(np.float32))


def draw_cameras(rng: np.random.Generator, n: int, size: int) -> Camera:
    """Return cameras around the head: half nearly frontal, the others to ±50° and ±25°, 0.4 to 2.5 m away."""
    turned, tilted = rng.random(n) < 0.55, rng.random(n) < 0.5
    azimuth = np.where(turned, rng.uniform(-1, 1, n) * AZIMUTH_DEG, rng.normal(0, 9, n))
    elevation = np.where(tilted, rng.uniform(-1, 1, n) * ELEVATION_DEG, rng.normal(0, 7, n))
    distance = np.exp(rng.uniform(np.log(0.4), np.log(2.5), n))
    angles = [torch.from_numpy(x.astype(np.float32)) for x in (azimuth, elevation)]
    return Camera.stack(
        [orbit(angles[0][i : i + 1], angles[1][i : i + 1], size, float(distance[i]))[0] for i in range(n)]
    )
