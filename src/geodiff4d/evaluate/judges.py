"""Every measure of the protocols, what it needs, and one method's frames scored by all of them (Sec. 5.1).

Scores are per frame, but for what only a film has. What needs a file or a package that is not there is left out, and
says what to install: it is never a zero. Frames are scored as the 8 bits that PNGs keep, so that anyone's files can be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import decode_normals, encode_normals
from geodiff4d.evaluate import metrics
from geodiff4d.evaluate.identity import ArcFace, identity_features, load_identity
from geodiff4d.evaluate.inputs import Inputs
from geodiff4d.evaluate.jod import Films, color_video_vdp, fov_video_vdp
from geodiff4d.evaluate.lpips import Lpips
from geodiff4d.evaluate.metrics import Truth
from geodiff4d.evaluate.observe import (
    Observed,
    expression_distance,
    expression_products,
    keypoint_distance,
    observe_frames,
    perceived_normals,
)
from geodiff4d.heads import Head
from geodiff4d.video.flicker import flicker


@dataclass(frozen=True)
class Measure:
    """One column of the table."""

    title: str
    better: Literal["high", "low", ""]
    digits: int = 2
    missing: str = ""
    """What to install or provide where it is not measured."""


MEASURES: dict[str, Measure] = {
    "psnr": Measure("PSNR, whole picture", "high"),
    "psnr_fg": Measure("PSNR, foreground", "high"),
    "psnr_face": Measure("PSNR, mouth and eyes", "high"),
    "ssim": Measure("SSIM", "high", 3),
    "ssim_full": Measure("SSIM, whole picture", "high", 3),
    "lpips": Measure("LPIPS", "low", 3, "give --lpips NETWORK.pth LINEAR.pth, weights of yours"),
    "jod": Measure("JOD", "high", 2, "install pyfvvdp (FovVideoVDP, non-commercial)"),
    "jod_color": Measure("JOD, colour", "high", 2, "install cvvdp and torchvision (ColorVideoVDP)"),
    "csim": Measure(
        "CSIM", "high", 3, "give --arcface FILE.onnx, an ArcFace network of yours, and install onnxruntime"
    ),
    "csim_open": Measure("CSIM, open", "high", 3),
    "akd": Measure("AKD [px]", "low"),
    "aed": Measure("AED [mm]", "low"),
    "expression_gain": Measure("expression gain", ""),
    "expression_corr": Measure("expression corr", "high"),
    "normal_deg": Measure("normals off by [°]", "low"),
    "sharpness": Measure("sharpness", "", 2),
    "flicker": Measure("flicker [levels]", "low"),
}
"""Where a truth is: psnr and ssim_full over the picture on grey, the others in the foreground; `sharpness` of 1 is the
truth's. csim is to the truth, or to the reference where there is none."""
Scores = dict[str, list[float] | float]
MIN_SIZE = 96
"""Smaller pictures show no face that could be tracked."""


@dataclass(frozen=True)
class JudgeConfig:
    """Files of the user's."""

    lpips: tuple[Path, ...] = ()
    arcface: Path | None = None
    jod: bool = True
    """Whether the VDPs are asked, where they are installed."""


class Judges:
    """What can be measured here; loaded once a process."""

    def __init__(self, head: Head, config: JudgeConfig = JudgeConfig()) -> None:
        """Load what is there.

        Raises:
            UserError: a file that was given cannot be read.
        """
        self.head = head
        self.lpips = Lpips(config.lpips) if config.lpips else None
        self.arcface = ArcFace(config.arcface) if config.arcface else None
        self.names: dict[str, str] = {}
        if self.lpips:
            self.names["lpips"] = f"LPIPS, {self.lpips.name}"
        if config.arcface:
            self.names["csim"] = f"ArcFace, {config.arcface.name}"
        self.films: dict[str, Films] = {}
        for key, load in (("jod", fov_video_vdp), ("jod_color", color_video_vdp)) if config.jod else ():
            self._try(key, load)

    def _try(self, key: str, load: Callable[[], tuple[Films, str]]) -> None:
        try:
            self.films[key], self.names[key] = load()
        except UserError:
            return  # optional: the table says what to install

    @cached_property
    def identity(self):
        return load_identity()

    def observe(self, frames: Float[Tensor, "frames 3 height width"], inputs: Inputs) -> Observed | None:
        """Track frames, all for one if they stand still; None of pictures too small to be."""
        if frames.shape[-1] < MIN_SIZE:
            return None
        focal = float(inputs.camera.K[0, 0])
        if len(frames) > 1 and bool((frames[1:] == frames[:1]).all()):
            return observe_frames(frames[:1], self.head, focal).repeated(len(frames))
        return observe_frames(frames, self.head, focal)


class Trial:
    """A case's truth as the judges see it: observed once, compared with every method."""

    def __init__(self, judges: Judges, inputs: Inputs, driver: Float[Tensor, "frames 3 height width"]) -> None:
        """`driver` are the driver's frames on grey: whose expression counts where there is no truth."""
        self.judges, self.inputs = judges, inputs
        truth = inputs.truth
        self.truth = None if truth is None else quantised_truth(truth)
        self.target = judges.observe(driver if truth is None else self.shown, inputs)

    @property
    def shown(self) -> Float[Tensor, "frames 3 height width"]:
        """Who should be seen: the truth, or the reference."""
        if self.truth is not None:
            return self.truth.rgb
        return self.inputs.portrait.on_grey[None]

    @cached_property
    def _identities(self) -> dict[str, Tensor]:
        seen = self.target if self.truth is not None else self.judges.observe(self.shown, self.inputs)
        return {} if seen is None else self._vectors(self.shown, seen)

    def _vectors(self, frames: Tensor, seen: Observed) -> dict[str, Tensor]:
        squares = [None if d is None else d.square for d in seen.detections]
        if bool((frames[1:] == frames[:1]).all()):
            frames, squares = frames[:1], squares[:1]
        out = {"csim_open": self.judges.identity(identity_features(frames, squares))}
        if self.judges.arcface:
            out["csim"] = self.judges.arcface(frames, seen.five[: len(frames)])
        return out

    def score(
        self, rgb: Float[Tensor, "frames 3 height width"] | None, normal: Float[Tensor, "frames 3 height width"] | None
    ) -> tuple[Scores, Observed | None]:
        """Score one method's frames by everything that its domains and the case's truth allow."""
        out: Scores = {}
        observed = None
        if rgb is not None:
            rgb = quantised(rgb)
            observed = self.judges.observe(rgb, self.inputs)
            out |= self._of_pictures(rgb) if self.truth is not None else {}
            out |= self._of_people(rgb, observed)
        if normal is not None and self.truth is not None and self._has_normals:
            normal = decode_normals(quantised(encode_normals(normal, torch.ones_like(normal[:, :1]))))
            out["normal_deg"] = metrics.normal_deg(normal, self.truth.normal, self.truth.mask).tolist()
        return out, observed

    @property
    def _has_normals(self) -> bool:
        return self.truth is not None and bool(self.truth.normal.abs().sum() > 0)

    def score_perceived(self, observed: Observed | None, size: int) -> Scores:
        """Score the normals that the perception network sees in a method's own RGB."""
        found = None if observed is None else perceived_normals(observed, size)
        return {} if found is None else self.score(None, found)[0]

    def _of_pictures(self, rgb: Tensor) -> Scores:
        truth = self.truth
        assert truth is not None
        whole = torch.ones_like(truth.mask)
        out: Scores = {
            "psnr": metrics.psnr(rgb, truth.rgb).tolist(), "psnr_fg": metrics.psnr(rgb, truth.rgb, truth.mask).tolist(),
            "psnr_face": metrics.psnr(rgb, truth.rgb, truth.face).tolist(),
            "ssim": metrics.ssim(rgb, truth.rgb, truth.mask).tolist(),
            "ssim_full": metrics.ssim(rgb, truth.rgb, whole).tolist(),
            "sharpness": metrics.sharpness(rgb, truth.rgb, truth.mask).tolist(),
            "flicker": flicker(rgb, truth.rgb, truth.mask),
        }  # fmt: skip
        if self.judges.lpips:
            out["lpips"] = self.judges.lpips(rgb, truth.rgb).tolist()
        for key, films in self.judges.films.items():
            out[key] = films(rgb, truth.rgb, self.inputs.driving.fps)
        return out

    def _of_people(self, rgb: Tensor, observed: Observed | None) -> Scores:
        if observed is None or self.target is None:
            return {}
        out: Scores = {"aed": expression_distance(self.judges.head, observed, self.target).tolist()}
        moved = expression_products(self.judges.head, self.target, observed)
        out |= {"expression_gain": moved.gain, "expression_corr": moved.cos}
        if self.truth is not None:
            out["akd"] = keypoint_distance(observed, self.target).tolist()
        vectors, own = self._vectors(rgb, observed), self._identities
        for key in vectors:
            if key in own:
                out[key] = (vectors[key] * own[key]).sum(-1).expand(len(rgb)).tolist()
        return out


def quantised(image: Float[Tensor, "*batch channels height width"]) -> Float[Tensor, "*batch channels height width"]:
    """What a PNG keeps."""
    return (image.clamp(0, 1) * 255).round() / 255


def quantised_truth(truth: Truth) -> Truth:
    """Round the true colours to bytes, as those that are compared with them are."""
    return Truth(quantised(truth.rgb), truth.normal, truth.mask, truth.face)
