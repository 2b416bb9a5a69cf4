"""Squares around heads in an image, turned with them, and their crops."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from geodiff4d.render.crops import crop_image


@dataclass(frozen=True)
class HeadSquare:
    """The square around a head's points, turned with the head; x and y are its centre [px]."""

    x: float
    y: float
    side: float
    """Side of the square [px]."""
    roll: float
    """Rotation from the image's axes to the head's, clockwise as seen [rad]."""
    score: float = 0.0
    """Logit of the square showing a face."""

    def grown(self, scale: float) -> "HeadSquare":
        """Return the square with its side scaled about its centre."""
        return HeadSquare(self.x, self.y, self.side * scale, self.roll, self.score)

    def to_image(self, points: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """Return points of the square, (0, 0) to (1, 1), in pixels of the image."""
        return (points - 0.5) @ plane_turn(self.roll).mT * self.side + torch.tensor([self.x, self.y])


def head_box(points: Float[Tensor, "*batch points 2"]) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"]]:
    """Return centre and longer side of the points' box."""
    low, high = points.amin(-2), points.amax(-2)
    return (low + high) / 2, (high - low).amax(-1)


def distinct(squares: list[HeadSquare]) -> list[HeadSquare]:
    """Return the squares sorted by score, without those that overlap a better one."""
    kept: list[HeadSquare] = []
    for s in sorted(squares, key=lambda s: -s.score):
        if all(((s.x - k.x) ** 2 + (s.y - k.y) ** 2) ** 0.5 > 0.5 * max(s.side, k.side) for k in kept):
            kept.append(s)
    return kept


def cut_square(
    image: Float[Tensor, "channels height width"], square: HeadSquare, size: int
) -> Float[Tensor, "channels size size"]:
    """Return a turned square of an image, resampled to `size`² pixels, antialiased; the border is repeated outside."""
    reach = abs(torch.tensor(square.roll).cos()) + abs(torch.tensor(square.roll).sin())
    bound = square.side * float(reach)
    left, top = square.x - bound / 2, square.y - bound / 2
    height, width = image.shape[1:]
    # What lies far away costs time only; one pixel of border is enough for edges to be repeated.
    x0, y0 = (int(min(max(v - 2, 0), n - 1)) for v, n in ((left, width), (top, height)))
    x1, y1 = (int(min(max(v + bound + 3, 1), n)) for v, n in ((left, width), (top, height)))
    part = image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    box = (left - x0, top - y0, bound)
    if abs(square.roll) < 1e-3:
        return crop_image(part, box, size)
    whole = crop_image(part, box, max(round(size * float(reach)), 1))
    theta = torch.cat([plane_turn(square.roll) * square.side / bound, torch.zeros(2, 1)], 1)
    grid = affine_grid(theta[None], [1, len(image), size, size], align_corners=False)
    return grid_sample(whole[None], grid, padding_mode="border", align_corners=False)[0]


def plane_turn(roll: float) -> Float[Tensor, "2 2"]:
    """Return the rotation of image directions (x right, y down) by `roll`, clockwise as seen [rad]."""
    c, s = torch.tensor(roll).cos(), torch.tensor(roll).sin()
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
