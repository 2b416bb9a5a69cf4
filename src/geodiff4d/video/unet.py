"""The denoiser and its twin, the reference network: one UNet in Stable Diffusion 1.5's topology.

Parameter names match diffusers' `UNet2DConditionModel`; what SD does not have (`expressions.*`, `class_embedding`,
`expression_embedding`) stands beside under its own names. Convolutions see `(batch domains frames)` (Sec. 3.2).
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from geodiff4d.video.attention import ExpressionAttention, GroupNorm, Layout, ReferenceKV, Transformer2D
from geodiff4d.video.temporal import ClipFilter, TemporalModule


@dataclass(frozen=True)
class UNetConfig:
    """Widths and sites of one UNet."""

    in_channels: int = 7
    """Latent + pose map (+ warp); SD's 4 grow to 7 with new channels zero-initialised."""
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    """Resnets per down block; up blocks have one more."""
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[int, ...] = (0, 3, 3, 3)
    """How many of an up block's layers attend, counted from its first; the deepest block comes first."""
    heads: int | None = 8
    """Attention heads at every site; None means one head per 64 channels."""
    groups: int = 32
    ff_factor: int = 4
    cross_dim: int | None = 768
    """Width of SD's text (here: image) tokens; None leaves that attention out."""
    expression_dim: int | None = 16
    """Width of an expression token; None for the reference network."""
    expression_layers: int = 2
    expression_ff_factor: int = 4
    every_layer: bool = True
    """Expression and temporal modules stand behind every layer (X-NeMo's 21 places), or behind transformers only."""
    temporal_layers: int = 0
    """Self-attentions over time in each temporal module; 0 is the image model (stage 1), X-NeMo has 2."""
    temporal_ff_factor: int = 4
    clip_filter: int = 0
    """Reach [frames] of the filter over a clip's clean latents (`ClipFilter`; ours); 0 has none."""
    expression_latent: int | None = None
    """Add a projection of this many expression latents to the time embedding (ours, embedded preset only)."""
    domains: int = 2
    reference: bool = False
    """Build a reference network: it ends at its last attention site, and nothing after it exists."""

    def __post_init__(self) -> None:
        if len({len(self.widths), len(self.down_attention), len(self.up_attention)}) != 1:
            raise ValueError("widths, down_attention and up_attention must have one entry per level")

    def head_count(self, channels: int) -> int:
        return self.heads or max(1, channels // 64)


class Resnet(nn.Module):
    """diffusers' `ResnetBlock2D` (time embedding added between two convolutions)."""

    def __init__(self, c_in: int, c_out: int, c_time: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Float[Tensor, "n c_in h w"], time: Float[Tensor, "n c_time"]) -> Float[Tensor, "n c_out h w"]:
        y = self.conv1(silu(self.norm1(x))) + self.time_emb_proj(silu(time))[:, :, None, None]
        y = self.conv2(silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class TimeEmbedding(nn.Module):
    """diffusers' `TimestepEmbedding`."""

    def __init__(self, c_in: int, c_time: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_time)
        self.linear_2 = nn.Linear(c_time, c_time)

    def forward(self, x: Float[Tensor, "n c_in"]) -> Float[Tensor, "n c_time"]:
        return self.linear_2(silu(self.linear_1(x)))


class Sampler(nn.Module):
    """The convolution of diffusers' down- and upsamplers."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        return self.conv(x)


class Block(nn.Module):
    """One level: resnets, each followed by transformer, expression and temporal module where the config has them."""

    attentions: nn.ModuleList
    downsamplers: nn.ModuleList
    upsamplers: nn.ModuleList

    def __init__(
        self, config: UNetConfig, inputs: list[int], width: int, attending: int, c_time: int, sampler: str | None,
        layers: int | None = None,
    ):  # fmt: skip
        """`layers` is how many of the resnets begin a layer, if not all of them do (the middle's second does not)."""
        super().__init__()
        heads, layers = config.head_count(width), len(inputs) if layers is None else layers
        self.resnets = nn.ModuleList(Resnet(c, width, c_time, config.groups) for c in inputs)
        if attending:
            self.attentions = nn.ModuleList(
                Transformer2D(width, heads, config.groups, config.cross_dim, config.ff_factor) for _ in range(attending)
            )
        places = layers if config.every_layer else attending
        token_dim = config.expression_dim
        self.expressions = nn.ModuleList(
            ExpressionAttention(
                width, heads, config.groups, token_dim, config.expression_layers, config.expression_ff_factor
            )
            for _ in range(places)
            if token_dim is not None
        )
        self.temporals = nn.ModuleList(
            TemporalModule(width, heads, config.groups, config.temporal_layers, config.temporal_ff_factor)
            for _ in range(places if config.temporal_layers else 0)
        )
        self.attending = attending
        if sampler:
            setattr(self, sampler, nn.ModuleList([Sampler(width, 2 if sampler == "downsamplers" else 1)]))


def timestep_embedding(t: Float[Tensor, " n"], channels: int) -> Float[Tensor, "n channels"]:
    """Sinusoidal embedding in SD's order (cosine first, no frequency shift)."""
    half = channels // 2
    frequencies = torch.exp(-torch.arange(half, device=t.device) * (math.log(10000.0) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class UNet(nn.Module):
    """Denoise both domains at once, or (as the reference network) hand over hidden states."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        w, n = config.widths, config.layers
        c_time = 4 * w[0]
        self.time_embedding = TimeEmbedding(w[0], c_time)
        self.class_embedding = nn.Embedding(config.domains, c_time)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        if config.expression_latent:
            self.expression_embedding = nn.Linear(config.expression_latent, c_time, bias=False)
            nn.init.zeros_(self.expression_embedding.weight)
        self.conv_in = nn.Conv2d(config.in_channels, w[0], 3, padding=1)

        skips, c = [w[0]], w[0]
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(w):
            last = i == len(w) - 1
            attending = n if config.down_attention[i] else 0
            inputs = [c] + [width] * (n - 1)
            self.down_blocks.append(Block(config, inputs, width, attending, c_time, None if last else "downsamplers"))
            skips += [width] * (n if last else n + 1)
            c = width
        self.mid_block = Block(config, [c, c], c, 1, c_time, None, layers=1)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(reversed(w)):
            last = i == len(w) - 1
            inputs = []
            # A reference network is done once the last site has handed over its states.
            ends_here = config.reference and last and config.up_attention[i]
            for _ in range(config.up_attention[i] if ends_here else n + 1):
                inputs.append(c + skips.pop())
                c = width
            self.up_blocks.append(
                Block(config, inputs, width, config.up_attention[i], c_time, None if last else "upsamplers")
            )
        self.temporals = nn.ModuleList(
            ClipFilter(config.domains, config.out_channels, config.clip_filter) for _ in range(bool(config.clip_filter))
        )
        if not config.reference:
            self.conv_norm_out = GroupNorm(config.groups, c, eps=1e-5)
            self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are held in."""
        return self.conv_in.weight.dtype

    def sites(self) -> list[Transformer2D]:
        """Return the attention sites in the order they run."""
        blocks = [*self._levels(self.down_blocks), self.mid_block, *self._levels(self.up_blocks)]
        return [cast(Transformer2D, a) for block in blocks if block.attending for a in block.attentions]

    @staticmethod
    def _levels(blocks: nn.ModuleList) -> list[Block]:
        return [cast(Block, block) for block in blocks]

    def reference_kv(self, hidden: list[Tensor]) -> list[ReferenceKV]:
        """Turn a reference network's hidden states into this network's keys and values, one pair per site."""
        return [s.block.attn1.reference_kv(h) for s, h in zip(self.sites(), hidden, strict=True)]

    def forward(
        self,
        x: Float[Tensor, "b d c t h w"],
        timestep: Float[Tensor, " b"],
        tokens: Float[Tensor, "b t n e"] | None = None,
        latent: Float[Tensor, "b t f"] | None = None,
        reference: list[ReferenceKV] | None = None,
        image_context: Float[Tensor, "b m x"] | None = None,
        domain_ids: tuple[int, ...] = (0, 1),
        joint: bool = True,
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b d o t h w"], list[Tensor]]:
        """Run the network on latents with their conditions concatenated along channels.

        Args:
            tokens: expression tokens per frame (denoiser).
            latent: expression latent per frame, for the time embedding (if configured).
            reference: keys and values per attention site, from `reference_kv`.
            domain_ids: which class embedding each entry of the domain axis has.
            valid: frames that are not padding (temporal modules); None means all.

        Returns:
            (prediction, or a reference network's last features; hidden states at every attention site,
            `[(b d t), tokens, channels]`, unless a reference is read: a denoiser's are of no use and gigabytes).
        """
        b, d, _, t, _, _ = x.shape
        layout = Layout(b, d, t, joint, valid)
        emb = self._embed(timestep, latent, domain_ids, t)
        context = None if tokens is None else repeat(tokens, "b t n e -> (b d t) n e", d=d)
        image_context = None if image_context is None else repeat(image_context, "b m x -> (b d t) m x", d=d, t=t)
        bank: list[Tensor] = []
        kv = iter(reference) if reference is not None else None

        def layer(block: Block, j: int, h: Tensor) -> Tensor:
            h = block.resnets[j](h, emb)
            if j < block.attending:
                h, hidden = block.attentions[j](h, layout, next(kv) if kv else None, image_context)
                if reference is None:
                    bank.append(hidden)
            if context is not None and j < len(block.expressions):
                h = block.expressions[j](h, context)
            return block.temporals[j](h, layout) if j < len(block.temporals) else h

        h = rearrange(x, "b d c t h w -> (b d t) c h w")
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for block in self._levels(self.down_blocks):
            for j in range(len(block.resnets)):
                h = layer(block, j, h)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block.resnets[1](layer(self.mid_block, 0, h), emb)
        for block in self._levels(self.up_blocks):
            for j in range(len(block.resnets)):
                h = layer(block, j, torch.cat([h, skips.pop()], 1))
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](interpolate(h, scale_factor=2.0, mode="nearest"))
        if not self.config.reference:
            h = self.conv_out(silu(self.conv_norm_out(h)))
        return rearrange(h, "(b d t) c h w -> b d c t h w", b=b, d=d, t=t), bank

    def _embed(
        self, timestep: Tensor, latent: Tensor | None, domain_ids: tuple[int, ...], frames: int
    ) -> Float[Tensor, "n c_time"]:
        """Sum time, domain and (embedded preset) expression embeddings for every row of the folded batch."""
        e = timestep_embedding(timestep, self.config.widths[0]).to(self.dtype)
        e = self.time_embedding(e)
        # Rows picked on the host: a tensor of ids would have to be copied to the device in every step.
        domains = torch.stack([self.class_embedding.weight[i] for i in domain_ids])
        e = e[:, None, None] + domains[None, :, None]
        e = e.expand(-1, -1, frames, -1)
        if latent is not None and self.config.expression_latent:
            e = e + self.expression_embedding(latent.to(e.dtype))[:, None]
        return rearrange(e, "b d t c -> (b d t) c")
