"""Gaussians bound to triangles, and their normals, as two Numba passes with analytic backwards.

The same arithmetic as `avatar.binding` in torch, which reads and writes each number dozens of times. Rotations pass
their gradients on as torques: turning by a small ω changes the loss by τ·ω, whatever the rotation is written as.
All kernels work in the dtype of their input; one thread, in order: the same bits on every run.
"""

import math

import numpy as np
from numba import njit

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
TINY = 1e-12


@njit(**OPTIONS)
def _cross(a, b):
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


@njit(**OPTIONS)
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(**OPTIONS)
def _product(a, b):
    """Hamilton product, wxyz."""
    return (
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    )


@njit(**OPTIONS)
def _quat(a, b, c):
    """Quaternion of the rotation with these columns, by the formula whose pivot is at least 1."""
    m00, m11, m22 = a[0], b[1], c[2]
    if m22 < 0:
        if m00 > m11:
            q = (c[1] * -1 + b[2], 1 + m00 - m11 - m22, b[0] + a[1], c[0] + a[2])
        else:
            q = (c[0] - a[2], b[0] + a[1], 1 - m00 + m11 - m22, c[1] + b[2])
    elif m00 < -m11:
        q = (a[1] - b[0], c[0] + a[2], c[1] + b[2], 1 - m00 - m11 + m22)
    else:
        q = (1 + m00 + m11 + m22, b[2] - c[1], c[0] - a[2], a[1] - b[0])
    n = 1 / math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
    return (q[0] * n, q[1] * n, q[2] * n, q[3] * n)


@njit(**OPTIONS)
def face_rows(vertices, faces, rows):
    """Write each face's frame: a0, a1, a2, size, centre, quaternion, length of the first edge, height."""
    for i in range(len(faces)):
        p, q, r = faces[i]
        v0 = (vertices[p, 0], vertices[p, 1], vertices[p, 2])
        e1 = (vertices[q, 0] - v0[0], vertices[q, 1] - v0[1], vertices[q, 2] - v0[2])
        e2 = (vertices[r, 0] - v0[0], vertices[r, 1] - v0[1], vertices[r, 2] - v0[2])
        length = math.sqrt(_dot(e1, e1))
        by = 1 / max(length, TINY)
        a0 = (e1[0] * by, e1[1] * by, e1[2] * by)
        c = _cross(a0, e2)
        height = math.sqrt(_dot(c, c))
        by = 1 / max(height, TINY)
        a1 = (c[0] * by, c[1] * by, c[2] * by)
        a2 = _cross(a0, a1)
        turn = _quat(a0, a1, a2)
        for k in range(3):
            rows[i, k], rows[i, 3 + k], rows[i, 6 + k] = a0[k], a1[k], a2[k]
            rows[i, 10 + k] = v0[k] + (e1[k] + e2[k]) / 3
        rows[i, 9] = 0.5 * (length + height)
        for k in range(4):
            rows[i, 13 + k] = turn[k]
        rows[i, 17], rows[i, 18] = length, height


@njit(**OPTIONS)
def bind(rows, face_index, means, quats, log_scales, out_means, out_quats, out_scales):
    """Carry Gaussians from their faces' frames to the world."""
    for i in range(len(face_index)):
        f = rows[face_index[i]]
        k = f[9]
        for d in range(3):
            out_means[i, d] = k * (f[d] * means[i, 0] + f[3 + d] * means[i, 1] + f[6 + d] * means[i, 2]) + f[10 + d]
            out_scales[i, d] = k * math.exp(log_scales[i, d])
        w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
        n = 1 / max(math.sqrt(w * w + x * x + y * y + z * z), TINY)
        turned = _product((f[13], f[14], f[15], f[16]), (w * n, x * n, y * n, z * n))
        for d in range(4):
            out_quats[i, d] = turned[d]


@njit(**OPTIONS)
def bind_backward(
    vertices, faces, rows, face_index, means, quats, scales, g_means, g_quats, g_scales,
    into_means, into_quats, into_log_scales, into_vertices,
):  # fmt: skip
    """Carry gradients back to the local Gaussians and, by way of their faces' frames, to the vertices."""
    # Per face: by its three axes (torques folded in), its size and its centre.
    by_face = np.zeros((len(faces), 13), rows.dtype)
    for i in range(len(face_index)):
        face = face_index[i]
        f, g = rows[face], by_face[face]
        k = f[9]
        g_m = (g_means[i, 0], g_means[i, 1], g_means[i, 2])
        m = (means[i, 0], means[i, 1], means[i, 2])
        size = 0.0
        for a in range(3):
            along = f[3 * a] * g_m[0] + f[3 * a + 1] * g_m[1] + f[3 * a + 2] * g_m[2]
            into_means[i, a] = k * along
            size += along * m[a]
            for d in range(3):
                g[3 * a + d] += k * m[a] * g_m[d]
            into_log_scales[i, a] = g_scales[i, a] * scales[i, a]
            if k > 0:
                size += g_scales[i, a] * scales[i, a] / k
            g[10 + a] += g_m[a]
        g[9] += size
        w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
        n = 1 / max(math.sqrt(w * w + x * x + y * y + z * z), TINY)
        unit = (w * n, x * n, y * n, z * n)
        turn, g_q = (f[13], f[14], f[15], f[16]), (g_quats[i, 0], g_quats[i, 1], g_quats[i, 2], g_quats[i, 3])
        inner = _product((turn[0], -turn[1], -turn[2], -turn[3]), g_q)
        along = inner[0] * unit[0] + inner[1] * unit[1] + inner[2] * unit[2] + inner[3] * unit[3]
        for d in range(4):
            into_quats[i, d] = (inner[d] - along * unit[d]) * n
        whole = _product(turn, unit)
        tau = _product(g_q, (whole[0], -whole[1], -whole[2], -whole[3]))
        # Half the torque of a quaternion's gradient; half again shares it among the three axes.
        for a in range(3):
            axis = (f[3 * a], f[3 * a + 1], f[3 * a + 2])
            turned = _cross((tau[1], tau[2], tau[3]), axis)
            for d in range(3):
                g[3 * a + d] += 0.25 * turned[d]
    for i in range(len(faces)):
        _face_backward(vertices, faces[i], rows[i], by_face[i], into_vertices)


@njit(**OPTIONS)
def _face_backward(vertices, face, f, g, into_vertices):
    p, q, r = face
    a0, a1 = (f[0], f[1], f[2]), (f[3], f[4], f[5])
    e2 = (vertices[r, 0] - vertices[p, 0], vertices[r, 1] - vertices[p, 1], vertices[r, 2] - vertices[p, 2])
    g2 = (g[6], g[7], g[8])
    u, v = _cross(a1, g2), _cross(g2, a0)
    g0, g1 = (g[0] + u[0], g[1] + u[1], g[2] + u[2]), (g[3] + v[0], g[4] + v[1], g[5] + v[2])
    by_height, by_length = 1 / max(f[18], TINY), 1 / max(f[17], TINY)
    along, half = _dot(a1, g1), 0.5 * g[9]
    # A face without area has no normal to learn about.
    flat = f[18] <= TINY or f[17] <= TINY
    c = (
        (g1[0] - a1[0] * along) * by_height + half * a1[0],
        (g1[1] - a1[1] * along) * by_height + half * a1[1],
        (g1[2] - a1[2] * along) * by_height + half * a1[2],
    )
    if flat:
        c = (0 * c[0], 0 * c[1], 0 * c[2])
    u, into_e2 = _cross(e2, c), _cross(c, a0)
    g0 = (g0[0] + u[0], g0[1] + u[1], g0[2] + u[2])
    along = _dot(a0, g0)
    for d in range(3):
        into_e1 = 0.0 if flat else (g0[d] - a0[d] * along) * by_length + half * a0[d]
        third = g[10 + d] / 3
        into_vertices[q, d] += into_e1 + third
        into_vertices[r, d] += into_e2[d] + third
        into_vertices[p, d] += third - into_e1 - into_e2[d]


@njit(**OPTIONS)
def shortest_axes(quats, scales, means, eye, R, out, signed_axis):
    """Write each splat's shortest axis, flipped to the viewer, along the rows of R; and which axis, with its sign."""
    for i in range(len(quats)):
        s0, s1, s2 = scales[i, 0], scales[i, 1], scales[i, 2]
        a = 0 if s0 < min(s1, s2) else (1 if s1 < s2 else 2)
        w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
        n = 1 / max(math.sqrt(w * w + x * x + y * y + z * z), TINY)
        w, x, y, z = w * n, x * n, y * n, z * n
        if a == 0:
            axis = (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y))
        elif a == 1:
            axis = (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x))
        else:
            axis = (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y))
        facing = axis[0] * (eye[0] - means[i, 0]) + axis[1] * (eye[1] - means[i, 1]) + axis[2] * (eye[2] - means[i, 2])
        sign = -1.0 if facing < 0 else 1.0
        for d in range(3):
            signed_axis[i, d] = sign * axis[d]
            out[i, d] = sign * (R[d, 0] * axis[0] + R[d, 1] * axis[1] + R[d, 2] * axis[2])


@njit(**OPTIONS)
def shortest_axes_backward(quats, signed_axis, R, grad, into_quats):
    """Carry gradients by the normals back to the quaternions."""
    for i in range(len(quats)):
        g = (
            R[0, 0] * grad[i, 0] + R[1, 0] * grad[i, 1] + R[2, 0] * grad[i, 2],
            R[0, 1] * grad[i, 0] + R[1, 1] * grad[i, 1] + R[2, 1] * grad[i, 2],
            R[0, 2] * grad[i, 0] + R[1, 2] * grad[i, 1] + R[2, 2] * grad[i, 2],
        )
        tau = _cross((signed_axis[i, 0], signed_axis[i, 1], signed_axis[i, 2]), g)
        w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
        n = 1 / max(w * w + x * x + y * y + z * z, TINY)
        turned = _product((0.0, 2 * tau[0], 2 * tau[1], 2 * tau[2]), (w, x, y, z))
        for d in range(4):
            into_quats[i, d] = turned[d] * n
