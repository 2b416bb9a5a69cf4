"""Skin: melanin and blood, freckles, pores, wrinkles by age, lips, lids, and face paint for the randomised.

Skin is a reflectance darkened by melanin and reddened by haemoglobin, each with its own map.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.heads.openhead import load_field
from geodiff4d.world.canvas import Canvas, canvas, noise, polyline, smoothstep
from geodiff4d.world.paint import Paint, gauss
from geodiff4d.world.shading import to_linear
from geodiff4d.world.stage import vivid
from geodiff4d.world.traits import Traits

BARE = torch.tensor([0.80, 0.585, 0.475])
MELANIN = torch.tensor([2.05, 2.60, 2.95])
HAEMOGLOBIN = torch.tensor([0.10, 0.55, 0.45])
Bank = dict[int, Float[Tensor, "texels 4"]]
"""Four independent fields of noise per wavelength [mm]."""
CREASES: dict[str, tuple[tuple[tuple[float, float], ...], float, float]] = {
    # Points (x, y) on the template's left half [m], half width [m], strength.
    "nasolabial": (((0.0175, -0.017), (0.0225, -0.026), (0.029, -0.041), (0.032, -0.054)), 0.0032, 1.0),
    "marionette": (((0.0265, -0.056), (0.029, -0.065), (0.028, -0.074)), 0.0024, 0.6),
    "bag": (((0.0215, 0.0115), (0.028, 0.0065), (0.037, 0.006), (0.045, 0.0105)), 0.0026, 0.7),
    "bag_low": (((0.020, 0.006), (0.027, -0.0005), (0.038, 0.0)), 0.0034, 0.45),
    "crow_1": (((0.0505, 0.0255), (0.060, 0.0315)), 0.0014, 0.6),
    "crow_2": (((0.051, 0.0215), (0.0625, 0.0225)), 0.0014, 0.7),
    "crow_3": (((0.0505, 0.018), (0.0605, 0.0125)), 0.0014, 0.6),
    "frown": (((0.006, 0.052), (0.0055, 0.037)), 0.0018, 0.6),
    "chin": (((0.0, -0.0695), (0.009, -0.071), (0.015, -0.0745)), 0.0028, 0.5),
    "neck_1": (((0.0, -0.111), (0.03, -0.108), (0.055, -0.099)), 0.0024, 0.5),
    "neck_2": (((0.0, -0.125), (0.035, -0.121), (0.06, -0.112)), 0.0024, 0.5),
    "cheek": (((0.040, -0.028), (0.041, -0.040), (0.037, -0.052)), 0.0028, 0.4),
}


@lru_cache
def _creases() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per crease: texels near it, depth of the groove there (0 to 1), and slope toward its middle (x, y)."""
    c = canvas()
    flat = c.position.clone()
    flat[:, 0], flat[:, 2] = flat[:, 0].abs(), 0
    outside = (c.position[:, 2] > 0.02) & (c.regions["eyes"] + c.regions["mouth"] + c.regions["teeth"] < 0.3)
    out = {}
    for name, (points, width, strength) in CREASES.items():
        line = torch.tensor([[x, y, 0.0] for x, y in points])
        box = (line.amin(0) - 3 * width, line.amax(0) + 3 * width)
        near = (outside & ((flat >= box[0]) & (flat <= box[1]))[:, :2].all(1)).nonzero()[:, 0]
        d, s, offset = polyline(flat[near], line)
        ends = smoothstep(-0.02, 0.25, s) * smoothstep(1.02, 0.7, s)
        depth = strength * ends * torch.exp(-((d / width) ** 2))
        slope = -depth[:, None] * offset[:, :2] / width
        slope[:, 0] *= c.position[near, 0].sign()
        out[name] = near, depth, slope
    return out


def paint_skin(c: Canvas, traits: Traits, bank: Bank, rng: np.random.Generator) -> Paint:
    """Melanin and haemoglobin maps, freckles, moles, pores and wrinkles."""
    u, p = rng.uniform, c.position
    melanin, blood = _pigments(c, traits, bank, rng)
    colour = BARE * torch.exp(-melanin.clamp(min=0)[:, None] * MELANIN - blood.clamp(min=-0.1)[:, None] * HAEMOGLOBIN)
    nose, cheeks = gauss(p, (0, -0.012, 0.125), 0.018), gauss(p, (0.045, -0.015, 0.085), 0.026)
    oily = (gauss(p, (0, 0.07, 0.1), 0.035) + nose + 0.6 * cheeks).clamp(0, 1)
    gloss = (0.035 + 0.07 * u() * oily) * (1 + 0.2 * bank[4][:, 0]).clamp(0.3, 2)
    strength = 0.018 + 0.05 * traits.age * u(0.4, 1)
    bump = strength * (bank[4][:, :3] + 0.7 * bank[2][:, 1:4]) + 0.025 * traits.age * bank[8][:, 1:4]
    paint = Paint(colour, gloss, bump)
    _wrinkles(c, paint, traits, bank, rng)
    return paint


def _pigments(c: Canvas, traits: Traits, bank: Bank, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    u, p = rng.uniform, c.position
    uneven = 0.5 + traits.blemishes
    blotches = 0.5 * bank[90][:, :2] + uneven * (
        0.30 * bank[40][:, :2] + 0.14 * bank[18][:, :2] + 0.06 * bank[8][:, :2]
    )
    melanin = traits.melanin * (1 + 0.05 * blotches[:, 0]) + 0.010 * blotches[:, 0] + 0.005 * bank[4][:, 1]
    blood = traits.haemoglobin + 0.05 * blotches[:, 1] + 0.018 * bank[2][:, 2]
    cheeks, nose = gauss(p, (0.045, -0.015, 0.085), 0.026), gauss(p, (0, -0.012, 0.125), 0.018)
    sockets = gauss(p, (0.032, 0.021, 0.092), 0.021)
    blood = blood + u(0.05, 0.4) * cheeks + u(0.1, 0.4) * nose + 0.3 * u(0.3, 1) * c.regions["ears"] + 0.12 * sockets
    blood = blood + 0.12 * gauss(p, (0, -0.085, 0.1), 0.02)
    melanin = melanin + (0.035 + 0.10 * u() * (0.4 + traits.age)) * sockets - 0.02 * gauss(p, (0, 0.08, 0.1), 0.04)
    if traits.freckles:
        dots = smoothstep(1.3, 2.1, bank[4][:, 3] + 0.5 * bank[8][:, 3]) * (0.15 + cheeks + nose).clamp(0, 1)
        melanin = melanin + 0.16 * traits.freckles * dots
    if traits.blemishes > 0.3:
        spots = smoothstep(2.1, 2.6, bank[8][:, 3] + 0.3 * bank[4][:, 1])
        blood = blood + 0.5 * (traits.blemishes - 0.3) * spots * (1 - traits.age)
        melanin = melanin + 0.25 * max(0.0, traits.age - 0.5) * smoothstep(1.6, 2.1, bank[18][:, 3])
    moles = smoothstep(3.1, 3.5, bank[8][:, 2] + 0.3 * bank[18][:, 1]) * float(u() < 0.5)
    return melanin + 0.35 * moles, blood


def _wrinkles(c: Canvas, paint: Paint, traits: Traits, bank: Bank, rng: np.random.Generator) -> None:
    """Creases, deeper with age, as tilted normals and as darker skin; lines across the forehead."""
    for name, (near, depth, slope) in _creases().items():
        young = 0.25 if name in ("nasolabial", "bag", "chin") else 0.0
        amount = float(np.clip(young + 1.5 * (traits.age - 0.2), 0, 1.4) * rng.uniform(0.2, 1.1))
        if amount < 0.05:
            continue
        uneven = (1 + 0.3 * bank[18][near, 0]).clamp(0.2, 1.8) * amount
        paint.bump[near, :2] += 1.1 * uneven[:, None] * slope
        paint.colour[near] *= torch.exp(-(0.22 * uneven * depth)[:, None] * torch.tensor([0.8, 1.2, 1.2]))
    amount = float(np.clip(1.6 * (traits.age - 0.3), 0, 1) * rng.uniform(0.1, 1))
    if amount < 0.05:
        return
    i = c.areas["face"]
    x, y, z = c.position[i].unbind(1)
    top = float(rng.uniform(0.078, 0.095))
    forehead = smoothstep(0.052, 0.062, y) * smoothstep(top + 0.01, top - 0.01, y) * smoothstep(0.075, 0.095, z)
    forehead = forehead * smoothstep(-0.9, 0.5, bank[18][i, 2] + 0.7 * bank[40][i, 2])
    pitch = float(rng.uniform(0.009, 0.014))
    phase = 2 * np.pi * (y + 0.4 * x * x / 0.05) / pitch + 1.6 * bank[40][i, 0] + 0.5 * bank[18][i, 1]
    # Narrow grooves between broad folds.
    groove = torch.exp(2.5 * (phase.cos() - 1)) * forehead * (1 + 0.4 * bank[40][i, 1]).clamp(0.1, 2)
    paint.bump[i, 1] += 0.9 * amount * groove * phase.sin()
    paint.colour[i] *= torch.exp(-(0.16 * amount * groove)[:, None] * torch.tensor([0.8, 1.2, 1.2]))


def paint_patterns(c: Canvas, paint: Paint, rng: np.random.Generator) -> None:
    """Domain randomisation: blend the skin toward a palette laid out by noise, stripes or face paint."""
    palette = to_linear(torch.stack([vivid(rng, 0.8) for _ in range(4)]))
    p = c.position
    field = noise(p, rng, float(rng.choice([0.12, 0.06, 0.03])), 3, octaves=3)
    kind = int(rng.integers(5))
    if kind == 0:  # a tint with soft clouds of other colours
        layers, strength = torch.sigmoid(2.0 * field), rng.uniform(0.35, 0.75)
    elif kind == 1:  # sharp blotches
        layers, strength = smoothstep(0.3, 0.45, field), rng.uniform(0.4, 0.9)
    elif kind == 2:  # bent stripes
        axis = torch.from_numpy(rng.normal(size=(3, 3)).astype(np.float32))
        phase = p @ axis / axis.norm(dim=0) * (2 * np.pi / rng.uniform(0.012, 0.05)) + 1.2 * field
        layers, strength = smoothstep(0.1, 0.5, phase.sin()), rng.uniform(0.3, 0.8)
    elif kind == 3:  # marble or veins
        layers, strength = smoothstep(0.75, 0.98, 1 - field.abs()), rng.uniform(0.3, 0.8)
    else:  # paint over eyes, cheeks or half the face
        half = smoothstep(-0.002, 0.002, p[:, 0] * float(rng.choice([-1, 1])))
        masks = [gauss(p, (0.035, 0.022, 0.09), 0.03), half, gauss(p, (0.045, -0.02, 0.085), 0.022)]
        chosen = torch.from_numpy((rng.random(3) < 0.6).astype(np.float32))
        shapes = torch.stack([masks[int(i)] for i in rng.permutation(3)], 1) * chosen
        layers, strength = smoothstep(0.3, 0.45, shapes + 0.06 * field), rng.uniform(0.5, 0.95)
    target = paint.colour * (1 - 0.5 * strength) + palette[3] * 0.5 * strength if kind < 2 else paint.colour
    for i in range(3):
        target = torch.lerp(target, palette[i].expand_as(target), layers[:, i : i + 1] * strength)
    paint.colour = target


def paint_mouth(c: Canvas, paint: Paint, traits: Traits, bank: Bank, rng: np.random.Generator) -> None:
    """Lips, and the cavity behind them: tongue and teeth."""
    i = c.areas["lips"]
    lips = smoothstep(0.25, 0.75, c.regions["lips"][i] + 0.05 * bank[4][i, 1])
    skin = paint.colour[i][lips > 0.2].mean(0) if bool((lips > 0.2).any()) else BARE
    red = skin * torch.exp(-0.9 * traits.lip_redness * HAEMOGLOBIN * (1 - 0.35 * traits.melanin) - 0.10 * MELANIN)
    if traits.makeup > 0.4:
        stick = torch.tensor([rng.uniform(0.45, 0.85), rng.uniform(0.05, 0.3), rng.uniform(0.1, 0.4)])
        red = torch.lerp(red, to_linear(stick).float(), 0.7 * traits.makeup)
    elif traits.randomised and rng.random() < 0.6:
        red = to_linear(vivid(rng))
    across = c.position[i] * torch.tensor([1.0, 0.15, 0.15])
    creases = 1 - 0.18 * smoothstep(0.2, 1.2, noise(across, rng, 0.0025)[:, 0])
    paint.mix(red * creases[:, None], 0.92 * lips, i)
    paint.set_gloss(0.10 + 0.25 * traits.makeup, lips, i)
    j = c.areas["inside"]
    r = {name: c.regions[name][j] for name in ("lips", "mouth", "gums", "tongue", "teeth")}
    inside = smoothstep(0.35, 0.75, r["mouth"])
    paint.mix(torch.tensor([0.16, 0.028, 0.026]), inside * (1 - 0.3 * r["lips"]), j)
    paint.mix(torch.tensor([0.46, 0.165, 0.15]) * (1 + 0.10 * bank[4][j, :1]), r["gums"], j)
    paint.mix(torch.tensor([0.38, 0.10, 0.095]) * (1 + 0.12 * bank[4][j, :1]), r["tongue"], j)
    ivory = torch.tensor([0.72, 0.66, 0.54]) * torch.tensor([1.0, 1.0, float(rng.uniform(0.8, 1.12))])
    paint.mix(ivory * (1 + 0.06 * bank[8][j, :1]), r["teeth"], j)
    for name, gloss in (("tongue", 0.2), ("gums", 0.25), ("teeth", 0.35), ("mouth", 0.12)):
        paint.set_gloss(gloss, r[name], j)
    paint.flatten(r["teeth"], j)


@lru_cache
def _lash_line() -> Float[Tensor, " texels"]:
    """Signed distance [m] inside the line that lashes grow from."""
    c = canvas()
    line = load_field("lashes")
    line = torch.cat([line, torch.full((len(c.vertices) - len(line),), -0.02)])
    return (line[c.corners] * c.bary).sum(1)


def paint_lids(c: Canvas, paint: Paint, traits: Traits, rng: np.random.Generator) -> None:
    """Lashes along the head's own line, pink waterline, shadow above; eyeballs have their own place in the texture."""
    shadow = to_linear(vivid(rng, 0.6)) if traits.makeup > 0.3 or (traits.randomised and rng.random() < 0.3) else None
    lashes, thick = float(rng.uniform(0.6, 0.95)), float(rng.uniform(-1, 1) + 2 * traits.makeup)
    for side in ("left", "right"):
        i = c.areas[f"lid_{side}"]
        d, _, offset = polyline(c.position[i], c.points[f"lid_{side}"])
        outside, upper = 1 - c.regions["eyes"][i], smoothstep(-0.002, 0.001, offset[:, 1])
        if shadow is not None:
            amount = (0.55 * traits.makeup + 0.2) * smoothstep(0.011, 0.003, d) * (offset[:, 1] > -0.001)
            paint.mix(shadow, amount * outside, i)
        paint.mix(paint.colour[i] * torch.tensor([0.72, 0.6, 0.6]), 0.55 * smoothstep(0.007, 0.002, d) * outside, i)
        line = _lash_line()[i] + 0.0003 * thick * upper
        lash = smoothstep(-0.0008, 0.0003, line) * (0.35 + (lashes - 0.35) * upper) * outside
        paint.mix(torch.tensor([0.012, 0.009, 0.008]), lash * (0.85 + 0.15 * traits.makeup), i)
        eyes: Int[Tensor, " some"] = i[c.regions["eyes"][i] > 0.5]
        paint.flatten(torch.ones(len(eyes)), eyes)


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
