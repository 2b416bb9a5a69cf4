"""A subject's colours and features, drawn once: what a passport and a hairdresser would write down."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.world.shading import to_linear
from geodiff4d.world.stage import vivid

RANDOMISED_SHARE = 0.25
GLASSES_SHARE = 0.16
SUNGLASSES_SHARE = 0.1
"""Of those with glasses."""
BeardKind = Literal["none", "stubble", "moustache", "goatee", "short", "full"]
HAIR_COLOURS = (
    (0.012, 0.010, 0.009), (0.018, 0.012, 0.009), (0.035, 0.019, 0.011), (0.075, 0.038, 0.018), (0.16, 0.085, 0.038),
    (0.36, 0.23, 0.10), (0.52, 0.38, 0.19), (0.21, 0.06, 0.018), (0.28, 0.27, 0.26), (0.55, 0.54, 0.52),
)  # fmt: skip
"""From black to fair, then red, grey and white."""
IRIS_COLOURS = (
    (0.07, 0.03, 0.012), (0.14, 0.065, 0.022), (0.16, 0.12, 0.04), (0.10, 0.15, 0.07), (0.10, 0.20, 0.33),
    (0.22, 0.28, 0.32),
)  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """Colours are linear RGB; amounts are 0 to 1."""

    melanin: float
    haemoglobin: float
    hair_colour: Float[Tensor, "3"]
    brow_colour: Float[Tensor, "3"]
    tips: Float[Tensor, "3"] | None
    """Another colour toward the ends of the hair."""
    iris: Float[Tensor, "3"]
    cloth: Float[Tensor, "3 3"]
    lip_redness: float
    freckles: float
    age: float
    """0 about twenty, 1 about eighty."""
    blemishes: float
    makeup: float
    beard: BeardKind
    beard_m: float
    """Length of the beard [m]; 0 for stubble."""
    beard_density: float
    glasses: Literal["none", "clear", "dark"]
    randomised: bool
    """Domain-randomised: paint, patterns and odd colours, so that appearance has to be read from the reference."""


def draw_traits(rng: np.random.Generator) -> Traits:
    """Draw colours and features; dark skin goes with dark hair and eyes unless the subject is randomised."""
    u = rng.uniform
    randomised = bool(rng.random() < RANDOMISED_SHARE)
    melanin = float(np.clip(rng.choice([u(0.02, 0.35), u(0.05, 0.95)]), 0, 1))
    age = float(u(0, 1) ** 1.3)
    hair = _hair_colour(rng, melanin, age)
    if randomised and rng.random() < 0.6:
        hair = to_linear(vivid(rng))
    eyes = int(rng.integers(0, 2)) if melanin > 0.5 else int(rng.integers(0, 6))
    man = rng.random() < 0.5
    beard, beard_m = _beard(rng) if man else ("none", 0.0)
    wears = rng.random() < GLASSES_SHARE
    return Traits(
        melanin=melanin,
        haemoglobin=float(rng.normal(0.12, 0.12)),
        hair_colour=hair * float(u(0.8, 1.2)),
        brow_colour=torch.minimum(hair * float(u(0.3, 0.7)), torch.tensor([0.22, 0.16, 0.1]) * float(u(0.6, 1.0))),
        tips=to_linear(vivid(rng)) if rng.random() < (0.4 if randomised else 0.03) else None,
        iris=torch.tensor(IRIS_COLOURS[eyes]) * float(u(0.7, 1.4)),
        cloth=to_linear(torch.stack([vivid(rng, 0.65) for _ in range(3)])),
        lip_redness=float(u(0.5, 1.1)),
        freckles=float(u(0.3, 1)) if rng.random() < 0.12 and melanin < 0.35 else 0.0,
        age=age,
        blemishes=float(u(0, 1) ** 2),
        makeup=float(u(0.3, 1)) if not man and rng.random() < 0.6 else 0.0,
        beard=beard,
        beard_m=beard_m,
        beard_density=float(u(0.5, 1.0)),
        glasses=("dark" if rng.random() < SUNGLASSES_SHARE else "clear") if wears else "none",
        randomised=randomised,
    )


def _hair_colour(rng: np.random.Generator, melanin: float, age: float) -> Float[Tensor, "3"]:
    fair = int(np.clip(rng.normal(6.2 - 8 * melanin, 2.2), 0, 7)) if melanin < 0.55 else int(rng.integers(0, 3))
    grey = rng.random() < 0.9 * max(0.0, age - 0.35)
    colour = torch.tensor(HAIR_COLOURS[int(rng.integers(8, 10)) if grey else fair])
    return torch.lerp(colour, torch.tensor(HAIR_COLOURS[8]), float(rng.uniform(0, 0.5)) * max(0.0, age - 0.4))


def _beard(rng: np.random.Generator) -> tuple[BeardKind, float]:
    kinds: tuple[BeardKind, ...] = ("none", "stubble", "moustache", "goatee", "short", "full")
    kind = kinds[int(rng.choice(6, p=[0.34, 0.24, 0.06, 0.1, 0.14, 0.12]))]
    lengths = {"moustache": (0.003, 0.006), "goatee": (0.004, 0.014), "short": (0.0025, 0.006), "full": (0.008, 0.028)}
    return kind, float(rng.uniform(*lengths[kind])) if kind in lengths else 0.0
