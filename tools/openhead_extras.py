"""What lies on top of OpenHead's mesh: gaze by rotation, named directions of identity, lash line and scalp shell."""

import numpy as np
from scipy.spatial import cKDTree

LOOKS = {"Up": (-0.26, 0.0), "Down": (0.35, 0.0), "In": (0.0, -0.5), "Out": (0.0, 0.5)}
"""Turn of the left eye about x and y at weight 1 [rad]: as far as eyes go, 15° up, 20° down and 29° sideways."""
UPPER_LASH_M, LOWER_LASH_M = 0.0009, 0.0004
OVERLAP_M = 0.0003
"""Toward the corners the lips press into each other by this much, since people differ."""
TURNED = 0.6
"""A rim is where the normal points to the other lid by this much."""
LIFT_M = 0.02
"""The scalp shell rises from the hairline to its full height over this distance."""
TRAITS = ("gender", "age", "weight", "muscle", "african", "asian", "caucasian")


def gaze(actions: np.ndarray, names: list[str], at: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Take the eyeballs out of the look actions; return (actions, axis-angles [52, 6] of the joints instead)."""
    actions, turn = actions.copy(), np.zeros((len(names), 6))
    actions[:, at["left_eye"] | at["right_eye"]] = 0
    for look, (x, y) in LOOKS.items():
        turn[names.index(f"eyeLook{look}Left"), :2] = x, y
        turn[names.index(f"eyeLook{look}Right"), 3:5] = x, -y
    return actions, turn


def attributes(scores: np.ndarray, traits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return, per trait, the mean coefficients of people one standard deviation above its mean; gender 1 is female."""
    z = np.stack([(traits[k] - traits[k].mean()) / traits[k].std() for k in TRAITS])
    return {
        "attribute_names": np.array(["female" if k == "gender" else k for k in TRAITS]),
        "attribute_directions": (z @ scores / len(scores)).astype(np.float32),
    }


def lash_field(v: np.ndarray, faces: np.ndarray, at: dict[str, np.ndarray]) -> np.ndarray:
    """Return the signed distance [m] inside a line along the outer edge of the lids' rims; the upper one is wider.

    The rim is the two millimetres of skin that face the other lid; lashes grow where it turns outward.
    """
    outer, out = at["head"] | at["bust"], np.full(len(v), -0.02)
    f = faces[outer[faces].all(1)]
    normals = np.zeros_like(v)
    for k in range(3):
        np.add.at(normals, f[:, k], np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]]))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    ends = np.unique(np.sort(np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]]), 1), axis=0)
    for side, sign in (("left", 1.0), ("right", -1.0)):
        rim = np.flatnonzero(at[f"{side}_socket"] & at["head"])
        p = v[rim]
        a, b = p[np.argmin(p[:, 0])], p[np.argmax(p[:, 0])]
        distance = cKDTree(p).query(v)[0]
        for up, width in ((1.0, UPPER_LASH_M), (-1.0, LOWER_LASH_M)):
            # Height over the line between the eye's corners tells the lids apart.
            height = up * (v[:, 1] - a[1] - (v[:, 0] - a[0]) / (b[0] - a[0]) * (b[1] - a[1]))
            lid = outer & (distance < 0.008) & (height > 0) & (sign * v[:, 0] > 0)
            facing = -up * normals[:, 1]
            points = []
            for i, j in ends[lid[ends].all(1)]:
                if (facing[i] > TURNED) != (facing[j] > TURNED) and min(distance[i], distance[j]) > 0.001:
                    t = (TURNED - facing[i]) / (facing[j] - facing[i])
                    points.append(v[i] + t * (v[j] - v[i]))
            near = cKDTree(np.array(points)).query(v)[0]
            out = np.where(outer, np.maximum(out, width - near), out)
    return out


def seal(v: np.ndarray, faces: np.ndarray, drop: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Return the small offsets [verts, 3] by which the resting lips meet all the way to the mouth's corners.

    `drop` is how far each vertex follows the opening jaw down: it tells the lower lip from the upper.
    """
    centre = np.array([0.0, -0.05, 0.1])
    near = np.abs(v - centre).max(1) < 0.028
    f = faces[near[faces].all(1) & outer[faces].any(1)]
    columns, gaps, lines = np.arange(0.0, 0.0236, 0.0005) + 1e-5, [], []
    for x in columns:
        points, drops = [], []
        for k in range(3):
            i, j = f[:, k], f[:, (k + 1) % 3]
            cross = (v[i, 0] < x) != (v[j, 0] < x)
            t = ((x - v[i, 0]) / np.where(cross, v[j, 0] - v[i, 0], 1))[cross]
            points.append(v[i[cross]] + t[:, None] * (v[j[cross]] - v[i[cross]]))
            drops.append((1 - t) * drop[i[cross]] + t * drop[j[cross]])
        p, d = np.concatenate(points), np.concatenate(drops)
        lips = (np.abs(p[:, 1] + 0.05) < 0.007) & (p[:, 2] > 0.092)
        lower = d > 0.5 * (d[lips].min() + d[lips].max())
        top, bottom = p[lips & lower, 1].max(), p[lips & ~lower, 1].min()
        gaps.append(np.clip(bottom - top, 0, 0.001))
        lines.append(0.5 * (top + bottom))
    print("lips stood apart by", np.round(1e3 * np.array(gaps), 2), "mm")
    ax = np.abs(v[:, 0])
    gap = np.interp(ax, columns, gaps) * np.clip((0.0245 - ax) / 0.001, 0, 1)
    away = v[:, 1] - np.interp(ax, columns, lines)
    share = np.exp(-((away / 0.0035) ** 2)) * np.clip((v[:, 2] - 0.085) / 0.008, 0, 1) * near
    out = np.zeros_like(v)
    out[:, 1] = -np.sign(away) * share * (0.5 * gap + OVERLAP_M * np.clip((ax - 0.010) / 0.008, 0, 1) * (ax < 0.0245))
    return out


def scalp_shell(v: np.ndarray, faces: np.ndarray, hairline: np.ndarray, masks: dict) -> dict[str, np.ndarray]:
    """Cut the scalp along the hairline: a sheet whose points lie on the head's faces, to be lifted for hair."""
    f = np.where(np.abs(hairline) < 1e-4, 1e-4, hairline)
    use = np.flatnonzero((masks["skin"][faces].all(1)) & ~masks["ears"][faces].any(1) & (f[faces] > 0).any(1))
    keys: dict[tuple[int, int], int] = {}
    places: list[tuple[int, np.ndarray]] = []
    out = []
    for face in use:
        corners, polygon = faces[face], []
        for k in range(3):
            a, b = int(corners[k]), int(corners[(k + 1) % 3])
            one = np.eye(3)
            if f[a] > 0:
                polygon.append(((a, a), one[k]))
            if (f[a] > 0) != (f[b] > 0):
                t = f[a] / (f[a] - f[b])
                polygon.append(((min(a, b), max(a, b)), (1 - t) * one[k] + t * one[(k + 1) % 3]))
        for key, bary in polygon:
            if key not in keys:
                keys[key] = len(places)
                places.append((int(face), bary))
        ids = [keys[key] for key, _ in polygon]
        out += [[ids[0], ids[k], ids[k + 1]] for k in range(1, len(ids) - 1)]
    face_index, bary = np.array([p[0] for p in places]), np.stack([p[1] for p in places])
    inside = (np.maximum(f, 0)[faces[face_index]] * bary).sum(1)
    t = np.clip(inside / LIFT_M, 0, 1)
    return {
        "shell_face_index": face_index.astype(np.int32),
        "shell_bary": bary.astype(np.float32),
        "shell_faces": np.array(out, np.int32),
        "shell_lift": (t * t * (3 - 2 * t)).astype(np.float32),
    }
