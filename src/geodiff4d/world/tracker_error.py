"""The error of a tracker, drawn at random: it stands in for tracking pictures of the open world from their pixels."""

from dataclasses import replace

import numpy as np
import torch

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
        rng = generator("disturbed", seed, name)
        shocks = rng.normal(size=tuple(value.shape))
        error = np.empty_like(shocks)
        for t in range(len(shocks)):
            error[t] = shocks[t] if t == 0 else MEMORY * error[t - 1] + (1 - MEMORY**2) ** 0.5 * shocks[t]
        noisy = value + torch.from_numpy(sigma * error).to(value)
        changed[name] = noisy.clamp(0, 1) if name == "expr" else noisy
    return replace(params, **changed)
