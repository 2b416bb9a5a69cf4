"""One rigged head over any data file: HeadParams → ShapedHead → PosedHead.

Parameter names, joint order (root, neck, jaw, left eye, right eye) and frame (metres, +y up, face toward +z) are
FLAME's; linear blend skinning follows Li et al. 2017: v = template + shape + expression, joints regressed from that,
pose correctives where the file has them, then skinning; eyelids are added after it, along the turned head's axes
(Pixel3DMM).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_arrays
from geodiff4d.core.geometry import axis_angle_to_matrix, rigid
from geodiff4d.core.topology import vertex_normals

JOINTS = ("root", "neck", "jaw", "left_eye", "right_eye")
PARENTS = (-1, 0, 1, 1, 1)
SKULL_JOINT = JOINTS.index("neck")
"""The neck joint carries the skull: jaw and eyes hang on it."""
EYE_JOINTS = JOINTS.index("left_eye"), JOINTS.index("right_eye")


@dataclass(frozen=True)
class HeadParams:
    """FLAME-named parameters; every tensor shares the leading batch. Rotations are axis-angle [rad], lengths metres."""

    shape: Float[Tensor, "*batch shapes"]
    """Identity coefficients."""
    expr: Float[Tensor, "*batch exprs"]
    """Expression coefficients; OpenHead's are the 52 ARKit weights, 0 to 1."""
    rotation: Float[Tensor, "*batch 3"]
    """Global head rotation about the root joint."""
    neck_pose: Float[Tensor, "*batch 3"]
    jaw_pose: Float[Tensor, "*batch 3"]
    eyes_pose: Float[Tensor, "*batch 6"]
    """Left eye, then right eye."""
    translation: Float[Tensor, "*batch 3"]
    eyelids: Float[Tensor, "*batch 2"] | None = None
    """Left and right lid closure, for heads that have it (Pixel3DMM's FLAME extension)."""
    static_offset: Float[Tensor, "*batch verts 3"] | None = None
    """Per-vertex offset added to the shaped template (VHAP)."""

    def without_expression(self) -> "HeadParams":
        """Return the parameters with expr, jaw, eyes and eyelids at zero; rotation and neck stay (Sec. 3.2)."""
        return replace(
            self,
            expr=torch.zeros_like(self.expr),
            jaw_pose=torch.zeros_like(self.jaw_pose),
            eyes_pose=torch.zeros_like(self.eyes_pose),
            eyelids=None if self.eyelids is None else torch.zeros_like(self.eyelids),
        )

    def without_shape(self) -> "HeadParams":
        """Return the parameters without identity, for a head whose template has it (an open-world subject's)."""
        return replace(self, shape=self.shape[..., :0], static_offset=None)

    def map(self, f: Callable[[Tensor], Tensor]) -> "HeadParams":
        """Return the parameters with `f` applied to every tensor that is present."""
        values: dict[str, Any] = {x.name: getattr(self, x.name) for x in fields(self)}
        changed: dict[str, Any] = {k: None if v is None else f(v) for k, v in values.items()}
        return HeadParams(**changed)

    def __getitem__(self, index: "int | slice | Tensor") -> "HeadParams":
        return self.map(lambda v: v[index])

    def to(self, device: torch.device | str) -> "HeadParams":
        return self.map(lambda v: v.to(device))

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.rotation.shape[:-1])

    @staticmethod
    def stack(items: "list[HeadParams]") -> "HeadParams":
        """Stack single parameter sets into a batch; optional fields must be present in all or in none."""
        return HeadParams.cat([p.map(lambda v: v[None]) for p in items])

    @staticmethod
    def cat(batches: "Sequence[HeadParams]") -> "HeadParams":
        """Join batches along their first axis; optional fields must be present in all or in none."""
        out: dict[str, Any] = {}
        for x in fields(HeadParams):
            values = [getattr(p, x.name) for p in batches]
            out[x.name] = None if values[0] is None else torch.cat(values)
        return HeadParams(**out)

    def save(self, path: Path | IO[bytes]) -> None:
        """Write an .npz with FLAME's names, float32."""
        present = {x.name: getattr(self, x.name) for x in fields(self) if getattr(self, x.name) is not None}
        np.savez(path, **{k: v.detach().cpu().numpy().astype(np.float32) for k, v in present.items()})

    @staticmethod
    def load(path: Path) -> "HeadParams":
        """Read what `save` wrote; unknown keys are ignored.

        Raises:
            UserError: the file is missing or damaged.
        """
        known = {x.name for x in fields(HeadParams)}
        data = {k: v for k, v in read_arrays(path).items() if k in known}
        return HeadParams(**{k: torch.from_numpy(v.astype(np.float32)) for k, v in data.items()})


@dataclass(frozen=True)
class Landmarks:
    """Points on the surface, each with a face and barycentric coordinates."""

    face_index: Int[Tensor, " points"]
    bary: Float[Tensor, "points 3"]

    def on(
        self, vertices: Float[Tensor, "*batch verts 3"], faces: Int[Tensor, "faces 3"]
    ) -> Float[Tensor, "*batch points 3"]:
        """Return the points on posed vertices."""
        corners = vertices[..., faces[self.face_index], :]
        return (corners * self.bary[..., None]).sum(-2)


@dataclass(frozen=True)
class ShapedHead:
    """A head with identity and expression, before any joint turns."""

    head: "Head"
    vertices: Float[Tensor, "*batch verts 3"]
    joints: Float[Tensor, "*batch joints 3"]


@dataclass(frozen=True)
class PosedHead:
    """A posed mesh in the world."""

    vertices: Float[Tensor, "*batch verts 3"]
    faces: Int[Tensor, "faces 3"]
    T_world_joint: Float[Tensor, "*batch joints 4 4"]
    """Each joint's transform from the shaped rest pose to the world."""

    def __getitem__(self, index: int) -> "PosedHead":
        """Return one head of a batch."""
        return replace(self, vertices=self.vertices[index], T_world_joint=self.T_world_joint[index])

    @property
    def normals(self) -> Float[Tensor, "*batch verts 3"]:
        """Unit vertex normals in the world."""
        return vertex_normals(self.vertices, self.faces)


@dataclass(frozen=True)
class Head:
    """A rigged head: template, bases, joints, weights, UVs, regions and landmarks of one data file."""

    name: str
    template: Float[Tensor, "verts 3"]
    faces: Int[Tensor, "faces 3"]
    shape_basis: Float[Tensor, "verts 3 shapes"]
    """Scaled so that unit coefficients are one standard deviation."""
    expr_basis: Float[Tensor, "verts 3 exprs"]
    joint_regressor: Float[Tensor, "joints verts"]
    skin_weights: Float[Tensor, "verts joints"]
    uv: Float[Tensor, "uvs 2"]
    """Texture coordinates in [0, 1], v down (image row order), one chart without overlaps."""
    uv_faces: Int[Tensor, "faces 3"]
    regions: dict[str, Bool[Tensor, " verts"]]
    """Named vertex masks: skin, lips, brows, lids, eyes, scalp, ears, teeth, gums, tongue, mouth, neck."""
    expression_names: tuple[str, ...]
    landmarks68: Landmarks
    """The 68 points of iBUG's markup."""
    mediapipe: Landmarks
    """A subset of MediaPipe's 478 points; `mediapipe_index` says which."""
    mediapipe_index: Int[Tensor, " points"]
    pose_basis: Float[Tensor, "verts 3 36"] | None = None
    """Pose correctives of the four non-root joints (FLAME), absent in OpenHead."""
    eyelid_basis: Float[Tensor, "verts 3 2"] | None = None
    gaze: Float[Tensor, "exprs 6"] | None = None
    """How far each expression turns the eye joints at weight 1 [rad]: OpenHead's look actions."""

    def neutral(self, *batch: int) -> HeadParams:
        """Return all-zero parameters."""
        z = self.template.new_zeros
        return HeadParams(
            shape=z(*batch, self.shape_basis.shape[-1]), expr=z(*batch, self.expr_basis.shape[-1]),
            rotation=z(*batch, 3), neck_pose=z(*batch, 3), jaw_pose=z(*batch, 3), eyes_pose=z(*batch, 6),
            translation=z(*batch, 3), eyelids=None if self.eyelid_basis is None else z(*batch, 2),
        )  # fmt: skip

    def shape(self, params: HeadParams) -> ShapedHead:
        """Return the head with identity and expression: template + both bases + static offset, and its joints.

        Raises:
            UserError: the offset is of another head.
        """
        v = self.template + blend(self.shape_basis, params.shape) + blend(self.expr_basis, params.expr)
        if params.static_offset is not None:
            if params.static_offset.shape[-2:] != self.template.shape:
                raise UserError(
                    f"offsets of {params.static_offset.shape[-2]} vertices are not {self.name}'s, which has "
                    f"{len(self.template)}: pass the head that they were made with (--head)"
                )
            v = v + params.static_offset
        return ShapedHead(self, v, self.joint_regressor @ v)

    def pose(self, params: HeadParams) -> PosedHead:
        """Return the posed head: identity, expression and joints. Differentiable in every parameter.

        Raises:
            UserError: a parameter's size does not fit this head.

        Example:
            >>> head.pose(head.neutral(2)).vertices.shape[0]
            2
        """
        for name, basis in (("shape", self.shape_basis), ("expr", self.expr_basis)):
            if getattr(params, name).shape[-1] != basis.shape[-1]:
                got = getattr(params, name).shape[-1]
                raise UserError(
                    f"{self.name} has {basis.shape[-1]} {name} coefficients, got {got}: parameters of another head? "
                    "Give the head they were tracked with"
                )
        shaped = self.shape(params)
        eyes = (
            params.eyes_pose if self.gaze is None else either(params.eyes_pose, params.expr @ self.gaze.to(params.expr))
        )
        angles = torch.stack([params.rotation, params.neck_pose, params.jaw_pose, *eyes.split(3, -1)], -2)
        R = axis_angle_to_matrix(angles)
        v = shaped.vertices
        if self.pose_basis is not None:
            away = (R[..., 1:, :, :] - torch.eye(3, dtype=R.dtype, device=R.device)).flatten(-3)
            v = v + blend(self.pose_basis, away)
        T = joint_transforms(R, shaped.joints)
        v = skin(v, T, self.skin_weights)
        if self.eyelid_basis is not None and params.eyelids is not None:
            # Pixel3DMM turns the head outside of its skinning, so that the lids turn with it.
            v = v + blend(self.eyelid_basis, params.eyelids) @ R[..., 0, :, :].mT
        t = params.translation
        return PosedHead(v + t[..., None, :], self.faces, _translated(T, t))

    def to(self, device: torch.device | str) -> "Head":
        def move(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(device)
            if isinstance(x, Landmarks):
                return Landmarks(x.face_index.to(device), x.bary.to(device))
            return {k: v.to(device) for k, v in x.items()} if isinstance(x, dict) else x

        return Head(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


def blend(
    basis: Float[Tensor, "verts 3 terms"], weights: Float[Tensor, "*batch terms"]
) -> Float[Tensor, "*batch verts 3"]:
    """Return the sum of a basis' displacements, as one matrix product (einsum's own plan is slower)."""
    return (weights @ basis.flatten(0, 1).mT).unflatten(-1, (-1, 3))


def either(a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Return one motion from two that may both describe it: the larger where their signs agree, else their sum.

    This is continuous, and zero in one leaves the other as it is.
    """
    return torch.where(a * b > 0, torch.where(a.abs() > b.abs(), a, b), a + b)


def skin(
    vertices: Float[Tensor, "*batch verts 3"],
    T: Float[Tensor, "*batch joints 4 4"],
    weights: Float[Tensor, "verts joints"],
) -> Float[Tensor, "*batch verts 3"]:
    """Linear blend skinning: move each vertex by the weighted mean of the joints' transforms.

    Vertices are moved to the last axis, so that vectors are long, and coordinates are computed one at a time, since
    allocating memory costs more than the arithmetic.
    """
    mean = T[..., :3, :].movedim(-3, -1)
    x, y, z = vertices.mT.unbind(-2)
    rows = []
    for row in mean.unbind(-3):
        a, b, c, d = (row.flatten(0, -2) @ weights.mT).unflatten(0, row.shape[:-1]).unbind(-2)
        rows.append(torch.addcmul(torch.addcmul(torch.addcmul(d, a, x), b, y), c, z))
    return torch.stack(rows, -1)


def joint_transforms(
    R: Float[Tensor, "*batch joints 3 3"], joints: Float[Tensor, "*batch joints 3"]
) -> Float[Tensor, "*batch joints 4 4"]:
    """Chain joint rotations about their rest positions: rest pose → posed, one transform per joint."""
    out: list[Tensor] = []
    for j, parent in enumerate(PARENTS):
        p = joints[..., j, :]
        about = rigid(R[..., j, :, :], p - (R[..., j, :, :] @ p[..., None]).squeeze(-1))
        out.append(about if parent < 0 else out[parent] @ about)
    return torch.stack(out, -3)


def _translated(
    T: Float[Tensor, "*batch joints 4 4"], t: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch joints 4 4"]:
    move = rigid(torch.eye(3, dtype=T.dtype, device=T.device).expand(*t.shape[:-1], 3, 3), t)
    return move[..., None, :, :] @ T
