"""Gaussian splatting (Kerbl et al. 2023): one function, any number of feature channels, CPU or CUDA.

Semantics are gsplat's in all backends: covariances are blurred by 0.3 px², a splat counts where its alpha is at least
1/255, alpha is at most 0.999, and a pixel is full before the splat that would leave less than 1e-4 of it uncovered.

float32 runs on our kernels (CPU) or gsplat (CUDA); float64 on the oracle, which is exact, slow, and for small scenes.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import transform

ORACLE_LIMIT = 200_000_000
"""Largest product of Gaussians and pixels that the oracle takes: a few gigabytes."""


@dataclass(frozen=True)
class Gaussians:
    """Gaussians in the world, unsorted."""

    means: Float[Tensor, "n 3"]
    """Positions [m]."""
    quats: Float[Tensor, "n 4"]
    """Rotation wxyz of the splat's axes to the world; need not be unit."""
    scales: Float[Tensor, "n 3"]
    """Standard deviations along the splat's axes [m]."""
    opacities: Float[Tensor, " n"]
    """Opacities, 0 to 1."""

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, index: Tensor | slice) -> "Gaussians":
        return replace(self, **{name: value[index] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Rendering:
    """Result of `render`; with a batch of cameras all but `broken` have its axes."""

    image: Float[Tensor, "*batch channels height width"]
    """Premultiplied, Σ wᵢ fᵢ, unless a background was given."""
    alpha: Float[Tensor, "*batch 1 height width"]
    """Σ wᵢ, 0 to 1."""
    depth: Float[Tensor, "*batch 1 height width"] | None
    """Σ wᵢ zᵢ [m], zᵢ along the camera's axis: divide by alpha for the mean depth."""
    broken: Bool[Tensor, " n"]
    """Gaussians that were left out in at least one view and got no gradient: a number is infinite or NaN, the
    quaternion is zero, or the splat is vast (over 1e9 m)."""

    @property
    def dropped(self) -> int:
        """Return the number of broken Gaussians."""
        return int(self.broken.sum())


def render(
    gaussians: Gaussians,
    camera: Camera,
    features: Float[Tensor, "*batch_or_none n channels"],
    background: Float[Tensor, " channels"] | float | None = None,
    depth: bool = False,
) -> Rendering:
    """Render features, blended front to back, for one camera or a batch.

    Differentiable in all tensors of `gaussians`, in `features` and in `background`, not in the camera. On a CPU up to
    seven channels, depth included, are one pass.

    Args:
        features: one row per Gaussian, shared by all cameras or with their batch axes in front.
        background: per channel, put behind the image.
        depth: also return depth.

    Raises:
        ValueError: features that are not one row per Gaussian, or float64 on a scene too large for the oracle.

    Example:
        >>> out = render(splats, camera, colors, background=torch.ones(3), depth=True)  # doctest: +SKIP
        >>> out.image, out.alpha, out.depth / out.alpha, out.dropped  # doctest: +SKIP
    """
    batch = camera.batch
    if features.shape[-2] != len(gaussians) or features.shape[:-2] not in ((), batch):
        raise ValueError(f"features must be [{len(gaussians)}, channels] per camera, got {list(features.shape)}")
    backend = _backend(gaussians.means, camera)
    flat = camera.to(gaussians.means.device)
    flat = Camera(flat.T_cam_world.reshape(-1, 4, 4), flat.K.reshape(-1, 3, 3), camera.width, camera.height)
    rows = features.expand(*batch, *features.shape[-2:]).reshape(math.prod(batch), *features.shape[-2:])
    views = [_view(backend, gaussians, flat[k], rows[k], depth) for k in range(len(rows))]
    images, alphas, depths, broken = zip(*views, strict=True)
    image, alpha = (torch.stack(x).reshape(*batch, *x[0].shape) if batch else x[0] for x in (images, alphas))
    if background is not None:
        behind = background[:, None, None] if isinstance(background, Tensor) else background
        image = image + (1 - alpha) * behind
    far = (torch.stack(depths).reshape(*batch, *depths[0].shape) if batch else depths[0]) if depth else None
    return Rendering(image, alpha, far, torch.stack(broken).any(0))


def rasterize(
    gaussians: Gaussians, camera: Camera, features: Float[Tensor, "*batch_or_none n channels"]
) -> tuple[Float[Tensor, "*batch channels height width"], Float[Tensor, "*batch 1 height width"]]:
    """Return the image, premultiplied, and the alpha of features blended front to back: `render` in short.

    Example:
        >>> image, alpha = rasterize(splats, camera, colors)  # doctest: +SKIP
        >>> rgb = image + (1 - alpha) * background  # doctest: +SKIP
    """
    out = render(gaussians, camera, features)
    return out.image, out.alpha


def _view(backend, gaussians: Gaussians, camera: Camera, features: Tensor, depth: bool):
    """Render one camera; returns (image, alpha, depth, broken)."""
    if depth:
        z = transform(camera.T_cam_world.to(gaussians.means), gaussians.means)[:, 2:]
        features = torch.cat([features, z], -1)
    image, alpha, broken = backend(
        gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, features,
        camera.T_cam_world.to(gaussians.means), camera.K.to(gaussians.means), camera.width, camera.height,
    )  # fmt: skip
    return (image[:-1], alpha, image[-1:], broken) if depth else (image, alpha, None, broken)


# Imported where used: Numba takes half a second to load, gsplat is optional.
def _backend(means: Tensor, camera: Camera):
    if means.dtype == torch.float64:
        if len(means) * camera.width * camera.height > ORACLE_LIMIT:
            raise ValueError(f"{len(means)} Gaussians in float64 at {camera.width}×{camera.height}: use float32")
        from geodiff4d.render.rasterizer_oracle import rasterize_oracle

        return rasterize_oracle
    if means.is_cuda:
        from geodiff4d.render.rasterizer_cuda import rasterize_cuda

        return rasterize_cuda
    from geodiff4d.render.rasterizer_cpu import rasterize_cpu

    return rasterize_cpu
