"""A user's word on where points of a face are: the detector's points follow it, and the fit trusts it most (ours).

Twelve points have names, which are the person's own left and right. Those that a user moves draw their neighbours
along: the displacement is interpolated by a thin-plate spline, under which points that nobody moved stay.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import RBFInterpolator

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_object
from geodiff4d.tracking.detect import Detection

ANCHORS = {
    "right brow": 105, "left brow": 334,
    "right eye, outer": 33, "right eye, inner": 133, "left eye, inner": 362, "left eye, outer": 263,
    "nose": 4, "mouth, right": 61, "mouth, left": 291, "upper lip": 0, "lower lip": 17, "chin": 152,
}  # fmt: skip
"""MediaPipe's number of each named point."""
CLOSEST = 0.02
"""Points that are closer to each other than this share of the face are taken for a slip."""

Points = Mapping[str, tuple[float, float]]
"""Positions by name [px of the upright image], x right and y down."""


def anchors(detection: Detection) -> dict[str, tuple[float, float]]:
    """Return where a detector sees the named points, as far as it knows them."""
    rows = {int(i): k for k, i in enumerate(detection.index.tolist())}
    return {
        name: (round(float(x), 2), round(float(y), 2))
        for name, index in ANCHORS.items()
        if index in rows
        for x, y in [detection.points[rows[index]].tolist()]
    }


def read_points(path: Path, width: int, height: int) -> Points:
    """Read a user's points: a JSON object of [x, y] by name.

    Raises:
        UserError: not such a file, an unknown name, or a point far outside the image.
    """
    given = read_object(path)
    if not given:
        raise UserError(f"{path} has no points: expected [x, y] by name, of {', '.join(ANCHORS)}")
    out = {}
    for name, value in given.items():
        if name not in ANCHORS:
            raise UserError(f"{path} names {name!r}: expected one of {', '.join(ANCHORS)}")
        numbers = isinstance(value, list) and len(value) == 2
        numbers = numbers and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        if not numbers or not np.isfinite(np.array(value, float)).all():
            raise UserError(f"{path}: {name!r} is {str(value)[:60]}: expected [x, y] in pixels of the upright image")
        if not (-0.5 * width <= value[0] <= 1.5 * width and -0.5 * height <= value[1] <= 1.5 * height):
            raise UserError(f"{path}: {name!r} is at {value}, far outside the image of {width}×{height} pixels")
        out[name] = (float(value[0]), float(value[1]))
    return out


def corrected(detection: Detection, points: Points) -> Detection:
    """Return a detection whose points follow a user's; those that were given are certain.

    Raises:
        UserError: the detector knows none of these points, or two of them are given one place.
    """
    seen = anchors(detection)
    wanted = {name: points[name] for name in seen if name in points}
    if not wanted:
        raise UserError(f"this detector sees none of {', '.join(points)}: expected some of {', '.join(seen)}")
    source = np.array([seen[name] for name in seen])
    target = np.array([wanted.get(name, seen[name]) for name in seen])
    face = float(np.ptp(target, axis=0).max())
    apart = np.linalg.norm(target[:, None] - target[None], axis=-1) + np.eye(len(target)) * face
    if apart.min() < CLOSEST * face:
        a, b = (list(seen)[k] for k in np.unravel_index(apart.argmin(), apart.shape))
        raise UserError(f"{a!r} and {b!r} are given one place: expected them apart, as in a face")
    moved = RBFInterpolator(source, target - source, kernel="thin_plate_spline", degree=1)
    places = detection.points + torch.from_numpy(moved(detection.points.double().numpy())).to(detection.points)
    given = torch.isin(detection.index, torch.tensor([ANCHORS[name] for name in wanted]))
    sigma = None if detection.sigma is None else torch.where(given, 0.0, detection.sigma)
    box = torch.cat([places.amin(0), places.amax(0)])
    return replace(detection, points=places, sigma=sigma, box=box)
