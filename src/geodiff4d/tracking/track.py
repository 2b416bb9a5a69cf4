"""From a photograph or a video to a clip: detect, fit, crop, matte, write.

The clip has one camera, the canonical crop of every frame, a foreground mask, and FLAME-named parameters; what the fit
left over stands in its `extra`, and overlay.png or overlay.mp4 shows the tracked head on the pictures.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import encode_normals, read_image, to_uint8, write_image
from geodiff4d.core.video import read_video, write_video
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.data.crops import canonical_crop_box, crop_image, head_region
from geodiff4d.heads.rig import Head, PosedHead
from geodiff4d.render.meshes import Fragments, interpolate, rasterize, render_normals
from geodiff4d.tracking.detect import Detection, Detector
from geodiff4d.tracking.fit import FitConfig, fit
from geodiff4d.tracking.matte import matte, smooth_over_time

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FULL_FRAME_DIAGONAL_MM = 43.27
Box = tuple[float, float, float]


@dataclass(frozen=True)
class TrackConfig:
    """How a source becomes a clip."""

    size: int = 256
    """Side of the canonical crop [px]."""
    limit: int | None = None
    """Read at most so many frames of a video."""
    focal_px: float | None = None
    """Focal length of the uncut images; by default from the photograph's EXIF, else assumed."""
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 4096:
            raise UserError(f"the crop's size must be 16 to 4096 pixels, got {self.size}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"the limit must be at least one frame, got {self.limit}")
        if self.focal_px is not None and not self.focal_px > 0:
            raise UserError(f"the focal length must be positive, got {self.focal_px}")


def unchanged(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """Show no progress."""
    return items


def track(
    source: Path, out: Path, head: Head, detector: Detector,
    config: TrackConfig = TrackConfig(), progress: Callable[..., Iterable[Any]] = unchanged,
) -> Clip:  # fmt: skip
    """Track one picture or video and write a clip folder.

    `progress(items, description, total)` passes items through (`cli.progress.track`).

    Raises:
        UserError: the source cannot be read, shows no face, or the detector is not installed. Nothing is written then.

    Example:
        >>> clip = track(Path("me.jpg"), Path("runs/me"), head, MediaPipeDetector())  # doctest: +SKIP
    """
    source, video = Path(source), is_video(source)
    width, height = _size(frames_of(source, config.limit))
    detections = detector.detect(progress(frames_of(source, config.limit), "reading"), video=video)
    if not any(detections):
        raise UserError(
            f"{source} shows no face: expected one face, seen from the front or up to 60° from it; "
            "try a picture where it is larger, brighter or upright"
        )
    focal_px, focal_source = focal_length(source, width, height, config)
    result = fit(head, detections, width, height, focal_px, config.fit)
    mesh = head.pose(result.params)
    region = head_region(head)
    box = canonical_crop_box(result.camera, mesh.vertices[:, region])
    camera = result.camera.cropped(*box, config.size)
    extra = {
        "source": source.name, "source_size": [width, height], "crop": list(box), "focal_source": focal_source,
        "focal_px": float(result.camera.K[0, 0]), "notes": notes(source, detections),
        "error_px_at_256": result.error * 256 / box[2],
        "errors_px_at_256": [None if e != e else round(e * 256 / box[2], 3) for e in result.error_px.tolist()],
    }  # fmt: skip
    with ClipWriter(out, head.name, frame_rate(source) if video else 24.0, extra) as writer:
        crops, masks = [], []
        work = zip(frames_of(source, config.limit), detections, mesh.vertices, strict=True)
        for image, detection, vertices in progress(work, "matting", len(detections)):
            crop = crop_image(image, box, config.size, fill=0.5)
            crops.append(crop)
            masks.append(
                _matte(
                    crop, detection, width, box, PosedHead(vertices, mesh.faces, mesh.T_world_joint[0]), camera, region
                )
            )
        masks = list(smooth_over_time(torch.stack(masks)))
        for t, (crop, mask) in enumerate(zip(crops, masks, strict=True)):
            writer.add_params(t, result.params[t])
            writer.add(t, 0, crop, camera, mask)
        writer.set_reference(crops[0])
        looks = (
            overlay(crop, mask, PosedHead(v, mesh.faces, mesh.T_world_joint[0]), camera, d, box)
            for crop, mask, v, d in zip(crops, masks, mesh.vertices, detections, strict=True)
        )
        if video:
            write_video(writer.path / "overlay.mp4", progress(looks, "drawing", len(crops)), writer.fps)
        else:
            write_image(writer.path / "overlay.png", next(looks))
    return Clip(out)


def is_video(source: Path) -> bool:
    """Tell a video from a picture by its name, and by looking inside where the name says nothing.

    Raises:
        UserError: the source is missing or a directory.
    """
    if source.is_dir():
        raise UserError(f"{source} is a directory: expected one picture (PNG, JPEG, WebP) or video (MP4, MOV, WebM)")
    if not source.exists():
        raise UserError(f"{source} does not exist: expected a picture (PNG, JPEG, WebP) or video (MP4, MOV, WebM)")
    if source.suffix.lower() in PICTURES:
        return False
    from PIL import Image

    try:
        with Image.open(source):
            return False
    except Exception:
        return True


def frames_of(source: Path, limit: int | None) -> Iterator[Float[Tensor, "3 height width"]]:
    """Stream a source's frames; a picture is one frame."""
    if is_video(source):
        yield from read_video(source, limit)
    else:
        yield read_image(source)


def _size(frames: Iterator[Tensor]) -> tuple[int, int]:
    for frame in frames:
        return frame.shape[2], frame.shape[1]
    raise UserError("the video has no frames: expected at least one")


def frame_rate(source: Path) -> float:
    """Frames per second of a video, 24 where it does not say."""
    import av

    with av.open(str(source)) as container:
        rate = container.streams.video[0].average_rate
    return float(rate) if rate else 24.0


def focal_length(source: Path, width: int, height: int, config: TrackConfig) -> tuple[float, str]:
    """Return the focal length of the uncut image [px], and where it is from: given, exif or assumed.

    EXIF states the focal length of a full-frame camera (43.27 mm diagonal) with the same field of view.
    """
    if config.focal_px is not None:
        return config.focal_px, "given"
    equivalent = _exif_focal_mm(source)
    if equivalent:
        return equivalent / FULL_FRAME_DIAGONAL_MM * (width**2 + height**2) ** 0.5, f"exif ({equivalent:g} mm)"
    return config.fit.focal_scale * max(width, height), f"assumed ({config.fit.focal_scale:g} × the longer side)"


def _exif_focal_mm(source: Path) -> float | None:
    if is_video(source):
        return None
    from PIL import ExifTags, Image

    try:
        with Image.open(source) as image:
            value = float(image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm, 0))
    except Exception:
        # Damaged EXIF is no reason to refuse a picture.
        return None
    return value if 5 < value < 2000 else None


def notes(source: Path, detections: list[Detection | None]) -> list[str]:
    """Say what a user should know of the detections."""
    out = []
    most = max(d.faces for d in detections if d is not None)
    if most > 1:
        out.append(f"{source.name} shows {most} faces: the largest was taken; crop the picture to another to choose it")
    missing = sum(d is None for d in detections)
    if missing:
        out.append(f"no face in {missing} of {len(detections)} frames: their head is interpolated")
    return out


def _matte(
    crop: Tensor,
    detection: Detection | None,
    width: int,
    box: Box,
    mesh: PosedHead,
    camera: Camera,
    region: Bool[Tensor, " verts"],
) -> Tensor:
    size = camera.width
    person = None
    if detection is not None and detection.mask is not None:
        scale = detection.mask.shape[2] / width
        person = crop_image(
            detection.mask.float(), (box[0] * scale, box[1] * scale, box[2] * scale), size, fill=0.0
        ).clamp(0, 1)
    fragments = rasterize(mesh.vertices, mesh.faces, camera)
    part = interpolate(fragments, mesh.faces, region.float()[:, None])[0] > 0.5
    return matte(crop, person, fragments.mask, part)


def overlay(
    crop: Float[Tensor, "3 size size"], mask: Float[Tensor, "1 size size"], mesh: PosedHead, camera: Camera,
    detection: Detection | None, box: Box,
) -> Float[Tensor, "3 height width"]:  # fmt: skip
    """Draw three panels: the picture with landmarks, the head's normals over it, and the foreground on grey."""
    from PIL import Image, ImageDraw

    fragments: Fragments = rasterize(mesh.vertices, mesh.faces, camera)
    normals, seen = render_normals(mesh, camera, fragments)
    shaded = torch.where(seen > 0, 0.45 * crop + 0.55 * encode_normals(normals, seen), crop)
    picture = Image.fromarray(to_uint8(crop))
    if detection is not None:
        draw, scale = ImageDraw.Draw(picture), camera.width / box[2]
        for x, y in ((detection.points - torch.tensor(box[:2])) * scale).tolist():
            draw.point((x, y), fill=(60, 255, 60))
    dotted = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return torch.cat([dotted, shaded, crop * mask + 0.5 * (1 - mask)], -1)
