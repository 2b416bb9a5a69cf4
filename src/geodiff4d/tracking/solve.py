"""Levenberg–Marquardt for a video: blocks per frame, chained over time, and a few unknowns shared by all frames.

The normal matrix is an arrow: frames couple only with the next two (second differences), so their part is banded and
solved by one banded Cholesky factorisation; the shared unknowns (identity, focal length) follow by their Schur
complement. Cost grows linearly with the frames, and the joint solution is exact, so no frame needs a warm start.

Bounds are kept by projection: an unknown on its bound whose gradient points outward is frozen for the step (Bertsekas
1982, projected Newton).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import cho_solve_banded, cholesky_banded
from torch import Tensor

from geodiff4d.core.workers import in_threads

Part = TypeVar("Part")


@dataclass(frozen=True)
class Unknowns:
    """The unknowns: one row per frame, and one vector shared by all frames."""

    frame: Float[Tensor, "frames unknowns"]
    shared: Float[Tensor, " shared"]


@dataclass(frozen=True)
class Normal:
    """Cost and its Gauss–Newton model around a point: J'J and J'r of the data and of priors within a frame."""

    cost: float
    frame: Float[Tensor, "frames unknowns unknowns"]
    cross: Float[Tensor, "frames unknowns shared"]
    shared: Float[Tensor, "shared shared"]
    frame_gradient: Float[Tensor, "frames unknowns"]
    shared_gradient: Float[Tensor, " shared"]


@dataclass(frozen=True)
class Limits:
    """Which unknowns are free, how smooth they are over time, and their bounds."""

    free_frame: Float[Tensor, " unknowns"]
    """1 where the unknown is solved for, else 0."""
    free_shared: Float[Tensor, " shared"]
    smoothness: Float[Tensor, " unknowns"]
    """1/σ² of the second difference over frames."""
    low: Float[Tensor, " unknowns"]
    high: Float[Tensor, " unknowns"]


def on_parts(function: Callable[[slice], Part], frames: int, most: int) -> list[Part]:
    """Call a function on parts of a film, `most` frames long at the longest, two at a time; returns what it gives."""
    count = -(-frames // most)
    size = max(1, -(-frames // (count + count % 2 if count > 1 else 1)))
    return list(in_threads(function, [slice(i, i + size) for i in range(0, frames, size)], min(2, count)))


def minimise(
    model: Callable[[Unknowns], Normal], start: Unknowns, limits: Limits, steps: int, tolerance: float = 1e-4
) -> Unknowns:
    """Minimise the model's cost plus the smoothness; returns the best point within the bounds.

    `steps` counts evaluations of the model; stops early when the cost falls by less than `tolerance` of itself.
    """
    x, damping = start, 1e-3
    at = model(x)
    cost = at.cost + _roughness(x, limits)
    for _ in range(steps):
        new = _step(x, at, limits, damping)
        tried = model(new)
        new_cost = tried.cost + _roughness(new, limits)
        if new_cost < cost:
            gain, x, at, cost, damping = (
                (cost - new_cost) / max(cost, 1e-12),
                new,
                tried,
                new_cost,
                max(damping / 5, 1e-7),
            )
            if gain < tolerance:
                break
        elif damping > 1e6:
            break
        else:
            damping *= 10
    return x


def _bends_adjoint(bends: np.ndarray, frames: int) -> np.ndarray:
    """Transpose of the second difference: gradient by frame from second differences [frames − 2, n]."""
    out = np.zeros((frames, bends.shape[1]))
    if len(bends):
        out[:-2] += bends
        out[1:-1] -= 2 * bends
        out[2:] += bends
    return out


def _bends(frame: np.ndarray) -> np.ndarray:
    return np.diff(frame, n=2, axis=0) if len(frame) > 2 else np.zeros((0, frame.shape[1]))


def _roughness(x: Unknowns, limits: Limits) -> float:
    return 0.5 * float((np.square(_bends(x.frame.numpy())) * limits.smoothness.numpy()).sum())


def _step(x: Unknowns, at: Normal, limits: Limits, damping: float) -> Unknowns:
    frames, n = x.frame.shape
    coupling = _bands(frames)
    smooth = limits.smoothness.numpy()
    X = x.frame.numpy()
    g = at.frame_gradient.numpy() + _bends_adjoint(_bends(X), frames) * smooth
    gs = at.shared_gradient.numpy()

    low, high = limits.low.numpy(), limits.high.numpy()
    outward = ((low >= X) & (g > 0)) | ((high <= X) & (g < 0))
    free = (limits.free_frame.numpy() > 0) & ~outward
    free_s = limits.free_shared.numpy() > 0

    H = at.frame.numpy() * free[:, :, None] * free[:, None, :]
    diagonal = np.arange(n)
    H[:, diagonal, diagonal] += damping * H[:, diagonal, diagonal] + np.where(free, 1e-9, 1.0)
    band = _banded(H, coupling, smooth, free)
    cross = (at.cross.numpy() * free[:, :, None] * free_s).reshape(frames * n, -1)
    S = at.shared.numpy() * free_s[:, None] * free_s
    S[np.diag_indices(len(S))] += damping * S.diagonal() + np.where(free_s, 1e-9, 1.0)

    factor = cholesky_banded(band, lower=True, overwrite_ab=True, check_finite=False)
    right = np.concatenate([(g * free).reshape(-1, 1), cross], 1)
    solved = cho_solve_banded((factor, True), right, overwrite_b=True, check_finite=False)
    y, Y = solved[:, 0], solved[:, 1:]
    ds = np.linalg.solve(S - cross.T @ Y, gs * free_s - cross.T @ y) if len(S) else gs
    dx = (y - Y @ ds).reshape(frames, n)
    moved = np.clip(X - dx, low, high)
    return Unknowns(torch.from_numpy(np.where(free, moved, X)), x.shared - torch.from_numpy(np.where(free_s, ds, 0.0)))


def _bands(frames: int) -> list[np.ndarray]:
    """Diagonals 0, 1 and 2 of D'D, one value per frame (the last ones of 1 and 2 are missing)."""
    bends = max(frames - 2, 0)
    d = [np.zeros(frames) for _ in range(3)]
    for row, value in enumerate((1.0, -2.0, 1.0)):
        d[0][row : row + bends] += value * value
    d[1][:bends] += -2.0
    d[1][1 : 1 + bends] += -2.0
    d[2][:bends] += 1.0
    return d


def _banded(H: np.ndarray, coupling: list[np.ndarray], smooth: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Lower banded storage of the block diagonal plus smoothness: row k holds the k-th subdiagonal."""
    frames, n, _ = H.shape
    reach = min(2, frames - 1)
    out = np.zeros((max(n, reach * n + 1), frames, n))
    for k in range(n):
        i = np.arange(n - k)
        out[k][:, : n - k] = H[:, i + k, i]
    out[0] += coupling[0][:, None] * smooth * free
    for step in range(1, reach + 1):
        both = free[step:] * free[:-step]
        out[step * n][:-step] += coupling[step][: frames - step, None] * smooth * both
    return out.reshape(len(out), frames * n)
