"""Video in and out through PyAV (H.264 in MP4; the bundled x264 is GPL, named in the README)."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file
from geodiff4d.core.images import to_uint8


def read_video(path: Path, limit: int | None = None) -> Iterator[Float[Tensor, "3 height width"]]:
    """Stream a video's frames as float32 RGB in [0, 1]; at most `limit` of them.

    Raises:
        UserError: missing, a directory, not a video or without frames. A file cut short yields the frames it has.
    """
    import av

    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: expected a video file or a tracked clip (with transforms.json)")
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a video file")
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream: expected a video with at least one frame")
            for frame in container.decode(video=0):
                if limit is not None and count >= limit:
                    return
                count += 1
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255
    except av.FFmpegError as error:
        if count == 0:
            raise UserError(
                f"{path} cannot be decoded as video ({error}): expected MP4, MOV, WebM or similar"
            ) from None
    if count == 0:
        raise UserError(f"{path} has no frames: expected a video with at least one frame")


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
