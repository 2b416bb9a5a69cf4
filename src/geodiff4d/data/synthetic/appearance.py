"""What a subject's surface looks like: skin, lips, brows, lids, eyes, mouth, scalp, clothes, painted into one texture.

Skin is a reflectance darkened by melanin and reddened by haemoglobin, each with its own map; a share of the subjects is
domain-randomised (paint, patterns, odd colours), so that a model has to read appearance from the reference.
Colours are linear RGB.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.data.synthetic import atlas
from geodiff4d.data.synthetic.canvas import Canvas, canvas, noise, polyline, smoothstep
from geodiff4d.data.synthetic.hair import HairStyle, angles, hairline
from geodiff4d.data.synthetic.shading import TEXTURE_CHANNELS, to_linear
from geodiff4d.data.synthetic.stage import vivid

RANDOMISED_SHARE = 0.3

SHELL_TONE = (0.72, 0.92, 1.08)
"""Inner hair is in the shade of the outer."""
SHELL_DENSITY = (9.0, 0.75, -0.45)
"""How many strands each shell shows, in standard deviations."""
SHELL_RAGGED = (0.06, 0.12, 0.25)
BARE = torch.tensor([0.80, 0.585, 0.475])
MELANIN = torch.tensor([2.05, 2.60, 2.95])
HAEMOGLOBIN = torch.tensor([0.10, 0.55, 0.45])
HAIR_COLOURS = (
    (0.012, 0.010, 0.009), (0.018, 0.012, 0.009), (0.035, 0.019, 0.011), (0.075, 0.038, 0.018), (0.16, 0.085, 0.038),
    (0.36, 0.23, 0.10), (0.52, 0.38, 0.19), (0.21, 0.06, 0.018), (0.28, 0.27, 0.26), (0.55, 0.54, 0.52),
)  # fmt: skip
IRIS_COLOURS = (
    (0.07, 0.03, 0.012),
    (0.14, 0.065, 0.022),
    (0.16, 0.12, 0.04),
    (0.10, 0.15, 0.07),
    (0.10, 0.20, 0.33),
    (0.22, 0.28, 0.32),
)


@dataclass(frozen=True)
class Traits:
    """A subject's colours and features."""

    melanin: float
    haemoglobin: float
    hair_colour: Float[Tensor, "3"]
    brow_colour: Float[Tensor, "3"]
    iris: Float[Tensor, "3"]
    cloth: Float[Tensor, "2 3"]
    lip_redness: float
    freckles: float
    stubble: float
    age: float
    makeup: float
    randomised: bool
    tips: Float[Tensor, "3"] | None
    """Another colour toward the ends of the hair."""


def draw_traits(rng: np.random.Generator) -> Traits:
    """Draw colours and features; dark skin goes with dark hair and eyes unless the subject is randomised."""
    randomised = bool(rng.random() < RANDOMISED_SHARE)
    melanin = float(np.clip(rng.choice([rng.uniform(0.02, 0.35), rng.uniform(0.05, 0.95)]), 0, 1))
    fair = int(np.clip(rng.normal(6.2 - 8 * melanin, 2.2), 0, 7)) if melanin < 0.55 else int(rng.integers(0, 3))
    age = float(rng.uniform(0, 1) ** 1.3)
    hair = torch.tensor(HAIR_COLOURS[int(rng.integers(8, 10)) if rng.random() < 0.5 * max(0, age - 0.45) else fair])
    if randomised and rng.random() < 0.6:
        hair = to_linear(vivid(rng))
    eyes = int(rng.integers(0, 2)) if melanin > 0.5 else int(rng.integers(0, 6))
    cloth = to_linear(torch.stack([vivid(rng, 0.65), vivid(rng, 0.65)]))
    man = rng.random() < 0.5
    u = rng.uniform
    return Traits(
        melanin=melanin,
        haemoglobin=float(rng.normal(0.12, 0.12)),
        hair_colour=hair * float(u(0.8, 1.2)),
        brow_colour=hair * float(u(0.45, 0.9)),
        iris=torch.tensor(IRIS_COLOURS[eyes]) * float(u(0.7, 1.4)),
        cloth=cloth,
        lip_redness=float(u(0.5, 1.1)),
        freckles=float(u(0.3, 1)) if rng.random() < 0.25 and melanin < 0.4 else 0.0,
        stubble=float(u(0.15, 1)) if man and rng.random() < 0.6 else 0.0,
        age=age,
        makeup=float(u(0.3, 1)) if not man and rng.random() < 0.6 else 0.0,
        randomised=randomised,
        tips=to_linear(vivid(rng)) if randomised and rng.random() < 0.4 else None,
    )


@dataclass
class Paint:
    """The texture while it is being painted, one row per texel of the canvas."""

    colour: Float[Tensor, "texels 3"]
    gloss: Float[Tensor, " texels"]
    bump: Float[Tensor, "texels 3"]
    opacity: Float[Tensor, " texels"]

    def mix(self, colour: Tensor, amount: Tensor) -> None:
        self.colour = torch.lerp(self.colour, colour.expand_as(self.colour), amount[:, None].clamp(0, 1))

    def set_gloss(self, gloss: float, amount: Tensor) -> None:
        self.gloss = torch.lerp(self.gloss, torch.tensor(gloss), amount.clamp(0, 1))


def paint_subject(
    traits: Traits, style: HairStyle, key: tuple[object, ...], generator: Callable[..., np.random.Generator]
) -> Float[Tensor, "texels 8"]:
    """Paint a subject's texture, [rows · 512, 8]; `generator(*key, purpose)` gives the random numbers."""
    c = canvas()
    rng = generator(*key, "skin")
    # One bank of noise, [wavelength] → four independent channels.
    bank = {
        w: c.spread(noise(c.vertices, rng, w / 1000, 4)) if w > 30 else noise(c.position, rng, w / 1000, 4)
        for w in (90, 40, 18, 8, 4, 2)
    }
    paint = _skin(c, traits, bank, rng)
    if traits.randomised:
        _patterns(c, paint, generator(*key, "patterns"))
    _lips_and_mouth(c, paint, traits, bank, rng)
    _lids(c, paint, traits, generator(*key, "lids"))
    _stubble(c, paint, traits, bank)
    _brows(c, paint, traits, generator(*key, "brows"))
    _scalp(c, paint, traits, style, bank, generator(*key, "hair"))
    _clothes(c, paint, traits, bank, generator(*key, "clothes"))
    texels = torch.cat([paint.colour.clamp(0.002, 0.95), paint.gloss[:, None], paint.bump, paint.opacity[:, None]], 1)
    out = torch.empty(atlas.TEXTURE_HEIGHT, atlas.TEXTURE_SIZE, TEXTURE_CHANNELS)
    flat = out.view(-1, TEXTURE_CHANNELS)
    torch.index_select(texels, 0, c.fill, out=flat[: len(c.fill)])
    strands = generator(*key, "strands")
    for shell in range(atlas.SHELLS):
        top = atlas.HAIR_TOP + shell * atlas.SHELL_ROWS
        out[top : top + atlas.SHELL_ROWS] = hair_texture(traits, style, shell, strands)
    extra = out[atlas.EXTRA_TOP :]
    extra[:] = 0
    extra[..., 7] = 1
    extra[:, : atlas.EYE_COLUMNS, :3] = eye_colour(atlas.eye_directions(), traits).view(atlas.EXTRA_ROWS, -1, 3)
    extra[:, : atlas.EYE_COLUMNS, 3] = 0.05
    return flat


def _gauss(c: Canvas, centre: tuple[float, float, float], radius: float, mirror: bool = True) -> Tensor:
    p = c.position.clone()
    if mirror:
        p[:, 0] = p[:, 0].abs()
    return torch.exp(-(p - torch.tensor(centre)).square().sum(1) / radius**2)


def _skin(c: Canvas, traits: Traits, bank: dict[int, Tensor], rng: np.random.Generator) -> Paint:
    """Melanin and haemoglobin maps, freckles, moles, pores and wrinkles."""
    u = rng.uniform
    blotches = 0.5 * bank[90] + 0.35 * bank[40] + 0.2 * bank[18] + 0.12 * bank[8] + 0.08 * bank[4]
    melanin = traits.melanin * (1 + 0.055 * blotches[:, 0]) + 0.012 * blotches[:, 0] + 0.008 * bank[4][:, 1]
    blood = traits.haemoglobin + 0.06 * blotches[:, 1] + 0.04 * bank[2][:, 2]
    cheeks, nose = _gauss(c, (0.045, -0.015, 0.085), 0.026), _gauss(c, (0, -0.012, 0.125), 0.018)
    sockets = _gauss(c, (0.032, 0.021, 0.092), 0.021)
    blood = blood + u(0.05, 0.4) * cheeks + u(0.1, 0.4) * nose + 0.3 * c.regions["ears"] * u(0.3, 1) + 0.12 * sockets
    blood = blood + 0.12 * _gauss(c, (0, -0.085, 0.1), 0.02)
    melanin = melanin + (0.035 + 0.10 * u() * (0.4 + traits.age)) * sockets - 0.02 * _gauss(c, (0, 0.08, 0.1), 0.04)
    if traits.freckles:
        dots = smoothstep(1.1, 2.0, bank[4][:, 3] + 0.5 * bank[8][:, 3]) * (0.25 + cheeks + nose).clamp(0, 1)
        melanin = melanin + 0.22 * traits.freckles * dots
    moles = smoothstep(3.1, 3.5, bank[8][:, 2] + 0.3 * bank[18][:, 1]) * float(u() < 0.5)
    melanin = melanin + 0.35 * moles
    colour = BARE * torch.exp(-melanin.clamp(min=0)[:, None] * MELANIN - blood.clamp(min=-0.1)[:, None] * HAEMOGLOBIN)
    oily = (_gauss(c, (0, 0.07, 0.1), 0.035) + nose + 0.6 * cheeks).clamp(0, 1)
    gloss = (0.035 + 0.05 * u() * oily) * (1 + 0.25 * bank[4][:, 0]).clamp(0.3, 2)
    strength = 0.035 + 0.06 * traits.age
    bump = strength * (bank[4][:, :3] + 0.8 * bank[2][:, 1:4]) + 0.02 * traits.age * bank[8][:, 1:4]
    forehead = smoothstep(0.05, 0.065, c.position[:, 1]) * smoothstep(0.04, 0.07, c.position[:, 2])
    lines = torch.sin(c.position[:, 1] * 2 * np.pi / 0.011 + 1.5 * bank[40][:, 0] + 0.5 * bank[18][:, 0])
    bump[:, 1] += (0.22 * max(0.0, traits.age - 0.35)) * forehead * lines
    return Paint(colour, gloss.clone(), bump, torch.ones(len(colour)))


def _patterns(c: Canvas, paint: Paint, rng: np.random.Generator) -> None:
    """Domain randomisation: blend the skin toward a palette laid out by noise, stripes or face paint."""
    palette = to_linear(torch.stack([vivid(rng, 0.8) for _ in range(4)]))
    wave = float(rng.choice([0.12, 0.06, 0.03]))
    field = noise(c.position, rng, wave, 3, octaves=4)
    kind = int(rng.integers(4))
    if kind == 0:  # a tint with soft clouds of other colours
        layers, strength = torch.sigmoid(2.0 * field), rng.uniform(0.35, 0.75)
    elif kind == 1:  # sharp blotches
        layers, strength = smoothstep(0.3, 0.45, field), rng.uniform(0.4, 0.9)
    elif kind == 2:  # bent stripes
        axis = torch.from_numpy(rng.normal(size=(3, 3)).astype(np.float32))
        phase = c.position @ axis / axis.norm(dim=0) * (2 * np.pi / rng.uniform(0.012, 0.05)) + 1.2 * field
        layers, strength = smoothstep(0.1, 0.5, phase.sin()), rng.uniform(0.3, 0.8)
    else:  # paint over eyes, cheeks or half the face
        masks = [
            _gauss(c, (0.035, 0.022, 0.09), 0.03),
            smoothstep(-0.002, 0.002, c.position[:, 0] * float(rng.choice([-1, 1]))),
            _gauss(c, (0.045, -0.02, 0.085), 0.022),
        ]
        chosen = torch.from_numpy((rng.random(3) < 0.6).astype(np.float32))
        shapes = torch.stack([masks[int(i)] for i in rng.permutation(3)], 1) * chosen
        layers = smoothstep(0.3, 0.45, shapes + 0.06 * field)
        strength = rng.uniform(0.5, 0.95)
    target = paint.colour * (1 - 0.5 * strength) + palette[3] * 0.5 * strength if kind < 2 else paint.colour
    for i in range(3):
        target = torch.lerp(target, palette[i].expand_as(target), layers[:, i : i + 1] * strength)
    paint.colour = target


def _lips_and_mouth(c: Canvas, paint: Paint, traits: Traits, bank: dict[int, Tensor], rng: np.random.Generator) -> None:
    lips = smoothstep(0.25, 0.75, c.regions["lips"] + 0.06 * bank[4][:, 1])
    skin = paint.colour[lips > 0.2].mean(0) if bool((lips > 0.2).any()) else BARE
    red = skin * torch.exp(-0.9 * traits.lip_redness * HAEMOGLOBIN * (1 - 0.35 * traits.melanin) - 0.10 * MELANIN)
    if traits.makeup > 0.4:
        red = torch.lerp(
            red,
            to_linear(torch.tensor([rng.uniform(0.45, 0.85), rng.uniform(0.05, 0.3), rng.uniform(0.1, 0.4)])).float(),
            0.7 * traits.makeup,
        )
    elif traits.randomised and rng.random() < 0.6:
        red = to_linear(vivid(rng))
    creases = 1 - 0.18 * smoothstep(0.2, 1.2, noise(c.position * torch.tensor([1.0, 0.15, 0.15]), rng, 0.0025)[:, 0])
    paint.mix(red * creases[:, None], 0.92 * lips)
    paint.set_gloss(0.10 + 0.25 * traits.makeup, lips)
    # The line between the lips, and the cavity behind it.
    inside = smoothstep(0.35, 0.75, c.regions["mouth"])
    paint.mix(torch.tensor([0.16, 0.028, 0.026]), inside * (1 - 0.3 * lips))
    paint.mix(torch.tensor([0.38, 0.10, 0.095]) * (1 + 0.12 * bank[4][:, :1]), c.regions["tongue"])
    ivory = torch.tensor([0.72, 0.66, 0.54]) * (1 + 0.08 * bank[8][:, :1])
    paint.mix(ivory, c.regions["teeth"])
    for name, gloss in (("tongue", 0.2), ("teeth", 0.35), ("mouth", 0.12)):
        paint.set_gloss(gloss, c.regions[name])
    hard = c.regions["teeth"] + c.regions["eyes"]
    paint.bump = paint.bump * (1 - hard.clamp(0, 1))[:, None]


def _lids(c: Canvas, paint: Paint, traits: Traits, rng: np.random.Generator) -> None:
    """Lash line, pink waterline and shadow above; the eyeballs themselves are coloured where they are seen."""
    outside = 1 - c.regions["eyes"]
    shadow = to_linear(vivid(rng, 0.6)) if traits.makeup > 0.3 or (traits.randomised and rng.random() < 0.3) else None
    for side in ("left", "right"):
        line = c.points[f"lid_{side}"]
        near = (c.position - line.mean(0)).norm(dim=1) < 0.035
        d = torch.full((len(c.position),), 1.0)
        offset_y = torch.zeros(len(c.position))
        distance, _, offset = polyline(c.position[near], line)
        d[near], offset_y[near] = distance, offset[:, 1]
        if shadow is not None:
            paint.mix(
                shadow, (0.55 * traits.makeup + 0.2) * smoothstep(0.011, 0.003, d) * (offset_y > -0.001) * outside
            )
        upper = smoothstep(-0.002, 0.001, offset_y)
        lash = (0.4 * smoothstep(0.0026, 0.0008, d) + 0.55 * upper * smoothstep(0.0042, 0.0016, d)) * outside
        paint.mix(torch.tensor([0.012, 0.009, 0.008]), lash * (0.8 + 0.2 * traits.makeup))
        paint.mix(paint.colour * torch.tensor([0.72, 0.6, 0.6]), 0.5 * smoothstep(0.007, 0.002, d) * outside * upper)


def _stubble(c: Canvas, paint: Paint, traits: Traits, bank: dict[int, Tensor]) -> None:
    if not traits.stubble:
        return
    x, y, z = c.position.unbind(1)
    jaw = (
        smoothstep(-0.018, -0.036, y + 0.25 * (x.abs() - 0.045).clamp(min=0) * -1)
        * smoothstep(-0.125, -0.10, y)
        * smoothstep(-0.005, 0.02, z)
    )
    sides = (
        smoothstep(0.056, 0.064, x.abs())
        * smoothstep(0.02, 0.0, y)
        * smoothstep(0.012, 0.025, z)
        * smoothstep(-0.125, -0.1, y)
    )
    area = torch.maximum(jaw, sides) * (1 - smoothstep(0.15, 0.5, c.regions["lips"] + c.regions["mouth"]))
    area = area * smoothstep(-0.3, 0.25, (area - 0.5) * 2 + 0.25 * bank[8][:, 0] + 0.2 * bank[4][:, 2])
    dots = smoothstep(-0.6 + 0.4 * (1 - traits.stubble), 1.0, bank[2][:, 0] + 0.6 * bank[4][:, 0])
    full = max(0.0, traits.stubble - 0.55) / 0.45
    amount = area * (0.30 * traits.stubble + (0.4 + 0.45 * full) * traits.stubble * dots)
    paint.mix(traits.hair_colour * 0.7, amount)
    paint.set_gloss(0.02, area)
    paint.bump = paint.bump + (0.12 * traits.stubble * area)[:, None] * bank[2][:, :3]


def _brows(c: Canvas, paint: Paint, traits: Traits, rng: np.random.Generator) -> None:
    """Short strokes that lean outward along each brow's line."""
    thickness, lift, arch = rng.uniform(0.0032, 0.0062), rng.normal(0.0, 0.0015), rng.normal(0, 0.0015)
    density, soft = rng.uniform(0.6, 1.0), rng.uniform(0.8, 1.3)
    for side in ("left", "right"):
        line = c.points[f"brow_{side}"].clone()
        bend = torch.linspace(0, 1, len(line))
        line[:, 1] += lift + arch * torch.sin(bend * 2.2) * 2 + float(rng.normal(0, 0.0006))
        near = ((c.position - line.mean(0)).norm(dim=1) < 0.045).nonzero()[:, 0]
        d, s, offset = polyline(c.position[near], line)
        width = thickness * (1.0 - 0.62 * s**1.6) * smoothstep(-0.05, 0.2, s)
        across = offset[:, 1] / width.clamp(min=1e-4)
        body = smoothstep(1.25 * soft, 0.35, across.abs()) * smoothstep(0.0095, 0.006, d)
        # Stroke coordinates: hairs rise near the nose and lie down toward the temple.
        lean = 0.9 - 0.7 * s
        stroke = torch.stack([s * 0.055 - lean * offset[:, 1] * 0.8, offset[:, 1] * 0.22, torch.zeros_like(s)], 1)
        strands = noise(stroke, rng, 0.0016)[:, 0]
        ends = smoothstep(-0.02, 0.10, s) * smoothstep(1.0, 0.9, s)
        amount = body * ends * (0.55 + 0.4 * smoothstep(-0.8, 0.7, strands)) * density
        full = torch.zeros(len(c.position)).index_put((near,), amount)
        paint.mix(traits.brow_colour, full)
        paint.set_gloss(0.02, full)


def _scalp(
    c: Canvas, paint: Paint, traits: Traits, style: HairStyle, bank: dict[int, Tensor], rng: np.random.Generator
) -> None:
    """Colour the scalp inside the hairline, whose edge is broken into strands; ears stay skin."""
    phi, theta = angles(c.position.numpy())
    line = hairline(style, rng)(phi)
    margin = torch.from_numpy((line - theta).astype(np.float32))
    body = (1 - c.regions["ears"]).clamp(0, 1) * smoothstep(-0.09, -0.08, c.position[:, 1])
    for inner in ("eyes", "mouth", "tongue", "teeth", "lids"):
        body = body * (1 - c.regions[inner])
    edge = (
        smoothstep(-0.05, 0.03, margin + 0.022 * bank[4][:, 1] + 0.018 * bank[2][:, 1] + 0.015 * bank[8][:, 1]) * body
    )
    amount = {"bald": 0.12 + 0.2 * traits.stubble, "buzz": 0.8}.get(style.kind, 0.97)
    if style.kind == "bald":  # a shaved ring below a bare top
        edge = edge * (0.35 + 0.65 * smoothstep(1.0, 1.5, torch.from_numpy(theta.astype(np.float32))))
    dots = 0.7 + 0.3 * smoothstep(-0.5, 0.8, bank[2][:, 3])
    paint.mix(traits.hair_colour * (0.8 if style.kind != "bald" else 1.2), edge * amount * dots)
    paint.set_gloss(0.03, edge * amount)


def _clothes(c: Canvas, paint: Paint, traits: Traits, bank: dict[int, Tensor], rng: np.random.Generator) -> None:
    cover = cloth_cover(c.position, rng)
    x, y, _ = c.position.unbind(1)
    first, second = traits.cloth
    kind = int(rng.integers(6))
    pitch = float(rng.uniform(0.008, 0.03))
    wave_y, wave_x = torch.sin(2 * np.pi * (y + 0.35 * x.abs()) / pitch), torch.sin(2 * np.pi * x / pitch)
    rows, columns = smoothstep(-0.1, 0.1, wave_y), smoothstep(-0.1, 0.1, wave_x)
    plain = torch.zeros_like(x)
    layers = (plain, rows, columns, 0.5 * (rows + columns), smoothstep(0.2, 0.4, bank[18][:, 2]), plain)
    colour = torch.lerp(first.expand(len(x), 3), second.expand(len(x), 3), layers[kind][:, None])
    knit = (
        1
        + 0.10 * torch.sin(2 * np.pi * y / 0.004) * torch.sin(2 * np.pi * x / 0.004)
        + 0.06 * bank[18][:, 1]
        + 0.05 * bank[2][:, 1]
    )
    edge = smoothstep(0.35, 0.6, cover) * (1 - smoothstep(0.8, 0.98, cover))
    paint.mix(colour * (knit * (1 - 0.35 * edge))[:, None], smoothstep(0.3, 0.45, cover))
    sharp = smoothstep(0.3, 0.45, cover)
    paint.set_gloss(0.015, sharp)
    paint.bump = torch.lerp(paint.bump, 0.08 * bank[18][:, :3] + 0.06 * bank[2][:, :3], sharp[:, None])


def cloth_cover(position: Float[Tensor, "n 3"], rng: np.random.Generator) -> Float[Tensor, " n"]:
    """How far inside the clothes template points lie: 0 skin, 1 from a centimetre below the neckline on."""
    x, y, z = position.unbind(1)
    kind = int(rng.integers(4))
    height = {0: -0.128, 1: -0.145, 2: -0.108, 3: -0.135}[kind] + float(rng.normal(0, 0.004))
    slope = {0: 0.12, 1: 0.55, 2: 0.0, 3: 0.25}[kind]
    # Necklines rise over the shoulders and toward the nape.
    line = height + slope * (x.abs() - 0.02).clamp(0, 0.08) + 0.28 * (0.05 - z).clamp(0, 0.12)
    return smoothstep(0.0, 0.010, line - y)


def hair_texture(
    traits: Traits, style: HairStyle, shell: int, rng: np.random.Generator
) -> Float[Tensor, "rows columns 8"]:
    """Strands: fine across, smooth along; darker roots, lighter streaks; outer shells are sparse and ragged."""
    width, rows = atlas.TEXTURE_SIZE, atlas.SHELL_ROWS
    curly = style.kind == "curly"
    fine = rng.normal(size=(rows // 2 if curly else 8, width // 2 if curly else width))
    medium, streaks, ends = rng.normal(size=(6, width // 4)), rng.normal(size=(3, width // 12)), rng.normal(size=width)

    def spread(x: np.ndarray) -> Tensor:
        image = torch.from_numpy(x.astype(np.float32))[None, None]
        return torch.nn.functional.interpolate(image, (rows, width), mode="bicubic", align_corners=True)[0, 0]

    f, m, s = spread(fine), spread(medium), spread(streaks)
    v = torch.linspace(0, 1, rows)[:, None]
    tone = torch.exp(0.26 * f + 0.24 * m + 0.12 * s) * (0.66 + 0.34 * smoothstep(0.0, 0.5, v)) * SHELL_TONE[shell]
    colour = traits.hair_colour * tone[..., None]
    if traits.tips is not None:
        colour = torch.lerp(
            colour, traits.tips * tone[..., None], smoothstep(0.2, 0.8, 0.5 * s + 2 * (v - 0.4))[..., None]
        )
    ragged = torch.from_numpy(np.abs(ends).astype(np.float32)) * SHELL_RAGGED[shell]
    density = SHELL_DENSITY[shell] - 0.25 * (m + 0.4 * s) * (shell > 0)
    # Opacity one half is the edge: strands thin out toward their tips.
    opacity = (
        0.5 + 0.35 * (f + density - 2.2 * smoothstep(0.75, 1.1, v) * (shell > 0)) - 3.0 * (v - 1 + ragged).clamp(min=0)
    )
    out = torch.zeros(rows, width, TEXTURE_CHANNELS)
    out[..., :3], out[..., 3], out[..., 7] = colour.clamp(0.003, 0.9), 0.10 + 0.05 * f.clamp(-1, 1), opacity
    out[..., 4:7] = 0.10 * torch.stack([f, m, f.roll(1, 1)], -1)
    return out


def eye_colour(local: Float[Tensor, "n 3"], traits: Traits) -> Float[Tensor, "n 3"]:
    """Colour of the eyeball at unit directions from its centre (z is the optical axis): sclera, limbus, iris, pupil."""
    angle = torch.acos(local[:, 2].clamp(-1, 1))
    turn = torch.atan2(local[:, 1], local[:, 0])
    iris_radius, pupil = 0.50, 0.19
    white, veins = local.new_tensor([0.70, 0.64, 0.60]), local.new_tensor([0.0, 0.25, 0.25])
    sclera = white * (1 - 0.35 * smoothstep(0.6, 1.25, angle))[:, None]
    sclera = sclera * (1 - smoothstep(0.8, 1.3, angle)[:, None] * veins)
    spokes = 1 + 0.22 * torch.sin(turn * 23 + 2 * torch.sin(turn * 5)) + 0.15 * torch.sin(turn * 41 + 1)
    iris = traits.iris.to(local) * (spokes * (0.75 + 0.75 * smoothstep(0.42, pupil, angle)))[:, None]
    iris = iris * (1 - 0.75 * smoothstep(0.40, iris_radius, angle))[:, None]
    colour = torch.lerp(sclera, iris, smoothstep(iris_radius + 0.03, iris_radius - 0.02, angle)[:, None])
    return colour * (1 - 0.985 * smoothstep(pupil + 0.03, pupil - 0.02, angle))[:, None]
