"""Long clips in parts: frames reach the disk as they are decoded, a clip that was cut off goes on, and several devices
share the work. A part is a few of a clip's views, sampled by itself, so that what is in memory does not grow with the
clip.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from geodiff4d.core import workers as processes
from geodiff4d.core.camera import Camera
from geodiff4d.core.files import fresh_file, read_object, read_tensors, save_tensors, write_json
from geodiff4d.core.progress import Progress, advancing, passed_on, silent
from geodiff4d.core.rundir import alone
from geodiff4d.core.workers import in_workers
from geodiff4d.data.clip import write_frame
from geodiff4d.video.generate import GenerationRequest, Generator

PART = 48
"""Frames of a part, where views are not longer."""
NOTE = "unfinished.json"


def plan_parts(views: Sequence[int], divide: bool, most: int) -> list[slice]:
    """Share the frames of a clip out to parts of at most so many.

    Args:
        views: lengths of consecutive runs of frames, each seen from one camera.
        divide: no frame looks at another, so that a longer run may be divided; else it is a part of its own.

    Example:
        >>> plan_parts([30, 10, 40, 200], divide=False, most=48)
        [slice(0, 40, None), slice(40, 80, None), slice(80, 280, None)]
    """
    pieces = [min(most, n - i) for n in views for i in range(0, n, most)] if divide else list(views)
    parts: list[slice] = []
    at = 0
    for n in pieces:
        if parts and at + n - parts[-1].start <= most:
            parts[-1] = slice(parts[-1].start, at + n)
        else:
            parts.append(slice(at, at + n))
        at += n
    return parts


@dataclass(frozen=True)
class Shown:
    """Frames to generate."""

    request: GenerationRequest
    index: list[int]
    """The driving frame of each."""
    cameras: Camera
    names: list[tuple[int, int]]
    """Timestep and camera index of each, by which a clip knows it."""

    def part(self, frames: slice) -> "Shown":
        """Return a stretch of them, with their driving frames alone."""
        index, names = self.index[frames], self.names[frames]
        driving = self.request.driving.select(index)
        return Shown(replace(self.request, driving=driving), list(range(len(index))), self.cameras[frames], names)


@dataclass(frozen=True)
class Devices:
    """Processes that generate parts, each on a device of its own."""

    count: int
    make: Callable[[int], Generator]
    """Loads the generator on the device of a number. It travels to other processes, which tell it by its value."""


def write_parts(
    shown: Shown, parts: Sequence[slice], generator: Generator, folder: Path, made_of: str,
    progress: Progress = silent, devices: Devices | None = None,
) -> Iterator[tuple[slice, Float[Tensor, "t tokens channels"]]]:  # fmt: skip
    """Generate a clip's frames into a folder, part by part; yield each part's frames and expression tokens.

    Parts that an earlier call finished are not generated again. The folder has the images of a clip; whoever puts the
    clip together removes it.

    Args:
        made_of: tells the clip from others: a folder of another one is emptied.
        devices: who generates; by default `generator`, in this process.

    Raises:
        UserError: another process writes to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder), advancing(progress, "generating", len(shown.names)) as advance:
        _begin(folder, made_of)
        done = [_tokens(folder, k).exists() for k in range(len(parts))]
        advance(sum(p.stop - p.start for p, there in zip(parts, done, strict=True) if there))
        jobs = [k for k, there in enumerate(done) if not there]
        if devices is None:
            for k in jobs:
                _write(shown.part(parts[k]), generator, folder, k, passed_on(advance))
        else:
            given = ((devices.make, shown.part(parts[k]), folder, k) for k in jobs)
            for frames in in_workers(_write_elsewhere, given, min(devices.count, len(jobs))):
                advance(frames)
    for k, part in enumerate(parts):
        yield part, read_tensors(_tokens(folder, k))["tokens"]


def _begin(folder: Path, made_of: str) -> None:
    """Keep what is there of the same clip, else empty the folder, which itself stays: it is what is locked."""
    note = folder / NOTE
    if note.exists() and read_object(note, "made_of")["made_of"] == made_of:
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_json(note, {"made_of": made_of})


def _tokens(folder: Path, k: int) -> Path:
    """Name a part's tokens, which are written last."""
    return folder / f"tokens_{k:05d}.safetensors"


def _write(shown: Shown, generator: Generator, folder: Path, k: int, progress: Progress) -> int:
    made = generator.generate(shown.request, shown.cameras, progress)
    for i, (timestep, camera) in enumerate(shown.names):
        write_frame(folder, timestep, camera, made.rgb[i], made.mask[i], made.normal[i])
    with fresh_file(_tokens(folder, k)) as file:
        save_tensors({"tokens": made.tokens.contiguous()}, file)
    return len(shown.names)


def _write_elsewhere(make: Callable[[int], Generator], shown: Shown, folder: Path, k: int) -> int:
    return _write(shown, _loaded(make), folder, k, silent)


@cache
def _loaded(make: Callable[[int], Generator]) -> Generator:
    """Load this process's generator, once."""
    return make(processes.number)


def views_of(names: Sequence[tuple[int, int]]) -> list[int]:
    """Return the lengths of a clip's runs of frames, each seen from one camera."""
    return [len(list(run)) for _, run in groupby(names, lambda name: name[1])]
