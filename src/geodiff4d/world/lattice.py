"""Lattice noise at scattered points, as a Numba kernel: what painting people spends its time on."""

import math

import numpy as np
from numba import njit

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "arcp", "reassoc"}}


@njit(**_OPTIONS)
def add_lattice_noise(points, matrix, offset, lattice, ease, gain, out):
    """Add `gain` times trilinear noise of a periodic `lattice` [n, n, n, channels] at matrix · point + offset."""
    n, channels = lattice.shape[0], lattice.shape[3]
    one = np.float32(1.0)
    for i in range(len(points)):
        p, q, r = points[i, 0], points[i, 1], points[i, 2]
        x = matrix[0, 0] * p + matrix[0, 1] * q + matrix[0, 2] * r + offset[0]
        y = matrix[1, 0] * p + matrix[1, 1] * q + matrix[1, 2] * r + offset[1]
        z = matrix[2, 0] * p + matrix[2, 1] * q + matrix[2, 2] * r + offset[2]
        fx, fy, fz = math.floor(x), math.floor(y), math.floor(z)
        u, v, w = np.float32(x - fx), np.float32(y - fy), np.float32(z - fz)
        if ease:
            u, v, w = u * u * (3 - 2 * u), v * v * (3 - 2 * v), w * w * (3 - 2 * w)
        a, b, c = int(fx) % n, int(fy) % n, int(fz) % n
        d, e, f = (a + 1) % n, (b + 1) % n, (c + 1) % n
        w00, w01 = (one - u) * (one - v) * gain, (one - u) * v * gain
        w10, w11 = u * (one - v) * gain, u * v * gain
        for k in range(channels):
            near = w00 * lattice[a, b, c, k] + w01 * lattice[a, e, c, k] + w10 * lattice[d, b, c, k]
            far = w00 * lattice[a, b, f, k] + w01 * lattice[a, e, f, k] + w10 * lattice[d, b, f, k]
            near += w11 * lattice[d, e, c, k]
            far += w11 * lattice[d, e, f, k]
            out[i, k] += near + (far - near) * w
