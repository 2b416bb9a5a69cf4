"""The demo's test pairs: portraits and drivers of the open world's test split, and the truth to score against."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import composite, read_image, write_image
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.data.synthetic.cameras import canonical_crop, head_region, orbit, rig
from geodiff4d.data.synthetic.expressions import expression_track
from geodiff4d.data.synthetic.seeds import Split
from geodiff4d.data.synthetic.subject import SyntheticSubject
from geodiff4d.data.synthetic.world import disturbed
from geodiff4d.evaluate.metrics import Truth
from geodiff4d.heads import Head, HeadParams
from geodiff4d.pipeline import Driving, still_head
from geodiff4d.render.meshes import interpolate, rasterize
from geodiff4d.video.generate import Portrait

FIRST_DRIVER = 1000
"""Seeds of driving subjects start here: nobody drives a portrait of their own."""
FACE_REGIONS = ("lips", "mouth", "teeth", "tongue", "lids", "eyes")
FACE_MARGIN_PX = 2


@dataclass(frozen=True)
class Pair:
    """A portrait, someone else's performance, and what that performance would look like on the portrait's own rig."""

    subject: SyntheticSubject
    portrait: Portrait
    driving: Driving
    """The driver as tracked; its frames come from the front camera."""
    truth_params: HeadParams
    """The subject under the driver's true expression, head still, [frames, …]."""


def make_pair(folder: Path, head: Head, index: int, frames: int, size: int, crop: int, split: Split = "test") -> Pair:
    """Render a pair's files into `folder` (portrait.png, driving/) and read them back, as a user's would be.

    The head parameters are the truth, disturbed as a tracker would (`disturbed`); the report says so.
    """
    from geodiff4d.pipeline import load_driving

    subject, driver = SyntheticSubject(index, split), SyntheticSubject(FIRST_DRIVER + index, split)
    folder.mkdir(parents=True, exist_ok=True)
    portrait = _portrait(folder / "portrait.png", head, subject, size)
    expr, jaw, eyes = expression_track("mixed", max(frames, 24), 7000 + index)
    pick = torch.linspace(0, len(expr) - 1, frames).round().long() if frames < 24 else torch.arange(frames)
    motion = driver.params(expr, jaw_pose=jaw, eyes_pose=eyes)
    tracked = disturbed(motion, seed=0)
    _driver_clip(folder / "driving", driver, motion[pick], tracked[pick], size)
    driving = load_driving(Clip(folder / "driving"), head, crop)
    truth = subject.params(expr[pick], jaw_pose=jaw[pick], eyes_pose=eyes[pick])
    return Pair(subject, portrait, driving, truth)


def _portrait(path: Path, head: Head, subject: SyntheticSubject, size: int) -> Portrait:
    """A near-frontal picture with a slight expression."""
    rng = np.random.default_rng((subject.seed, 17))
    expr = torch.zeros(1, 52)
    for name, most in (("mouthSmileLeft", 0.35), ("mouthSmileRight", 0.35), ("browInnerUp", 0.3)):
        expr[0, head.expression_names.index(name)] = rng.uniform(0, most)
    true = subject.params(expr)
    tracked = disturbed(true, seed=subject.seed)
    camera = orbit(torch.tensor([rng.uniform(-15, 15)]).float(), torch.tensor([rng.uniform(-5, 5)]).float(), size)
    camera = canonical_crop(camera, head.pose(tracked.without_expression()).vertices[0][head_region()], size)
    out = subject.render(true, camera)
    write_image(path, out.rgb[0])
    write_image(path.with_name("portrait_mask.png"), out.mask[0])
    return Portrait(read_image(path), read_image(path.with_name("portrait_mask.png"), "L"), camera[0], tracked[0])


def _driver_clip(folder: Path, driver: SyntheticSubject, motion: HeadParams, tracked: HeadParams, size: int) -> None:
    camera = canonical_crop(rig(size)[8:9], driver.vertices(motion[:1])[0][head_region()], size)
    n = motion.batch[0]
    out = driver.render(motion, camera.expand(n))
    with ClipWriter(
        folder, extra={"subject_seed": driver.seed, "split": driver.split, "params": "truth, disturbed"}
    ) as clip:
        for t in range(n):
            clip.add_params(t, tracked[t])
            clip.add(t, 0, out.rgb[t], camera[0], out.mask[t])


def truth_frames(pair: Pair, params: HeadParams, cameras: Camera) -> Truth:
    """Render the subject itself under true parameters in the target cameras, on grey, its mouth and eyes marked."""
    out = pair.subject.render(params, cameras)
    return Truth(
        composite(out.rgb, out.mask), out.normal, out.mask, _face_mask(pair.subject, params, cameras) * out.mask
    )


def _face_mask(subject: SyntheticSubject, params: HeadParams, cameras: Camera) -> Float[Tensor, "t 1 height width"]:
    head = subject.rig
    inside = torch.stack([head.regions[r] for r in FACE_REGIONS]).any(0).float()[:, None]
    fragments = rasterize(subject.vertices(params), head.faces, cameras)
    grown = 2 * FACE_MARGIN_PX + 1
    return torch.nn.functional.max_pool2d(
        (interpolate(fragments, head.faces, inside) > 0.5).float(), grown, 1, FACE_MARGIN_PX
    )


def scored_shots(pair: Pair, head: Head, views: int, count: int, size: int) -> tuple[Driving, HeadParams, Camera]:
    """Choose the frames a pair is scored on: (driving frames with a still head, true parameters, cameras)."""
    from geodiff4d.pipeline import clip_cameras, driver_clip_index

    index = driver_clip_index(pair.driving, count)
    chosen = pair.driving.select(index)
    chosen = replace(chosen, params=still_head(chosen.params))
    cameras = clip_cameras(head, pair.portrait, views, size)
    spread = torch.tensor([round((k + 0.5) * views / len(index) - 0.5) % views for k in range(len(index))])
    return chosen, pair.truth_params[torch.tensor(index)], cameras[spread]


def silhouette_orbit(pair: Pair, head: Head, size: int, count: int, degrees: float = 60.0) -> tuple[Camera, Truth]:
    """Render the subject at rest around ±`degrees`, for the avatar's silhouettes."""
    azimuth = torch.linspace(-degrees, degrees, count)
    neutral = pair.subject.params(torch.zeros(count, 52))
    points = head.pose(neutral[:1]).vertices[0][head_region()]
    cameras = canonical_crop(orbit(azimuth, torch.zeros(count), size), points, size)
    return cameras, truth_frames(pair, neutral, cameras)
