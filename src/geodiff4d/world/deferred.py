"""Numba kernels that draw a textured, lit mesh: z-buffer, vertex normals, and shading once per pixel and layer.

The CPU path of the open world. Corners are snapped to 1/256 of a sample and edges are integers: two triangles never
leave a hole or cover a sample twice. Some faces (hair) are cut out by their texture's opacity, sample by sample.
A pixel's samples are averaged by layer (skin and cloth, wet or hard things, strands) before each layer is lit once;
`world/shading.py` says the same in torch.
"""

import math

import numpy as np
from numba import njit

SUB = 256
LAYERS = 3
SURFACE, WET, STRAND = 0, 1, 2
TEXEL = 8
"""Linear RGB, specular strength, bump (3), opacity."""
ATTRIBUTES = 8
"""Per vertex: normal (3), open sky, open key light, strand direction (3)."""
CURVE = 2048
CURVE_MAX = 4.0
_FAR = 4_000_000

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "arcp", "reassoc"}}


@njit(**_OPTIONS)
def vertex_normals(vertices, faces, out):
    """Write area-weighted unit normals."""
    out[:] = 0
    for f in range(len(faces)):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        ux, uy, uz = (
            vertices[b, 0] - vertices[a, 0],
            vertices[b, 1] - vertices[a, 1],
            vertices[b, 2] - vertices[a, 2],
        )
        vx, vy, vz = (
            vertices[c, 0] - vertices[a, 0],
            vertices[c, 1] - vertices[a, 1],
            vertices[c, 2] - vertices[a, 2],
        )
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for i in (a, b, c):
            out[i, 0] += nx
            out[i, 1] += ny
            out[i, 2] += nz
    for i in range(len(out)):
        length = math.sqrt(out[i, 0] * out[i, 0] + out[i, 1] * out[i, 1] + out[i, 2] * out[i, 2])
        scale = np.float32(1.0) / max(np.float32(length), np.float32(1e-20))
        out[i, 0] *= scale
        out[i, 1] *= scale
        out[i, 2] *= scale


@njit(**_OPTIONS)
def project(vertices, T, K, scale, screen):
    """Write x, y [samples] and 1/z of world points; 1/z is zero behind the camera."""
    for i in range(len(vertices)):
        x, y, z = vertices[i, 0], vertices[i, 1], vertices[i, 2]
        cx = T[0, 0] * x + T[0, 1] * y + T[0, 2] * z + T[0, 3]
        cy = T[1, 0] * x + T[1, 1] * y + T[1, 2] * z + T[1, 3]
        cz = T[2, 0] * x + T[2, 1] * y + T[2, 2] * z + T[2, 3]
        if not cz > 1e-3:
            screen[i, 0] = screen[i, 1] = screen[i, 2] = 0
            continue
        w = np.float32(1.0) / cz
        screen[i, 0] = (K[0, 0] * cx * w + K[0, 1] * cy * w + K[0, 2]) * scale
        screen[i, 1] = (K[1, 1] * cy * w + K[1, 2]) * scale
        screen[i, 2] = w


@njit(**_OPTIONS)
def _opacity(u, v, texture, width):
    height = len(texture) // width
    x = min(max(u * width - np.float32(0.5), np.float32(0.0)), np.float32(width - 1.001))
    y = min(max(v * height - np.float32(0.5), np.float32(0.0)), np.float32(height - 1.001))
    i, j = int(x), int(y)
    fx, fy = x - np.float32(i), y - np.float32(j)
    t = j * width + i
    top = texture[t, 7] + (texture[t + 1, 7] - texture[t, 7]) * fx
    bottom = texture[t + width, 7] + (texture[t + width + 1, 7] - texture[t + width, 7]) * fx
    return top + (bottom - top) * fy


@njit(**_OPTIONS)
def zbuffer(screen, faces, cut, uv, uv_faces, texture, width, near, face):
    """Find the nearest face of every sample: `near` gets 1/z (0 where none), `face` its index (-1).

    Faces flagged in `cut` only cover samples where the texture's opacity is at least one half.
    """
    rows, columns = near.shape
    near[:] = 0
    face[:] = -1
    # Backward: the outer shells, which come last, hide the inner ones before their texture is read.
    for f in range(len(faces)):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        wa, wb, wc = screen[a, 2], screen[b, 2], screen[c, 2]
        if not (wa > 0 and wb > 0 and wc > 0):
            continue
        ax, ay = np.int64(screen[a, 0] * SUB + 0.5), np.int64(screen[a, 1] * SUB + 0.5)
        bx, by = np.int64(screen[b, 0] * SUB + 0.5), np.int64(screen[b, 1] * SUB + 0.5)
        cx, cy = np.int64(screen[c, 0] * SUB + 0.5), np.int64(screen[c, 1] * SUB + 0.5)
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        # Counter-clockwise from outside turns clockwise where y points down.
        if area >= 0 or max(abs(ax), abs(ay), abs(bx), abs(by), abs(cx), abs(cy)) > _FAR * SUB:
            continue
        x0, x1 = max((min(ax, bx, cx) + 127) >> 8, 0), min((max(ax, bx, cx) - 128) >> 8, columns - 1)
        y0, y1 = max((min(ay, by, cy) + 127) >> 8, 0), min((max(ay, by, cy) - 128) >> 8, rows - 1)
        if x1 < x0 or y1 < y0:
            continue
        # Edge functions of (b, c), (c, a) and (a, b), positive inside; a shared edge belongs to one side only.
        ex, ey = cy - by, bx - cx
        fx, fy = ay - cy, cx - ax
        gx, gy = by - ay, ax - bx
        px, py = x0 * SUB + SUB // 2, y0 * SUB + SUB // 2
        e = (px - bx) * ex + (py - by) * ey - (0 if ex > 0 or (ex == 0 and ey > 0) else 1)
        g = (px - cx) * fx + (py - cy) * fy - (0 if fx > 0 or (fx == 0 and fy > 0) else 1)
        h = (px - ax) * gx + (py - ay) * gy - (0 if gx > 0 or (gx == 0 and gy > 0) else 1)
        inv = np.float32(1.0) / np.float32(-area)
        dwx = np.float32(SUB) * inv * (ex * wa + fx * wb + gx * wc)
        dwy = np.float32(SUB) * inv * (ey * wa + fy * wb + gy * wc)
        w = inv * (e * wa + g * wb + h * wc)
        ta, tb, tc = uv_faces[f, 0], uv_faces[f, 1], uv_faces[f, 2]
        for y in range(y0, y1 + 1):
            ei, gi, hi, wi = e, g, h, w
            for x in range(x0, x1 + 1):
                if (ei | gi | hi) >= 0 and wi > near[y, x]:
                    seen = True
                    if cut[f]:
                        p, q, r = ei * inv * wa, gi * inv * wb, hi * inv * wc
                        s = np.float32(1.0) / (p + q + r)
                        u = (p * uv[ta, 0] + q * uv[tb, 0] + r * uv[tc, 0]) * s
                        v = (p * uv[ta, 1] + q * uv[tb, 1] + r * uv[tc, 1]) * s
                        seen = _opacity(u, v, texture, width) >= 0.5
                    if seen:
                        near[y, x] = wi
                        face[y, x] = f
                ei += ex * SUB
                gi += fx * SUB
                hi += gx * SUB
                wi += dwx
            e += ey * SUB
            g += fy * SUB
            h += gy * SUB
            w += dwy


@njit(**_OPTIONS)
def _gather(f, x, y, weight, screen, faces, uv, uv_faces, attributes, texture, width, row):
    """Add `weight` times the attributes and texel of a face at a place in the picture to `row`."""
    a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
    ax, ay = screen[a, 0] - x, screen[a, 1] - y
    bx, by = screen[b, 0] - x, screen[b, 1] - y
    cx, cy = screen[c, 0] - x, screen[c, 1] - y
    p = max(cx * by - bx * cy, np.float32(0.0)) * screen[a, 2]
    q = max(ax * cy - cx * ay, np.float32(0.0)) * screen[b, 2]
    r = max(bx * ay - ax * by, np.float32(0.0)) * screen[c, 2]
    total = p + q + r
    if total < 1e-12:
        p = q = r = np.float32(1 / 3)
    else:
        s = np.float32(1.0) / total
        p, q, r = p * s, q * s, r * s
    for i in range(ATTRIBUTES):
        row[TEXEL + i] += weight * (p * attributes[a, i] + q * attributes[b, i] + r * attributes[c, i])
    ta, tb, tc = uv_faces[f, 0], uv_faces[f, 1], uv_faces[f, 2]
    height = len(texture) // width
    u = (p * uv[ta, 0] + q * uv[tb, 0] + r * uv[tc, 0]) * width - np.float32(0.5)
    v = (p * uv[ta, 1] + q * uv[tb, 1] + r * uv[tc, 1]) * height - np.float32(0.5)
    u = min(max(u, np.float32(0.0)), np.float32(width - 1.001))
    v = min(max(v, np.float32(0.0)), np.float32(height - 1.001))
    i, j = int(u), int(v)
    fu, fv = u - np.float32(i), v - np.float32(j)
    one = np.float32(1.0)
    top, bottom = weight * (one - fv), weight * fv
    k00, k01, k10, k11 = (one - fu) * top, fu * top, (one - fu) * bottom, fu * bottom
    t = j * width + i
    for n in range(TEXEL):
        row[n] += (
            k00 * texture[t, n]
            + k01 * texture[t + 1, n]
            + k10 * texture[t + width, n]
            + k11 * texture[t + width + 1, n]
        )


@njit(**_OPTIONS)
def _light(row, kind, light, out):
    """Light one layer of a pixel: linear RGB to `out`; `pack_light` lays `light` out. All in float32."""
    f = np.float32
    zero, one = f(0.0), f(1.0)
    nx, ny, nz = row[8] + row[4], row[9] + row[5], row[10] + row[6]
    s = one / f(math.sqrt(max(nx * nx + ny * ny + nz * nz, f(1e-9))))
    nx, ny, nz = nx * s, ny * s, nz * s
    ao, lit, gloss = row[11], row[12], row[3]
    cosine = nx * light[0] + ny * light[1] + nz * light[2]
    shine = max(nx * light[6] + ny * light[7] + nz * light[8], zero)
    facing = min(max(nx * light[3] + ny * light[4] + nz * light[5], zero), one)
    rim = (one - facing) * (one - facing)
    rim = f(0.3) * ao * (f(0.25) + rim * rim)
    tight = shine * shine
    tight = tight * tight
    tight = tight * tight
    tight = tight * tight
    broad = tight * (f(0.4) + f(0.9) * tight * tight) * lit if cosine > zero else zero
    if kind == STRAND:
        gloss = zero
    for i in range(3):
        wrap = light[24 + i]
        d = max((cosine + wrap) / (one + wrap), zero)
        irradiance = light[12 + i] + nx * light[15 + i] + ny * light[18 + i] + nz * light[21 + i]
        out[i] = row[i] * (max(irradiance, f(0.02)) * ao + light[9 + i] * d * d * (one + wrap) * lit)
        out[i] += gloss * (broad * light[9 + i] + rim * irradiance)
    if kind == WET:
        s = one / f(math.sqrt(max(row[8] * row[8] + row[9] * row[9] + row[10] * row[10], f(1e-9))))
        h = (row[8] * light[6] + row[9] * light[7] + row[10] * light[8]) * s
        if h > f(0.9):
            sharp = f(1.6) * f(math.exp(f(350.0) * f(math.log(h)))) * lit
            for i in range(3):
                out[i] += sharp * light[9 + i]
    elif kind == STRAND:
        t = row[13] * light[6] + row[14] * light[7] + row[15] * light[8]
        n = row[8] * light[6] + row[9] * light[7] + row[10] * light[8]
        toward = row[8] * light[0] + row[9] * light[1] + row[10] * light[2]
        seen = lit * min(max(toward + f(0.3), zero), one) * row[3]
        p, q = t - f(0.08) * n, t + f(0.12) * n
        first = f(math.exp(f(45.0) * f(math.log(max(one - p * p, f(1e-6))))))
        q = max(one - q * q, f(1e-6))
        q = q * q * q
        q = q * q
        second = q * q
        for i in range(3):
            out[i] += light[9 + i] * seen * (f(0.5) * first + f(1.2) * second * f(math.sqrt(max(row[i], zero))))


@njit(**_OPTIONS)
def resolve(
    face, screen, faces, kind, uv, uv_faces, attributes, texture, width, light, R, behind, behind_srgb, curve,
    exposure, rgb, normal, mask,
):  # fmt: skip
    """Shade a z-buffer of n × n samples per pixel: sRGB over the background, unit normals, coverage.

    `R` takes the attributes' frame to image normals; `curve` is the tone curve over √x.
    """
    size = rgb.shape[1]
    n = len(face) // size
    share = np.float32(1.0 / (n * n))
    rows = np.zeros((LAYERS, TEXEL + ATTRIBUTES), np.float32)
    count = np.zeros(LAYERS, np.int64)
    colour, total = np.zeros(3, np.float32), np.zeros(6, np.float32)
    steps = np.float32((len(curve) - 1) / math.sqrt(CURVE_MAX))
    mine = np.empty(n * n, np.int32)
    for y in range(size):
        for x in range(size):
            covered = 0
            for j in range(n):
                for i in range(n):
                    mine[j * n + i] = face[y * n + j, x * n + i]
                    covered += mine[j * n + i] >= 0
            if covered:
                count[:] = 0
                total[:] = 0
            for first in range(n * n):
                f = mine[first]
                if f < 0:
                    continue
                # Samples of one face are read once, at their middle.
                together, px, py = 0, 0, 0
                for k in range(first, n * n):
                    if mine[k] == f:
                        mine[k] = -1
                        together += 1
                        px += k % n
                        py += k // n
                layer = kind[f]
                if count[layer] == 0:
                    rows[layer] = 0
                count[layer] += together
                each = np.float32(1.0) / np.float32(together)
                _gather(
                    f, np.float32(x * n + 0.5) + px * each, np.float32(y * n + 0.5) + py * each, np.float32(together),
                    screen, faces, uv, uv_faces, attributes, texture, width, rows[layer],
                )  # fmt: skip
            if covered == 0:
                for i in range(3):
                    rgb[i, y, x] = behind_srgb[i, y, x]
                    normal[i, y, x] = 0
                mask[y, x] = 0
                continue
            for k in range(LAYERS):
                if count[k] == 0:
                    continue
                row = rows[k]
                inverse = np.float32(1.0) / np.float32(count[k])
                for i in range(TEXEL + ATTRIBUTES):
                    row[i] *= inverse
                _light(row, k, light, colour)
                weight = np.float32(count[k]) * share
                for i in range(3):
                    total[i] += weight * colour[i]
                    total[3 + i] += weight * row[TEXEL + i]
            coverage = covered * share
            mask[y, x] = coverage
            nx = R[0, 0] * total[3] + R[0, 1] * total[4] + R[0, 2] * total[5]
            ny = R[1, 0] * total[3] + R[1, 1] * total[4] + R[1, 2] * total[5]
            nz = R[2, 0] * total[3] + R[2, 1] * total[4] + R[2, 2] * total[5]
            s = np.float32(1.0) / max(np.float32(math.sqrt(nx * nx + ny * ny + nz * nz)), np.float32(1e-9))
            normal[0, y, x], normal[1, y, x], normal[2, y, x] = nx * s, ny * s, nz * s
            for i in range(3):
                linear = exposure * total[i] + (np.float32(1.0) - coverage) * behind[i, y, x]
                at = math.sqrt(min(max(linear, np.float32(0.0)), np.float32(CURVE_MAX * 0.999))) * steps
                k = int(at)
                rest = at - np.float32(k)
                rgb[i, y, x] = curve[k] + (curve[k + 1] - curve[k]) * rest
