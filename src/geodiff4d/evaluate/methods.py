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

from geodiff4d.avatar.model import Avatar
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import decode_normals, read_image
from geodiff4d.evaluate.inputs import Inputs
from geodiff4d.heads import Head
from geodiff4d.presets import Preset
from geodiff4d.render.meshes import pose_map
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest, WarpGenerator
from geodiff4d.video.inputs import Driving, Portrait, load_driving
from geodiff4d.video.model import VideoModel
from geodiff4d.video.sample import SampleConfig

TITLES = {
    "video_model": "video model",
    "avatar": "avatar",
    "avatar_true": "avatar on true frames (upper bound)",
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
AVATARS = ("avatar", "avatar_true")
"""Driven alike; what they were fitted to differs (`evaluate/avatars.py`)."""
DEFAULT_METHODS = tuple(m for m in METHODS if m not in AVATARS)


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
    sample: SampleConfig
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def generator(self) -> DiffusionGenerator:
        """The video model, sampled as the protocol says."""
        return DiffusionGenerator(self.model, self.sample)

    def driving(self, inputs: Inputs) -> Driving:
        """Read the driver's face crops; its motion is in the reference's shape."""
        crop = self.model.config.expression.size
        return replace(load_driving(inputs.driving, self.head, crop), params=inputs.params)

    def make(self, method: str, inputs: Inputs, driving: Driving, other: Portrait, avatar: Path) -> Made:
        """Make a case's frames by a method's name; `other` is another person's reference, `avatar` the method's.

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
            **{name: lambda: self._avatar(avatar, inputs) for name in AVATARS},
        }
        if method not in makers:
            raise UserError(f"--methods {method} is not known: expected some of {', '.join(METHODS)}")
        with torch.no_grad():
            return makers[method]()

    def _generated(self, portrait: Portrait, driving: Driving, inputs: Inputs, drop: bool = False) -> Made:
        generator = self.generator.without_expression() if drop else self.generator
        out = generator.generate(GenerationRequest(portrait, driving, self.head), inputs.cameras)
        return Made(out.rgb.cpu(), out.normal.cpu() if self.model.config.normals else None)

    def _warped(self, driving: Driving, inputs: Inputs) -> Made:
        out = WarpGenerator().generate(GenerationRequest(inputs.portrait, driving, self.head), inputs.cameras)
        return Made(out.rgb, out.normal)

    def _pose_map(self, inputs: Inputs) -> Made:
        posed, mask = pose_map(self.head, inputs.params, inputs.cameras)
        return Made(None, (posed * 2 - 1) * mask)

    def _avatar(self, folder: Path, inputs: Inputs) -> Made:
        avatar = Avatar.load(folder)
        frames = [avatar.render(inputs.params[k], inputs.camera) for k in range(inputs.params.batch[0])]
        return Made(torch.stack([f.rgb for f in frames]).clamp(0, 1), torch.stack([f.normal for f in frames]))


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
