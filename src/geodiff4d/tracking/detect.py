"""Detectors of landmarks and foreground, and the result that the fit takes from any of them.

`Detector` is the interface: numbered 2D points, and optionally their uncertainty, the foreground, and normals.
MediaPipe 0.10.21 cannot share an environment with numpy 2, so `MediaPipeDetector` calls it as one subprocess per batch
of images.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import to_uint8
from geodiff4d.tracking.points import SurfacePoints
from geodiff4d.tracking.reading import Reading
from geodiff4d.tracking.squares import HeadSquare

WORKER = Path(__file__).with_name("mediapipe_worker.py")
ENVIRONMENT_VARIABLE = "GEODIFF4D_TRACK_ENV"
MAX_SIDE = 1024
"""Longer side to which images are reduced for MediaPipe, which crops them to 192² and 256² [px]."""
Box = tuple[float, float, float]
"""(left, top, side) of a square [px]."""


@dataclass(frozen=True)
class Detection:
    """One face that was detected in an image."""

    points: Float[Tensor, "points 2"]
    """Pixels, x right and y down, pixel centres at half integers."""
    index: Int[Tensor, " points"]
    """Each point's number: MediaPipe's (0–477; from 468 on the irises), or as `points` says."""
    score: float
    """Confidence, 0 to 1."""
    box: Float[Tensor, "4"]
    """left, top, right, bottom of the points [px]."""
    faces: int = 1
    """Number of faces in the image; this one is the largest or, in a video, the one that is followed."""
    mask: Float[Tensor, "1 height width"] | None = None
    """Foreground, 0 to 1, half precision; it spans `extent` but may have fewer pixels."""
    sigma: Float[Tensor, " points"] | None = None
    """Standard deviation of each point per axis [px], if the detector estimates it."""
    normal: Float[Tensor, "3 height width"] | None = None
    """Camera-space normals times the foreground, half precision; spans `extent`."""
    extent: Box | None = None
    """(left, top, side) of the square that mask and normals span [px]; None for the whole image."""
    square: HeadSquare | None = None
    """The head's square, from which the next frame is cropped."""
    turn: Float[Tensor, "3 3"] | None = None
    """Guess of the head's rotation to the viewer (x right, y up, z to the viewer), relative to the ray to it."""
    shape: Float[Tensor, " shapes"] | None = None
    """Guess of OpenHead's first identity coefficients."""
    markup: SurfacePoints | None = None
    """Places of the points on OpenHead, if they are not all landmarks of the head's own file."""
    reading: Reading | None = None
    """What the face does, as the face reader sees it (a batch of one)."""


@runtime_checkable
class Detector(Protocol):
    """Interface of detectors: at most one face per image."""

    def detect(
        self, images: Iterable[Float[Tensor, "3 _height _width"]], video: bool = False
    ) -> list[Detection | None]:
        """Return a detection per image, None where there is no face; `video` says that images are consecutive."""
        ...


@runtime_checkable
class FollowingDetector(Protocol):
    """Interface of detectors that take the frames of a video one at a time."""

    def follow(self, images: Iterable[Float[Tensor, "3 _height _width"]]) -> Iterator[Detection | None]:
        """Yield a detection per frame, None where there is no face."""
        ...


def track_environment() -> Path:
    """Return the Python interpreter of MediaPipe's environment.

    It is looked for at `GEODIFF4D_TRACK_ENV`, then for `.track-env` beside the sources and in the working directory.

    Raises:
        UserError: there is none in either place.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    folders = [Path(chosen)] if chosen else [Path(__file__).parents[3] / ".track-env", Path.cwd() / ".track-env"]
    for folder in folders:
        if (folder / "bin/python").exists():
            return folder / "bin/python"
    where = f"{ENVIRONMENT_VARIABLE} points to {chosen}, which has" if chosen else f"{folders[0]} has"
    raise UserError(
        f"the landmark detector is not installed: expected its own Python environment, {where} no bin/python; "
        f"run `make track-env` in the project's folder, or set {ENVIRONMENT_VARIABLE} to such an environment"
    )


@dataclass(frozen=True)
class MediaPipeDetector:
    """MediaPipe's face mesh (478 points with irises) and selfie segmentation, offline, as a subprocess.

    Example:
        >>> [detection] = MediaPipeDetector().detect([image])  # doctest: +SKIP
        >>> detection.points.shape  # doctest: +SKIP
        torch.Size([478, 2])
    """

    masks: bool = True
    """Whether to segment the person."""
    python: Path | None = None
    """Interpreter of the detector's environment; by default that of `track_environment`."""
    on_done: Callable[[int], None] | None = None
    """Called with the number of images done so far."""

    def detect(
        self, images: Iterable[Float[Tensor, "3 _height _width"]], video: bool = False
    ) -> list[Detection | None]:
        """Return a detection per image, None where there is no face.

        Raises:
            UserError: the detector's environment does not work.
        """
        python = self.python or track_environment()
        with tempfile.TemporaryDirectory(prefix="geodiff4d-detect-") as name:
            folder = Path(name)
            sizes = [_put(folder / f"{i:05d}.npy", image) for i, image in enumerate(images)]
            if not sizes:
                return []
            request = {"count": len(sizes), "video": video, "masks": self.masks}
            (folder / "request.json").write_text(json.dumps(request))
            self._run(folder, python)
            return _read(folder, sizes, self.masks)

    def _run(self, folder: Path, python: Path) -> None:
        log = folder / "stderr.log"
        command = [str(python), str(WORKER), str(folder)]
        # The models log to stderr even when all is well; PYTHONPATH would mix our packages into theirs.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            with log.open("w") as stderr, subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
            ) as process:  # fmt: skip
                assert process.stdout is not None
                for line in process.stdout:
                    if self.on_done and line.startswith("done "):
                        self.on_done(int(line.split()[1]))
        except OSError as error:
            raise UserError(
                f"the landmark detector cannot be started ({error}): remove .track-env and run `make track-env`"
            ) from None
        if process.returncode != 0 or not (folder / "detections.npz").exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            raise UserError(
                f"the landmark detector failed ({reason}): remove .track-env and run `make track-env` again"
            )


def _put(path: Path, image: Float[Tensor, "3 height width"]) -> tuple[int, int]:
    """Store an image for the worker, shrunk if it is large; returns its (height, width)."""
    height, width = image.shape[1:]
    scale = MAX_SIDE / max(height, width)
    if scale < 1:
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        image = torch.nn.functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    np.save(path, to_uint8(image), allow_pickle=False)
    return height, width


def _read(folder: Path, sizes: list[tuple[int, int]], masks: bool) -> list[Detection | None]:
    with np.load(folder / "detections.npz", allow_pickle=False) as data:
        points, scores, faces = (torch.from_numpy(data[k]) for k in ("points", "scores", "faces"))
    out: list[Detection | None] = []
    for i, (height, width) in enumerate(sizes):
        if not points[i].isfinite().all():
            out.append(None)
            continue
        stored = np.load(folder / f"{i:05d}.npy", mmap_mode="r", allow_pickle=False).shape
        p = points[i] * torch.tensor([width / stored[1], height / stored[0]])
        mask = None
        if masks:
            mask = torch.from_numpy(np.load(folder / f"{i:05d}_mask.npy", allow_pickle=False)).half()[None] / 255
        box = torch.cat([p.amin(0), p.amax(0)])
        out.append(Detection(p, torch.arange(len(p)), float(scores[i]), box, int(faces[i]), mask))
    return out
