"""Portrait → track → generate (diffusion or warp) → fit → render: the one path every command walks a part of."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.config import FitConfig
from geodiff4d.avatar.fit import fit
from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_object, refuse_foreign, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.precision import bf16_is_native
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.weights import weights_folder
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.heads import Head
from geodiff4d.presets import Preset, preset
from geodiff4d.render.crops import canonical_crop, head_region
from geodiff4d.render.viewpoints import CAPTURE_AZIMUTH_DEG, capture_cameras, capture_views
from geodiff4d.tracking.placed import placed
from geodiff4d.tracking.source import is_video
from geodiff4d.tracking.together import track_together
from geodiff4d.tracking.track import TrackingConfig, track
from geodiff4d.video.generate import DiffusionGenerator, Generated, GenerationRequest, Generator
from geodiff4d.video.inputs import Driving, Portrait, still_head, with_identity_of
from geodiff4d.video.model import VideoModel, load_video_model
from geodiff4d.video.parts import PART, Devices, Shown, plan_parts, views_of, write_parts
from geodiff4d.video.vae import StableCodec

SHIPPED_MODEL = weights_folder("embedded")


def load_model(folder: Path | None = None, device: torch.device | None = None) -> VideoModel:
    """Load a video model folder, by default the one that ships with the package.

    Args:
        device: where it will be `placed_on`: what is held in bf16 there is read so. The model is still on the CPU.

    Raises:
        UserError: it is missing or damaged.
    """
    if folder is None and not SHIPPED_MODEL.exists():
        raise UserError("this installation has no shipped model: give --model DIR, or use --generator warp")
    compact = device is not None and device.type == "cuda" and bf16_is_native(device)
    return load_video_model(folder or SHIPPED_MODEL, compact)


def default_preset(model: VideoModel) -> Preset:
    """Return the preset that samples a model as it was trained: the paper's starts from a noised reference."""
    return preset("embedded" if model.config.diffusion.zero_terminal else "paper")


def placed_on(model: VideoModel, device: torch.device) -> VideoModel:
    """Move a model to where it computes; one in Stable Diffusion's size goes to a GPU in bf16, as `bench` measures."""
    if device.type == "cuda" and isinstance(model.codec, StableCodec) and bf16_is_native(device):
        model = model.compact()
    with torch.no_grad():
        return model.to(device)


def tracked(
    source: Path, head: Head, size: int, out: Path, limit: int | None = None, progress: Progress = silent, skip: int = 0
) -> Clip:
    """Open a tracked folder, or track an image or video into `out`: at most `limit` frames, after the first `skip`.

    Raises:
        UserError: the source is unreadable or shows no face.
    """
    source = Path(source)
    if source.is_dir():
        clip = Clip(source)
        clip.require_head(head.name)
        return clip
    return track(source, out, head, config=TrackingConfig(size=size, limit=limit, skip=skip), progress=progress)


def tracked_portrait(
    sources: Sequence[Path], head: Head, size: int, out: Path, progress: Progress = silent
) -> Clip:  # fmt: skip
    """Open a tracked folder, or track one image into `out`; of several images, or a video, one clip of one person.

    Raises:
        UserError: a source is unreadable or shows no face, or folders are among several.
    """
    if len(sources) == 1 and (Path(sources[0]).is_dir() or not is_video(Path(sources[0]))):
        return tracked(sources[0], head, size, out, 1, progress)
    for folder in (s for s in sources if Path(s).is_dir()):
        raise UserError(f"{folder} is a folder: expected it alone, or images and videos, which are tracked together")
    return track_together(sources, out, head, config=TrackingConfig(size=size), progress=progress)


def following(portrait: Portrait, driving: Driving, head: Head) -> tuple[Driving, Camera]:
    """Put the portrait's head where the driver's is seen, as large as it is, before the driver's camera.

    Only here does a head follow another camera than its own: `synthesize` and `reconstruct` hold it still before
    cameras that are set up around it, at its own tracked size. Returns (driving in the portrait's shape, the driver's
    camera at the portrait's size).

    Raises:
        UserError: several cameras saw the driver, or its frames are no square crops.
    """
    camera, size = driving.camera, portrait.camera.width
    if camera is None or camera.width != camera.height:
        seen = "several cameras" if camera is None else f"frames of {camera.width}×{camera.height}"
        raise UserError(f"the driver has {seen}: expected square crops of one camera, as `geodiff4d track` makes them")
    camera = camera.resized(size, size)
    params = placed(head, with_identity_of(portrait, driving.params), driving.params, camera)
    return replace(driving, params=params), camera


@dataclass(frozen=True)
class Shot:
    """One frame to generate: which driving frame, seen by which camera."""

    timestep: int
    camera: int


def plan_shots(driving_frames: int, views: int, frames: int) -> list[Shot]:
    """Spread `frames` shots over `views` cameras: each camera takes its own segment of the driving clip.

    So a few frames a view hold many expressions. Where the clip is shorter than the shots, segments wrap around, and an
    instant is then seen by several cameras with one set of parameters.
    """
    per_view = max(1, frames // views)
    return [Shot((v * per_view + k) % driving_frames, v) for v in range(views) for k in range(per_view)]


def plan_instants(instants: int, views: int, frames: int, first: int = 0) -> list[Shot]:
    """Spread `frames` shots over instants that do not follow each other, and each instant's shots over the cameras.

    `first` is the number of the first instant.
    """
    rounds = [divmod(k, instants) for k in range(frames)]
    # Shown again, an instant is seen from far from where it was, and from all cameras before one sees it twice.
    away = next(s for s in range(max(1, views // 2), 0, -1) if math.gcd(s, views) == 1)
    return [Shot(first + i, (i + again * away) % views) for again, i in rounds]


def clip_cameras(
    head: Head, portrait: Portrait, views: int, size: int, azimuth_deg: float = CAPTURE_AZIMUTH_DEG
) -> Camera:  # fmt: skip
    """Return capture views, cropped around the portrait's head at rest; the outermost are `azimuth_deg` apart."""
    neutral = replace(head.neutral(1), shape=portrait.params.shape[None], static_offset=None)
    points = head.pose(neutral).vertices[0][head_region(head)]
    cameras = capture_cameras(size, azimuth_deg=azimuth_deg)[torch.tensor(capture_views(views))]
    return canonical_crop(cameras, points, size)


@dataclass(frozen=True)
class ClipPlan:
    """What an avatar's training clip shows, before any of it is generated."""

    shots: list[Shot]
    request: GenerationRequest
    """Its driving is in the portrait's shape, the head still; shots point at its frames."""
    views: Camera
    """The clip's cameras, [views]."""

    @property
    def shown(self) -> GenerationRequest:
        """The request for one frame of every shot."""
        return replace(self.request, driving=self.request.driving.select([s.timestep for s in self.shots]))

    @property
    def cameras(self) -> Camera:
        """The camera of every shot, [shots]."""
        return self.views[torch.tensor([s.camera for s in self.shots])]


def plan_clip(
    request: GenerationRequest, views: int, frames: int, motion: Driving | None = None,
    azimuth_deg: float = CAPTURE_AZIMUTH_DEG,
) -> ClipPlan:  # fmt: skip
    """Plan the avatar's training clip: several cameras, the driver's expressions, a still head (S-A.1).

    `motion`, a range of motion, takes two thirds of the frames; the rest are instants spread over the driver's. A
    driver that is itself instants is shown like one. The outermost cameras are `azimuth_deg` apart.
    """
    portrait, driving = request.portrait, request.driving
    if motion is None and driving.unread:
        driving = driving.select([k for k in range(len(driving)) if k not in driving.unread])
    if motion is None and driving.temporal:
        shots = plan_shots(len(driving), views, frames)
    elif motion is None:
        shots = plan_instants(len(driving), views, frames)
    else:
        own = driving.select(driver_clip_index(driving, max(1, frames // 3)))
        shots = plan_instants(len(motion), views, frames - frames // 3)
        shots += plan_instants(len(own), views, frames // 3, len(motion))
        driving = motion.and_instants(own)
    # The clip has cameras of its own, so that the driver's is of no use.
    still = replace(driving, params=with_identity_of(portrait, still_head(driving.params)), camera=None)
    cameras = clip_cameras(request.head, portrait, views, portrait.camera.width, azimuth_deg)
    return ClipPlan(shots, replace(request, driving=still), cameras)


def write_planned(out: Path, plan: ClipPlan, made: Generated, about: dict[str, Any]) -> Clip:
    """Write what was generated of a plan as a clip; `about` goes into the clip's notes."""
    with _planned(out, plan, about) as clip:
        for i, s in enumerate(plan.shots):
            clip.add(s.timestep, s.camera, made.rgb[i], plan.views[s.camera], made.mask[i], made.normal[i])
        _set_tokens(clip, plan, made.tokens)
    return Clip(out)


def _planned(out: Path, plan: ClipPlan, about: dict[str, Any]) -> ClipWriter:
    about = about | {"views": len(plan.views.K), "frames": len(plan.shots)}
    return ClipWriter(out, plan.request.head.name, plan.request.driving.fps, about)


def _set_tokens(clip: ClipWriter, plan: ClipPlan, tokens: Float[Tensor, "shots tokens channels"]) -> None:
    """Store what a plan's frames have beside images: parameters, the portrait, and the tokens of every timestep."""
    rows = {s.timestep: tokens[i] for i, s in enumerate(plan.shots)}
    for t in sorted(rows):
        clip.add_params(t, plan.request.driving.params[t])
    clip.set_reference(plan.request.portrait.on_grey)
    clip.set_tokens(torch.stack([rows[t] for t in sorted(rows)]))


def synthesize(
    plan: ClipPlan, generator: Generator, out: Path, progress: Progress = silent, devices: Devices | None = None
) -> Clip:
    """Generate the avatar's training clip (S-A.1) and write it to `out`.

    Its parameters are the portrait's identity under the tracked expressions of the plan's driving. Frames are on disk
    as soon as they are decoded, in a hidden folder beside `out`: the same call goes on where it was interrupted.

    Args:
        devices: who generates; by default `generator`, in this process.
    """
    names = [(s.timestep, s.camera) for s in plan.shots]
    shown = Shown(plan.request, [s.timestep for s in plan.shots], plan.cameras, names)
    across = isinstance(generator, DiffusionGenerator) and generator.model.temporal and plan.request.driving.temporal
    parts = plan_parts(views_of(names), not across, PART)
    unfinished = refuse_foreign(out).with_name(f".{Path(out).name}.unfinished")
    made_of = fingerprint(plan, generator.fingerprint())
    tokens = [rows for _, rows in write_parts(shown, parts, generator, unfinished, made_of, progress, devices)]
    with _planned(out, plan, generator.about()) as clip:
        clip.take_written(unfinished, ((s.timestep, s.camera, plan.views[s.camera]) for s in plan.shots))
        _set_tokens(clip, plan, torch.cat(tokens))
    shutil.rmtree(unfinished)
    return Clip(out)


def driver_clip_index(driving: Driving, count: int) -> list[int]:
    """Pick `count` frames spread evenly over a driving clip's frames in which a face was read."""
    read = [k for k in range(len(driving)) if k not in driving.unread]
    index = np.linspace(0, len(read) - 1, min(count, len(read))).round().astype(int)
    return [read[i] for i in index]


def reconstruct(
    plan: ClipPlan, generator: Generator, out: Path, config: FitConfig, seed: int = 0, progress: Progress = silent,
    devices: Devices | None = None,
) -> Path:  # fmt: skip
    """Synthesize the training clip and fit the avatar to it. Finished stages are kept, so the same call resumes.

    Args:
        config: how the avatar is fitted.
        seed: of the fit.
        devices: who generates the clip; by default `generator`, in this process.

    Raises:
        UserError: `out` holds a reconstruction of something else.
    """
    out = Path(out)
    _claim(out, fingerprint(plan, generator.fingerprint(), config, seed))
    if (out / "clip" / "transforms.json").exists():
        clip = Clip(out / "clip")
    else:
        clip = synthesize(plan, generator, out / "clip", progress, devices)
    if not (out / "avatar" / "metrics.json").exists():
        fit(clip, out / "avatar", config, seed, progress)
    return out


def kept_stages(out: Path) -> list[str]:
    """List the finished stages of a reconstruction."""
    marks = {"clip": "transforms.json", "avatar": "metrics.json"}
    return [name for name, mark in marks.items() if (Path(out) / name / mark).exists()]


def _claim(out: Path, ours: str) -> None:
    note = out / "reconstruction.json"
    known = read_object(note, "fingerprint")["fingerprint"] if note.exists() else None
    if known != ours and (note.exists() or kept_stages(out)):
        raise UserError(f"{out} holds another reconstruction: give --out a new folder, or remove it")
    write_json(note, {"fingerprint": ours})
