"""Projection of Gaussians, 16 at a time, and its analytic backward (EWA splatting, Zwicker et al. 2001).

Ours / gsplat's: the same semantics (see `gaussians`), but the 2D determinant is summed from squares, which float32
keeps exact for needles, where xx·yy - xy² cancels.
"""

import math

import numpy as np
from numba import prange

from geodiff4d.render.kernels.simd import (
    INLINE,
    LANES,
    OPTIONS,
    at,
    choose,
    fill,
    floored,
    fma,
    get,
    high,
    load,
    load3,
    load4,
    load_transposed,
    log2_above,
    low,
    minus,
    njit,
    put,
    root,
    store,
    store3,
    store4,
    store_transposed,
    truncated,
)  # fmt: skip

TILE = 16
"""Side of a tile [px]."""
ROW = 16
FEATURES = 6
"""A Gaussian's row: x, y, conic xx, xy, yy in log₂ units (2^-(A dx² + B dx dy + D dy²)), opacity, features, then for
culling how far the exponent may fall before alpha is below 1/255, -B/2D and -B/2A. A gradient's row: sums of dL/dσ
times 1, dx, dy, dx², dx·dy, dy², then the features'."""
LIMIT = ROW - 3
NEAR_M = 0.01
EPS_2D = 0.3
LOG2_E = math.log2(math.e)
HUGE, TINY = 1e30, 1e-24


@njit(**INLINE)
def _to_camera(means, V, i):
    x, y, z = load3(means, 3 * i)
    return (
        fma(at(V, 0), x, fma(at(V, 1), y, fma(at(V, 2), z, at(V, 3)))),
        fma(at(V, 4), x, fma(at(V, 5), y, fma(at(V, 6), z, at(V, 7)))),
        fma(at(V, 8), x, fma(at(V, 9), y, fma(at(V, 10), z, at(V, 11)))),
    )


@njit(**INLINE)
def _rotation(quats, i):
    """Return (|q|², 1/|q|, the unit quaternions, their matrices' nine entries)."""
    w, x, y, z = load4(quats, 4 * i)
    square = fma(w, w, fma(x, x, fma(y, y, z * z)))
    inverse = 1.0 / root(square)
    w, x, y, z = w * inverse, x * inverse, y * inverse, z * inverse
    R = (
        1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y),
        2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x),
        2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y),
    )  # fmt: skip
    return square, inverse, (w, x, y, z), R


@njit(**INLINE)
def _jacobian(camera_point, V, lens):
    """Return 1/z, directions (x/z, y/z), J's entries, and B = J·R_cam_world, the projection's affine map in world axes.

    Like gsplat, directions far outside the image are clamped first: the linearisation explodes there.
    """
    x, y, z = camera_point
    near = 1.0 / z
    u, v = x * near, y * near
    uc, vc = low(high(u, at(lens, 4)), at(lens, 5)), low(high(v, at(lens, 6)), at(lens, 7))
    a, c = at(lens, 0) * near, at(lens, 1) * near
    b, d = -1.0 * (a * uc), -1.0 * (c * vc)
    B = (
        fma(b, at(V, 8), a * at(V, 0)), fma(b, at(V, 9), a * at(V, 1)), fma(b, at(V, 10), a * at(V, 2)),
        fma(d, at(V, 8), c * at(V, 4)), fma(d, at(V, 9), c * at(V, 5)), fma(d, at(V, 10), c * at(V, 6)),
    )  # fmt: skip
    return near, (u, v), (uc, vc), (a, c), B


@njit(**INLINE)
def _dot(a, b):
    return fma(a[0], b[0], fma(a[1], b[1], a[2] * b[2]))


@njit(**INLINE)
def _image_axes(B, R):
    """P = B·R, two rows: the splat's axes in pixels per metre."""
    c0, c1, c2 = (R[0], R[3], R[6]), (R[1], R[4], R[7]), (R[2], R[5], R[8])
    return (_dot(B[:3], c0), _dot(B[:3], c1), _dot(B[:3], c2)), (_dot(B[3:], c0), _dot(B[3:], c1), _dot(B[3:], c2))


@njit(**INLINE)
def _covariance(P, s):
    """Return the 2D covariance (xx, xy, yy) [px²], blurred by `EPS_2D`, and its determinant."""
    a = (P[0][0] * s[0], P[0][1] * s[1], P[0][2] * s[2])
    c = (P[1][0] * s[0], P[1][1] * s[1], P[1][2] * s[2])
    xx, xy, yy = _dot(a, a), _dot(a, c), _dot(c, c)
    m = (minus(a[1], c[0], a[0] * c[1]), minus(a[2], c[0], a[0] * c[2]), minus(a[2], c[1], a[1] * c[2]))
    det = _dot(m, m) + EPS_2D * (xx + yy + EPS_2D)
    return xx + EPS_2D, xy, yy + EPS_2D, det


@njit(**INLINE)
def _copy_features(features, channels, rows, k):
    """Copy a Gaussian's features to its row; whether they are numbers."""
    probe = np.float32(0)
    for c in range(channels):
        value = get(features, k * channels + c)
        probe += value * np.float32(0)
        put(rows, ROW * k + FEATURES + c, value)
    return probe == np.float32(0)


@njit(**INLINE)
def _pixels(m, covariance, reach):
    """First and last pixel whose centre lies within reach of a splat, along one axis."""
    r = root(reach * covariance)
    return -1.0 * floored(r - m + 0.5), floored(m + r - 0.5)


@njit(**INLINE)
def _tiles(first, last, count, seen):
    """From pixels to a range of tiles, empty where nothing is seen; NaN becomes 0."""
    zero = fill(0.0)
    start = low(high(floored(first * (1 / TILE)), zero), count)
    stop = low(high(floored(last * (1 / TILE)) + 1.0, zero), count)
    return truncated(start), truncated(choose(seen, stop, zero))


@njit(**OPTIONS)
def _project_sixteen(
    i, means, quats, scales, opacities, features, V, lens, rows, depth, rect, slots, broken, scratch, mine
):
    x, y, z = point = _to_camera(means, V, i)
    square, _, _, R = _rotation(quats, i)
    _, (u, v), _, _, B = _jacobian(point, V, lens)
    s = load3(scales, 3 * i)
    xx, xy, yy, det = _covariance(_image_axes(B, R), s)
    opacity = load(opacities, i)
    # Zero times a number is zero, unless it is infinite or none.
    whole = (0.0 * (x + y + z + square + s[0] + s[1] + s[2] + opacity) == 0.0) & (square > TINY)
    in_front = z > NEAR_M
    sound = whole & (in_front & (det < HUGE))
    inverse = 1.0 / det
    A, C, D = (0.5 * LOG2_E) * yy * inverse, -LOG2_E * xy * inverse, (0.5 * LOG2_E) * xx * inverse
    mx, my = fma(at(lens, 0), u, at(lens, 2)), fma(at(lens, 1), v, at(lens, 3))
    limit = log2_above(opacity) + math.log2(255.0)
    zero, one = fill(0.0), fill(1.0)
    reach = (2 * math.log(2.0)) * high(limit, zero)
    x0, x1 = _pixels(mx, xx, reach)
    y0, y1 = _pixels(my, yy, reach)
    seen = sound & (limit > 0.0) & (x1 >= x0) & (y1 >= y0)
    left, right = _tiles(x0, x1, at(lens, 8), seen)
    above, below = _tiles(y0, y1, at(lens, 9), seen)
    lost = choose(sound, zero, choose(whole, choose(in_front, one, zero), one))
    store(scratch, mine, left)
    store(scratch, mine + LANES, right)
    store(scratch, mine + 2 * LANES, above)
    store(scratch, mine + 3 * LANES, below)
    store(scratch, mine + 4 * LANES, truncated(lost))
    store(depth, i, z)
    blank = (zero, zero, zero, zero, zero, zero, zero)
    store_transposed(rows, ROW * i, (mx, my, A, C, D, opacity, *blank, limit, -0.5 * C / D, -0.5 * C / A))
    for k in range(LANES):
        a, b = get(scratch, mine + k), get(scratch, mine + LANES + k)
        c, d = get(scratch, mine + 2 * LANES + k), get(scratch, mine + 3 * LANES + k)
        good = _copy_features(features, features.shape[1], rows, i + k) and get(scratch, mine + 4 * LANES + k) == 0
        put(broken, i + k, np.uint8(not good))
        put(slots, i + k, np.int32(max(b - a, 0) * max(d - c, 0) if good else 0))
        put(rect, 4 * (i + k), a)
        put(rect, 4 * (i + k) + 1, b)
        put(rect, 4 * (i + k) + 2, c)
        put(rect, 4 * (i + k) + 3, d)


@njit(parallel=True, **OPTIONS)
def project(means, quats, scales, opacities, features, V, lens, rows, depth, rect, slots, broken, scratch, threads):
    """Fill every Gaussian's row, depth, rectangle of tiles (x0, x1, y0, y1), number of tiles, and whether it is broken.

    `lens` is fx, fy, cx, cy, the four limits of the trusted directions and the counts of tiles. At least 16 Gaussians:
    the last 16 are done together, some of them twice.
    """
    n = len(means)
    groups = (n + LANES - 1) // LANES
    for t in prange(threads):
        for group in range(groups * t // threads, groups * (t + 1) // threads):
            _project_sixteen(
                min(group * LANES, n - LANES), means, quats, scales, opacities, features, V, lens, rows, depth, rect,
                slots, broken, scratch, 5 * LANES * t,
            )  # fmt: skip


@njit(**INLINE)
def _sum_slots(rows, first_slot, scratch, mine, i):
    """Sum the gradient rows of 16 Gaussians over their tiles, always in the same order; returns columns."""
    for k in range(LANES):
        whole = fill(0.0)
        for e in range(get(first_slot, i + k), get(first_slot, i + k + 1)):
            whole = whole + load(rows, ROW * e)
        store(scratch, mine + ROW * k, whole)
    return load_transposed(scratch, mine)


@njit(**INLINE)
def _conic_backward(conic, g):
    """From dL/dσ's moments to dL/d(mean x, mean y), with the conic in natural units, and dL/dΣ (xx, xy, yy).

    dL/dΣ = -Σ⁻¹ (dL/dΣ⁻¹) Σ⁻¹, with dL/dΣ⁻¹ = ½ Σ g_σ d dᵀ; the distances d here are pixel minus mean.
    """
    A, B, D = conic
    mx, my = -1.0 * fma(A, g[1], B * g[2]), -1.0 * fma(B, g[1], D * g[2])
    p, q, r, t = fma(A, g[3], B * g[4]), fma(A, g[4], B * g[5]), fma(B, g[3], D * g[4]), fma(B, g[4], D * g[5])
    return mx, my, -0.5 * fma(p, A, q * B), -1.0 * fma(p, B, q * D), -0.5 * fma(r, B, t * D)


@njit(**INLINE)
def _quat_backward(q, inverse, G):
    """From dL/dR to dL/dq, through the normalisation."""
    w, x, y, z = q
    gw = 2.0 * (x * (G[7] - G[5]) + y * (G[2] - G[6]) + z * (G[3] - G[1]))
    gx = 2.0 * (y * (G[1] + G[3]) + z * (G[2] + G[6]) + w * (G[7] - G[5]) - 2.0 * x * (G[4] + G[8]))
    gy = 2.0 * (x * (G[1] + G[3]) + z * (G[5] + G[7]) + w * (G[2] - G[6]) - 2.0 * y * (G[0] + G[8]))
    gz = 2.0 * (x * (G[2] + G[6]) + y * (G[5] + G[7]) + w * (G[3] - G[1]) - 2.0 * z * (G[0] + G[4]))
    along = fma(w, gw, fma(x, gx, fma(y, gy, z * gz)))
    gw, gx, gy, gz = gw - along * w, gx - along * x, gy - along * y, gz - along * z
    return gw * inverse, gx * inverse, gy * inverse, gz * inverse


@njit(**INLINE)
def _axes_backward(P, s, g_xx, g_xy, g_yy):
    """From dL/dΣ, Σ = (P·s)(P·s)ᵀ, to dL/ds and the two rows of dL/dP."""
    a, c = (P[0][0] * s[0], P[0][1] * s[1], P[0][2] * s[2]), (P[1][0] * s[0], P[1][1] * s[1], P[1][2] * s[2])
    xx, yy = 2.0 * g_xx, 2.0 * g_yy
    ya = (fma(xx, a[0], g_xy * c[0]), fma(xx, a[1], g_xy * c[1]), fma(xx, a[2], g_xy * c[2]))
    yc = (fma(yy, c[0], g_xy * a[0]), fma(yy, c[1], g_xy * a[1]), fma(yy, c[2], g_xy * a[2]))
    gs = (
        fma(ya[0], P[0][0], yc[0] * P[1][0]),
        fma(ya[1], P[0][1], yc[1] * P[1][1]),
        fma(ya[2], P[0][2], yc[2] * P[1][2]),
    )
    return gs, (ya[0] * s[0], ya[1] * s[1], ya[2] * s[2]), (yc[0] * s[0], yc[1] * s[1], yc[2] * s[2])


@njit(**INLINE)
def _camera_backward(point, V, lens, R, ya, yc, mx, my):
    """From dL/dP, P = J·R_cam_world·R, and dL/d(mean on the image) to dL/d(mean)."""
    near, (u, v), (uc, vc), (a, c), _ = _jacobian(point, V, lens)
    ba = (_dot(ya, R[0:3]), _dot(ya, R[3:6]), _dot(ya, R[6:9]))
    bc = (_dot(yc, R[0:3]), _dot(yc, R[3:6]), _dot(yc, R[6:9]))
    first, second = (at(V, 0), at(V, 1), at(V, 2)), (at(V, 4), at(V, 5), at(V, 6))
    third, zero = (at(V, 8), at(V, 9), at(V, 10)), fill(0.0)
    # J = [a 0 -a·u; 0 c -c·v], with a = fx/z and c = fy/z.
    bent_x, bent_y = _dot(ba, third), _dot(bc, third)
    ga, gc = _dot(ba, first) - bent_x * uc, _dot(bc, second) - bent_y * vc
    in_x, in_y = (u >= at(lens, 4)) & (u <= at(lens, 5)), (v >= at(lens, 6)) & (v <= at(lens, 7))
    gu = at(lens, 0) * mx - choose(in_x, bent_x * a, zero)
    gv = at(lens, 1) * my - choose(in_y, bent_y * c, zero)
    by_near = fma(ga, at(lens, 0), fma(gc, at(lens, 1), fma(gu, point[0], gv * point[1])))
    g = (gu * near, gv * near, -1.0 * (by_near * near * near))
    return (
        _dot((first[0], second[0], third[0]), g),
        _dot((first[1], second[1], third[1]), g),
        _dot((first[2], second[2], third[2]), g),
    )


@njit(**INLINE)
def _only(mask, x):
    """Three numbers where the mask is set, else zero."""
    zero = fill(0.0)
    return choose(mask, x[0], zero), choose(mask, x[1], zero), choose(mask, x[2], zero)


@njit(**OPTIONS)
def _back_sixteen(
    i, means, quats, scales, opacities, V, lens, rows, first_slot, scratch, mine,
    g_means, g_quats, g_scales, g_opacities, g_features,
):  # fmt: skip
    channels = g_features.shape[1]
    g = _sum_slots(rows, first_slot, scratch, mine, i)
    for k in range(LANES):
        for c in range(channels):
            put(g_features, (i + k) * channels + c, get(scratch, mine + ROW * k + FEATURES + c))
    point = _to_camera(means, V, i)
    _, inverse, q, R = _rotation(quats, i)
    _, _, _, _, B = _jacobian(point, V, lens)
    P = _image_axes(B, R)
    s = load3(scales, 3 * i)
    xx, xy, yy, det = _covariance(P, s)
    per = 1.0 / det
    mx, my, g_xx, g_xy, g_yy = _conic_backward((yy * per, -1.0 * (xy * per), xx * per), g)
    gs, ya, yc = _axes_backward(P, s, g_xx, g_xy, g_yy)
    G = (
        fma(B[0], ya[0], B[3] * yc[0]), fma(B[0], ya[1], B[3] * yc[1]), fma(B[0], ya[2], B[3] * yc[2]),
        fma(B[1], ya[0], B[4] * yc[0]), fma(B[1], ya[1], B[4] * yc[1]), fma(B[1], ya[2], B[4] * yc[2]),
        fma(B[2], ya[0], B[5] * yc[0]), fma(B[2], ya[1], B[5] * yc[1]), fma(B[2], ya[2], B[5] * yc[2]),
    )  # fmt: skip
    gq = _quat_backward(q, inverse, G)
    drawn = load(first_slot, i + 1) > load(first_slot, i)
    store3(g_means, 3 * i, _only(drawn, _camera_backward(point, V, lens, R, ya, yc, mx, my)))
    store3(g_scales, 3 * i, _only(drawn, gs))
    x, y, z = _only(drawn, gq[1:])
    store4(g_quats, 4 * i, (choose(drawn, gq[0], fill(0.0)), x, y, z))
    store(g_opacities, i, choose(drawn, -1.0 * g[0] / load(opacities, i), fill(0.0)))


@njit(parallel=True, **OPTIONS)
def project_backward(
    means, quats, scales, opacities, V, lens, rows, first_slot, scratch, threads,
    g_means, g_quats, g_scales, g_opacities, g_features,
):  # fmt: skip
    """Sum each Gaussian's gradient rows and carry them through the projection. Of those that are not drawn: zero."""
    n = len(means)
    groups = (n + LANES - 1) // LANES
    for t in prange(threads):
        for group in range(groups * t // threads, groups * (t + 1) // threads):
            _back_sixteen(
                min(group * LANES, n - LANES), means, quats, scales, opacities, V, lens, rows, first_slot, scratch,
                ROW * LANES * t, g_means, g_quats, g_scales, g_opacities, g_features,
            )  # fmt: skip
