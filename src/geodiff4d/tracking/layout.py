"""The head in the fit: reduced to its landmarks, with one vector of unknowns per frame."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.heads.rig import Head, HeadParams, Landmarks


def landmark_head(head: Head, landmarks: Landmarks) -> Head:
    """Return a head whose vertices are the landmarks, followed by the five joints: the same rig, 25 times smaller.

    A landmark's skinning weights are interpolated from its face's corners; this differs from interpolating the skinned
    corners by less than a tenth of a millimetre.
    """

    def at(basis: Tensor) -> Tensor:
        # [verts, …] → [points + joints, …]
        corners = head.faces[landmarks.face_index]
        flat = basis.reshape(len(basis), -1)
        points = (flat[corners] * landmarks.bary[..., None].to(flat)).sum(1)
        return torch.cat([points, head.joint_regressor.to(flat) @ flat]).reshape(-1, *basis.shape[1:]).double()

    n, joints = len(landmarks.face_index), len(head.joint_regressor)
    regressor = torch.zeros(joints, n + joints, dtype=torch.float64)
    regressor[:, n:] = torch.eye(joints)
    return replace(
        head,
        template=at(head.template),
        faces=head.faces[:0],
        shape_basis=at(head.shape_basis),
        expr_basis=at(head.expr_basis),
        joint_regressor=regressor,
        skin_weights=at(head.skin_weights),
        uv_faces=head.uv_faces[:0],
        regions={},
        pose_basis=None if head.pose_basis is None else at(head.pose_basis),
        eyelid_basis=None if head.eyelid_basis is None else at(head.eyelid_basis),
    )


class Layout:
    """The place of each parameter in a frame's vector of unknowns."""

    def __init__(self, head: Head):
        sizes = {"rotation": 3, "translation": 3, "jaw_pose": 3, "eyes_pose": 6, "expr": head.expr_basis.shape[-1]}
        if head.eyelid_basis is not None:
            sizes["eyelids"] = 2
        self.slices: dict[str, slice] = {}
        self.size = 0
        for name, n in sizes.items():
            self.slices[name] = slice(self.size, self.size + n)
            self.size += n
        self.shapes = head.shape_basis.shape[-1]
        self.names = head.expression_names
        self.arkit = "jawOpen" in self.names
        """Whether expressions are ARKit's weights (0 to 1) rather than coefficients of a PCA."""

    def params(self, frame: Tensor, shape: Tensor) -> HeadParams:
        """Return unknowns [*batch, n] as parameters; `shape` has the same batch."""
        values = {name: frame[..., where] for name, where in self.slices.items()}
        return HeadParams(shape=shape, neck_pose=torch.zeros_like(values["rotation"]), **values)

    def fill(self, default: float, **values: float | Sequence[float]) -> Float[Tensor, " unknowns"]:
        """Return a vector of one value per unknown: those given by parameter name, and `default` elsewhere."""
        out = torch.full((self.size,), default, dtype=torch.float64)
        for name, value in values.items():
            if name in self.slices:
                out[self.slices[name]] = torch.as_tensor(value, dtype=torch.float64)
        return out

    def twins(self) -> list[tuple[int, int]]:
        """Return pairs of unknowns: left and right ARKit weights, which usually move together."""
        start = self.slices["expr"].start
        names = list(self.names)
        pairs = [(n, n[: -len("Left")] + "Right") for n in names if n.endswith("Left")]
        sideways = {"jawLeft", "mouthLeft"}
        return [(start + names.index(a), start + names.index(b)) for a, b in pairs if b in names and a not in sideways]
