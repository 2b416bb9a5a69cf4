"""An avatar packed for the web page: the head's rig, its splats and the fitted sequence, quantised, in one blob.

The page poses the head itself, so the identity is baked into the vertices and what is left is small: 52 sparse morph
targets, skinning weights, triangles, and each splat in the frame of its triangle (Sec. 3.3). Numbers are laid out
column by column, low bytes first, because likes beside likes compress better; `web/scene.js` reads them.
"""

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from geodiff4d.avatar.drive import Performance, head_centre, held
from geodiff4d.avatar.model import Avatar
from geodiff4d.avatar.relative import has_weights
from geodiff4d.core.errors import UserError
from geodiff4d.heads.rig import HeadParams

FORMAT, VERSION = "geodiff4d web avatar", 1
MORPH_FLOOR_M = 1e-6
"""Displacements of morph targets below this length are left out [m]."""
LEVELS = {"<u2": 65535, "u1": 255}
"""Largest code of each type that columns are quantised to."""


@dataclass
class Blob:
    """Arrays on their way into one file: a description of each for the header, and their bytes."""

    about: dict[str, Any] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def columns(self, name: str, values: np.ndarray, kind: str = "<u2") -> None:
        """Add rows of numbers, quantised between the smallest and the largest value of each column."""
        rows = values.astype(np.float64).reshape(len(values), -1)
        low, high = (rows.min(0), rows.max(0)) if len(rows) else (np.zeros(rows.shape[1]),) * 2
        step = np.where(high > low, (high - low) / LEVELS[kind], 1.0)
        codes = np.rint((rows - low) / step).clip(0, LEVELS[kind]).astype(kind)
        self._add(name, codes, {"kind": "columns", "low": low.tolist(), "step": step.tolist()})

    def indices(self, name: str, values: np.ndarray) -> None:
        """Add whole numbers below 65,536 as differences down each column, modulo 65,536."""
        rows = values.reshape(len(values), -1).astype(np.int64)
        self._add(name, (np.diff(rows, axis=0, prepend=0) % 65536).astype("<u2"), {"kind": "indices"})

    def numbers(self, name: str, values: np.ndarray) -> None:
        """Add a few numbers as they are, float32."""
        self._add(name, values.reshape(len(values), -1).astype("<f4"), {"kind": "numbers"})

    def _add(self, name: str, rows: np.ndarray, about: dict[str, Any]) -> None:
        planes = np.ascontiguousarray(rows.T).reshape(-1).view(np.uint8).reshape(-1, rows.dtype.itemsize).T.tobytes()
        self.about[name] = about | {
            "rows": rows.shape[0], "width": rows.shape[1], "bytes": rows.dtype.itemsize, "at": self.size,
        }  # fmt: skip
        self.parts.append(planes)
        self.size += len(planes)

    def packed(self, about: dict[str, Any]) -> bytes:
        """Return the compressed file: the header's length (uint32), the header as JSON, the bytes."""
        header = json.dumps(about | {"arrays": self.about}, separators=(",", ":")).encode()
        return zlib.compress(struct.pack("<I", len(header)) + header + b"".join(self.parts), 9)


def obstacle(avatar: Avatar) -> str | None:
    """Return why the page cannot draw an avatar; None if it can."""
    head = avatar.head
    if not has_weights(head) or head.pose_basis is not None or head.eyelid_basis is not None:
        return f"its head is {head.name}, and the page poses heads with ARKit's weights alone, such as openhead"
    if avatar.parts is not None:
        what = "networks" if avatar.parts.networks() else "a remeshed surface"
        return f"it has {what}, which the page cannot run: fit it with --preset embedded"
    if max(len(head.faces), len(head.template)) > 65536:
        return "its head has over 65,536 triangles or vertices, and the page numbers them in 16 bits"
    return None


@torch.no_grad()
def pack(avatar: Avatar, performance: Performance) -> bytes:
    """Return an avatar and a performance for the page: zlib-compressed, about 0.5 MB for 25,000 Gaussians.

    Raises:
        UserError: the page cannot draw it.
    """
    if (why := obstacle(avatar)) is not None:
        raise UserError(f"the avatar cannot be a page: {why}; `geodiff4d view` renders it here")
    blob = Blob()
    _add_head(blob, avatar)
    _add_splats(blob, avatar)
    rest = held(avatar, torch.zeros(1, len(avatar.head.expression_names))).params
    blob.numbers("rest", pose_rows(rest))
    blob.columns("sequence", pose_rows(performance.params))
    camera = avatar.camera
    return blob.packed({
        "format": FORMAT, "version": VERSION, "names": list(avatar.head.expression_names), "fps": performance.fps,
        "camera": {
            "T_cam_world": camera.T_cam_world.flatten().tolist(), "K": camera.K.flatten().tolist(),
            "width": camera.width, "height": camera.height, "pivot": head_centre(avatar).tolist(),
        },
    })  # fmt: skip


def pose_rows(params: HeadParams) -> Float[np.ndarray, "frames numbers"]:
    """Return a row per frame: expression, rotation, neck, jaw, both eyes (axis-angle [rad]) and translation [m]."""
    parts = (params.expr, params.rotation, params.neck_pose, params.jaw_pose, params.eyes_pose, params.translation)
    return torch.cat(parts, -1).float().numpy()


def _add_head(blob: Blob, avatar: Avatar) -> None:
    """Add the rig with the person's identity baked in; joints move with the expression, as `Head.shape` says."""
    head = avatar.head
    basis = head.expr_basis.numpy()
    neutral = head.shape(avatar.neutral())
    moved = [np.flatnonzero(np.abs(basis[..., k]).max(1) > MORPH_FLOOR_M) for k in range(basis.shape[-1])]
    blob.columns("neutral", neutral.vertices.numpy())
    blob.indices("faces", head.faces.numpy())
    blob.columns("skin", head.skin_weights.numpy())
    blob.numbers("joints", neutral.joints.numpy())
    blob.numbers("joint_morphs", np.einsum("jv,vck->kjc", head.joint_regressor.numpy(), basis))
    blob.indices("morph_counts", np.array([len(m) for m in moved]))
    blob.indices("morph_index", np.concatenate(moved))
    blob.columns("morph_offsets", np.concatenate([basis[m, :, k] for k, m in enumerate(moved)]))
    gaze = torch.zeros(basis.shape[-1], 6) if head.gaze is None else head.gaze
    blob.numbers("gaze", gaze.numpy())


def _add_splats(blob: Blob, avatar: Avatar) -> None:
    """Add the splats by face, which compresses best and lies together in the GPU's memory."""
    local = avatar.local
    order = local.face_index.argsort(stable=True)
    quats = torch.nn.functional.normalize(local.quats[order], dim=-1)
    # q and -q turn alike: one half of the sphere needs one bit less.
    quats = torch.where(quats[:, :1] < 0, -quats, quats)
    shares = torch.cat([local.color_logits, local.opacity_logits[:, None]], -1)[order].sigmoid()
    blob.indices("splat_face", local.face_index[order].numpy())
    blob.columns("splat_means", local.means[order].numpy())
    blob.columns("splat_quats", quats.numpy(), "u1")
    blob.columns("splat_log_scales", local.log_scales[order].numpy(), "u1")
    blob.columns("splat_shares", shares.numpy(), "u1")
    if local.harmonics is not None:
        blob.columns("splat_harmonics", local.harmonics[order].flatten(1).numpy(), "u1")
