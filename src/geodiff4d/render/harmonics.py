"""View-dependent colours: real spherical harmonics up to degree 3, as in 3D Gaussian splatting.

With `render` these are one pass: colours, normals and depth are its seven channels.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.camera import Camera
from geodiff4d.render.gaussians import Gaussians

MAX_DEGREE = 3
SAMPLES = 20
"""Directions that determine 7 coefficients, with some to spare."""
ROTATED = 8192
"""Functions that are turned at once."""
_S0 = 0.28209479177387814
_S1 = 0.4886025119029199
_S2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
_S3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


@dataclass(frozen=True)
class TurnedHarmonics:
    """What colours add seen from each side: coefficients of degrees 1 to 3 in frames that turn, a frame each."""

    coefficients: Float[Tensor, "n rest 3"]
    """3, 8 or 15 of each channel, in 3DGS's order; none at all add nothing."""
    turn: Float[Tensor, "n 3 3"]
    """Frame to world, rotations."""

    def seen(self, colors: Float[Tensor, "n 3"], means: Float[Tensor, "n 3"], camera: Camera) -> Float[Tensor, "n 3"]:
        """Return colours as one camera sees them, at least 0; differentiable in everything but the camera."""
        away = normalize(means - camera.position.to(means), dim=-1)
        basis = sh_basis((away[:, None] @ self.turn)[:, 0], degree_of(self.coefficients))[:, 1:]
        return (colors + (basis[..., None] * self.coefficients).sum(1)).clamp(min=0)

    def in_world(self, turn: Float[Tensor, "3 3"] | None = None) -> Float[Tensor, "n rest 3"]:
        """Return the coefficients in the world's axes, or in those that a further `turn` leads to."""
        return rotate_harmonics(self.coefficients, self.turn if turn is None else turn.to(self.turn) @ self.turn)


def degree_of(rest: Float[Tensor, "n rest 3"]) -> int:
    """Return the degree that coefficients without the constant one belong to.

    Raises:
        ValueError: they are not 0, 3, 8 or 15 for each channel.
    """
    degrees = {(d + 1) ** 2 - 1: d for d in range(MAX_DEGREE + 1)}
    if rest.shape[1] not in degrees:
        raise ValueError(f"spherical harmonics of degrees 1 to 3 have 3, 8 or 15 coefficients, got {rest.shape[1]}")
    return degrees[rest.shape[1]]


def rotate_harmonics(
    rest: Float[Tensor, "n rest 3"], turn: Float[Tensor, "*n_or_none 3 3"]
) -> Float[Tensor, "n rest 3"]:
    """Return the coefficients of functions that were turned, f′(d) = f(turnᵀ d), one rotation each or one for all.

    A degree stays in itself, so what each becomes is read off at directions that determine it.
    """
    degree, out = degree_of(rest), []
    directions, inverses = _sampled_directions()
    for some, way in zip(rest.split(ROTATED), turn.expand(len(rest), 3, 3).split(ROTATED), strict=True):
        before = sh_basis(directions.to(rest) @ way.to(rest), degree)
        parts = []
        for d in range(1, degree + 1):
            own = slice(d * d, (d + 1) ** 2)
            values = before[..., own] @ some[:, d * d - 1 : (d + 1) ** 2 - 1]
            parts.append(inverses[d - 1].to(rest) @ values)
        out.append(torch.cat(parts, 1) if parts else some)
    return torch.cat(out) if out else rest


@cache
def _sampled_directions() -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return directions spread over the sphere, and for degrees 1 to 3 what turns values there into coefficients."""
    i = torch.arange(SAMPLES, dtype=torch.float64)
    z, around = 1 - (2 * i + 1) / SAMPLES, i * torch.pi * (3 - 5**0.5)
    flat = (1 - z * z).sqrt()
    directions = torch.stack([flat * around.cos(), flat * around.sin(), z], -1)
    basis = sh_basis(directions, MAX_DEGREE)
    return directions, tuple(torch.linalg.pinv(basis[:, d * d : (d + 1) ** 2]) for d in range(1, MAX_DEGREE + 1))


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
