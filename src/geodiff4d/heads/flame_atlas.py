"""Texture coordinates for a FLAME model without any: a cylinder around the head, the eyeballs beside it.

FLAME's own atlas comes in separate files. Without them an image can still be laid on the head, but not exchanged with
other tools; inside the mouth and behind the ears the cylinder covers itself.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

SKIN_BOTTOM = 0.84
"""Lower end of the cylinder (v); the eyes are below it. Above `SKIN_TOP` there is room for the teeth."""
SKIN_TOP = 0.05


def unwrap(
    template: Float[np.ndarray, "verts 3"], faces: Int[np.ndarray, "faces 3"], eyes: Bool[np.ndarray, " verts"]
) -> tuple[Float[np.ndarray, "uvs 2"], Int[np.ndarray, "faces 3"]]:
    """Return texture coordinates (v down) and the faces over them; the seam runs down the back of the head."""
    uv = np.zeros((len(template), 2))
    skin = ~eyes
    uv[skin] = _cylinder(template[skin])
    for i, side in enumerate((template[:, 0] > 0, template[:, 0] <= 0)):
        if (ball := eyes & side).any():
            uv[ball] = np.add(_disc(template[ball]), (0.1 + 0.2 * i, 0))
    uv_faces = faces.copy()
    # A face across the seam would be smeared over the whole width: it gets corners of its own, left or right of it.
    u = uv[faces][..., 0]
    across = skin[faces].all(1) & (np.ptp(u, axis=1) > 0.5)
    corners = uv[faces[across]]
    corners[..., 0] += np.where(corners[..., 0] < 0.5, 1.0, 0.0)
    corners[..., 0] = np.minimum(corners[..., 0], 1.0)
    count = len(corners) * 3
    uv_faces[across] = len(uv) + np.arange(count).reshape(-1, 3)
    return np.concatenate([uv, corners.reshape(-1, 2)]), uv_faces


def _cylinder(points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 2"]:
    low, high = points.min(0), points.max(0)
    axis = (low + high) / 2
    u = np.arctan2(points[:, 0] - axis[0], points[:, 2] - axis[2]) / (2 * np.pi) + 0.5
    height = (high[1] - points[:, 1]) / max(high[1] - low[1], 1e-9)
    return np.stack([u, SKIN_TOP + (SKIN_BOTTOM - SKIN_TOP) * height], 1)


def _disc(points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 2"]:
    """Return an eyeball's texture coordinates by the polar angle: the pupil in the middle, the back at the rim."""
    d = points - points.mean(0)
    d = d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-9)
    polar = np.arccos(np.clip(d[:, 2], -1, 1)) / np.pi
    around = np.arctan2(d[:, 1], d[:, 0])
    return np.stack([0.07 * polar * np.cos(around), 0.92 - 0.07 * polar * np.sin(around)], 1)
