"""Portrait → track → generate (diffusion or warp) → fit → render: the one path every command walks a part of."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.config import FitConfig
from geodiff4d.avatar.fit import fit
from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_json, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import composite
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip, ClipFrame, ClipWriter
from geodiff4d.heads import Head, HeadParams
from geodiff4d.presets import Preset, preset
from geodiff4d.render.crops import canonical_crop, head_region
from geodiff4d.render.relief import render_lifted
from geodiff4d.render.viewpoints import capture_cameras, capture_views
from geodiff4d.tracking.placed import placed
from geodiff4d.video.generate import Generated, Portrait, driving_crop, generate, lifted, with_identity_of
from geodiff4d.video.model import VideoModel, load_video_model
from geodiff4d.video.sample import SampleConfig, bf16_is_native
from geodiff4d.video.vae import StableCodec

Generator = Literal["diffusion", "warp"]

SHIPPED_MODEL = Path(__file__).parent / "assets" / "embedded"
DEFAULT_CROP = 96
"""Side of driving crops when no model says otherwise."""


@dataclass(frozen=True)
class Driving:
    """What drives a head: motion, and the face crops the expression encoder reads."""

    params: HeadParams
    """[frames, …]; the shape in it is the driver's and is not used."""
    crops: Float[Tensor, "frames 3 size size"]
    fps: float = 24.0
    camera: Camera | None = None
    """The driver's own, if one saw all frames."""

    def __len__(self) -> int:
        return len(self.crops)

    def select(self, index: list[int]) -> "Driving":
        i = torch.tensor(index)
        return replace(self, params=self.params[i], crops=self.crops[i])


def load_model(folder: Path | None = None) -> VideoModel:
    """Load a video model folder, by default the one that ships with the package.

    Raises:
        UserError: it is missing or damaged.
    """
    if folder is None and not SHIPPED_MODEL.exists():
        raise UserError("this installation has no shipped model: give --model DIR, or use --generator warp")
    return load_video_model(folder or SHIPPED_MODEL)


def default_preset(model: VideoModel | None) -> Preset:
    """Return the preset that samples a model as it was trained: the paper's starts from a noised reference."""
    return preset("embedded" if model is None or model.config.diffusion.zero_terminal else "paper")


def placed_on(model: VideoModel, device: torch.device) -> VideoModel:
    """Move a model to where it computes; one in Stable Diffusion's size goes to a GPU in bf16, as `bench` measures."""
    if device.type == "cuda" and isinstance(model.codec, StableCodec) and bf16_is_native(device):
        model = model.compact()
    with torch.no_grad():
        return model.to(device)


def tracked(
    source: Path, head: Head, size: int, out: Path, limit: int | None = None, progress: Progress = silent, skip: int = 0
) -> Clip:
    """Open a tracked folder, or track a picture or video into `out`: at most `limit` frames, after the first `skip`.

    Raises:
        UserError: the source is unreadable or shows no face.
    """
    source = Path(source)
    if source.is_dir():
        clip = Clip(source)
        clip.require_head(head.name)
        return clip
    from geodiff4d.tracking.track import TrackingConfig, track

    return track(source, out, head, config=TrackingConfig(size=size, limit=limit, skip=skip), progress=progress)


def resized_frame(frame: ClipFrame, size: int) -> ClipFrame:
    """Resample a square frame to `size`²; one of that size already is returned as it is."""
    if frame.camera.width == size and frame.camera.height == size:
        return frame
    if frame.camera.width != frame.camera.height:
        raise UserError(
            f"frames must be square crops, got {frame.camera.width}×{frame.camera.height}: "
            "run `geodiff4d track` on the source"
        )

    def resample(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(
            x[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]

    normal = None if frame.normal is None else torch.nn.functional.normalize(resample(frame.normal), dim=0, eps=1e-3)
    return replace(
        frame,
        image=resample(frame.image),
        mask=resample(frame.mask),
        normal=normal,
        camera=frame.camera.resized(size, size),
    )


def load_portrait(clip: Clip, size: int) -> Portrait:
    """Take a clip's first frame as the portrait.

    Raises:
        UserError: it has no head parameters.
    """
    frame = resized_frame(clip.frame(0), size)
    if frame.params is None:
        raise UserError(f"{clip.folder} has no head parameters: run `geodiff4d track` on the picture first")
    # Normals are the detector's or nobody's: those of a rendered clip are the truth, which no portrait has.
    normal = frame.normal if clip.extra.get("normals") == "detector" else None
    return Portrait(frame.image, frame.mask, frame.camera, frame.params, normal)


def load_driving(
    clip: Clip, head: Head, crop: int, limit: int | None = None, progress: Progress = silent, skip: int = 0
) -> Driving:
    """Read a clip's motion and cut its driving crops, from the first camera of every timestep.

    Takes at most `limit` timesteps, after the first `skip`.

    Raises:
        UserError: the clip has no frames with head parameters, or none after the first `skip`.
    """
    first = {}
    for i, record in enumerate(clip.records):
        if record.params_path is not None:
            first.setdefault(record.timestep, i)
    if not first:
        raise UserError(f"{clip.folder} has no frames with head parameters: run `geodiff4d track` on the video first")
    if skip >= len(first):
        raise UserError(f"{clip.folder} has {len(first)} frames: expected more than the {skip} that are left out")
    params, crops, cameras = [], [], []
    for i in progress([first[t] for t in sorted(first)][skip:][:limit], "driver"):
        frame = clip.frame(i)
        assert frame.params is not None
        params.append(frame.params)
        cameras.append(frame.camera)
        crops.append(driving_crop(composite(frame.image, frame.mask), head, frame.params, frame.camera, crop))
    one = all(_same(c, cameras[0]) for c in cameras)
    return Driving(HeadParams.stack(params), torch.stack(crops), clip.fps, cameras[0] if one else None)


def _same(a: Camera, b: Camera) -> bool:
    return (a.width, a.height) == (b.width, b.height) and bool(
        torch.equal(a.K, b.K) and torch.equal(a.T_cam_world, b.T_cam_world)
    )


def following(portrait: Portrait, driving: Driving, head: Head) -> tuple[Driving, Camera]:
    """Put the portrait's head where the driver's is seen, as large as it is, before the driver's camera.

    Only here does a head follow somebody else's camera: `synthesize` and `reconstruct` hold it still before cameras
    that are set up around it, at its own tracked size. Returns (driving in the portrait's shape, the driver's camera
    at the portrait's size).

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


def clip_cameras(head: Head, portrait: Portrait, views: int, size: int) -> Camera:
    """Return the capture views, cropped around the portrait's head at rest."""
    neutral = replace(head.neutral(1), shape=portrait.params.shape[None], static_offset=None)
    points = head.pose(neutral).vertices[0][head_region(head)]
    return canonical_crop(capture_cameras(size)[torch.tensor(capture_views(views))], points, size)


def still_head(params: HeadParams) -> HeadParams:
    """Fix the head pose, as the avatar's training clip wants it (S-A.1): only expressions and cameras vary."""
    return replace(
        params, **{k: torch.zeros_like(getattr(params, k)) for k in ("rotation", "neck_pose", "translation")}
    )


def animate(
    portrait: Portrait, driving: Driving, generator: Generator, model: VideoModel | None, head: Head,
    cameras: Camera, sample: SampleConfig, progress: Progress = silent, drop_expression: bool = False,
) -> Generated:  # fmt: skip
    """Generate one frame per driving frame and camera, by the video model or by mesh warp.

    `driving.params` are in the portrait's shape (`with_identity_of`).
    """
    if generator == "warp":
        return warp_frames(portrait, driving.params, head, cameras, progress)
    if model is None:
        raise UserError("the diffusion generator needs a model: give --model DIR, or use --generator warp")
    return generate(model, head, portrait, driving.params, cameras, driving.crops, sample, progress, drop_expression)


def warp_frames(
    portrait: Portrait, params: HeadParams, head: Head, cameras: Camera, progress: Progress = silent
) -> Generated:
    """Mesh warp as a generator: the portrait's texture on the tracked head, in the driver's expression.

    Hair and shoulders come along on a sheet (`render/relief.py`).
    """
    with torch.no_grad():
        portrait_off = lifted(head, portrait, surroundings=True)
        parts = []
        for i in progress(range(params.batch[0]), "warping"):
            parts.append(render_lifted(portrait_off, head.pose(params[i : i + 1]), cameras[i : i + 1]))
    rgb, normal, mask = (torch.cat([p[k] for p in parts]) for k in range(3))
    tokens = torch.zeros(len(rgb), 1, 1)
    return Generated(rgb, normal, mask, tokens)


@dataclass(frozen=True)
class ClipPlan:
    """What an avatar's training clip shows, before anybody has drawn it."""

    shots: list[Shot]
    driving: Driving
    """In the portrait's shape, the head still; shots point at its frames."""
    views: Camera
    """The clip's cameras, [views]."""

    @property
    def chosen(self) -> Driving:
        """What drives every shot."""
        return self.driving.select([s.timestep for s in self.shots])

    @property
    def cameras(self) -> Camera:
        """Of every shot."""
        return self.views[torch.tensor([s.camera for s in self.shots])]


def plan_clip(portrait: Portrait, driving: Driving, head: Head, views: int, frames: int) -> ClipPlan:
    """Plan the avatar's training clip: several cameras, the driver's expressions, a still head (S-A.1)."""
    still = replace(driving, params=with_identity_of(portrait, still_head(driving.params)))
    cameras = clip_cameras(head, portrait, views, portrait.camera.width)
    return ClipPlan(plan_shots(len(driving), views, frames), still, cameras)


def write_planned(
    out: Path, plan: ClipPlan, made: Generated, portrait: Portrait, head: Head, about: dict[str, Any]
) -> Clip:
    """Write what was made of a plan as a clip; `about` goes into the clip's notes."""
    with ClipWriter(out, head.name, plan.driving.fps, about) as clip:
        order = sorted({s.timestep for s in plan.shots})
        for t in order:
            clip.add_params(t, plan.driving.params[t])
        for i, s in enumerate(plan.shots):
            clip.add(s.timestep, s.camera, made.rgb[i], plan.views[s.camera], made.mask[i], made.normal[i])
        clip.set_reference(portrait.on_grey)
        rows = {s.timestep: made.tokens[i] for i, s in enumerate(plan.shots)}
        clip.set_tokens(torch.stack([rows[t] for t in order]))
    return Clip(out)


def synthesize(
    portrait: Portrait, driving: Driving, out: Path, head: Head, generator: Generator = "diffusion",
    model: VideoModel | None = None, views: int = 8, frames: int = 96,
    sample: SampleConfig = SampleConfig(), progress: Progress = silent,
) -> Clip:  # fmt: skip
    """Make the avatar's training clip: several cameras, the driver's expressions, a still head (S-A.1).

    The clip's parameters are the portrait's identity under the driver's tracked expression.
    """
    plan = plan_clip(portrait, driving, head, views, frames)
    made = animate(portrait, plan.chosen, generator, model, head, plan.cameras, sample, progress)
    about = {"generator": generator, "views": views, "frames": len(plan.shots)}
    about |= {"steps": sample.steps, "guidance": sample.guidance}
    return write_planned(out, plan, made, portrait, head, about)


def driver_clip_index(driving: Driving, count: int) -> list[int]:
    """Pick `count` frames spread evenly over a driving clip."""
    return np.linspace(0, len(driving) - 1, min(count, len(driving))).round().astype(int).tolist()


def reconstruct(
    portrait: Portrait, driving: Driving, out: Path, head: Head, generator: Generator, model: VideoModel | None,
    fitting: FitConfig, views: int = 8, frames: int = 96, sample: SampleConfig = SampleConfig(),
    seed: int = 0, progress: Progress = silent,
) -> Path:  # fmt: skip
    """Go the whole way: clip, avatar, driven video. Finished stages are kept, so the same call resumes.

    Raises:
        UserError: `out` holds a reconstruction of something else.
    """
    out = Path(out)
    weights = None if model is None else (model.config, model.state_dict())
    # How much memory sampling takes may change from call to call.
    drawn = replace(sample, **{k: getattr(SampleConfig(), k) for k in ("offload", "together", "chunk")})
    driven = (driving.params, driving.crops, driving.fps)
    _claim(out, fingerprint(portrait, driven, generator, weights, views, frames, drawn, seed, fitting))
    if (out / "clip" / "transforms.json").exists():
        clip = Clip(out / "clip")
    else:
        clip = synthesize(portrait, driving, out / "clip", head, generator, model, views, frames, sample, progress)
    if not (out / "avatar" / "metrics.json").exists():
        fit(clip, out / "avatar", fitting, seed, progress)
    return out


def kept_stages(out: Path) -> list[str]:
    """List the finished stages of a reconstruction."""
    marks = {"clip": "transforms.json", "avatar": "metrics.json"}
    return [name for name, mark in marks.items() if (Path(out) / name / mark).exists()]


def _claim(out: Path, ours: str) -> None:
    note = out / "reconstruction.json"
    if (note.exists() and read_json(note)["fingerprint"] != ours) or (kept_stages(out) and not note.exists()):
        raise UserError(f"{out} holds another reconstruction: give --out a new folder, or remove it")
    write_json(note, {"fingerprint": ours})
