"""Glasses: rims, bridge and temples as tubes that stand before the face and rest on the ears; dark lenses for some."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.heads.rig import EYE_JOINTS
from geodiff4d.render.viewpoints import openhead
from geodiff4d.world import atlas
from geodiff4d.world.deferred import WET
from geodiff4d.world.mesh import Piece
from geodiff4d.world.traits import Traits

SIDES, AROUND = 6, 32


def build(traits: Traits, rest: Float[Tensor, "verts 3"], rng: np.random.Generator) -> list[Piece]:
    """Fit glasses to a subject's rest vertices; nothing for those without."""
    if traits.glasses == "none":
        return []
    head = openhead()
    eyes = (head.joint_regressor @ rest)[list(EYE_JOINTS)].numpy()
    eyes = eyes[np.argsort(-eyes[:, 0])]  # the left one first
    front = rest.numpy()[head.regions["lids"].numpy()][:, 2].max()
    bridge = rest[head.faces[head.landmarks68.face_index[28]]].mean(0).numpy()
    u = rng.uniform
    half_width, half_height = u(0.0225, 0.027), u(0.016, 0.0225)
    power, drop = float(rng.choice([2.0, 2.6, 4.0])), u(0.0, 0.003)
    thick = u(0.0007, 0.0013) if rng.random() < 0.5 else u(0.0014, 0.0024)
    plane = max(front + u(0.007, 0.011), bridge[2] - 0.003)
    curve = u(2.0, 4.0)

    def bent(x: np.ndarray) -> np.ndarray:
        return plane - curve * np.clip(np.abs(x) - 0.02, 0, None) ** 2

    tubes, lenses = [], []
    turn = np.linspace(0, 2 * np.pi, AROUND, endpoint=False)
    round_x = np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** (2 / power)
    round_y = np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** (2 / power)
    middle = np.abs(eyes[:, 0]).mean() + 0.0015
    height = eyes[:, 1].mean() - drop
    ears = rest[head.regions["ears"]].numpy()
    for sign in (1.0, -1.0):
        x = sign * middle + half_width * round_x
        y = height + half_height * round_y * (1 - 0.06 * np.sign(round_y))
        rim = np.stack([x, y, bent(x)], 1)
        tubes.append(_tube(rim, thick, closed=True))
        if traits.glasses == "dark":
            lenses.append(rim)
        own = ears[ears[:, 0] * sign > 0]
        # Where the ear meets the head, at its top.
        top = own[own[:, 1] > own[:, 1].max() - 0.008]
        rest_x = np.abs(top[:, 0]).min() + 0.001
        hinge = np.array([sign * (middle + half_width), height + 0.35 * half_height, 0.0])
        hinge[2] = bent(hinge[:1])[0]
        corner = hinge + np.array([sign * 0.005, 0.001, -0.004])
        over = np.array([sign * rest_x, own[:, 1].max() - 0.002, top[:, 2].mean()])
        behind = over + np.array([-sign * 0.002, -0.022, -0.018])
        out = np.array(
            [sign * max(abs(corner[0]), rest_x + 0.001), 0.6 * corner[1] + 0.4 * over[1], 0.5 * (corner[2] + over[2])]
        )
        tubes.append(_tube(np.stack([hinge, corner, out, over, behind]), max(thick, 0.0011)))
    inner = middle - half_width
    x = np.linspace(-inner, inner, 7)
    span = np.stack([x, height + 0.3 * half_height + 0.003 * (1 - (x / inner) ** 2), bent(x) + 0.001], 1)
    tubes.append(_tube(span, thick))
    frame = _merge(tubes)
    pieces = [_piece(*frame, "frame")]
    if lenses:
        pieces.append(_piece(*_merge([_fan(rim) for rim in lenses]), "lens"))
    return pieces


def _piece(vertices: np.ndarray, faces: np.ndarray, name: str) -> Piece:
    uv = atlas.plain_uv(name, 1)
    zero = torch.zeros(len(faces), 3, dtype=torch.int64)
    points = torch.from_numpy(vertices.astype(np.float32))
    return Piece(points, torch.from_numpy(faces).long(), uv, zero, torch.zeros_like(points), WET)


def _merge(meshes: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(v) for v, _ in meshes)])
    return np.concatenate([v for v, _ in meshes]), np.concatenate(
        [f + s for (_, f), s in zip(meshes, starts[:-1], strict=True)]
    )


def _tube(line: np.ndarray, radius: float, closed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Sweep a circle along a polyline."""
    n = len(line)
    ahead = np.roll(line, -1, 0) - np.roll(line, 1, 0) if closed else np.gradient(line, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    reference = np.where(np.abs(ahead[:, 2:]) > 0.7, [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]])
    side = np.cross(reference, ahead)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    other = np.cross(ahead, side)
    turn = np.linspace(0, 2 * np.pi, SIDES, endpoint=False)
    ring = np.cos(turn)[None, :, None] * side[:, None] + np.sin(turn)[None, :, None] * other[:, None]
    i, k = np.meshgrid(np.arange(n if closed else n - 1), np.arange(SIDES), indexing="ij")
    i, k = i.ravel(), k.ravel()
    j, m = (i + 1) % n, (k + 1) % SIDES
    a, b, c, d = i * SIDES + k, j * SIDES + k, j * SIDES + m, i * SIDES + m
    faces = np.concatenate([np.stack([a, c, b], 1), np.stack([a, d, c], 1)])
    return (line[:, None] + radius * ring).reshape(-1, 3), faces


def _fan(rim: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill a rim, bulging a little; the back has vertices of its own, or the normals would cancel."""
    n = len(rim)
    points = np.vstack([rim, rim.mean(0) + np.array([0, 0, 0.002])])
    a, b = np.arange(n), (np.arange(n) + 1) % n
    # Counter-clockwise seen from the front on either side of the face.
    front = np.stack([a, b, np.full(n, n)], 1)
    return np.concatenate([points, points]), np.concatenate([front, front[:, ::-1] + n + 1])
