"""One .glb (glTF 2.0): the head as a rigged mesh with its 52 morph targets, and the avatar's splats at rest.

Two scenes. The first, which viewers show, has the splats as KHR_gaussian_splatting has them: points with rotation
(xyzw), linear scales [m], opacity and harmonics, y up, the face to +z. The second has the head's mesh with
its skin of five joints, sparse morph targets named as ARKit's, and the splats' mean colours at its vertices. Each
splat's `_FACE` is the triangle of that mesh that it is bound to (`avatar.binding`), so that whoever poses the mesh can
carry the splats along.

Ours / theirs: a skin of glTF has fixed joints, ours move a little with the expression; and glTF turns no joint by a
morph target, so `extras.gaze` says how far each look action turns the eyes.
"""

import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.functional import normalize

from geodiff4d.avatar.drive import held
from geodiff4d.avatar.model import Avatar, PosedSplats
from geodiff4d.avatar.ply import SH_C0
from geodiff4d.avatar.relative import has_weights
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file
from geodiff4d.core.geometry import axis_angle_to_matrix, matrix_to_quat
from geodiff4d.heads.rig import JOINTS, PARENTS, HeadParams
from geodiff4d.render.harmonics import degree_of

FLOAT, UBYTE, USHORT = 5126, 5121, 5123
KINDS = {"float32": FLOAT, "uint8": UBYTE, "uint16": USHORT}
SHAPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
VERTICES, INDICES = 34962, 34963
MESH, ROOT = 1, 2
"""Numbers of the nodes: the splats are 0, the mesh is 1, the joints begin at 2."""
SPLATS = {
    "kernel": "ellipse", "colorSpace": "srgb_rec709_display", "sortingMethod": "cameraDistance",
    "projection": "perspective",
}  # fmt: skip


@dataclass
class Buffer:
    """The binary part of a file, its views and accessors."""

    data: bytearray = field(default_factory=bytearray)
    views: list[dict[str, Any]] = field(default_factory=list)
    accessors: list[dict[str, Any]] = field(default_factory=list)

    def view(self, array: np.ndarray, target: int | None = None) -> int:
        """Append an array, aligned to four bytes; returns the number of its view."""
        self.data.extend(bytes(-len(self.data) % 4))
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": array.nbytes}
        self.views.append(view if target is None else view | {"target": target})
        self.data.extend(np.ascontiguousarray(array).tobytes())
        return len(self.views) - 1

    def add(self, rows: np.ndarray, target: int | None = VERTICES, bounds: bool = False, **more: Any) -> int:
        """Append rows of numbers; returns the number of their accessor."""
        rows = rows.reshape(len(rows), -1)
        about = {"bufferView": self.view(rows, target), **_about(rows), **more}
        return self._accessor(about | (_bounds(rows) if bounds else {}))

    def sparse(self, index: np.ndarray, values: np.ndarray, count: int) -> int:
        """Append rows that are zero but at `index`; returns the number of their accessor."""
        if not len(index):
            index, values = np.zeros(1, np.uint16), np.zeros((1, values.shape[1]), np.float32)
        places = {"bufferView": self.view(index.astype("<u2")), "componentType": USHORT}
        sparse = {"count": len(index), "indices": places, "values": {"bufferView": self.view(values)}}
        whole = np.concatenate([values, np.zeros((1, values.shape[1]), np.float32)])
        return self._accessor({**_about(values), "count": count, **_bounds(whole), "sparse": sparse})

    def _accessor(self, about: dict[str, Any]) -> int:
        self.accessors.append(about)
        return len(self.accessors) - 1


def _about(rows: np.ndarray) -> dict[str, Any]:
    return {"componentType": KINDS[rows.dtype.name], "count": len(rows), "type": SHAPES[rows.shape[1]]}


def _bounds(rows: np.ndarray) -> dict[str, Any]:
    return {"min": rows.min(0).tolist(), "max": rows.max(0).tolist()}


@torch.no_grad()
def export_glb(avatar: Avatar, path: Path) -> int:
    """Write the avatar at rest, whole or not at all; returns the file's size [bytes].

    Raises:
        UserError: the head has no ARKit weights (FLAME), or too many vertices for 16 bits.
    """
    head = avatar.head
    if not has_weights(head) or len(head.template) > 65535:
        raise UserError(f"the avatar's head is {head.name}: .glb expected one with ARKit's weights, such as openhead")
    still = held(avatar, torch.zeros(1, len(head.expression_names))).params[0]
    rest = replace(still, rotation=torch.zeros(3), translation=torch.zeros(3), shape=avatar.shape)
    posed = avatar.posed(rest)
    buffer = Buffer()
    document = {
        "asset": {"version": "2.0", "generator": "geodiff4d"}, "scene": 0,
        "scenes": [{"name": "splats", "nodes": [0]}, {"name": "rig", "nodes": [MESH, ROOT]}],
        "extensionsUsed": ["KHR_gaussian_splatting", "KHR_materials_unlit"],
        "materials": [{"name": "mean colours", "extensions": {"KHR_materials_unlit": {}}, "doubleSided": True}],
        "meshes": [{"name": "splats", "primitives": [_splats(buffer, posed)]}, _mesh(buffer, avatar, posed, rest)],
        **_rig(buffer, avatar, rest),
    }  # fmt: skip
    buffer.data.extend(bytes(-len(buffer.data) % 4))
    document |= {"accessors": buffer.accessors, "bufferViews": buffer.views}
    document["buffers"] = [{"byteLength": len(buffer.data)}]
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    size = 12 + 8 + len(text) + 8 + len(buffer.data)
    with fresh_file(path) as temporary:
        head_chunk = struct.pack("<4sIII4s", b"glTF", 2, size, len(text), b"JSON")
        temporary.write_bytes(head_chunk + text + struct.pack("<I4s", len(buffer.data), b"BIN\0") + buffer.data)
    return size


def _splats(buffer: Buffer, posed: PosedSplats) -> dict[str, Any]:
    splats, colors = posed.gaussians, posed.colors.float()
    quats = normalize(splats.quats, dim=-1)[:, [1, 2, 3, 0]]
    opacities = splats.opacities.clamp(0, 1)
    prefix = "KHR_gaussian_splatting:"
    return {
        "mode": 0, "extensions": {"KHR_gaussian_splatting": SPLATS},
        "attributes": {
            "POSITION": buffer.add(splats.means.float().numpy(), bounds=True),
            "COLOR_0": buffer.add(_linear_color(torch.cat([colors, opacities[:, None]], -1).numpy()), normalized=True),
            f"{prefix}ROTATION": buffer.add(quats.float().numpy()),
            f"{prefix}SCALE": buffer.add(splats.scales.float().numpy()),
            f"{prefix}OPACITY": buffer.add(opacities.float().numpy()),
            f"{prefix}SH_DEGREE_0_COEF_0": buffer.add(((colors - 0.5) / SH_C0).numpy()),
            **_harmonics(buffer, posed, prefix),
            "_FACE": buffer.add(posed.face_index.float().numpy()),
        },
    }  # fmt: skip


def _harmonics(buffer: Buffer, posed: PosedSplats, prefix: str) -> dict[str, int]:
    """Return the attributes of the degrees from 1 on, none where colours are the same from everywhere."""
    if posed.shading is None:
        return {}
    rest = posed.shading.in_world().float().numpy()
    of = [(d, k, d * d - 1 + k) for d in range(1, degree_of(posed.shading.coefficients) + 1) for k in range(2 * d + 1)]
    return {f"{prefix}SH_DEGREE_{d}_COEF_{k}": buffer.add(np.ascontiguousarray(rest[:, i])) for d, k, i in of}


def _mesh(buffer: Buffer, avatar: Avatar, posed: PosedSplats, rest: HeadParams) -> dict[str, Any]:
    head = avatar.head
    neutral, normals = head.shape(avatar.neutral()).vertices, head.pose(avatar.neutral()).normals
    basis = head.expr_basis.numpy()
    targets = []
    for k in range(basis.shape[-1]):
        moved = np.flatnonzero(np.abs(basis[..., k]).max(1) > 0)
        targets.append({"POSITION": buffer.sparse(moved, np.ascontiguousarray(basis[moved, :, k]), len(basis))})
    joints, weights = _influences(head.skin_weights.numpy())
    primitive = {
        "attributes": {
            "POSITION": buffer.add(neutral.float().numpy(), bounds=True),
            "NORMAL": buffer.add(normalize(normals, dim=-1).float().numpy()),
            "COLOR_0": buffer.add(_linear_color(_vertex_colors(avatar, posed)), normalized=True),
            "JOINTS_0": buffer.add(joints), "WEIGHTS_0": buffer.add(weights),
        },
        "indices": buffer.add(head.faces.numpy().astype(np.uint16).reshape(-1), INDICES), "material": 0,
        "targets": targets,
    }  # fmt: skip
    gaze = {} if head.gaze is None else dict(zip(head.expression_names, head.gaze.tolist(), strict=True))
    turning = {name: angles for name, angles in gaze.items() if any(angles)}
    extras = {"targetNames": list(head.expression_names), "gaze": turning}
    return {"name": "head", "primitives": [primitive], "weights": rest.expr.tolist(), "extras": extras}


def _rig(buffer: Buffer, avatar: Avatar, rest: HeadParams) -> dict[str, Any]:
    """Return the nodes, splats and mesh before the joints, and the skin."""
    at = avatar.head.shape(replace(rest, shape=avatar.shape)).joints.double()
    nodes: list[dict[str, Any]] = [{"name": "splats", "mesh": 0}, {"name": "head", "mesh": 1, "skin": 0}]
    for j, (name, parent) in enumerate(zip(JOINTS, PARENTS, strict=True)):
        place = at[j] if parent < 0 else at[j] - at[parent]
        node: dict[str, Any] = {"name": name, "translation": place.tolist()}
        children = [ROOT + k for k, p in enumerate(PARENTS) if p == j]
        nodes.append(node | ({"children": children} if children else {}))
    turn = matrix_to_quat(axis_angle_to_matrix(rest.jaw_pose.double()))
    nodes[ROOT + JOINTS.index("jaw")]["rotation"] = turn[[1, 2, 3, 0]].tolist()
    # Column by column, as glTF has its matrices.
    unbound = np.tile(np.eye(4, dtype=np.float32), (len(JOINTS), 1, 1))
    unbound[:, 3, :3] = -at.numpy()
    skin = {"joints": [ROOT + j for j in range(len(JOINTS))], "skeleton": ROOT}
    return {"nodes": nodes, "skins": [skin | {"inverseBindMatrices": buffer.add(unbound, None)}]}


def _influences(weights: Float[np.ndarray, "verts joints"]) -> tuple[np.ndarray, np.ndarray]:
    """Return each vertex' four strongest joints and their weights, which sum to 1."""
    joints = np.argsort(-weights, 1, kind="stable")[:, :4]
    values = np.take_along_axis(weights, joints, 1).astype(np.float32)
    values /= values.sum(1, keepdims=True)
    return np.where(values > 0, joints, 0).astype(np.uint8), values


def _vertex_colors(avatar: Avatar, posed: PosedSplats) -> Float[np.ndarray, "verts 4"]:
    """Return the mean colour of the splats around each vertex, by their opacity; grey where there are none."""
    corners = avatar.head.faces[posed.face_index]
    rows = torch.cat([posed.colors, torch.ones(len(posed.colors), 1)], -1) * posed.gaussians.opacities[:, None]
    sums = torch.zeros(len(avatar.head.template), 4)
    for i in range(3):
        sums.index_add_(0, corners[:, i], rows)
    mean = torch.where(sums[:, 3:] > 0, sums[:, :3] / sums[:, 3:].clamp(min=1e-6), 0.5)
    return torch.cat([mean, torch.ones(len(mean), 1)], -1).numpy()


def _linear_color(srgb: Float[np.ndarray, "n 4"]) -> np.ndarray:
    """Return colours with alpha as glTF has COLOR_0: linear, in normalised 16 bits."""
    rgb, alpha = srgb[:, :3].clip(0, 1), srgb[:, 3:].clip(0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.rint(np.concatenate([linear, alpha], 1) * 65535).astype(np.uint16)
