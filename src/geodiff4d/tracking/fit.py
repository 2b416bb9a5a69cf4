"""Fit head parameters and a camera to 2D landmarks, for one image or all frames of a video at once.

Maximum a posteriori: reprojection errors of the landmarks against priors on identity (unit Gaussians), expression and
gaze, with second differences over frames as smoothness. Identity and focal length are shared by all frames. The head
starts from a closed-form weak-perspective pose, whatever its roll, and is refined by Levenberg–Marquardt in stages:
pose, then everything.

Where things are: the camera stands in front of the head, looking along -z, at the distance that the focal length and
the head's metric size give; how the head turns is `rotation` (the neck stays at zero: from the face alone the two look
the same), and `translation` holds only the motion around its mean, which is in the camera (as VHAP does).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import axis_angle_to_matrix, matrix_to_quat, rigid
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.crops import head_region
from geodiff4d.tracking.appearance import Appearance, AppearanceLevel, added, face_points
from geodiff4d.tracking.blend import blended
from geodiff4d.tracking.blinks import completed_blinks
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.layout import Layout, landmark_head
from geodiff4d.tracking.observe import Observed, observe
from geodiff4d.tracking.problem import HeadFitConfig, Problem, frame_priors, limits
from geodiff4d.tracking.projection import FRONT, camera_offset
from geodiff4d.tracking.reading import frame_noise, steadied
from geodiff4d.tracking.solve import Limits, Unknowns, minimise

Frames = Callable[[], Iterable[Float[Tensor, "3 _height _width"]]]
"""Returns the frames from the start."""


@dataclass(frozen=True)
class HeadFit:
    """Head parameters and camera that were fitted to landmarks."""

    params: HeadParams
    """A row per frame; `shape` is the same in all."""
    camera: Camera
    """The one camera of the uncut images."""
    error_px: Float[Tensor, " frames"]
    """Mean landmark distance per frame (outline excluded), NaN where no face was seen. It is the fit's own, before a
    reader has a say (`blend.py`), so that it tells whether the head lies on the face."""
    seen: Bool[Tensor, " frames"]
    """Frames in which a face was detected; the others are interpolated."""
    face_px: float
    """Median over the frames of the longer side of the landmarks' box [px]."""

    @property
    def error(self) -> float:
        """Return the mean landmark distance over the frames with a face [px]."""
        return float(self.error_px[self.seen].mean())


def fit(
    head: Head, detections: Sequence[Detection | None], width: int, height: int,
    focal_px: float | None = None, config: HeadFitConfig = HeadFitConfig(), frames: Frames | None = None,
    shape: Float[Tensor, " shapes"] | None = None,
) -> HeadFit:  # fmt: skip
    """Fit the head to one detection per frame (None where the face was not seen).

    With the frames of a film, from their start each time it is called, they are aligned pixel by pixel as well
    (`appearance.py`). A `shape` that is given is kept.

    Raises:
        UserError: no frame has a face, or the head has no MediaPipe landmarks.

    Example:
        >>> result = fit(head, [detection], width=512, height=512)  # doctest: +SKIP
        >>> result.params.rotation.shape  # doctest: +SKIP
        torch.Size([1, 3])
    """
    seen = observe(head, detections, config.weighting, consecutive=config.consecutive)
    small = landmark_head(head, seen.landmarks)
    layout = Layout(small)
    focal = focal_px or assumed_focal(small, layout, seen, width, height, config)
    K = pinhole(focal, width, height).double()

    everything = limits(layout, config, seen.reading is not None)
    pose = layout.fill(0.0, rotation=1.0, translation=1.0)
    pose_only = replace(everything, free_frame=pose, free_shared=torch.zeros_like(everything.free_shared))
    x = weak_perspective(small, layout, seen, K)
    if shape is not None:
        everything = replace(everything, free_shared=torch.zeros_like(everything.free_shared))
        x = replace(x, shared=torch.cat([shape[: layout.shapes].double(), x.shared[-1:]]))
    # Where a reader says what faces do, heads are placed with that expression and not at rest.
    expected = frame_priors(layout, seen, config)[0]
    x = replace(x, frame=torch.where(expected != 0, expected, x.frame))
    if seen.turn is not None:
        seen = replace(seen, centre=head_centres(head, layout, x, K))
    x = minimise(Problem(small, layout, seen, K, config, pose_only), x, pose_only, steps=10, tolerance=1e-2)
    problem = Problem(small, layout, seen, K, config, everything)
    x = minimise(problem, x, everything, steps=config.steps, tolerance=config.tolerance)
    appearance = config.appearance
    short = int(seen.seen.sum()) < appearance.least_frames
    if frames is None or short or not len(face_points(head, appearance).face_index):
        said = blended(layout, seen, x.frame)
    else:
        said = blended(layout, seen, aligned(head, problem, x, everything, frames).frame, aligned=True)
    if config.blinks and config.consecutive:
        said = completed_blinks(layout, said)
    return _result(problem, x, said, width, height)


def aligned(head: Head, problem: Problem, x: Unknowns, moves: Limits, frames: Frames) -> Unknowns:
    """Refine a film that is fitted to landmarks by its pixels; identity and camera stay."""
    seen, config, projection = problem.seen, problem.config, problem.projection
    moves = replace(moves, free_shared=torch.zeros_like(moves.free_shared))
    # Anew, since derivatives in what is held now need not be computed.
    landmarks = Problem(projection.head, problem.layout, seen, projection.K, config, moves)
    film = Appearance(head, problem.layout, projection.K, x, seen.seen, moves, config.appearance, frames())
    for blur in config.appearance.blurs:
        pixels = AppearanceLevel(film, blur, x)
        x = minimise(added(landmarks, pixels), x, moves, config.appearance.steps, config.tolerance)
    # What rests becomes still again, and what moves stays.
    where, frame = problem.layout.slices["expr"], x.frame.clone()
    frame[:, where] = steadied(frame[:, where], frame_noise(frame[:, where]))
    return replace(x, frame=frame)


def assumed_focal(
    head: Head, layout: Layout, seen: Observed, width: int, height: int, config: HeadFitConfig
) -> float:  # fmt: skip
    """Return an assumed focal length [px] for images of which nothing is known.

    People are photographed from about the same distance, and images are cut afterwards: how large the head is says
    more than the image's sides, which only bound the lens.
    """
    side = float(max(width, height))
    x = weak_perspective(head, layout, seen, pinhole(side, width, height).double())
    depth = camera_offset()[2] - x.frame[seen.seen, layout.slices["translation"].start + 2]
    return max(config.distance_m / float(depth.median()), config.focal_scale) * side


def weak_perspective(head: Head, layout: Layout, seen: Observed, K: Float[Tensor, "3 3"]) -> Unknowns:
    """Return each frame's pose in closed form: the neutral landmarks' affine map, made orthogonal (POSIT)."""
    X = head.template[: len(seen.index)]
    middle = X.mean(0)
    u = (seen.points - K[:2, 2]) / K[0, 0]
    weight = seen.weight[seen.seen][0][:, None]
    flat = (weight * (X - middle)).expand(len(u), -1, -1)
    # Not lstsq's default, whose last bits depend on where in memory its arguments happen to lie.
    A = torch.linalg.lstsq(flat, weight * (u - u.mean(1, keepdim=True)), driver="gels").solution.mT
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


def head_centres(
    head: Head, layout: Layout, x: Unknowns, K: Float[Tensor, "3 3"]
) -> Float[Tensor, "frames 2"]:  # fmt: skip
    """Return each frame's projected head centre [px]; guesses of the rotation are relative to the ray through it."""
    middle = head.template[head_region(head)].mean(0).double()
    world = axis_angle_to_matrix(x.frame[:, layout.slices["rotation"]]) @ middle
    cam = (world + x.frame[:, layout.slices["translation"]]) @ FRONT.double().T + camera_offset()
    return cam[:, :2] / cam[:, 2:] * K[0, 0] + K[:2, 2]


def fill_gaps(frame: Float[Tensor, "frames unknowns"], seen: Bool[Tensor, " frames"]) -> None:
    """Interpolate rows of frames without a face from their neighbours, in place."""
    t, at = np.arange(len(frame)), seen.nonzero()[:, 0].numpy()
    for k in range(frame.shape[1]):
        frame[:, k] = torch.from_numpy(np.interp(t, at, frame[seen, k].numpy()))


def _result(problem: Problem, x: Unknowns, shown: Tensor, width: int, height: int) -> HeadFit:
    """Put together what was fitted (`x`), and the same frames as they are shown, after the reader's say."""
    seen, layout = problem.seen, problem.layout
    predicted = problem.projection.project(x.frame, x.shared)
    error = (predicted - seen.points).norm(dim=-1)[:, seen.inner].mean(1)
    error[~seen.seen] = torch.nan
    params = layout.params(shown, x.shared[:-1].expand(len(shown), -1))
    mean = params.translation.mean(0)
    params = replace(params, translation=params.translation - mean)
    K = problem.projection.K.clone()
    K[[0, 1], [0, 1]] *= x.shared[-1].exp()
    T = rigid(problem.projection.front, problem.projection.offset + problem.projection.front @ mean)
    camera = Camera(T.float(), K.float(), width, height)
    return HeadFit(params.map(lambda v: v.float().contiguous()), camera, error.float(), seen.seen, seen.face_px)
