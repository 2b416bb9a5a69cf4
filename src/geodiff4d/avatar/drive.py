"""Drive an avatar by somebody's performance and render it from chosen cameras.

A performance is head parameters, a row per frame, with expression tokens where an encoder saw images. It comes from a
clip or a tracked video (`performed`), from named weights (`held`), or line by line from a stream (`avatar.stream`).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.model import Avatar, AvatarFrame
from geodiff4d.avatar.relative import MINIMUM, Rest, transferred, transferred_tokens
from geodiff4d.avatar.sliders import TokenRegressor
from geodiff4d.core.camera import Camera, turned
from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import Clip
from geodiff4d.heads.rig import HeadParams

ORBIT_DEG = 60.0

REST_EVERY = 24
"""Frames between two estimates of a live driver's face at rest."""
SEEN = 2000
"""Frames that one estimate uses at most; longer performances are subsampled."""

Pose = Literal["fixed", "driver"]
"""Where the head is. `fixed` keeps it where the avatar was fitted, turned only by the driver's neck: the driver's own
place belongs to its camera. `driver` takes rotation and translation as they are, for the clip's own cameras."""


@dataclass(frozen=True)
class Performance:
    """A sequence that an avatar performs: head parameters in its own identity, and expression tokens if it has any."""

    params: HeadParams
    """[frames, …]."""
    tokens: Float[Tensor, "frames tokens channels"] | None = None
    fps: float = 24.0

    def __len__(self) -> int:
        return self.params.batch[0]

    def __getitem__(self, index: Tensor) -> "Performance":
        return replace(self, params=self.params[index], tokens=None if self.tokens is None else self.tokens[index])

    def turned(self, neck: Float[Tensor, "frames 3"]) -> "Performance":
        """Return the performance with a rotation added to the neck, axis-angle [rad]."""
        return replace(self, params=replace(self.params, neck_pose=self.params.neck_pose + neck))

    def looped(self, frames: int) -> "Performance":
        """Return the performance repeated or cut to a number of frames."""
        return self[torch.arange(frames) % len(self)]

    def frame(self, index: int) -> tuple[HeadParams, Float[Tensor, "tokens channels"] | None]:
        """Return one frame's parameters and tokens, as `Avatar.posed` takes them.

        Raises:
            UserError: there is no such frame.
        """
        if not 0 <= index < len(self):
            raise UserError(f"frame {index} does not exist: expected 0 to {len(self) - 1}")
        return self.params[index], None if self.tokens is None else self.tokens[index]


def own_performance(avatar: Avatar) -> Performance:
    """Return the sequence that the avatar was fitted to."""
    return Performance(avatar.sequence, avatar.tokens, avatar.fps)


def wants_tokens(avatar: Avatar) -> bool:
    """Return whether expression tokens change how the avatar looks: one with networks, fitted to a generated clip."""
    return regressor_of(avatar) is not None


def regressor_of(avatar: Avatar) -> TokenRegressor | None:
    """Return the avatar's map from head parameters to tokens; None if its networks do not use tokens."""
    parts = avatar.parts
    return None if parts is None or not parts.networks() or parts.code is None else parts.code.regressor


def own_rest(avatar: Avatar) -> Rest:
    """Return the avatar's face at rest, estimated from the sequence that it was fitted to."""
    return Rest.of(avatar.head, avatar.sequence, avatar.tokens)


def performed(
    avatar: Avatar, driver: HeadParams, tokens: Float[Tensor, "frames tokens channels"] | None = None,
    fps: float = 24.0, pose: Pose = "fixed", relative: bool = True,
) -> Performance:  # fmt: skip
    """Return the performance of an avatar that follows a driver's parameters [frames, …].

    With `relative`, expressions are transferred as differences from the driver's face at rest (`avatar.relative`).
    """
    if relative:
        rest, own = Rest.of(avatar.head, driver, tokens), own_rest(avatar)
        driver = transferred(avatar.head, driver, rest, own)
        tokens = None if tokens is None else transferred_tokens(tokens, rest, own)
    return Performance(retargeted(avatar, driver, pose), tokens, fps)


class LiveDriver:
    """Turns a live driver's parameters into the avatar's, frame by frame.

    The driver's face at rest is estimated from the frames so far, every `REST_EVERY` frames; before that it is zero.
    """

    def __init__(self, avatar: Avatar):
        self.avatar, self._own = avatar, own_rest(avatar)
        self._rest = Rest.of(avatar.head, avatar.head.neutral(1))
        self._seen: list[HeadParams] = []
        self._count = 0

    def __call__(self, params: HeadParams) -> HeadParams:
        """Return the avatar's parameters for this frame; neither has a batch axis."""
        self._count += 1
        self._seen.append(params)
        if len(self._seen) > SEEN:
            self._seen = self._seen[::2]
        if self._count == MINIMUM or self._count % REST_EVERY == 0:
            self._rest = Rest.of(self.avatar.head, HeadParams.stack(self._seen))
        moved = transferred(self.avatar.head, HeadParams.stack([params]), self._rest, self._own)
        return retargeted(self.avatar, moved)[0]


def held(avatar: Avatar, weights: Float[Tensor, "frames exprs"], fps: float = 24.0) -> Performance:
    """Return the performance of the avatar at rest, where it was fitted, showing expressions by their weights."""
    head = avatar.head
    zero, own = Rest.of(head, head.neutral(1)), own_rest(avatar)
    asked = replace(head.neutral(len(weights)), expr=weights)
    return Performance(retargeted(avatar, transferred(head, asked, zero, own)), None, fps)


def retargeted(avatar: Avatar, driver: HeadParams, pose: Pose = "fixed") -> HeadParams:
    """Return a driver's parameters [frames, …] with the avatar's identity."""
    n = driver.batch[0]
    own = avatar.neutral(n)
    params = replace(driver, shape=own.shape, static_offset=own.static_offset)
    if pose == "fixed":
        home = avatar.sequence[0]
        params = replace(params, rotation=home.rotation.expand(n, 3), translation=home.translation.expand(n, 3))
    return params


def orbit(avatar: Avatar, frames: int, degrees: float = ORBIT_DEG) -> list[Camera]:
    """Return the avatar's default camera swung around the head, to ± `degrees` and back, one camera per frame."""
    pivot = head_centre(avatar)
    yaws = [degrees * math.sin(2 * math.pi * i / max(frames, 1)) for i in range(frames)]
    return [turned(avatar.camera, pivot, yaw) for yaw in yaws]


def head_centre(avatar: Avatar) -> Tensor:
    """Return the middle [m] of the head without its neck, in its first pose."""
    vertices = avatar.head.pose(replace(avatar.sequence[0], shape=avatar.shape)).vertices
    neck = avatar.head.regions.get("neck")
    return vertices.mean(0) if neck is None else vertices[~neck].mean(0)


def clip_cameras(source: Path, frames: int) -> list[Camera]:
    """Read the cameras of a transforms.json: one for all frames, or one for each.

    Raises:
        UserError: not a clip's transforms.json, or too few cameras.
    """
    if source.name != "transforms.json" or not source.exists():
        raise UserError(f"--camera {source} is not known: expected orbit, front or the path of a transforms.json")
    records = Clip(source.parent).records
    first = [r.camera for r in records if r.camera_index == records[0].camera_index]
    if len(first) == 1:
        return first * frames
    if len(first) < frames:
        raise UserError(f"{source} has {len(first)} frames of its first camera: expected 1 or at least {frames}")
    return first[:frames]


def cameras(avatar: Avatar, which: str, frames: int, size: int | None = None) -> list[Camera]:
    """Return a camera per frame: `orbit`, `front`, or the path of a transforms.json; `size` is the image's height."""
    if which == "orbit":
        found = orbit(avatar, frames)
    elif which == "front":
        found = [avatar.camera] * frames
    else:
        found = clip_cameras(Path(which), frames)
    if size is None:
        return found
    return [c.of_height(size) for c in found]


@torch.no_grad()
def render_sequence(avatar: Avatar, params: HeadParams | Performance, views: Iterable[Camera]) -> Iterator[AvatarFrame]:
    """Yield one rendered frame per camera, of a performance or of bare parameters, on the avatar's device."""
    performance = params if isinstance(params, Performance) else Performance(params)
    for i, camera in enumerate(views):
        row, tokens = performance.frame(i)
        device = avatar.shape.device
        yield avatar.render(row.to(device), camera.to(device), tokens=None if tokens is None else tokens.to(device))


def normal_image(frame: AvatarFrame) -> Tensor:
    """Return the premultiplied normals as an image: n/2 + 0.5, 0 to 1, grey on the background."""
    return (frame.normal * 0.5 + 0.5).clamp(0, 1)
