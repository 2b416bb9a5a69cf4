"""Rotations and rigid transforms.

Rotations are axis-angle in files and parameters, 3×3 matrices in between and wxyz quaternions for splats.
`T_a_b` takes points from frame b to frame a, so transforms chain right to left: `T_a_c = T_a_b @ T_b_c`.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def axis_angle_to_matrix(axis_angle: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Turn axis-angle vectors [rad] into rotation matrices (Rodrigues), smooth through zero."""
    squared = axis_angle.square().sum(-1)[..., None, None]
    small = squared < 1e-8
    # sqrt has no gradient at zero: keep it away from there, and use the Taylor series instead.
    angle = torch.where(small, torch.ones_like(squared), squared).sqrt()
    a = torch.where(small, 1 - squared / 6, angle.sin() / angle)
    b = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / angle.square())
    K = skew(axis_angle)
    return torch.eye(3, dtype=K.dtype, device=K.device) + a * K + b * (K @ K)


def matrix_to_axis_angle(R: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3"]:
    """Turn rotation matrices into axis-angle vectors [rad] of at most π; not differentiable at the identity."""
    q = matrix_to_quat(R)
    q = torch.where(q[..., :1] < 0, -q, q)
    length = q[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(length, q[..., :1])
    return q[..., 1:] * torch.where(length > 1e-12, angle / length.clamp(min=1e-12), 2.0)


def skew(v: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Return the matrix of the cross product `v ×`."""
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def matrix_to_quat(R: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Turn rotation matrices into unit quaternions (wxyz, sign free).

    Of the four textbook formulas one is taken whose pivot is at least 1, so no rotation is near a division by zero.
    """
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = R.flatten(-2).unbind(-1)
    candidates = torch.stack(
        [
            torch.stack([1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01]),
            torch.stack([m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20]),
            torch.stack([m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m12 + m21]),
            torch.stack([m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22]),
        ]
    )
    # By comparison: an argmax over an axis of four takes as long as all the rest.
    best = torch.where(m22 < 0, torch.where(m00 > m11, 1, 2), torch.where(m00 < -m11, 3, 0))
    picked = candidates.gather(0, best.expand(1, 4, *best.shape))[0]
    return torch.nn.functional.normalize(picked.movedim(0, -1), dim=-1)


def quat_to_matrix(quats: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Turn quaternions (wxyz, any length but zero) into rotation matrices."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ],
        -1,
    ).unflatten(-1, (3, 3))  # fmt: skip


def quat_multiply(a: Float[Tensor, "*batch 4"], b: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Hamilton product (wxyz): rotate by b, then by a."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


def transform(T_a_b: Float[Tensor, "*batch 4 4"], points: Float[Tensor, "*batch n 3"]) -> Float[Tensor, "*batch n 3"]:
    """Take points from frame b to frame a."""
    return points @ T_a_b[..., :3, :3].mT + T_a_b[..., None, :3, 3]


def rigid(R: Float[Tensor, "*batch 3 3"], t: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4 4"]:
    """Assemble a 4×4 transform from a rotation and a translation [m]."""
    top = torch.cat([R, t[..., None]], -1)
    # Filled where it is: a tensor that comes from the host makes a GPU wait.
    bottom = R.new_zeros(4)
    bottom[3].fill_(1.0)
    return torch.cat([top, bottom.expand(*R.shape[:-2], 1, 4)], -2)


def invert(T_a_b: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Return `T_b_a` of a rigid transform (the rotation is transposed, not inverted)."""
    R = T_a_b[..., :3, :3].mT
    return rigid(R, -(R @ T_a_b[..., :3, 3:]).squeeze(-1))


def look_at(
    eye: Float[Tensor, "*batch 3"], target: Float[Tensor, "*batch 3"], up: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch 4 4"]:
    """Return `T_cam_world` of a camera (x right, y down, z forward) at `eye` that sees `target` in its centre."""
    forward = torch.nn.functional.normalize(target - eye, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    R = torch.stack([right, down, forward], -2)
    return rigid(R, -(R @ eye[..., None]).squeeze(-1))
