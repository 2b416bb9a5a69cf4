"""Temporal modules: every pixel attends along the frames of its own clip (Sec. 3.2, stage 2).

Sizes and order are X-NeMo's, the design AnimateDiff's: group norm → linear → blocks of self-attention over time,
each behind sinusoidal positions, and a feed-forward → a linear that starts at zero. A model with fresh modules
therefore equals the image model it grew from.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention

from geodiff4d.core.errors import UserError
from geodiff4d.video.attention import FeedForward, GroupNorm, Layout, MultiHead
from geodiff4d.video.expression import sine_cosine

MAX_FRAMES = 32
"""Positions that exist in X-NeMo and AnimateDiff: the longest window."""

FILTER_GAIN = 25.0
"""The filter's few numbers have further to go than a network's weights: with this, one learning rate serves both."""


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
        place = sine_cosine(layout.frames, y.shape[-1], y.device).to(y.dtype)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y = y + attention(norm(y) + place, valid)
        y = self.proj_out(y + self.ff(self.ff_norm(y)))
        return x + rearrange(y, "(b h w) t c -> (b t) c h w", h=h, w=w)


class ClipFilter(nn.Module):
    """A bilateral filter over a clip's clean latents (ours): it suppresses what a tracker's jitter adds.

    Where the conditions are the base that a small network only adds to, their jitter passes through whatever its
    modules inside know. Every cell becomes a mean of itself at the frames within reach, weighted by learnt distances in
    time, per channel, and by how alike the cell and its neighbours are at both frames: what moves stays sharp. The gate
    starts at zero, so a fresh filter changes nothing.
    """

    def __init__(self, domains: int, channels: int, reach: int, sigma: float = 1.2):
        super().__init__()
        self.reach, self.sigma = reach, sigma
        self.nearness = nn.Parameter(torch.zeros(domains, channels, 2 * reach + 1))
        """Beside a Gaussian's: logarithms, by domain, channel and distance in time."""
        self.likeness = nn.Parameter(torch.zeros(domains))
        """Log of how fast a weight falls with the mean square difference of the cells."""
        self.gate = nn.Parameter(torch.zeros(domains, channels))

    def forward(
        self, z: Float[Tensor, "b d c t h w"], visibility: Float[Tensor, " c"], valid: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b d c t h w"]:
        """Filter along the frames; padded frames count in no mean.

        Args:
            visibility: what a latent channel's square shows in pixels, for likeness.
        """
        frames, d = z.shape[3], z.shape[1]
        known = z.new_ones(z.shape[0], frames) if valid is None else valid.to(z.dtype)
        share = (visibility / visibility.sum()).to(z)[None, None, :, None, None, None]
        nearness, likeness, gate = (FILTER_GAIN * p[:d].float() for p in (self.nearness, self.likeness, self.gate))
        rate = likeness.exp()
        total, mean = torch.zeros_like(z), torch.zeros_like(z)
        for k, offset in enumerate(range(-self.reach, self.reach + 1)):
            if abs(offset) >= frames:
                continue
            other, there = _shifted(z, offset, 3), _shifted(known, offset, 1)
            apart = ((other - z).square() * share).sum(2)
            apart = avg_pool2d(apart.flatten(0, 2), 3, 1, 1, count_include_pad=False).view_as(apart)
            near = nearness[None, :, :, k, None, None, None] - (offset / self.sigma) ** 2 / 2
            logit = near - (rate[None, :, None, None, None] * apart)[:, :, None]
            weight = logit.exp() * there[:, None, None, :, None, None]
            total, mean = total + weight, mean + weight * other
        return z + gate[None, :, :, None, None, None] * (mean / total.clamp(min=1e-6) - z)


def _shifted(x: Tensor, offset: int, dim: int) -> Tensor:
    """Frame t becomes frame t + offset; zeros where there is none."""
    n = x.shape[dim]
    kept = x.narrow(dim, max(offset, 0), n - abs(offset))
    empty = torch.zeros_like(x.narrow(dim, 0, abs(offset)))
    return torch.cat([kept, empty] if offset >= 0 else [empty, kept], dim)
