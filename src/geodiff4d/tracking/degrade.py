"""Degradations of training images, as of users' own: light, colour, blur, noise, compression, and occluders."""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate


def uniform(n: int, low: float, high: float, g: torch.Generator) -> Float[Tensor, "n 1 1 1"]:
    """Draw one number per image."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=g)


def chance(n: int, p: float, g: torch.Generator) -> Float[Tensor, "n 1 1 1"]:
    """Draw 1 with probability p, else 0, per image."""
    return (torch.rand(n, 1, 1, 1, generator=g) < p).float()


def backgrounds(n: int, size: int, g: torch.Generator) -> Float[Tensor, "n 3 size size"]:
    """Draw backgrounds without people: plain, graded, cloudy and cluttered images."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    a, b = torch.rand(2, n, 3, 1, 1, generator=g)
    angle = uniform(n, 0, 2 * math.pi, g)
    ramp = 0.5 + 0.5 * (x * angle.cos() + y * angle.sin())
    image = a + (b - a) * ramp * chance(n, 0.6, g)
    for cells in (3, 6, 12, 24, 48):
        grid = torch.randn(n, 1, cells, cells, generator=g) + 0.4 * torch.randn(n, 3, cells, cells, generator=g)
        amount = uniform(n, 0, 0.22, g) * chance(n, 0.5, g)
        image = image + amount * interpolate(grid, (size, size), mode="bilinear")
    for _ in range(9):
        shape, colour = shapes(n, size, g)
        image = torch.where(shape & (torch.rand(n, 1, 1, 1, generator=g) < 0.55), colour, image)
    stripes = torch.sin((x * angle.sin() - y * angle.cos()) * uniform(n, 4, 60, g)) * uniform(n, 0, 0.12, g)
    image = image + stripes * chance(n, 0.25, g)
    return (image + 0.03 * torch.randn(n, 3, size, size, generator=g) * chance(n, 0.5, g)).clamp(0, 1)


def shapes(n: int, size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one ellipse, box or bar per image; returns (mask [n, 1, size, size], graded colour [n, 3, size, size])."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    cx, cy, angle = (uniform(n, -1, 1, g) for _ in range(3))
    angle = angle * math.pi
    long, thin = torch.exp(uniform(n, -3.0, 0.0, g)), torch.exp(uniform(n, -1.6, 0.2, g))
    u = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) / long
    v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / (long * thin)
    box = chance(n, 0.5, g) > 0
    inside = torch.where(box, torch.maximum(u.abs(), v.abs()), (u * u + v * v).sqrt()) < 1
    colour = torch.rand(n, 3, 1, 1, generator=g) + 0.25 * u.clamp(-1, 1) * torch.randn(n, 1, 1, 1, generator=g)
    return inside, colour.clamp(0, 1)


def hands(n: int, size: int, g: torch.Generator) -> Float[Tensor, "n 1 size size"]:
    """Draw the mask of a hand per image, a blob with a few fingers, to occlude faces with."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    cx, cy, turn, scale = (
        uniform(n, -0.9, 0.9, g),
        uniform(n, -0.8, 1.2, g),
        uniform(n, -3, 3, g),
        uniform(n, 0.15, 0.35, g),
    )
    u = ((x - cx) * turn.cos() + (y - cy) * turn.sin()) / scale
    v = ((y - cy) * turn.cos() - (x - cx) * turn.sin()) / scale
    inside = u * u + v * v < 0.6
    for k in range(4):
        fan = (k - 1.5) * uniform(n, 0.05, 0.35, g)
        along, across = u * fan.cos() + v * fan.sin(), v * fan.cos() - u * fan.sin() - (k - 1.5) * 0.38
        inside = inside | ((along > 0) & (along < uniform(n, 1.0, 2.2, g)) & (across.abs() < 0.17))
    return inside.float()


def relight(
    rgb: Float[Tensor, "n 3 h w"], normal: Float[Tensor, "n 3 h w"], g: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """Return people in another light and palette: a coloured lamp shaded by the normals, exposure, mixed channels."""
    n = len(rgb)
    direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=g) + torch.tensor([0.0, 0.2, 0.6]), dim=1)
    lamp = (normal * direction[:, :, None, None]).sum(1, keepdim=True).clamp(min=0)
    strength = uniform(n, 0, 1.2, g) * chance(n, 0.5, g)
    tint = 1 + 0.2 * torch.randn(n, 3, 1, 1, generator=g) * chance(n, 0.5, g)
    lit = rgb * (1 - 0.45 * strength + strength * lamp * tint)
    mix = torch.eye(3) + 0.25 * torch.randn(n, 3, 3, generator=g) * chance(n, 0.15, g)[:, :, :, 0]
    mixed = torch.einsum("nij,njhw->nihw", mix / mix.sum(2, keepdim=True).clamp(min=0.4), lit)
    return (mixed * torch.exp(uniform(n, -0.6, 0.35, g))).clamp(0, 1)


def photographed(images: Float[Tensor, "n 3 h w"], g: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Return images as cameras of varied quality take them: colour, contrast, blur, noise, JPEG blocks."""
    n = len(images)
    x = images.clamp(1e-4, 1) ** torch.exp(uniform(n, -0.4, 0.4, g))
    grey = (x * torch.tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)
    saturation = uniform(n, 0.4, 1.4, g) * (1 - chance(n, 0.15, g))
    x = grey + (x - grey) * saturation
    x = x * (1 + 0.1 * torch.randn(n, 3, 1, 1, generator=g) * chance(n, 0.5, g))
    x = 0.5 + (x - 0.5) * uniform(n, 0.6, 1.25, g) + uniform(n, -0.12, 0.12, g)
    x = x + torch.randn(x.shape, generator=g) * uniform(n, 0, 0.06, g) * chance(n, 0.5, g)
    # Each defect is computed for its own images only: training waits for this.
    for p, defect in ((0.25, _soft), (0.12, _softer), (0.06, _shaken), (0.12, _shrunk)):
        rows = (torch.rand(n, generator=g) < p).nonzero()[:, 0]
        if len(rows):
            x[rows] = defect(x[rows])
    rows = (torch.rand(n, generator=g) < 0.35).nonzero()[:, 0]
    if len(rows):
        x[rows] = compressed(x[rows], torch.exp(uniform(len(rows), -4.0, -1.9, g)))
    return x.clamp(0, 1)


def _soft(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _softer(x: Tensor) -> Tensor:
    return avg_pool2d(_soft(x), 5, 1, 2, count_include_pad=False)


def _shaken(x: Tensor) -> Tensor:
    return avg_pool2d(x, (1, 7), 1, (0, 3), count_include_pad=False)


def _shrunk(x: Tensor) -> Tensor:
    return interpolate(interpolate(x, scale_factor=0.5, mode="area"), x.shape[-2:], mode="bilinear")


@cache
def _dct() -> Float[Tensor, "8 8"]:
    k, i = torch.arange(8.0)[:, None], torch.arange(8.0)
    rows = torch.cos(math.pi / 8 * (i + 0.5) * k) * 0.5
    rows[0] /= math.sqrt(2)
    return rows


def compressed(images: Float[Tensor, "n 3 h w"], step: Float[Tensor, "n 1 1 1"]) -> Float[Tensor, "n 3 h w"]:
    """Return images quantised in 8 × 8 blocks of the cosine basis, as JPEG does; sides are multiples of 8."""
    n, c, h, w = images.shape
    blocks = images.view(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    D = _dct()
    frequency = torch.arange(8.0)
    q = (step * (1 + frequency[:, None] + frequency)).view(n, 1, 1, 1, 8, 8)
    z = D @ blocks @ D.T
    return (D.T @ ((z / q).round() * q) @ D).transpose(3, 4).reshape(n, c, h, w)
