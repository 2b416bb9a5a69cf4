"""The embedded detector: the perception network over whole photographs and videos.

`Finder` runs on the image at a few sizes. `Looker` runs on two upright crops of each head that was found: a wide one
for the foreground, the normals and a better crop, then a tight one for the points. In a video the crop comes from the
last frame's head, and the finder runs again when the face is lost.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, normalize, pad

from geodiff4d.core.workers import in_threads
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.face_square import shows_features
from geodiff4d.tracking.network import FINDER_STRIDE, Look, Perception, shipped_perception
from geodiff4d.tracking.reader import FaceReader, face_crop, shipped_reader
from geodiff4d.tracking.squares import HeadSquare, cut_square, distinct, head_box, plane_turn

FINDER_SIDES = (192, 384, 768)
"""Longer sides of the images that the finder runs on [px]; the last only where the others show no face."""
FINDER_LOGIT, CANDIDATES = -2.5, 6
"""Logit above which a cell is a candidate, and the number of candidates; `Looker` decides among them."""
LOOKS = 3
"""Number of passes over the candidates, each on crops that the last one corrected, before none is a face."""
FACE_LOGIT, DOUBT = 3.0, 0.045
"""A crop shows a face if its logit is above the first, and the points' median σ over the head's side below the second:
without a face, the points are uncertain."""
WIDE, TIGHT = 1.75, 1.25
"""Side of the crops over the side of the points' box."""
MOVED = 0.06
"""How far a head may have moved (over its side), grown (logarithm) or tilted [rad] since its square was found."""
TIGHT_TRUST = 0.7
"""Weight of the tight crop's mask and normals where the crops overlap."""


@dataclass(frozen=True)
class EmbeddedDetector:
    """Points with uncertainty, foreground and normals by the network that ships with the package.

    Example:
        >>> [detection] = EmbeddedDetector().detect([image])  # doctest: +SKIP
        >>> detection.points.shape  # doctest: +SKIP
        torch.Size([192, 2])
    """

    model: Perception = field(default_factory=shipped_perception)
    threshold: float = FACE_LOGIT
    """Logit above which a crop shows a face (`FACE_LOGIT`)."""
    doubt: float = DOUBT
    """Median σ of the points, over the head's side, above which it does not (`DOUBT`)."""
    reader: FaceReader | None = field(default_factory=shipped_reader)
    """Reads expression and gaze off the face at the image's own resolution; None leaves them to the points."""
    dense: bool = True
    """Whether a detection has mask and normals. Without them one look at a face that has hardly moved is enough."""

    def detect(
        self, images: Iterable[Float[Tensor, "3 _height _width"]], video: bool = False
    ) -> list[Detection | None]:
        """Return each image's largest face, or None; in a video the face that was found first is followed."""
        if not video:
            return [self.photo(image) for image in images]
        return list(in_threads(self._completed, self._followed(images)))

    @torch.no_grad()
    def photo(self, image: Float[Tensor, "3 height width"]) -> Detection | None:
        """Return the largest face of one image, or None."""
        return self._completed(self._largest(image))

    def follow(self, images: Iterable[Float[Tensor, "3 _height _width"]]) -> Iterator[Detection | None]:
        """Yield one person's face in consecutive frames, None where it is lost; frames are taken one at a time."""
        return map(self._completed, self._followed(images))

    def _followed(self, images: Iterable[Tensor]) -> "Iterator[_Found | None]":
        last: _Found | None = None
        for image in images:
            at = None if last is None else last.detection.square
            found = None if last is None or at is None else self._found(image, at, last.detection.faces)
            last = self._largest(image) if found is None else found
            yield last

    def _largest(self, image: Tensor) -> "_Found | None":
        faces = self.faces(image)
        return None if not faces else self._found(image, faces[0], len(faces))

    @torch.no_grad()
    def faces(self, image: Float[Tensor, "3 height width"]) -> list[HeadSquare]:
        """Return the squares of all faces, the largest first."""
        for sides in (FINDER_SIDES[:2], FINDER_SIDES[2:]):
            candidates = distinct([s for side in sides for s in self._find(image, side)])[:CANDIDATES]
            for _ in range(LOOKS):
                looked = self._looks(image, candidates, 1.5)
                faces = distinct([square for square, look in looked if self._sees_face(look)])
                if faces:
                    return sorted(faces, key=lambda s: -s.side)
                candidates = [square for square, _ in looked]
        return []

    def _sees_face(self, look: Look) -> bool:
        _, side = head_box(look.points[0])
        return float(look.score) > self.threshold and float(look.log_sigma[0].exp().median()) < self.doubt * float(side)

    def _find(self, image: Tensor, side: int) -> list[HeadSquare]:
        height, width = image.shape[1:]
        scale = side / max(height, width)
        # Larger than twice they only blur; but a small picture is searched once.
        if scale > 2 and side != FINDER_SIDES[0]:
            return []
        size = [max(round(height * scale), FINDER_STRIDE), max(round(width * scale), FINDER_STRIDE)]
        small = interpolate(image[None], size=size, mode="bilinear", antialias=True)
        fill = [(-s) % FINDER_STRIDE for s in size]
        # Half a side of grey all around lets heads be found that the border cuts.
        out = self.model.find(pad(small, (32, 32 + fill[1], 32, 32 + fill[0]), value=0.5))[0]
        rows, columns = (out[0] > FINDER_LOGIT).nonzero(as_tuple=True)
        values = out[:, rows, columns]
        x = ((columns + 0.5 + values[1]) * FINDER_STRIDE - 32) / scale
        y = ((rows + 0.5 + values[2]) * FINDER_STRIDE - 32) / scale
        sides = 64 * values[3].exp() / scale
        roll = -torch.atan2(values[5], values[4])
        return [HeadSquare(*map(float, row)) for row in zip(x, y, sides, roll, values[0], strict=True)]

    def _looks(self, image: Tensor, squares: list[HeadSquare], scale: float) -> list[tuple[HeadSquare, Look]]:
        """Look at squares, grown; returns each again as the look corrects it."""
        if not squares:
            return []
        crops = torch.stack([cut_square(image, s.grown(scale), self.model.config.size) for s in squares])
        looks = self.model.look(crops.contiguous(memory_format=torch.channels_last))
        each = [Look(*(getattr(looks, f.name)[i : i + 1] for f in fields(Look))) for i in range(len(squares))]
        return [(_corrected(s, scale, look), look) for s, look in zip(squares, each, strict=True)]

    @torch.no_grad()
    def _found(self, image: Tensor, square: HeadSquare, faces: int) -> "_Found | None":
        wide = square.grown(WIDE)
        [(corrected, first)] = self._looks(image, [square], WIDE if self.dense else TIGHT)
        if not self._sees_face(first):
            return None
        look, after = first, corrected
        if self.dense or _moved(square, corrected):
            square = corrected
            [(after, look)] = self._looks(image, [square], TIGHT)
        tight = square.grown(TIGHT)
        points = tight.to_image(look.points[0])
        found = Detection(
            points, self.model.points.index, float(first.score[0].sigmoid()),
            torch.cat([points.amin(0), points.amax(0)]), faces, sigma=look.log_sigma[0].exp() * tight.side,
            square=after, turn=_untilted(look.rotation[0], tight.roll), shape=look.shape[0], markup=self.model.points,
        )  # fmt: skip
        return _Found(image, found, (first.dense, wide, look.dense, tight))

    @torch.no_grad()
    def _completed(self, seen: "_Found | None") -> Detection | None:
        """Add what the next frame need not wait for: mask and normals, and what the reader reads."""
        if seen is None:
            return None
        found, image = seen.detection, seen.image
        if self.dense:
            box, dense = _upright(*seen.looks)
            found = replace(found, mask=dense[:1].half(), normal=dense[1:].half(), extent=box)
        # A perception network of the user's may know other points.
        if self.reader is None or not shows_features(found.index):
            return found
        crop = face_crop(image, found, self.reader.config.size)
        return replace(found, reading=self.reader.read(crop[None]))


@dataclass(frozen=True)
class _Found:
    """A face that is found, and not read yet."""

    image: Tensor
    detection: Detection
    looks: tuple[Tensor, HeadSquare, Tensor, HeadSquare]
    """Mask and normals of the wide and of the tight look, each with its square."""


def _moved(a: HeadSquare, b: HeadSquare) -> bool:
    """Whether a head is elsewhere, by more than the look at it forgives."""
    off = math.hypot(b.x - a.x, b.y - a.y) / a.side
    return off > MOVED or abs(math.log(b.side / a.side)) > MOVED or abs(b.roll - a.roll) > MOVED


def _corrected(square: HeadSquare, scale: float, look: Look) -> HeadSquare:
    """Put a square right after a look at it, grown by `scale`."""
    # The head's up axis, as seen, says how much it is tilted in the crop.
    up = look.rotation[0, :2, 1]
    roll = square.roll + float(torch.atan2(up[0], up[1]))
    at = square.grown(scale).to_image(look.points[0])
    centre, side = head_box(at @ plane_turn(roll))
    x, y = (centre @ plane_turn(roll).mT).tolist()
    return HeadSquare(x, y, float(side), roll, float(look.score))


def _upright(
    wide: Tensor, square: HeadSquare, tight: Tensor, inner: HeadSquare
) -> tuple[tuple[float, float, float], Tensor]:
    """Take mask and normals of both looks to the image's axes: (left, top, side), [4, size, size].

    The tight look sees more of what it sees; the wide one goes on around it.
    """
    reach = float(abs(torch.tensor(square.roll).cos()) + abs(torch.tensor(square.roll).sin()))
    box = (square.x - square.side * reach / 2, square.y - square.side * reach / 2, square.side * reach)
    size = round(wide.shape[-1] * reach * square.side / inner.side)
    out, _ = _placed(wide, square, box, size)
    near, edge = _placed(tight, inner, box, size)
    # Half from each, but at the tight look's border, where it knows as little of what is beside as the wide one's.
    return box, torch.lerp(out, near, TIGHT_TRUST * ((1 - edge) * 5).clamp(0, 1))


def _placed(
    dense: Tensor, square: HeadSquare, box: tuple[float, float, float], size: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Resample a look's mask and normals to a box of the image [4, size, size]; and how far out it is, 1 the edge."""
    mask, normal = dense[:, :1].sigmoid(), normalize(dense[:, 1:], dim=1, eps=1e-6)
    R, ratio = plane_turn(-square.roll), box[2] / square.side
    off = torch.tensor([box[0] + box[2] / 2 - square.x, box[1] + box[2] / 2 - square.y]) * 2 / square.side
    theta = torch.cat([R * ratio, (R @ off)[:, None]], 1)
    grid = affine_grid(theta[None], [1, 4, size, size], align_corners=False)
    out = grid_sample(torch.cat([mask, normal * mask], 1), grid, padding_mode="zeros", align_corners=False)[0]
    turned = torch.cat([plane_turn(-square.roll) @ out[1:3].flatten(1), out[3:].flatten(1)]).view(3, size, size)
    return torch.cat([out[:1], turned]), grid[0].abs().amax(-1)


def _untilted(rotation: Float[Tensor, "3 3"], roll: float) -> Float[Tensor, "3 3"]:
    """Take a rotation seen in a turned crop to the image's axes (y up there)."""
    R = torch.eye(3)
    R[:2, :2] = plane_turn(-roll)
    return R @ rotation
