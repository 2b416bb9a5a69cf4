"""The parts of OpenHead's asset that follow from the cut mesh: atlas, skinning, joints, regions and landmarks.

Everything is measured on the mean head in FLAME's axes (+y up, face toward +z, +x to the subject's left), in metres.
"""

from pathlib import Path

import numpy as np
import scipy.sparse as sp
import scipy.sparse.csgraph as csgraph
from scipy.interpolate import PchipInterpolator
from scipy.optimize import nnls
from scipy.spatial import cKDTree

JOINTS = ("root", "neck", "jaw", "left_eye", "right_eye")
EXPOSED = 64
TEETH_SCALE = np.array([0.75, 0.9, 0.82])
LIPS_CLOSED = 0.014  # the jaw that closes the half millimetre by which MakeHuman's resting lips part
TEETH_BACK = {"teeth_upper": 0.0, "teeth_lower": 0.0007}  # [m]: the lower row bites behind the upper one
# Where each chart goes in the unit square: left, top, width, height (v down). The head takes most of it.
BOXES = {
    "head": (0.005, 0.005, 0.99, 0.615),
    "bust": (0.005, 0.63, 0.605, 0.30),
    "mouth": (0.62, 0.63, 0.24, 0.185),
    "tongue": (0.87, 0.63, 0.12, 0.185),
    "left_eye": (0.62, 0.825, 0.155, 0.165),
    "right_eye": (0.785, 0.825, 0.155, 0.165),
    "left_socket": (0.945, 0.825, 0.05, 0.08),
    "right_socket": (0.945, 0.912, 0.05, 0.08),
    "cap": (0.53, 0.63, 0.08, 0.08),
    "teeth_upper": (0.005, 0.94, 0.29, 0.055),
    "teeth_lower": (0.31, 0.94, 0.29, 0.055),
}


def assemble(base, cut, samples: np.ndarray, actions: np.ndarray, names: list[str], align, pca) -> dict:
    """Compute every array of the asset (docs/OPENHEAD.md) from the cut mesh and the sampled identities."""
    charts = name_charts(base, cut)
    samples, actions = fit_teeth(cut, samples, actions)
    samples -= LIPS_CLOSED * actions[names.index("jawOpen")].astype(np.float32)
    loops = {c: np.unique(cut.faces[charts == c]) for c in BOXES}
    n = samples.shape[1]
    at = {c: np.isin(np.arange(n), v) for c, v in loops.items()}
    eyeball = at["left_eye"] | at["right_eye"]
    rest = samples.mean(0)
    ear = paint(base, cut, "ears") > 0.5
    skull = (rest[:, 1] > rest[ear, 1].mean()) & (at["head"] | at["bust"])
    samples = align(samples, eyeball, skull)
    rest = samples.mean(0)
    samples = samples - [0, rest[ear, 1].mean(), rest[ear, 2].mean()]  # the point between the ears is the origin
    rest = samples.mean(0)

    mean, basis, share = pca(samples, importance(rest, cut.faces, at))
    outer = np.isin(charts, ("head", "bust"))
    weights = skinning(base, cut, at)
    masks, fields = regions(base, cut, mean, at, ear)
    face_index, bary = landmarks68(mean, cut.faces, outer, at, masks, actions, names)
    return {
        "template": mean.astype(np.float32),
        "faces": cut.faces.astype(np.int32),
        "shape_basis": basis.astype(np.float16),
        "shape_variance": share.astype(np.float32),
        "exposed_shapes": np.array(EXPOSED),
        "expr_basis": np.moveaxis(actions, 0, -1).astype(np.float16),
        "expression_names": np.array(names),
        "joint_regressor": joint_regressor(mean, at, ear).astype(np.float32),
        "skin_weights": weights.astype(np.float32),
        "uv": pack(cut, charts).astype(np.float32),
        "uv_faces": cut.uv_faces.astype(np.int32),
        **{f"field_{k}": v.astype(np.float32) for k, v in fields.items()},
        **{f"region_{k}": v for k, v in masks.items()},
        "landmarks68_face_index": face_index.astype(np.int32),
        "landmarks68_bary": bary.astype(np.float32),
        "mediapipe_face_index": np.zeros(0, np.int32),
        "mediapipe_bary": np.zeros((0, 3), np.float32),
        "mediapipe_index": np.zeros(0, np.int32),
    }


def fit_teeth(cut, samples: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shrink MakeHuman's bands of teeth about their own middle: at full size they poke through the lips."""
    samples, actions = samples.copy(), actions.copy()
    for group in ("teeth_upper", "teeth_lower"):
        used = np.unique(cut.faces[cut.group == group])
        for x in (samples, actions):
            middle = x[:, used].mean(1, keepdims=True)
            x[:, used] = middle + TEETH_SCALE * (x[:, used] - middle)
        samples[:, used, 2] -= TEETH_BACK[group]
    return samples, actions


def kept_from(old: Path, asset: dict) -> dict:
    """Return the MediaPipe embedding of an asset already at `old`, if its topology is the same."""
    if not old.exists():
        return {}
    with np.load(old) as data:
        same = data["faces"].shape == asset["faces"].shape and (data["faces"] == asset["faces"]).all()
        return {k: data[k] for k in data.files if k.startswith("mediapipe")} if same else {}


def graph(faces: np.ndarray, n: int) -> sp.csr_matrix:
    """Return the vertex adjacency, 0 or 1."""
    i, j = faces.ravel(), np.roll(faces, -1, 1).ravel()
    A = sp.csr_matrix((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), shape=(n, n))
    A.data[:] = 1
    return A


def paint(base, cut, name: str) -> np.ndarray:
    """Return one of MakeHuman's painted masks per vertex (the largest over a vertex's uv copies)."""
    out = np.zeros(cut.matrix.shape[0])
    body = cut.group == "body"
    nearest = cKDTree(base.uv).query(cut.uv)[1]
    np.maximum.at(out, cut.faces[body].ravel(), base.masks[name][nearest[cut.uv_faces[body].ravel()]])
    return out


def name_charts(base, cut) -> np.ndarray:
    """Name the chart of each face: connected pieces of the atlas, told apart by size, side and place."""
    _, label = csgraph.connected_components(graph(cut.uv_faces, len(cut.uv)), directed=False)
    label = label[cut.uv_faces[:, 0]]
    body = cut.group == "body"
    x = cut.matrix @ base.vertices[:, 0]
    out = cut.group.copy().astype("U16")
    pieces, counts = np.unique(label[body], return_counts=True)
    order = pieces[np.argsort(-counts)]
    names = ["head", "bust", "mouth"]
    for piece in order[:5]:
        where = label == piece
        side = x[cut.faces[where]].mean()
        out[where] = names.pop(0) if abs(side) < 0.01 else ("left_socket" if side > 0 else "right_socket")
    assert len(order) == 5 and not names, f"expected five charts on the body, got {counts}"
    return out


def pack(cut, charts: np.ndarray) -> np.ndarray:
    """Move every chart into its box, v down; the head is turned upright and its face is enlarged."""
    uv = np.array(cut.uv) * [1, -1]
    out = np.empty_like(uv)
    for name, (left, top, width, height) in BOXES.items():
        used = np.unique(cut.uv_faces[charts == name])
        p = uv[used]
        if name == "head":
            p = np.stack([-p[:, 1], p[:, 0]], 1)  # a quarter turn: the scalp was at small u
        low, extent = p.min(0), np.ptp(p, axis=0)
        if name == "head":
            q = (p - low) / extent
            q = np.stack([magnify(q[:, 0], 0.5, 0.2, 0.4), magnify(q[:, 1], 0.62, 0.18, 0.25)], 1)
            out[used] = q * [width, height] + [left, top]
        else:
            scale = min(width / extent[0], height / extent[1])
            out[used] = (p - low) * scale + [left, top]
    return out


def magnify(x: np.ndarray, centre: float, width: float, strength: float) -> np.ndarray:
    """Map [0, 1] onto itself monotonically, stretched about `centre` (separable, so charts cannot fold)."""

    def f(t):
        return t + strength * np.tanh((t - centre) / width)

    return (f(x) - f(0.0)) / (f(1.0) - f(0.0))


def importance(rest: np.ndarray, faces: np.ndarray, at: dict[str, np.ndarray]) -> np.ndarray:
    """Return PCA weights: area, three times as much on the face, a third on the bust, little inside the head."""
    a, b, c = (rest[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 6
    w = np.zeros(len(rest))
    for k in range(3):
        np.add.at(w, faces[:, k], area)
    face = (rest[:, 2] > 0.03) & at["head"] & (rest[:, 1] > -0.11)
    w *= np.where(face, 3.0, np.where(at["bust"] & (rest[:, 1] < -0.09), 0.3, 1.0))
    inner = (at["mouth"] | at["left_socket"] | at["right_socket"]) & ~at["head"]
    return w * np.where(inner, 0.1, 1) + 1e-8


def skinning(base, cut, at: dict[str, np.ndarray]) -> np.ndarray:
    """Fold MakeHuman's bone weights into five joints and smooth them; eyeballs, teeth and tongue are rigid."""
    neck_share = {"neck01": 0.2, "neck02": 0.55, "neck03": 0.9}
    dense = np.zeros((len(base.vertices), 5))
    for bone, w in base.weights.items():
        chain, b = [], bone
        while b:
            chain.append(b)
            b = base.parents.get(b, "")
        if "jaw" in chain:
            dense[:, 2] += w
        elif "head" in chain:
            dense[:, 1] += w
        else:
            share = neck_share.get(bone, 0.0)
            dense[:, 1] += share * w
            dense[:, 0] += (1 - share) * w
    out = cut.matrix @ dense
    out /= out.sum(1, keepdims=True)
    A = graph(cut.faces, len(out))
    P = sp.diags(1 / np.asarray(A.sum(1)).ravel()) @ A
    for _ in range(6):
        out = 0.5 * out + 0.5 * (P @ out)
    for mask, joint in (("teeth_upper", 1), ("teeth_lower", 2), ("tongue", 2), ("left_eye", 3), ("right_eye", 4)):
        out[at[mask]] = np.eye(5)[joint]
    out[out < 1e-3] = 0
    return out / out.sum(1, keepdims=True)


def joint_regressor(mean: np.ndarray, at: dict[str, np.ndarray], ear: np.ndarray) -> np.ndarray:
    """Return rows of non-negative weights that sum to one and give the joints on the mean head exactly.

    Root: the point between the ears, so that turning the head hardly moves it. Neck: the middle of the neck. Jaw: between
    the temporomandibular joints, in front of and below the ears. Eyes: their eyeball's mean.
    """
    skin = at["head"] | at["bust"]
    eyes = [mean[at[k]].mean(0) for k in ("left_eye", "right_eye")]
    targets = [np.zeros(3), np.array([0, -0.085, -0.015]), np.array([0, -0.012, 0.018])]
    rows = []
    for p, reach in zip(targets, (0.02, 0.025, 0.02), strict=True):
        near = np.flatnonzero(skin & (np.abs(mean[:, 1] - p[1]) < reach) & ~ear)
        rows.append(np.zeros(len(mean)))
        rows[-1][near] = spread_weights(mean[near], p)
    for k in ("left_eye", "right_eye"):
        rows.append(at[k] / at[k].sum())
    out = np.stack(rows)
    assert np.allclose(out @ mean, [*targets, *eyes], atol=1e-4)
    return out


def spread_weights(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return non-negative weights, as even as possible, that sum to one and average `points` to `target`."""
    strong = np.vstack([1e4 * (points - target).T, 1e4 * np.ones(len(points))])
    w, _ = nnls(np.vstack([strong, np.eye(len(points))]), np.r_[0, 0, 0, 1e4, np.zeros(len(points))], maxiter=20 * len(points))
    return w / w.sum()


def smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def hairline_field(v: np.ndarray) -> np.ndarray:
    """Return the signed distance above a smooth hairline [m]: forehead, temples, in front of and behind the ears, nape."""
    centre = np.array([0.0, 0.03, -0.01])
    d = v - centre
    r = np.linalg.norm(d, axis=1)
    azimuth = np.degrees(np.arctan2(np.abs(d[:, 0]), d[:, 2]))
    elevation = np.degrees(np.arcsin(d[:, 1] / r))
    at = [0, 22, 42, 54, 62, 67, 74, 92, 102, 118, 140, 180]
    line = PchipInterpolator(at, [44, 43, 38, 25, 6, -12, -24, -25, -28, -38, -49, -53])(azimuth)
    return np.radians(elevation - line) * r


def brow_field(v: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """Return the signed distance inside the brows [m]: an arc that is thin at the temple, about 20 mm above the eye."""
    u = (np.abs(v[:, 0]) - eye[0] - 0.002) / 0.0215
    middle = eye[1] + 0.0185 + 0.004 * (1 - u**2)
    half = 0.0048 * (1 - 0.45 * smoothstep(u, 0, 1.0))
    inside = np.minimum(half - np.abs(v[:, 1] - middle), 0.0215 * (1 - np.abs(u)))
    return np.where(v[:, 2] > 0.03, inside, -0.02)


def regions(base, cut, v: np.ndarray, at: dict, ear: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return named vertex masks and float fields whose zero level is a region's smooth edge (hairline, brows, lips).

    Skin is the whole outer surface; lips, brows, lids, scalp, ears and neck are parts of it.
    """
    outer = at["head"] | at["bust"]
    A = graph(cut.faces, len(v))
    rim = at["mouth"] & at["head"]
    within = rim.copy()
    for _ in range(2):
        within = ((A @ within) > 0) & outer
    red = np.where(within, 1.0, paint(base, cut, "lips"))
    P = sp.diags(1 / np.maximum(np.asarray(A.sum(1)).ravel(), 1)) @ A
    lip = np.where(at["mouth"] & ~outer, 0.0, 0.6 * red + 0.4 * (P @ red)) - 0.45
    eye = v[at["left_eye"]].mean(0)
    fields = {"hairline": hairline_field(v), "brows": brow_field(v, eye), "lips": lip}
    throat = (v[:, 2] > 0.02) & (v[:, 1] > -0.098)
    masks = {
        "skin": outer,
        "lips": (lip > 0) & outer,
        "brows": (fields["brows"] > 0) & outer,
        "lids": (paint(base, cut, "eyelids") > 0.5) & outer,
        "eyes": at["left_eye"] | at["right_eye"],
        "left_eye": at["left_eye"],
        "right_eye": at["right_eye"],
        "scalp": outer & (fields["hairline"] > 0) & ~ear,
        "ears": ear & outer,
        "teeth": at["teeth_upper"] | at["teeth_lower"],
        "tongue": at["tongue"],
        "mouth": at["mouth"] & ~at["head"],
        "cap": at["cap"],
        "sockets": (at["left_socket"] | at["right_socket"]) & ~outer,
        "neck": outer & (v[:, 1] < -0.075) & ~throat & (fields["hairline"] < 0) & ~ear,
    }
    return masks, fields


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
    return {
        51: mid[0], 52: peak[0], 53: side[0], 54: at_vertex(int(corner), faces, np.isin(np.arange(len(faces)), cast.index)),
        55: low_side[3], 56: near[3], 57: mid[3],
        62: mid[1], 63: near[1], 64: inner[1], 65: near[2], 66: mid[2],
    }  # fmt: skip


MIRROR = {
    **{16 - i: i for i in range(8, 17)}, **{43 - i: i for i in range(22, 27)}, **{i: i for i in (27, 28, 29, 30, 33)},
    31: 35, 32: 34, 36: 45, 37: 44, 38: 43, 39: 42, 40: 47, 41: 46, 48: 54, 49: 53, 50: 52, 51: 51, 57: 57, 58: 56, 59: 55,
    60: 64, 61: 63, 62: 62, 66: 66, 67: 65,
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
