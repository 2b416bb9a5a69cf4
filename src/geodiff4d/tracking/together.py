"""Several photographs of one person: one identity for all, with each its own camera, pose and expression (ours).

Each is located by itself first, which gives its focal length. Seen from where its camera stands, a photograph of
another focal length or size is only enlarged and moved: brought to the first one's camera, all are frames of one fit,
and nothing is smoothed over them. Somebody else's photograph shows in what it costs to share an identity.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.digest import sha256_of
from geodiff4d.core.images import read_image, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.heads.rig import Head, PosedHead
from geodiff4d.render.crops import canonical_crop_box, crop_image
from geodiff4d.tracking.choose import chosen_frames
from geodiff4d.tracking.detect import Detection, Detector
from geodiff4d.tracking.fit import HeadFit, fit
from geodiff4d.tracking.problem import HeadFitConfig
from geodiff4d.tracking.source import frame_count, frames_of, is_video
from geodiff4d.tracking.track import Located, TrackingConfig, cut_frames, default_detector, locate, notes, overlay

STRANGE_SHAPE, STRANGE_ERROR = 1.9, 1.06
"""A photograph is of somebody else where its own identity is this far from the first one's [standard deviations, over
all coefficients], and landmarks meet a common identity this many times worse."""
AT_REST = 0.5
"""Expression (root of the sum of its squared coefficients) at which landmarks are doubted twice as much."""
VIDEO_FRAMES = 240
"""Of a longer video only every second, third … frame is looked at."""


@dataclass(frozen=True)
class Photo:
    """One photograph, or frame of a video, with what was found in it alone."""

    name: str
    image: Float[Tensor, "3 height width"]
    located: Located
    """Of one frame."""

    @property
    def detection(self) -> Detection:
        [found] = self.located.detections
        assert found is not None
        return found


def photo(
    source: Path, image: Float[Tensor, "3 height width"], head: Head, detector: Detector, config: TrackingConfig,
    progress: Progress = silent,
) -> Photo:  # fmt: skip
    """Locate the face of one photograph.

    Raises:
        UserError: it shows none.
    """
    located = locate(lambda: [image], head, detector, config, False, progress, source)
    return Photo(source.name, image, located)


def fit_together(
    head: Head, photos: Sequence[Photo], size: int, config: HeadFitConfig = HeadFitConfig()
) -> list[Photo]:  # fmt: skip
    """Fit one identity to photographs of one person; returns them located anew, in crops of `size` pixels.

    A laugh bends the shape that is fitted to it. So the identity is fitted first, where a photograph's landmarks are
    doubted the more the face moves in it, and then kept while each photograph gets its pose and expression. Cameras are
    each photograph's own; what the fit says of the head's place is in them, so that `translation` is zero.
    """
    shape = None
    if len(photos) > 1 and all(p.detection.sigma is not None for p in photos):
        shape = _common_fit(head, photos, config, identity_doubt(photos)).params.shape[0]
    together = _common_fit(head, photos, config, shape=shape)
    return [_relocated(head, p, together, k, size) for k, p in enumerate(photos)]


def identity_doubt(photos: Sequence[Photo]) -> Float[Tensor, " photos"]:
    """Return by how much each photograph's landmarks are doubted when the identity is fitted, 1 for the one most at
    rest."""
    moved = torch.stack([p.located.fit.params.expr[0].clamp(0, 1).square().sum() for p in photos])
    doubt = 1 + moved / AT_REST**2
    return doubt / doubt.min()


def _common_fit(
    head: Head, photos: Sequence[Photo], config: HeadFitConfig, doubt: Float[Tensor, " photos"] | None = None,
    shape: Float[Tensor, " shapes"] | None = None,
) -> HeadFit:  # fmt: skip
    """Fit photographs before the first one's camera: landmarks' σ times `doubt`, and to a `shape` if it is given."""
    first = photos[0].located.fit.camera
    seen = [_before(p, first) for p in photos]
    if doubt is not None:
        seen = [d if d.sigma is None else replace(d, sigma=d.sigma * s) for d, s in zip(seen, doubt, strict=True)]
    still = replace(config, consecutive=False)
    return fit(head, seen, first.width, first.height, float(first.K[0, 0]), still, shape=shape)


def _enlargement(photo: Photo, camera: Camera) -> float:
    return float(camera.K[0, 0] / photo.located.fit.camera.K[0, 0])


def _before(photo: Photo, camera: Camera) -> Detection:
    """Return what was detected in a photograph as another camera in its place would see it."""
    d, scale, own = photo.detection, _enlargement(photo, camera), photo.located.fit.camera
    offset = camera.K[:2, 2] - scale * own.K[:2, 2]
    square = d.square
    if square is not None:
        x, y = (torch.tensor([square.x, square.y]) * scale + offset).tolist()
        square = replace(square, x=x, y=y, side=square.side * scale)
    return replace(
        d, points=d.points * scale + offset, sigma=None if d.sigma is None else d.sigma * scale, square=square
    )


def _relocated(head: Head, photo: Photo, together: HeadFit, k: int, size: int) -> Photo:
    own, scale = photo.located.fit, _enlargement(photo, together.camera)
    params = together.params[k : k + 1]
    T = together.camera.T_cam_world.clone()
    T[:3, 3] += T[:3, :3] @ params.translation[0]
    params = replace(params, translation=torch.zeros_like(params.translation))
    camera = replace(own.camera, T_cam_world=T)
    fitted = HeadFit(params, camera, together.error_px[k : k + 1] / scale, own.seen, own.face_px)
    mesh: PosedHead = head.pose(params)
    box = canonical_crop_box(camera, mesh.vertices[:, photo.located.region])
    located = replace(
        photo.located, fit=fitted, mesh=mesh, box=box, camera=camera.cropped(*box, size)
    )  # fmt: skip
    return replace(photo, located=located)


def strangers(head: Head, photos: Sequence[Photo], config: HeadFitConfig = HeadFitConfig()) -> list[int]:
    """Return which of the photographs after the first show somebody else, as far as their landmarks tell."""
    first, found = photos[0], []
    for k, other in enumerate(photos[1:], 1):
        alone = [p.located.fit for p in (first, other)]
        apart = float((alone[0].params.shape[0] - alone[1].params.shape[0]).norm())
        if apart < STRANGE_SHAPE:
            continue
        shared = _common_fit(head, [first, other], config).error_px
        scale = torch.tensor([1.0, _enlargement(other, alone[0].camera)])
        worse = max(float(b / (a.error_px[0] * s)) for a, b, s in zip(alone, shared, scale, strict=True))
        if worse > STRANGE_ERROR:
            found.append(k)
    return found


def video_photos(
    source: Path, head: Head, detector: Detector, config: TrackingConfig, progress: Progress = silent
) -> list[Photo]:
    """Choose frames of a video of one person (`choose.py`); the first is the most frontal.

    Raises:
        UserError: no frame shows a face.
    """
    step = -(-(frame_count(source) or 1) // VIDEO_FRAMES)

    def frames() -> Iterator[Tensor]:
        return islice(frames_of(source, None), 0, None, step)

    watched = replace(config, fit=replace(config.fit, consecutive=step == 1))
    located = locate(frames, head, detector, watched, True, progress, source)
    first, last = located.span or (0, len(located.detections))
    box = located.box
    sharp = torch.tensor([_sharpness(crop_image(f, box, 128)) for f in islice(frames(), first, last)])
    sharp[[*located.lost, *located.doubtful]] = -1.0
    taken = chosen_frames(head, located.fit.params, located.fit.camera, sharp).tolist()
    images = {k: f for k, f in enumerate(islice(frames(), first, last)) if k in taken}
    return [
        Photo(f"{source.name}, frame {(first + k) * step}", images[k], _at(located, head, k)) for k in taken
    ]  # fmt: skip


def _sharpness(face: Float[Tensor, "3 side side"]) -> float:
    """Return the share of contrast that lies between neighbouring pixels."""
    grey = face.mean(0)
    fine = (grey[1:, :] - grey[:-1, :]).square().mean() + (grey[:, 1:] - grey[:, :-1]).square().mean()
    return float(fine / grey.var().clamp(min=1e-6))


def _at(located: Located, head: Head, k: int) -> Located:
    """Return what was located in one frame of a video."""
    f = located.fit
    one = HeadFit(f.params[k : k + 1], f.camera, f.error_px[k : k + 1], f.seen[k : k + 1], f.face_px)
    return replace(
        located, detections=located.detections[k : k + 1], fit=one, mesh=head.pose(one.params), shots=[], span=None
    )


def track_together(
    sources: Sequence[Path], out: Path, head: Head, detector: Detector | None = None,
    config: TrackingConfig = TrackingConfig(), progress: Progress = silent,
) -> Clip:  # fmt: skip
    """Track images and videos of one person and write a clip with a timestep, and a camera, for each portrait.

    The first is the reference: the first image, or the most frontal frame of a video that is given first. Images of
    somebody else are left out, and the clip's notes say so.

    Raises:
        UserError: a source cannot be read or shows no face.
    """
    detector, photos = detector or default_detector(), []
    for source in map(Path, sources):
        if is_video(source):
            photos += video_photos(source, head, detector, config, progress)
        else:
            photos.append(photo(source, read_image(source), head, detector, config, progress))
    return write_portraits(out, head, photos, config, [sha256_of(Path(source)) for source in sources])


def write_portraits(
    out: Path, head: Head, photos: Sequence[Photo], config: TrackingConfig = TrackingConfig(),
    digests: Sequence[str] = (),
) -> Clip:  # fmt: skip
    """Fit one identity to photographs and write their clip, without those of somebody else (`track_together`).

    Args:
        digests: SHA-256 of the files that they come from, for the clip's notes.
    """
    strange = strangers(head, photos, config.fit)
    said = [note for p in photos for note in notes(Path(p.name), p.located)]
    said += [
        f"{photos[k].name} shows another person than {photos[0].name}, by its landmarks: it was left out"
        for k in strange
    ]
    photos = [p for k, p in enumerate(photos) if k not in strange]
    photos = fit_together(head, photos, config.size, config.fit)
    first = photos[0].located
    extra = {
        "source": photos[0].name, "source_sha256": list(digests), "portraits": [p.name for p in photos],
        "crop": list(first.box),
        "source_size": [first.fit.camera.width, first.fit.camera.height], "focal_source": first.focal_source,
        "notes": said, "normals": None if photos[0].detection.normal is None else "detector",
        "errors_px_at_256": [round(p.located.fit.error * 256 / p.located.box[2], 3) for p in photos],
    }  # fmt: skip
    with ClipWriter(out, head.name, 24.0, extra) as writer:
        looks = []
        for t, p in enumerate(photos):
            [cut] = cut_frames(lambda p=p: [p.image], p.located, config.size)
            writer.add_params(t, p.located.fit.params[0])
            writer.add(t, 0, cut.image, p.located.camera, cut.mask, cut.normal)
            if t == 0:
                writer.set_reference(cut.image, cut.normal)
            looks.append(overlay(cut, p.located, 0))
        write_image(writer.path / "overlay.png", torch.cat(looks, -2))
    return Clip(out)
