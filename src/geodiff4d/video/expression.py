"""The pose-free expression encoder (Sec. 3.1): a face crop becomes a 1-D latent, and that becomes tokens.

Sizes follow X-NeMo's motion encoder: latent 512, 32 tokens of 16, fixed sine-cosine positions. Trained by the denoising
loss alone; pose-free because the pose map already tells the pose and because driving and target views differ.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class ExpressionConfig:
    """Widths of the encoder."""

    size: int = 224
    """Side of the square driving crop [px]."""
    widths: tuple[int, ...] = (64, 128, 256, 256, 256)
    """One stride-2 stage each, after an initial pixel-unshuffle by 2."""
    attention: bool = True
    """Spatial self-attention after the last stage."""
    squeeze: int = 32
    """Channels that reach the fully connected layer (X-NeMo squeezes to 1 on a 28² grid)."""
    latent: int = 512
    tokens: int = 32
    token_dim: int = 16
    motion: int = 0
    """Head coefficients (expressions, then 3 of the jaw) that a linear readout guesses from the latent, so that the
    warped portrait can move as the latent says (ours; 0: no readout, the warped portrait keeps still)."""


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


class ExpressionEncoder(nn.Module):
    """Encode driving face crops.

    Example:
        >>> encoder = ExpressionEncoder(ExpressionConfig(size=64, widths=(8, 16)))
        >>> encoder.tokens(encoder(torch.rand(2, 3, 64, 64))).shape
        torch.Size([2, 32, 16])
    """

    def __init__(self, config: ExpressionConfig):
        super().__init__()
        self.config = config
        w = config.widths
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, w[0], 3, padding=1)]
        for a, b in zip(w, (*w[1:], None), strict=True):
            if b is not None:
                layers += [nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1)]
                layers += [nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1)]
        side = config.size // 2 ** len(w)
        if config.attention:
            layers.append(SpatialAttention(w[-1], side * side))
        layers += [nn.GroupNorm(8, w[-1]), nn.SiLU(), nn.Conv2d(w[-1], config.squeeze, 1), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.to_latent = nn.Linear(config.squeeze * side * side, config.latent)
        self.norm = nn.LayerNorm(config.latent, elementwise_affine=False)
        self.to_tokens = nn.Linear(config.latent, config.tokens * config.token_dim)
        if config.motion:
            self.to_motion = nn.Linear(config.latent, config.motion).requires_grad_(False)
            nn.init.zeros_(self.to_motion.weight)
            nn.init.zeros_(self.to_motion.bias)
        self.register_buffer("position", sine_cosine(config.tokens, config.token_dim), persistent=False)

    def forward(self, crops: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b latent"]:
        """Encode crops in [0, 1] into the 1-D latent (unit variance)."""
        x = crops * 2 - 1
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.to_latent(self.features(x).flatten(1)))

    def tokens(self, latent: Float[Tensor, "*b latent"]) -> Float[Tensor, "*b tokens dim"]:
        """Turn latents into tokens with their positions; the zero latent is the null expression."""
        flat = self.to_tokens(latent)
        return flat.unflatten(-1, (self.config.tokens, self.config.token_dim)) + self.position

    def motion(self, latent: Float[Tensor, "*b latent"]) -> Float[Tensor, "*b coefficients"]:
        """Guess head coefficients: expression weights in [0, 1], then the jaw's rotation [rad].

        The null expression has none.
        """
        guess = self.to_motion(latent.to(self.to_motion.weight.dtype))
        guess = torch.cat([guess[..., :-3].clamp(0, 1), guess[..., -3:]], -1)
        return guess * (latent != 0).any(-1, keepdim=True)

    def drop(self, latent: Float[Tensor, "*b latent"], dropped: Bool[Tensor, "*b"]) -> Float[Tensor, "*b latent"]:
        """Replace the dropped rows by the null expression (S-A.1, p = 0.1 in training)."""
        return latent.masked_fill(dropped[..., None], 0.0)
