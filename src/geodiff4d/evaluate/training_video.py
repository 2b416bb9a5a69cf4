"""Avatars that are fitted to be measured, and what they are trained with where no driver's video is at hand.

That is a made-up person who shows a bit of everything.
"""

from pathlib import Path

import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.video import write_video
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.methods import Maker
from geodiff4d.evaluate.pairs import loosely
from geodiff4d.heads import HeadParams
from geodiff4d.pipeline import plan_clip, reconstruct, tracked
from geodiff4d.render.viewpoints import orbit, world_region
from geodiff4d.video.generate import GenerationRequest
from geodiff4d.video.inputs import Driving, Portrait
from geodiff4d.world.expressions import TrackKind, expression_track
from geodiff4d.world.subject import SyntheticSubject, plain_seed

KINDS: tuple[TrackKind, ...] = ("extremes", "emotions", "speech", "blinks", "gaze", "tongue")
FPS = 12.0
SIZE = 256


def training_clip(out: Path, maker: Maker, source: Path | None = None, progress: Progress = silent) -> Clip:
    """Return the tracked performance that avatars are trained with: a user's video or clip, or a made-up person's.

    The made-up one has as many frames as an avatar's training clip, shared among six kinds of expressions; the person
    is of the validation split. Whatever is tracked is kept in OUT/training.

    Raises:
        UserError: the source does not exist or shows no face.
    """
    head, size = maker.head, maker.model.config.size
    if source is not None:
        if not source.exists():
            raise UserError(f"--training-video {source} does not exist: expected a video or a tracked clip")
        if source.is_dir():
            return tracked(source, head, size, source)
        stamp = fingerprint(source.stat().st_size, source.stat().st_mtime_ns, size, head.name)[:8]
        folder = out / "training" / f"{source.stem}_{stamp}"
        there = (folder / "transforms.json").exists()
        return Clip(folder) if there else tracked(source, head, size, folder, maker.preset.frames, progress)
    folder = out / "training" / f"made_up_{maker.preset.frames}"
    if (folder / "transforms.json").exists():
        return Clip(folder)
    video = out / "training" / "made_up.mp4"
    write_made_up(video, maker.preset.frames)
    return tracked(video, head, size, folder, progress=progress)


def write_made_up(path: Path, frames: int) -> None:
    """Render a person of the open world who performs `frames` instants of `KINDS` before a camera in front."""
    seed = plain_seed(0, "val")
    subject, each = SyntheticSubject(seed, "val"), -(-frames // len(KINDS))
    # Tracks start near rest: their second half is more telling than the first.
    parts = [[x[-each:] for x in expression_track(kind, max(24, 2 * each), seed, FPS)] for kind in KINDS]
    expr, jaw, eyes = (torch.cat(x)[:frames] for x in zip(*parts, strict=True))
    params: HeadParams = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)
    points = subject.vertices(params)[:, world_region()].flatten(0, 1)
    camera = loosely(orbit(torch.zeros(1), torch.zeros(1), SIZE)[0], points, SIZE)
    write_video(path, (subject.render(params[t : t + 1], camera.expand(1)).rgb[0] for t in range(frames)), FPS)


def fit_avatar(folder: Path, maker: Maker, portrait: Portrait, driving: Driving) -> Path:
    """Fit a portrait's avatar, trained with a performance; finished stages are kept. Returns the avatar's folder.

    Raises:
        UserError: FOLDER holds another reconstruction.
    """
    p, request = maker.preset, GenerationRequest(portrait, driving, maker.head)
    reconstruct(plan_clip(request, p.views, p.frames), maker.generator, folder, p.fit, maker.seed)
    return folder / "avatar"
