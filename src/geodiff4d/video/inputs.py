"""What a generator is given: a tracked portrait, and the performance that drives it (Sec. 3.1, 3.2)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import composite
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip, ClipFrame
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.crops import crop_image, face_crop_box


@dataclass(frozen=True)
class Portrait:
    """A tracked portrait in its canonical crop."""

    image: Float[Tensor, "3 height width"]
    mask: Float[Tensor, "1 height width"]
    """Foreground: head, hair, neck and the start of the shoulders."""
    camera: Camera
    params: HeadParams
    """Tracked parameters (no batch axis)."""
    normal: Float[Tensor, "3 height width"] | None = None
    """Camera-space normals of an estimator, if the user has one; else the model generates its own."""
    others: "tuple[Portrait, ...]" = ()
    """More portraits of the same person, in the same shape (ours); this one is the reference."""

    @property
    def on_grey(self) -> Float[Tensor, "3 height width"]:
        """The image as the model sees it, its background grey."""
        return composite(self.image, self.mask)

    def to(self, device: torch.device) -> "Portrait":
        """Return the portrait with all of its tensors on a device."""
        normal = None if self.normal is None else self.normal.to(device)
        return Portrait(
            self.image.to(device), self.mask.to(device), self.camera.to(device), self.params.to(device), normal,
            tuple(other.to(device) for other in self.others),
        )  # fmt: skip

    def resized(self, size: int) -> "Portrait":
        """Return the portrait at another size; at its own it is returned as it is."""
        if self.image.shape[-1] == size:
            return self
        others = tuple(other.resized(size) for other in self.others)
        frame = resized_frame(ClipFrame(0, 0, self.camera, self.image, self.mask, self.normal, self.params), size)
        return Portrait(frame.image, frame.mask, frame.camera, self.params, frame.normal, others)


@dataclass(frozen=True)
class Driving:
    """What drives a head: motion, and the face crops that the expression encoder reads."""

    params: HeadParams
    """Head parameters, [frames, …]. As loaded they have the driver's shape; generators want the portrait's
    (`with_identity_of`)."""
    crops: Float[Tensor, "frames 3 size size"]
    fps: float = 24.0
    camera: Camera | None = None
    """The driver's own, if one saw all frames."""
    temporal: bool = True
    """Whether frames follow each other; off, they are instants, and temporal modules see each by itself."""
    unread: tuple[int, ...] = ()
    """Frames whose motion was not read but continues their neighbours', with the nearest frame's crop: they keep a film
    in time, and no instant is taken from them."""

    def __len__(self) -> int:
        return len(self.crops)

    def select(self, index: list[int]) -> "Driving":
        """Return the frames of an index, in its order."""
        i, unread = torch.tensor(index), tuple(k for k, t in enumerate(index) if t in self.unread)
        return replace(self, params=self.params[i], crops=self.crops[i], unread=unread)

    def and_instants(self, others: "Driving") -> "Driving":
        """Return these frames and then the others, each an instant of its own."""
        both = HeadParams.stack([d.params[i] for d in (self, others) for i in range(len(d))])
        return Driving(both, torch.cat([self.crops, others.crops]), self.fps, None, temporal=False)


def with_identity_of(portrait: Portrait, driver: HeadParams) -> HeadParams:
    """Give the driver's motion the portrait's shape: the driver's own would leak its identity (docs/CONVENTIONS.md)."""
    batch, offset = driver.batch, portrait.params.static_offset
    return replace(
        driver,
        shape=portrait.params.shape.expand(*batch, -1),
        static_offset=None if offset is None else offset.expand(*batch, -1, -1),
    )


def still_head(params: HeadParams) -> HeadParams:
    """Fix the head pose, as the avatar's training clip wants it (S-A.1): only expressions and cameras vary."""
    return replace(
        params, **{k: torch.zeros_like(getattr(params, k)) for k in ("rotation", "neck_pose", "translation")}
    )


def driving_crop(
    image: Float[Tensor, "3 height width"], head: Head, params: HeadParams, camera: Camera, size: int
) -> Float[Tensor, "3 size size"]:
    """Cut the face by the landmarks of the tracked head at zero expression: the cut does not tell the expression."""
    points = head.landmarks68.on(head.pose(params.without_expression()).vertices, head.faces)
    return crop_image(image, face_crop_box(camera.project(points)[0]), size)


def resized_frame(frame: ClipFrame, size: int) -> ClipFrame:
    """Resample a square frame to `size`²; one of that size already is returned as it is.

    Raises:
        UserError: the frame is not square.
    """
    if frame.camera.width == size and frame.camera.height == size:
        return frame
    if frame.camera.width != frame.camera.height:
        raise UserError(
            f"frames must be square crops, got {frame.camera.width}×{frame.camera.height}: "
            "run `geodiff4d track` on the source"
        )

    def resample(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(
            x[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]

    normal = None if frame.normal is None else torch.nn.functional.normalize(resample(frame.normal), dim=0, eps=1e-3)
    return replace(
        frame,
        image=resample(frame.image),
        mask=resample(frame.mask),
        normal=normal,
        camera=frame.camera.resized(size, size),
    )


def load_portrait(clip: Clip, size: int) -> Portrait:
    """Take a clip's first frame as the portrait, `size` pixels wide; of several portraits, all of them.

    Raises:
        UserError: a frame has no head parameters, or is not square.
    """
    count = len(clip) if clip.extra.get("portraits") else 1
    first, *others = (_portrait(clip, k, size) for k in range(count))
    return replace(first, others=tuple(others))


def _portrait(clip: Clip, index: int, size: int) -> Portrait:
    frame = resized_frame(clip.frame(index), size)
    if frame.params is None:
        raise UserError(f"{clip.folder} has no head parameters: run `geodiff4d track` on the image first")
    # Only a detector's normals are taken: those of a rendered clip are the truth, which no portrait has.
    normal = frame.normal if clip.extra.get("normals") == "detector" else None
    return Portrait(frame.image, frame.mask, frame.camera, frame.params, normal)


def load_driving(
    clip: Clip, head: Head, crop: int, limit: int | None = None, progress: Progress = silent, skip: int = 0
) -> Driving:
    """Read a clip's motion and cut its driving crops, `crop` pixels wide, from the first camera of every timestep.

    Takes at most `limit` timesteps, after the first `skip`.

    Raises:
        UserError: the clip has no frames with head parameters, none after the first `skip`, or none that shows a face.
    """
    first = {}
    for i, record in enumerate(clip.records):
        if record.params_path is not None:
            first.setdefault(record.timestep, i)
    if not first:
        raise UserError(f"{clip.folder} has no frames with head parameters: run `geodiff4d track` on the video first")
    if skip >= len(first):
        raise UserError(f"{clip.folder} has {len(first)} frames: expected more than the {skip} that are left out")
    chosen = [first[t] for t in sorted(first)][skip:][:limit]
    unread = tuple(k for k, i in enumerate(chosen) if clip.records[i].unread)
    read = [k for k in range(len(chosen)) if k not in unread]
    if not read:
        raise UserError(f"{clip.folder} shows no face in its {len(chosen)} frames: take other frames, or another film")
    params, cameras = [], []
    crops: dict[int, Tensor] = {}
    for k, i in enumerate(progress(chosen, "driver")):
        if k in unread:
            params.append(clip.params(clip.records[i].timestep))
            cameras.append(clip.records[i].camera)
            continue
        frame = clip.frame(i)
        assert frame.params is not None
        params.append(frame.params)
        cameras.append(frame.camera)
        crops[k] = driving_crop(composite(frame.image, frame.mask), head, frame.params, frame.camera, crop)
    nearest = [min(read, key=lambda r, k=k: abs(r - k)) for k in range(len(chosen))]
    one = all(_same(c, cameras[0]) for c in cameras)
    images = torch.stack([crops[k] for k in nearest])
    return Driving(HeadParams.stack(params), images, clip.fps, cameras[0] if one else None, unread=unread)


def _same(a: Camera, b: Camera) -> bool:
    return (a.width, a.height) == (b.width, b.height) and bool(
        torch.equal(a.K, b.K) and torch.equal(a.T_cam_world, b.T_cam_world)
    )
