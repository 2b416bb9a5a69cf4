"""A square of an image, resampled by a separable tent filter: each target pixel reads only the few pixels it shows."""

import math

import numpy as np

from geodiff4d.render.kernels.simd import OPTIONS, njit


@njit(**OPTIONS)
def resample(image, left, top, side, clamp, fill, out):
    """Write a square (left, top, side) [px] of image [c, h, w] to out [c, n, n], both float32 and contiguous.

    The filter is as wide as the larger of source and target pixels. Beyond the border the edge is repeated (`clamp`),
    or `fill` is taken.
    """
    channels, height, width = image.shape
    n = out.shape[1]
    step = side / n
    radius = max(step, 1.0)
    count = int(2 * radius) + 2
    rows, row_weights, row_sums = _taps(n, top, step, radius, count, height, clamp)
    columns, column_weights, column_sums = _taps(n, left, step, radius, count, width, clamp)
    low, high = columns.min(), columns.max() + 1
    line = np.empty(high - low, np.float32)
    for c in range(channels):
        for y in range(n):
            line[:] = 0.0
            for t in range(count):
                weight = row_weights[y, t]
                if weight != 0.0:
                    source = image[c, rows[y, t], low:high]
                    for x in range(high - low):
                        line[x] += weight * source[x]
            for x in range(n):
                total = np.float32(0.0)
                for t in range(count):
                    total += column_weights[x, t] * line[columns[x, t] - low]
                if not clamp:
                    total += fill * (np.float32(1.0) - row_sums[y] * column_sums[x])
                out[c, y, x] = total


@njit(**OPTIONS)
def _taps(n, start, step, radius, count, length, clamp):
    """Return each target pixel's source pixels along an axis, their weights, and these weights' sum inside."""
    index, weights = np.empty((n, count), np.int64), np.empty((n, count), np.float32)
    sums, own = np.empty(n, np.float32), np.empty(count, np.float64)
    for i in range(n):
        centre = start + (i + 0.5) * step
        first = math.ceil(centre - radius - 0.5)
        for t in range(count):
            own[t] = max(1.0 - abs(first + t + 0.5 - centre) / radius, 0.0)
        own /= own.sum()
        inside = 0.0
        for t in range(count):
            at = first + t
            if not clamp and (at < 0 or at >= length):
                own[t] = 0.0
            inside += own[t]
            index[i, t] = min(max(at, 0), length - 1)
            weights[i, t] = own[t]
        sums[i] = inside
    return index, weights, sums
