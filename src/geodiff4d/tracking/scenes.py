"""Training pictures for the perception network: rendered people cut, turned and put before other backgrounds."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from geodiff4d.tracking.degrade import backgrounds, chance, hands, photographed, relight, shapes, uniform
from geodiff4d.tracking.network import FINDER_STRIDE
from geodiff4d.tracking.people import People
from geodiff4d.tracking.squares import head_box

HEAD_SCALE = (1.2, 1.9)
"""Side of the wide crops, which are what the finder's squares look like, over the side of the points' box."""
TIGHT_SCALE, TIGHT_SHARE = 1.25, 0.6
"""The same of tight crops, which a first look has put right: upright and centred; and their share."""
CLEAN_SHARE = 0.45
"""Crops that no bad camera spoils."""
EMPTY_SHARE, AWAY_SHARE = 0.07, 0.07
"""Crops from which the person is left out, and crops beside a head: shoulders, hair, a bit of a cheek."""
FINDER_SIZE = 192


@dataclass(frozen=True)
class Crops:
    """What the looker is trained on."""

    images: Float[Tensor, "b 3 size size"]
    points: Float[Tensor, "b points 2"]
    """In crops."""
    foreground: Float[Tensor, "b 1 half half"]
    normal: Float[Tensor, "b 3 half half"]
    """Times the foreground."""
    clear: Float[Tensor, "b 1 half half"]
    """0 where something stands before the person: neither foreground nor normals are asked for there."""
    turn: Float[Tensor, "b 3 3"]
    shape: Float[Tensor, "b shapes"]
    face: Float[Tensor, " b"]
    """1 where there is a face to be seen, 0 where there is not; the rest means nothing there."""


@dataclass(frozen=True)
class Pictures:
    """What the finder is trained on: whole small pictures of nobody, one or a few people."""

    images: Float[Tensor, "b 3 size size"]
    target: Float[Tensor, "b 6 rows columns"]
    """As `Finder.forward`, with 1 for the logit at the cells of a head's centre."""
    ignored: Bool[Tensor, "b rows columns"]
    """Cells beside a centre, where either answer is fine."""


class Scenes:
    """Draws batches; every one is a function of (seed, step)."""

    def __init__(self, people: People, shapes: int, seed: int = 0, spare: int = 192):
        """Draw `spare` backgrounds: drawing them anew for every picture would take as long as the network."""
        self.people, self.shapes, self.seed = people, shapes, seed
        self.spare = backgrounds(spare, 256, torch.Generator().manual_seed(seed))

    def _source(self, rows: np.ndarray) -> Tensor:
        """Premultiplied pictures, normals, and alpha [n, 7, s, s]."""
        order = np.argsort(rows)
        back = np.argsort(order)
        pick = lambda a: torch.from_numpy(a[rows[order]][back])  # noqa: E731
        both = torch.cat([pick(self.people.rgb), pick(self.people.normal)], 1).float().mul_(1 / 127.5).sub_(1)
        # Not torch's norm: over a strided axis it is ten times slower on a CPU.
        alpha = (both[:, 3:4].square() + both[:, 4:5].square() + both[:, 5:].square()).sqrt_()
        alpha = alpha.clamp_(max=1).mul_(alpha > 0.03)
        both[:, 3:] *= alpha > 0
        # On grey: (2 rgb − 1) + α is twice the premultiplied picture.
        both[:, :3] = both[:, :3].add_(alpha).mul_(0.5).clamp_(min=0)
        return torch.cat([both, alpha], 1)

    def _behind(self, n: int, size: int, g: torch.Generator) -> Tensor:
        """Draw backgrounds: some parts of the spare ones, turned and with colours changed."""
        rows = torch.randint(len(self.spare), (n,), generator=g)
        zoom = torch.exp(uniform(n, -1.2, 0.1, g))
        shift = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - zoom[:, 0, 0]).clamp(min=0)
        theta = _similarity(zoom.flatten(), uniform(n, -3, 3, g).flatten(), shift)
        x = grid_sample(
            self.spare[rows], affine_grid(theta, [n, 3, size, size], align_corners=False), padding_mode="reflection",
            align_corners=False,
        )  # fmt: skip
        swap = torch.stack([torch.randperm(3, generator=g) for _ in range(n)])
        x = x.gather(1, swap[:, :, None, None].expand_as(x))
        return (x * uniform(n, 0.5, 1.3, g)).clamp(0, 1)

    def crops(self, step: int, batch: int, size: int, augment: bool = True) -> Crops:
        """Draw crops of heads, a seventh of them without one: nobody there, or some other part of a person."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rng = np.random.default_rng((self.seed, step))
        rows = rng.integers(0, len(self.people), batch)
        image = self._source(rows)
        source = image.shape[-1]
        points, turn = (torch.from_numpy(x[rows]) for x in (self.people.points, self.people.turn))
        away = torch.rand(batch, generator=g) < AWAY_SHARE
        theta, roll = _framed(points, turn, source, away, g)
        cut = _cut(image, theta, size)
        rgb, normal, alpha = cut[:, :3], cut[:, 3:6], cut[:, 6:]
        normal = _turned(normal, roll)
        turn = _roll_matrix(roll) @ turn
        if augment:
            rgb = relight(rgb, normal / alpha.clamp(min=0.05), g)
        there = 1 - chance(batch, EMPTY_SHARE, g)
        rgb, normal, alpha = rgb * there, normal * there, alpha * there
        x = rgb + (1 - alpha) * self._behind(batch, size, g)
        clear = torch.ones_like(alpha)
        if augment:
            x, clear = self._covered(x, g)
            x = torch.where(chance(batch, CLEAN_SHARE, g) > 0, x, photographed(x, g))
        half = lambda v: interpolate(v, scale_factor=0.5, mode="area")  # noqa: E731
        placed = torch.einsum(
            "bij,bpj->bpi", torch.linalg.inv(theta[:, :, :2]), points * 2 / source - 1 - theta[:, None, :, 2]
        )
        return Crops(
            x.contiguous(memory_format=torch.channels_last), placed / 2 + 0.5, half(alpha), half(normal), half(clear),
            turn, torch.from_numpy(self.people.shape[rows])[:, : self.shapes], there.flatten() * ~away,
        )  # fmt: skip

    def _covered(self, x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Put a hand or an object before some of the people."""
        n, size = len(x), x.shape[-1]
        held, thing = torch.zeros(2, n, 1, size, size)
        rows = (torch.rand(n, generator=g) < 0.1).nonzero()[:, 0]
        if len(rows):
            held[rows] = hands(len(rows), size, g)
            skin = torch.tensor([0.75, 0.52, 0.42])[:, None, None] * uniform(len(rows), 0.3, 1.25, g)
            skin = skin * (0.8 + 0.3 * self._behind(len(rows), size, g))
            x[rows] = torch.where(held[rows] > 0, skin, x[rows])
        rows = (torch.rand(n, generator=g) < 0.08).nonzero()[:, 0]
        if len(rows):
            inside, colour = shapes(len(rows), size, g)
            thing[rows] = inside.float()
            x[rows] = torch.where(inside, colour, x[rows])
        return x, (1 - held) * (1 - thing)

    def pictures(self, step: int, batch: int) -> Pictures:
        """Draw whole pictures: a fifth without a face, a fifth with two."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 500_000_000)
        rng = np.random.default_rng((self.seed, step, 1))
        size, cells = FINDER_SIZE, FINDER_SIZE // FINDER_STRIDE
        x = self._behind(batch, size, g)
        target, ignored = torch.zeros(batch, 6, cells, cells), torch.zeros(batch, cells, cells, dtype=torch.bool)
        count = torch.from_numpy(rng.choice([0, 1, 2], batch, p=[0.2, 0.6, 0.2]))
        for k in range(2):
            some = (count > k).nonzero()[:, 0]
            if len(some):
                x[some] = self._joined(x[some], target, ignored, some, k, g, rng)
        return Pictures(photographed(x, g).contiguous(memory_format=torch.channels_last), target, ignored)

    def _joined(
        self, x: Tensor, target: Tensor, ignored: Tensor, some: Tensor, k: int, g: torch.Generator,
        rng: np.random.Generator,
    ) -> Tensor:  # fmt: skip
        """Put one more person into pictures x (rows `some` of the targets, which are changed in place)."""
        n, size = len(x), FINDER_SIZE
        rows = rng.integers(0, len(self.people), n)
        image = self._source(rows)
        source = image.shape[-1]
        centre, side = head_box(torch.from_numpy(self.people.points[rows]))
        want = torch.exp(uniform(n, math.log(18), math.log(150 if k == 0 else 50), g).flatten())
        any_way = uniform(n, -3.1, 3.1, g)
        roll = torch.where(chance(n, 0.15, g) > 0, any_way, 0.3 * torch.randn(n, 1, 1, 1, generator=g)).flatten()
        place = torch.rand(n, 2, generator=g) * (size - want[:, None] * 0.8) + want[:, None] * 0.4
        # Picture pixels to source pixels: about the head's centre, turned and scaled.
        zoom = side / want
        R = _roll_matrix(roll)[:, :2, :2]
        middle = centre + torch.einsum("bij,bj->bi", R, size / 2 - place) * zoom[:, None]
        theta = torch.cat([R * (zoom * size / source)[:, None, None], (middle * 2 / source - 1)[:, :, None]], 2)
        cut = _cut(image, theta, size, border=False)
        rgb, a = relight(cut[:, :3], cut[:, 3:6], g), cut[:, 6:]
        there = torch.ones(n, dtype=torch.bool)
        if k:
            there = _apart(target[some], place, want)
            a, rgb = a * there[:, None, None, None], rgb * there[:, None, None, None]
        for row in there.nonzero()[:, 0].tolist():
            _mark(target[some[row]], ignored[some[row]], place[row] / FINDER_STRIDE, float(want[row]), float(roll[row]))
        return rgb + (1 - a) * x


def _framed(
    points: Tensor, turn: Tensor, size: int, away: Bool[Tensor, " n"], g: torch.Generator
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw crops of heads, or beside them, in pictures of a size: (theta as `_cut` takes it, roll [rad])."""
    n = len(points)
    tight = torch.rand(n, generator=g) < TIGHT_SHARE
    low, high = (math.log(s) for s in HEAD_SCALE)
    scale = torch.exp(uniform(n, low, high, g).flatten())
    scale = torch.where(tight, TIGHT_SCALE * torch.exp(0.05 * torch.randn(n, generator=g).clamp(-2, 2)), scale)
    roll, shift = torch.randn(n, generator=g).clamp(-2.5, 2.5), torch.randn(n, 2, generator=g).clamp(-2, 2)
    upright = torch.atan2(turn[:, 0, 1], turn[:, 1, 1])
    roll = torch.where(tight, upright + 0.07 * roll, 0.25 * roll)
    R = _roll_matrix(roll)[:, :2, :2]
    centre, side = head_box(points @ R)
    shift = shift * torch.where(tight, 0.025, 0.06)[:, None]
    # Beside a head: its centre is just outside the crop.
    outside = scale / 2 + 0.1 + 0.5 * torch.rand(n, generator=g)
    shift = torch.where(away[:, None], torch.nn.functional.normalize(shift, dim=1) * outside[:, None], shift)
    centre = centre + shift * side[:, None]
    middle = torch.einsum("nij,nj->ni", R, centre) * 2 / size - 1
    return _similarity(side * scale / size, roll, middle), roll


def _apart(target: Tensor, place: Tensor, want: Tensor) -> Bool[Tensor, " n"]:
    """Say where a second person would not hide the first."""
    keep = torch.ones(len(target), dtype=torch.bool)
    for i, one in enumerate(target):
        at = one[0].nonzero()
        if len(at):
            first = (at[0].flip(0) + 0.5) * FINDER_STRIDE
            side = 64 * one[3, at[0, 0], at[0, 1]].exp()
            keep[i] = bool((first - place[i]).norm() > 0.72 * (side + want[i]))
    return keep


def _mark(
    target: Float[Tensor, "6 rows columns"], ignored: Bool[Tensor, "rows columns"], place: Float[Tensor, "2"],
    side: float, roll: float,
) -> None:  # fmt: skip
    """Write a head into one picture's target, in place; `place` is in cells, `side` in pixels."""
    cells = target.shape[-1]
    cx, cy = place.tolist()
    column, row = min(max(int(cx), 0), cells - 1), min(max(int(cy), 0), cells - 1)
    ignored[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
    # Every cell whose centre is within a fifth of the head is a centre too: large heads are easier to learn so.
    reach = 0.2 * side / FINDER_STRIDE
    for r in range(max(int(cy - reach), 0), min(int(cy + reach) + 1, cells)):
        for c in range(max(int(cx - reach), 0), min(int(cx + reach) + 1, cells)):
            if (r, c) != (row, column) and math.hypot(r + 0.5 - cy, c + 0.5 - cx) > reach:
                continue
            offset = [cx - c - 0.5, cy - r - 0.5]
            target[:, r, c] = torch.tensor([1.0, *offset, math.log(side / 64), math.cos(roll), math.sin(roll)])
            ignored[r, c] = False


def _similarity(scale: Tensor, roll: Tensor, centre: Tensor) -> Float[Tensor, "n 2 3"]:
    """Crop coordinates to the source's, both −1 to 1; the crop is turned by `roll` (clockwise as seen)."""
    return torch.cat([_roll_matrix(roll)[:, :2, :2] * scale[:, None, None], centre[:, :, None]], 2)


def _roll_matrix(roll: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rotation of image directions (x right, y down) by `roll`, as a 3 × 3 matrix."""
    c, s, o = roll.cos(), roll.sin(), torch.zeros_like(roll)
    return torch.stack([c, -s, o, s, c, o, o, o, torch.ones_like(o)], -1).unflatten(-1, (3, 3))


def _cut(x: Tensor, theta: Tensor, size: int, border: bool = True) -> Tensor:
    """Resample source images; a person's lower edge goes on downward, as shoulders do."""
    grid = affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    return grid_sample(x, grid, padding_mode="border" if border else "zeros", align_corners=False)


def _turned(normal: Float[Tensor, "n 3 h w"], roll: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Take normals (y up) into a crop that is turned by `roll`."""
    c, s = roll.cos()[:, None, None], roll.sin()[:, None, None]
    x, y, z = normal.unbind(1)
    return torch.stack([c * x - s * y, s * x + c * y, z], 1)
