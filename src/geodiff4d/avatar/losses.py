"""The losses of a fit: images, normals and silhouettes against the clip's, and priors that bind splats to the head.

Eq. 2's normal term compares premultiplied normals with α(2I - 1). The binding terms are GaussianAvatars' with two
differences: distances are metres with a tolerance per region (skin 3 mm, hair and clothes 60 mm), since a triangle of
an eyelid and one of the scalp differ in size a hundredfold; and needles cost, since they stick out in unseen views.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from geodiff4d.avatar.binding import NORMAL_AXIS, LocalGaussians
from geodiff4d.avatar.model import AvatarFrame
from geodiff4d.heads.rig import Head
from geodiff4d.render.photometric import photometric

SKIN_TOLERANCE_M = 0.003
LOOSE_TOLERANCE_M = 0.060
LOOSE_REGIONS = ("scalp", "neck")
FALLOFF_M = 0.020
"""Distance over which the tolerance falls off around hair and clothes: fringes and beards hang over skin."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms."""

    ssim: float = 0.2
    """λ: (1-λ)·L1 + λ·(1-SSIM)."""
    normals: float = 0.1
    """λ_n of Eq. 2 (not stated in the paper); 0 switches the term off."""
    normal_alpha: Literal["rendered", "mask"] = "rendered"
    """α of Eq. 2: what is rendered, or the foreground mask, as the paper has it."""
    alpha: float = 0.2
    """L1 between alpha and the foreground mask."""
    position: float = 0.02
    """Weight of the distance beyond the region's tolerance [1/mm]."""
    size: float = 0.05
    """Weight of the standard deviation beyond `max_size_m` [1/mm]."""
    max_size_m: float = 0.006
    needle: float = 0.02
    """Weight of the log aspect ratio beyond that of `max_aspect`."""
    max_aspect: float = 3.0
    flat: float = 0.02
    """Weight of the log-scale by which the normal axis is less than e times thinner than the others."""


def image_loss(
    frame: AvatarFrame, image: Float[Tensor, "3 height width"], mask: Float[Tensor, "1 height width"],
    normal: Float[Tensor, "3 height width"] | None, box: tuple[slice, slice], config: LossConfig,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the image loss of a rendered frame against the clip's, both on the same background (Eq. 2).

    `box` bounds the foreground: colour and structure are compared there, alpha everywhere.
    """
    ours, theirs = frame.rgb[:, *box], image[:, *box]
    loss = photometric(ours, theirs, config.ssim)
    if normal is not None and config.normals:
        inside = mask[:, *box]
        alpha = frame.alpha[:, *box] if config.normal_alpha == "rendered" else inside
        difference = (frame.normal[:, *box] - alpha * normal[:, *box]).abs() * inside
        loss = loss + config.normals * difference.sum() / (3 * inside.sum()).clamp(min=1)
    return loss + config.alpha * (frame.alpha - mask).abs().mean()


def binding_loss(
    local: LocalGaussians, face_scale: Float[Tensor, " faces"], tolerance: Float[Tensor, " faces"], config: LossConfig
) -> Float[Tensor, ""]:
    """Return the penalty on splats that leave their faces, are large, or are needles instead of flat.

    `face_scale` is the size of each face and `tolerance` the distance that its splats may leave it [m].
    """
    k = face_scale[local.face_index]
    away = relu(local.means.norm(dim=-1) * k - tolerance[local.face_index] - 0.5 * k).mean() * 1000
    along = list(local.log_scales.unbind(-1))
    normal = along.pop(NORMAL_AXIS)
    large, small = torch.maximum(*along), torch.minimum(*along)
    oversize = relu(large.exp() * k - config.max_size_m).mean() * 1000
    needle = relu(large - small - math.log(config.max_aspect)).mean()
    thick = relu(normal - small + 1).mean()
    return config.position * away + config.size * oversize + config.needle * needle + config.flat * thick


def position_tolerance(head: Head) -> Float[Tensor, " faces"]:
    """Return how far [m] a splat may leave each face: 60 mm on hair and clothes, 3 mm on skin, blended between."""
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
