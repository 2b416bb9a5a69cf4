"""Training footage behind one interface, whatever recorded or rendered it.

Footage is a list of takes (one person, some instants, some views, with holes) and a way to read frames as the video
model does: image on plain grey, normals, pose map, driving crop, warped portrait. Nothing is read before it is asked
for. Rendered footage has some of it cached; what it has not is decoded and encoded as it comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d
from torch.nn.functional import interpolate as resized

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import encode_normals
from geodiff4d.heads.rig import Head, HeadParams, PosedHead
from geodiff4d.render.meshes import interpolate, rasterize, render_normals

Kind = Literal["multi-view", "video", "images"]
FOCUS_REGIONS = ("lips", "mouth", "teeth", "tongue", "lids", "eyes", "brows")

HELD_OUT = "val"
"""A folder of this name below one that is trained on is validated on, and never trained on."""


STRANGER = -1
"""View of a driving frame in which somebody else makes the expression of the instant."""


class FrameKey(NamedTuple):
    """A frame of some footage."""

    take: int
    instant: int
    """Position among the take's timesteps."""
    view: int
    """Position among the take's cameras."""


@dataclass(frozen=True)
class Take:
    """One person in front of some cameras for some time."""

    subject: str
    timesteps: np.ndarray
    """[instants], ascending."""
    present: np.ndarray
    """[instants, views] bool: holes are False."""
    temporal: bool
    """Instants follow each other; off, they are single images of the same person."""
    fps: float = 24.0
    """Rate of the instants, whatever their timesteps count."""
    motion: bool = False
    """Expression, jaw and gaze are known, as OpenHead's coefficients (`Footage.motion`)."""
    portraits: bool = True
    """Its frames can be the reference."""
    targets: bool = True
    """Its frames can be targets."""
    partial: bool = False
    """Its portraits are parts of the frame itself: what they can tell nothing of weighs nothing."""
    strangers: bool = False
    """Its instants can be driven by somebody else (`STRANGER`)."""


@dataclass(frozen=True)
class DecodedFrames:
    """Frames on their canonical crop, in [0, 1]."""

    rgb: Float[Tensor, "n 3 size size"]
    """On plain grey."""
    mask: Float[Tensor, "n 1 size size"]
    normal: Float[Tensor, "n 3 size size"]
    """Normal images, grey on the background and where the footage has none."""
    has_normal: Bool[Tensor, " n"]
    pose: Float[Tensor, "n 3 size size"]
    """Pose maps (Sec. 3.2)."""
    focus: Float[Tensor, "n 1 size size"]
    """1 on mouth, eyes and brows."""


@dataclass(frozen=True)
class CachedFrames:
    """Frames that were encoded before."""

    planes: Float[Tensor, "n p h w"]
    """Latents of image and normals, then the pose map's planes, as `video.batches` encodes them."""
    cover: Float[Tensor, "n h w"]
    """Share of the foreground in each latent cell."""
    focus: Float[Tensor, "n h w"]
    """Share of mouth, eyes and brows in each latent cell or one beside it."""
    has_normal: Bool[Tensor, " n"]


@runtime_checkable
class Footage(Protocol):
    """What training samples are drawn from (`data.sampling`)."""

    name: str
    takes: list[Take]

    def reference_views(self, take: int) -> Sequence[int]:
        """Return the views that show the face well enough for a portrait, the most frontal first; never empty."""
        ...

    def driving_views(self, take: int) -> Sequence[int]:
        """Return the views that show the expression; there may be none."""
        ...

    def frames(self, keys: Sequence[FrameKey], size: int) -> DecodedFrames:
        """Decode frames."""
        ...

    def cached(self, keys: Sequence[FrameKey]) -> CachedFrames | None:
        """Return frames as they were encoded before; None if they were not."""
        ...

    def driving(self, keys: Sequence[FrameKey], size: int) -> Float[Tensor, "n 3 size size"]:
        """Cut the face from frames."""
        ...

    def warped(
        self, reference: FrameKey, keys: Sequence[FrameKey], size: int, surroundings: bool = False,
        moved: np.ndarray | None = None,
    ) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 2 size size"]]:  # fmt: skip
        """Carry a reference to frames' heads: (image; what the portrait shows, and where the head is).

        Heads are without expression, but where `moved` is true: there they have the expression and gaze that a tracker
        would find. With `surroundings`, hair and shoulders beside the mesh are carried too.
        """
        ...

    def motion(self, keys: Sequence[FrameKey]) -> HeadParams | None:
        """Return OpenHead's expression, jaw and gaze of frames, the rest zero; None where a take knows none."""
        ...


def kind_of(footage: Footage) -> Kind:
    """Say what footage is, by its largest takes."""
    if any(t.present.shape[1] > 1 for t in footage.takes):
        return "multi-view"
    return "video" if any(t.temporal for t in footage.takes) else "images"


def of_mesh(
    head: Head, still: PosedHead, cameras: Camera
) -> tuple[Float[Tensor, "n 3 height width"], Float[Tensor, "n 1 height width"]]:
    """Return what heads without expression say of their frames: pose maps (Sec. 3.2), and where the focus is."""
    fragments = rasterize(still.vertices, still.faces, cameras)
    regions = [head.regions[r] for r in FOCUS_REGIONS if r in head.regions]
    focus = torch.stack(regions).any(0).float()[:, None] if regions else torch.zeros_like(head.template[:, :1])
    pose = encode_normals(*render_normals(still, cameras, fragments))
    return pose, interpolate(fragments, head.faces, focus).clamp(0, 1)


def on_grid(
    mask: Float[Tensor, "n 1 size size"], focus: Float[Tensor, "n 1 size size"], side: int
) -> tuple[Float[Tensor, "n side side"], Float[Tensor, "n side side"]]:
    """Bring foreground and focus to the latent grid; the focus grows by a cell, because its edges move."""
    return adaptive_avg_pool2d(mask, side)[:, 0], max_pool2d(adaptive_avg_pool2d(focus, side), 3, 1, 1)[:, 0]


def at_size(images: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n c size size"]:
    """Resample images that are not of a size already, antialiased."""
    if images.shape[-1] == size:
        return images
    return resized(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
