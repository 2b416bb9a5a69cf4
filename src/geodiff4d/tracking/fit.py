"""Fit head parameters and a camera to 2D landmarks, for one image or all frames of a video at once.

Maximum a posteriori: reprojection errors of the landmarks against priors on identity (unit Gaussians), expression and
gaze, with second differences over frames as smoothness. Identity and focal length are shared by all frames. The head
starts from a closed-form weak-perspective pose, whatever its roll, and is refined by Levenberg–Marquardt in stages:
pose, then everything.

Where things are: the camera stands in front of the head, looking along -z, at the distance that the focal length and
the head's metric size give; how the head turns is `rotation` (the neck stays at zero: from the face alone the two look
the same), and `translation` holds only the motion around its mean, which is in the camera (as VHAP does).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM, Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix, matrix_to_quat, rigid
from geodiff4d.heads.rig import Head, HeadParams, Landmarks, joint_transforms
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.layout import Layout, landmark_head
from geodiff4d.tracking.solve import Limits, Normal, Unknowns, minimise

CONTOUR = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
"""The face's outline in MediaPipe's mesh: it slides over the skin as the head turns."""

FRONT = IMAGE_NORMAL_FROM_CAM
"""Rotation world → camera of a camera that looks along -z, upright."""

DIFFERENCE = 1e-6
"""Step of the pose angles' numerical derivatives [rad]."""

CHUNK = 32
"""Frames whose Jacobians are held at once."""


@dataclass(frozen=True)
class FitConfig:
    """Weights of the fit: each σ is what the term is expected to deviate by."""

    focal_scale: float = 2.0
    """Focal length over the image's longer side, where nothing is known of it: a portrait lens."""
    focal_sigma: float = 0.0
    """Relative uncertainty of the focal length; 0 keeps it as it is."""
    noise: float = 0.012
    """Landmark noise over the face's size; outliers beyond three times that lose their weight."""
    evidence: float = 60.0
    """How many independent landmarks a face is worth: neighbours err together."""
    contour: float = 0.2
    """Weight of the outline's points."""
    shape_sigma: float = 1.0
    expr_sigma: float = 0.5
    expr_l1: float = 2.0
    """Weight of the sum of ARKit actions: unused ones stay at zero."""
    asymmetry_sigma: float = 0.35
    """Difference of a left action from its right twin."""
    gaze_sigma_rad: float = 0.25
    squint_sigma_rad: float = 0.05
    """Difference of one eye's direction from the other's."""
    jaw_sigma_rad: float = 0.2
    """Jaw joint of heads without a jawOpen action (FLAME); the others use the action."""
    rotation_bend_rad: float = 0.012
    """Second difference over frames, per frame², of the head's rotation."""
    translation_bend_m: float = 0.0015
    expr_bend: float = 0.08
    gaze_bend_rad: float = 0.08
    steps: int = 25
    """Levenberg–Marquardt steps of the last stage, at most."""
    tolerance: float = 5e-4
    """Relative fall of the cost at which it stops."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0 or (
                f.name.endswith(("sigma", "_rad", "_m")) and f.name != "focal_sigma" and getattr(self, f.name) == 0
            ):
                raise ValueError(f"{f.name} must be positive, got {getattr(self, f.name)}")


@dataclass(frozen=True)
class Fit:
    """What the landmarks say."""

    params: HeadParams
    """Batch of frames; `shape` is the same in all."""
    camera: Camera
    """The one camera of the uncut images."""
    error_px: Float[Tensor, " frames"]
    """Mean landmark distance per frame (outline excluded), NaN where no face was seen."""
    seen: Bool[Tensor, " frames"]
    face_px: float
    """Median height of the face's landmarks."""

    @property
    def error(self) -> float:
        """Mean landmark distance over the seen frames [px]."""
        return float(self.error_px[self.seen].mean())


@dataclass(frozen=True)
class Observed:
    """Landmarks of all frames that both the detector and the head know."""

    points: Float[Tensor, "frames points 2"]
    weight: Float[Tensor, "frames points"]
    """0 where no face was seen."""
    index: Int[Tensor, " points"]
    sigma_px: float
    seen: Bool[Tensor, " frames"]
    face_px: float


def fit(
    head: Head, detections: Sequence[Detection | None], width: int, height: int,
    focal_px: float | None = None, config: FitConfig = FitConfig(),
) -> Fit:  # fmt: skip
    """Fit the head to one detection per frame (None where the face was not seen).

    Raises:
        UserError: no frame has a face, or the head has no MediaPipe landmarks.

    Example:
        >>> result = fit(head, [detection], width=512, height=512)  # doctest: +SKIP
        >>> result.params.rotation.shape  # doctest: +SKIP
        torch.Size([1, 3])
    """
    seen = observe(head, detections, config)
    chosen = torch.searchsorted(head.mediapipe_index.sort().values, seen.index)
    chosen = head.mediapipe_index.argsort()[chosen]
    small = landmark_head(head, Landmarks(head.mediapipe.face_index[chosen], head.mediapipe.bary[chosen]))
    layout = Layout(small)
    K = pinhole(focal_px or config.focal_scale * max(width, height), width, height).double()

    everything = limits(layout, config)
    pose = layout.fill(0.0, rotation=1.0, translation=1.0)
    pose_only = replace(everything, free_frame=pose, free_shared=torch.zeros_like(everything.free_shared))
    x = weak_perspective(small, layout, seen, K)
    x = minimise(Problem(small, layout, seen, K, config, pose_only), x, pose_only, steps=10, tolerance=1e-2)
    problem = Problem(small, layout, seen, K, config, everything)
    x = minimise(problem, x, everything, steps=config.steps, tolerance=config.tolerance)
    return _result(problem, x, width, height)


def observe(head: Head, detections: Sequence[Detection | None], config: FitConfig) -> Observed:
    """Gather the landmarks that head and detector share, with their weights."""
    first = next((d for d in detections if d is not None), None)
    if first is None:
        raise UserError(
            "no face was found: expected one face, seen from the front or up to 60° from it; try a larger picture"
        )
    index = head.mediapipe_index[torch.isin(head.mediapipe_index, first.index)].sort().values
    if len(index) < 20:
        raise UserError(
            f"{head.name} has {len(index)} of MediaPipe's landmarks: expected at least 20; "
            "rebuild the head's file with its landmarks"
        )
    order = first.index.argsort()
    rows = order[torch.searchsorted(first.index[order], index)]
    points = torch.stack([(d or first).points[rows] for d in detections]).double()
    seen = torch.tensor([d is not None for d in detections])
    face_px = float((points.amax(1) - points.amin(1)).amax(-1)[seen].median())
    weight = torch.ones(len(index), dtype=torch.float64)
    weight[torch.isin(index, torch.tensor(CONTOUR))] = config.contour
    weight = weight * (config.evidence / weight.sum())
    return Observed(points, weight * seen[:, None], index, config.noise * face_px, seen, face_px)


def weak_perspective(head: Head, layout: Layout, seen: Observed, K: Float[Tensor, "3 3"]) -> Unknowns:
    """Solve each frame's pose in closed form: the neutral landmarks' affine map, made orthogonal (POSIT)."""
    X = head.template[: len(seen.index)]
    middle = X.mean(0)
    u = (seen.points - K[:2, 2]) / K[0, 0]
    weight = seen.weight[seen.seen][0][:, None]
    flat = (weight * (X - middle)).expand(len(u), -1, -1)
    A = torch.linalg.lstsq(flat, weight * (u - u.mean(1, keepdim=True))).solution.mT
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    top = U @ Vh
    R_cam = torch.cat([top, torch.linalg.cross(top[:, 0], top[:, 1])[:, None]], 1)
    R = FRONT.double().T @ R_cam
    quats = matrix_to_quat(R)
    quats = quats * torch.where(quats[:, :1] < 0, -1.0, 1.0)
    half = quats[:, 1:].norm(dim=-1, keepdim=True)
    rotation = quats[:, 1:] / half.clamp(min=1e-9) * 2 * torch.atan2(half, quats[:, :1])
    depth = 1 / S.mean(-1)
    centre = torch.cat([u.mean(1), torch.ones(len(u), 1)], -1) * depth[:, None]
    translation = (centre - camera_offset()) @ FRONT.double() - (R @ middle[:, None])[..., 0]
    frame = torch.zeros(len(u), layout.size, dtype=torch.float64)
    frame[:, layout.slices["rotation"]], frame[:, layout.slices["translation"]] = rotation, translation
    fill_gaps(frame, seen.seen)
    return Unknowns(frame, torch.zeros(layout.shapes + 1, dtype=torch.float64))


def fill_gaps(frame: Float[Tensor, "frames unknowns"], seen: Bool[Tensor, " frames"]) -> None:
    """Interpolate rows of frames without a face from their neighbours, in place."""
    t, at = np.arange(len(frame)), seen.nonzero()[:, 0].numpy()
    for k in range(frame.shape[1]):
        frame[:, k] = torch.from_numpy(np.interp(t, at, frame[seen, k].numpy()))


def camera_offset() -> Float[Tensor, "3"]:
    """The world's origin in the camera while fitting: one metre in front of it."""
    return torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def limits(layout: Layout, config: FitConfig) -> Limits:
    """Say what moves in the last stage, within which bounds and how smoothly."""
    free = layout.fill(1.0, jaw_pose=0.0 if layout.arkit else [1.0, 1.0, 0.0], eyes_pose=[1.0, 1.0, 0.0] * 2)
    low, high = layout.fill(-torch.inf, eyelids=0.0), layout.fill(torch.inf, eyelids=1.0)
    if layout.arkit:
        low, high = layout.fill(-torch.inf, expr=0.0, eyelids=0.0), layout.fill(torch.inf, expr=1.0, eyelids=1.0)
        for i, name in enumerate(layout.names):
            # The eye joints turn the eyes; nothing that landmarks show tells of the tongue.
            if name.startswith("eyeLook") or name == "tongueOut":
                free[layout.slices["expr"].start + i] = 0.0
    bend = layout.fill(
        0.05, rotation=config.rotation_bend_rad, translation=config.translation_bend_m,
        expr=config.expr_bend, eyelids=config.expr_bend, eyes_pose=config.gaze_bend_rad,
    )  # fmt: skip
    shared = torch.ones(layout.shapes + 1, dtype=torch.float64)
    shared[-1] = float(config.focal_sigma > 0)
    return Limits(free, shared, bend.square().reciprocal(), low, high)


class Problem:
    """The posterior's negative logarithm and its Gauss–Newton model; called by the solver."""

    def __init__(
        self, head: Head, layout: Layout, seen: Observed, K: Float[Tensor, "3 3"], config: FitConfig, moves: Limits
    ):
        self.head, self.layout, self.seen, self.K, self.config = head, layout, seen, K, config
        free = moves.free_frame.nonzero()[:, 0].tolist()
        angles = [
            i
            for k in ("rotation", "jaw_pose", "eyes_pose", "eyelids")
            if k in layout.slices
            for i in range(layout.size)[layout.slices[k]]
        ]
        self.angles = [i for i in angles if i in free]
        self.shapes_move = bool(moves.free_shared[:-1].any())
        n = len(seen.seen)
        self.front, self.offset = FRONT.double(), camera_offset()
        arkit = layout.arkit
        self.precision = layout.fill(
            0.0, jaw_pose=config.jaw_sigma_rad**-2, eyes_pose=config.gaze_sigma_rad**-2,
            expr=(config.expr_sigma if arkit else 1.0) ** -2, eyelids=config.expr_sigma**-2,
        )  # fmt: skip
        self.slope = layout.fill(0.0, expr=config.expr_l1 if arkit else 0.0)
        self.coupling = torch.zeros(layout.size, layout.size, dtype=torch.float64)
        pairs = [(a, b, config.asymmetry_sigma) for a, b in layout.twins()] if arkit else []
        eyes = layout.slices["eyes_pose"].start
        pairs += [(eyes + k, eyes + 3 + k, config.squint_sigma_rad) for k in range(3)]
        for a, b, sigma in pairs:
            e = torch.zeros(layout.size, dtype=torch.float64)
            e[a], e[b] = 1.0, -1.0
            self.coupling += torch.outer(e, e) / sigma**2
        # Landmarks err the same way in every frame: many frames say little more of the identity than ten do.
        repeats = max(n / 10.0, 1.0)
        focal = repeats / config.focal_sigma**2 if config.focal_sigma > 0 else 0.0
        self.shared_precision = torch.full((layout.shapes + 1,), repeats / config.shape_sigma**2, dtype=torch.float64)
        self.shared_precision[-1] = focal

    def project(
        self, frame: Float[Tensor, "frames unknowns"], shared: Float[Tensor, " shared"]
    ) -> Float[Tensor, "frames points 2"]:
        """Landmarks of some frames [px]."""
        xy, _ = self._through_camera(self._place(frame, shared[:-1]), shared[-1])
        return xy

    def _place(self, frame: Tensor, shape: Tensor) -> Tensor:
        """Landmarks in the world [frames, points, 3]."""
        params = self.layout.params(frame, shape.expand(len(frame), -1))
        return self.head.pose(params).vertices[:, : len(self.seen.index)]

    def _through_camera(self, world: Tensor, log_zoom: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [frames, points, 2] and their derivative in the world's points [frames, points, 2, 3]."""
        cam = world @ self.front.T + self.offset
        # A head that a bad step puts behind the camera stays finite, and is rejected by its cost.
        z = cam[..., 2].clamp(min=0.02)
        focal = self.K[0, 0] * log_zoom.exp()
        ray = cam[..., :2] / z[..., None]
        J = torch.zeros(*z.shape, 2, 3, dtype=z.dtype)
        J[..., 0, 0] = J[..., 1, 1] = focal / z
        J[..., 2] = -focal * ray / z[..., None]
        return ray * focal + self.K[:2, 2], J @ self.front

    def jacobian(
        self, frame: Float[Tensor, "frames unknowns"], shared: Float[Tensor, " shared"]
    ) -> tuple[Float[Tensor, "frames points 2"], Float[Tensor, "frames points 2 all"]]:
        """Landmarks [px], and their derivatives (single precision) in the frames' unknowns, then the shared ones.

        Linear bases are differentiated by hand (through skinning and the joints that they move), the few pose angles by
        differences in double precision. What the stage holds fixed is left at zero.
        """
        world = self._place(frame, shared[:-1])
        xy, camera = self._through_camera(world, shared[-1])
        n, where = self.layout.size, self.layout.slices
        moved_by = torch.zeros(*world.shape, n + len(shared))
        for i in self.angles:
            moved = frame.clone()
            moved[:, i] += DIFFERENCE
            moved_by[..., i] = ((self._place(moved, shared[:-1]) - world) / DIFFERENCE).float()
        moved_by[..., where["translation"]] = torch.eye(3)
        if self.shapes_move:
            moved_by[..., n:-1], moved_by[..., where["expr"]] = self._through_skinning(frame)
        J = torch.einsum("fpab,fpbk->fpak", camera.float(), moved_by)
        J[..., -1] = (xy - self.K[:2, 2]).float()
        return xy, J

    def _through_skinning(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the placed landmarks in the identity and expression coefficients [frames, points, 3, …]."""
        n, shapes = len(self.seen.index), self.layout.shapes
        params = self.layout.params(frame, frame.new_zeros(len(frame), shapes))
        angles = torch.stack([params.rotation, params.neck_pose, params.jaw_pose, *params.eyes_pose.split(3, -1)], -2)
        R = axis_angle_to_matrix(angles)
        basis = torch.cat([self.head.shape_basis, self.head.expr_basis], -1)
        # With the rotations held, joint transforms are linear in the joints' places.
        joints = (self.head.joint_regressor @ basis.flatten(1)).view(-1, *basis.shape[1:]).permute(2, 0, 1)
        T = joint_transforms(R[:, None].expand(-1, len(joints), -1, -1, -1), joints.expand(len(R), -1, -1, -1))
        weights = self.head.skin_weights[:n]
        turn = torch.einsum("nj,fjab->fnab", weights, T[:, 0, :, :3, :3]).float()
        out = torch.einsum("fnab,nbk->fnak", turn, basis[:n].float())
        out = out + torch.einsum("nj,fkja->fnak", weights.float(), T[..., :3, 3].float())
        return out[..., :shapes], out[..., shapes:]

    def __call__(self, x: Unknowns) -> Normal:
        n, cost, parts, cutoff = x.frame.shape[1], 0.0, [], 3.0**2
        for i in range(0, len(x.frame), CHUNK):
            part = slice(i, i + CHUNK)
            xy, J = self.jacobian(x.frame[part], x.shared)
            r = (xy - self.seen.points[part]) / self.seen.sigma_px
            squared, weight = r.square().sum(-1), self.seen.weight[part]
            # Geman–McClure: a landmark off by much more than the noise is no landmark.
            cost += 0.5 * float((weight * squared * cutoff / (cutoff + squared)).sum())
            root = weight.sqrt() * (cutoff / (cutoff + squared))
            J = (J * (root / self.seen.sigma_px).float()[..., None, None]).flatten(1, 2)
            parts.append(
                ((J.mT @ J).double(), (J.mT @ (r * root[..., None]).float().flatten(1)[..., None])[..., 0].double())
            )
        H, g = (torch.cat(x) for x in zip(*parts, strict=True))
        data = Normal(cost, H[:, :n, :n], H[:, :n, n:], H[:, n:, n:].sum(0), g[:, :n], g[:, n:].sum(0))
        return self._with_priors(x, data)

    def _with_priors(self, x: Unknowns, data: Normal) -> Normal:
        pull = x.frame * self.precision + x.frame @ self.coupling
        cost = data.cost + 0.5 * float((x.frame * pull).sum()) + float((x.frame * self.slope).sum())
        cost += 0.5 * float((self.shared_precision * x.shared.square()).sum())
        return Normal(
            cost, data.frame + torch.diag(self.precision) + self.coupling, data.cross,
            data.shared + torch.diag(self.shared_precision),
            data.frame_gradient + pull + self.slope, data.shared_gradient + self.shared_precision * x.shared,
        )  # fmt: skip


def _result(problem: Problem, x: Unknowns, width: int, height: int) -> Fit:
    seen, layout = problem.seen, problem.layout
    predicted = problem.project(x.frame, x.shared)
    inner = ~torch.isin(seen.index, torch.tensor(CONTOUR))
    error = (predicted - seen.points).norm(dim=-1)[:, inner].mean(1)
    error[~seen.seen] = torch.nan
    params = layout.params(x.frame, x.shared[:-1].expand(len(x.frame), -1))
    mean = params.translation.mean(0)
    params = replace(params, translation=params.translation - mean)
    K = problem.K.clone()
    K[[0, 1], [0, 1]] *= x.shared[-1].exp()
    T = rigid(problem.front, problem.offset + problem.front @ mean)
    camera = Camera(T.float(), K.float(), width, height)
    return Fit(params.map(lambda v: v.float().contiguous()), camera, error.float(), seen.seen, seen.face_px)
