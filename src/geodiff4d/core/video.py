"""Video in and out through PyAV (H.264 in MP4; the bundled x264 is GPL, named in the README)."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file
from geodiff4d.core.images import to_uint8
from geodiff4d.core.presentation import check_size, open_video, presented, video_stream

EVEN = 0.1
"""A frame counts as on time if it comes this near to a frame after the last [frames]."""
LONGEST_S = 5.0
"""A frame that would be shown longer than this [s] is shown once."""


def read_video(path: Path, limit: int | None = None, skip: int = 0) -> Iterator[Float[Tensor, "3 height width"]]:
    """Stream a video's frames as they are meant to be seen (`presented`); at most `limit`, after the first `skip`.

    Frames come at the video's mean rate: of one whose rate varies, each moment shows the frame that a player would, so
    that a frame's number tells its time.

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
    count = -skip
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            check_size(stream, path)
            for frame, times in _in_time(container.decode(stream), stream):
                shown = None
                for _ in range(times):
                    if limit is not None and count >= limit:
                        return
                    count += 1
                    if count > 0:
                        shown = presented(frame, path, stream.sample_aspect_ratio) if shown is None else shown
                        yield shown
    except av.FFmpegError as error:
        if count == -skip:
            raise UserError(
                f"{path} cannot be decoded as video ({error}): expected MP4, MOV, WebM or similar, or the file is "
                "incomplete: copy it again"
            ) from None
    if skip and count <= 0:
        raise UserError(f"{path} has {count + skip} frames: expected more than the {skip} that are left out")
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


def write_video(path: Path, frames: Iterable[Float[Tensor, "3 height width"]], fps: float = 24.0) -> None:
    """Write an MP4 (H.264, yuv420p, even size by edge padding); it appears whole or not at all."""
    import av

    with fresh_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17"}
        for i, image in enumerate(frames):
            _, height, width = image.shape
            if height % 2 or width % 2:
                image = torch.nn.functional.pad(image[None], (0, width % 2, 0, height % 2), mode="replicate")[0]
            if i == 0:  # the codec opens with the first frame, and keeps that size
                stream.height, stream.width = image.shape[1:]
            for packet in stream.encode(av.VideoFrame.from_ndarray(to_uint8(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
