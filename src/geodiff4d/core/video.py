"""Video in and out through PyAV (H.264 in MP4; the bundled x264 is GPL, named in the README)."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.files import fresh_file
from geodiff4d.core.films import read_frames
from geodiff4d.core.images import to_uint8
from geodiff4d.core.presentation import presented
from geodiff4d.core.sandbox import decode_stream


def read_video(path: Path, limit: int | None = None, skip: int = 0) -> Iterator[Float[Tensor, "3 height width"]]:
    """Stream a video's frames as they are meant to be seen (`presented`); at most `limit`, after the first `skip`.

    Frames come at the video's mean rate: of one whose rate varies, each moment shows the frame that a player would, so
    that a frame's number tells its time.

    Raises:
        UserError: missing, a directory, not a video, too large or without frames. A file cut short yields the frames
            it has (`films.cut_short` tells).
    """
    for frame, times in decode_stream(read_frames, Path(path), limit, skip):
        shown = presented(frame)
        for _ in range(times):
            yield shown


def write_video(
    path: Path, frames: Iterable[Float[Tensor, "3 height width"]], fps: float = 24.0, preset: str = "medium"
) -> None:  # fmt: skip
    """Write an MP4 (H.264, yuv420p, even size by edge padding); it appears whole or not at all.

    `preset` is x264's: `veryfast` takes half of the time where a video is only looked at.
    """
    import av

    with fresh_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17", "preset": preset}
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
