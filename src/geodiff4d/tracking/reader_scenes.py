"""Training crops for the face reader: rendered faces cut sloppily, mirrored, put elsewhere and photographed badly."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from geodiff4d.render.viewpoints import openhead
from geodiff4d.tracking.degrade import backgrounds, chance, hands, photographed, shapes, uniform
from geodiff4d.tracking.points import choose_points
from geodiff4d.tracking.reader import TARGETS
from geodiff4d.tracking.reader_data import MARGIN, Faces
from geodiff4d.world.expressions import ACTIONS

SHIFT, ZOOM, ROLL_RAD = 0.03, 0.07, math.radians(4)
"""Standard deviations of the cut's error, over the square's side; cut off at three to four of them: 12 %, 20 %, 15°."""
OWN_BACKGROUND, CLEAN = 0.35, 0.25


@dataclass(frozen=True)
class FaceCrops:
    """What the reader is trained on."""

    images: Float[Tensor, "b 3 size size"]
    targets: Float[Tensor, "b targets"]
    """As `reader.TARGETS` orders them."""
    turn: Float[Tensor, "b 3 3"]
    points: Float[Tensor, "b points 2"]
    """In crops."""


@lru_cache
def mirrored_targets() -> tuple[Int[Tensor, " targets"], Float[Tensor, " targets"]]:
    """Return which target, times which sign, each one is in a mirrored picture."""
    other = {"Left": "Right", "Right": "Left"}
    order = []
    for name in ACTIONS:
        side = next((s for s in other if name.endswith(s)), None)
        order.append(ACTIONS.index(name.removesuffix(side) + other[side]) if side else ACTIONS.index(name))
    order += [52, 53, 54, 58, 59, 60, 55, 56, 57]
    sign = torch.ones(TARGETS)
    # A mirror keeps rotations about x and reverses those about y and z.
    sign[[53, 54, 56, 57, 59, 60]] = -1
    return torch.tensor(order), sign


@lru_cache
def mirrored_points(count: int) -> Int[Tensor, " points"]:
    """Return which point is at the place of each one in a mirrored picture: the nearest to its mirror image."""
    place = choose_points(openhead(), count).position
    return torch.cdist(place * torch.tensor([-1.0, 1.0, 1.0]), place).argmin(1)


class FaceScenes:
    """Draws batches; every one is a function of (seed, step) and of the rows that are there."""

    def __init__(self, faces: Faces, seed: int = 0, spare: int = 96):
        self.faces, self.seed = faces, seed
        self.spare = backgrounds(spare, 256, torch.Generator().manual_seed(seed))

    def crops(self, step: int, rows: np.ndarray, size: int) -> FaceCrops:
        """Cut and spoil rows of the store."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        n, taken = len(rows), self.faces.take(rows)
        source = taken["rgb"].shape[-1]
        targets = torch.cat([taken["expr"], taken["jaw"], taken["eyes"]], 1)
        mirror = torch.rand(n, generator=g) < 0.5
        theta = drawn_cut(n, mirror, g)
        both = torch.cat([taken["rgb"], taken["mask"][:, None]], 1).float().div_(255)
        faces = cut(both, theta, size)
        x = self._elsewhere(faces[:, :3], faces[:, 3:], g)
        x = spoiled(x, g)
        order, sign = mirrored_targets()
        targets = torch.where(mirror[:, None], targets[:, order] * sign, targets)
        points = taken["points"] * 2 / source - 1
        placed = torch.einsum("bij,bpj->bpi", torch.linalg.inv(theta[:, :, :2]), points - theta[:, None, :, 2])
        placed = torch.where(mirror[:, None, None], placed[:, mirrored_points(placed.shape[1])], placed)
        return FaceCrops(x, targets, mirrored_turn(taken["turn"], mirror, theta), placed / 2 + 0.5)

    def _elsewhere(self, rgb: Tensor, mask: Tensor, g: torch.Generator) -> Tensor:
        n, size = len(rgb), rgb.shape[-1]
        # Pieces as they are, flipped: resampling them would take as long as cutting the faces.
        room = self.spare.shape[-1] - size + 1
        numbers = len(self.spare), room, room, 2
        choices = torch.cat([torch.randint(k, (n, 1), generator=g) for k in numbers], 1)
        pieces = [self.spare[k, :, y : y + size, x : x + size] for k, y, x, _ in choices.tolist()]
        behind = torch.where(choices[:, 3, None, None, None] > 0, torch.stack(pieces).flip(-1), torch.stack(pieces))
        behind = (behind * uniform(n, 0.4, 1.3, g)).clamp(0, 1)
        mask = torch.maximum(mask, chance(n, OWN_BACKGROUND, g))
        return rgb * mask + behind * (1 - mask)


def drawn_cut(n: int, mirror: Tensor, g: torch.Generator) -> Float[Tensor, "n 2 3"]:
    """Draw the square as a detector might place it: crop coordinates to the stored picture's, both −1 to 1."""
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    zoom = torch.exp(ZOOM * normal(n).clamp(-3, 3)) / MARGIN
    roll = ROLL_RAD * normal(n).clamp(-3.7, 3.7)
    c, s = roll.cos() * zoom, roll.sin() * zoom
    flip = torch.where(mirror, -1.0, 1.0)
    shift = SHIFT * normal(n, 2).clamp(-4, 4) * 2 / MARGIN
    return torch.stack([torch.stack([c * flip, -s, shift[:, 0]], 1), torch.stack([s * flip, c, shift[:, 1]], 1)], 1)


def mirrored_turn(turn: Tensor, mirror: Tensor, theta: Tensor) -> Tensor:
    """Take rotations (head to viewer, y up) into the cut: turned in the plane, then mirrored."""
    a = torch.linalg.inv(theta[:, :, :2])
    a = a / torch.linalg.det(a).abs().sqrt()[:, None, None]
    flip_y = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    plane = torch.eye(3).repeat(len(turn), 1, 1)
    plane[:, :2, :2] = a * flip_y
    out = plane @ turn
    # A mirrored head: its own left and right change places too.
    own = torch.ones(len(turn), 1, 3)
    own[:, 0, 0] = torch.where(mirror, -1.0, 1.0)
    return out * own


def spoiled(x: Float[Tensor, "n 3 size size"], g: torch.Generator) -> Float[Tensor, "n 3 size size"]:
    """Light faces unevenly, put things before some, and pass most through a camera of some quality."""
    n, size = len(x), x.shape[-1]
    field = torch.randn(n, 1, 3, 3, generator=g) * uniform(n, 0, 0.4, g) + 0.06 * torch.randn(n, 3, 3, 3, generator=g)
    x = x * torch.exp(interpolate(field, (size, size), mode="bilinear", align_corners=True))
    _hold_before(x, g)
    clean = torch.rand(n, generator=g) < CLEAN
    rows = (~clean).nonzero()[:, 0]
    if len(rows):
        seen = photographed(x[rows].clamp(0, 1), g)
        x[rows] = seen
    for row in ((torch.rand(n, generator=g) < 0.3) & ~clean).nonzero()[:, 0].tolist():
        # A face of 60 to 190 px in its video.
        small = max(int(size * math.exp(float(torch.rand(1, generator=g)) * math.log(60 / 190))), 8)
        one = interpolate(x[row : row + 1], (small, small), mode="bilinear", antialias=True)
        x[row] = interpolate(one, (size, size), mode="bilinear")[0]
    return x.clamp(0, 1).contiguous(memory_format=torch.channels_last)


def _hold_before(x: Tensor, g: torch.Generator) -> None:
    """Put a hand or an object before some faces, in place."""
    n, size = len(x), x.shape[-1]
    rows = (torch.rand(n, generator=g) < 0.06).nonzero()[:, 0]
    if len(rows):
        skin = torch.tensor([0.75, 0.52, 0.42])[:, None, None] * uniform(len(rows), 0.3, 1.25, g)
        x[rows] = torch.where(hands(len(rows), size, g) > 0, skin, x[rows])
    rows = (torch.rand(n, generator=g) < 0.06).nonzero()[:, 0]
    if len(rows):
        inside, colour = shapes(len(rows), size, g)
        x[rows] = torch.where(inside, colour, x[rows])


def cut(
    x: Float[Tensor, "n c height width"], theta: Float[Tensor, "n 2 3"], size: int
) -> Float[Tensor, "n c size size"]:
    """Resample images at crop coordinates that `theta` takes to theirs, both −1 to 1; edges are repeated."""
    # torch's `affine_grid` multiplies matrices point by point, which takes half as long as the sampling.
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    across, down, at = (theta[:, None, None, :, k] for k in range(3))
    grid = (down * line[:, None, None] + at) + across * line[:, None]
    return grid_sample(x, grid, padding_mode="border", align_corners=False)
