"""Video files to arrays, through PyAV: frames as they are stored, and what the file says about showing them.

Without torch, which decoding needs not; `core.presentation` turns these frames into images.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from geodiff4d.core.errors import UserError
from geodiff4d.core.stills import MAX_PIXELS

PQ, HLG = 16, 18
"""Transfer functions of high dynamic range, as ITU-T H.273 numbers them (SMPTE ST 2084, ARIB STD-B67)."""
EVEN = 0.1
"""A frame counts as on time if it comes this near to a frame after the last [frames]."""
LONGEST_S = 5.0
"""A frame that would be shown longer than this [s] is shown once."""
WIDEST = 4
"""A pixel is at most so many times as wide as it is high, or the other way round: else the file is taken for wrong."""


CONTAINERS = {
    "format_whitelist": "mov,matroska,mpegts,avi,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,ogg,flv,asf,gif,webp,apng,mjpeg,"
    "mjpeg_2000,nut,mxf,dv,rm,yuv4mpegpipe"
}
"""What is opened, whatever a file's name is: FFmpeg also knows playlists, which read other files and addresses."""


@dataclass(frozen=True)
class Frame:
    """A decoded frame."""

    pixels: np.ndarray
    """[height, width, 3] RGB: 8 bits, or 16 where the transfer function is one of high dynamic range."""
    transfer: int
    """Transfer function (ITU-T H.273)."""
    turned: bool = False
    """Whether rows and columns change places, before the frame is mirrored left–right and up–down."""
    left: bool = False
    down: bool = False
    aspect: float = 1.0
    """Width of a pixel over its height."""


@dataclass(frozen=True)
class About:
    """What a video file's header states."""

    rate: float
    """Frames per second; 24 where none is stated, or one that is not 0 to 1000."""
    count: int | None
    """Number of frames, where stated."""


def open_video(path: Path) -> Any:
    """Open a video file with PyAV; title or author in another encoding than UTF-8 do not keep it from being read."""
    import av

    return av.open(str(path), options=CONTAINERS, metadata_errors="replace")


@contextmanager
def header_of(path: Path) -> Iterator[Any]:
    """Open a video to look at its beginning.

    Raises:
        UserError: it is none.
    """
    import av

    try:
        with open_video(path) as container:
            yield container
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded as video ({error}): expected MP4, MOV, WebM or similar") from None


def video_stream(container: Any, path: Path) -> Any:
    """Return a file's first video stream.

    Raises:
        UserError: it has none, or one in a format that cannot be decoded.
    """
    if not container.streams.video:
        raise UserError(f"{path} has no video stream: expected a video with at least one frame")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UserError(f"{path} cannot be decoded as video (unknown codec): expected MP4, MOV, WebM or similar")
    return stream


def about(path: Path) -> About:
    """Return what a video's header states.

    Raises:
        UserError: the file has no video that can be decoded.
    """
    with header_of(path) as container:
        stream = video_stream(container, path)
        rate = stream.average_rate
        return About(float(rate) if rate and 0 < rate <= 1000 else 24.0, stream.frames or None)


def decoded(frame: Any, path: Path, aspect: Fraction | None = None) -> Frame:
    """Return PyAV's frame as an array; `aspect` is what the stream says of its pixels, None or 0 if nothing.

    Raises:
        UserError: it is too large.
    """
    check_size(frame, path)
    wide = frame.color_trc in (PQ, HLG)
    pixels = frame.to_ndarray(format="rgb48le" if wide else "rgb24")
    return Frame(
        pixels, int(frame.color_trc), *orientation(frame), float(aspect) if aspect and unequal(aspect) else 1.0
    )


def read_frames(path: Path, limit: int | None = None, skip: int = 0) -> Iterator[tuple[Frame, int]]:
    """Stream a video's frames and for how many moments each is shown; at most `limit` moments after the first `skip`.

    Frames come at the video's mean rate: of one whose rate varies, each moment shows the frame that a player would.

    Raises:
        UserError: missing, a directory, not a video, too large or without frames. A file cut short yields the frames
            it has (`cut_short` tells).
    """
    import av

    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: expected a video file or a tracked clip (with transforms.json)")
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a video file")
    count = 0
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            check_size(stream, path)
            for frame, times in _in_time(container.decode(stream), stream):
                first, count = max(count, skip), count + times
                shown = (count if limit is None else min(count, skip + limit)) - first
                if shown > 0:
                    yield decoded(frame, path, stream.sample_aspect_ratio), shown
                if limit is not None and count >= skip + limit:
                    return
    except av.FFmpegError as error:
        if count == 0:
            raise UserError(
                f"{path} cannot be decoded as video ({error}): expected MP4, MOV, WebM or similar, or the file is "
                "incomplete: copy it again"
            ) from None
    if skip and count <= skip:
        raise UserError(f"{path} has {count} frames: expected more than the {skip} that are left out")
    if count == 0:
        raise UserError(f"{path} has no frames: expected a video with at least one frame")


def _in_time(frames: Iterable[Any], stream: Any) -> Iterator[tuple[Any, int]]:
    """Yield frames and how many moments each is shown, at the stream's mean rate.

    A moment shows the last frame that began before it ended. Frames without a time stamp are shown once, and so is one
    before a gap of seconds, which is damage. A mean rate is a little off where the last frame's duration is: frames
    that follow each other as they should are never doubled or left out for that.
    """
    rate = stream.average_rate
    moment, clock, last, waiting = 0, 0.0, None, None
    for frame in frames:
        if frame.pts is None or frame.time_base is None or not rate or not 0 < rate <= 1000:
            if waiting is not None:
                yield waiting, 1
                moment, clock = moment + 1, clock + 1
            waiting = frame
            continue
        step = 1.0 if last is None else float((frame.pts - last) * frame.time_base * rate)
        last = frame.pts
        if waiting is not None:
            if abs(step - 1) < EVEN or step > LONGEST_S * rate:
                step = 1.0
            clock += step
            times = max(round(clock) - moment, 0)
            if times:
                yield waiting, times
            moment += times
        waiting = frame
    if waiting is not None:
        yield waiting, 1


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Read a frame's display matrix: (rows and columns change places, then mirrored left–right, then up–down)."""
    data = next((bytes(d) for d in frame.side_data if d.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, np.int32, 9)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def described(path: Path) -> list[str]:
    """Say what is done to a film's frames beside decoding them."""
    with header_of(path) as container:
        stream = video_stream(container, path)
        frame = next(container.decode(stream), None)
        if frame is None:
            return []
        aspect = stream.sample_aspect_ratio
    out = []
    if frame.color_trc in (PQ, HLG):
        name = "PQ" if frame.color_trc == PQ else "HLG"
        out.append(f"{path.name} has high dynamic range ({name}): it was tone-mapped to sRGB, highlights compressed")
    if unequal(aspect):
        assert aspect is not None
        out.append(f"{path.name} has pixels of {aspect.numerator}:{aspect.denominator}: they were made square")
    return out


def cut_short(path: Path, count: int) -> str | None:
    """Say so if a video of which `count` frames could be read promises many more: an interrupted copy, or damage."""
    import av

    packets, end = 0, 0
    with open_video(path) as container:
        stream = video_stream(container, path)
        try:
            for packet in container.demux(stream):
                # An edit list leaves packets out; they are decoded, and shown to nobody.
                if packet.pts is not None and not packet.is_discard:
                    packets, end = packets + 1, max(end, packet.pts + (packet.duration or 0))
        except av.FFmpegError:
            pass  # what cannot be read is what is missing
        listed = max(packets, stream.frames)
        if not packets or stream.time_base is None:
            return None
        seconds = float((end - (stream.start_time or 0)) * stream.time_base)
        if stream.duration:
            whole = float(stream.duration * stream.time_base)
        else:
            whole = (container.duration or 0) / av.time_base
    if listed - count > max(3, 0.05 * listed):
        return _ends_after(path, count, listed)
    if seconds > 0 and whole - seconds > max(1, 0.05 * whole):
        return _ends_after(path, count, round(count * whole / seconds))
    return None


def _ends_after(path: Path, count: int, whole: int) -> str:
    return f"{path.name} ends after {count} of about {whole} frames: it may be cut short; copy it again"


def check_size(sized: Any, path: Path) -> None:
    """Refuse frames that are too large to decode.

    Raises:
        UserError: they are.
    """
    if sized.width * sized.height > MAX_PIXELS:
        raise UserError(
            f"{path} has frames of {sized.width}×{sized.height} pixels: at most {MAX_PIXELS:,} are read; "
            "downscale it first"
        )


def unequal(aspect: Fraction | None) -> bool:
    """Say whether pixels are longer one way than the other, by a ratio that can be meant."""
    return bool(aspect) and aspect != 1 and 1 / WIDEST <= aspect <= WIDEST  # pyright: ignore[reportOptionalOperand]
