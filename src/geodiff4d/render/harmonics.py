"""View-dependent colours: real spherical harmonics up to degree 3, as in 3D Gaussian splatting.

With `render` these are one pass: colours, normals and depth are its seven channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.camera import Camera
from geodiff4d.render.gaussians import Gaussians

MAX_DEGREE = 3
_S0 = 0.28209479177387814
_S1 = 0.4886025119029199
_S2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
_S3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


def sh_basis(directions: Float[Tensor, "*batch 3"], degree: int) -> Float[Tensor, "*batch bases"]:
    """Return the (degree + 1)² real harmonics of unit directions, orthonormal, in 3DGS's order and signs.

    Raises:
        ValueError: a degree other than 0 to 3.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"spherical harmonics of degree {degree}: expected 0 to {MAX_DEGREE}")
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    bases = [torch.full_like(x, _S0)]
    if degree >= 1:
        bases += [-_S1 * y, _S1 * z, -_S1 * x]
    if degree >= 2:
        a, b, c = _S2
        bases += [a * x * y, -a * y * z, b * (2 * zz - xx - yy), -a * x * z, c * (xx - yy)]
    if degree >= 3:
        a, b, c, d, e = _S3
        bases += [
            -a * y * (3 * xx - yy), b * x * y * z, -c * y * (4 * zz - xx - yy), d * z * (2 * zz - 3 * xx - 3 * yy),
            -c * x * (4 * zz - xx - yy), e * z * (xx - yy), -a * x * (xx - 3 * yy),
        ]  # fmt: skip
    return torch.stack(bases, -1)


def sh_colors(
    gaussians: Gaussians, camera: Camera, coefficients: Float[Tensor, "n bases 3"]
) -> Float[Tensor, "*cameras n 3"]:
    """Return the colours seen from a camera or a batch, ½ + Σ Yₖ cₖ, at least 0, as features for `render`.

    Differentiable in the coefficients and the means. `bases` is 1, 4, 9 or 16.

    Raises:
        ValueError: another number of bases.

    Example:
        >>> colors = sh_colors(splats, camera, coefficients)  # doctest: +SKIP
        >>> out = render(splats, camera, torch.cat([colors, normals], -1), depth=True)  # doctest: +SKIP
    """
    degrees = {(d + 1) ** 2: d for d in range(MAX_DEGREE + 1)}
    bases = coefficients.shape[1]
    if bases not in degrees:
        raise ValueError(f"spherical harmonics have 1, 4, 9 or 16 coefficients per colour, got {bases}")
    away = gaussians.means - camera.position.to(gaussians.means)[..., None, :]
    basis = sh_basis(normalize(away, dim=-1), degrees[bases])
    return (torch.einsum("...nb,nbc->...nc", basis, coefficients) + 0.5).clamp(min=0)
