"""Training pictures for `person.py`: people who were cut out, put before real and made-up backgrounds."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from geodiff4d.tracking.cutouts import Cutouts
from geodiff4d.tracking.degrade import backgrounds, chance, photographed, uniform

REAL, ROOM = 0.45, 0.25
"""Shares of backgrounds that are pieces of photographs, and made-up rooms; the rest are `degrade.backgrounds`."""
BYSTANDER = 0.1
"""Share of pictures with somebody else beside the person."""
ALIKE = 0.35
"""Share of backgrounds that take a colour of the person's: hair before a wooden door."""
HAIRS = 0.6
"""Share of those colours that are taken beside the tracked head: its hair's, or its clothes'."""
DOOR = 0.25
"""Share of pictures with a door or a cupboard of such a colour behind the head, upright beside it as long hair is."""
BEYOND = 0.3
"""Share of pictures that end within the crop, whose edges are repeated beyond."""
CLEAN = 0.4
"""Share of pictures that no bad camera spoils."""
ZOOM, TURN, SHIFT = (0.82, 1.15), 0.06, 0.04
"""How crops differ from the tracker's: their size, turn [rad] and place, over half their side."""
OFF = 0.015
"""How far the silhouettes are off, as a tracker's are, over half the side."""


@dataclass(frozen=True)
class PersonCrops:
    """A batch."""

    images: Float[Tensor, "b 3 size size"]
    heads: Float[Tensor, "b 2 size size"]
    """Silhouettes of the whole tracked mesh and of the head alone."""
    alpha: Float[Tensor, "b 1 size size"]
    shown: Float[Tensor, "b 1 size size"]
    """0 beyond a picture that ends within the crop: nothing is asked for there."""


class PersonScenes:
    """Draws batches; every one is a function of (seed, step)."""

    def __init__(self, cutouts: Cutouts, size: int, seed: int = 0, spare: int = 192):
        """Make up `spare` backgrounds: making them anew for every picture would take as long as the network."""
        g = torch.Generator().manual_seed(seed)
        self.cutouts, self.size, self.seed = cutouts, size, seed
        self.made = backgrounds(max(spare // 2, 1), size, g)
        self.rooms = rooms(max(spare // 2, 1), size, g)

    def crops(self, step: int, batch: int) -> PersonCrops:
        """Draw people in crops that are a little off, each before some background."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        colour, alpha, heads = self._people(batch, g)
        behind = self._behind(batch, g)
        # Beside the head is mostly hair, of which a door has to be told.
        own = torch.where(chance(batch, HAIRS, g) > 0, alpha * (1 - heads[:, :1]), alpha)
        behind = torch.where(chance(batch, ALIKE, g) > 0, recoloured(behind, colour, own, g), behind)
        room = recoloured(self.rooms[torch.randint(len(self.rooms), (batch,), generator=g)], colour, own, g)
        behind = torch.where(_panel(batch, self.size, g) * chance(batch, DOOR, g) > 0, room, behind)
        behind = self._bystanders(behind, g)
        colour = (
            colour * torch.exp(uniform(batch, -0.5, 0.25, g)) * (1 + 0.06 * torch.randn(batch, 3, 1, 1, generator=g))
        )
        images = (colour + (1 - alpha) * behind).clamp(0, 1)
        images = torch.where(chance(batch, CLEAN, g) > 0, images, photographed(images, g))
        images, shown = _ended(images, chance(batch, BEYOND, g), g)
        return PersonCrops(images.contiguous(memory_format=torch.channels_last), heads, alpha, shown)

    def _people(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw people: colour times alpha, alpha, silhouettes."""
        rows = torch.randint(len(self.cutouts), (n,), generator=g)
        parts = [x[rows].float() / 255 for x in (self.cutouts.colour, self.cutouts.alpha, self.cutouts.heads)]
        theta = _frames(n, g)
        # A person goes on below the crop.
        person = grid_sample(
            torch.cat(parts[:2], 1), _grid(theta, self.size), padding_mode="border", align_corners=False
        )
        theta[:, :, 2] += OFF * torch.randn(n, 2, generator=g)
        theta[:, :, :2] *= 1 + OFF * torch.randn(n, 1, 1, generator=g)
        heads = grid_sample(parts[2], _grid(theta, self.size), padding_mode="border", align_corners=False)
        return person[:, :3], person[:, 3:], (heads > 0.5).float()

    def _behind(self, n: int, g: torch.Generator) -> Tensor:
        """Draw backgrounds: parts of real and of made-up ones, turned, blurred, and with colours changed."""
        kind = torch.rand(n, generator=g)
        made = self.made[torch.randint(len(self.made), (n,), generator=g)]
        room = self.rooms[torch.randint(len(self.rooms), (n,), generator=g)]
        x = torch.where((kind < REAL + ROOM)[:, None, None, None], room, made)
        if len(self.cutouts.behind):
            rows = torch.randint(len(self.cutouts.behind), (n,), generator=g)
            real = self.cutouts.behind[rows].float() / 255
            x = torch.where((kind < REAL)[:, None, None, None], real, x)
        zoom = torch.exp(uniform(n, -1.0, 0.0, g)).flatten()
        mirrored = 1 - 2 * chance(n, 0.5, g).flatten()
        angle = 0.1 * torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.5)
        place = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - zoom)[:, None]
        theta = _similarity(zoom, mirrored, angle, place)
        x = grid_sample(x, _grid(theta, self.size), padding_mode="reflection", align_corners=False)
        blurred = (torch.rand(n, generator=g) < 0.4).nonzero()[:, 0]
        if len(blurred):
            x[blurred] = _soft(x[blurred], int(torch.randint(1, max(self.size // 16, 2), (1,), generator=g)))
        swap = torch.stack([torch.randperm(3, generator=g) for _ in range(n)])
        swapped = x.gather(1, swap[:, :, None, None].expand_as(x))
        x = torch.where(chance(n, 0.3, g) > 0, swapped, x)
        return (x * uniform(n, 0.4, 1.3, g)).clamp(0, 1)

    def _bystanders(self, behind: Tensor, g: torch.Generator) -> Tensor:
        """Put somebody beside some people, in their backgrounds."""
        rows = (torch.rand(len(behind), generator=g) < BYSTANDER).nonzero()[:, 0]
        if not len(rows):
            return behind
        n = len(rows)
        who = torch.randint(len(self.cutouts), (n,), generator=g)
        person = torch.cat([self.cutouts.colour[who], self.cutouts.alpha[who]], 1).float() / 255
        zoom, side = _drawn(n, 0.8, 2.0, g), 1 - 2 * chance(n, 0.5, g).flatten()
        # In the other's own frame: the crop's centre lies so far beside them.
        place = torch.stack(
            [side * (0.7 + 0.5 * torch.rand(n, generator=g)) * zoom, uniform(n, -0.4, 0.3, g).flatten()], 1
        )
        cut = grid_sample(
            person, _grid(_similarity(zoom, torch.ones(n), torch.zeros(n), place), self.size), align_corners=False
        )
        out = behind.clone()
        out[rows] = cut[:, :3] + (1 - cut[:, 3:]) * behind[rows]
        return out


def rooms(n: int, size: int, g: torch.Generator) -> Float[Tensor, "n 3 size size"]:
    """Draw made-up walls, doors, shelves and panels: patches between upright and level lines, with grain."""
    out = torch.rand(n, 3, 1, 1, generator=g).expand(n, 3, size, size).clone()
    for count in (3, 7, 12):
        columns, rows = (_stripes(n, count, size, g) for _ in range(2))
        patch = columns[:, :, None, :] * torch.where(chance(n, 0.4, g) > 0, 1.0, rows[:, :, :, None])
        amount = uniform(n, 0, 0.35, g)
        out = out + amount * (patch - patch.mean((2, 3), keepdim=True))
    upright, level = (torch.randn(n, 1, *shape, generator=g) for shape in ((6, size // 2), (size // 2, 6)))
    grain = [interpolate(x, (size, size), mode="bilinear") * uniform(n, 0, 0.08, g) for x in (upright, level)]
    cloud = interpolate(torch.randn(n, 3, 5, 5, generator=g), (size, size), mode="bicubic") * uniform(n, 0, 0.1, g)
    return (out + grain[0] * chance(n, 0.5, g) + grain[1] * chance(n, 0.3, g) + cloud).clamp(0, 1)


def _panel(n: int, size: int, g: torch.Generator) -> Float[Tensor, "n 1 size size"]:
    """Draw an upright rectangle each, most of them behind a head in the middle and wider than it."""
    line = torch.linspace(-1, 1, size)
    left, right = (uniform(n, -1.0, -0.15, g), uniform(n, 0.15, 1.0, g))
    top, bottom = (uniform(n, -1.3, -0.2, g), uniform(n, 0.4, 1.6, g))
    across = ((line > left) & (line < right)).float()
    return across * ((line[:, None] > top) & (line[:, None] < bottom)).float()


def _stripes(n: int, count: int, size: int, g: torch.Generator) -> Float[Tensor, "n 3 size"]:
    """Draw piecewise constant functions of one coordinate, -1 to 1, some of them regular."""
    edges = torch.rand(n, count, generator=g).sort(1).values
    even = (torch.arange(count)[None] + torch.rand(n, 1, generator=g)) / count
    edges = torch.where(torch.rand(n, 1, generator=g) < 0.4, even, edges)
    values = torch.randn(n, 3, count + 1, generator=g) * 0.4 + torch.randn(n, 1, count + 1, generator=g) * 0.6
    keep = torch.rand(n, 1, count + 1, generator=g) < 0.7
    values = torch.where(keep, values, values[:, :, :1]).clamp(-1, 1)
    x = torch.linspace(0, 1, size).expand(n, size).contiguous()
    which = torch.searchsorted(edges.contiguous(), x)
    return values.gather(2, which[:, None].expand(n, 3, size))


def recoloured(
    behind: Float[Tensor, "n 3 h w"], colour: Float[Tensor, "n 3 h w"], alpha: Float[Tensor, "n 1 h w"],
    g: torch.Generator,
) -> Float[Tensor, "n 3 h w"]:  # fmt: skip
    """Give backgrounds the colour that some place of the person has."""
    n = len(behind)
    chosen = (alpha > 0.9).flatten(1).float() + 1e-6
    place = torch.multinomial(chosen, 1, generator=g)[:, :, None].expand(n, 3, 1)
    own = colour.flatten(2).gather(2, place)[..., None]
    mean = behind.mean((2, 3), keepdim=True)
    return (own + (behind - mean) * uniform(n, 0.15, 1.0, g)).clamp(0, 1)


def _ended(
    images: Float[Tensor, "n 3 size size"], which: Float[Tensor, "n 1 1 1"], g: torch.Generator
) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 1 size size"]]:
    """Let some pictures end on some sides before the crop does, and repeat their edges; say what is shown."""
    n, _, size, _ = images.shape
    ends = 1 - 0.45 * torch.rand(n, 4, generator=g) * (torch.rand(n, 4, generator=g) < 0.6)
    ends = torch.where(which[:, :, 0, 0] > 0, ends, 1.0)[:, :, None]
    line = (torch.arange(size) * 2 + 1) / size - 1
    x, y = (torch.minimum(torch.maximum(line, -ends[:, k]), ends[:, k + 1]) for k in (0, 2))
    grid = torch.stack([x[:, None].expand(n, size, size), y[:, :, None].expand(n, size, size)], -1)
    inside = (x == line)[:, None, None] & (y == line)[:, None, :, None]
    return grid_sample(images, grid, padding_mode="border", align_corners=False), inside.float()


def _frames(n: int, g: torch.Generator) -> Float[Tensor, "n 2 3"]:
    """Draw the crops' frames in the tracker's: a little off, half of them mirrored."""
    zoom = torch.exp(uniform(n, math.log(ZOOM[0]), math.log(ZOOM[1]), g)).flatten()
    angle, place = TURN * torch.randn(n, generator=g), SHIFT * torch.randn(n, 2, generator=g)
    return _similarity(zoom, 1 - 2 * chance(n, 0.5, g).flatten(), angle, place)


def _similarity(
    zoom: Float[Tensor, " n"], mirrored: Float[Tensor, " n"], angle: Float[Tensor, " n"], place: Float[Tensor, "n 2"]
) -> Float[Tensor, "n 2 3"]:
    c, s = angle.cos() * zoom, angle.sin() * zoom
    return torch.stack(
        [torch.stack([c * mirrored, -s, place[:, 0]], 1), torch.stack([s * mirrored, c, place[:, 1]], 1)], 1
    )


def _drawn(n: int, low: float, high: float, g: torch.Generator) -> Float[Tensor, " n"]:
    return uniform(n, low, high, g).flatten()


def _grid(theta: Float[Tensor, "n 2 3"], size: int) -> Tensor:
    return affine_grid(theta, [len(theta), 1, size, size], align_corners=False)


def _soft(x: Float[Tensor, "n 3 size size"], width: int) -> Float[Tensor, "n 3 size size"]:
    """Blur by shrinking and growing: a filter of this width would take as long as the network."""
    size = x.shape[-1]
    return interpolate(interpolate(x, (size // width,) * 2, mode="area"), (size, size), mode="bicubic").clamp(0, 1)
