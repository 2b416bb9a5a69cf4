"""What a film's pixels say of a face's motion: its skin looks in every frame as it does where the face rests.

Landmarks are as exact as the network that saw them, and shrink what it doubts. Skin, brows, lids and eyes have texture
of their own. Every frame is aligned with the person's own resting appearance on the fitted mesh, by Gauss–Newton on
pixels from coarse to fine (Lucas and Kanade 1981; photometric trackers of heads such as VHAP and Thies et al. 2016 do
it by rendering). Its normal equations are added to those of the landmarks and priors, so that nothing else of the fit
changes. Brightness is taken relative to its neighbourhood, since a head that turns is lit anew.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, grid_sample, interpolate, pad

from geodiff4d.core.topology import vertex_normals
from geodiff4d.heads.rig import Head, Landmarks
from geodiff4d.render.crops import crop_image
from geodiff4d.tracking.layout import Layout, landmark_head
from geodiff4d.tracking.projection import Projection
from geodiff4d.tracking.solve import Limits, Normal, Unknowns, on_parts

CHUNK = 64
"""Number of frames whose derivatives are in memory at once."""


@dataclass(frozen=True)
class AppearanceConfig:
    """How frames are aligned."""

    side: int = 160
    """Side of the crops of the face in which it is done [px]."""
    margin: float = 1.25
    """Side of a crop over the face's box."""
    blurs: tuple[float, ...] = (2.5, 1.2, 0.7)
    """σ of the images' blur, from coarse to fine [px of the crop]."""
    steps: int = 4
    """Levenberg–Marquardt steps at each."""
    around: float = 8.0
    """Brightness is relative to its mean and deviation over a window of this σ [px of the crop]."""
    noise: float = 0.5
    """σ of a point's relative brightness."""
    evidence: float = 800.0
    """Number of independent points that all points of a face count as."""
    eyes: float = 0.3
    """How much a point of an eyeball counts, over one of skin: lids hide most of them."""
    lips_m: float = 0.008
    """Points so near to the lips are left out: teeth, shadows and lips that press each other change how they look, and
    of a real person the fitted lips lie a little beside the true ones."""
    points: int = 1200
    """Largest number of points."""
    radius_m: float = 0.11
    """The face is the skin so near to the tip of the nose."""
    facing: tuple[float, float] = (0.35, 0.65)
    """Cosines between skin and line of sight from which a point counts, and counts fully."""
    resting: float = 0.1
    """Share of the frames whose appearance is the one at rest."""
    least_frames: int = 8
    """Shorter films are left as landmarks have them."""


def face_points(head: Head, config: AppearanceConfig) -> Landmarks:
    """Return vertices of the face's skin, brows and lids, spread evenly over them."""
    tip = head.landmarks68.on(head.template, head.faces)[30]
    face = head.regions["skin"] & ((head.template - tip).norm(dim=1) < config.radius_m)
    for name in ("eyes", "mouth", "teeth", "gums", "tongue", "neck"):
        if name in head.regions:
            face = face & ~head.regions[name]
    if "lips" in head.regions:
        lips = head.template[head.regions["lips"]]
        face = face & (torch.cdist(head.template, lips).amin(1) > config.lips_m)
    corners = head.faces.flatten()
    # Where each vertex is first a corner of a triangle.
    first = torch.full((len(head.template),), len(corners), dtype=torch.long)
    first.scatter_reduce_(0, corners.long(), torch.arange(len(corners)), "amin")
    chosen = (face & (first < len(corners))).nonzero()[:, 0]
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), config.points)).round().long()]
    at = first[chosen]
    return Landmarks(at // 3, torch.eye(3)[at % 3])


def eye_points(head: Head) -> Landmarks:
    """Return the middles of the eyeballs' front triangles; none of heads without that region."""
    ball = head.regions.get("eyes", torch.zeros(len(head.template), dtype=torch.bool))[head.faces].all(1)
    front = vertex_normals(head.template[None], head.faces)[0][head.faces].mean(1)[:, 2] > 0.5
    index = (ball & front).nonzero()[:, 0]
    return Landmarks(index, torch.full((len(index), 3), 1 / 3))


@dataclass(frozen=True)
class Surface:
    """Points that move together, and how much each counts."""

    projection: Projection
    facing: Float[Tensor, "frames points"]
    """How much each point is seen in each frame, by its angle to the line of sight, whatever else may hide it."""


class Appearance:
    """A film's face, cut out and grey, and the points of it that are looked at; identity and camera are held."""

    def __init__(
        self, head: Head, layout: Layout, K: Float[Tensor, "3 3"], x: Unknowns, seen: Bool[Tensor, " frames"],
        moves: Limits, config: AppearanceConfig, frames: Iterable[Float[Tensor, "3 _height _width"]],
    ):  # fmt: skip
        self.layout, self.config, self.seen, self.shared = layout, config, seen, x.shared[-1:]
        held = replace(moves, free_shared=torch.zeros(1, dtype=torch.float64))
        self.surfaces = []
        for points, share in ((face_points(head, config), 1.0), (eye_points(head), config.eyes)):
            if len(points.face_index):
                small = landmark_head(head, points)
                # Identity is held: into the template with it.
                template = small.template + small.shape_basis @ x.shared[:-1]
                small = replace(small, template=template, shape_basis=small.shape_basis[..., :0])
                projection = Projection(small, Layout(small), len(points.face_index), K, held)
                facing = self._facing(head, points, x, projection)
                self.surfaces.append(Surface(projection, share * facing * seen[:, None]))
        self.boxes = self._boxes(x)
        n = config.side
        self.images = torch.zeros(len(seen), 1, n, n)
        for t, (image, (left, top, side)) in enumerate(zip(frames, self.boxes.tolist(), strict=True)):
            if seen[t]:
                self.images[t] = crop_image(image.mean(0, keepdim=True), (left, top, side), n)

    def _facing(
        self, head: Head, points: Landmarks, x: Unknowns, projection: Projection
    ) -> Float[Tensor, "frames points"]:
        low, high = self.config.facing
        front, offset = projection.front.float(), projection.offset.float()
        out = []
        for part in x.frame.float().split(CHUNK):
            mesh = head.pose(self.layout.params(part, x.shared[:-1].float().expand(len(part), -1)))
            cam = points.on(mesh.vertices, head.faces) @ front.T + offset
            normal = points.on(mesh.normals, head.faces) @ front.T
            cos = -(normal * cam).sum(-1) / cam.norm(dim=-1).clamp(min=1e-6)
            out.append(((cos - low) / (high - low)).clamp(0, 1))
        return torch.cat(out)

    def _boxes(self, x: Unknowns) -> Float[Tensor, "frames 3"]:
        """Return each frame's square around the face (left, top, side) [px]; all are of one side."""
        xy = self.surfaces[0].projection.project(x.frame, self.shared)
        low, high = xy.amin(1), xy.amax(1)
        side = self.config.margin * (high - low).amax(-1)[self.seen].median()
        corner = (low + high) / 2 - side / 2
        return torch.cat([corner, side.expand(len(xy), 1)], 1)

    def resting(self, x: Unknowns) -> Float[Tensor, " frames"]:
        """Return how near each frame is to the face at rest, 0 to 1: the median frame, or looking like it."""
        scale = self.layout.fill(1.0, rotation=4.0, translation=0.0, eyes_pose=0.0)
        rows = x.frame * scale
        far = (rows - rows[self.seen].median(0).values).norm(dim=1)
        far[~self.seen] = torch.inf
        near = far[self.seen].quantile(self.config.resting).clamp(min=1e-6)
        return torch.exp(-0.5 * (far / near).square()).float() + 1e-6


class AppearanceLevel:
    """The pixels' share of the fit at one blur."""

    def __init__(self, film: Appearance, blur: float, x: Unknowns):
        """Look at a film with a blur of so many pixels; `x` is what was found so far."""
        self.film = film
        self.images = _with_slopes(relative_brightness(film.images, blur, film.config.around))
        rest = film.resting(x)
        self.wanted = [self._appearance(x, surface, rest) for surface in film.surfaces]
        most = film.surfaces[0].facing.sum(1)[film.seen].mean().clamp(min=1e-6)
        self.evidence = film.config.evidence / most

    def _look(self, xy: Float[Tensor, "frames points 2"], first: int) -> Float[Tensor, "frames points 3"]:
        """Return brightness and its derivatives in x and y [1 / px of the uncut image] at points."""
        crop, box = self.images[first : first + len(xy)], self.film.boxes[first : first + len(xy), None]
        at = ((xy - box[..., :2]) / box[..., 2:] * 2 - 1).float()
        values = grid_sample(crop, at[:, None], align_corners=False, padding_mode="border")[:, :, 0].mT
        scale = 0.5 * crop.shape[-1] / box[..., 2:].float()
        return torch.cat([values[..., :1], values[..., 1:] * scale], -1)

    def _appearance(
        self, x: Unknowns, surface: Surface, rest: Float[Tensor, " frames"]
    ) -> Float[Tensor, " points"]:  # fmt: skip
        """Return the points' brightness at rest.

        It is the mean over frames that see a point, nearly all of its weight on those where the face rests and which
        look like most: an average over all would hold the face back.
        """
        total, mass = torch.zeros(surface.projection.count), torch.full((surface.projection.count,), 1e-12)
        for i in range(0, len(x.frame), CHUNK):
            part = slice(i, i + CHUNK)
            values = self._look(surface.projection.project(x.frame[part], self.film.shared), i)[..., 0]
            w = rest[part, None] * surface.facing[part].square()
            total, mass = total + (w * values).sum(0), mass + w.sum(0)
        return total / mass

    def __call__(self, x: Unknowns) -> tuple[float, Float[Tensor, "frames n n"], Float[Tensor, "frames n"]]:
        """Return cost, J'J and J'r of every frame's unknowns."""

        def squared_up(part: slice) -> tuple[float, Tensor, Tensor]:
            n = x.frame.shape[1]
            cost, H, g = 0.0, torch.zeros(1, n, n), torch.zeros(1, n)
            for surface, wanted in zip(self.film.surfaces, self.wanted, strict=True):
                paid, r, J = self._residuals(x.frame[part], part.start, surface, wanted)
                cost, H, g = cost + 0.5 * paid, H + J.mT @ J, g + (J.mT @ r[..., None])[..., 0]
            return cost, H, g

        costs, Hs, gs = zip(*on_parts(squared_up, len(x.frame), CHUNK), strict=True)
        cost, H, g = sum(costs), torch.cat(Hs), torch.cat(gs)
        return cost, H.double(), g.double()

    def _residuals(
        self, frame: Float[Tensor, "part n"], first: int, surface: Surface, wanted: Float[Tensor, " points"]
    ) -> tuple[float, Float[Tensor, "part points"], Float[Tensor, "part points n"]]:
        """Return twice the cost, and residuals with their derivatives, scaled by their weights' roots."""
        cutoff, sigma = 3.0**2, self.film.config.noise
        weight = self.evidence * surface.facing[first : first + len(frame)]
        seen: list[Tensor] = []

        def slope(xy: Tensor) -> Tensor:
            look = self._look(xy, first)
            r = (look[..., 0] - wanted) / sigma
            squared = r.square()
            # Geman–McClure: what covers the skin, and teeth that come out, are no skin.
            root = weight.sqrt() * (cutoff / (cutoff + squared))
            seen.extend((r * root, weight * squared * cutoff / (cutoff + squared)))
            return look[..., 1:] * (root / sigma)[..., None]

        J = surface.projection.along(frame, self.film.shared, slope)
        r, paid = seen
        return float(paid.sum()), r, J


def added(problem: Callable[[Unknowns], Normal], pixels: AppearanceLevel) -> Callable[[Unknowns], Normal]:
    """Return a problem with the pixels' share in it."""

    def both(x: Unknowns) -> Normal:
        at, (cost, H, g) = problem(x), pixels(x)
        return replace(at, cost=at.cost + cost, frame=at.frame + H, frame_gradient=at.frame_gradient + g)

    return both


def relative_brightness(
    images: Float[Tensor, "n 1 side side"], blur: float, around: float
) -> Float[Tensor, "n 1 side side"]:
    """Return images, blurred, relative to the mean and the deviation of their neighbourhood."""
    out = []
    for part in images.split(CHUNK):
        x = _blurred(part, blur)
        # The neighbourhood is smooth: a quarter of its pixels say as much.
        small = avg_pool2d(x, 4)
        mean = _blurred(small, around / 4)
        spread = (_blurred(avg_pool2d(x.square(), 4), around / 4) - mean.square()).clamp(min=0).sqrt()
        mean, spread = (interpolate(v, x.shape[-2:], mode="bilinear", align_corners=False) for v in (mean, spread))
        out.append((x - mean) / (spread + 0.02))
    return torch.cat(out)


def _with_slopes(x: Float[Tensor, "n 1 side side"]) -> Float[Tensor, "n 3 side side"]:
    """Return images with twice their derivatives in x and y."""
    across, down = pad(x, (1, 1, 0, 0), mode="replicate"), pad(x, (0, 0, 1, 1), mode="replicate")
    return torch.cat([x, across[..., 2:] - across[..., :-2], down[..., 2:, :] - down[..., :-2, :]], 1)


def _blurred(x: Float[Tensor, "n 1 h w"], sigma: float) -> Float[Tensor, "n 1 h w"]:
    reach = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    kernel = (kernel / kernel.sum()).to(x)
    x = pad(x, (reach,) * 4, mode="replicate")
    return conv2d(conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
