"""Place iBUG's 68 landmarks on the mean head by geometry: rays, lid rims and the lips' painted mask."""

import numpy as np
from scipy.optimize import nnls
from scipy.spatial import cKDTree


class Caster:
    """Brute-force rays against a few thousand triangles."""

    def __init__(self, v: np.ndarray, faces: np.ndarray, use: np.ndarray):
        self.index = np.flatnonzero(use)
        self.a, b, c = (v[faces[self.index, k]] for k in range(3))
        self.e1, self.e2 = b - self.a, c - self.a

    def all_hits(self, origin: np.ndarray, direction: np.ndarray) -> list[tuple[float, int, np.ndarray]]:
        """Return (distance, face, bary) of every hit, nearest first."""
        p = np.cross(direction, self.e2)
        det = (self.e1 * p).sum(1)
        det = np.where(np.abs(det) < 1e-14, 1e-14, det)
        s = origin - self.a
        u = (s * p).sum(1) / det
        q = np.cross(s, self.e1)
        w = (q @ direction) / det
        t = (self.e2 * q).sum(1) / det
        hit = np.flatnonzero((u >= -1e-6) & (w >= -1e-6) & (u + w <= 1 + 1e-6) & (t > 1e-6))
        found = [(float(t[i]), int(self.index[i]), np.array([1 - u[i] - w[i], u[i], w[i]])) for i in hit]
        return sorted(found, key=lambda h: h[0])

    def front(self, x: float, y: float) -> tuple[float, int, np.ndarray] | None:
        """Return (z, face, bary) of what a camera far in front sees at (x, y)."""
        hits = self.all_hits(np.array([x, y, 1.0]), np.array([0.0, 0.0, -1.0]))
        return None if not hits else (1 - hits[0][0], *hits[0][1:])


def landmarks68(v, faces, outer, at, fields, actions, names) -> tuple[np.ndarray, np.ndarray]:
    """Place iBUG's 68 points by geometry: the subject's left half is measured, the right half mirrors it."""
    cast = Caster(v, faces, outer & ~fields["ears"][faces].any(1))
    eye = v[fields["left_eye"]].mean(0)
    half: dict[int, tuple[int, np.ndarray]] = {}
    half |= jaw_points(cast, v, fields, eye)
    for k, i in enumerate(range(22, 27)):
        u = np.linspace(-0.95, 1.0, 5)[k]
        half[i] = cast.front(eye[0] + 0.002 + 0.0215 * u, eye[1] + 0.0195 + 0.004 * (1 - u**2))[1:]
    half |= nose_points(cast, v, eye)
    half |= lid_points(v, faces, outer, at, eye)
    half |= mouth_points(cast, v, faces, fields, actions[names.index("jawOpen")])
    return mirrored(half, v, faces, outer)


def jaw_points(cast: Caster, v: np.ndarray, fields: dict, eye: np.ndarray) -> dict:
    """Points 8 (chin) to 16 (before the left ear), on the plane through both tragi and the chin."""
    ear = v[fields["ears"] & (v[:, 0] > 0)]
    level = ear[np.abs(ear[:, 1] - eye[1]) < 0.012]
    top = np.array([0.0, eye[1] - 0.004, (level if len(level) else ear)[:, 2].max() + 0.008])
    profile = [(y, cast.front(0, y)) for y in np.arange(-0.14, -0.06, 0.001)]
    profile = [(y, h[0]) for y, h in profile if h]
    chin_z = max(z for y, z in profile if y > -0.125)
    chin_y = min(y for y, z in profile if z > chin_z - 0.012)
    chin = np.array([0, chin_y, chin_z - 0.012])
    down = (chin - top) / np.linalg.norm(chin - top)
    centre = top + 0.45 * (chin - top)
    side = cast.all_hits(np.array([1.0, *top[1:]]), np.array([-1.0, 0, 0]))[0]
    start = np.arctan2(-np.linalg.norm(top - centre), 1 - side[0])
    out = {16: side[1:]}
    for k, i in enumerate(range(15, 7, -1), 1):
        angle = start + (np.pi / 2 - start) * k / 8
        direction = np.array([np.cos(angle), 0, 0]) + np.sin(angle) * down
        out[i] = cast.all_hits(centre, direction)[-1][1:]
    return out


def nose_points(cast: Caster, v: np.ndarray, eye: np.ndarray) -> dict:
    """Points 27 to 30 down the bridge, 33 under the tip, 34 and 35 along the left nostril."""
    ys = np.arange(eye[1] - 0.065, eye[1] + 0.005, 0.0005)
    z = np.array([cast.front(0, y)[0] for y in ys])
    tip = int(np.argmax(np.where(ys > eye[1] - 0.055, z, -1)))
    below = np.flatnonzero((ys < ys[tip] - 0.004) & (ys > ys[tip] - 0.024))
    base = int(below[np.argmin(z[below] + 0.35 * (ys[below] - ys[tip]) * -1)])
    out = {27 + k: cast.front(0, y)[1:] for k, y in enumerate(np.linspace(eye[1], ys[tip], 4))}
    y = ys[base] + 0.006
    xs = np.arange(0.004, 0.032, 0.0005)
    depth = np.array([cast.front(x, y)[0] for x in xs])
    wing = xs[int(np.argmax(-np.gradient(depth, xs) * (xs > 0.009)))]
    out[33] = cast.front(0, ys[base])[1:]
    out[34] = cast.front(0.45 * wing, ys[base] + 0.001)[1:]
    out[35] = cast.front(0.9 * wing, ys[base] + 0.003)[1:]
    return out


def lid_points(v: np.ndarray, faces: np.ndarray, outer: np.ndarray, at: dict, eye: np.ndarray) -> dict:
    """Points 42 to 47: on the left lids' margin, where the outer skin's chart meets the socket's."""
    rim = np.flatnonzero(at["left_socket"] & at["head"])
    p = v[rim]
    inner, outside = p[np.argmin(p[:, 0])], p[np.argmax(p[:, 0])]
    line = inner[1] + (p[:, 0] - inner[0]) / (outside[0] - inner[0]) * (outside[1] - inner[1])
    upper = p[:, 1] > line

    def on(fraction: float, side: np.ndarray) -> tuple[int, np.ndarray]:
        x = inner[0] + fraction * (outside[0] - inner[0])
        pick = rim[side][np.argmin(np.abs(p[side, 0] - x))]
        return at_vertex(int(pick), faces, outer)

    corner = {42: rim[np.argmin(p[:, 0])], 45: rim[np.argmax(p[:, 0])]}
    out = {i: at_vertex(int(k), faces, outer) for i, k in corner.items()}
    return out | {43: on(0.33, upper), 44: on(0.68, upper), 46: on(0.68, ~upper), 47: on(0.33, ~upper)}


def at_vertex(vertex: int, faces: np.ndarray, use: np.ndarray) -> tuple[int, np.ndarray]:
    """Return a vertex as a surface point."""
    face = int(np.flatnonzero((faces == vertex).any(1) & use)[0])
    return face, (faces[face] == vertex).astype(float)


def mouth_points(cast: Caster, v: np.ndarray, faces: np.ndarray, fields: dict, jaw_open: np.ndarray) -> dict:
    """Points 48 to 67 of the left half: the vermilion's rim, and both sides of the line where the lips meet."""
    lips = np.flatnonzero(fields["lips"])
    width = v[lips, 0].max()
    low, high = v[lips, 1].min(), v[lips, 1].max()
    drop = -jaw_open[:, 1]
    limit = 0.5 * drop[lips].max()

    def column(x: float) -> tuple:
        """Top of the vermilion, last point of the upper lip, first of the lower, bottom of the vermilion."""
        red = [h for y in np.arange(high + 0.004, low - 0.004, -0.0003) if (h := cast.front(x, y))]
        red = [h for h in red if fields["lips"][faces[h[1]]] @ h[2] > 0.5]
        is_lower = [drop[faces[h[1]]] @ h[2] > limit for h in red]
        split = is_lower.index(True) if True in is_lower else len(red) // 2
        return red[0][1:], red[max(split - 1, 0)][1:], red[split][1:], red[-1][1:]

    mid, peak, side = column(0.0), column(0.24 * width), column(0.6 * width)
    near, low_side = column(0.3 * width), column(0.62 * width)
    corner = lips[np.argmax(v[lips, 0])]
    inner = column(0.88 * width)
    used = np.isin(np.arange(len(faces)), cast.index)
    return {
        51: mid[0], 52: peak[0], 53: side[0], 54: at_vertex(int(corner), faces, used),
        55: low_side[3], 56: near[3], 57: mid[3],
        62: mid[1], 63: near[1], 64: inner[1], 65: near[2], 66: mid[2],
    }  # fmt: skip


MIRROR = {
    **{16 - i: i for i in range(8, 17)}, **{43 - i: i for i in range(22, 27)}, **{i: i for i in (27, 28, 29, 30, 33)},
    31: 35, 32: 34, 36: 45, 37: 44, 38: 43, 39: 42, 40: 47, 41: 46, 48: 54, 49: 53, 50: 52, 51: 51, 57: 57, 58: 56,
    59: 55, 60: 64, 61: 63, 62: 62, 66: 66, 67: 65,
}  # fmt: skip
"""Right-half (or middle) point → the left-half point it mirrors."""


def mirrored(half: dict, v: np.ndarray, faces: np.ndarray, outer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill the right half through the mesh's own symmetry: the face whose corners mirror the left one's."""
    twin = cKDTree(v).query(v * [-1, 1, 1])[1]
    by_corners = {tuple(sorted(f)): i for i, f in enumerate(faces.tolist())}
    index, bary = np.zeros(68, int), np.zeros((68, 3))
    for i in range(68):
        if i in half:
            index[i], bary[i] = half[i]
            continue
        face, weights = half[MIRROR[i]]
        corners = twin[faces[face]]
        other = by_corners.get(tuple(sorted(corners.tolist())))
        if other is None:  # the mirrored quad is split along its other diagonal: take the nearest point on the surface
            index[i], bary[i] = nearest_point((v[faces[face]] * weights[:, None]).sum(0) * [-1, 1, 1], v, faces, outer)
            continue
        index[i] = other
        bary[i] = [weights[list(corners).index(c)] for c in faces[other]]
    return index, bary


def nearest_point(p: np.ndarray, v: np.ndarray, faces: np.ndarray, use: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the nearest surface point by clamped projection onto the nearby faces."""
    best = (np.inf, 0, np.zeros(3))
    near = np.flatnonzero(use & (np.linalg.norm(v[faces].mean(1) - p, axis=1) < 0.03))
    for face in near:
        A = np.vstack([v[faces[face]].T, 1e3 * np.ones(3)])
        w, error = nnls(A, np.r_[p, 1e3])
        if error < best[0]:
            best = (error, int(face), w / w.sum())
    return best[1], best[2]
