"""Clips of the open world: how its people move, before which cameras, and how they are written."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.workers import in_workers
from geodiff4d.data.clip import ClipWriter, read_header
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import capture_cameras, capture_views, openhead, world_region
from geodiff4d.world.expressions import TRACK_KINDS, TrackKind, expression_track, head_track, random_expression
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import WORLD_VERSION, SyntheticSubject

LEAD_FRAMES, LONG_FRAMES = 12, 120
"""A track is cut out of a longer one, which starts near neutral."""
STILL, TURNING = 0.35, 0.3
"""Shares of people whose heads are held still, as avatars' clips have them (S-A.1), and who turn them far."""


def subject_motion(subject: SyntheticSubject, frames: int, kind: TrackKind, fps: float = 24.0) -> HeadParams:
    """Return true parameters of a track for this subject, with movements of the head, [frames, ...]."""
    expr, jaw, eyes = expression_track(kind, frames, subject.seed, fps)
    return subject.params(expr, rotation=head_track(kind, frames, subject.seed, fps), jaw_pose=jaw, eyes_pose=eyes)


def random_motion(split: Split, subject: int, instants: int, seed: int) -> HeadParams:
    """Draw independent expressions and head poses (shape left at zero): half the heads look straight ahead."""
    rng = generator("store", split, subject, seed)
    expr, jaw, eyes = random_expression(int(rng.integers(1 << 31)), instants)
    turn = np.deg2rad(rng.normal(0, 1, (2, instants, 3)) * np.array([8.0, 14.0, 5.0])) * (
        rng.random((2, instants, 1)) < 0.5
    )
    rotation, neck = (torch.from_numpy(x.astype(np.float32)) for x in turn)
    move = torch.from_numpy(rng.normal(0, 0.008, (instants, 3)).astype(np.float32))
    zero = openhead().neutral(instants)
    return HeadParams(zero.shape, expr, rotation, neck, jaw, eyes, move)


def track_motion(split: Split, subject: int, frames: int, seed: int, fps: float) -> HeadParams:
    """Return a person's motion over the track (shape left at zero): a piece from the middle of a longer one."""
    rng = generator("tracks", split, subject, seed)
    kind = TRACK_KINDS[int(rng.integers(len(TRACK_KINDS)))]
    long, draw = LEAD_FRAMES + frames + LONG_FRAMES, int(rng.integers(1 << 31))
    expr, jaw, eyes = expression_track(kind, long, draw, fps)
    how = rng.random()
    rotation = head_track("turns" if how > 1 - TURNING else kind, long, draw, fps) * float(how > STILL)
    first = LEAD_FRAMES + int(rng.integers(LONG_FRAMES))
    zero = openhead().neutral(long)
    whole = HeadParams(zero.shape, expr, rotation, zero.neck_pose, jaw, eyes, zero.translation)
    return whole[first : first + frames]


def subject_cameras(subject: SyntheticSubject, params: HeadParams, views: list[int], size: int) -> Camera:
    """Return the capture cameras cropped canonically around this subject over all its frames."""
    points = subject.vertices(params)[..., world_region(), :]
    return canonical_crop(capture_cameras(size)[torch.tensor(views)], points)


def is_complete(folder: Path, frames: int, views: int, size: int) -> bool:
    """Say whether a finished clip of this size and world is there already (clips appear whole or not at all)."""
    if not (folder / "transforms.json").exists():
        return False
    header = read_header(folder)
    version, records = header.extra.get("world_version"), header.frames
    return len(records) == frames * views and records[0].get("w") == size and version == WORLD_VERSION


def write_clip(
    folder: Path, subject: SyntheticSubject, kind: TrackKind, frames: int, views: int, size: int
) -> Float[Tensor, "3 h w"]:
    """Render a subject's track in some of the capture views as a clip with true parameters; return its first image."""
    params = subject_motion(subject, frames, kind)
    chosen = capture_views(views)
    cameras = subject_cameras(subject, params, chosen, size)
    extra = {"subject_seed": subject.seed, "split": subject.split, "track": kind, "params": "truth"}
    extra["world_version"] = WORLD_VERSION
    first: Tensor | None = None
    with ClipWriter(folder, head="openhead", extra=extra) as clip:
        for t in range(frames):
            out = subject.render(params[t : t + 1].map(lambda v: v.expand(views, *v.shape[1:])), cameras)
            clip.add_params(t, params[t])
            for i, index in enumerate(chosen):
                clip.add(t, index, out.rgb[i], cameras[i], out.mask[i], out.normal[i])
            if first is None:
                first = out.rgb[0]
                clip.set_reference(out.rgb[0], out.normal[0])
    assert first is not None
    return first


def write_world(
    out: Path, split: Split, seeds: Sequence[int], frames: int, views: int, size: int, workers: int = 1
) -> Iterator[int]:
    """Write a clip OUT/<split>_<seed> per person, several processes at once; yield every seed that is done.

    Each process holds one person at a time and a few clips wait in line, whatever the number of people. An interrupted
    run leaves whole clips only; calling again with those seeds left out resumes it.
    """
    people = ((out, split, seed, frames, views, size) for seed in seeds)
    yield from in_workers(_write_person, people, min(workers, len(seeds)))


def _write_person(out: Path, split: Split, seed: int, frames: int, views: int, size: int) -> int:
    folder = out / f"{split}_{seed}"
    write_clip(folder, SyntheticSubject(seed, split), track_of(seed, split), frames, views, size)
    return seed


def track_of(seed: int, split: Split) -> TrackKind:
    """Choose the track kind of a subject's clip."""
    return TRACK_KINDS[int(generator("kind", split, seed).integers(len(TRACK_KINDS)))]
