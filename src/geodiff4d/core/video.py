"""Video in and out through PyAV (H.264 in MP4; the bundled x264 is GPL, named in the README)."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file
from geodiff4d.core.images import MAX_PIXELS, to_uint8


def read_video(path: Path, limit: int | None = None, skip: int = 0) -> Iterator[Float[Tensor, "3 height width"]]:
    """Stream a video's frames, upright, as float32 RGB in [0, 1]; at most `limit` of them, after the first `skip`.

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
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream: expected a video with at least one frame")
            _check_size(container.streams.video[0], path)
            for frame in container.decode(video=0):
                if limit is not None and count >= limit:
                    return
                count += 1
                if count > 0:
                    yield upright(frame, path)
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


def upright(frame: Any, path: Path) -> Float[Tensor, "3 height width"]:
    """Return PyAV's frame as float32 RGB in [0, 1], turned as its display matrix says (telephones write it).

    Raises:
        UserError: it is too large.
    """
    _check_size(frame, path)
    turns = round(frame.rotation / 90) % 4
    array = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _check_size(sized: Any, path: Path) -> None:
    if sized.width * sized.height > MAX_PIXELS:
        raise UserError(
            f"{path} has frames of {sized.width}×{sized.height} pixels: at most {MAX_PIXELS:,} are read; "
            "downscale it first"
        )


def cut_short(path: Path, count: int) -> str | None:
    """Say so if a video of which `count` frames could be read promises many more: an interrupted copy, or damage."""
    import av

    packets, end = 0, 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        try:
            for packet in container.demux(stream):
                if packet.pts is not None:
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
