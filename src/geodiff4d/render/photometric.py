"""The photometric loss of 3D Gaussian splatting, L1 and SSIM, with a gradient as fast as the rasteriser's.

On a CPU, in float32, both and their gradient are one sweep of our kernel; elsewhere, and for float64, they are torch's
convolutions. SSIM has the usual 11×11 Gaussian window (σ = 1.5 px), a range of 1, and zeros around the image.
"""

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d

from geodiff4d.render.kernels.photometric import C1, C2, LANES, RADIUS, WINDOW, l1_ssim, work_size

ROWS_PER_BAND = 32
"""Smallest height of a thread's band: ten rows at each end of one are filtered twice."""


def photometric(
    image: Float[Tensor, "channels height width"], target: Float[Tensor, "channels height width"], weight: float = 0.2
) -> Float[Tensor, ""]:
    """Return (1-λ)·L1 + λ·(1-SSIM) with λ = `weight` (Kerbl et al. 2023, Eq. 7), of images in [0, 1]."""
    if _has_kernel(image, target):
        return _Photometric.apply(image, target, weight)[0]
    return (1 - weight) * (image - target).abs().mean() + weight * (1 - ssim_reference(image, target))


def ssim(
    image: Float[Tensor, "channels height width"], target: Float[Tensor, "channels height width"]
) -> Float[Tensor, ""]:
    """Return the mean structural similarity (Wang et al. 2004), -1 to 1."""
    return 1 - photometric(image, target, 1.0)


def ssim_reference(
    image: Float[Tensor, "channels height width"], target: Float[Tensor, "channels height width"]
) -> Float[Tensor, ""]:
    """Return the same as `ssim` by torch's convolutions, differentiable in both; any device and dtype."""
    return ssim_map(image, target).mean()


def ssim_map(
    image: Float[Tensor, "channels height width"], target: Float[Tensor, "channels height width"]
) -> Float[Tensor, "channels height width"]:
    """Return the structural similarity at every pixel and channel, -1 to 1; beyond the border, images are zero."""
    window = torch.from_numpy(WINDOW).to(image)

    def blur(x: Tensor) -> Tensor:
        across = conv2d(x[:, None], window.view(1, 1, 1, -1), padding=(0, RADIUS))
        return conv2d(across, window.view(1, 1, -1, 1), padding=(RADIUS, 0))[:, 0]

    mu_a, mu_b, product = blur(image), blur(target), blur(image * target)
    squares = blur(image.square() + target.square())
    light, shape = 2 * mu_a * mu_b + C1, 2 * (product - mu_a * mu_b) + C2
    own = mu_a.square() + mu_b.square()
    return light * shape / ((own + C1) * (squares - own + C2))


def _has_kernel(image: Tensor, target: Tensor) -> bool:
    return image.device.type == "cpu" and image.dtype == target.dtype == torch.float32 and not target.requires_grad


class _Photometric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, target: Tensor, weight: float) -> tuple[Tensor]:
        planes, height, real = image.shape
        width = -(-real // LANES) * LANES
        a, b = (_padded(x, width) for x in (image, target))
        grad = torch.empty(planes, height, width)
        sums, scores = (np.empty(planes * height, np.float32) for _ in range(2))
        count = planes * height * real
        bands = max(1, min(numba.get_num_threads(), height // ROWS_PER_BAND))
        work = np.empty(planes * bands * work_size(width), np.float32)
        l1_ssim(
            a, b, planes, height, width, real, np.float32((1 - weight) / count), np.float32(-weight / count),
            grad.view(-1).numpy(), sums, scores, work, bands,
        )  # fmt: skip
        ctx.save_for_backward(grad[:, :, :real])
        l1, similar = (float(x.sum(dtype=np.float64)) / count for x in (sums, scores))
        return (torch.tensor((1 - weight) * l1 + weight * (1 - similar)),)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def _padded(x: Tensor, width: int) -> np.ndarray:
    """Return an image as a flat array, its rows padded with zeros."""
    if x.shape[-1] == width:
        return x.detach().contiguous().numpy().reshape(-1)
    out = np.zeros((*x.shape[:-1], width), np.float32)
    out[..., : x.shape[-1]] = x.detach().numpy()
    return out.reshape(-1)
