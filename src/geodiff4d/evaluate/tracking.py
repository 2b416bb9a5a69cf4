"""How well people of the open world are tracked from one picture each, beside the truth.

Every picture shows one subject with an expression of its own, off centre, before its background; the tracker knows
nothing of the camera. A picture in which no face is found counts as a failure. Lengths in pixels are those of a
canonical crop of 256. The truth is the subject's own mesh, which the tracker's head can only come near.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.files import write_json
from geodiff4d.core.geometry import transform
from geodiff4d.core.images import write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.evaluate.expression import compared, face_region
from geodiff4d.evaluate.expression_gain import change_products, pooled
from geodiff4d.evaluate.metrics import normal_deg
from geodiff4d.heads.rig import SKULL_JOINT, Head, HeadParams
from geodiff4d.render.crops import canonical_crop, canonical_crop_box, head_region
from geodiff4d.render.viewpoints import orbit
from geodiff4d.tracking.detect import Detection, Detector
from geodiff4d.tracking.track import Cut, Tracked, TrackingConfig, overlay, track_frames
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import SyntheticSubject

YAW_BINS = (0.0, 15.0, 30.0, 45.0, 75.0)
CHUNK, SHOWN = 20, 24
"""Pictures that are in memory at once, and overlays of each detector on its sheet."""


@dataclass(frozen=True)
class Case:
    """One picture and the truth of it."""

    subject: SyntheticSubject
    params: HeadParams
    """Truth, a batch of one."""
    camera: Camera
    image: Float[Tensor, "3 size size"]
    yaw_deg: float
    """Of the head to the camera, whatever its sign."""


@dataclass(frozen=True)
class Score:
    """What tracking one picture was worth."""

    yaw_deg: float
    landmark_px: float
    """Mean distance of the fitted head's 68 landmarks."""
    detected_px: float
    """Mean distance of the detector's points, where it says which places of the head they are."""
    rotation_deg: float
    pitch_deg: float
    """Signed parts of the rotation's error."""
    yaw_error_deg: float
    vertex_mm: float
    """Face as posed, to the camera, aligned by translation and scale."""
    mean_head_mm: float
    """The same of the mean head without expression, in the tracked pose."""
    identity_mm: float
    """Face without pose and expression, aligned by rotation, translation and scale."""
    mean_identity_mm: float
    """The same of the mean head."""
    normal_deg: float
    mask_iou: float


def make_case(seed: int, split: Split = "test", size: int = 320, yaw_deg: float = 60.0) -> Case:
    """Render one case: half of them nearly from the front, the others from anywhere within ±`yaw_deg`."""
    rng = generator("tracking", split, seed)
    subject = SyntheticSubject(seed, split)
    expr, jaw, eyes = random_expression(int(rng.integers(1 << 31)), 1)
    turn = torch.from_numpy(np.deg2rad(rng.normal(0, [5.0, 5.0, 4.0]))).float()[None]
    params = subject.params(expr, rotation=turn, jaw_pose=jaw, eyes_pose=eyes)
    front = rng.random() < 0.5
    azimuth = rng.normal(0, 10) if front else rng.uniform(-yaw_deg, yaw_deg)
    elevation = rng.normal(0, 6) if front else rng.uniform(-20, 20)
    camera = orbit(torch.tensor([azimuth]).float(), torch.tensor([elevation]).float(), size, float(rng.uniform(0.6, 2)))
    vertices = subject.vertices(params)[0]
    camera = canonical_crop(camera[0], vertices[head_region(subject.rig)])
    side = float(rng.uniform(1.0, 1.5)) * size
    left, top = (size - side) / 2 + rng.uniform(-0.2, 0.2, 2) * (side - 0.6 * size)
    camera = camera.cropped(float(left), float(top), side, size)
    image = subject.render(params, camera.expand(1)).rgb[0]
    R = _skull(subject, params, camera)
    return Case(subject, params, camera, image, abs(float(torch.rad2deg(torch.atan2(R[0, 2], -R[2, 2])))))


def score(case: Case, tracked: Tracked, head: Head) -> Score:
    """Compare a tracked picture with the truth."""
    vertices = case.subject.vertices(case.params)[0]
    mesh = tracked.located.mesh
    whole = tracked.located.fit.camera
    true_box = canonical_crop_box(case.camera, vertices[None, head_region(head)])
    px = 256 / true_box[2]
    fitted, _ = whole.project(head.landmarks68.on(mesh.vertices[0], head.faces))
    true, _ = case.camera.project(head.landmarks68.on(vertices, head.faces))
    R_fit = whole.T_cam_world[:3, :3] @ mesh.T_world_joint[0, SKULL_JOINT, :3, :3]
    D = R_fit @ _skull(case.subject, case.params, case.camera).T
    off = torch.stack([D[2, 1] - D[1, 2], D[0, 2] - D[2, 0], D[1, 0] - D[0, 1]]) / 2
    face = face_region(head)
    neutral = head.template + head.shape_basis @ tracked.params.shape[0]
    truth = case.subject.rig.template[face]
    mean = head.pose(replace(tracked.params, shape=0 * tracked.params.shape, expr=0 * tracked.params.expr)).vertices[0]
    seen = transform(case.camera.T_cam_world, vertices)[face]
    ours, means = (transform(whole.T_cam_world, v)[face] for v in (mesh.vertices[0], mean))
    frames = case.subject.render(case.params, case.camera.cropped(*tracked.located.box, tracked.camera.width).expand(1))
    angle = float("nan")
    if tracked.normals is not None:
        angle = float(normal_deg(tracked.normals, frames.normal, (frames.mask > 0.9).float())[0])
    a, b = tracked.masks[0] > 0.5, frames.mask[0] > 0.5
    return Score(
        yaw_deg=case.yaw_deg,
        landmark_px=float((fitted - true).norm(dim=-1).mean()) * px,
        detected_px=_detected(tracked.located.detections[0], case, vertices, head) * px,
        rotation_deg=float(torch.rad2deg(torch.acos(((D.trace() - 1) / 2).clamp(-1, 1)))),
        pitch_deg=float(torch.rad2deg(off[0])),
        yaw_error_deg=float(torch.rad2deg(off[1])),
        vertex_mm=1000 * aligned_error(ours, seen, turn=False),
        mean_head_mm=1000 * aligned_error(means, seen, turn=False),
        identity_mm=1000 * aligned_error(neutral[face], truth),
        mean_identity_mm=1000 * aligned_error(head.template[face], truth),
        normal_deg=angle,
        mask_iou=float((a & b).sum() / (a | b).sum()),
    )


def aligned_error(points: Float[Tensor, "points 3"], truth: Float[Tensor, "points 3"], turn: bool = True) -> float:
    """Mean distance after the best similarity transform (Umeyama 1991), in the unit of the points.

    Without `turn` only translation and scale are taken out.
    """
    a, b = (x.double() - x.double().mean(0) for x in (points, truth))
    if not turn:
        return float(((a * b).sum() / a.square().sum() * a - b).norm(dim=1).mean())
    U, S, Vh = torch.linalg.svd(b.T @ a)
    flip = torch.ones(3, dtype=torch.float64)
    flip[2] = torch.sign(torch.linalg.det(U @ Vh))
    scale = (S * flip).sum() / a.square().sum()
    return float((scale * a @ (U @ torch.diag(flip) @ Vh).T - b).norm(dim=1).mean())


def _skull(subject: SyntheticSubject, params: HeadParams, camera: Camera) -> Float[Tensor, "3 3"]:
    posed = subject.rig.pose(params.without_shape())
    return camera.T_cam_world[:3, :3] @ posed.T_world_joint[0, SKULL_JOINT, :3, :3]


def _detected(detection: Detection | None, case: Case, vertices: Tensor, head: Head) -> float:
    if detection is None or detection.markup is None:
        return float("nan")
    true, _ = case.camera.project(detection.markup.on(head).on(vertices, head.faces))
    return float((detection.points - true).norm(dim=-1).mean())


def evaluate_tracking(
    out: Path, head: Head, detectors: dict[str, Detector], count: int = 100, split: Split = "test",
    config: TrackingConfig = TrackingConfig(), progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Track `count` subjects' pictures with each detector; writes `metrics.json` and a sheet of overlays each."""
    scores: dict[str, list[Score | None]] = {name: [] for name in detectors}
    looks: dict[str, list[Tensor]] = {name: [] for name in detectors}
    expressions: dict[str, list[tuple[HeadParams, HeadParams]]] = {name: [] for name in detectors}
    bar = iter(progress(range(count), "tracking", count))
    for first in range(0, count, CHUNK):
        cases = [make_case(seed, split) for seed in range(first, min(first + CHUNK, count))]
        # MediaPipe starts anew for every call: it is asked for some pictures at a time.
        answers = {name: d.detect([c.image for c in cases]) for name, d in detectors.items()}
        for i, case in enumerate(cases):
            for name, found in answers.items():
                if found[i] is None:
                    scores[name].append(None)
                    continue
                tracked = track_frames([case.image], head, _Answer(found[i]), config, video=False)
                scores[name].append(score(case, tracked, head))
                expressions[name].append((case.params[0], tracked.params[0]))
                if len(looks[name]) < SHOWN:
                    normal = None if tracked.normals is None else tracked.normals[0]
                    looks[name].append(overlay(Cut(tracked.images[0], tracked.masks[0], normal), tracked.located, 0))
            next(bar, None)
    next(bar, None)
    result = {
        "split": split, "count": count,
        **{name: {**summary(s), "expression": expression_gains(head, expressions[name])} for name, s in scores.items()},
        "cases": {name: [None if s is None else asdict(s) for s in values] for name, values in scores.items()},
    }  # fmt: skip
    write_json(out / "metrics.json", result)
    for name, pictures in looks.items():
        if pictures:
            rows = [torch.cat(pictures[i : i + 2], -1) for i in range(0, len(pictures) - 1, 2)] or pictures
            write_image(out / f"{name}.png", torch.cat(rows, -2))
    return result


def expression_gains(head: Head, found: list[tuple[HeadParams, HeadParams]]) -> dict[str, Any]:
    """Return gain and corr of (true, tracked) expressions over pictures, by `expression.GROUPS`, with 95 % intervals.

    Both are taken from their own mean over the pictures (`expression_gain`); empty for fewer than three.
    """
    if len(found) < 3:
        return {}
    truth, tracked = (HeadParams.stack([pair[k] for pair in found]) for k in range(2))
    out = {}
    for group, (x, y) in compared(head, truth, tracked).items():
        row = pooled([change_products(a, b) for a, b in zip(x - x.mean(0), y - y.mean(0), strict=True)])
        out[group] = {"gain": row["gain"], "corr": row["cos"]}
    return out


@dataclass(frozen=True)
class _Answer:
    """A detector that has been asked already."""

    found: Detection | None

    def detect(
        self, images: Iterable[Float[Tensor, "3 _height _width"]], video: bool = False
    ) -> list[Detection | None]:
        return [self.found for _ in images]


def summary(scores: list[Score | None]) -> dict[str, Any]:
    """Medians over the pictures with a face (mean for normals and masks), overall and by yaw; and failures."""
    found = [s for s in scores if s is not None]
    out: dict[str, Any] = {"failures": len(scores) - len(found), "pictures": len(scores)}
    out |= _medians(found)
    for low, high in pairwise(YAW_BINS):
        out[f"yaw_{low:.0f}_{high:.0f}"] = _medians([s for s in found if low <= s.yaw_deg < high])
    return out


def _medians(scores: list[Score]) -> dict[str, float | int | None]:
    out: dict[str, float | int | None] = {"pictures_with_face": len(scores)}
    for f in fields(Score):
        values = np.array([getattr(s, f.name) for s in scores], dtype=float)
        values = values[np.isfinite(values)]
        if f.name == "yaw_deg":
            continue
        reduce = np.mean if f.name in ("normal_deg", "mask_iou") else np.median
        if f.name in ("pitch_deg", "yaw_error_deg"):
            reduce = lambda v: np.sqrt(np.mean(np.square(v)))  # noqa: E731
        out[f.name] = round(float(reduce(values)), 4) if len(values) else None
    return out
