"""Deferred shading in linear light: a pixel's samples are averaged by layer, and each layer is lit once."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.world import deferred

TEXTURE_CHANNELS = 8
"""Linear RGB, specular strength, bump (3, added to the unit normal in the head's frame), opacity."""


@dataclass(frozen=True)
class Light:
    """Light of one subject, fixed in the world."""

    direction: Float[Tensor, "3"]
    """Unit vector toward the key light."""
    key: Float[Tensor, "3"]
    ambient: Float[Tensor, "3"]
    """Degree 0 of the ambient light's spherical harmonics, linear RGB irradiance over π."""
    gradient: Float[Tensor, "3 3"]
    """Degree 1: change of RGB (rows) with the normal (columns)."""
    exposure: float

    def to(self, device: torch.device) -> "Light":
        return Light(
            self.direction.to(device),
            self.key.to(device),
            self.ambient.to(device),
            self.gradient.to(device),
            self.exposure,
        )


WRAP = (0.30, 0.16, 0.11)
"""Light seeps under the terminator, red farthest: what makes skin look like skin."""


def pack_light(
    light: Light, T_skull_world: Float[Tensor, "*batch 3 3"], to_eye: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch 27"]:
    """Lay a light out for shading, in the skull's frame.

    Toward the key light, toward the eye, half way between, key colour, ambient colour, its gradient (normal × RGB),
    wrap; three numbers each.
    """
    toward = T_skull_world @ light.direction
    half = normalize(toward + to_eye, dim=-1)
    gradient = (T_skull_world @ light.gradient.T).flatten(-2)
    wrap = light.key.new_tensor(WRAP)
    fixed = [x.expand_as(toward) for x in (light.key, light.ambient)]
    return torch.cat([toward, to_eye, half, *fixed, gradient, wrap.expand_as(toward)], -1)


def shade(rows: Float[Tensor, "n 16"], kind: Int[Tensor, " n"], light: Float[Tensor, "n 27"]) -> Float[Tensor, "n 3"]:
    """Return linear RGB of surface points; the twin of `render/deferred.py`'s `_light`.

    Rows are texel (8) and attributes (normal 3, open sky, open key light, strand direction 3), in the skull's frame.
    """
    albedo, gloss, normal, tangent = rows[:, :3], rows[:, 3:4], rows[:, 8:11], rows[:, 13:16]
    ao, lit = rows[:, 11:12], rows[:, 12:13]
    toward, to_eye, half, key, ambient = light[:, :15].unflatten(1, (5, 3)).unbind(1)
    n = normal + rows[:, 4:7]
    n = n * n.square().sum(-1, keepdim=True).clamp(min=1e-9).rsqrt()
    cosine, wrap = _dot(n, toward), light[:, 24:27]
    diffuse = ((cosine + wrap) / (1 + wrap)).clamp(min=0).square() * (1 + wrap)
    irradiance = ambient + (n[:, None] @ light[:, 15:24].unflatten(1, (3, 3)))[:, 0]
    colour = albedo * (irradiance.clamp(min=0.02) * ao + key * diffuse * lit)
    tight = _dot(n, half).clamp(min=0) ** 16
    rim = (1 - _dot(n, to_eye).clamp(0, 1)) ** 4
    broad = tight * (0.4 + 0.9 * tight.square())
    spec = gloss * (broad * lit * (cosine > 0) * key + (0.25 + rim) * 0.3 * irradiance * ao)
    wet, strand = (kind == deferred.WET)[:, None], (kind == deferred.STRAND)[:, None]
    # The sharp reflection on eyes and glasses.
    sharp = _dot(normalize(normal, dim=-1), half).clamp(min=0)
    glint = torch.where(sharp > 0.9, 1.6 * sharp**350, 0.0) * lit * key
    # The two highlights of a strand (Kajiya and Kay 1989, with the shifts of Marschner et al. 2003).
    t, m = _dot(tangent, half), _dot(normal, half)
    first, second = ((1 - (t + k * m).square()).clamp(min=1e-6) for k in (-0.08, 0.12))
    seen = lit * (_dot(normal, toward) + 0.3).clamp(0, 1) * gloss
    shine = key * seen * (0.5 * first**45 + 1.2 * second**12 * albedo.clamp(min=0).sqrt())
    return colour + torch.where(strand, shine, spec + torch.where(wet, glint, 0.0))


def _dot(a: Float[Tensor, "n 3"], b: Float[Tensor, "n 3"]) -> Float[Tensor, "n 1"]:
    return (a * b).sum(-1, keepdim=True)


def sample_texture(
    texture: Float[Tensor, "texels c"], uv: Float[Tensor, "n 2"], width: int, height: int
) -> Float[Tensor, "n c"]:
    """Read a texture [height · width, c] bilinearly at uv in [0, 1]."""
    x = (uv[:, 0] * width - 0.5).clamp(0, width - 1.001)
    y = (uv[:, 1] * height - 0.5).clamp(0, height - 1.001)
    x0, y0 = x.long(), y.long()
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    first = y0 * width + x0
    top = texture.index_select(0, first).lerp_(texture.index_select(0, first + 1), fx)
    bottom = texture.index_select(0, first + width).lerp_(texture.index_select(0, first + width + 1), fx)
    return top.lerp_(bottom, fy)


def to_srgb(linear: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Compress highlights softly and encode as sRGB."""
    x = linear.clamp(min=0)
    # Below 0.6 nothing changes; above, the curve bends toward 1 and never clips.
    x = torch.where(x > 0.6, 0.6 + 0.4 * (1 - torch.exp(-(x - 0.6) / 0.4)), x)
    return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp(min=1e-6) ** (1 / 2.4) - 0.055).clamp(0, 1)


def to_linear(srgb: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Decode sRGB."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
