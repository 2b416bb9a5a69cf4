"""Observations of the fit: the points that head and detector share, their uncertainty, and first guesses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM
from geodiff4d.core.errors import UserError
from geodiff4d.heads.rig import Head, Landmarks
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.points import CONTOUR, known_points
from geodiff4d.tracking.reading import Reading, frame_noise, steadied
from geodiff4d.tracking.turn import ray_rotation

Shared = tuple[Landmarks, Int[Tensor, " points"], Int[Tensor, " points"]]
"""Places on the head, their numbers, and their rows in a detection, as `shared_points` returns them."""


@dataclass(frozen=True)
class Weighting:
    """Weights of detected points."""

    noise: float = 0.012
    """σ of a point over the face's size, where the detector gives none."""
    floor: float = 0.004
    """σ over the face's size that is added to the detector's own."""
    evidence: float = 60.0
    """Number of independent points that all points of a face count as, since neighbours' errors are correlated."""
    contour: float = 0.2
    """Weight of the outline's points of detectors whose outline slides over the skin (MediaPipe)."""


@dataclass(frozen=True)
class Observed:
    """Detected points of all frames that are also landmarks of the head."""

    points: Float[Tensor, "frames points 2"]
    weight: Float[Tensor, "frames points"]
    """0 where no face was seen."""
    sigma_px: Float[Tensor, "frames points"]
    index: Int[Tensor, " points"]
    landmarks: Landmarks
    """The same points on the head."""
    inner: Bool[Tensor, " points"]
    """Points whose error measures a fit: features of the face, without its outline."""
    seen: Bool[Tensor, " frames"]
    face_px: float
    turn: Float[Tensor, "frames 3 3"] | None = None
    """Guess of each head's rotation to the viewer, relative to the ray through `centre` [px]."""
    centre: Float[Tensor, "frames 2"] | None = None
    shape: Float[Tensor, " shapes"] | None = None
    """Guess of OpenHead's first identity coefficients."""
    reading: Reading | None = None
    """What the face reader says of every frame, steadied over time; of frames without a face nothing (σ infinite)."""


def observe(
    head: Head,
    detections: Sequence[Detection | None],
    weighting: Weighting = Weighting(),
    shared: Shared | None = None,
    consecutive: bool = True,
) -> Observed:
    """Return the points that head and detector share, with their weights; `shared` saves finding them again.

    What a reader says is steadied over `consecutive` frames.

    Raises:
        UserError: no frame has a face, or head and detector share too few points.
    """
    first = next((d for d in detections if d is not None), None)
    if first is None:
        raise UserError(
            "no face was found: expected one face, seen from the front or up to 60° from it; try a larger image"
        )
    landmarks, index, rows = shared or shared_points(head, first)
    points = torch.stack([(d or first).points[rows] for d in detections]).double()
    seen = torch.tensor([d is not None for d in detections])
    face_px = float((points.amax(1) - points.amin(1)).amax(-1)[seen].median())
    weight = torch.ones(len(index), dtype=torch.float64)
    if first.sigma is None:
        sigma = torch.full(points.shape[:2], weighting.noise * face_px, dtype=torch.float64)
        weight[torch.isin(index, torch.tensor(CONTOUR))] = weighting.contour
    else:
        own = torch.stack([_sigma(d or first)[rows] for d in detections]).double()
        sigma = (own.square() + (weighting.floor * face_px) ** 2).sqrt()
    weight = weight * (weighting.evidence / weight.sum())
    inner = (index < 478) & ~torch.isin(index, torch.tensor(CONTOUR))
    turn = centre = shape = None
    if first.turn is not None and first.square is not None:
        turn = torch.stack([_given((d or first).turn) for d in detections]).double()
        squares = [_given((d or first).square) for d in detections]
        centre = torch.tensor([(s.x, s.y) for s in squares], dtype=torch.float64)
    if first.shape is not None:
        shape = torch.stack([_given(d.shape) for d in detections if d is not None]).mean(0).double()
    return Observed(
        points, weight * seen[:, None], sigma, index, landmarks, inner, seen, face_px, turn, centre, shape,
        readings_of(detections, consecutive),
    )  # fmt: skip


def readings_of(detections: Sequence[Detection | None], consecutive: bool = True) -> Reading | None:
    """Gather what the reader says of each frame, steadied over consecutive frames; None if none looked."""
    known = [d.reading for d in detections if d is not None and d.reading is not None]
    if len(known) < sum(d is not None for d in detections):
        return None
    first = known[0]
    nothing = replace(
        first,
        **{k: torch.zeros_like(getattr(first, k)) for k in ("expr", "jaw_pose", "eyes_pose")},
        **{k: torch.full_like(getattr(first, k), torch.inf) for k in ("expr_sigma", "jaw_sigma", "eyes_sigma")},
    )
    whole = Reading.cat([nothing if d is None or d.reading is None else d.reading for d in detections])
    if not consecutive:
        return whole
    at = torch.tensor([d is not None for d in detections]).nonzero()[:, 0]
    for name in ("expr", "jaw_pose", "eyes_pose"):
        values = getattr(whole, name)
        values[at] = steadied(values[at], frame_noise(values[at]))
    return whole


def shared_points(head: Head, detection: Detection) -> Shared:
    """Return the points that head and detection share: places on the head, numbers, and rows in the detection.

    Raises:
        UserError: there are fewer than twenty.
    """
    if detection.markup is not None and head.name == "openhead":
        return detection.markup.on(head), detection.index, torch.arange(len(detection.index))
    landmarks, known = known_points(head)
    index = known[torch.isin(known, detection.index)].sort().values
    if len(index) < 20:
        raise UserError(
            f"{head.name} has {len(index)} of the detector's landmarks: expected at least 20; "
            "rebuild the head's file with its landmarks"
        )
    chosen = known.argsort()[torch.searchsorted(known.sort().values, index)]
    order = detection.index.argsort()
    rows = order[torch.searchsorted(detection.index[order], index)]
    return Landmarks(landmarks.face_index[chosen], landmarks.bary[chosen]), index, rows


def guessed_rotation(seen: Observed, K: Float[Tensor, "3 3"]) -> Float[Tensor, "frames 3 3"] | None:
    """Return the guessed rotations in the fit's world (see `fit`), or None where the detector has none."""
    if seen.turn is None or seen.centre is None:
        return None
    ray = torch.cat([(seen.centre - K[:2, 2]) / K[0, 0], torch.ones(len(seen.centre), 1).double()], -1)
    front = IMAGE_NORMAL_FROM_CAM.double()
    return front @ ray_rotation(torch.nn.functional.normalize(ray, dim=-1)) @ front @ seen.turn


def _sigma(detection: Detection) -> Tensor:
    return _given(detection.sigma)


def _given(value):
    """Return a field that the detector gives in every frame or in none."""
    assert value is not None
    return value
