"""The CPU rasteriser: project, sort, list per tile, blend; and back, analytically. Float32, on any number of threads.

Kernels handle up to seven features; more go in several passes, whose gradients add up. Images are computed in whole
tiles of 16 pixels. Results are the same bits whatever the number of threads. Semantics are gsplat's (see `gaussians`).
"""

import math
from typing import ClassVar, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from geodiff4d.render.kernels.bins import BLOCK, DIGIT_BITS, DIGITS, count_tiles, fill_tiles, pick, radix_pass, survey
from geodiff4d.render.kernels.blend import BLOCKS, SCRATCH, blend, blend_backward
from geodiff4d.render.kernels.blocks import CHANNELS
from geodiff4d.render.kernels.llvm import LANES
from geodiff4d.render.kernels.project import ROW, TILE, project, project_backward


class _Loan:
    """A pool of arrays, which return to it when nothing refers to the loan any more.

    Fresh memory costs a page fault per 4 kB, in all a third of the rasteriser's time.
    """

    KEEP = 8
    """Largest number of idle arrays of one size."""
    idle: ClassVar[dict[int, list[np.ndarray]]] = {}

    def __init__(self):
        self.lent: list[np.ndarray] = []

    def take(self, count: int, dtype: type = np.float32) -> np.ndarray:
        """Return an uninitialised flat array of `count` numbers."""
        size = count * np.dtype(dtype).itemsize
        # Sizes go in steps of an eighth, so that images of similar size share arrays.
        step = max(size.bit_length() - 4, 6)
        capacity = ((size >> step) + 1) << step
        try:
            memory = self.idle[capacity].pop()
        except (KeyError, IndexError):
            memory = np.empty(capacity, np.uint8)
        self.lent.append(memory)
        return memory[:size].view(dtype)

    def __del__(self):
        for memory in self.lent:
            waiting = self.idle.setdefault(len(memory), [])
            if len(waiting) < self.KEEP:
                waiting.append(memory)


class _Projected(NamedTuple):
    rows: np.ndarray
    rect: np.ndarray
    first_slot: np.ndarray
    broken: np.ndarray


class _Tiles(NamedTuple):
    lists: np.ndarray
    start: np.ndarray
    longest: int
    """Gaussians in the longest list."""


class _Blended(NamedTuple):
    kept: np.ndarray
    last: np.ndarray
    near: np.ndarray
    sizes: np.ndarray


class _View(NamedTuple):
    """A camera as the kernels want it."""

    V: np.ndarray
    lens: np.ndarray
    width: int
    height: int

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.width // TILE), -(-self.height // TILE)


def rasterize_cpu(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, features: Tensor,
    T_cam_world: Tensor, K: Tensor, width: int, height: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Render float32 Gaussians; returns (channels × height × width, 1 × height × width of alpha, the broken ones)."""
    n, channels = features.shape
    view = _View(T_cam_world[:3].float().numpy().reshape(-1), _lens(K, width, height), width, height)
    if n >= LANES and 1 <= channels <= CHANNELS:
        return _Rasterize.apply(means, quats, scales, opacities, features, view)
    if channels == 0:
        features = torch.zeros_like(means[:, :1])
    # What has a broken feature must be missing from all passes.
    opacities = torch.where(features.isfinite().all(-1), opacities, torch.nan)
    splats = (means, quats, scales, opacities, features)
    if n < LANES:
        splats = tuple(torch.cat([x, x.new_zeros(LANES - n, *x.shape[1:])]) for x in splats)
    passes = [_Rasterize.apply(*splats[:4], group, view) for group in splats[4].split(CHANNELS, -1)]
    image = torch.cat([p[0] for p in passes])
    return image[:channels], passes[0][1], passes[0][2][:n]


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, features, view):
        inputs = tuple(x.detach().contiguous().numpy() for x in (means, quats, scales, opacities, features))
        threads = numba.get_num_threads()
        loan = _Loan()
        projected, depth, slots = _project(inputs, view, threads, loan)
        tiles = _list(projected, depth, slots, view, threads, loan)
        image, blended = _blend(projected, tiles, features.shape[1], view, threads, loan)
        ctx.kept = (inputs, view, projected, tiles, blended, loan)
        broken = torch.from_numpy(projected.broken).view(torch.bool)
        ctx.mark_non_differentiable(broken)
        seen = image[:, : view.height, : view.width]
        return seen[:-1], seen[-1:], broken

    @staticmethod
    @once_differentiable
    def backward(ctx, g_image, g_alpha, _):
        inputs, view, projected, tiles, blended, _ = ctx.kept
        threads, loan = numba.get_num_threads(), _Loan()
        columns, _ = view.tiles
        grad, grad_alpha = (_in_tiles(g, view, loan) for g in (g_image, g_alpha))
        slots = loan.take(ROW * len(tiles.lists))
        local, sums = (loan.take(threads * ROW * tiles.longest) for _ in range(2))
        blend_backward(
            projected.rows, tiles.lists, tiles.start, projected.rect, projected.first_slot, columns, columns * TILE,
            grad, grad_alpha, inputs[4].shape[1], blended.kept, blended.last, blended.near, blended.sizes, local,
            tiles.longest, sums, np.zeros(threads * SCRATCH, np.float32), np.zeros(1, np.int64), threads, slots,
        )  # fmt: skip
        grads = tuple(torch.empty(x.shape) for x in inputs)
        project_backward(
            *inputs[:4], view.V, view.lens, slots, projected.first_slot,
            np.empty(threads * ROW * LANES, np.float32), threads, *(g.numpy() for g in grads),
        )  # fmt: skip
        return *grads, None


def _in_tiles(g: Tensor, view: _View, loan: _Loan) -> np.ndarray:
    """Return an image's gradient in whole tiles, padded with zeros where the image is not."""
    columns, lines = view.tiles
    shape = (len(g), lines * TILE, columns * TILE)
    if g.shape == shape:
        return g.contiguous().numpy().reshape(-1)
    whole = loan.take(math.prod(shape)).reshape(shape)
    whole[:, : view.height, : view.width] = g.numpy()
    whole[:, view.height :], whole[:, :, view.width :] = 0, 0
    return whole.reshape(-1)


def _lens(K: Tensor, width: int, height: int) -> np.ndarray:
    """Return fx, fy, cx, cy, the range of directions x/z and y/z where the linearisation holds, counts of tiles."""
    (fx, _, cx), (_, fy, cy), _ = K.tolist()
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    left, right = -cx / fx - margin_x, (width - cx) / fx + margin_x
    top, bottom = -cy / fy - margin_y, (height - cy) / fy + margin_y
    tiles = -(-width // TILE), -(-height // TILE)
    return np.array([fx, fy, cx, cy, left, right, top, bottom, *tiles], np.float32)


def _project(
    inputs: tuple[np.ndarray, ...], view: _View, threads: int, loan: _Loan
) -> tuple[_Projected, np.ndarray, np.ndarray]:
    n = len(inputs[0])
    rows, depth = loan.take(n * ROW), loan.take(n)
    rect, slots, broken = loan.take(n * 4, np.int32), loan.take(n, np.int32), np.empty(n, np.uint8)
    scratch = np.empty(threads * 5 * LANES, np.int32)
    project(*inputs, view.V, view.lens, rows, depth, rect, slots, broken, scratch, threads)
    return _Projected(rows, rect, loan.take(n + 1, np.int32), broken), depth, slots


def _list(
    projected: _Projected, depth: np.ndarray, slots: np.ndarray, view: _View, threads: int, loan: _Loan
) -> _Tiles:
    n = len(slots)
    blocks = max(1, min(threads, n // BLOCK))
    bits, found = depth.view(np.uint32), np.empty((blocks, 4), np.int64)
    survey(bits, slots, found)
    seen, used = int(found[:, 0].sum()), int(found[:, 1].sum())
    base, top = (int(found[:, 2].min()), int(found[:, 3].max())) if seen else (0, 0)
    keys, other_keys = (loan.take(n, np.uint32) for _ in range(2))
    ids, other_ids = (loan.take(n, np.int32) for _ in range(2))
    pick(bits, slots, np.uint32(base), found[:, :2].cumsum(0) - found[:, :2], projected.first_slot, keys, ids)
    for shift in range(0, (top - base).bit_length(), DIGIT_BITS):
        places = np.zeros((blocks, DIGITS), np.int32)
        radix_pass(keys, ids, other_keys, other_ids, seen, np.uint32(shift), places, np.empty(DIGITS + 1, np.int64))
        keys, other_keys, ids, other_ids = other_keys, keys, other_ids, ids
    columns, lines = view.tiles
    places, start = np.empty((blocks, columns * lines), np.int32), np.empty(columns * lines + 1, np.int64)
    corners = np.zeros((blocks, (columns + 1) * (lines + 1)), np.int32)
    longest = count_tiles(ids, seen, projected.rect, columns, lines, corners, places, start)
    lists = loan.take(used, np.int32)
    fill_tiles(ids, seen, projected.rect, columns, places, lists)
    return _Tiles(lists, start, longest)


def _blend(
    projected: _Projected, tiles: _Tiles, channels: int, view: _View, threads: int, loan: _Loan
) -> tuple[Tensor, _Blended]:
    columns, lines = view.tiles
    count = columns * lines * BLOCKS
    image = torch.empty(channels + 1, lines * TILE, columns * TILE)
    kept, last, sizes = loan.take(count * LANES), loan.take(count * LANES), loan.take(count, np.int32)
    near, local = loan.take(LANES * (len(tiles.lists) + count + 1), np.int32), loan.take(threads * ROW * tiles.longest)
    blend(
        projected.rows, tiles.lists, tiles.start, columns, columns * TILE, image.view(-1).numpy(), channels, kept, last,
        near, sizes, local, tiles.longest, np.zeros(1, np.int64), threads,
    )  # fmt: skip
    return image, _Blended(kept, last, near, sizes)
