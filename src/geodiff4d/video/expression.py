"""The pose-free expression encoder (Sec. 3.1): a face crop becomes a 1-D latent, and that becomes tokens.

Sizes follow X-NeMo's motion encoder: latent 512, 32 tokens of 16, fixed sine-cosine positions. Trained by the denoising
loss alone; pose-free because the pose map already tells the pose and because driving and target views differ.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from geodiff4d.core.face_trunk import face_trunk, sine_cosine


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
        side = config.size // 2 ** len(config.widths)
        self.features = face_trunk(config.size, config.widths, config.squeeze, config.attention)
        self.to_latent = nn.Linear(config.squeeze * side * side, config.latent)
        self.norm = nn.LayerNorm(config.latent, elementwise_affine=False)
        self.to_tokens = nn.Linear(config.latent, config.tokens * config.token_dim)
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

    def drop(self, latent: Float[Tensor, "*b latent"], dropped: Bool[Tensor, "*b"]) -> Float[Tensor, "*b latent"]:
        """Replace the dropped rows by the null expression (S-A.1, p = 0.1 in training)."""
        return latent.masked_fill(dropped[..., None], 0.0)
