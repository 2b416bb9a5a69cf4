"""L1 and SSIM with their gradient in one sweep over the rows, so that everything in between stays in the first cache.

The Gaussian window is separable: rows are filtered across as they come and kept in a ring; once eleven are there they
are filtered down, which gives a row of scores and of derivatives by the window's means. Those are filtered across and
down again, since the adjoint of a symmetric window is the window. Rows beyond the image are zero.
"""

import numpy as np
from numba import prange

from geodiff4d.render.kernels.blocks import lane
from geodiff4d.render.kernels.simd import INLINE, LANES, OPTIONS, choose, fill, fma, high, load, njit, put, store, total

RADIUS = 5
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
RING = 16
"""Rows kept: a power of two, at least 2·RADIUS + 1."""
_BELL = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
WINDOW = _BELL / _BELL.sum()
"""The Gaussian window along one axis; its weights sum to 1."""
G0, G1, G2, G3, G4, G5 = (float(g) for g in WINDOW[RADIUS:])


@njit(**INLINE)
def _weigh(centre, p1, p2, p3, p4, p5):
    return fma(fill(G0), centre, fma(fill(G1), p1, fma(fill(G2), p2, fma(fill(G3), p3, fma(fill(G4), p4, G5 * p5)))))


@njit(**INLINE)
def _across(line, i):
    """Filter along a row, at its place i; the row has `RADIUS` zeros in front."""
    return _weigh(
        load(line, i + 5),
        load(line, i + 4) + load(line, i + 6),
        load(line, i + 3) + load(line, i + 7),
        load(line, i + 2) + load(line, i + 8),
        load(line, i + 1) + load(line, i + 9),
        load(line, i) + load(line, i + 10),
    )


@njit(**INLINE)
def _down(ring, at, y, step):
    """Filter over the ring's rows y-5 to y+5; rows are `step` apart."""
    m = RING - 1
    return _weigh(
        load(ring, at + (y & m) * step),
        load(ring, at + ((y - 1) & m) * step) + load(ring, at + ((y + 1) & m) * step),
        load(ring, at + ((y - 2) & m) * step) + load(ring, at + ((y + 2) & m) * step),
        load(ring, at + ((y - 3) & m) * step) + load(ring, at + ((y + 3) & m) * step),
        load(ring, at + ((y - 4) & m) * step) + load(ring, at + ((y + 4) & m) * step),
        load(ring, at + ((y - 5) & m) * step) + load(ring, at + ((y + 5) & m) * step),
    )


@njit(**OPTIONS)
def _moments(a, b, row, width, work, lines, ring):
    """Filter a row of a, b, a² + b² and a·b across into the ring."""
    line = width + 2 * LANES
    for x in range(0, width, LANES):
        p, q = load(a, row + x), load(b, row + x)
        store(work, lines + RADIUS + x, p)
        store(work, lines + line + RADIUS + x, q)
        store(work, lines + 2 * line + RADIUS + x, fma(p, p, q * q))
        store(work, lines + 3 * line + RADIUS + x, p * q)
    for k in range(4):
        for x in range(0, width, LANES):
            store(work, ring + k * width + x, _across(work, lines + k * line + x))


@njit(**OPTIONS)
def _score(work, ring, y, width, real, lines, out):
    """Score a row, and filter its derivatives by the means of a, a² + b² and a·b across; returns the sum of scores."""
    line, step = width + 2 * LANES, 4 * width
    scores = fill(0.0)
    for x in range(0, width, LANES):
        mu_a, mu_b = _down(work, ring + x, y, step), _down(work, ring + width + x, y, step)
        squares, product = _down(work, ring + 2 * width + x, y, step), _down(work, ring + 3 * width + x, y, step)
        both, own = mu_a * mu_b, fma(mu_a, mu_a, mu_b * mu_b)
        light, light_norm = 2.0 * both + C1, own + C1
        shape, shape_norm = 2.0 * (product - both) + C2, (squares - own) + C2
        per_light, per_shape = 1.0 / light_norm, 1.0 / shape_norm
        per = per_light * per_shape
        score = light * shape * per
        by_product, by_squares = 2.0 * light * per, -1.0 * (score * per_shape)
        by_mean = 2.0 * (mu_b * shape * per - mu_a * (score * per_light + by_squares)) - by_product * mu_b
        inside, zero = (lane(1) + x) < real, fill(0.0)
        scores = scores + choose(inside, score, zero)
        store(work, lines + RADIUS + x, choose(inside, by_mean, zero))
        store(work, lines + line + RADIUS + x, choose(inside, by_squares, zero))
        store(work, lines + 2 * line + RADIUS + x, choose(inside, by_product, zero))
    for k in range(3):
        for x in range(0, width, LANES):
            store(work, out + k * width + x, _across(work, lines + k * line + x))
    return total(scores)


@njit(**OPTIONS)
def _gradient(a, b, row, work, ring, y, width, by_l1, by_ssim, grad):
    """Write a row of the gradient; returns the sum of absolute differences."""
    differences, step = fill(0.0), 3 * width
    for x in range(0, width, LANES):
        p, q = load(a, row + x), load(b, row + x)
        d, zero, one = p - q, fill(0.0), fill(1.0)
        differences = differences + high(d, -1.0 * d)
        sign = choose(d > 0.0, one, choose(d < 0.0, -1.0 * one, zero))
        mean, squares = _down(work, ring + x, y, step), _down(work, ring + width + x, y, step)
        by_a = fma(2.0 * p, squares, fma(q, _down(work, ring + 2 * width + x, y, step), mean))
        store(grad, row + x, fma(sign, fill(by_l1), by_ssim * by_a))
    return total(differences)


@njit(**OPTIONS)
def _clear(work, start, count):
    for i in range(start, start + count, LANES):
        store(work, i, fill(0.0))


@njit(**OPTIONS)
def _sweep(a, b, plane, start, stop, height, width, real, by_l1, by_ssim, grad, sums, scores, work, mine):
    line = width + 2 * LANES
    lines, first = mine, mine + 7 * line
    second = first + RING * 4 * width
    _clear(work, mine, 7 * line)
    for y in range(start - 2 * RADIUS, stop + 2 * RADIUS):
        slot = first + (y & (RING - 1)) * 4 * width
        if 0 <= y < height:
            _moments(a, b, (plane * height + y) * width, width, work, lines, slot)
        else:
            _clear(work, slot, 4 * width)
        s = y - RADIUS
        if s < start - RADIUS:
            continue
        slot = second + (s & (RING - 1)) * 3 * width
        if 0 <= s < height:
            score = _score(work, first, s, width, real, lines + 4 * line, slot)
            if start <= s < stop:
                put(scores, plane * height + s, score)
        else:
            _clear(work, slot, 3 * width)
        t = s - RADIUS
        if t >= start:
            row = (plane * height + t) * width
            put(sums, plane * height + t, _gradient(a, b, row, work, second, t, width, by_l1, by_ssim, grad))


@njit(parallel=True, **OPTIONS)
def l1_ssim(a, b, planes, height, width, real, by_l1, by_ssim, grad, sums, scores, work, bands):
    """Fill dL/da, and per row the sums of absolute differences and of SSIM, in `bands` of rows per plane.

    Rows are `width` long, a multiple of 16, of which the first `real` count; the rest is zero.
    """
    for task in prange(planes * bands):
        plane, band = task // bands, task % bands
        start, stop = height * band // bands, height * (band + 1) // bands
        mine = task * ((7 + 7 * RING) * width + 14 * LANES)
        _sweep(a, b, plane, start, stop, height, width, real, by_l1, by_ssim, grad, sums, scores, work, mine)


def work_size(width: int) -> int:
    """Floats that each band needs."""
    return (7 + 7 * RING) * width + 14 * LANES
