"""What an avatar is asked for: pictures, normals and silhouettes like the clip's, from splats that stay on their head.

Eq. 2's normal term compares premultiplied normals with α(2I - 1). The binding terms are GaussianAvatars' with two
differences: distances are metres with a tolerance per region (skin 3 mm, hair and clothes 60 mm), since a triangle of
an eyelid and one of the scalp differ in size a hundredfold; and needles cost, since they stick out in unseen views.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, relu

from geodiff4d.avatar.binding import NORMAL_AXIS, LocalGaussians
from geodiff4d.avatar.model import AvatarFrame
from geodiff4d.heads.rig import Head

SKIN_TOLERANCE_M = 0.003
LOOSE_TOLERANCE_M = 0.060
LOOSE_REGIONS = ("scalp", "neck")
WINDOW = 7
C1, C2 = 0.01**2, 0.03**2
"""SSIM's window [px] and constants, for a range of 1."""
FALLOFF_M = 0.020
"""Around hair and clothes the tolerance falls off over this distance: fringes and beards hang over skin."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms."""

    ssim: float = 0.2
    """λ: (1-λ)·L1 + λ·(1-SSIM)."""
    normals: float = 0.1
    """λ_n of Eq. 2 (not stated in the paper); 0 switches the term off."""
    alpha: float = 0.2
    """L1 between alpha and the foreground mask."""
    position: float = 0.02
    """Per millimetre beyond the region's tolerance."""
    size: float = 0.05
    """Per millimetre beyond `max_size_m`."""
    max_size_m: float = 0.006
    needle: float = 0.02
    """Per unit of log aspect ratio beyond `max_aspect`."""
    max_aspect: float = 3.0
    flat: float = 0.02
    """Per unit of log-scale that the normal axis is less than e times thinner than the others."""


def image_loss(
    frame: AvatarFrame, image: Float[Tensor, "3 height width"], mask: Float[Tensor, "1 height width"],
    normal: Float[Tensor, "3 height width"] | None, box: tuple[slice, slice], config: LossConfig,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compare a rendered frame with the clip's, both on the same background.

    `box` bounds the foreground: colour and structure are compared there, alpha everywhere.
    """
    ours, theirs = frame.rgb[:, *box], image[:, *box]
    loss = (1 - config.ssim) * (ours - theirs).abs().mean()
    if config.ssim:
        loss = loss + config.ssim * (1 - ssim(ours, theirs))
    if normal is not None and config.normals:
        inside = mask[:, *box]
        difference = (frame.normal[:, *box] - frame.alpha[:, *box] * normal[:, *box]).abs() * inside
        loss = loss + config.normals * difference.sum() / (3 * inside.sum()).clamp(min=1)
    return loss + config.alpha * (frame.alpha - mask).abs().mean()


def binding_loss(
    local: LocalGaussians, face_scale: Float[Tensor, " faces"], tolerance: Float[Tensor, " faces"], config: LossConfig
) -> Float[Tensor, ""]:
    """Keep splats near their faces, small, and flat rather than needles; lengths count in millimetres."""
    k = face_scale[local.face_index]
    away = relu(local.means.norm(dim=-1) * k - tolerance[local.face_index] - 0.5 * k).mean() * 1000
    tangent = local.log_scales[:, [i for i in range(3) if i != NORMAL_AXIS]]
    large, small = tangent.amax(-1), tangent.amin(-1)
    oversize = relu(large.exp() * k - config.max_size_m).mean() * 1000
    needle = relu(large - small - torch.tensor(config.max_aspect).log().to(large)).mean()
    thick = relu(local.log_scales[:, NORMAL_AXIS] - small + 1).mean()
    return config.position * away + config.size * oversize + config.needle * needle + config.flat * thick


def position_tolerance(head: Head) -> Float[Tensor, " faces"]:
    """How far [m] a splat may leave its face: 60 mm on hair and clothes, 3 mm on skin, falling off in between."""
    loose = torch.zeros(len(head.template), dtype=torch.bool, device=head.template.device)
    for name in LOOSE_REGIONS:
        if name in head.regions:
            loose |= head.regions[name]
    if not loose.any():
        return head.template.new_full((len(head.faces),), SKIN_TOLERANCE_M)
    distance = torch.cdist(head.template, head.template[loose]).amin(-1)
    tolerance = SKIN_TOLERANCE_M + (LOOSE_TOLERANCE_M - SKIN_TOLERANCE_M) * (-(distance / FALLOFF_M).square()).exp()
    for name in ("mouth", "teeth", "tongue", "eyes", "lids", "lips", "sockets"):
        if name in head.regions:
            tolerance = torch.where(head.regions[name], SKIN_TOLERANCE_M, tolerance)
    return tolerance[head.faces].amin(-1)


def ssim(a: Float[Tensor, "3 height width"], b: Float[Tensor, "3 height width"]) -> Float[Tensor, ""]:
    """Mean structural similarity (Wang et al. 2004) over uniform 7×7 windows, differentiable in `a`.

    Ours / theirs: uniform instead of Gaussian windows and an analytic gradient, together a sixth of the time on a CPU,
    where the usual form costs more than the rasteriser.
    """
    return _Ssim.apply(a, b)


class _Ssim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        mu_a, mu_b, aa, bb, ab = _box(torch.stack([a, b, a * a, b * b, a * b])).unbind()
        light, light_norm = 2 * mu_a * mu_b + C1, mu_a.square() + mu_b.square() + C1
        shape = 2 * (ab - mu_a * mu_b) + C2
        shape_norm = aa + bb - mu_a.square() - mu_b.square() + C2
        score = light * shape / (light_norm * shape_norm)
        # Derivatives by the window's means of a·b, a² and a; the adjoint of a box is a box.
        by_ab, by_aa = 2 * score / shape, -score / shape_norm
        by_mu = 2 * mu_b * score / light - 2 * mu_a * score / light_norm - by_ab * mu_b - 2 * by_aa * mu_a
        spread = _box(pad(torch.stack([by_mu, by_aa, by_ab]), (WINDOW - 1,) * 4))
        ctx.save_for_backward((spread[0] + 2 * a * spread[1] + b * spread[2]) / score.numel())
        return score.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def _box(x: Tensor) -> Tensor:
    """Mean over every full 7×7 window, by shifted sums of 1, 2 and 4 (torch's pooling is five times slower here)."""
    for d in (-1, -2):
        n = x.shape[d]
        two = x.narrow(d, 0, n - 1) + x.narrow(d, 1, n - 1)
        four = two.narrow(d, 0, n - 3) + two.narrow(d, 2, n - 3)
        x = four.narrow(d, 0, n - 6) + two.narrow(d, 4, n - 6) + x.narrow(d, 6, n - 6)
    return x / WINDOW**2
