"""Landmarks and regions for a FLAME model without its own: OpenHead is fitted to it, and its own are transferred.

FLAME's embeddings and masks are separate downloads, and 2023 Open's package has neither. OpenHead's identities are
moved onto the model's mean head (a similarity by the eyes, then iterated closest points, as Amberg et al. 2007 but
within a linear model); its landmarks then fall onto the nearest faces and its regions onto the nearest vertices.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import KDTree

from geodiff4d.heads.flame_beside import Points
from geodiff4d.heads.openhead import load
from geodiff4d.heads.rig import Head

ROUNDS = 12
WORST_FIT_M = 0.006
"""Median distance of the fitted face beyond which the model is no human head, and nothing is transferred."""
PRIOR_M = 0.002
"""σ of a point's distance, against one standard deviation of identity [m]."""
REACH_M = 0.02
HANDED_OVER = ("lips", "brows", "lids", "scalp", "ears", "mouth", "neck")
NEAR_FACES = 24


@dataclass(frozen=True)
class Transferred:
    """What was transferred from OpenHead, and the median distance of its fitted face from the model [m]."""

    landmarks68: Points
    mediapipe: Points
    mediapipe_index: Int[np.ndarray, " points"]
    regions: dict[str, Bool[np.ndarray, " verts"]]
    distance_m: float


def transfer(
    template: Float[np.ndarray, "verts 3"],
    faces: Int[np.ndarray, "faces 3"],
    joints: Float[np.ndarray, "5 3"],
    eyes: Bool[np.ndarray, " verts"],
) -> Transferred | None:
    """Fit OpenHead to a mean head and return its landmarks and regions there; None if the fit is poor.

    `joints` are the model's rest joints, `eyes` its eyeballs' vertices, which no landmark may fall on.
    """
    own = load("openhead")
    inner = own.regions["eyes"] | own.regions["teeth"] | own.regions["tongue"] | own.regions["mouth"]
    if np.linalg.norm(joints[3] - joints[4]) < 0.02:
        return None
    fitted, distance = _fit(own, template, faces, joints, (own.regions["skin"] & ~inner).numpy(), ~eyes)
    if not distance < WORST_FIT_M:
        return None
    skin = faces[(~eyes)[faces].all(1)]
    rows = np.flatnonzero((~eyes)[faces].all(1))
    near = [_nearest(_on(own, fitted, kind), template, skin) for kind in ("landmarks68", "mediapipe")]
    found = [Points(rows[index], bary) for index, bary in near]
    away, nearest = KDTree(fitted).query(template)
    regions = {k: own.regions[k].numpy()[nearest] & (away < REACH_M) & ~eyes for k in HANDED_OVER if k in own.regions}
    return Transferred(found[0], found[1], own.mediapipe_index.numpy(), regions, distance)


def _fit(
    own: Head, template: np.ndarray, faces: np.ndarray, joints: np.ndarray, used: np.ndarray, skin: np.ndarray
) -> tuple[Float[np.ndarray, "own 3"], float]:
    """Return OpenHead's vertices fitted to the template, and the median distance of those that were used [m]."""
    mean, basis = own.template.double().numpy(), own.shape_basis.double().numpy()
    eyes = (own.joint_regressor.double().numpy() @ mean)[3:]
    scale = np.linalg.norm(joints[3] - joints[4]) / np.linalg.norm(eyes[0] - eyes[1])
    R, t, shape = np.eye(3), joints[3:].mean(0) - scale * eyes.mean(0), np.zeros(basis.shape[-1])
    # Only the face and its surroundings: the busts end elsewhere.
    front = used & (mean[:, 1] > eyes[:, 1].mean() - 0.13) & (mean[:, 2] > -0.02)
    targets, normals = template[skin], _normals(template, faces)[skin]
    tree, own_faces = KDTree(targets), own.faces.numpy()
    gap = np.inf
    for step in range(ROUNDS):
        shaped = mean + basis @ shape
        moved = scale * shaped @ R.T + t
        gaps, index = tree.query(moved[front])
        facing = (_normals(moved, own_faces)[front] * normals[index]).sum(1) > 0.5
        keep = facing & (gaps < max(0.03 - 0.004 * step, 0.01))
        gap = float(np.median(gaps[facing])) if facing.any() else np.inf
        if keep.sum() < 4 * basis.shape[-1]:
            break
        n, points = normals[index][keep], moved[front][keep]
        residual = ((targets[index][keep] - points) * n).sum(1)
        moves = scale * np.einsum("ij,pjk->pik", R, basis[front][keep])
        J = np.concatenate(
            [np.cross(points - t, n), n, ((points - t) * n).sum(1)[:, None], np.einsum("pik,pi->pk", moves, n)], 1
        )
        weight = np.concatenate([np.zeros(7), np.full(len(shape), PRIOR_M**2 * keep.sum() / 16)])
        wish = np.concatenate([np.zeros(7), -shape])
        x = np.linalg.solve(J.T @ J + np.diag(weight + 1e-12), J.T @ residual + weight * wish)
        R, t, scale, shape = _turn(x[:3]) @ R, t + x[3:6], scale * (1 + x[6]), shape + x[7:]
    return scale * (mean + basis @ shape) @ R.T + t, gap


def _on(own: Head, vertices: np.ndarray, kind: str) -> Float[np.ndarray, "points 3"]:
    points = getattr(own, kind)
    return (vertices[own.faces[points.face_index].numpy()] * points.bary.double().numpy()[..., None]).sum(1)


def _nearest(
    points: Float[np.ndarray, "points 3"], vertices: Float[np.ndarray, "verts 3"], faces: Int[np.ndarray, "faces 3"]
) -> tuple[Int[np.ndarray, " points"], Float[np.ndarray, "points 3"]]:
    """Return the nearest face of each point, and the barycentric coordinates of its projection."""
    near = KDTree(vertices[faces].mean(1)).query(points, min(NEAR_FACES, len(faces)))[1]
    index = np.asarray(near).reshape(len(points), -1)
    a, b, c = (vertices[faces[index]][..., i, :] for i in range(3))
    u, v, w = b - a, c - a, points[:, None] - a
    uu, uv, vv = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    wu, wv = (w * u).sum(-1), (w * v).sum(-1)
    determinant = np.maximum(uu * vv - uv**2, 1e-20)
    bary = np.stack([(vv * wu - uv * wv) / determinant, (uu * wv - uv * wu) / determinant], -1)
    bary = np.concatenate([1 - bary.sum(-1, keepdims=True), bary], -1)
    # Outside a triangle its nearest point is on the rim; pulled in like this it is close to that.
    bary = np.maximum(bary, 0)
    bary /= bary.sum(-1, keepdims=True)
    at = (np.stack([a, b, c], -2) * bary[..., None]).sum(-2)
    best = ((at - points[:, None]) ** 2).sum(-1).argmin(1)
    pick = np.arange(len(points))
    return index[pick, best], bary[pick, best]


def _normals(vertices: np.ndarray, faces: np.ndarray) -> Float[np.ndarray, "verts 3"]:
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    out = np.zeros_like(vertices)
    for i in range(3):
        np.add.at(out, faces[:, i], np.cross(b - a, c - a))
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def _turn(r: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Return the rotation by a small vector, exactly orthogonal (Cayley)."""
    K = np.cross(np.eye(3), -r / 2)
    return np.linalg.solve(np.eye(3) - K.T, np.eye(3) + K.T)
