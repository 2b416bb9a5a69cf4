"""From projected Gaussians to lists per tile in order of depth, on any number of threads with one result.

Depths sort by the bits of their floats, which for positive numbers order as the numbers do: a radix sort over the bits
in which they differ. It is stable, so equal depths keep the Gaussians' order. Both the sort and the lists are made by
counting in every block of Gaussians, adding the counts up, and writing every block to its place.

Kernels allocate nothing: Numba would compile each allocation as a parallel loop of its own.
"""

import numpy as np
from numba import prange

from geodiff4d.render.kernels.simd import OPTIONS, get, njit, put

DIGIT_BITS = 12
DIGITS = 1 << DIGIT_BITS
_MASK = np.uint32(DIGITS - 1)
BLOCK = 8192
"""A block has at least this many Gaussians: fewer are done sooner by one thread."""


@njit(**OPTIONS)
def _range(n, blocks, b):
    return n * b // blocks, n * (b + 1) // blocks


@njit(**OPTIONS)
def _survey_block(bits, slots, start, stop, found, b):
    seen, used, least, most = 0, 0, np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(start, stop):
        count = get(slots, i)
        if count > 0:
            seen += 1
            used += count
            least, most = min(least, get(bits, i)), max(most, get(bits, i))
    put(found, 4 * b, seen)
    put(found, 4 * b + 1, used)
    put(found, 4 * b + 2, np.int64(least))
    put(found, 4 * b + 3, np.int64(most))


@njit(parallel=True, **OPTIONS)
def survey(bits, slots, found):
    """Per block of Gaussians: how many are drawn, in how many tiles, and the range of their depths' bits."""
    blocks = len(found)
    for b in prange(blocks):
        start, stop = _range(len(slots), blocks, b)
        _survey_block(bits, slots, start, stop, found, b)


@njit(**OPTIONS)
def _pick_block(bits, slots, start, stop, base, place, slot, first_slot, keys, ids):
    for i in range(start, stop):
        put(first_slot, i, np.int32(slot))
        count = get(slots, i)
        if count > 0:
            put(keys, place, np.uint32(get(bits, i) - base))
            put(ids, place, np.int32(i))
            place += 1
            slot += count
    put(first_slot, stop, np.int32(slot))


@njit(parallel=True, **OPTIONS)
def pick(bits, slots, base, places, first_slot, keys, ids):
    """Fill each Gaussian's first gradient slot, and the keys and numbers of those that are drawn.

    `places` has each block's first key and first slot; `first_slot` has one place more than there are Gaussians.
    """
    blocks = len(places)
    for b in prange(blocks):
        start, stop = _range(len(slots), blocks, b)
        _pick_block(bits, slots, start, stop, base, get(places, 2 * b), get(places, 2 * b + 1), first_slot, keys, ids)


@njit(**OPTIONS)
def _count_digits(keys, start, stop, shift, places, b):
    for i in range(start, stop):
        place = b * DIGITS + np.int64((get(keys, i) >> shift) & _MASK)
        put(places, place, np.int32(get(places, place) + 1))


@njit(**OPTIONS)
def _move(keys, ids, new_keys, new_ids, start, stop, shift, places, b):
    for i in range(start, stop):
        key = get(keys, i)
        digit = b * DIGITS + np.int64((key >> shift) & _MASK)
        place = np.int64(get(places, digit))
        put(places, digit, np.int32(place + 1))
        put(new_keys, place, key)
        put(new_ids, place, get(ids, i))


@njit(**OPTIONS)
def _add_up(places, blocks, columns, start):
    """From counts per block and column to first places, column by column; returns the largest column."""
    run, longest = 0, 0
    for column in range(columns):
        put(start, column, run)
        for b in range(blocks):
            place = b * columns + column
            count = get(places, place)
            put(places, place, np.int32(run))
            run += count
        longest = max(longest, run - get(start, column))
    put(start, columns, run)
    return longest


@njit(parallel=True, **OPTIONS)
def radix_pass(keys, ids, new_keys, new_ids, n, shift, places, start):
    """Sort stably by one digit of the keys. `places` (blocks × digits) starts at zero."""
    blocks = len(places)
    for b in prange(blocks):
        first, last = _range(n, blocks, b)
        _count_digits(keys, first, last, shift, places, b)
    _add_up(places, blocks, DIGITS, start)
    for b in prange(blocks):
        first, last = _range(n, blocks, b)
        _move(keys, ids, new_keys, new_ids, first, last, shift, places, b)


@njit(**OPTIONS)
def _corners(order, start, stop, rect, width, corners, at):
    """Mark the four corners of every rectangle: sums over both axes then count how many cover a tile."""
    for m in range(start, stop):
        i = 4 * np.int64(get(order, m))
        left, right = at + np.int64(get(rect, i)), at + np.int64(get(rect, i + 1))
        above, below = width * np.int64(get(rect, i + 2)), width * np.int64(get(rect, i + 3))
        put(corners, above + left, np.int32(get(corners, above + left) + 1))
        put(corners, above + right, np.int32(get(corners, above + right) - 1))
        put(corners, below + left, np.int32(get(corners, below + left) - 1))
        put(corners, below + right, np.int32(get(corners, below + right) + 1))


@njit(**OPTIONS)
def _cover(corners, at, tiles_x, tiles_y, places, b):
    for y in range(tiles_y):
        along = np.int32(0)
        for x in range(tiles_x):
            along += get(corners, at + y * (tiles_x + 1) + x)
            tile = b * tiles_x * tiles_y + y * tiles_x + x
            put(places, tile, np.int32(along + (get(places, tile - tiles_x) if y else np.int32(0))))


@njit(parallel=True, **OPTIONS)
def count_tiles(order, n, rect, tiles_x, tiles_y, corners, places, start):
    """Count the Gaussians of every tile and block of the order; `places` becomes where each block writes, `start` where
    each tile's list begins. `corners` (blocks × tiles with one more row and column) starts at zero. Returns the longest
    list."""
    blocks, size = len(places), (tiles_x + 1) * (tiles_y + 1)
    for b in prange(blocks):
        first, last = _range(n, blocks, b)
        _corners(order, first, last, rect, tiles_x + 1, corners, b * size)
        _cover(corners, b * size, tiles_x, tiles_y, places, b)
    return _add_up(places, blocks, tiles_x * tiles_y, start)


@njit(**OPTIONS)
def _fill_block(order, start, stop, rect, tiles_x, places, base, lists):
    for m in range(start, stop):
        g = get(order, m)
        i = 4 * np.int64(g)
        x0, x1 = base + np.int64(get(rect, i)), base + np.int64(get(rect, i + 1))
        for y in range(np.int64(get(rect, i + 2)), np.int64(get(rect, i + 3))):
            for tile in range(y * tiles_x + x0, y * tiles_x + x1):
                place = np.int64(get(places, tile))
                put(lists, place, g)
                put(places, tile, np.int32(place + 1))


@njit(parallel=True, **OPTIONS)
def fill_tiles(order, n, rect, tiles_x, places, lists):
    """Write every tile's list of Gaussians, near to far."""
    blocks, tiles = places.shape
    for b in prange(blocks):
        first, last = _range(n, blocks, b)
        _fill_block(order, first, last, rect, tiles_x, places, b * tiles, lists)
