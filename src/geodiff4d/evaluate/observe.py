"""What the tracker sees in frames, generated or true: key points, expressions, normals (AKD, AED).

The paper names no networks for AKD and AED. Ours, the same for every method and for the truth:

- `akd`: mean distance of the 192 points of the embedded perception network between a frame and the truth [px].
- `aed`: mean distance of the face's vertices between the expressions (with the jaw) that tracking finds in a frame and
  in the truth, both on the average head without pose [mm].
- `expression_gain`, `expression_corr`: how much of the truth's change of expression over the video there is, of those
  vertices; a face that stands still scores 0 (`expression_gain.py`).
- `perception`: the normals that the same network gives on generated RGB, the rival of generated normals.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.evaluate.expression import expressed, face_displacements, face_region
from geodiff4d.evaluate.expression_gain import Products, video_products
from geodiff4d.evaluate.readers import AS_SEEN
from geodiff4d.heads import Head, HeadParams
from geodiff4d.render.crops import crop_image
from geodiff4d.tracking.detect import Detection, FollowingDetector
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.fit import fit


@dataclass(frozen=True)
class Observed:
    """What was seen; NaN, and None among the detections, where no face was."""

    detections: list[Detection | None]
    points: Float[Tensor, "frames points 2"]
    """[px]"""
    five: Float[Tensor, "frames 5 2"]
    """Eyes, nose and the mouth's corners of the fitted head, the person's right first [px]."""
    params: HeadParams | None
    """Tracked, [frames, …]; None if no frame shows a face."""

    def repeated(self, frames: int) -> "Observed":
        """Say of a film that stands still what its first frame says."""
        params = None if self.params is None else self.params.map(lambda v: v.expand(frames, *v.shape[1:]))
        return Observed(
            self.detections * frames, self.points.expand(frames, -1, -1), self.five.expand(frames, -1, -1), params
        )


@torch.no_grad()
def observe_frames(
    frames: Float[Tensor, "frames 3 height width"], head: Head, focal_px: float,
    detector: FollowingDetector | None = None,
) -> Observed:  # fmt: skip
    """Track frames that follow each other; the focal length is that of the camera they were made for."""
    found = list((detector or EmbeddedDetector()).follow(list(frames)))
    count = next((len(d.points) for d in found if d is not None), 0)
    none = torch.full((count, 2), torch.nan)
    points = torch.stack([none if d is None else d.points for d in found])
    five, params = torch.full((len(frames), 5, 2), torch.nan), None
    if count:
        try:
            fitted = fit(head, found, frames.shape[-1], frames.shape[-2], focal_px, AS_SEEN)
        except UserError:  # a head without the points that the detector knows
            return Observed(found, points, five, None)
        params = fitted.params
        marks = head.landmarks68.on(head.pose(params).vertices, head.faces)
        marks, _ = fitted.camera.expand(len(frames)).project(marks)
        eyes = [marks[:, 36:42].mean(1), marks[:, 42:48].mean(1)]
        seen = torch.tensor([d is not None for d in found])[:, None, None]
        five = torch.where(seen, torch.stack([*eyes, marks[:, 30], marks[:, 48], marks[:, 54]], 1), torch.nan)
    return Observed(found, points, five, params)


def keypoint_distance(a: Observed, b: Observed) -> Float[Tensor, " frames"]:
    """AKD per frame [px]; NaN where one of the two shows no face."""
    if a.points.shape[1] != b.points.shape[1]:
        return torch.full((len(a.points),), torch.nan)
    return (a.points - b.points).norm(dim=-1).mean(-1)


def expression_distance(head: Head, a: Observed, b: Observed) -> Float[Tensor, " frames"]:
    """AED per frame [mm]; NaN where one of the two shows no face."""
    seen = torch.tensor([x is not None and y is not None for x, y in zip(a.detections, b.detections, strict=True)])
    if a.params is None or b.params is None:
        return torch.full((len(seen),), torch.nan)
    region = face_region(head)
    va, vb = (expressed(head, o.params)[:, region] for o in (a, b) if o.params is not None)
    return torch.where(seen, 1000 * (va - vb).norm(dim=-1).mean(-1), torch.nan)


def expression_products(head: Head, truth: Observed, made: Observed) -> Products:
    """Compare how the face's vertices move over a video with how they should (`expression_gain`), both as tracked.

    Frames in which one of the two shows no face do not count; without three that do, gain and cos are NaN.
    """
    if truth.params is None or made.params is None:
        return Products(0.0, 0.0, 0.0)
    rows = []
    for observed, params in ((truth, truth.params), (made, made.params)):
        moved = face_displacements(head, params)
        moved[[d is None for d in observed.detections]] = np.nan
        rows.append(moved)
    return video_products(*rows)


def perceived_normals(observed: Observed, size: int) -> Float[Tensor, "frames 3 size size"] | None:
    """Return the perception network's normals in the frames; None where it saw no face in any."""
    if not any(d is not None and d.normal is not None for d in observed.detections):
        return None
    return torch.stack([_normals(d, size) for d in observed.detections])


def _normals(detection: Detection | None, size: int) -> Tensor:
    if detection is None or detection.normal is None:
        return torch.zeros(3, size, size)
    left, top, side = detection.extent or (0.0, 0.0, float(size))
    scale = detection.normal.shape[2] / side
    box = (-left * scale, -top * scale, size * scale)
    normal = crop_image(detection.normal.float(), box, size, fill=0.0)
    length = normal.norm(dim=0, keepdim=True)
    return normal / length.clamp(min=1e-6) * (length > 0.05)
