"""The cost of the fit, reprojection errors and priors, and its Gauss–Newton model (the solver is in `solve`)."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.heads.rig import Head
from geodiff4d.tracking.appearance import AppearanceConfig
from geodiff4d.tracking.blend import reads_expression
from geodiff4d.tracking.layout import Layout
from geodiff4d.tracking.observe import Observed, Weighting, guessed_rotation
from geodiff4d.tracking.projection import DIFFERENCE, Projection
from geodiff4d.tracking.solve import Limits, Normal, Unknowns, on_parts

CHUNK = 32
"""Number of frames whose Jacobians are in memory at once."""


@dataclass(frozen=True)
class HeadFitConfig:
    """Weights of the fit; each σ is the standard deviation that its term is expected to have."""

    focal_scale: float = 1.2
    """Smallest assumed focal length over the image's longer side: a wide lens."""
    distance_m: float = 1.4
    """Distance that a head is assumed to be seen from where the focal length is not known [m]."""
    focal_sigma: float = 0.0
    """Relative uncertainty of the focal length; 0 keeps it as it is."""
    weighting: Weighting = Weighting()
    """How much detected points count."""
    turn_sigma_rad: float = 0.03
    """σ of the detector's guess of the rotation; 0 ignores the guess."""
    guess_sigma: float = 0.0
    """σ of the detector's guess of the identity coefficients; 0 ignores the guess."""
    shape_sigma: float = 1.0
    expr_sigma: float = 0.5
    expr_l1: float = 2.0
    """Weight of the sum of ARKit weights, which keeps unused ones at zero."""
    asymmetry_sigma: float = 0.35
    """σ of the difference between a left ARKit weight and its right counterpart."""
    gaze_sigma_rad: float = 0.25
    squint_sigma_rad: float = 0.05
    """σ of the difference between the eyes' directions."""
    jaw_sigma_rad: float = 0.2
    """σ of the jaw joint, for heads without a jawOpen weight (FLAME)."""
    rotation_bend_rad: float = 0.012
    """σ of the second difference over frames of the head's rotation; likewise the next three."""
    translation_bend_m: float = 0.0015
    expr_bend: float = 0.08
    gaze_bend_rad: float = 0.08
    reading_floor: float = 0.02
    """Added to the face reader's own doubt of a coefficient, and of a radian."""
    read_bend: float = 0.15
    """`expr_bend` and `gaze_bend_rad` where a reader says what a face does: its answers are steadied already, and a
    blink takes four frames."""
    appearance: AppearanceConfig = AppearanceConfig()
    """How a film's pixels are aligned."""
    consecutive: bool = True
    """Whether frames follow each other; off, they are photographs of one person: nothing is smoothed over them."""
    blinks: bool = True
    """Whether short closings of both eyes, in consecutive frames, close them all the way (`blinks.py`)."""
    steps: int = 25
    """Largest number of Levenberg–Marquardt steps of the last stage."""
    tolerance: float = 5e-4
    """Relative decrease of the cost below which it stops."""

    def __post_init__(self) -> None:
        optional = ("focal_sigma", "turn_sigma_rad", "guess_sigma")
        for f in fields(self):
            if f.name in ("weighting", "appearance", "consecutive"):
                continue
            if getattr(self, f.name) < 0 or (
                f.name.endswith(("sigma", "_rad", "_m")) and f.name not in optional and getattr(self, f.name) == 0
            ):
                raise ValueError(f"{f.name} must be positive, got {getattr(self, f.name)}")


@dataclass(frozen=True)
class Anchor:
    """A prior at the last frame's unknowns, for frames that are fitted one by one."""

    frame: Float[Tensor, "frames unknowns"]
    precision: Float[Tensor, " unknowns"]


class Problem:
    """The negative log-posterior and its Gauss–Newton model, as the solver calls it."""

    def __init__(
        self, head: Head, layout: Layout, seen: Observed, K: Float[Tensor, "3 3"], config: HeadFitConfig, moves: Limits
    ):
        self.head, self.layout, self.seen, self.K, self.config = head, layout, seen, K, config
        self.projection = Projection(head, layout, len(seen.index), K, moves)
        n = len(seen.seen)
        self.mean, self.precision, self.slope, self.coupling = frame_priors(layout, seen, config)
        # Landmarks err the same way in every frame: many frames say little more of the identity than ten do.
        repeats = max(n / 10.0, 1.0)
        focal = repeats / config.focal_sigma**2 if config.focal_sigma > 0 else 0.0
        self.shared_precision = torch.full((layout.shapes + 1,), repeats / config.shape_sigma**2, dtype=torch.float64)
        self.shared_precision[-1] = focal
        self.shared_mean = torch.zeros(layout.shapes + 1, dtype=torch.float64)
        if config.guess_sigma > 0 and seen.shape is not None and moves.free_shared[:-1].any():
            guessed = min(len(seen.shape), layout.shapes)
            self.shared_mean[:guessed] = seen.shape[:guessed]
            self.shared_precision[:guessed] = repeats / config.guess_sigma**2
        self.guess = guessed_rotation(seen, K) if config.turn_sigma_rad > 0 else None
        self.anchor: Anchor | None = None

    def __call__(self, x: Unknowns) -> Normal:
        n, cutoff = x.frame.shape[1], 3.0**2

        def squared_up(part: slice) -> tuple[float, Tensor, Tensor]:
            xy, J = self.projection.jacobian(x.frame[part], x.shared)
            sigma = self.seen.sigma_px[part][..., None]
            r = (xy - self.seen.points[part]) / sigma
            squared, weight = r.square().sum(-1), self.seen.weight[part]
            # Geman–McClure: a landmark off by much more than the noise is no landmark.
            cost = 0.5 * float((weight * squared * cutoff / (cutoff + squared)).sum())
            root = weight.sqrt() * (cutoff / (cutoff + squared))
            J = (J * (root[..., None] / sigma).float()[..., None]).flatten(1, 2)
            Jr = (J.mT @ (r * root[..., None]).float().flatten(1)[..., None])[..., 0]
            return cost, (J.mT @ J).double(), Jr.double()

        costs, Hs, gs = zip(*on_parts(squared_up, len(x.frame), CHUNK), strict=True)
        H, g = torch.cat(Hs), torch.cat(gs)
        data = Normal(sum(costs), H[:, :n, :n], H[:, :n, n:], H[:, n:, n:].sum(0), g[:, :n], g[:, n:].sum(0))
        return self._with_priors(x, data)

    def _with_priors(self, x: Unknowns, data: Normal) -> Normal:
        off_mean, coupled = x.frame - self.mean, x.frame @ self.coupling
        prior = off_mean * self.precision
        cost = data.cost + 0.5 * float((off_mean * prior).sum()) + 0.5 * float((x.frame * coupled).sum())
        cost += float((x.frame * self.slope).sum())
        off = x.shared - self.shared_mean
        cost += 0.5 * float((self.shared_precision * off.square()).sum())
        H = data.frame + torch.diag_embed(self.precision) + self.coupling
        g = data.frame_gradient + prior + coupled + self.slope
        if self.anchor is not None:
            away = x.frame - self.anchor.frame
            cost += 0.5 * float((self.anchor.precision * away.square()).sum())
            H, g = H + torch.diag(self.anchor.precision), g + self.anchor.precision * away
        if self.guess is not None:
            r, J = self._turned(x.frame[:, self.layout.slices["rotation"]])
            cost += 0.5 * float(r.square().sum())
            where = self.layout.slices["rotation"]
            H[:, where, where] += J.mT @ J
            g[:, where] += (J.mT @ r[..., None])[..., 0]
        return Normal(
            cost, H, data.cross, data.shared + torch.diag(self.shared_precision), g,
            data.shared_gradient + self.shared_precision * off,
        )  # fmt: skip

    def _turned(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotations' differences from the detector's guess over its σ [frames, 3], and their derivative."""
        guess = self.guess
        assert guess is not None
        scale = self.seen.seen[:, None] / self.config.turn_sigma_rad

        def off(v: Tensor) -> Tensor:
            D = guess.mT.repeat(len(v) // len(guess), 1, 1) @ axis_angle_to_matrix(v)
            return 0.5 * torch.stack([D[:, 2, 1] - D[:, 1, 2], D[:, 0, 2] - D[:, 2, 0], D[:, 1, 0] - D[:, 0, 1]], -1)

        steps = DIFFERENCE * torch.eye(3, dtype=rotation.dtype)
        # All at once: for single frames, calling costs more than computing.
        r, *moved = off(torch.cat([rotation, *(rotation + step for step in steps)])).chunk(4)
        J = torch.stack([(m - r) / DIFFERENCE for m in moved], -1)
        return r * scale, J * scale[..., None]


def frame_priors(
    layout: Layout, seen: Observed, config: HeadFitConfig
) -> tuple[
    Float[Tensor, "frames unknowns"], Float[Tensor, "frames unknowns"], Float[Tensor, " unknowns"],
    Float[Tensor, "unknowns unknowns"],
]:  # fmt: skip
    """Return what is expected of every frame before its landmarks are seen: (mean, precision, slope, coupling).

    A face rests, its sides move alike and few actions are used at once. What a reader says is one more measurement,
    with the reader's own doubt: where that is small, little is left of the rest.
    """
    n = len(seen.seen)
    precision = layout.fill(
        0.0, jaw_pose=config.jaw_sigma_rad**-2, eyes_pose=config.gaze_sigma_rad**-2,
        expr=(config.expr_sigma if layout.arkit else 1.0) ** -2, eyelids=config.expr_sigma**-2,
    ).repeat(n, 1)  # fmt: skip
    mean = torch.zeros_like(precision)
    slope = layout.fill(0.0, expr=config.expr_l1 if layout.arkit else 0.0)
    pairs = [(a, b, config.asymmetry_sigma) for a, b in layout.twins()] if layout.arkit else []
    eyes = layout.slices["eyes_pose"].start
    pairs += [(eyes + k, eyes + 3 + k, config.squint_sigma_rad) for k in range(3)]
    if seen.reading is not None:
        known = seen.seen.nonzero()[:, 0]
        said = [("eyes_pose", seen.reading.eyes_pose, seen.reading.eyes_sigma)]
        if reads_expression(layout):
            said.append(("expr", seen.reading.expr, seen.reading.expr_sigma))
        for name, value, sigma in said:
            where = layout.slices[name]
            sure = (sigma[known].double().square() + config.reading_floor**2).reciprocal()
            precision[known, where] += sure
            mean[known, where] = sure * value[known].double() / precision[known, where]
    coupling = torch.zeros(layout.size, layout.size, dtype=torch.float64)
    for a, b, sigma in pairs:
        e = torch.zeros(layout.size, dtype=torch.float64)
        e[a], e[b] = 1.0, -1.0
        coupling += torch.outer(e, e) / sigma**2
    return mean, precision, slope, coupling


def limits(layout: Layout, config: HeadFitConfig, read: bool = False) -> Limits:
    """Return which unknowns are free in the last stage, their bounds and their smoothness.

    `read` says that a reader saw the faces.
    """
    free = layout.fill(1.0, jaw_pose=0.0 if layout.arkit else [1.0, 1.0, 0.0], eyes_pose=[1.0, 1.0, 0.0] * 2)
    low, high = layout.fill(-torch.inf, eyelids=0.0), layout.fill(torch.inf, eyelids=1.0)
    if layout.arkit:
        low, high = layout.fill(-torch.inf, expr=0.0, eyelids=0.0), layout.fill(torch.inf, expr=1.0, eyelids=1.0)
        for i, name in enumerate(layout.names):
            # The eye joints turn the eyes; nothing that landmarks show tells of the tongue, but a reader does.
            if name.startswith("eyeLook") or (name == "tongueOut" and not read):
                free[layout.slices["expr"].start + i] = 0.0
    expr_bend = config.read_bend if read and reads_expression(layout) else config.expr_bend
    bend = layout.fill(
        0.05, rotation=config.rotation_bend_rad, translation=config.translation_bend_m,
        expr=expr_bend, eyelids=config.expr_bend, eyes_pose=config.read_bend if read else config.gaze_bend_rad,
    )  # fmt: skip
    shared = torch.ones(layout.shapes + 1, dtype=torch.float64)
    shared[-1] = float(config.focal_sigma > 0)
    return Limits(free, shared, bend.square().reciprocal() * config.consecutive, low, high)
