"""Who is compared: the video model, the avatar, baselines and controls, and anyone's frames from a folder.

All get the same tracked reference and driver. Baselines are what one has without any diffusion; controls take away what
a method claims to use.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.fit import PRESETS as FIT_PRESETS
from geodiff4d.avatar.fit import fit
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import decode_normals, read_image
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.inputs import Inputs
from geodiff4d.heads import Head, HeadParams
from geodiff4d.pipeline import Driving, animate, load_driving, load_portrait, synthesize
from geodiff4d.presets import Preset
from geodiff4d.render.meshes import pose_map
from geodiff4d.video.generate import Portrait
from geodiff4d.video.model import VideoModel
from geodiff4d.video.sample import SampleConfig

TITLES = {
    "video_model": "video model",
    "avatar": "avatar",
    "mesh_warp": "mesh warp",
    "copy_reference": "reference copied",
    "shuffled_reference": "control: another's reference",
    "dropped_expression": "control: no expression",
    "pose_map": "pose map as normals",
    "perception": "normals perceived in the video model's RGB",
}
"""In the table's order."""
CONTROLS = ("shuffled_reference", "dropped_expression", "pose_map", "perception")
METHODS = tuple(TITLES)
DEFAULT_METHODS = tuple(m for m in METHODS if m != "avatar")


@dataclass(frozen=True)
class Made:
    """One method's frames."""

    rgb: Float[Tensor, "frames 3 height width"] | None
    """On grey."""
    normal: Float[Tensor, "frames 3 height width"] | None
    """Camera-space, zero where there is no surface."""


@dataclass(frozen=True)
class Maker:
    """What makes frames; one a process."""

    head: Head
    model: VideoModel
    preset: Preset
    preset_name: str
    sample: SampleConfig
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    def driving(self, inputs: Inputs) -> Driving:
        """Read the driver's face crops; its motion is in the reference's shape."""
        crop = self.model.config.expression.size
        return replace(load_driving(inputs.driving, self.head, crop), params=inputs.params)

    def make(self, method: str, inputs: Inputs, driving: Driving, other: Portrait, avatar: Path) -> Made:
        """Make a case's frames by a method's name; `other` is another person's reference.

        Raises:
            UserError: there is no such method.
        """
        makers: dict[str, Callable[[], Made]] = {
            "video_model": lambda: self._generated(inputs.portrait, driving, inputs),
            "shuffled_reference": lambda: self._generated(other, driving, inputs),
            "dropped_expression": lambda: self._generated(inputs.portrait, driving, inputs, drop=True),
            "mesh_warp": lambda: self._warped(driving, inputs),
            "copy_reference": lambda: Made(inputs.portrait.on_grey.expand(len(driving), -1, -1, -1), None),
            "pose_map": lambda: self._pose_map(inputs),
            "avatar": lambda: self._avatar(avatar, inputs),
        }
        if method not in makers:
            raise UserError(f"--methods {method} is not known: expected some of {', '.join(METHODS)}")
        with torch.no_grad():
            return makers[method]()

    def _generated(self, portrait: Portrait, driving: Driving, inputs: Inputs, drop: bool = False) -> Made:
        sample = replace(self.sample, guidance=1.0) if drop else self.sample
        out = animate(
            portrait, driving, "diffusion", self.model, self.head, inputs.cameras, sample, drop_expression=drop
        )
        return Made(out.rgb.cpu(), out.normal.cpu() if self.model.config.normals else None)

    def _warped(self, driving: Driving, inputs: Inputs) -> Made:
        out = animate(inputs.portrait, driving, "warp", None, self.head, inputs.cameras, self.sample)
        return Made(out.rgb, out.normal)

    def _pose_map(self, inputs: Inputs) -> Made:
        posed, mask = pose_map(self.head, inputs.params, inputs.cameras)
        return Made(None, (posed * 2 - 1) * mask)

    def _avatar(self, folder: Path, inputs: Inputs) -> Made:
        avatar = Avatar.load(folder)
        frames = [avatar.render(inputs.params[k], inputs.camera) for k in range(inputs.params.batch[0])]
        return Made(torch.stack([f.rgb for f in frames]).clamp(0, 1), torch.stack([f.normal for f in frames]))

    def fit_avatar(self, folder: Path, reference: Clip, drivers: list[Clip]) -> None:
        """Make a reference's avatar: generate its training clip with other people's motion, and fit; resumes."""
        if not (folder / "clip" / "transforms.json").exists():
            portrait = load_portrait(reference, self.model.config.size)
            crop = self.model.config.expression.size
            found = [load_driving(c, self.head, crop) for c in drivers]
            shape = found[0].params.shape[:1]
            params = [replace(d.params, shape=shape.expand(len(d), -1)) for d in found]
            joined = Driving(_joined(params), torch.cat([d.crops for d in found]), found[0].fps)
            p = self.preset
            synthesize(
                portrait, joined, folder / "clip", self.head, "diffusion", self.model, p.views, p.frames, self.sample
            )
        if not (folder / "avatar" / "metrics.json").exists():
            fit(Clip(folder / "clip"), folder / "avatar", FIT_PRESETS[self.preset_name][1], self.seed)


def _joined(parts: list[HeadParams]) -> HeadParams:
    return HeadParams.stack([p[i] for p in parts for i in range(p.batch[0])])


def read_results(folder: Path, name: str, frames: int, size: int) -> Made | None:
    """Read another method's frames of a case: FOLDER/<case>/{t:05d}_rgb.png and, if it has any, …_normal.png.

    None if the folder has nothing of the case.

    Raises:
        UserError: frames are missing or have another size.
    """
    found = folder / name
    if not found.is_dir():
        return None
    rgb = [_read(found / f"{k:05d}_rgb.png", size) for k in range(frames)]
    has = [(found / f"{k:05d}_normal.png").exists() for k in range(frames)]
    normal = None
    if all(has):
        normal = torch.stack([decode_normals(_read(found / f"{k:05d}_normal.png", size)) for k in range(frames)])
    return Made(torch.stack(rgb), normal)


def _read(path: Path, size: int) -> Tensor:
    image = read_image(path)
    if tuple(image.shape[1:]) != (size, size):
        raise UserError(
            f"{path} has {image.shape[2]}×{image.shape[1]} pixels: expected {size}×{size}, as the truth has"
        )
    return image
