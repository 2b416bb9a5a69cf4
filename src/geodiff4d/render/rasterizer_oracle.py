"""The rasteriser's oracle, written plainly in torch. Memory grows as Gaussians × pixels."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.geometry import quat_to_matrix

NEAR_M = 0.01
EPS_2D = 0.3
ALPHA_MIN = 1 / 255
ALPHA_MAX = 0.999
T_MIN = 1e-4


def rasterize_oracle(
    means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"], features: Float[Tensor, "n channels"],
    T_cam_world: Float[Tensor, "4 4"], K: Float[Tensor, "3 3"], width: int, height: int,
) -> tuple[
    Float[Tensor, "channels {height} {width}"], Float[Tensor, "1 {height} {width}"], Bool[Tensor, " n"]
]:  # fmt: skip
    """Render one camera; returns (image, alpha, the broken Gaussians). Any dtype, differentiable in every tensor."""
    broken = find_broken(means, quats, scales, opacities, features)
    means, quats, scales, opacities, features = without(broken, means, quats, scales, opacities, features)
    cam = means @ T_cam_world[:3, :3].mT + T_cam_world[:3, 3]
    near_to_far = cam[:, 2].detach().argsort(stable=True)
    order = near_to_far[cam[near_to_far, 2] > NEAR_M]
    cam, opacities, features = cam[order], opacities[order], features[order]
    xy = (cam @ K.mT)[:, :2] / cam[:, 2:]
    conic = torch.linalg.inv(_covariance(cam, quats[order], scales[order], T_cam_world, K, width, height))

    pixel_y, pixel_x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    d = xy[:, None, None] - torch.stack([pixel_x, pixel_y], -1).to(xy)
    sigma = 0.5 * torch.einsum("nhwi,nij,nhwj->nhw", d, conic, d)
    alpha = (opacities[:, None, None] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
    alpha = torch.where(alpha >= ALPHA_MIN, alpha, 0.0)
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
    # A pixel is full before the Gaussian that would leave less than T_MIN.
    weight = torch.where(after > T_MIN, alpha * before, 0.0)
    return torch.einsum("nhw,nc->chw", weight, features), weight.sum(0)[None], broken


def find_broken(
    means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"], features: Float[Tensor, "n channels"],
) -> Bool[Tensor, " n"]:  # fmt: skip
    """Return which Gaussians cannot be drawn: a number is infinite or NaN, the quaternion zero, or the splat vast."""
    tensors = (means, quats, scales, opacities[:, None], features)
    finite = torch.cat([x.detach() for x in tensors], -1).isfinite().all(-1)
    return ~finite | (quats.detach().norm(dim=-1) <= 1e-12) | (scales.detach().abs().amax(-1) > 1e9)


def without(
    broken: Bool[Tensor, " n"], means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"], features: Float[Tensor, "n channels"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the Gaussians with broken ones made invisible, so that they get no gradient; CUDA need not synchronise."""
    row = broken[:, None]
    unit = torch.zeros_like(quats)
    unit[:, 0].fill_(1.0)
    return (
        torch.where(row, 0.0, means), torch.where(row, unit, quats), torch.where(row, 1.0, scales),
        torch.where(broken, 0.0, opacities), torch.where(row, 0.0, features),
    )  # fmt: skip


def _covariance(
    cam: Tensor, quats: Tensor, scales: Tensor, T_cam_world: Tensor, K: Tensor, width: int, height: int
) -> Tensor:
    """Return the 2D covariances, Σ₂ = J R Σ Rᵀ Jᵀ + ε (EWA splatting), J taken at most 15 % outside the image."""
    x, y, z = cam.unbind(-1)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    mx, my = 0.15 * width / fx, 0.15 * height / fy
    u = torch.minimum(torch.maximum(x / z, -cx / fx - mx), (width - cx) / fx + mx)
    v = torch.minimum(torch.maximum(y / z, -cy / fy - my), (height - cy) / fy + my)
    o = torch.zeros_like(z)
    J = torch.stack([fx / z, o, -fx * u / z, o, fy / z, -fy * v / z], -1).unflatten(-1, (2, 3))
    M = J @ T_cam_world[:3, :3] @ quat_to_matrix(quats) * scales[:, None, :]
    return M @ M.mT + EPS_2D * torch.eye(2).to(M)
