"""Temporal modules: every pixel attends along the frames of its own clip (Sec. 3.2, stage 2).

Sizes and order are X-NeMo's (facts A; AnimateDiff's design): group norm → linear → blocks of self-attention over time,
each behind sinusoidal positions, and a feed-forward → a linear that starts at zero. A model with fresh modules
therefore equals the image model it grew from.
"""

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from geodiff4d.core.errors import UserError
from geodiff4d.video.attention import FeedForward, GroupNorm, Layout, MultiHead

MAX_FRAMES = 32
"""Positions that exist (facts A): the longest window."""


def positions(frames: int, channels: int, device: torch.device | None = None) -> Float[Tensor, "frames channels"]:
    """Sinusoidal positions, sine on even and cosine on odd channels (Vaswani et al. 2017, Sec. 3.5)."""
    rate = torch.exp(torch.arange(0, channels, 2, device=device) * (-math.log(10000.0) / channels))
    angle = torch.arange(frames, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :channels]


class SelfAttentionOverTime(MultiHead):
    """Self-attention along frames; frames that only pad a short clip are never attended to."""

    def __init__(self, channels: int, heads: int):
        super().__init__(channels, None, heads)

    def forward(
        self, x: Float[Tensor, "n frames c"], valid: Bool[Tensor, "n frames"] | None = None
    ) -> Float[Tensor, "n frames c"]:
        q, k, v = (rearrange(f(x), "n t (h d) -> n h t d", h=self.heads) for f in (self.to_q, self.to_k, self.to_v))
        mask = None if valid is None else valid[:, None, None, :]
        return self.out(rearrange(scaled_dot_product_attention(q, k, v, mask), "n h t d -> n t (h d)"))


class TemporalModule(nn.Module):
    """Let every position of the latent grid read its own past and future."""

    def __init__(self, channels: int, heads: int, groups: int, layers: int, ff_factor: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
        self.attentions = nn.ModuleList(SelfAttentionOverTime(channels, heads) for _ in range(layers))
        self.ff_norm = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, ff_factor)
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Float[Tensor, "n c h w"], layout: Layout) -> Float[Tensor, "n c h w"]:
        """Attend along the frames of `(batch domains frames)` rows; a padded frame changes no other.

        Raises:
            UserError: the window is longer than there are positions for.
        """
        if layout.frames > MAX_FRAMES:
            raise UserError(f"a window has {layout.frames} frames: expected at most {MAX_FRAMES}; use shorter windows")
        h, w = x.shape[-2:]
        if torch.is_grad_enabled() and not x.requires_grad:
            # torch's channels-last group norm crashes in backward if its input needs no gradient (2.13, CPU).
            x = x.contiguous()
        y = rearrange(self.norm(x), "(b t) c h w -> (b h w) t c", t=layout.frames)
        valid = None
        if layout.valid is not None:
            valid = repeat(layout.valid, "b t -> (b d h w) t", d=layout.domains, h=h, w=w)
        y = self.proj_in(y)
        # Made where it is used: a copy from the host would make every step wait.
        place = positions(layout.frames, y.shape[-1], y.device).to(y.dtype)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y = y + attention(norm(y) + place, valid)
        y = self.proj_out(y + self.ff(self.ff_norm(y)))
        return x + rearrange(y, "(b h w) t c -> (b t) c h w", h=h, w=w)
