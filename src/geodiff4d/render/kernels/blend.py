"""Blending of listed Gaussians, front to back, and its backward, back to front, one 16×16 tile at a time.

A tile copies its Gaussians' rows next to each other and lists, for each of its sixteen 4×4 blocks of pixels, those
whose ellipse of alpha ≥ 1/255 meets the block. A block's pixels are the lanes of one vector, so blending a Gaussian is
a handful of instructions without branches. The backward writes one gradient row per (Gaussian, tile) to a place of its
own: no atomics, the same bits on every run and on any number of threads.
"""

import numpy as np
from numba import prange

from geodiff4d.render.kernels.blocks import (
    CHANNELS,
    SIDE,
    append,
    block_x,
    block_y,
    keep_planes,
    lane,
    load_block,
    load_planes,
    mix,
    next_task,
    no_planes,
    store_block,
    store_planes,
    weigh,
)  # fmt: skip
from geodiff4d.render.kernels.project import FEATURES, LIMIT, ROW, TILE
from geodiff4d.render.kernels.simd import (
    INLINE,
    LANES,
    OPTIONS,
    at,
    choose,
    exp2,
    fill,
    fma,
    get,
    high,
    largest,
    load,
    load_transposed,
    low,
    minus,
    njit,
    put,
    some,
    store,
    store_transposed,
)  # fmt: skip

BLOCKS = LANES
"""In a tile."""
ALPHA_MIN = 1 / 255
ALPHA_MAX = 0.999
T_MIN = 1e-4
CHECK_EVERY = 8
"""Gaussians blended between looks at whether any pixel still has room."""


@njit(**INLINE)
def _lists_of(start, tile):
    """Where a tile's lists begin, and how far apart those of its blocks are: `append` needs room for 16 more."""
    first, count = get(start, tile), get(start, tile + 1) - get(start, tile)
    return first, count, LANES * first + tile * BLOCKS * LANES, count + LANES


@njit(**OPTIONS)
def _cull(local, mine, count, x, y, near, first, step, sizes, tile):
    """List the Gaussians of each of a tile's blocks, 16 Gaussians at a time; x and y are the first pixel's centre."""
    for k in range(BLOCKS):
        put(sizes, tile * BLOCKS + k, np.int32(0))
    zero = fill(0.0)
    for i in range(0, count, LANES):
        r = load_transposed(local, mine + ROW * i)
        number = lane(1) + i
        real = number < count
        left, top = fill(x) - r[0], fill(y) - r[1]
        A, B, D, limit, y_slope, x_slope = r[2], r[3], r[4], r[LIMIT], r[LIMIT + 1], r[LIMIT + 2]
        for column in range(SIDE):
            x0 = left + np.float32(SIDE * column)
            x1 = x0 + np.float32(SIDE - 1)
            # The block's x nearest to the centre; along that line the form is a parabola in y, lowest at x·y_slope.
            xn = low(high(zero, x0), x1)
            y_low, bx, x_left = xn * y_slope, B * xn, limit - A * xn * xn
            for line in range(SIDE):
                y0 = top + np.float32(SIDE * line)
                y1 = y0 + np.float32(SIDE - 1)
                yn = low(high(zero, y0), y1)
                ys, xs = low(high(y_low, y0), y1), low(high(yn * x_slope, x0), x1)
                meets = (ys * fma(D, ys, bx) <= x_left) | (xs * fma(A, xs, B * yn) <= limit - D * yn * yn)
                block = line * SIDE + column
                size = np.int64(get(sizes, tile * BLOCKS + block))
                size += append(near, first + block * step + size, number, meets & real)
                put(sizes, tile * BLOCKS + block, np.int32(size))


@njit(**INLINE)
def _alpha(local, o, X, Y):
    """Opacity times 2^-(A dx² + B dx dy + D dy²) at a block's pixels, not yet clamped."""
    dx, dy = X - at(local, o), Y - at(local, o + 1)
    power = minus(fma(at(local, o + 2), dx, at(local, o + 3) * dy), dx, -1.0 * (at(local, o + 4) * dy * dy))
    return at(local, o + 5) * exp2(high(power, fill(-100.0)))


@njit(**OPTIONS)
def _blend_tile(tile, rows, lists, start, tiles_x, width, image, channels, kept, last, near, sizes, local, mine):
    plane = len(image) // (channels + 1)
    listed, count, first, step = _lists_of(start, tile)
    px, py = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
    for i in range(count):
        store(local, mine + ROW * i, load(rows, ROW * np.int64(get(lists, listed + i))))
    _cull(local, mine, count, np.float32(px + 0.5), np.float32(py + 0.5), near, first, step, sizes, tile)
    for block in range(BLOCKS):
        x, y = px + SIDE * (block % SIDE), py + SIDE * (block // SIDE)
        X, Y = block_x(x + 0.5), block_y(y + 0.5)
        size, at_list = np.int64(get(sizes, tile * BLOCKS + block)), first + block * step
        one, zero = fill(1.0), fill(0.0)
        T, end, blended, planes = one, one, zero, no_planes()
        j = 0
        while j < size:
            stop = min(j + CHECK_EVERY, size)
            while j < stop:
                o = mine + ROW * np.int64(get(near, at_list + j))
                alpha = low(_alpha(local, o, X, Y), fill(ALPHA_MAX))
                alpha = choose(alpha >= ALPHA_MIN, alpha, zero)
                after = T * (1.0 - alpha)
                # A pixel is full before the Gaussian that would leave less than T_MIN, and stays so.
                room = after > T_MIN
                planes = mix(planes, choose(room, T - after, zero), local, o + FEATURES)
                T, end, blended = after, choose(room, after, end), choose(room, blended + 1.0, blended)
                j += 1
            if not some(T > T_MIN):
                break
        store_planes(image, y * width + x, width, plane, channels, planes)
        store_block(image, channels * plane + y * width + x, width, 1.0 - end)
        store(kept, LANES * (tile * BLOCKS + block), end)
        store(last, LANES * (tile * BLOCKS + block), blended)


@njit(parallel=True, **OPTIONS)
def blend(
    rows, lists, start, tiles_x, width, image, channels, kept, last, near, sizes, local, longest, counter, threads
):
    """Fill `image` (features, then alpha; planes of whole tiles), and for the backward per pixel what is left of the
    light and how many of its block's list were blended. `counter` starts at zero."""
    for t in prange(threads):
        tile = next_task(counter)
        while tile < len(start) - 1:
            _blend_tile(
                tile,
                rows,
                lists,
                start,
                tiles_x,
                width,
                image,
                channels,
                kept,
                last,
                near,
                sizes,
                local,
                ROW * longest * t,
            )
            tile = next_task(counter)


@njit(**INLINE)
def _gradient_rows(scratch, weights, sums, upstream, offsets, out):
    """Turn 16 Gaussians' blending weights and dL/dσ at a block's 16 pixels into 16 gradient rows.

    Moments are taken on the 4×4 grid, where they separate, and then moved to each Gaussian's centre (u, v).
    """
    v = load_transposed(scratch, sums)
    c0, c1 = (v[0] + v[4]) + (v[8] + v[12]), (v[1] + v[5]) + (v[9] + v[13])
    c2, c3 = (v[2] + v[6]) + (v[10] + v[14]), (v[3] + v[7]) + (v[11] + v[15])
    r1, r2, r3 = (v[4] + v[5]) + (v[6] + v[7]), (v[8] + v[9]) + (v[10] + v[11]), (v[12] + v[13]) + (v[14] + v[15])
    s0 = (c0 + c1) + (c2 + c3)
    two, three, four, nine = fill(2.0), fill(3.0), fill(4.0), fill(9.0)
    sx, sxx = fma(three, c3, fma(two, c2, c1)), fma(nine, c3, fma(four, c2, c1))
    sy, syy = fma(three, r3, fma(two, r2, r1)), fma(nine, r3, fma(four, r2, r1))
    e1, e2 = fma(three, v[7], fma(two, v[6], v[5])), fma(three, v[11], fma(two, v[10], v[9]))
    sxy = fma(three, fma(three, v[15], fma(two, v[14], v[13])), fma(two, e2, e1))
    ux, uy = load(scratch, offsets), load(scratch, offsets + LANES)
    mx, my = minus(ux, s0, sx), minus(uy, s0, sy)
    mxx, mxy, myy = minus(ux, sx + mx, sxx), minus(ux, my, minus(uy, sx, sxy)), minus(uy, sy + my, syy)
    w = load_transposed(scratch, weights)
    features = (
        weigh(w, scratch, upstream), weigh(w, scratch, upstream + LANES), weigh(w, scratch, upstream + 2 * LANES),
        weigh(w, scratch, upstream + 3 * LANES), weigh(w, scratch, upstream + 4 * LANES),
        weigh(w, scratch, upstream + 5 * LANES), weigh(w, scratch, upstream + 6 * LANES),
    )  # fmt: skip
    store_transposed(scratch, out, (s0, mx, my, mxx, mxy, myy, *features))


@njit(**INLINE)
def _dot_planes(g, array, o):
    a = fma(at(array, o), g[0], fma(at(array, o + 1), g[1], fma(at(array, o + 2), g[2], at(array, o + 3) * g[3])))
    return a + fma(at(array, o + 4), g[4], fma(at(array, o + 5), g[5], at(array, o + 6) * g[6]))


SCRATCH = LANES * (2 * LANES + CHANNELS + 2 + LANES)


@njit(**OPTIONS)
def _back_tile(
    tile, rows, lists, start, rect, first_slot, tiles_x, width, grad, grad_alpha, channels, kept, last, near, sizes,
    local, mine, sums, scratch, weights, slots,
):  # fmt: skip
    plane = len(grad_alpha)
    sigmas = weights + LANES * LANES
    upstream = sigmas + LANES * LANES
    offsets = upstream + LANES * CHANNELS
    out = offsets + LANES * 2
    listed, count, first, step = _lists_of(start, tile)
    tx, ty = tile % tiles_x, tile // tiles_x
    zero, one = fill(0.0), fill(1.0)
    for i in range(count):
        store(local, mine + ROW * i, load(rows, ROW * np.int64(get(lists, listed + i))))
        store(sums, mine + ROW * i, zero)
    for block in range(BLOCKS):
        size, at_list = np.int64(get(sizes, tile * BLOCKS + block)), first + block * step
        if size == 0:
            continue
        x, y = tx * TILE + SIDE * (block % SIDE), ty * TILE + SIDE * (block // SIDE)
        X, Y = block_x(x + 0.5), block_y(y + 0.5)
        T = load(kept, LANES * (tile * BLOCKS + block))
        blended = load(last, LANES * (tile * BLOCKS + block))
        g = load_planes(grad, y * width + x, width, plane, channels)
        keep_planes(scratch, upstream, g)
        # Σ over the Gaussians behind of weight · <features, g>, less what alpha's own gradient takes away.
        behind = -1.0 * (T * load_block(grad_alpha, y * width + x, width))
        j = min(np.int64(largest(blended)), size)
        while j > 0:
            batch = min(j, LANES)
            for r in range(batch):
                o = mine + ROW * np.int64(get(near, at_list + j - 1 - r))
                put(scratch, offsets + r, get(local, o) - np.float32(x + 0.5))
                put(scratch, offsets + LANES + r, get(local, o + 1) - np.float32(y + 0.5))
                raw = _alpha(local, o, X, Y)
                alpha = low(raw, fill(ALPHA_MAX))
                alpha = choose((alpha >= ALPHA_MIN) & (fill(np.float32(j - 1 - r)) < blended), alpha, zero)
                inverse = one / (one - alpha)
                T = T * inverse
                weight = alpha * T
                shown = _dot_planes(g, local, o + FEATURES)
                store(scratch, weights + LANES * r, weight)
                # dL/dσ = -α dL/dα; a clamped alpha passes none on.
                by_sigma = alpha * minus(T, shown, behind * inverse)
                store(scratch, sigmas + LANES * r, choose(raw <= ALPHA_MAX, by_sigma, zero))
                behind = fma(weight, shown, behind)
            _gradient_rows(scratch, weights, sigmas, upstream, offsets, out)
            for r in range(batch):
                o = mine + ROW * np.int64(get(near, at_list + j - 1 - r))
                store(sums, o, load(sums, o) + load(scratch, out + LANES * r))
            j -= batch
    for i in range(count):
        g = np.int64(get(lists, listed + i))
        x0, x1, y0 = get(rect, 4 * g), get(rect, 4 * g + 1), get(rect, 4 * g + 2)
        slot = get(first_slot, g) + (ty - y0) * (x1 - x0) + (tx - x0)
        store(slots, ROW * slot, load(sums, mine + ROW * i))


@njit(parallel=True, **OPTIONS)
def blend_backward(
    rows, lists, start, rect, first_slot, tiles_x, width, grad, grad_alpha, channels, kept, last, near, sizes, local,
    longest, sums, scratch, counter, threads, slots,
):  # fmt: skip
    """Fill `slots`: the gradient rows of every Gaussian in every tile of its rectangle.

    `counter` starts at zero, and so does `scratch`: lists shorter than 16 leave places that are read, but whose sums go
    nowhere.
    """
    for t in prange(threads):
        tile = next_task(counter)
        while tile < len(start) - 1:
            _back_tile(
                tile, rows, lists, start, rect, first_slot, tiles_x, width, grad, grad_alpha, channels, kept, last,
                near, sizes, local, ROW * longest * t, sums, scratch, SCRATCH * t, slots,
            )  # fmt: skip
            tile = next_task(counter)
