"""The demo's test pairs: portraits and drivers of the open world's test split, and the truth to score against.

People are taken in the order of their seeds, but those whose colours nobody has: training wants those, no user is one.
Portrait and driver are files like a user's: a photograph and a film before a background, from which everything is
tracked (`track_pair`). Tests, whose pictures are too small for that, take the truth with a tracker's error
(`make_pair`).
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.files import read_json, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import composite, read_image, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.video import write_video
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.evaluate.metrics import Truth
from geodiff4d.heads import Head, HeadParams
from geodiff4d.pipeline import clip_cameras, driver_clip_index, tracked
from geodiff4d.render.crops import canonical_crop, head_region
from geodiff4d.render.meshes import interpolate, rasterize
from geodiff4d.render.viewpoints import capture_cameras, orbit, world_region
from geodiff4d.video.inputs import Driving, Portrait, load_driving, load_portrait, still_head
from geodiff4d.world.expressions import expression_track
from geodiff4d.world.seeds import Split
from geodiff4d.world.subject import WORLD_VERSION, SyntheticSubject, plain_seed
from geodiff4d.world.tracker_error import disturbed

FIRST_DRIVER = 1000
"""Seeds of driving subjects start here: nobody drives a portrait of their own."""
FACE_REGIONS = ("lips", "mouth", "teeth", "tongue", "lids", "eyes")
FACE_MARGIN_PX = 2


@dataclass(frozen=True)
class Pair:
    """A portrait, someone else's performance, and what that performance would look like on the portrait's own head."""

    subject: SyntheticSubject
    portrait: Portrait
    driving: Driving
    """The driver as tracked; its frames come from the front camera."""
    truth_params: HeadParams
    """The subject under the driver's true expression, head still, [frames, …]."""

    def seen_by(self, head: Head, cameras: Camera) -> Camera:
        """Move cameras from around the tracked head to around the true one.

        A picture does not tell how large a head is: where the tracked one is smaller, the true one is seen from as
        much farther away. Both stand upright in the head's frame, so that no rotation is left to align.
        """
        tracked = replace(head.neutral(1), shape=self.portrait.params.shape[None])
        a = head.pose(tracked).vertices[0][head_region(head)]
        b = self.subject.vertices(self.subject.params(torch.zeros(1, 52)))[0][world_region()]
        ca, cb = a.mean(0), b.mean(0)
        scale = (b - cb).norm() / (a - ca).norm()
        T = cameras.T_cam_world.clone()
        T[..., :3, 3] = scale * T[..., :3, 3] + T[..., :3, :3] @ (scale * ca - cb)
        return replace(cameras, T_cam_world=T)


def make_pair(folder: Path, head: Head, index: int, frames: int, size: int, crop: int, split: Split = "test") -> Pair:
    """Render a pair's files into `folder` (portrait.png, driving/) and read them back.

    The head parameters are the truth, disturbed as a tracker would (`disturbed`).
    """
    cast = _cast(index, frames, split)
    folder.mkdir(parents=True, exist_ok=True)
    portrait = _portrait(folder / "portrait.png", head, cast.subject, size)
    _driver_clip(folder / "driving", cast.driver, cast.motion, disturbed(cast.motion, seed=0), size)
    return Pair(cast.subject, portrait, load_driving(Clip(folder / "driving"), head, crop), cast.truth)


def track_pair(
    folder: Path, head: Head, index: int, frames: int, size: int, crop: int, split: Split = "test",
    progress: Progress = silent,
) -> Pair:  # fmt: skip
    """Render portrait.png and driving.mp4 into `folder` and track both from their pixels; what is there is kept.

    Raises:
        UserError: the tracker sees no face in one of them.
    """
    cast = _cast(index, frames, split)
    folder.mkdir(parents=True, exist_ok=True)
    of = {"of": fingerprint(WORLD_VERSION, head.name, head.template, index, frames, size, split)}
    if not (folder / "pair.json").exists() or read_json(folder / "pair.json") != of:
        for name in ("portrait", "driving"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("portrait.png", "driving.mp4"):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "pair.json", of)
    photograph, film = folder / "portrait.png", folder / "driving.mp4"
    if not photograph.exists():
        write_photograph(photograph, head, cast.subject, size)
    if not film.exists():
        write_driving_video(film, cast.driver, cast.motion, size)

    def clip(source: Path, out: Path) -> Clip:
        there = (out / "transforms.json").exists()
        return Clip(out) if there else tracked(source, head, size, out, progress=progress)

    portrait = load_portrait(clip(photograph, folder / "portrait"), size)
    return Pair(cast.subject, portrait, load_driving(clip(film, folder / "driving"), head, crop), cast.truth)


@dataclass(frozen=True)
class _Cast:
    """Who is in a pair, and what happens."""

    subject: SyntheticSubject
    driver: SyntheticSubject
    motion: HeadParams
    """The driver's, true, [frames, …]."""
    truth: HeadParams
    """The subject's under the same expressions."""


def _cast(index: int, frames: int, split: Split) -> _Cast:
    subject = SyntheticSubject(plain_seed(index, split), split)
    driver = SyntheticSubject(plain_seed(index, split, FIRST_DRIVER), split)
    expr, jaw, eyes = expression_track("mixed", max(frames, 24), 7000 + index)
    pick = torch.linspace(0, len(expr) - 1, frames).round().long() if frames < 24 else torch.arange(frames)
    motion = driver.params(expr[pick], jaw_pose=jaw[pick], eyes_pose=eyes[pick])
    return _Cast(subject, driver, motion, subject.params(expr[pick], jaw_pose=jaw[pick], eyes_pose=eyes[pick]))


def _portrait_pose(head: Head, subject: SyntheticSubject) -> tuple[HeadParams, Camera]:
    """A slight expression, seen nearly from the front."""
    rng = np.random.default_rng((subject.seed, 17))
    expr = torch.zeros(1, 52)
    for name, most in (("mouthSmileLeft", 0.35), ("mouthSmileRight", 0.35), ("browInnerUp", 0.3)):
        expr[0, head.expression_names.index(name)] = rng.uniform(0, most)
    azimuth, elevation = rng.uniform(-15, 15), rng.uniform(-5, 5)
    return subject.params(expr), orbit(torch.tensor([azimuth]).float(), torch.tensor([elevation]).float(), 256)


def write_photograph(path: Path, head: Head, subject: SyntheticSubject, size: int) -> None:
    """Write the portrait as a file that a user might give: one render, loosely framed."""
    params, camera = _portrait_pose(head, subject)
    points = subject.vertices(params)[0][world_region()]
    camera = loosely(camera, points, size)
    out = subject.render(params, camera)
    write_image(path, out.rgb[0])


def write_driving_video(path: Path, driver: SyntheticSubject, motion: HeadParams, size: int) -> None:
    """Write the driver's performance as a video file, seen by the front camera, loosely framed."""
    camera = loosely(capture_cameras(size)[8:9], driver.vertices(motion[:1])[0][world_region()], size)
    out = driver.render(motion, camera.expand(motion.batch[0]))
    write_video(path, iter(out.rgb), 24.0)


def loosely(camera: Camera, points: Float[Tensor, "n 3"], size: int) -> Camera:
    """Frame a head as people do, with a third more room around it than a canonical crop has."""
    side = 2 * (round(4 / 3 * size) // 2)
    camera = canonical_crop(camera, points, size)
    margin = (side - size) / 2
    return camera.cropped(-margin, -margin, side, side)


def _portrait(path: Path, head: Head, subject: SyntheticSubject, size: int) -> Portrait:
    true, camera = _portrait_pose(head, subject)
    tracked = disturbed(true, seed=subject.seed)
    camera = canonical_crop(camera, head.pose(tracked.without_expression()).vertices[0][head_region(head)], size)
    out = subject.render(true, camera)
    write_image(path, out.rgb[0])
    write_image(path.with_name("portrait_mask.png"), out.mask[0])
    return Portrait(read_image(path), read_image(path.with_name("portrait_mask.png"), "L"), camera[0], tracked[0])


def _driver_clip(folder: Path, driver: SyntheticSubject, motion: HeadParams, tracked: HeadParams, size: int) -> None:
    camera = canonical_crop(capture_cameras(size)[8:9], driver.vertices(motion[:1])[0][world_region()], size)
    n = motion.batch[0]
    out = driver.render(motion, camera.expand(n))
    with ClipWriter(
        folder, extra={"subject_seed": driver.seed, "split": driver.split, "params": "truth, disturbed"}
    ) as clip:
        for t in range(n):
            clip.add_params(t, tracked[t])
            clip.add(t, 0, out.rgb[t], camera[0], out.mask[t])


def truth_frames(pair: Pair, head: Head, params: HeadParams, cameras: Camera) -> Truth:
    """Render the subject itself under true parameters, on grey, its mouth and eyes marked.

    `cameras` stand around the tracked head (`Pair.seen_by`).
    """
    cameras = pair.seen_by(head, cameras)
    out = pair.subject.render(params, cameras)
    return Truth(
        composite(out.rgb, out.mask), out.normal, out.mask, face_mask(pair.subject, params, cameras) * out.mask
    )


def face_mask(subject: SyntheticSubject, params: HeadParams, cameras: Camera) -> Float[Tensor, "t 1 height width"]:
    """Mark mouth and eyes, as far as they are seen and a little beyond (`FACE_MARGIN_PX`)."""
    head = subject.rig
    inside = torch.stack([head.regions[r] for r in FACE_REGIONS]).any(0).float()[:, None]
    fragments = rasterize(subject.vertices(params), head.faces, cameras)
    grown = 2 * FACE_MARGIN_PX + 1
    return torch.nn.functional.max_pool2d(
        (interpolate(fragments, head.faces, inside) > 0.5).float(), grown, 1, FACE_MARGIN_PX
    )


def scored_shots(pair: Pair, head: Head, views: int, count: int, size: int) -> tuple[Driving, HeadParams, Camera]:
    """Choose the frames a pair is scored on: (driving frames with a still head, true parameters, cameras)."""
    index = driver_clip_index(pair.driving, count)
    chosen = pair.driving.select(index)
    chosen = replace(chosen, params=still_head(chosen.params))
    cameras = clip_cameras(head, pair.portrait, views, size)
    spread = torch.tensor([round((k + 0.5) * views / len(index) - 0.5) % views for k in range(len(index))])
    return chosen, pair.truth_params[torch.tensor(index)], cameras[spread]


def silhouette_orbit(pair: Pair, head: Head, size: int, count: int, degrees: float = 60.0) -> tuple[Camera, Truth]:
    """Render the subject at rest around ±`degrees`, for the avatar's silhouettes."""
    azimuth = torch.linspace(-degrees, degrees, count)
    at_rest = replace(head.neutral(1), shape=pair.portrait.params.shape[None])
    points = head.pose(at_rest).vertices[0][head_region(head)]
    cameras = canonical_crop(orbit(azimuth, torch.zeros(count), size), points, size)
    return cameras, truth_frames(pair, head, pair.subject.params(torch.zeros(count, 52)), cameras)
