"""Fit an avatar to a clip, resumably, and write it with its metrics (Sec. 3.3, 4.2, A.2)."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geodiff4d.avatar.config import FitConfig
from geodiff4d.avatar.deformable import DeformableSurface
from geodiff4d.avatar.deformation import Deformation, PositionMap
from geodiff4d.avatar.dynamics import Dynamics, first_features
from geodiff4d.avatar.expression import fit_expression_code
from geodiff4d.avatar.fitting import Fitting, Score, compare
from geodiff4d.avatar.frames import FitFrames, NormalSource
from geodiff4d.avatar.losses import position_tolerance
from geodiff4d.avatar.start import start
from geodiff4d.avatar.surface import Surface, own_surface, remesh
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_folder, refuse_foreign, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.rundir import RunFolder
from geodiff4d.data.clip import Clip
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import Head

STATUS_EVERY = 10
SCORED = 16
"""Training frames that the final score looks at."""


@dataclass(frozen=True)
class _Run:
    """What a repeated command must share with the run that it resumes."""

    fit: FitConfig
    clip: str
    frames: int
    seed: int
    files: str
    """Fingerprint of the clip's files: another clip may have taken its place."""


def _files(clip: Clip) -> str:
    files = [p for r in clip.records for p in (r.image_path, r.mask_path, r.normal_path, r.params_path) if p]
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return fingerprint((clip.folder / "transforms.json").read_text(), stamps)


def fit(
    clip: Clip, out: Path | str, config: FitConfig | None = None, seed: int = 0,
    progress: Progress = silent, normals: NormalSource | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fit an avatar to `clip`, write it to `out` and return its metrics.

    Meanwhile `OUT.run` holds the log, the newest checkpoints and a live preview; the same call resumes from it, to the
    same result. The progress's description is a function that tells the current loss.

    Raises:
        UserError: the clip lacks masks or parameters, `out` holds something else, or no estimator's normals are given
            to a configuration that asks for them.

    Example:
        >>> fit(Clip("runs/demo/clip"), "runs/demo/avatar")["held_out"]["psnr_fg"]  # doctest: +SKIP
    """
    config, out = config or FitConfig(), Path(out)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this preset needs a CUDA device and none was found: use --preset embedded")
    if (config.normal_source == "estimator") != (normals is not None):
        raise UserError(
            f"normals come from the {config.normal_source}, but an estimator was {'' if normals else 'not '}given"
        )
    refuse_foreign(out, clip.folder)
    head = load_head(clip.head_name)
    frames = FitFrames(clip, head, config.hold_out, normals)
    with _repeatable(config.device):
        return _fit(clip, frames, head, out, config, seed, progress)


@contextmanager
def _repeatable(device: str) -> Iterator[None]:
    """Have threads add up gradients in one order on a CPU: a resumed fit is the uninterrupted one to the bit."""
    settings: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    try:
        if device == "cpu":
            torch.use_deterministic_algorithms(True)
            settings.fill_uninitialized_memory = False  # Filling costs time, and nothing reads such memory.
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filling


def _fit(
    clip: Clip, frames: FitFrames, head: Head, out: Path, config: FitConfig, seed: int, progress: Progress
) -> dict[str, Any]:
    """Fit or resume, and write the avatar."""
    fitting, explained = prepare(frames, head, config, seed)
    run = RunFolder(
        out.with_name(out.name + ".run"), _Run(config, str(clip.folder.resolve()), len(clip), seed, _files(clip))
    )
    saved = run.load(lambda line: run.log({"warning": line}))
    first, status = 0, Status()
    if saved is not None:
        with run.restoring():
            fitting.restore(saved[0])
            status.restore(saved[0])
        first = saved[1]
    seconds = _learn(fitting, run, first, seed, status, progress)
    metrics = {
        "train": fitting.score(frames.train[:: max(1, len(frames.train) // SCORED)]),
        "held_out": fitting.score(frames.held_out),
        "held_out_views": fitting.score(frames.held_out_views),
        "held_out_times": fitting.score(frames.held_out_times),
        "iterations_per_second": max(config.iterations - first - 1, 1) / seconds,
        "gaussians": len(fitting.local),
        "seconds": seconds,
        "tokens_from_parameters": explained,
    }
    with fresh_folder(out) as folder:
        fitting.avatar(clip.fps).save(folder)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "fit.json", {"clip": str(clip.folder), "seed": seed, "config": asdict(config)})
        shutil.copy(run.path / "log.jsonl", folder / "log.jsonl")
    shutil.rmtree(run.path, ignore_errors=True)
    return metrics


def prepare(frames: FitFrames, head: Head, config: FitConfig, seed: int) -> tuple[Fitting, dict[str, Any] | None]:
    """Return a fit at its start, and how well head parameters predict the clip's tokens (None if it has none)."""
    surface = own_surface(head) if config.remesh is None else remesh(head, config.remesh)
    tolerance = position_tolerance(head)[surface.head_face]
    local, tolerance = start(frames.to("cpu"), head, surface, config.gaussians, tolerance, seed)
    # Everything random is drawn on the CPU: the same numbers on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deformable, explained = _deformable(frames, head, surface, config)
    if config.dynamics:
        features = first_features(len(local), config.dynamics, torch.Generator().manual_seed(seed))
        local = replace(local, features=features)
    if config.harmonics:
        local = replace(local, harmonics=torch.zeros(len(local), (config.harmonics + 1) ** 2 - 1, 3))
    frames.to(config.device)
    made = Fitting(deformable.to(config.device), local.to(config.device), frames, tolerance.to(config.device), config)
    return made, explained


def _deformable(
    frames: FitFrames, head: Head, surface: Surface, config: FitConfig
) -> tuple[DeformableSurface, dict[str, Any] | None]:
    if config.deformation is None and config.dynamics is None:
        return DeformableSurface(head, surface), None
    code, explained = fit_expression_code(frames.sequence, frames.tokens)
    deformation = maps = None
    if config.deformation:
        deformation = Deformation(config.deformation, code.size)
        maps = PositionMap.of(head, surface, config.deformation.size)
    dynamics = Dynamics(config.dynamics, code.basis.shape[1]) if config.dynamics else None
    return DeformableSurface(head, surface, code, deformation, dynamics, maps), explained


def _learn(
    fitting: Fitting, run: RunFolder, first: int, seed: int, status: "Status", progress: Progress
) -> float:  # fmt: skip
    """Take all steps from `first` on; returns the seconds they took."""
    config = fitting.config
    begun = time.perf_counter()
    for i in progress(range(first, config.iterations), status.line):
        if i == first + 1:
            # Loading the rasteriser's code is no part of the speed.
            begun = time.perf_counter()
        frame, target = fitting.step(i, seed)
        if i % STATUS_EVERY == 0:
            status.add(compare(frame, target), i)
        if (i + 1) % config.checkpoint_every == 0 or i + 1 == config.iterations:
            run.log({"step": i + 1, **status.figures(), "gaussians": len(fitting.local)})
            write_image(run.path / "preview.png", preview(fitting))
        if (i + 1) % config.checkpoint_every == 0 and i + 1 < config.iterations:
            run.save(fitting.tensors() | status.tensors(), i + 1)
    return time.perf_counter() - begun


class Status:
    """Progress of a fit: smoothed errors of its training frames."""

    def __init__(self) -> None:
        self.psnr: float | None = None
        self.degrees: float | None = None
        self.began, self.first, self.last = time.perf_counter(), -1, -1

    def add(self, score: Score, iteration: int) -> None:
        if self.first < 0:
            self.began, self.first = time.perf_counter(), iteration
        self.last = iteration
        self.psnr = _smoothed(self.psnr, score.psnr_fg)
        if score.normal_deg is not None:
            self.degrees = _smoothed(self.degrees, score.normal_deg)

    def tensors(self) -> dict[str, Tensor]:
        """Return the smoothed errors for a checkpoint; NaN where there is none."""
        values = [float("nan") if v is None else v for v in (self.psnr, self.degrees)]
        return {"smoothed": torch.tensor(values, dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self.psnr, self.degrees = (None if v != v else v for v in tensors["smoothed"].tolist())

    def figures(self) -> dict[str, float | None]:
        """Return PSNR [dB], normal error [deg] and steps per second."""
        speed = (self.last - self.first) / max(time.perf_counter() - self.began, 1e-9)
        rounded = {"psnr_fg": self.psnr, "normal_deg": self.degrees, "iterations_per_second": speed}
        return {k: None if v is None else round(v, 3) for k, v in rounded.items()}

    def line(self) -> str:
        """Return the fit's description for a progress bar."""
        if self.psnr is None:
            return "fitting"
        normals = "" if self.degrees is None else f", normals {self.degrees:.1f}°"
        return f"fitting: {self.psnr:.1f} dB{normals}, {self.figures()['iterations_per_second']:.1f} it/s"


@torch.no_grad()
def preview(fitting: Fitting) -> Tensor:
    """Return a frame of the clip beside the avatar's colours and normals, as one image."""
    frames = fitting.frames
    target = frames.target((frames.held_out or frames.train)[0])
    frame = fitting.render(target.row, target.camera)
    shown = [target.image, frame.rgb, frame.normal * 0.5 + 0.5]
    return torch.cat(shown, -1).clamp(0, 1).cpu()


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else 0.9 * before + 0.1 * value
