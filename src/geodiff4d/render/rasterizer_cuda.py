"""The CUDA rasteriser: gsplat's, called with our conventions (OpenCV cameras and wxyz quaternions are gsplat's own)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.errors import UserError, install_extra
from geodiff4d.render.rasterizer_oracle import find_broken, without


def rasterize_cuda(
    means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"], features: Float[Tensor, "n channels"],
    T_cam_world: Float[Tensor, "4 4"], K: Float[Tensor, "3 3"], width: int, height: int,
) -> tuple[
    Float[Tensor, "channels {height} {width}"], Float[Tensor, "1 {height} {width}"], Bool[Tensor, " n"]
]:  # fmt: skip
    """Render one camera; returns (image, alpha, the broken Gaussians).

    Raises:
        UserError: gsplat is not installed.
    """
    splats = (means, quats, scales, opacities, features)
    broken = find_broken(*splats)
    if len(means) == 0:
        empty = torch.zeros(features.shape[1] + 1, height, width, device=means.device)
        return empty[:-1], empty[-1:], broken
    try:
        from gsplat import rasterization
    except ImportError as error:
        message = f"rendering Gaussians on a GPU needs gsplat: run `{install_extra('gpu')}`, or use --device cpu"
        raise UserError(f"{message} ({error})") from None
    image, alpha, _ = rasterization(*without(broken, *splats), T_cam_world[None], K[None], width, height, packed=False)
    return image[0].permute(2, 0, 1), alpha[0].permute(2, 0, 1), broken
