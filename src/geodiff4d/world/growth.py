"""Everything that grows: strands' textures, the scalp below them, brows, stubble, and beards."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.render.meshes import rasterize_uv
from geodiff4d.render.viewpoints import openhead
from geodiff4d.world import atlas
from geodiff4d.world.canvas import Canvas, noise, polyline, smoothstep
from geodiff4d.world.hair import HAIR_SHELL, HairStyle, angles, hairline
from geodiff4d.world.mesh import Fur
from geodiff4d.world.paint import Paint, beard_area, on_lips
from geodiff4d.world.shading import TEXTURE_CHANNELS
from geodiff4d.world.skin import Bank
from geodiff4d.world.traits import Traits

SHELL_TONE = (0.72, 0.92, 1.08)
"""Inner hair is in the shade of the outer."""
SHELL_DENSITY = (9.0, 0.75, -0.45)
"""How many strands each shell shows, in standard deviations."""
SHELL_RAGGED = (0.06, 0.12, 0.25)
BEARD_SHELLS = (0.35, 0.7, 1.0)
BEARD_SHELL = HAIR_SHELL + atlas.SHELLS
BEARD_COLUMNS = atlas.TEXTURE_SIZE - atlas.BEARD_LEFT
BEARD_TOP_M, BEARD_BOTTOM_M = 0.04, -0.125


def _resized(x: np.ndarray, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    image = torch.from_numpy(x.astype(np.float32))[None, None]
    return torch.nn.functional.interpolate(image, (rows, columns), mode="bilinear", align_corners=True)[0, 0]


def hair_texture(
    traits: Traits, style: HairStyle, shell: int, rng: np.random.Generator
) -> Float[Tensor, "rows columns 8"]:
    """Strands: fine across, smooth along; darker roots, lighter streaks; outer shells are sparse and ragged."""
    width, rows = atlas.TEXTURE_SIZE, atlas.SHELL_ROWS
    shape = {"curly": (rows // 2, width // 2), "afro": (rows // 2, width // 2), "wavy": (16, width // 2)}
    fine = rng.normal(size=shape.get(style.kind, (8, width)))
    medium, streaks, ends = rng.normal(size=(6, width // 4)), rng.normal(size=(3, width // 12)), rng.normal(size=width)
    f, m, s = (_resized(x, rows, width) for x in (fine, medium, streaks))
    v = torch.linspace(0, 1, rows)[:, None]
    tone = torch.exp(0.30 * f + 0.26 * m + 0.12 * s) * (0.66 + 0.34 * smoothstep(0.0, 0.5, v)) * SHELL_TONE[shell]
    colour = traits.hair_colour * tone[..., None]
    if traits.tips is not None:
        toward = smoothstep(0.2, 0.8, 0.5 * s + 2 * (v - 0.4))
        colour = torch.lerp(colour, traits.tips * tone[..., None], toward[..., None])
    ragged = torch.from_numpy(np.abs(ends).astype(np.float32)) * SHELL_RAGGED[shell]
    density = SHELL_DENSITY[shell] - 0.25 * (m + 0.4 * s) * (shell > 0)
    # Opacity one half is the edge: strands thin out toward their tips.
    thin = 2.2 * smoothstep(0.75, 1.1, v) * (shell > 0)
    opacity = 0.5 + 0.35 * (f + density - thin) - 3.0 * (v - 1 + ragged).clamp(min=0)
    out = torch.zeros(rows, width, TEXTURE_CHANNELS)
    out[..., :3], out[..., 3], out[..., 7] = colour.clamp(0.003, 0.9), 0.10 + 0.05 * f.clamp(-1, 1), opacity
    out[..., 4:7] = 0.10 * torch.stack([f, m, f.roll(1, 1)], -1)
    return out


def paint_scalp(
    c: Canvas, paint: Paint, traits: Traits, style: HairStyle, bank: Bank, rng: np.random.Generator
) -> None:
    """Colour the scalp inside the hairline, whose edge is broken into strands; ears stay skin."""
    i = c.areas["head"]
    phi, theta = angles(c.position[i].numpy())
    margin = torch.from_numpy((hairline(style, rng)(phi) - theta).astype(np.float32))
    body = (1 - c.regions["ears"][i]).clamp(0, 1) * smoothstep(-0.09, -0.08, c.position[i, 1])
    for inner in ("eyes", "mouth", "tongue", "teeth", "lids"):
        body = body * (1 - c.regions[inner][i])
    rough = 0.022 * bank[4][i, 1] + 0.018 * bank[2][i, 1] + 0.015 * bank[8][i, 1]
    edge = smoothstep(-0.05, 0.03, margin + rough) * body
    shaved = 0.5 if traits.beard != "none" else 0.2
    amount = {"bald": 0.12 + 0.2 * shaved, "buzz": 0.8}.get(style.kind, 0.97)
    if style.kind == "bald":  # a shaved ring below a bare top
        edge = edge * (0.35 + 0.65 * smoothstep(1.0, 1.5, torch.from_numpy(theta.astype(np.float32))))
    dots = 0.7 + 0.3 * smoothstep(-0.5, 0.8, bank[2][i, 3])
    paint.mix(traits.hair_colour * (0.8 if style.kind != "bald" else 1.2), edge * amount * dots, i)
    paint.set_gloss(0.03, edge * amount, i)


def paint_brows(c: Canvas, paint: Paint, traits: Traits, rng: np.random.Generator) -> None:
    """Short strokes that lean outward along each brow's line."""
    thickness, lift, arch = rng.uniform(0.0040, 0.0074), rng.normal(0.0, 0.0015), rng.normal(0, 0.0015)
    density, soft = rng.uniform(0.75, 1.0), rng.uniform(0.8, 1.3)
    for side in ("left", "right"):
        line = c.points[f"brow_{side}"].clone()
        line[:, 1] += lift + arch * torch.sin(torch.linspace(0, 1, len(line)) * 2.2) * 2 + float(rng.normal(0, 0.0006))
        i = c.areas[f"brow_{side}"]
        d, s, offset = polyline(c.position[i], line)
        width = thickness * (1.0 - 0.62 * s**1.6) * smoothstep(-0.05, 0.2, s)
        across = offset[:, 1] / width.clamp(min=1e-4)
        body = smoothstep(1.25 * soft, 0.35, across.abs()) * smoothstep(0.0095, 0.006, d)
        # Stroke coordinates: hairs rise near the nose and lie down toward the temple.
        lean = 0.9 - 0.7 * s
        stroke = torch.stack([s * 0.055 - lean * offset[:, 1] * 0.8, offset[:, 1] * 0.22, torch.zeros_like(s)], 1)
        strands = noise(stroke, rng, 0.0016)[:, 0]
        ends = smoothstep(-0.02, 0.10, s) * smoothstep(1.0, 0.9, s)
        amount = body * ends * (0.65 + 0.35 * smoothstep(-0.8, 0.7, strands)) * density
        paint.mix(traits.brow_colour, amount, i)
        paint.set_gloss(0.02, amount, i)


def paint_stubble(c: Canvas, paint: Paint, traits: Traits, bank: Bank) -> None:
    """Darken the skin where a beard grows: dots of short hair, and the ground below a longer one."""
    if traits.beard == "none":
        return
    i = c.areas["jaw"]
    area = beard_area(c.position[i], traits.beard) * (1 - on_lips(c, i))
    patchy = (0.75 + 0.35 * traits.beard_density + 0.12 * bank[18][i, 0] + 0.08 * bank[8][i, 0]).clamp(0, 1)
    dots = smoothstep(-1.2, 1.0, bank[2][i, 0] + 0.4 * bank[4][i, 0])
    strength = 0.5 * traits.beard_density if traits.beard == "stubble" else 0.85
    amount = area.square() * patchy * strength * (0.45 + 0.55 * dots)
    paint.mix(traits.hair_colour * 0.7, amount, i)
    paint.set_gloss(0.02, area, i)
    paint.bump[i] += (0.08 * area)[:, None] * bank[2][i, :3]


@lru_cache
def _beard() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vertices that may carry a beard, their faces, unit coordinates, and the template position of each texel."""
    head = openhead()
    p = head.template
    closed = torch.ones(len(p), dtype=torch.bool)
    for name in ("mouth", "teeth", "tongue", "eyes", "sockets", "ears"):
        closed &= ~head.regions.get(name, torch.zeros(len(p), dtype=torch.bool))
    inside = closed & (p[:, 1] < BEARD_TOP_M - 0.001) & (p[:, 1] > BEARD_BOTTOM_M + 0.001) & (p[:, 2] > -0.004)
    faces = head.faces[inside[head.faces].all(1)]
    vertex, faces = torch.unique(faces, return_inverse=True)
    x, y, z = p[vertex].unbind(1)
    u = 0.5 + torch.atan2(x, z + 0.02) / np.pi
    v = (BEARD_TOP_M - y) / (BEARD_TOP_M - BEARD_BOTTOM_M)
    uv = torch.stack([u, v], 1)
    size = atlas.TEXTURE_SIZE
    # The block's own coordinates: a texel and a half of margin on every side.
    block = torch.tensor([BEARD_COLUMNS - 3, atlas.EXTRA_ROWS - 3]) / size
    fragments = rasterize_uv(uv * block + 1.5 / size, faces, size)
    fragments = (fragments.face_index, fragments.bary)
    face, bary = (x[: atlas.EXTRA_ROWS, :BEARD_COLUMNS] for x in fragments)
    position = (p[vertex][faces[face.clamp(min=0)]] * bary[..., None]).sum(-2)
    position[face < 0] = torch.tensor([0.0, 1.0, 0.0])  # above everything: no beard
    return vertex, faces, uv, position


def grow_beard(traits: Traits, rng: np.random.Generator) -> Fur | None:
    """Return shells over the skin where a beard grows; none for stubble."""
    if traits.beard_m == 0:
        return None
    vertex, faces, uv, _ = _beard()
    p = openhead().template[vertex]
    weight = beard_area(p, traits.beard)
    keep = (weight[faces] > 0.02).any(1)
    faces = faces[keep]
    used, faces = torch.unique(faces, return_inverse=True)
    weight, p = weight[used], p[used]
    # Longest at the chin.
    chin = smoothstep(-0.04, -0.085, p[:, 1]) * smoothstep(0.02, 0.08, p[:, 2])
    lumps = (1 + 0.3 * noise(p, rng, 0.02)[:, 0]).clamp(0.3, 1.7)
    length = traits.beard_m * weight.sqrt() * (0.45 + 0.55 * chin) * lumps
    n = len(used)
    lift = torch.cat([0.0008 + depth * length * (0.75 - 0.25 * chin) for depth in BEARD_SHELLS])
    down = torch.tensor([0.0, -1.0, 0.12])
    fall = torch.cat([(depth**1.5 * length * (0.25 + 0.55 * chin))[:, None] * down for depth in BEARD_SHELLS])
    side = p[:, 0].sign() * 0.25
    tangent = torch.nn.functional.normalize(torch.stack([side, -torch.ones(n), torch.full((n,), 0.3)], 1), dim=1)
    place = atlas.place_uv(uv[used], atlas.EXTRA_TOP, atlas.EXTRA_ROWS, atlas.BEARD_LEFT, BEARD_COLUMNS)
    shells: list[Int[Tensor, "faces 3"]] = [faces + k * n for k in range(len(BEARD_SHELLS))]
    number = torch.arange(len(BEARD_SHELLS)).repeat_interleave(len(faces)) + BEARD_SHELL
    every = torch.cat(shells)
    # Shells share their texture, moved along a little: each shows other strands.
    shift = torch.tensor([[3.0 / atlas.TEXTURE_SIZE, 0.0]])
    moved = torch.cat([place + k * shift for k in range(len(BEARD_SHELLS))])
    return Fur(vertex[used].repeat(len(BEARD_SHELLS)), lift, fall, every, moved, every, tangent.repeat(3, 1), number)


def beard_texture(traits: Traits, rng: np.random.Generator) -> Float[Tensor, "rows columns 8"]:
    """Short strands that run down; opaque where the beard grows."""
    rows, columns = atlas.EXTRA_ROWS, BEARD_COLUMNS
    position = _beard()[3]
    area = beard_area(position.view(-1, 3), traits.beard).view(rows, columns)
    fine = _resized(rng.normal(size=(rows // 4, columns)), rows, columns)
    medium = _resized(rng.normal(size=(rows // 6, columns // 5)), rows, columns)
    lean = torch.roll(fine, 1, 1)
    tone = torch.exp(0.35 * fine + 0.3 * medium) * 0.9
    colour = torch.lerp(traits.hair_colour, traits.brow_colour, 0.35) * tone[..., None]
    out = torch.zeros(rows, columns, TEXTURE_CHANNELS)
    cover = 1.9 * (area - 0.5) + 0.42 * fine + 0.16 * medium - 0.55 + 0.5 * traits.beard_density
    out[..., :3], out[..., 3], out[..., 7] = colour.clamp(0.003, 0.9), 0.06, 0.5 + cover
    out[..., 4:7] = 0.12 * torch.stack([fine, medium, lean], -1)
    return out
