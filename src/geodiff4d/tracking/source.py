"""Photographs and videos as streams of frames, with their rate and focal length."""

from collections.abc import Iterator
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.films import about
from geodiff4d.core.images import read_image
from geodiff4d.core.sandbox import decode
from geodiff4d.core.stills import focal_length_mm, is_image
from geodiff4d.core.video import read_video

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FULL_FRAME_DIAGONAL_MM = 43.27


def is_video(source: Path) -> bool:
    """Return whether a file is a video and not an image: by its suffix, or by opening it.

    Raises:
        UserError: the source is missing or a directory.
    """
    if source.is_dir():
        raise UserError(f"{source} is a directory: expected one image (PNG, JPEG, WebP) or video (MP4, MOV, WebM)")
    if not source.exists():
        raise UserError(f"{source} does not exist: expected an image (PNG, JPEG, WebP) or video (MP4, MOV, WebM)")
    return source.suffix.lower() not in IMAGE_SUFFIXES and not decode(is_image, source)


def frames_of(source: Path, limit: int | None, skip: int = 0) -> Iterator[Float[Tensor, "3 height width"]]:
    """Yield a file's frames, RGB in [0, 1]: of a video at most `limit` after the first `skip`; an image is one."""
    if is_video(source):
        yield from read_video(source, limit, skip)
    else:
        yield read_image(source)


def first_size(frames: Iterator[Tensor]) -> tuple[int, int]:
    """Return (width, height) of the first frame."""
    for frame in frames:
        return frame.shape[2], frame.shape[1]
    raise UserError("the video has no frames: expected at least one")


def frame_rate(source: Path) -> float:
    """Return the frames per second of a video; 24 where the file states none, or not 0 to 1000."""
    return decode(about, source).rate


def frame_count(source: Path) -> int | None:
    """Return the number of frames that a video's header states; None where it states none."""
    return decode(about, source).count


def focal_length(source: Path | None, width: int, height: int, given_px: float | None) -> tuple[float | None, str]:
    """Return the focal length of the uncut image [px], or None, and its origin: given, exif or assumed.

    EXIF states the focal length of a full-frame camera (43.27 mm diagonal) with the same field of view; without it the
    fit assumes one (`fit.assumed_focal`).

    Raises:
        UserError: the given one is not 0.1 to 100 times the image's diagonal.
    """
    diagonal = (width**2 + height**2) ** 0.5
    if given_px is not None:
        if not 0.1 * diagonal <= given_px <= 100 * diagonal:
            raise UserError(
                f"the focal length is {given_px:g} px: expected {0.1 * diagonal:.0f} to {100 * diagonal:.0f} px for an "
                f"image of {width}×{height}; leave it out if you do not know it"
            )
        return given_px, "given"
    equivalent = None if source is None or is_video(source) else decode(focal_length_mm, source)
    if equivalent:
        return equivalent / FULL_FRAME_DIAGONAL_MM * diagonal, f"exif ({equivalent:g} mm)"
    return None, "assumed"
