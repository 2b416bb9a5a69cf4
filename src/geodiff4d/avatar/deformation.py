"""Expression-dependent displacement of the surface by a U-Net in texture space (Sec. 3.3; after CAP4D).

The input is a map of where every texel is on the head that is moved by its expression alone, in canonical space:
turning the head changes nothing. The U-Net attends to the expression tokens at its lowest level, and its output,
centimetres in canonical axes, turns with the head as its skin does.

Ours / theirs: the sizes are not stated (theirs follow CAP4D: 64 channels, six halvings, 128²); no instance
normalisation, which makes the faintest expression as strong as any; one pass, since the rest comes out of it by a
penalty instead of a second pass at rest.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate, leaky_relu, scaled_dot_product_attention

from geodiff4d.avatar.surface import Surface, texels
from geodiff4d.heads.rig import Head, HeadParams

UNIT_M = 0.01
"""Unit of displacements [m]: one centimetre."""
REST_M = 0.1
"""Unit of positions at rest [m]: one decimetre."""


@dataclass(frozen=True)
class DeformationConfig:
    """Size, learning rate and penalties of the deformation U-Net."""

    size: int = 64
    """Side of the U-Net's maps [texels]."""
    channels: int = 16
    """Channels at full resolution; they double with every halving, up to eightfold."""
    levels: int = 3
    """Number of halvings."""
    lr: float = 1e-3
    """Peak learning rate; it decays as the Gaussians' rates do."""
    small: float = 0.02
    """Weight of the mean square of displacements [1/cm²]."""
    smooth: float = 0.05
    """Weight of the mean square difference between neighbouring texels [1/cm²]."""

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 16 or self.size % 2**self.levels or min(self.size, self.channels) < 1:
            raise ValueError(f"size must be a multiple of 2^levels, got {self.size} and {self.levels}")


class Deformation(nn.Module):
    """U-Net from a position map and expression tokens to displacements in texture space."""

    def __init__(self, config: DeformationConfig, token_size: tuple[int, int]):
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.levels + 1)]
        self.first = nn.Conv2d(6, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(widths))
        self.attend = TokenAttention(widths[-1], token_size)
        ups = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.up = nn.ModuleList(nn.Conv2d(a + b, b, 3, padding=1) for a, b in ups)
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)
        # The fit starts at the head as it is.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self, maps: Float[Tensor, "1 6 size size"], tokens: Float[Tensor, "tokens channels"]
    ) -> Float[Tensor, "1 3 size size"]:
        """Return displacements [cm] in canonical axes, one per texel."""
        x = leaky_relu(self.first(maps), 0.2)
        skips = []
        for down in self.down:
            skips.append(x)
            x = leaky_relu(down(x), 0.2)
        x = self.attend(x, tokens)
        for up in self.up:
            x = interpolate(x, scale_factor=2.0, mode="nearest")
            x = leaky_relu(up(torch.cat([x, skips.pop()], 1)), 0.2)
        return self.last(x)

    def penalty(self, displacement: Float[Tensor, "1 3 size size"]) -> Float[Tensor, ""]:
        """Return the penalty that keeps displacements [cm] small and smooth."""
        along = displacement.diff(dim=-1).square().mean() + displacement.diff(dim=-2).square().mean()
        return self.config.small * displacement.square().mean() + self.config.smooth * along


class TokenAttention(nn.Module):
    """Cross-attention of texels to expression tokens, added as a residual."""

    def __init__(self, channels: int, token_size: tuple[int, int], heads: int = 4):
        super().__init__()
        count, width = token_size
        self.heads = heads
        self.place = nn.Parameter(torch.randn(count, channels) * 0.1)
        self.read = nn.Linear(width, channels)
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(
        self, x: Float[Tensor, "1 channels h w"], tokens: Float[Tensor, "tokens _width"]
    ) -> Float[Tensor, "1 channels h w"]:
        q = self.query(x.flatten(2)[0].mT)
        k, v = self.key_value(self.read(tokens) + self.place).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for t in (q, k, v))
        seen = scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        return x + self.out(seen).mT.view_as(x)


@dataclass(frozen=True)
class PositionMap:
    """Lookups between the head and texture space: draws the U-Net's input and samples its output at the surface."""

    size: int
    place: Int[Tensor, " covered"]
    """Flat indices of the texels that lie on a chart."""
    corners: Int[Tensor, "covered 3"]
    bary: Float[Tensor, "covered 3"]
    grid: Float[Tensor, "1 1 verts 2"]
    """Texture coordinates of the surface's points, as grid_sample takes them, -1 to 1."""
    weights: Float[Tensor, "verts joints"]
    """Skinning weights of the surface's points."""

    @staticmethod
    def of(head: Head, surface: Surface, size: int) -> "PositionMap":
        """Build the lookups of a surface for maps of `size` × `size` texels."""
        face, bary = texels(head.to("cpu"), size)
        place = (face.flatten() >= 0).nonzero()[:, 0]
        device = head.template.device
        corners = head.faces[face.flatten()[place].to(device)]
        return PositionMap(
            size, place.to(device), corners, bary.flatten(0, 1)[place].to(device),
            (2 * surface.uv - 1)[None, None].to(device), surface.on(head.skin_weights),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "PositionMap":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def map(self, moved: Float[Tensor, "verts 3"], rest: Float[Tensor, "verts 3"]) -> Float[Tensor, "1 6 size size"]:
        """Return the position map: the expression's displacement [cm], then the position at rest [dm]; 0 off charts."""
        values = torch.cat([(moved - rest) / UNIT_M, rest / REST_M], -1)
        a, b, c = (values.index_select(0, self.corners[:, i]) * self.bary[:, i, None] for i in range(3))
        out = values.new_zeros(6, self.size**2).index_copy(1, self.place, (a + b + c).T)
        return out.view(1, 6, self.size, self.size)

    def read(
        self, displacement: Float[Tensor, "1 3 size size"], T_world_joint: Float[Tensor, "joints 4 4"]
    ) -> Float[Tensor, "verts 3"]:
        """Return the displacements of the surface's points in the world [m], turned with the skin; differentiable."""
        at = grid_sample(displacement, self.grid, padding_mode="border", align_corners=False)[0, :, 0].T
        turn = (self.weights @ T_world_joint[:, :3, :3].flatten(1)).view(-1, 3, 3)
        return UNIT_M * (turn * at[:, None, :]).sum(-1)


def canonical(params: HeadParams) -> HeadParams:
    """Return the expression alone, detached: rotation, neck and translation are zero."""
    still = {k: torch.zeros_like(getattr(params, k)) for k in ("rotation", "neck_pose", "translation")}
    return replace(params.map(Tensor.detach), **still)
