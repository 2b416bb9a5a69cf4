"""Attention of the video model: across both domains and the reference, and to the expression.

Parameter names are those of diffusers' `BasicTransformerBlock`, so Stable Diffusion 1.5 weights fit. Ours / theirs:
self-attention sees the tokens of *both* domains side by side (`H × 2W`, Sec. 3.2) and, behind its own keys and values,
those of the reference network (X-NeMo's `mutual_self_attention.py`).
"""

from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

ReferenceKV = tuple[Tensor, Tensor]
"""Keys and values of the reference at one attention site, each `[batch, tokens, channels]`."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a folded batch `(batch domains frames)` belong together."""

    batch: int
    domains: int
    frames: int
    joint: bool = True
    """Whether the domains attend to each other (`--ablate domain-attention` turns this off)."""
    valid: Bool[Tensor, "b t"] | None = None
    """Frames that are not mere padding; None means all. Read by temporal modules alone: nothing else mixes frames."""


class GroupNorm(nn.GroupNorm):
    """Group norm that hands back the memory format it was given.

    In bf16 torch's own is slow on channels-last images (CPU: 4.9 ms against 0.35 ms for a 3×3 convolution's 1.7 ms,
    at 32 × 96 × 16²) or answers in the other format (CUDA): two copies around it cost less.
    """

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:  # noqa: A002 (torch's name)
        if input.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(input)
        return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)


class MultiHead(nn.Module):
    """Multi-head attention under diffusers' parameter names; who attends to what is its subclasses' matter."""

    def __init__(self, channels: int, context: int | None, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context or channels, channels, bias=False)
        self.to_v = nn.Linear(context or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def attend(
        self, q: Float[Tensor, "b n c"], k: Float[Tensor, "b m c"], v: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n c"]:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in (q, k, v))
        return self.out(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))

    @property
    def out(self) -> nn.Linear:
        return cast(nn.Linear, self.to_out[0])


class Attention(MultiHead):
    """Cross-attention."""

    def forward(self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m d"]) -> Float[Tensor, "b n c"]:
        """Attend from x to a context (Eq. of Vaswani et al.; no positional terms)."""
        return self.attend(self.to_q(x), self.to_k(context), self.to_v(context))


class DomainSpatialAttention(MultiHead):
    """Self-attention over both domains of a frame, extended by the reference's keys and values (Sec. 3.2)."""

    def __init__(self, channels: int, heads: int):
        super().__init__(channels, None, heads)

    def forward(
        self, x: Float[Tensor, "n tokens c"], layout: Layout, reference: ReferenceKV | None = None
    ) -> Float[Tensor, "n tokens c"]:
        """Attend within each frame; `x` is `(batch domains frames) tokens channels`."""
        size = dict(b=layout.batch, d=layout.domains, t=layout.frames)
        joined, split = (
            ("(b d t) n c -> (b t) (d n) c", "(b t) (d n) c -> (b d t) n c")
            if layout.joint
            else ("(b d t) n c -> (b d t) n c", "(b d t) n c -> (b d t) n c")
        )
        x = rearrange(x, joined, **size)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if reference is not None:
            repeat = len(k) // layout.batch
            k, v = (
                torch.cat([own, ref.repeat_interleave(repeat, 0)], 1)
                for own, ref in zip((k, v), reference, strict=True)
            )
        return rearrange(self.attend(q, k, v), split, **size)

    def reference_kv(self, hidden: Float[Tensor, "b tokens c"]) -> ReferenceKV:
        """Turn the reference network's hidden states at this site into keys and values, once per clip."""
        return self.to_k(hidden), self.to_v(hidden)


class Gate(nn.Module):
    """GEGLU: one half of a projection, gated by the other."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Float[Tensor, "*n c_in"]) -> Float[Tensor, "*n c_out"]:
        # As two products: halves of one are strided, and torch's gelu is slow on those (CPU, bf16: 22.7 ms in all
        # against 8.4 at 16384 × 96).
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        value, gate = (linear(x, weight, bias) for weight, bias in halves)
        return value * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU feed-forward under diffusers' names (`net.0.proj`, `net.2`)."""

    def __init__(self, channels: int, factor: int = 4):
        super().__init__()
        gate = Gate(channels, factor * channels)
        self.net = nn.ModuleList([gate, nn.Identity(), nn.Linear(factor * channels, channels)])

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Domain-spatial attention, optional text-style cross-attention, feed-forward."""

    def __init__(self, channels: int, heads: int, cross_dim: int | None, ff_factor: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = DomainSpatialAttention(channels, heads)
        if cross_dim is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = Attention(channels, cross_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, ff_factor)

    def forward(
        self, x: Float[Tensor, "n tokens c"], layout: Layout, reference: ReferenceKV | None,
        image_context: Tensor | None,
    ) -> tuple[Float[Tensor, "n tokens c"], Float[Tensor, "n tokens c"]]:  # fmt: skip
        """Return (output, the normed hidden states before self-attention, what a reference network hands over)."""
        hidden = self.norm1(x)
        x = x + self.attn1(hidden, layout, reference)
        if image_context is not None and hasattr(self, "attn2"):
            # With one token to look at, attention is that token's value whoever asks. Training runs it in full, so
            # that every weight has a gradient (distributed runs insist).
            if image_context.shape[1] == 1 and not torch.is_grad_enabled():
                x = x + self.attn2.out(self.attn2.to_v(image_context))
            else:
                x = x + self.attn2(self.norm2(x), image_context)
        return x + self.ff(self.norm3(x)), hidden


class Transformer2D(nn.Module):
    """diffusers' `Transformer2DModel` with one block and convolutional projections (SD 1.x)."""

    def __init__(self, channels: int, heads: int, groups: int, cross_dim: int | None, ff_factor: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, cross_dim, ff_factor)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    @property
    def block(self) -> TransformerBlock:
        return cast(TransformerBlock, self.transformer_blocks[0])

    def forward(
        self, x: Float[Tensor, "n c h w"], layout: Layout, reference: ReferenceKV | None, image_context: Tensor | None
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n tokens c"]]:
        """Return (output, hidden states for a reader)."""
        h = x.shape[-2]
        y = rearrange(self.proj_in(self.norm(x)), "n c h w -> n (h w) c")
        y, hidden = self.block(y, layout, reference, image_context)
        return x + self.proj_out(rearrange(y, "n (h w) c -> n c h w", h=h)), hidden


class ExpressionAttention(nn.Module):
    """Cross-attention to the expression tokens, beside every transformer block (X-NeMo's motion module).

    The output projection starts at zero, so a fresh module leaves the image model as it was.
    """

    def __init__(self, channels: int, heads: int, groups: int, token_dim: int, layers: int, ff_factor: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
        self.attentions = nn.ModuleList(Attention(channels, token_dim, heads) for _ in range(layers))
        self.ff_norm = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, ff_factor)
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Float[Tensor, "n c h w"], tokens: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n c h w"]:
        """Let every pixel read its frame's expression tokens."""
        h = x.shape[-2]
        y = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y = y + attention(norm(y), tokens)
        y = y + self.ff(self.ff_norm(y))
        return x + rearrange(self.proj_out(y), "n (h w) c -> n c h w", h=h)
