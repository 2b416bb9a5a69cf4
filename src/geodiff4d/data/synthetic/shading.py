"""Deferred shading in linear light: each visible pixel reads the texture, the normal and the light, once."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.render.meshes import rasterize

TEXTURE_CHANNELS = 8
"""Linear RGB, specular strength, bump (3, added to the unit normal in the head's frame), hairiness."""


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


@dataclass(frozen=True)
class Surface:
    """Visible pixels of one image, in the head's frame."""

    normal: Float[Tensor, "n 3"]
    to_eye: Float[Tensor, "3"]
    """Unit direction to the camera, taken as the same for the whole head."""
    texture: Float[Tensor, "n 8"]
    openness: Float[Tensor, "n 2"]
    """Share of the sky, and of the key light, that reaches the pixel."""

    def at(self, index: Int[Tensor, " m"]) -> "Surface":
        normal, texture, openness = (x.index_select(0, index) for x in (self.normal, self.texture, self.openness))
        return Surface(normal, self.to_eye, texture, openness)


def shade(surface: Surface, light: Light, T_light: Float[Tensor, "3 3"]) -> Float[Tensor, "n 3"]:
    """Return linear RGB of the pixels; `T_light` takes world directions to the head's frame."""
    albedo, gloss, hairy = surface.texture[:, :3], surface.texture[:, 3:4], surface.texture[:, 7:8]
    n = surface.normal + surface.texture[:, 4:7]
    n = n * n.square().sum(-1, keepdim=True).clamp(min=1e-9).rsqrt()
    toward = T_light @ light.direction
    ao, lit = surface.openness[:, :1], surface.openness[:, 1:]
    cosine = n @ toward[:, None]
    # Light seeps under the terminator, red farthest: what makes skin look like skin.
    wrap = torch.tensor([0.30, 0.16, 0.11], device=n.device)
    diffuse = ((cosine + wrap) / (1 + wrap)).clamp(min=0).square() * (1 + wrap)
    irradiance = light.ambient + n @ (T_light @ light.gradient.T)
    colour = albedo * (irradiance.clamp(min=0.02) * ao + light.key * diffuse * lit)
    half = normalize(toward + surface.to_eye, dim=0)
    shine = (n @ half[:, None]).clamp(min=0)
    facing = (n @ surface.to_eye[:, None]).clamp(0, 1)
    rim = (1 - facing).square().square()
    tight = shine.square().square().square().square()
    broad = tight * (0.4 + 0.9 * tight.square())
    spec = gloss * (broad * lit * (cosine > 0) * light.key + (0.25 + rim) * 0.3 * irradiance * ao)
    return colour + spec * (1 - hairy)


def glint(surface: Surface, light: Light, T_light: Float[Tensor, "3 3"]) -> Float[Tensor, "n 3"]:
    """Return the sharp reflection of the key light on a wet surface (eyes)."""
    half = normalize(T_light @ light.direction + surface.to_eye, dim=0)
    sharp = (normalize(surface.normal, dim=-1) @ half[:, None]).clamp(min=0) ** 350
    return 1.6 * sharp * light.key * surface.openness[:, 1:]


def shade_hair(
    surface: Surface,
    tangent: Float[Tensor, "n 3"],
    colour: Float[Tensor, "n 3"],
    light: Light,
    T_light: Float[Tensor, "3 3"],
) -> Float[Tensor, "n 3"]:
    """Add the two highlights of a strand (Kajiya and Kay 1989, with the shifts of Marschner et al. 2003)."""
    toward = T_light @ light.direction
    half = normalize(toward + surface.to_eye, dim=0)
    albedo, gloss = surface.texture[:, :3], surface.texture[:, 3:4]
    # sin² of the angle between strand and half vector, for a strand tilted toward the root and toward the tip.
    t, n = tangent @ half[:, None], surface.normal @ half[:, None]
    first, second = (((1 - (t + k * n).square()).clamp(min=0)) for k in (-0.08, 0.12))
    first, second = first**45, second**12
    lit = surface.openness[:, 1:] * (surface.normal @ toward[:, None] + 0.3).clamp(0, 1)
    return colour + light.key * lit * gloss * (0.5 * first + 1.2 * second * albedo.sqrt())


def sample_texture(
    texture: Float[Tensor, "texels 8"], uv: Float[Tensor, "n 2"], width: int, height: int
) -> Float[Tensor, "n 8"]:
    """Read a texture [height · width, 8] bilinearly at uv in [0, 1]."""
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


def visibility(
    vertices: Float[Tensor, "verts 3"],
    normals: Float[Tensor, "verts 3"],
    faces: Int[Tensor, "faces 3"],
    directions: Float[Tensor, "dirs 3"],
    size: int = 96,
) -> Float[Tensor, "dirs verts"]:
    """Say which vertices see each direction: 1 where nothing lies before them in a depth map taken from there."""
    centre, far = (vertices.amin(0) + vertices.amax(0)) / 2, 6.0
    radius = float((vertices - centre).norm(dim=-1).max())
    up = torch.where(directions[:, 1:2].abs() > 0.95, torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0])).to(vertices)
    T = look_at(centre + far * directions, centre.expand_as(directions), up)
    K = pinhole(0.5 * size * far / radius * 0.98, size, size).to(vertices).expand(len(directions), 3, 3)
    camera = Camera(T, K, size, size)
    with torch.no_grad():
        depth = rasterize(vertices.expand(len(directions), -1, 3), faces, camera).depth
    # Look from above the surface, about as far as a pixel of the depth map is wide, or slopes shade themselves.
    bias = radius / size
    xy, z = camera.project((vertices + bias * normals).expand(len(directions), -1, 3))
    place = xy.long().clamp(0, size - 1)
    seen = depth.flatten(1).gather(1, place[..., 1] * size + place[..., 0])
    return (z < seen + bias).float()
