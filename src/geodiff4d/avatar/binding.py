"""Gaussians bound to triangles (GaussianAvatars, Qian et al. 2024, Sec. 3.1).

Each face carries a frame: R = [a0 a1 a2] with a0 along its first edge, a1 its normal and a2 = -(a1 × a0), its size k
(the mean of the first edge and the height over it) and its centroid T. A Gaussian lives in units of k in that frame:
mean = k·R·μ + T, scales = k·exp(s), rotation = q_R ⊗ q.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.geometry import matrix_to_quat, quat_multiply
from geodiff4d.core.topology import face_normals
from geodiff4d.render.binding_kernels import fused_bind
from geodiff4d.render.gaussians import Gaussians

NORMAL_AXIS = 1
"""The column of R, and the axis of an untouched Gaussian, that is the face normal."""
FLATNESS = -2.0
"""Log-scale of the normal axis relative to the other two at the start."""
SPREAD = 0.55
"""A Gaussian's first standard deviation, in units of the square root of the area that it stands for."""


@dataclass(frozen=True)
class FaceFrames:
    """A frame for every face of a mesh."""

    R: Float[Tensor, "faces 3 3"]
    """Frame to world; columns are a0, the normal a1, and a2. Zero columns where the triangle is degenerate."""
    scale: Float[Tensor, " faces"]
    """k [m]."""
    centre: Float[Tensor, "faces 3"]


@dataclass(frozen=True)
class LocalGaussians:
    """Gaussians in the frames of their faces: what is optimised and stored."""

    face_index: Int[Tensor, " n"]
    means: Float[Tensor, "n 3"]
    """In units of the face's size."""
    quats: Float[Tensor, "n 4"]
    """wxyz, need not be unit."""
    log_scales: Float[Tensor, "n 3"]
    """Natural logarithm, in units of the face's size."""
    opacity_logits: Float[Tensor, " n"]
    color_logits: Float[Tensor, "n 3"]
    """Logit of sRGB."""
    features: Float[Tensor, "n features"] | None = None
    """What the dynamics MLP knows each by (`avatar.dynamics`)."""
    harmonics: Float[Tensor, "n rest 3"] | None = None
    """View-dependent colour, added to sRGB: spherical harmonics from degree 1 on (`render.harmonics`), in the face's
    frame, so that they turn with it."""

    def __len__(self) -> int:
        return len(self.face_index)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tensors that an optimiser may change."""
        return {name: value for name, value in self.tensors.items() if name != "face_index"}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to(self, device: torch.device | str) -> "LocalGaussians":
        return replace(self, **{name: value.to(device) for name, value in self.tensors.items()})


def face_frames(vertices: Float[Tensor, "verts 3"], faces: Int[Tensor, "faces 3"]) -> FaceFrames:
    """Build the frame of every face. Differentiable; degenerate triangles give finite values and gradients."""
    # index_select: the backward of plain indexing sorts, and costs five times as much on a CPU.
    v0, v1, v2 = (vertices.index_select(0, faces[:, i]) for i in range(3))
    a0 = normalize(v1 - v0, dim=-1, eps=1e-12)
    a1 = normalize(torch.linalg.cross(a0, v2 - v0), dim=-1, eps=1e-12)
    a2 = -normalize(torch.linalg.cross(a1, a0), dim=-1, eps=1e-12)
    scale = 0.5 * ((v1 - v0).norm(dim=-1) + (a2 * (v2 - v0)).sum(-1).abs())
    return FaceFrames(torch.stack([a0, a1, a2], -1), scale, (v0 + v1 + v2) / 3)


def bind(local: LocalGaussians, frames: FaceFrames) -> Gaussians:
    """Carry triangle-local Gaussians to the world. Differentiable in both arguments.

    Example:
        >>> splats = bind(local, face_frames(posed.vertices, posed.faces))  # doctest: +SKIP
    """
    face = local.face_index
    R, k = frames.R.index_select(0, face), frames.scale.index_select(0, face)[:, None]
    rotation = matrix_to_quat(frames.R).index_select(0, face)
    return Gaussians(
        means=k * (R * local.means[:, None, :]).sum(-1) + frames.centre.index_select(0, face),
        quats=quat_multiply(rotation, normalize(local.quats, dim=-1)),
        scales=k * local.log_scales.exp(),
        opacities=local.opacity_logits.sigmoid(),
    )


def place(local: LocalGaussians, vertices: Float[Tensor, "verts 3"], faces: Int[Tensor, "faces 3"]) -> Gaussians:
    """Carry Gaussians to the world on a posed mesh: `bind` on `face_frames`, fused on a CPU (a sixth of the time)."""
    if vertices.is_cuda:
        return bind(local, face_frames(vertices, faces))
    means, quats, scales = fused_bind(vertices, faces, local.face_index, local.means, local.quats, local.log_scales)
    return Gaussians(means, quats, scales, local.opacity_logits.sigmoid())


def sample_surface(
    vertices: Float[Tensor, "verts 3"], faces: Int[Tensor, "faces 3"], density: Float[Tensor, " faces"],
    count: int, generator: torch.Generator,
) -> LocalGaussians:  # fmt: skip
    """Spread about `count` flat Gaussians by area × density, at least one on every face; grey and half opaque."""
    area = face_normals(vertices, faces).norm(dim=-1) / 2
    weight = area * density
    extra = max(count - len(faces), 0)
    per_face = 1 + (extra * weight / weight.sum()).floor().long()
    face = torch.repeat_interleave(per_face)
    bary = _barycentrics(per_face, generator)
    frames = face_frames(vertices, faces)
    points = (vertices[faces[face]] * bary[..., None]).sum(1)
    size = SPREAD * (area / per_face).sqrt()[face]
    k = frames.scale[face].clamp(min=1e-9)
    log_scales = (size / k).clamp(1e-3, 1.0).log()[:, None].repeat(1, 3)
    log_scales[:, NORMAL_AXIS] += FLATNESS
    return LocalGaussians(
        face_index=face,
        means=to_local(points, frames, face),
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(face), 1),
        log_scales=log_scales,
        opacity_logits=torch.full((len(face),), math.log(0.8 / 0.2)),
        color_logits=torch.zeros(len(face), 3),
    )


def to_local(points: Float[Tensor, "n 3"], frames: FaceFrames, face_index: Int[Tensor, " n"]) -> Float[Tensor, "n 3"]:
    """Express world points in the frames of their faces: the inverse of what `bind` does to means."""
    k = frames.scale[face_index, None].clamp(min=1e-9)
    return (frames.R[face_index].mT @ (points - frames.centre[face_index])[..., None]).squeeze(-1) / k


def _barycentrics(per_face: Int[Tensor, " faces"], generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """Uniform points in triangles; a face's only one sits at its centroid."""
    n = int(per_face.sum())
    u, v = torch.rand(2, n, generator=generator)
    root = u.sqrt()
    bary = torch.stack([1 - root, root * (1 - v), root * v], -1)
    alone = (per_face == 1)[torch.repeat_interleave(per_face)]
    return torch.where(alone[:, None], torch.tensor(1 / 3), bary)
