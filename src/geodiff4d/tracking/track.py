"""From a photograph or a video to a clip: detect, fit, crop, matte, write.

The clip has one camera, the canonical crop of every frame, a foreground mask, normals if the detector estimates them,
and FLAME-named parameters. Its `extra` has the fit's residuals, and overlay.png or overlay.mp4 shows the tracked head
over the images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.digest import sha256_of
from geodiff4d.core.errors import UserError
from geodiff4d.core.films import cut_short, described
from geodiff4d.core.images import encode_normals, read_image, to_uint8, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.sandbox import decode
from geodiff4d.core.video import write_video
from geodiff4d.core.workers import in_threads
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.heads.rig import Head, HeadParams, PosedHead
from geodiff4d.render.crops import canonical_crop_box, crop_image, head_region
from geodiff4d.render.meshes import Fragments, interpolate, rasterize, render_normals
from geodiff4d.tracking.corrections import anchors, corrected, read_points
from geodiff4d.tracking.detect import Box, Detection, Detector
from geodiff4d.tracking.fit import HeadFit, fit
from geodiff4d.tracking.matte import matte, smooth_over_time
from geodiff4d.tracking.matting_file import MattingFile
from geodiff4d.tracking.person import person_in, shipped_person_net
from geodiff4d.tracking.problem import HeadFitConfig
from geodiff4d.tracking.shots import Shots, longest
from geodiff4d.tracking.source import first_size, focal_length, frame_rate, frames_of, is_video

DOUBTFUL, DOUBTFUL_FACE = 3.0, 0.06
"""A frame is doubtful where the fit is off by this many times the film's median, and this share of the face's side."""

FrameStream = Callable[[], Iterable[Tensor]]
"""Returns the frames from the start, RGB in [0, 1]; it is called more than once."""


@dataclass(frozen=True)
class TrackingConfig:
    """How a source is tracked."""

    size: int = 256
    """Side of the canonical crop [px]."""
    limit: int | None = None
    """Largest number of frames of a video that are tracked."""
    skip: int = 0
    """Number of frames at a video's start that are left out."""
    focal_px: float | None = None
    """Focal length of the uncut images; by default from the photograph's EXIF, else assumed from the head's size."""
    mask: Path | None = None
    """An image's foreground (white) in an image of the same size, where the user knows better than the detector."""
    matting: Path | None = None
    """A matting network of the user's (`matting_file.py`), in place of the one that ships."""
    points: Path | None = None
    """Where named points of an image's face are, where the user knows better (`corrections.read_points`)."""
    fit: HeadFitConfig = field(default_factory=HeadFitConfig)
    """Weights of the fit to the landmarks."""

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 4096:
            raise UserError(f"the crop's size must be 16 to 4096 pixels, got {self.size}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"the limit must be at least one frame, got {self.limit}")
        if self.skip < 0:
            raise UserError(f"frames to leave out must not be negative, got {self.skip}")
        if self.focal_px is not None and not self.focal_px > 0:
            raise UserError(f"the focal length must be positive, got {self.focal_px}")


@dataclass(frozen=True)
class Located:
    """The head's detections, fit, mesh and crop in all frames."""

    detections: list[Detection | None]
    fit: HeadFit
    mesh: PosedHead
    box: Box
    """The canonical crop, in pixels of the uncut frames."""
    camera: Camera
    """Camera of the crop, the same in all frames."""
    region: Bool[Tensor, " verts"]
    """The head without neck and shoulders (`render.crops.head_region`)."""
    focal_source: str
    """Where the focal length is from: `given`, `exif (… mm)` or `assumed`."""
    shots: list[tuple[int, int]] = field(default_factory=list)
    """First and last frame of every shot of a film, the last not included."""
    span: tuple[int, int] | None = None
    """The shot that everything above is of; None: all frames."""

    @property
    def lost(self) -> list[int]:
        """Return the frames in which no face was seen, whose head is interpolated."""
        return [t for t, d in enumerate(self.detections) if d is None]

    @property
    def doubtful(self) -> list[int]:
        """Return the frames whose landmarks the head does not meet: something else was taken for the face."""
        error = self.fit.error_px
        most = max(DOUBTFUL * float(error[self.fit.seen].median()), DOUBTFUL_FACE * self.fit.face_px)
        return [t for t in range(len(error)) if bool(self.fit.seen[t]) and float(error[t]) > most]


@dataclass(frozen=True)
class Tracked:
    """A tracked image or video in memory."""

    images: Float[Tensor, "frames 3 size size"]
    """Canonical crops."""
    masks: Float[Tensor, "frames 1 size size"]
    """Foreground, 0 to 1."""
    normals: Float[Tensor, "frames 3 size size"] | None
    """Camera-space unit normals, zero on the background; None if the detector estimates none."""
    camera: Camera
    params: HeadParams
    located: Located


@dataclass(frozen=True)
class Cut:
    """One tracked frame: the crop, its foreground and its normals."""

    image: Float[Tensor, "3 size size"]
    mask: Float[Tensor, "1 size size"]
    normal: Float[Tensor, "3 size size"] | None
    fragments: Fragments | None = None
    """Where the tracked head is in it, if that is known."""


def track_frames(
    images: Sequence[Float[Tensor, "3 _height _width"]], head: Head, detector: Detector | None = None,
    config: TrackingConfig = TrackingConfig(), video: bool = True, progress: Progress = silent,
) -> Tracked:  # fmt: skip
    """Track images that are in memory; `video` says that they are consecutive frames of one person.

    Raises:
        UserError: no image shows a face.

    Example:
        >>> tracked = track_frames([portrait], load_head("openhead"), video=False)  # doctest: +SKIP
        >>> tracked.params.rotation.shape  # doctest: +SKIP
        torch.Size([1, 3])
    """
    located = locate(lambda: images, head, detector or default_detector(), config, video, progress)
    first, last = located.span or (0, len(images))
    cuts = list(
        cut_frames(lambda: progress(images[first:last], "matting"), located, config.size, matting=_matting(config))
    )
    normals = [c.normal for c in cuts]
    blank = torch.zeros(3, config.size, config.size)
    return Tracked(
        torch.stack([c.image for c in cuts]), torch.stack([c.mask for c in cuts]),
        None if all(n is None for n in normals) else torch.stack([blank if n is None else n for n in normals]),
        located.camera, located.fit.params, located,
    )  # fmt: skip


def track(
    source: Path, out: Path, head: Head, detector: Detector | None = None,
    config: TrackingConfig = TrackingConfig(), progress: Progress = silent,
) -> Clip:  # fmt: skip
    """Track one image or video and write a clip folder.

    The detector is `default_detector()` unless one is given.

    Raises:
        UserError: the source cannot be read, shows no face, or the detector is not installed. Nothing is written then.

    Example:
        >>> clip = track(Path("me.jpg"), Path("runs/me"), head)  # doctest: +SKIP
    """
    source, video = Path(source), is_video(source)

    def frames() -> Iterator[Tensor]:
        return frames_of(source, config.limit, config.skip)

    width, height = first_size(frames())
    mask = None if config.mask is None else _given_mask(config.mask, source, video, (height, width))
    located = locate(frames, head, detector or default_detector(), config, video, progress, source)
    result, camera, count = located.fit, located.camera, len(located.detections)
    first, last = located.span or (0, count)
    unread = {*located.lost, *located.doubtful}
    scale = 256 / located.box[2]
    read = located.shots[-1][1] if located.shots else count
    whole = video and (config.limit is None or read < config.limit)
    short = decode(cut_short, source, config.skip + read) if whole else None
    extra = {
        "source": source.name, "source_sha256": [sha256_of(source)], "source_size": [width, height],
        "crop": list(located.box),
        "focal_source": located.focal_source, "focal_px": float(result.camera.K[0, 0]),
        "notes": (decode(described, source) if video else []) + notes(source, located) + ([short] if short else []),
        "shots": located.shots, "first_frame": config.skip + first, "lost_frames": located.lost,
        "doubtful_frames": located.doubtful,
        "normals": "detector" if any(d is not None and d.normal is not None for d in located.detections) else None,
        "error_px_at_256": result.error * scale,
        "errors_px_at_256": [None if e != e else round(e * scale, 3) for e in result.error_px.tolist()],
    }  # fmt: skip
    if not video and located.detections[0] is not None:
        extra["points"] = anchors(located.detections[0])
    fps = frame_rate(source) if video else 24.0
    # Compressing images takes a quarter of the time: another thread does it, one for the order's sake.
    with ClipWriter(out, head.name, fps, extra) as writer, ThreadPoolExecutor(1) as pool:
        pending: list[Future[None]] = []

        def recorded() -> Iterator[tuple[int, Cut]]:
            """Write frame by frame, and hand each on."""
            shot = lambda: islice(frames(), first, last)  # noqa: E731
            cuts = cut_frames(lambda: progress(shot(), "matting", count), located, config.size, mask, _matting(config))
            for t, cut in enumerate(cuts):
                writer.add_params(t, result.params[t])
                if t in unread:
                    writer.mark_unread(t)
                pending.append(pool.submit(writer.add, t, 0, cut.image, camera, cut.mask, cut.normal))
                if t == 0:
                    writer.set_reference(cut.image, cut.normal)
                if len(pending) > 8:
                    pending.pop(0).result()
                yield t, cut
            for each in pending:
                each.result()

        looks = in_threads(lambda each: overlay(each[1], located, each[0]), recorded())
        if video:
            write_video(writer.path / "overlay.mp4", looks, writer.fps, "veryfast")
        else:
            [look] = looks
            write_image(writer.path / "overlay.png", look)
    return Clip(out)


def default_detector() -> Detector:
    """Return the embedded detector if this installation has its network, else MediaPipe."""
    from geodiff4d.tracking.detect import MediaPipeDetector
    from geodiff4d.tracking.embedded import EmbeddedDetector
    from geodiff4d.tracking.network import SHIPPED

    return EmbeddedDetector() if SHIPPED.exists() else MediaPipeDetector()


def locate(
    frames: FrameStream, head: Head, detector: Detector, config: TrackingConfig, video: bool,
    progress: Progress = silent, source: Path | None = None,
) -> Located:  # fmt: skip
    """Detect the face in all frames and fit the head to them.

    Raises:
        UserError: no frame shows a face.
    """
    width, height = first_size(iter(frames()))
    focal_px, focal_source = focal_length(source, width, height, config.focal_px)
    seen = Shots()
    detections = detector.detect(seen.watched(progress(frames(), "detecting")), video=video)
    shots, span = (seen.spans() if video else []), None
    if len(shots) > 1:
        span = longest(shots, detections)
        # What was followed into a shot out of the one before may be somebody else's face.
        detections = detector.detect(islice(frames(), *span), video=True)
    if not any(detections):
        raise UserError(
            f"{source or 'the images'} shows no face: expected one face, seen from the front or up to 60° from it; "
            "try an image where it is larger, brighter or upright"
        )
    if config.points is not None:
        if video:
            raise UserError(f"points are of one image, and {source} is a video: leave --points out")
        told = read_points(config.points, width, height)
        detections = [None if d is None else corrected(d, told) for d in detections]
    shot = lambda: islice(frames(), *(span or (None,)))  # noqa: E731
    result = fit(head, detections, width, height, focal_px, config.fit, shot if video else None)
    mesh = head.pose(result.params)
    region = head_region(head)
    box = canonical_crop_box(result.camera, mesh.vertices[:, region])
    crop = result.camera.cropped(*box, config.size)
    return Located(detections, result, mesh, box, crop, region, focal_source, shots, span)


def _matting(config: TrackingConfig) -> MattingFile | None:
    return None if config.matting is None else MattingFile(config.matting)


def _given_mask(path: Path, source: Path, video: bool, size: tuple[int, int]) -> Float[Tensor, "1 height width"]:
    if video:
        raise UserError(f"a mask is of one image, and {source} is a video: leave --mask out")
    mask = read_image(path, "L")
    if tuple(mask.shape[1:]) != size:
        raise UserError(
            f"{path} has {mask.shape[2]}×{mask.shape[1]} pixels: expected {size[1]}×{size[0]}, as {source} has"
        )
    if not 0.001 < float(mask.mean()) < 0.999:
        raise UserError(f"{path} is all of one colour: expected the person in white on black")
    return mask


def cut_frames(
    frames: FrameStream, located: Located, size: int, mask: Float[Tensor, "1 _height _width"] | None = None,
    matting: MattingFile | None = None,
) -> Iterator[Cut]:  # fmt: skip
    """Yield every frame's crop with its foreground, smoothed over time, and its normals.

    `mask` is the user's own foreground, `matting` their own network.
    """

    def seen(item: tuple[Tensor, Detection | None, Tensor]) -> Cut:
        image, detection, vertices = item
        crop = crop_image(image, located.box, size, fill=0.5)
        fragments = rasterize(vertices, located.mesh.faces, located.camera)
        if mask is not None:
            return Cut(crop, crop_image(mask, located.box, size, fill=0.0).clamp(0, 1), None, fragments)
        # A body goes on below an image, but what is shown there is grey.
        shown = crop_image(torch.ones_like(image[:1]), located.box, size, fill=0.0).clamp(0, 1)
        whole = crop_image(image, located.box, size).clamp(0, 1) if shown.min() < 1 else crop
        told = _matte(whole, detection, image.shape[2], fragments, located, matting)
        return Cut(crop, told * shown, None, fragments)

    work = zip(frames(), located.detections, located.mesh.vertices, strict=True)
    cuts = in_threads(seen, work)
    before, now = None, next(cuts)
    for t in range(len(located.detections)):
        after = next(cuts, None)
        around = [cut.mask for cut in (before or now, now, after or now)]
        mask_now = smooth_over_time(torch.stack(around))[1] if len(located.detections) > 2 else now.mask
        yield replace(now, mask=mask_now, normal=_normal(located.detections[t], mask_now, located.box))
        if after is not None:
            before, now = now, after


def notes(source: Path, located: Located) -> list[str]:
    """Return notes for the user: cuts, several faces in one image, frames without a face or with a doubtful one."""
    out, detections = [], located.detections
    if located.span is not None:
        first, last = located.span
        cuts = _listed([a for a, _ in located.shots[1:]])
        out.append(
            f"{source.name} has {len(located.shots)} shots (cuts before frames {cuts}): the longest that shows a face, "
            f"frames {first} to {last - 1}, was tracked; cut the film to track another"
        )
    most = max(d.faces for d in detections if d is not None)
    if most > 1:
        out.append(f"{source.name} shows {most} faces: the largest was taken; crop the image to another to choose it")
    if located.lost:
        out.append(
            f"no face in {len(located.lost)} of {len(detections)} frames ({_listed(located.lost)}): their head is "
            "interpolated, and marked red in the overlay; they are neither trained on nor read for expressions"
        )
    if located.doubtful:
        out.append(
            f"a doubtful face in {len(located.doubtful)} of {len(detections)} frames ({_listed(located.doubtful)}): "
            "the head does not meet it; they are neither trained on nor read for expressions"
        )
    return out


def _listed(frames: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, frames[:most])) + (" …" if len(frames) > most else "")


def _matte(
    crop: Tensor, detection: Detection | None, width: int, fragments: Fragments, located: Located,
    matting: MattingFile | None,
) -> Tensor:  # fmt: skip
    person, coarse = None, True
    if detection is not None and detection.mask is not None:
        # MediaPipe's is of the whole image, by a network for that; ours takes the place of the looker's.
        coarse = detection.extent is not None
        person = _spanned(detection.mask, detection.extent, width, located.box, len(crop[0])).clamp(0, 1)
    part = interpolate(fragments, located.mesh.faces, located.region.float()[:, None])[0] > 0.5
    if matting is not None:
        return matte(crop, matting(crop, part), fragments.mask, part, exact=True)
    if coarse and (net := shipped_person_net()) is not None:
        person = person_in(crop, fragments.mask, part, net, twice=len(located.detections) == 1)
    return matte(crop, person, fragments.mask, part)


def _normal(detection: Detection | None, mask: Tensor, box: Box) -> Tensor | None:
    """Return the detector's normals in the crop, unit inside the mask and zero outside."""
    if detection is None or detection.normal is None:
        return None
    out = _spanned(detection.normal, detection.extent, 0, box, mask.shape[-1])
    # Not torch's normalize: over a leading axis it is forty times slower.
    return out * (out.square().sum(0, keepdim=True) + 1e-8).rsqrt() * (mask > 0.5)


def _spanned(values: Tensor, extent: Box | None, width: int, box: Box, size: int) -> Tensor:
    """Return values that span `extent` (or the whole image of `width`), resampled to a crop."""
    left, top, side = extent or (0.0, 0.0, float(width))
    scale = values.shape[2] / side
    return crop_image(values.float(), ((box[0] - left) * scale, (box[1] - top) * scale, box[2] * scale), size, fill=0.0)


def overlay(cut: Cut, located: Located, t: int) -> Float[Tensor, "3 height width"]:
    """Return panels side by side: landmarks, the head's normals, the foreground on grey, the estimated normals."""
    from PIL import Image, ImageDraw

    camera, crop, detection = located.camera, cut.image, located.detections[t]
    normals, seen = render_normals(located.mesh[t], camera, cut.fragments)
    shaded = torch.where(seen > 0, 0.45 * crop + 0.55 * encode_normals(normals, seen), crop)
    image = Image.fromarray(to_uint8(crop))
    draw, scale = ImageDraw.Draw(image), camera.width / located.box[2]
    if detection is not None:
        for x, y in ((detection.points - torch.tensor(located.box[:2])) * scale).tolist():
            draw.point((x, y), fill=(60, 255, 60))
    else:
        draw.rectangle((0, 0, camera.width - 1, camera.width - 1), outline=(255, 0, 0), width=4)
    dotted = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    panels = [dotted, shaded, crop * cut.mask + 0.5 * (1 - cut.mask)]
    if cut.normal is not None:
        panels.append(encode_normals(cut.normal, cut.mask))
    elif any(d is not None and d.normal is not None for d in located.detections):
        panels.append(torch.full_like(crop, 0.5))
    return torch.cat(panels, -1)
