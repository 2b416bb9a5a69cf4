"""The CUDA rasteriser: gsplat's, called with our conventions (OpenCV cameras and wxyz quaternions are gsplat's own)."""

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError


def rasterize_cuda(
    means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"], features: Float[Tensor, "n channels"],
    T_cam_world: Float[Tensor, "4 4"], K: Float[Tensor, "3 3"], width: int, height: int,
) -> Float[Tensor, "channels_and_alpha {height} {width}"]:  # fmt: skip
    """Render [channels + 1, height, width], the last channel being alpha.

    Raises:
        UserError: gsplat is not installed.
    """
    if len(means) == 0:
        return torch.zeros(features.shape[1] + 1, height, width, device=means.device)
    try:
        from gsplat import rasterization
    except ImportError as error:
        message = "rendering Gaussians on a GPU needs gsplat: run `pip install 'geodiff4d[gpu]'`, or use --device cpu"
        raise UserError(f"{message} ({error})") from None
    image, alpha, _ = rasterization(
        means, quats, scales, opacities, features, T_cam_world[None], K[None], width, height, packed=False
    )
    return torch.cat([image[0], alpha[0]], -1).permute(2, 0, 1)
