"""A torso for heads that end at the shoulders: a plain surface that what a portrait shows below the chin lies on.

A head's mesh has a stub of a bust. Clothes beyond it have no depth of their own, and a sheet at the depth of the
nearest outline is another one from every view: a shoulder carried to a turned view and back would not come home. The
surface is fixed to the head's root instead, continues the stub's front, falls back to both sides as shoulders do, and
comes forward below as a chest does. Ours; measured in docs/LOG.md.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.geometry import transform
from geodiff4d.heads.rig import Head

STUB_M = 0.1
"""Height of a template's lowest part, in which its shoulders are looked for [m]."""
SIDE_SLOPE = 0.5
"""How far the surface falls back a metre to the side, far out."""
CHEST_SLOPE = 0.8
"""How far it comes forward a metre below the shoulders."""
CHEST_M = 0.06
"""How far it comes forward at most [m]."""
FADE_M = (0.04, -0.02)
"""Heights above the shoulders between which the surface takes over from the outlines' depth [m]."""
REACH_M = 0.25
"""Distance to either side of a first depth within which a ray may meet the surface [m]."""
RAY_STEPS = 65


@dataclass(frozen=True)
class Torso:
    """The surface z = front + chest(y) − side(x) in a head's rest frame (x to its left, y up, z forward)."""

    shoulders_y: float
    """Height at which the template is widest [m]."""
    half_width: float
    """Half of its width there [m]."""
    front: float
    """How far forward it is in the middle there [m]."""

    def behind(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
        """Return how far points lie behind the surface [m], negative before it."""
        x, y, z = points.unbind(-1)
        c = self.half_width / 4
        side = (SIDE_SLOPE**2 * x.square() + c**2).sqrt() - c
        chest = (CHEST_SLOPE * (self.shoulders_y - y)).clamp(0, CHEST_M)
        return self.front + chest - side - z


def torso(head: Head) -> Torso:
    """Return the torso that continues a head's template."""
    stub = head.template[head.template[:, 1] < head.template[:, 1].min() + STUB_M]
    widest = stub[stub[:, 0].abs().argmax()]
    level = stub[(stub[:, 1] - widest[1]).abs() < STUB_M / 5]
    middle = level[level[:, 0].abs() < widest[0].abs() / 4]
    return Torso(float(widest[1]), float(widest[0].abs()), float(middle[:, 2].max()))


def on_torso(
    torso: Torso, T_root_world: Float[Tensor, "4 4"], eye: Float[Tensor, "3"], rays: Float[Tensor, "points 3"],
    depth: Float[Tensor, " points"],
) -> Float[Tensor, " points"]:  # fmt: skip
    """Move points that lie below the shoulders along their rays to the surface, or as near it as the ray comes.

    Args:
        T_root_world: from the world to the rest frame of the head's root.
        eye: the camera's centre in the world [m].
        rays: directions in the world whose unit is a metre of depth.
        depth: where each point is now [m].

    Returns:
        The depths [m].
    """
    steps = torch.linspace(-REACH_M, REACH_M, RAY_STEPS, device=depth.device)
    tried = depth[:, None] + steps
    points = eye + tried[..., None] * rays[:, None]
    behind = torso.behind(transform(T_root_world, points.flatten(0, 1))).view_as(tried)
    # The first crossing from the front; a ray that passes the torso by stays where it comes nearest.
    crossed = (behind[:, 1:] >= 0) & (behind[:, :-1] < 0)
    first = crossed.float().argmax(1)
    rows = torch.arange(len(depth), device=depth.device)
    before, after = behind[rows, first], behind[rows, first + 1]
    met = tried[rows, first] + (tried[rows, first + 1] - tried[rows, first]) * (before / (before - after))
    near = tried[rows, behind.abs().argmin(1)]
    found = torch.where(crossed.any(1), met, near)
    height = transform(T_root_world, eye + found[:, None] * rays)[:, 1] - torso.shoulders_y
    share = ((FADE_M[0] - height) / (FADE_M[0] - FADE_M[1])).clamp(0, 1)
    return depth + share.square() * (3 - 2 * share) * (found - depth)
