"""The convolutional trunk that looks at a face crop: the expression encoder's, and the face reader's.

It lies below both, so that the reader can start from what the encoder learnt by denoising.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class SpatialAttention(nn.Module):
    """Self-attention over the feature grid with a zero-initialised output."""

    def __init__(self, channels: int, cells: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(sine_cosine(cells, channels).mul(0.1))
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = rearrange(x, "b c h w -> b (h w) c")
        q, k, v = rearrange(self.qkv(self.norm(y + self.position)), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        y = rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return x + rearrange(self.out(y), "b (h w) c -> b c h w", h=x.shape[-2])


def sine_cosine(
    positions: int, channels: int, device: torch.device | None = None
) -> Float[Tensor, "positions channels"]:
    """Fixed positions, sine on even and cosine on odd channels (Vaswani et al. 2017, Sec. 3.5)."""
    rate = torch.exp(torch.arange(0, channels, 2, device=device) * (-math.log(10000.0) / channels))
    angle = torch.arange(positions, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :channels]


def face_trunk(size: int, widths: tuple[int, ...], squeeze: int, attention: bool) -> nn.Sequential:
    """Return a trunk from crops in [-1, 1], `size` px a side, to `squeeze` channels on a grid of size / 2^stages.

    One stride-2 stage for each width, after an initial pixel-unshuffle by 2; self-attention over the grid at the end.
    """
    layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
    for a, b in zip(widths, (*widths[1:], None), strict=True):
        if b is not None:
            layers += [nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1)]
    side = size // 2 ** len(widths)
    if attention:
        layers.append(SpatialAttention(widths[-1], side * side))
    layers += [nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], squeeze, 1), nn.SiLU()]
    return nn.Sequential(*layers)
