"""What a subject's surface looks like: everything painted into its one texture, in linear RGB."""

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.world import atlas, growth, skin
from geodiff4d.world.canvas import canvas, noise
from geodiff4d.world.garments import paint_clothes
from geodiff4d.world.hair import HairStyle
from geodiff4d.world.seeds import generator
from geodiff4d.world.shading import TEXTURE_CHANNELS, to_linear
from geodiff4d.world.stage import vivid
from geodiff4d.world.traits import Traits

WAVELENGTHS_MM = (90, 40, 18, 8, 4, 2)


def paint_subject(traits: Traits, style: HairStyle, key: tuple[object, ...]) -> Float[Tensor, "texels 8"]:
    """Paint a subject's texture, [rows · 512, 8]; the layout is `atlas`'s."""
    c = canvas()
    rng = generator(*key, "skin")
    bank: skin.Bank = {
        w: c.spread(noise(c.vertices, rng, w / 1000, 4)) if w > 30 else noise(c.position, rng, w / 1000, 4)
        for w in WAVELENGTHS_MM
    }
    paint = skin.paint_skin(c, traits, bank, rng)
    if traits.randomised:
        skin.paint_patterns(c, paint, generator(*key, "patterns"))
    skin.paint_mouth(c, paint, traits, bank, rng)
    skin.paint_lids(c, paint, traits, generator(*key, "lids"))
    growth.paint_stubble(c, paint, traits, bank)
    growth.paint_brows(c, paint, traits, generator(*key, "brows"))
    growth.paint_scalp(c, paint, traits, style, bank, generator(*key, "hair"))
    paint_clothes(c, paint, traits, bank, generator(*key, "clothes"))
    opaque = torch.ones_like(paint.gloss)[:, None]
    texels = torch.cat([paint.colour.clamp(0.002, 0.95), paint.gloss[:, None], paint.bump, opaque], 1)
    out = torch.empty(atlas.TEXTURE_HEIGHT, atlas.TEXTURE_SIZE, TEXTURE_CHANNELS)
    flat = out.view(-1, TEXTURE_CHANNELS)
    torch.index_select(texels, 0, c.fill, out=flat[: len(c.fill)])
    strands = generator(*key, "strands")
    for shell in range(atlas.SHELLS):
        top = atlas.HAIR_TOP + shell * atlas.SHELL_ROWS
        out[top : top + atlas.SHELL_ROWS] = growth.hair_texture(traits, style, shell, strands)
    _paint_extras(out[atlas.EXTRA_TOP :], traits, key)
    return flat


def _paint_extras(block: Float[Tensor, "rows columns 8"], traits: Traits, key: tuple[object, ...]) -> None:
    """Eyes, glasses and beard."""
    block[:] = 0
    block[..., 7] = 1
    eye = skin.eye_colour(atlas.eye_directions(), traits)
    block[:, : atlas.EYE_COLUMNS, :3] = eye.view(atlas.EXTRA_ROWS, atlas.EYE_COLUMNS, 3)
    block[:, : atlas.EYE_COLUMNS, 3] = 0.05
    rng = generator(*key, "glasses")
    metal = rng.random() < 0.4
    dark = torch.tensor([0.02, 0.018, 0.016]) if rng.random() < 0.6 else to_linear(vivid(rng)) * 0.5
    frame = torch.tensor([0.45, 0.38, 0.26]) * float(rng.uniform(0.4, 1.1)) if metal else dark
    plain = slice(atlas.EYE_COLUMNS, atlas.BEARD_LEFT)
    block[:16, plain, :3], block[:16, plain, 3] = frame, 0.5 if metal else 0.2
    block[16:32, plain, :3], block[16:32, plain, 3] = torch.tensor([0.012, 0.012, 0.014]), 0.5
    if traits.beard_m > 0:
        block[:, atlas.BEARD_LEFT :] = growth.beard_texture(traits, generator(*key, "beard"))
