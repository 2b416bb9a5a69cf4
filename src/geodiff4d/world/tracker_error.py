"""Errors drawn at random: a tracker's, which stands in for tracking images of the open world from their pixels."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from geodiff4d.heads.rig import HeadParams
from geodiff4d.world.seeds import generator

DISTURBANCE = {"rotation": np.radians(1.0), "translation": 0.002, "jaw_pose": np.radians(2.0), "expr": 0.1}
"""Stationary standard deviation per coordinate: radians, metres, radians, ARKit weight."""
MEMORY = 0.9
"""AR(1) coefficient of the error from frame to frame."""


def disturbed(params: HeadParams, seed: int) -> HeadParams:
    """Add a tracker's error to a sequence of true parameters: AR(1) over the first axis, stationary from its start.

    Rotation 1°, translation 2 mm, jaw 2° and expression 0.1 (clipped to [0, 1]) are standard deviations per coordinate.

    Example:
        >>> noisy = disturbed(subject.params(expr), seed=0)  # doctest: +SKIP
    """
    changed = {}
    for name, sigma in DISTURBANCE.items():
        value = getattr(params, name)
        noisy = value + torch.from_numpy(sigma * _drift(tuple(value.shape), generator("disturbed", seed, name))).to(
            value
        )
        changed[name] = noisy.clamp(0, 1) if name == "expr" else noisy
    return replace(params, **changed)


def moved_as_tracked(tracked: HeadParams, motion: HeadParams, seed: int, temporal: bool = False) -> HeadParams:
    """Give tracked heads the expression, jaw and gaze that a tracker would find in their driver: shrunk and noisy.

    Where instants follow each other (`temporal`), the gain is one for all and the error drifts, and jitters a bit.
    """
    rng = generator("readout", "track", seed) if temporal else generator("readout", seed)

    def noisy(x: Tensor, sigma: float) -> Tensor:
        shape = tuple(x.shape)
        if temporal:
            error = sigma * (_drift(shape, rng) + 0.4 * rng.normal(size=shape))
            return x * rng.uniform(0.75, 1.1) + torch.from_numpy(error).to(x)
        gain = rng.uniform(0.75, 1.1, (len(x), 1))
        return x * torch.from_numpy(gain).to(x) + torch.from_numpy(rng.normal(0, sigma, shape)).to(x)

    expr = noisy(motion.expr, 0.04).clamp(0, 1)
    jaw, gaze = (noisy(x, np.deg2rad(s)) for x, s in ((motion.jaw_pose, 0.7), (motion.eyes_pose, 2.0)))
    return replace(tracked.without_expression(), expr=expr, jaw_pose=jaw, eyes_pose=gaze)


def _drift(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw an AR(1) process of unit deviation over the first axis, stationary from its start."""
    shocks = rng.normal(size=shape)
    error = np.empty_like(shocks)
    for t in range(len(shocks)):
        error[t] = shocks[t] if t == 0 else MEMORY * error[t - 1] + (1 - MEMORY**2) ** 0.5 * shocks[t]
    return error
