"""What surrounds a subject: its light and its background."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.world.shading import Light, to_linear


def draw_light(rng: np.random.Generator, melanin: float) -> Light:
    """Draw a key light from the front half, and ambient light with a direction; darker skin gets a longer exposure."""
    azimuth, elevation = rng.uniform(-1.1, 1.1), rng.uniform(0.1, 0.95)
    direction = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    warmth = rng.normal(0, 0.06)
    tint = np.array([1 + warmth, 1, 1 - warmth])
    share = rng.uniform(0.35, 0.7)
    gradient = np.outer(
        np.array([1 - warmth, 1, 1 + warmth]),
        np.r_[rng.normal(0, 0.12), rng.uniform(0.08, 0.25), rng.uniform(0.0, 0.15)],
    )
    vector = lambda x: torch.from_numpy(np.asarray(x, dtype=np.float32))  # noqa: E731
    return Light(
        direction=vector(direction),
        key=vector(1.15 * share * tint),
        ambient=vector((1.02 - share) * (2 - tint)),
        gradient=vector(gradient * (1.1 - share)),
        exposure=float(rng.uniform(0.92, 1.12) * (1 + 0.55 * melanin)),
    )


def vivid(rng: np.random.Generator, saturation: float = 0.9) -> Tensor:
    """A random sRGB colour, from grey to `saturation`."""
    hue, s, v = rng.uniform(0, 1), rng.uniform(0, saturation), rng.uniform(0.12, 0.9)
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return torch.tensor(v * (1 - s * (1 - ramp)), dtype=torch.float32)


def background(size: int, rng: np.random.Generator) -> Float[Tensor, "3 size size"]:
    """Draw a background: plain, a gradient, or blurred noise; linear RGB."""
    kind = int(rng.integers(3))
    base, other = (0.18 + 0.8 * vivid(rng, 0.35) for _ in range(2))
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    if kind == 0:
        image = base[:, None, None].expand(3, size, size) * (1 - 0.06 * (x * x + y * y))
    elif kind == 1:
        turn = rng.uniform(0, 2 * np.pi)
        t = 0.5 + 0.35 * (x * np.cos(turn) + y * np.sin(turn))
        image = base[:, None, None] * (1 - t) + other[:, None, None] * t
    else:
        grid = torch.from_numpy(rng.normal(0, 0.03, (1, 3, 7, 7)) + rng.normal(0, 0.28, (1, 1, 7, 7))).float()
        cloud = torch.nn.functional.interpolate(grid, (size, size), mode="bicubic", align_corners=True)[0]
        image = (
            base[:, None, None]
            + cloud * (other - base)[:, None, None].abs().clamp(min=0.12)
            + 0.15 * (cloud - cloud.mean(0))
        )
    return to_linear(image.clamp(0.02, 0.95)).contiguous()
