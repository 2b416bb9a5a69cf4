"""Gaussian splatting (Kerbl et al. 2023): one function, any number of feature channels, CPU or CUDA.

Semantics are gsplat's in all backends: covariances are blurred by 0.3 px², a splat counts where its alpha is at least
1/255, alpha is at most 0.999, and a pixel is full before the splat that would leave less than 1e-4 of it uncovered.
"""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera

MAX_CHANNELS = 32


@dataclass(frozen=True)
class Gaussians:
    """Splats in the world."""

    means: Float[Tensor, "n 3"]
    """Metres."""
    quats: Float[Tensor, "n 4"]
    """Rotation wxyz of the splat's axes to the world; need not be unit."""
    scales: Float[Tensor, "n 3"]
    """Standard deviations along the splat's axes, metres."""
    opacities: Float[Tensor, " n"]
    """0 to 1."""

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, index: Tensor | slice) -> "Gaussians":
        return replace(self, **{name: value[index] for name, value in vars(self).items()})


def rasterize(
    gaussians: Gaussians, camera: Camera, features: Float[Tensor, "n channels"]
) -> tuple[Float[Tensor, "channels height width"], Float[Tensor, "1 height width"]]:
    """Blend features front to back; returns (image, alpha).

    The image is premultiplied: Σ wᵢ fᵢ with Σ wᵢ = alpha, neither renormalised nor put on a background. Differentiable
    in all tensors of `gaussians` and in `features`, not in the camera.

    Raises:
        ValueError: a camera batch, features that are not one row per Gaussian, or more than 32 channels.

    Example:
        >>> image, alpha = rasterize(splats, camera, colors)  # doctest: +SKIP
        >>> rgb = image + (1 - alpha) * background  # doctest: +SKIP
    """
    if camera.batch:
        raise ValueError(f"rasterize takes one camera, got a batch of {camera.batch}: index it first")
    if len(features) != len(gaussians) or features.shape[1] > MAX_CHANNELS:
        raise ValueError(f"features must be [{len(gaussians)}, ≤ {MAX_CHANNELS}], got {list(features.shape)}")
    backend = _cuda if gaussians.means.is_cuda else _cpu
    image = backend()(
        gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, features,
        camera.T_cam_world.to(gaussians.means), camera.K.to(gaussians.means), camera.width, camera.height,
    )  # fmt: skip
    return image[:-1], image[-1:]


# Imported where used: Numba takes half a second to load, gsplat is optional.
def _cpu():
    from geodiff4d.render._numba import rasterize_cpu

    return rasterize_cpu


def _cuda():
    from geodiff4d.render._gsplat import rasterize_cuda

    return rasterize_cuda
