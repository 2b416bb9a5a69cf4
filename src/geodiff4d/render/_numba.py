"""The CPU rasteriser: Numba kernels over 16×16 pixel tiles, with their analytic backward.

Splats are projected, sorted by depth and listed per tile; every tile then blends its own list front to back, one row
of 16 pixels at a time, so that the compiler turns the inner loops into vector code. The backward pass walks the same
lists back to front and writes one gradient row per (Gaussian, tile) slot: no atomics, the same bits on every run.
Semantics are gsplat's (see `gaussians.py`). All kernels work in the dtype of their input, float32 or float64.
"""

import math

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 16
NEAR_M = 0.01
EPS_2D = 0.3
ALPHA_MIN = 1 / 255
ALPHA_MAX = 0.999
T_MIN = 1e-4
MOMENTS = 6
"""Gradient columns before the features: sums of dL/dσ times 1, dx, dy, dx², dx·dy, dy²."""
TILES_PER_TASK = 4
"""A head fills the middle of a picture: small tasks keep all threads busy."""

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "arcp", "reassoc"}}


@njit(**_OPTIONS)
def _exp_minus(sigma, f):
    """exp(-σ) for 0 ≤ σ ≤ 6 (beyond, no splat reaches 1/255): a polynomial of σ/16, squared four times."""
    e = min(sigma, f(6.0)) * f(-0.0625)
    p = f(1 / 362880)
    p = p * e + f(1 / 40320)
    p = p * e + f(1 / 5040)
    p = p * e + f(1 / 720)
    p = p * e + f(1 / 120)
    p = p * e + f(1 / 24)
    p = p * e + f(1 / 6)
    p = p * e + f(0.5)
    p = p * e + f(1.0)
    p = p * e + f(1.0)
    p = p * p
    p = p * p
    p = p * p
    return p * p


@njit(**_OPTIONS)
def _rotation(q):
    """Return (1/|q|, the unit quaternion, its matrix's nine entries)."""
    inv = 1.0 / max(math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]), 1e-12)
    w, x, y, z = q[0] * inv, q[1] * inv, q[2] * inv, q[3] * inv
    R = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return inv, (w, x, y, z), R


@njit(**_OPTIONS)
def _to_camera(m, V):
    x = V[0, 0] * m[0] + V[0, 1] * m[1] + V[0, 2] * m[2] + V[0, 3]
    y = V[1, 0] * m[0] + V[1, 1] * m[1] + V[1, 2] * m[2] + V[1, 3]
    z = V[2, 0] * m[0] + V[2, 1] * m[1] + V[2, 2] * m[2] + V[2, 3]
    return x, y, z


@njit(**_OPTIONS)
def _jacobian(x, y, z, V, lens):
    """Return the affine map of the projection at a camera point, in world axes: B = J·R_cam_world, 2×3 (EWA).

    Like gsplat, directions far outside the picture are clamped first: the linearisation explodes there.
    """
    fx, fy = lens[0], lens[1]
    u = min(max(x / z, lens[4]), lens[5])
    v = min(max(y / z, lens[6]), lens[7])
    a, b, c, d = fx / z, -fx * u / z, fy / z, -fy * v / z
    B = (
        a * V[0, 0] + b * V[2, 0], a * V[0, 1] + b * V[2, 1], a * V[0, 2] + b * V[2, 2],
        c * V[1, 0] + d * V[2, 0], c * V[1, 1] + d * V[2, 1], c * V[1, 2] + d * V[2, 2],
    )  # fmt: skip
    return u, v, B


@njit(**_OPTIONS)
def _image_axes(B, R):
    """P = B·R, 2×3: the splat's axes in pixels per metre."""
    return (
        B[0] * R[0] + B[1] * R[3] + B[2] * R[6], B[0] * R[1] + B[1] * R[4] + B[2] * R[7],
        B[0] * R[2] + B[1] * R[5] + B[2] * R[8], B[3] * R[0] + B[4] * R[3] + B[5] * R[6],
        B[3] * R[1] + B[4] * R[4] + B[5] * R[7], B[3] * R[2] + B[4] * R[5] + B[5] * R[8],
    )  # fmt: skip


@njit(**_OPTIONS)
def _covariance(P, s):
    """Return the 2D covariance (xx, xy, yy) [px²], blurred by `EPS_2D`."""
    a0, a1, a2 = P[0] * s[0], P[1] * s[1], P[2] * s[2]
    c0, c1, c2 = P[3] * s[0], P[4] * s[1], P[5] * s[2]
    xx = a0 * a0 + a1 * a1 + a2 * a2 + EPS_2D
    xy = a0 * c0 + a1 * c1 + a2 * c2
    yy = c0 * c0 + c1 * c1 + c2 * c2 + EPS_2D
    return xx, xy, yy


@njit(parallel=True, **_OPTIONS)
def _project(means, quats, scales, opacities, V, lens, width, height, rows, depth, rect, span):
    """Fill `rows` (x, y, conic xx, xy, yy, opacity), depths, tile rectangles and pixel row spans (empty if unseen)."""
    for i in prange(len(means)):
        rect[i, 0] = rect[i, 1] = rect[i, 2] = rect[i, 3] = 0
        span[i, 0], span[i, 1] = 0, -1
        x, y, z = _to_camera(means[i], V)
        depth[i] = z
        opacity = opacities[i]
        if not (z > NEAR_M and opacity >= ALPHA_MIN):
            continue
        _, _, R = _rotation(quats[i])
        _, _, B = _jacobian(x, y, z, V, lens)
        xx, xy, yy = _covariance(_image_axes(B, R), scales[i])
        det = xx * yy - xy * xy
        reach = 2 * math.log(opacity / ALPHA_MIN)
        rx, ry = math.sqrt(reach * xx), math.sqrt(reach * yy)
        mx, my = lens[0] * x / z + lens[2], lens[1] * y / z + lens[3]
        # False for NaN as well: a broken splat is not drawn, and does not spoil the picture.
        if not (det > 0 and abs(mx) + rx < 1e6 and abs(my) + ry < 1e6):
            continue
        x0, x1 = max(math.ceil(mx - rx - 0.5), 0), min(math.floor(mx + rx - 0.5), width - 1)
        y0, y1 = max(math.ceil(my - ry - 0.5), 0), min(math.floor(my + ry - 0.5), height - 1)
        if x1 < x0 or y1 < y0:
            continue
        rows[i, 0], rows[i, 1] = mx, my
        rows[i, 2], rows[i, 3], rows[i, 4] = yy / det, -xy / det, xx / det
        rows[i, 5] = opacity
        rect[i, 0], rect[i, 1] = x0 // TILE, x1 // TILE + 1
        rect[i, 2], rect[i, 3] = y0 // TILE, y1 // TILE + 1
        span[i, 0], span[i, 1] = y0, y1


@njit(**_OPTIONS)
def _bin(order, rect, tiles_x, tiles):
    """List each tile's Gaussians by depth.

    Returns each tile's first place in the lists, each Gaussian's first gradient slot, and per place (Gaussian, slot).
    """
    n = len(rect)
    first_slot = np.zeros(n + 1, np.int64)
    start = np.zeros(tiles + 1, np.int64)
    for i in range(n):
        first_slot[i + 1] = first_slot[i] + (rect[i, 1] - rect[i, 0]) * (rect[i, 3] - rect[i, 2])
        for ty in range(rect[i, 2], rect[i, 3]):
            for tx in range(rect[i, 0], rect[i, 1]):
                start[ty * tiles_x + tx + 1] += 1
    for t in range(tiles):
        start[t + 1] += start[t]
    fill = start[:-1].copy()
    entry = np.empty((first_slot[n], 2), np.int64)
    for i in order:
        slot = first_slot[i]
        for ty in range(rect[i, 2], rect[i, 3]):
            for tx in range(rect[i, 0], rect[i, 1]):
                t = ty * tiles_x + tx
                entry[fill[t], 0], entry[fill[t], 1] = i, slot
                fill[t] += 1
                slot += 1
    return start, first_slot, entry


@njit(parallel=True, **_OPTIONS)
def _blend(start, entry, rows, span, features, tiles_x, image, stop):
    """Blend all tiles into `image` [channels + alpha, h, w]; `stop` gets the place where each pixel was full."""
    f = rows.dtype.type
    channels, height, width = image.shape[0] - 1, image.shape[1], image.shape[2]
    for t in prange(len(start) - 1):
        ox, oy = (t % tiles_x) * TILE, (t // tiles_x) * TILE
        w, h = min(TILE, width - ox), min(TILE, height - oy)
        # T is zero where nothing more is added: full pixels, and those outside the picture.
        T = np.zeros((TILE, TILE), rows.dtype)
        T[:h, :w] = f(1)
        T_end = np.ones((TILE, TILE), rows.dtype)
        full = np.full((TILE, TILE), start[t + 1], np.int64)
        total = np.zeros((channels, TILE, TILE), rows.dtype)
        weight = np.empty(TILE, rows.dtype)
        live = np.ones(TILE, np.bool_)
        left = h
        for place in range(start[t], start[t + 1]):
            g = entry[place, 0]
            mx, my, opacity = rows[g, 0] - f(ox), rows[g, 1] - f(oy), rows[g, 5]
            A, B, D = rows[g, 2], rows[g, 3], rows[g, 4]
            for y in range(max(span[g, 0] - oy, 0), min(span[g, 1] - oy + 1, h)):
                if not live[y]:
                    continue
                dy = my - (f(y) + f(0.5))
                rest = f(0.5) * D * dy * dy
                for x in range(TILE):
                    dx = mx - (f(x) + f(0.5))
                    sigma = f(0.5) * A * dx * dx + B * dx * dy + rest
                    alpha = min(opacity * _exp_minus(sigma, f), f(ALPHA_MAX))
                    weight[x] = alpha if (sigma >= f(0)) & (alpha >= f(ALPHA_MIN)) else f(0)
                remaining, ended = f(0), f(0)
                for x in range(TILE):
                    before = T[y, x]
                    after = before * (f(1) - weight[x])
                    goes_on = f(1) if after > f(T_MIN) else f(0)
                    weight[x] *= before * goes_on
                    T_end[y, x] = after if goes_on > f(0) else T_end[y, x]
                    T[y, x] = after * goes_on
                    remaining += after * goes_on
                    ended += before - before * goes_on
                if ended > f(0):
                    for x in range(TILE):
                        if T[y, x] == f(0) and full[y, x] == start[t + 1]:
                            full[y, x] = place
                for c in range(channels):
                    value = features[g, c]
                    for x in range(TILE):
                        total[c, y, x] += value * weight[x]
                if remaining == f(0):
                    live[y] = False
                    left -= 1
            if left == 0:
                break
        image[:channels, oy : oy + h, ox : ox + w] = total[:, :h, :w]
        image[channels, oy : oy + h, ox : ox + w] = f(1) - T_end[:h, :w]
        stop[oy : oy + h, ox : ox + w] = full[:h, :w]


@njit(parallel=True, **_OPTIONS)
def _blend_backward(start, entry, rows, span, features, tiles_x, image, stop, grad, slots):
    """Walk every tile's list back to front; `grad` is dL/dimage, `slots` gets one row per (Gaussian, tile)."""
    f = rows.dtype.type
    channels, height, width = image.shape[0] - 1, image.shape[1], image.shape[2]
    for t in prange(len(start) - 1):
        ox, oy = (t % tiles_x) * TILE, (t // tiles_x) * TILE
        w, h = min(TILE, width - ox), min(TILE, height - oy)
        T = np.ones((TILE, TILE), rows.dtype)
        T[:h, :w] = f(1) - image[channels, oy : oy + h, ox : ox + w]
        full = np.zeros((TILE, TILE), np.int64)
        full[:h, :w] = stop[oy : oy + h, ox : ox + w]
        g_pixel = np.zeros((channels + 1, TILE, TILE), rows.dtype)
        g_pixel[:, :h, :w] = grad[:, oy : oy + h, ox : ox + w]
        behind = np.zeros((TILE, TILE), rows.dtype)
        last = np.empty(TILE, np.int64)
        for y in range(TILE):
            last[y] = full[y].max()
        sums = np.empty((MOMENTS + channels, TILE), rows.dtype)
        weight, reach = np.empty(TILE, rows.dtype), np.empty(TILE, rows.dtype)
        dot, shown = np.empty(TILE, rows.dtype), np.empty(TILE, rows.dtype)
        for place in range(start[t + 1] - 1, start[t] - 1, -1):
            g, slot = entry[place, 0], entry[place, 1]
            mx, my, opacity = rows[g, 0] - f(ox), rows[g, 1] - f(oy), rows[g, 5]
            A, B, D = rows[g, 2], rows[g, 3], rows[g, 4]
            sums[:] = f(0)
            for y in range(max(span[g, 0] - oy, 0), min(span[g, 1] - oy + 1, h)):
                if place >= last[y]:
                    continue
                dy = my - (f(y) + f(0.5))
                rest = f(0.5) * D * dy * dy
                for x in range(TILE):
                    dx = mx - (f(x) + f(0.5))
                    sigma = f(0.5) * A * dx * dx + B * dx * dy + rest
                    raw = opacity * _exp_minus(sigma, f)
                    seen = (sigma >= f(0)) & (raw >= f(ALPHA_MIN)) & (place < full[y, x])
                    alpha = min(raw, f(ALPHA_MAX)) if seen else f(0)
                    inverse = f(1) / (f(1) - alpha)
                    before = T[y, x] * inverse
                    T[y, x] = before
                    weight[x] = alpha * before
                    shown[x] = inverse
                    # A clamped alpha passes no gradient on.
                    reach[x] = raw if seen & (raw <= f(ALPHA_MAX)) else f(0)
                    dot[x] = g_pixel[channels, y, x]
                for c in range(channels):
                    value = features[g, c]
                    for x in range(TILE):
                        dot[x] += value * g_pixel[c, y, x]
                    for x in range(TILE):
                        sums[MOMENTS + c, x] += weight[x] * g_pixel[c, y, x]
                for x in range(TILE):
                    dx = mx - (f(x) + f(0.5))
                    g_alpha = T[y, x] * dot[x] - behind[y, x] * shown[x]
                    behind[y, x] += weight[x] * dot[x]
                    g_sigma = -reach[x] * g_alpha
                    sums[0, x] += g_sigma
                    sums[1, x] += g_sigma * dx
                    sums[2, x] += g_sigma * dy
                    sums[3, x] += g_sigma * dx * dx
                    sums[4, x] += g_sigma * dx * dy
                    sums[5, x] += g_sigma * dy * dy
            for k in range(MOMENTS + channels):
                value = f(0)
                for x in range(TILE):
                    value += sums[k, x]
                slots[slot, k] = value


@njit(parallel=True, **_OPTIONS)
def _project_backward(
    means, quats, scales, opacities, V, lens, rows, first_slot, slots,
    g_means, g_quats, g_scales, g_opacities, g_features,
):  # fmt: skip
    """Sum each Gaussian's slots and carry them through the projection."""
    channels = g_features.shape[1]
    for i in prange(len(means)):
        if first_slot[i] == first_slot[i + 1]:
            continue
        s0 = s1 = s2 = s3 = s4 = s5 = 0.0
        for k in range(first_slot[i], first_slot[i + 1]):
            s0, s1, s2 = s0 + slots[k, 0], s1 + slots[k, 1], s2 + slots[k, 2]
            s3, s4, s5 = s3 + slots[k, 3], s4 + slots[k, 4], s5 + slots[k, 5]
            for c in range(channels):
                g_features[i, c] += slots[k, MOMENTS + c]
        A, B_, D = rows[i, 2], rows[i, 3], rows[i, 4]
        g_opacities[i] = -s0 / opacities[i]
        g_mx, g_my = A * s1 + B_ * s2, B_ * s1 + D * s2
        # dL/dΣ = -Σ⁻¹ (dL/dΣ⁻¹) Σ⁻¹, with dL/dΣ⁻¹ = ½ Σ g_σ d dᵀ.
        p, q, r, t = A * s3 + B_ * s4, A * s4 + B_ * s5, B_ * s3 + D * s4, B_ * s4 + D * s5
        g_xx, g_xy, g_yy = -0.5 * (p * A + q * B_), -(p * B_ + q * D), -0.5 * (r * B_ + t * D)

        x, y, z = _to_camera(means[i], V)
        inv, (qw, qx, qy, qz), R = _rotation(quats[i])
        u, v, B = _jacobian(x, y, z, V, lens)
        P = _image_axes(B, R)
        g_P = np.empty(6)
        for k in range(3):
            s = scales[i, k]
            a, c = P[k] * s, P[3 + k] * s
            g_a, g_c = 2 * g_xx * a + g_xy * c, g_xy * a + 2 * g_yy * c
            g_scales[i, k] = g_a * P[k] + g_c * P[3 + k]
            g_P[k], g_P[3 + k] = g_a * s, g_c * s
        g_B, G = np.empty(6), np.empty(9)
        for k in range(3):
            g_B[k] = g_P[0] * R[3 * k] + g_P[1] * R[3 * k + 1] + g_P[2] * R[3 * k + 2]
            g_B[3 + k] = g_P[3] * R[3 * k] + g_P[4] * R[3 * k + 1] + g_P[5] * R[3 * k + 2]
            for j in range(3):
                G[3 * k + j] = B[k] * g_P[j] + B[3 + k] * g_P[3 + j]

        g_j00 = g_B[0] * V[0, 0] + g_B[1] * V[0, 1] + g_B[2] * V[0, 2]
        g_j02 = g_B[0] * V[2, 0] + g_B[1] * V[2, 1] + g_B[2] * V[2, 2]
        g_j11 = g_B[3] * V[1, 0] + g_B[4] * V[1, 1] + g_B[5] * V[1, 2]
        g_j12 = g_B[3] * V[2, 0] + g_B[4] * V[2, 1] + g_B[5] * V[2, 2]
        fx, fy = lens[0], lens[1]
        g_z = (-fx * g_j00 + fx * u * g_j02 - fy * g_j11 + fy * v * g_j12) / (z * z)
        g_u, g_v = fx * g_mx, fy * g_my
        if lens[4] <= x / z <= lens[5]:
            g_u -= fx / z * g_j02
        if lens[6] <= y / z <= lens[7]:
            g_v -= fy / z * g_j12
        g_x, g_y = g_u / z, g_v / z
        g_z -= (g_u * x + g_v * y) / (z * z)
        for k in range(3):
            g_means[i, k] = V[0, k] * g_x + V[1, k] * g_y + V[2, k] * g_z

        g_w = 2 * (qx * (G[7] - G[5]) + qy * (G[2] - G[6]) + qz * (G[3] - G[1]))
        g_qx = 2 * (qy * (G[1] + G[3]) + qz * (G[2] + G[6]) + qw * (G[7] - G[5]) - 2 * qx * (G[4] + G[8]))
        g_qy = 2 * (qx * (G[1] + G[3]) + qz * (G[5] + G[7]) + qw * (G[2] - G[6]) - 2 * qy * (G[0] + G[8]))
        g_qz = 2 * (qx * (G[2] + G[6]) + qy * (G[5] + G[7]) + qw * (G[3] - G[1]) - 2 * qz * (G[0] + G[4]))
        along = qw * g_w + qx * g_qx + qy * g_qy + qz * g_qz
        g_quats[i, 0], g_quats[i, 1] = (g_w - along * qw) * inv, (g_qx - along * qx) * inv
        g_quats[i, 2], g_quats[i, 3] = (g_qy - along * qy) * inv, (g_qz - along * qz) * inv


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, features, T_cam_world, K, width, height):
        splats = (x.detach().contiguous().numpy() for x in (means, quats, scales, opacities, features))
        m, q, s, o, f = inputs = tuple(splats)
        V, lens = T_cam_world.detach().double().numpy(), _lens(K, width, height)
        n, dtype = len(m), m.dtype
        rows, depth = np.zeros((n, 6), dtype), np.empty(n, dtype)
        rect, span = np.empty((n, 4), np.int32), np.empty((n, 2), np.int32)
        _project(m, q, s, o, V, lens, width, height, rows, depth, rect, span)
        tiles_x, tiles_y = -(-width // TILE), -(-height // TILE)
        start, first_slot, entry = _bin(np.argsort(depth, kind="stable"), rect, tiles_x, tiles_x * tiles_y)
        image = torch.empty(f.shape[1] + 1, height, width, dtype=means.dtype)
        stop = np.empty((height, width), np.int64)
        with numba.parallel_chunksize(TILES_PER_TASK):
            _blend(start, entry, rows, span, f, tiles_x, image.numpy(), stop)
        ctx.kept = (inputs, V, lens, rows, span, first_slot, start, entry, tiles_x, image.numpy().copy(), stop)
        return image

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, V, lens, rows, span, first_slot, start, entry, tiles_x, image, stop = ctx.kept
        m, q, s, o, f = inputs
        slots = np.empty((len(entry), MOMENTS + image.shape[0] - 1), image.dtype)
        with numba.parallel_chunksize(TILES_PER_TASK):
            _blend_backward(start, entry, rows, span, f, tiles_x, image, stop, grad.contiguous().numpy(), slots)
        grads = [torch.zeros(x.shape, dtype=grad.dtype) for x in inputs]
        g_m, g_q, g_s, g_o, g_f = (g.numpy() for g in grads)
        _project_backward(m, q, s, o, V, lens, rows, first_slot, slots, g_m, g_q, g_s, g_o, g_f)
        return *grads, None, None, None, None


def _lens(K: Tensor, width: int, height: int) -> np.ndarray:
    """Return fx, fy, cx, cy and the range of directions (x/z and y/z) that the linearisation is trusted in."""
    fx, fy, cx, cy = (float(K[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    left, right = -cx / fx - margin_x, (width - cx) / fx + margin_x
    top, bottom = -cy / fy - margin_y, (height - cy) / fy + margin_y
    return np.array([fx, fy, cx, cy, left, right, top, bottom])


def rasterize_cpu(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, features: Tensor,
    T_cam_world: Tensor, K: Tensor, width: int, height: int,
) -> Tensor:  # fmt: skip
    """Render [channels + 1, height, width], the last channel being alpha."""
    return _Rasterize.apply(means, quats, scales, opacities, features, T_cam_world, K, width, height)
