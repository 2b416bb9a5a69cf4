"""A clip's frames held in memory as bytes, split into training and held-out ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import composite
from geodiff4d.data.clip import Clip, ClipFrame
from geodiff4d.heads.rig import Head, HeadParams

NormalSource = Callable[[ClipFrame], Tensor]
"""Returns the normals of a frame, in place of the clip's: camera-space, unit, zero on the background."""
BOX_MARGIN = 0.06
"""Margin around the foreground's box, as a share of the image: silhouettes are compared on both sides."""


@dataclass(frozen=True)
class Target:
    """One frame that a rendering is compared with, on a plain background."""

    camera: Camera
    row: int
    """The frame's timestep, as a row of the sequence."""
    image: Float[Tensor, "3 height width"]
    mask: Float[Tensor, "1 height width"]
    normal: Float[Tensor, "3 height width"] | None
    """Normals that the loss compares with; None where there are none."""
    clip_normal: Float[Tensor, "3 height width"] | None
    """Normals that scores compare with: the clip's own."""
    box: tuple[slice, slice]
    """Rows and columns that contain the foreground."""


@dataclass(frozen=True)
class HoldOut:
    """Which frames are held out of the fit, and only scored."""

    every: int = 8
    """One of this many frames is held out, so that every timestep and every view is trained on; 0 holds out none."""
    views: int = 0
    """Number of held-out cameras, spread over the clip's."""
    times: float = 0.0
    """Held-out share of the timesteps, 0 to 1: the clip's last."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.views < 0 or not 0 <= self.times < 1:
            raise ValueError(f"hold-out needs every >= 0, views >= 0 and 0 <= times < 1, got {self}")


@dataclass(frozen=True)
class _Stored:
    camera: Camera
    row: int
    image: Tensor
    mask: Tensor
    normal: Tensor | None
    clip_normal: Tensor | None
    box: tuple[slice, slice]

    def halved(self) -> "_Stored":
        """Return the frame at half its size; colours and normals are means over the foreground."""
        mask = _halved(self.mask.float())
        image = (_halved(self.image.float() * self.mask) / mask.clamp(min=1e-3)).round().to(torch.uint8)
        half = torch.tensor([[0.5], [0.5], [1.0]]).to(self.camera.K)
        camera = replace(self.camera, K=half * self.camera.K, width=mask.shape[-1], height=mask.shape[-2])
        inside = _halved((self.mask > 0).float()).clamp(min=0.25)
        normal, clip_normal = (
            None if n is None else (_halved(n.float()) / inside).round().to(torch.int8)
            for n in (self.normal, self.clip_normal)
        )
        rows, columns = (slice(s.start // 2, -(-s.stop // 2)) for s in self.box)
        normal = clip_normal if self.normal is self.clip_normal else normal
        return _Stored(camera, self.row, image, mask.round().to(torch.uint8), normal, clip_normal, (rows, columns))


def _halved(x: Tensor) -> Tensor:
    height, width = (n // 2 * 2 for n in x.shape[-2:])
    x = x[..., :height, :width]
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


class FitFrames:
    """All frames of a clip (1.8 MB each at 512²), split into training and held-out ones, and its head parameters.

    Raises:
        UserError: frames without masks, parameters that are missing, not finite or another head's.
    """

    def __init__(self, clip: Clip, head: Head, hold_out: HoldOut = HoldOut(), normals: NormalSource | None = None):
        self.clip, self.device, self._normals = clip, torch.device("cpu"), normals
        self.sequence = read_sequence(clip, head)
        unmasked = next((r for r in clip.records if r.mask_path is None), None)
        if unmasked:
            raise UserError(
                f"{clip.folder} has no foreground mask for {unmasked.image_path.name}: "
                "an avatar needs them; run `geodiff4d track` on the images first"
            )
        self.tokens = read_tokens(clip)
        rows = {t: i for i, t in enumerate(clip.timesteps)}
        self._split(hold_out, rows)
        self._stored = [self._read(i, rows) for i in range(len(clip))]
        self._halves: dict[int, _Stored] = {}

    def _split(self, hold_out: HoldOut, rows: dict[int, int]) -> None:
        """Sort frames into `train`, `held_out_views`, `held_out_times` and `held_out` (all that are only scored).

        Frames whose head nobody read are in none of them.
        """
        columns = {c: i for i, c in enumerate(self.clip.camera_indices)}
        views, times = len(columns), len(rows)
        if hold_out.views >= views and hold_out.views:
            raise UserError(
                f"{self.clip.folder} has {views} camera(s), {hold_out.views} cannot be held out: at most {views - 1}"
            )
        kept_times = times - round(hold_out.times * times)
        if kept_times < 1:
            raise UserError(f"{self.clip.folder} has {times} timestep(s): too few to hold {hold_out.times:.0%} out")
        held_views = {round((i + 1) * views / (hold_out.views + 1)) for i in range(hold_out.views)}
        self.train, self.held_out, self.held_out_views, self.held_out_times = [], [], [], []
        for i, record in enumerate(self.clip.records):
            if record.unread:
                continue
            t, c = rows[record.timestep], columns[record.camera_index]
            late, aside = t >= kept_times, c in held_views
            # Rotates through the cameras.
            now_and_then = hold_out.every > 0 and (3 * t + c) % hold_out.every == 1
            (self.held_out if late or aside or now_and_then else self.train).append(i)
            if aside and not late:
                self.held_out_views.append(i)
            if late and not aside:
                self.held_out_times.append(i)
        self.train = self.train or self.held_out
        if not self.train:
            raise UserError(f"{self.clip.folder} has no frame whose head was read: track another film or photograph")

    def _read(self, index: int, rows: dict[int, int]) -> _Stored:
        frame = self.clip.frame(index)
        if frame.mask.max() < 0.5:
            name = self.clip.records[index].image_path.name
            raise UserError(f"{self.clip.folder}: the mask of {name} is empty: remove the frame or mask it again")
        clip_normal = None if frame.normal is None else (frame.normal * 127).round().to(torch.int8)
        normal = clip_normal
        if self._normals is not None and index in self.train:
            normal = (self._normals(frame) * frame.mask * 127).round().to(torch.int8)
        return _Stored(
            frame.camera, rows[frame.timestep], (frame.image * 255).round().to(torch.uint8),
            (frame.mask * 255).round().to(torch.uint8), normal, clip_normal, foreground_box(frame.mask),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._stored)

    def to(self, device: torch.device | str) -> "FitFrames":
        """Set the device of the targets; the stored bytes stay on the CPU. Returns itself."""
        self.device = torch.device(device)
        return self

    def camera(self, index: int) -> Camera:
        """Return a frame's camera."""
        return self._stored[index].camera

    def row(self, index: int) -> int:
        """Return a frame's timestep, as a row of `sequence`."""
        return self._stored[index].row

    def target(self, index: int, background: Float[Tensor, "3"] | float = 0.5, halved: bool = False) -> Target:
        """Return one frame, or the frame at half its size, on a background: an RGB triple or a grey level, 0 to 1."""
        if halved and index not in self._halves:
            self._halves[index] = self._stored[index].halved()
        s = self._halves[index] if halved else self._stored[index]
        image, mask = s.image.to(self.device).float() / 255, s.mask.to(self.device).float() / 255
        if isinstance(background, Tensor):
            image = image * mask + background[:, None, None] * (1 - mask)
        else:
            image = composite(image, mask, background)
        normal = None if s.normal is None else s.normal.to(self.device).float() / 127
        theirs = normal
        if s.clip_normal is not s.normal:
            theirs = None if s.clip_normal is None else s.clip_normal.to(self.device).float() / 127
        return Target(s.camera.to(self.device), s.row, image, mask, normal, theirs, s.box)


def read_tokens(clip: Clip) -> Float[Tensor, "timesteps tokens channels"] | None:
    """Read the clip's expression tokens; None if it has none that tell expressions apart (mesh warp writes zeros).

    Raises:
        UserError: they are not one finite row per timestep.
    """
    tokens = clip.expression_tokens
    if tokens is None or not tokens.numel() or bool((tokens == tokens[:1]).all()):
        return None
    if tokens.ndim != 3 or len(tokens) != len(clip.timesteps) or not tokens.isfinite().all():
        raise UserError(
            f"{clip.folder}/expression_tokens.safetensors: expected {len(clip.timesteps)} finite rows, one per "
            f"timestep, got {list(tokens.shape)}: remove the file or synthesize the clip again"
        )
    return tokens


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
    """Return the rows and columns that hold the foreground and a margin of at least 8 pixels."""

    def extent(seen: Tensor, size: int) -> slice:
        where = seen.nonzero()
        margin = max(round(BOX_MARGIN * size), 8)
        return slice(max(int(where[0]) - margin, 0), min(int(where[-1]) + margin + 1, size))

    inside = mask[0] > 0.02
    return extent(inside.any(1), mask.shape[1]), extent(inside.any(0), mask.shape[2])
