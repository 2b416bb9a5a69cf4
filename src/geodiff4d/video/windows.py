"""Long clips by overlapping windows of frames (Sec. 4.2: the model knows 16 frames at a time)."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from geodiff4d.core.camera import Camera


def plan_windows(runs: Sequence[int], size: int, overlap: int = 0) -> list[slice]:
    """Cover every run of frames by windows of at most `size` that share `overlap` frames with their neighbours.

    No window crosses from one run into the next. With an overlap the last window is moved back to be full, so that
    every frame has as much company as there is; without, it is shorter.

    Args:
        runs: lengths of consecutive runs of frames that belong together in time.

    Example:
        >>> plan_windows([20, 3], 16, 4)
        [slice(0, 16, None), slice(4, 20, None), slice(20, 23, None)]
    """
    if not 0 <= overlap < size:
        raise ValueError(f"windows of {size} frames cannot overlap by {overlap}")
    windows: list[slice] = []
    first = 0
    for length in runs:
        end = first + length
        for start in range(first, max(end - overlap, first + 1), size - overlap):
            stop = min(start + size, end)
            windows.append(slice(max(first, stop - size) if overlap else start, stop))
        first = end
    return windows


def runs_of(cameras: Camera) -> list[int]:
    """Split a clip where its camera changes: each view is a video of its own."""
    T, K = cameras.T_cam_world, cameras.K
    same = (T[1:] == T[:-1]).flatten(1).all(1) & (K[1:] == K[:-1]).flatten(1).all(1)
    cuts = [0, *(torch.nonzero(~same)[:, 0] + 1).tolist(), len(T)]
    return [b - a for a, b in pairwise(cuts)]
