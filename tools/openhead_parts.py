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

import openhead_extras as extras  # beside this file, as the two below
import openhead_teeth as teeth
from openhead_landmarks import landmarks68

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
    **teeth.NEW_BOXES,
}


def assemble(base, cut, samples: np.ndarray, actions: np.ndarray, names: list[str], align, pca, traits: dict) -> dict:
    """Compute every array of the asset (docs/OPENHEAD.md) from the cut mesh, the identities and their traits."""
    charts = name_charts(base, cut)
    raw = samples, actions
    samples, actions = fit_teeth(cut, *raw)
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

    # Coefficients mean what they meant before the teeth were modelled: the components are found without them.
    first = ~(at["teeth_row_upper"] | at["teeth_row_lower"])
    old = (cut.faces < first.sum()).all(1)
    scores, share = pca(
        samples[:, first], importance(rest[first], cut.faces[old], {k: m[first] for k, m in at.items()})
    )
    bands = at["teeth_upper"] | at["teeth_lower"]
    shift = samples[:, 0] - raw[0][:, 0] + LIPS_CLOSED * actions[names.index("jawOpen"), 0]
    samples[:, bands] = raw[0][:, bands] + shift[:, None]
    actions[:, bands] = raw[1][:, bands]
    samples, actions = teeth.place(cut, samples, actions, names)
    outer = np.isin(charts, ("head", "bust"))
    lips = at["head"] | at["bust"] | at["mouth"]
    samples = samples + extras.seal(samples.mean(0), cut.faces, -actions[names.index("jawOpen"), :, 1], lips)
    mean = samples.mean(0)
    basis = regress(samples - mean, scores)
    actions, gaze = extras.gaze(actions, names, at)
    weights = skinning(base, cut, at)
    masks, fields = regions(base, cut, mean, at, ear)
    face_index, bary = landmarks68(mean, cut.faces, outer, at, masks, actions, names)
    return {
        "template": mean.astype(np.float32),
        "faces": cut.faces.astype(np.int32),
        "shape_basis": basis.astype(np.float16),
        "shape_variance": share.astype(np.float32),
        "exposed_shapes": np.array(EXPOSED),
        **extras.attributes(scores, traits),
        "expr_basis": np.moveaxis(actions, 0, -1).astype(np.float16),
        "gaze": gaze.astype(np.float32),
        "expression_names": np.array(names),
        "joint_regressor": joint_regressor(mean, at, ear).astype(np.float32),
        "skin_weights": weights.astype(np.float32),
        "uv": pack(cut, charts).astype(np.float32),
        "uv_faces": cut.uv_faces.astype(np.int32),
        **extras.scalp_shell(mean, cut.faces, fields["hairline"], masks),
        **{f"field_{k}": v.astype(np.float32) for k, v in fields.items()},
        **{f"region_{k}": v for k, v in masks.items()},
        "landmarks68_face_index": face_index.astype(np.int32),
        "landmarks68_bary": bary.astype(np.float32),
        "mediapipe_face_index": np.zeros(0, np.int32),
        "mediapipe_bary": np.zeros((0, 3), np.float32),
        "mediapipe_index": np.zeros(0, np.int32),
    }


def regress(deviations: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the basis [verts, 3, K] that takes unit-variance scores [samples, K] to deviations [samples, verts, 3]."""
    flat = deviations.reshape(len(deviations), -1)
    return (flat.T @ scores.astype(flat.dtype) / (len(scores) - 1)).reshape(*deviations.shape[1:], -1)


def fit_teeth(cut, samples: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shrink MakeHuman's bands of teeth about their own middle, for the PCA alone: `teeth.place` has the last word."""
    samples, actions = samples.copy(), actions.copy()
    for group in ("teeth_upper", "teeth_lower"):
        used = np.unique(cut.faces[cut.group == group])
        for x in (samples, actions):
            middle = x[:, used].mean(1, keepdims=True)
            x[:, used] = middle + TEETH_SCALE * (x[:, used] - middle)
        samples[:, used, 2] -= TEETH_BACK[group]
    return samples, actions


def kept_from(old: Path, asset: dict) -> dict:
    """Return the MediaPipe embedding of an asset already at `old`, if its topology is still there."""
    if not old.exists():
        return {}
    with np.load(old) as data:
        n = len(data["faces"])  # parts may be appended
        same = data["faces"].shape <= asset["faces"].shape and (data["faces"] == asset["faces"][:n]).all()
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
    assert (len(order), names) == (5, []), f"expected five charts on the body, got {counts}"
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


RIGID = (
    ("teeth_upper", 1), ("teeth_row_upper", 1), ("teeth_lower", 2), ("teeth_row_lower", 2), ("tongue", 2),
    ("left_eye", 3), ("right_eye", 4),
)  # fmt: skip


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
    for mask, joint in RIGID:
        out[at[mask]] = np.eye(5)[joint]
    out[out < 1e-3] = 0
    return out / out.sum(1, keepdims=True)


def joint_regressor(mean: np.ndarray, at: dict[str, np.ndarray], ear: np.ndarray) -> np.ndarray:
    """Return rows of non-negative weights that sum to one and give the joints on the mean head exactly.

    Root: the point between the ears, so that turning the head hardly moves it. Neck: the middle of the neck.
    Jaw: between the temporomandibular joints, in front of and below the ears. Eyes: their eyeball's mean.
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
    n = len(points)
    strong = np.vstack([1e4 * (points - target).T, 1e4 * np.ones(n)])
    w, _ = nnls(np.vstack([strong, np.eye(n)]), np.r_[0, 0, 0, 1e4, np.zeros(n)], maxiter=20 * n)
    return w / w.sum()


def smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def hairline_field(v: np.ndarray) -> np.ndarray:
    """Return the signed distance above a smooth hairline [m]: forehead, temples, sideburns, nape."""
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
    gum = at["teeth_upper"] | at["teeth_lower"]
    fields = {
        "hairline": hairline_field(v),
        "brows": brow_field(v, eye),
        "lips": lip,
        "lashes": extras.lash_field(v, cut.faces, at),
    }
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
        "teeth": at["teeth_row_upper"] | at["teeth_row_lower"],
        "gums": gum,
        "tongue": at["tongue"],
        "mouth": (at["mouth"] & ~at["head"]) | gum,
        "cap": at["cap"],
        "sockets": (at["left_socket"] | at["right_socket"]) & ~outer,
        "neck": outer & (v[:, 1] < -0.075) & ~throat & (fields["hairline"] < 0) & ~ear,
    }
    return masks, fields
