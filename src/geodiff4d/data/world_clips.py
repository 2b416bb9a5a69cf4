"""Clips of the open world, and the tracker-like error that stands in for tracking from pixels."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.data.clip import ClipWriter, read_header
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import capture_cameras, capture_views, world_region
from geodiff4d.world.expressions import TRACK_KINDS, TrackKind, expression_track, head_track
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import WORLD_VERSION, SyntheticSubject


def subject_motion(subject: SyntheticSubject, frames: int, kind: TrackKind, fps: float = 24.0) -> HeadParams:
    """Return true parameters of a track for this subject, with movements of the head, [frames, ...]."""
    expr, jaw, eyes = expression_track(kind, frames, subject.seed, fps)
    return subject.params(expr, rotation=head_track(kind, frames, subject.seed, fps), jaw_pose=jaw, eyes_pose=eyes)


def subject_cameras(subject: SyntheticSubject, params: HeadParams, views: list[int], size: int) -> Camera:
    """Return the capture cameras cropped canonically around this subject over all its frames."""
    points = subject.vertices(params)[..., world_region(), :].reshape(-1, 3)
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
    if workers <= 1 or len(seeds) <= 1:
        for seed in seeds:
            yield _write_person(out, split, seed, frames, views, size)
        return
    # spawn: a forked torch may wait forever for threads it does not have.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
        waiting: set[Future[int]] = set()
        try:
            for seed in seeds:
                if len(waiting) >= 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                waiting.add(pool.submit(_write_person, out, split, seed, frames, views, size))
            yield from (future.result() for future in as_completed(waiting))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Drawing uses one thread; an interrupt reaches the parent, which lets every worker finish its clip."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_person(out: Path, split: Split, seed: int, frames: int, views: int, size: int) -> int:
    folder = out / f"{split}_{seed}"
    write_clip(folder, SyntheticSubject(seed, split), track_of(seed, split), frames, views, size)
    return seed


def track_of(seed: int, split: Split) -> TrackKind:
    """Choose the track kind of a subject's clip."""
    return TRACK_KINDS[int(generator("kind", split, seed).integers(len(TRACK_KINDS)))]
