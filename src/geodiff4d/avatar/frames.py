"""A clip's frames held in memory as bytes, split into training and held-out ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import composite
from geodiff4d.data.clip import Clip
from geodiff4d.heads.rig import Head, HeadParams

BOX_MARGIN = 0.06
"""Around the foreground's box, as a share of the picture: silhouettes need their outside."""


@dataclass(frozen=True)
class Target:
    """One frame as the loss wants it, on a plain background."""

    camera: Camera
    row: int
    """The frame's timestep, as a row of the sequence."""
    image: Float[Tensor, "3 height width"]
    mask: Float[Tensor, "1 height width"]
    normal: Float[Tensor, "3 height width"] | None
    box: tuple[slice, slice]
    """Rows and columns that contain the foreground."""


@dataclass(frozen=True)
class _Stored:
    camera: Camera
    row: int
    image: Tensor
    mask: Tensor
    normal: Tensor | None
    box: tuple[slice, slice]


class Frames:
    """All frames of a clip (1.8 MB each at 512²), and its head parameters.

    Raises:
        UserError: frames without masks, parameters that are missing, not finite or another head's.
    """

    def __init__(self, clip: Clip, head: Head, held_out_every: int):
        self.clip, self.device = clip, torch.device("cpu")
        self.sequence = read_sequence(clip, head)
        unmasked = next((r for r in clip.records if r.mask_path is None), None)
        if unmasked:
            raise UserError(
                f"{clip.folder} has no foreground mask for {unmasked.image_path.name}: "
                "an avatar needs them; run `geodiff4d track` on the pictures first"
            )
        rows = {t: i for i, t in enumerate(clip.timesteps)}
        columns = {c: i for i, c in enumerate(clip.camera_indices)}
        self._stored = [self._read(i, rows) for i in range(len(clip))]
        places = [(rows[r.timestep], columns[r.camera_index]) for r in clip.records]
        # Rotates through the cameras, so that every timestep and every view is seen in training.
        held = [held_out_every > 0 and (3 * t + c) % held_out_every == 1 for t, c in places]
        self.held_out = [i for i, out in enumerate(held) if out]
        self.train = [i for i, out in enumerate(held) if not out] or self.held_out

    def _read(self, index: int, rows: dict[int, int]) -> _Stored:
        frame = self.clip.frame(index)
        if frame.mask.max() < 0.5:
            name = self.clip.records[index].image_path.name
            raise UserError(f"{self.clip.folder}: the mask of {name} is empty: remove the frame or mask it again")
        normal = None if frame.normal is None else (frame.normal * 127).round().to(torch.int8)
        return _Stored(
            frame.camera, rows[frame.timestep], (frame.image * 255).round().to(torch.uint8),
            (frame.mask * 255).round().to(torch.uint8), normal, foreground_box(frame.mask),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._stored)

    def to(self, device: torch.device | str) -> "Frames":
        """Name the device that targets are made on; the bytes stay where they are."""
        self.device = torch.device(device)
        return self

    def camera(self, index: int) -> Camera:
        return self._stored[index].camera

    def row(self, index: int) -> int:
        return self._stored[index].row

    def target(self, index: int, background: Float[Tensor, "3"] | float = 0.5) -> Target:
        """Decode one frame and put it on a background."""
        s = self._stored[index]
        image, mask = s.image.to(self.device).float() / 255, s.mask.to(self.device).float() / 255
        if isinstance(background, Tensor):
            image = image * mask + background[:, None, None] * (1 - mask)
        else:
            image = composite(image, mask, background)
        normal = None if s.normal is None else s.normal.to(self.device).float() / 127
        return Target(s.camera.to(self.device), s.row, image, mask, normal, s.box)


def read_sequence(clip: Clip, head: Head) -> HeadParams:
    """Read the clip's parameters, a row per timestep.

    Raises:
        UserError: they are missing, not finite or another head's.
    """
    clip.require_head(head.name)
    rows = [clip.params(t) for t in clip.timesteps]
    expected = vars(head.neutral())
    for t, row in zip(clip.timesteps, rows, strict=True):
        for name, value in vars(row).items():
            if value is not None and not value.isfinite().all():
                raise UserError(f"{clip.folder}: {name} of timestep {t} is not finite: track the clip again")
            want = expected.get(name)
            if value is not None and want is not None and value.shape != want.shape:
                raise UserError(
                    f"{clip.folder}: {name} has {value.shape[-1]} values, the head {head.name} has {want.shape[-1]}: "
                    "the clip was tracked with another head"
                )
    return HeadParams.stack(rows)


def foreground_box(mask: Float[Tensor, "1 height width"]) -> tuple[slice, slice]:
    """Return the rows and columns that hold the foreground and a margin; at least 16 pixels either way."""

    def extent(seen: Tensor, size: int) -> slice:
        where = seen.nonzero()
        margin = max(round(BOX_MARGIN * size), 8)
        return slice(max(int(where[0]) - margin, 0), min(int(where[-1]) + margin + 1, size))

    inside = mask[0] > 0.02
    return extent(inside.any(1), mask.shape[1]), extent(inside.any(0), mask.shape[2])
