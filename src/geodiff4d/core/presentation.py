"""Decoded frames as they are meant to be seen: upright, with square pixels, in standard dynamic range.

A file says beside its pixels how a player shows them: a display matrix that turns and mirrors (telephones), pixels that
are not square (DV, broadcasts), a transfer function of high dynamic range (HLG and PQ, telephones since 2020). Whoever
leaves that out sees an upside-down, squeezed or grey head, and no residual tells.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import MAX_PIXELS

PQ, HLG = 16, 18
"""Transfer functions of high dynamic range, as ITU-T H.273 numbers them (SMPTE ST 2084, ARIB STD-B67)."""
WHITE_NITS, HLG_PEAK_NITS = 203.0, 1000.0
"""Reference white (ITU-R BT.2408), which becomes sRGB's 1, and the display that HLG is shown on."""
KNEE = 0.8
"""Light above this share of reference white is compressed."""
REC2020_TO_SRGB = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))
WIDEST = 4
"""A pixel is at most so many times as wide as it is high, or the other way round: else the file is taken for wrong."""


def open_video(path: Path) -> Any:
    """Open a video file with PyAV; title or author in another encoding than UTF-8 do not keep it from being read."""
    import av

    return av.open(str(path), metadata_errors="replace")


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


def presented(frame: Any, path: Path, aspect: Fraction | None = None) -> Float[Tensor, "3 height width"]:
    """Return PyAV's frame as float32 sRGB in [0, 1].

    Args:
        aspect: width of a pixel over its height; None or 0 where the file does not say.

    Raises:
        UserError: it is too large.
    """
    check_size(frame, path)
    rgb = _tone_mapped(frame) if frame.color_trc in (PQ, HLG) else frame.to_ndarray(format="rgb24").astype(np.float32)
    image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
    image = image if frame.color_trc in (PQ, HLG) else image / 255
    image = _square(image, aspect)
    turned, left, down = orientation(frame)
    image = image.mT if turned else image
    mirrored = [axis for axis, flip in ((-1, left), (-2, down)) if flip]
    return (image.flip(mirrored) if mirrored else image).contiguous()


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
    with open_video(path) as container:
        stream = video_stream(container, path)
        frame = next(container.decode(stream), None)
        if frame is None:
            return []
        aspect = stream.sample_aspect_ratio
    out = []
    if frame.color_trc in (PQ, HLG):
        name = "PQ" if frame.color_trc == PQ else "HLG"
        out.append(f"{path.name} has high dynamic range ({name}): it was tone-mapped to sRGB, highlights compressed")
    if _unequal(aspect):
        assert aspect is not None
        out.append(f"{path.name} has pixels of {aspect.numerator}:{aspect.denominator}: they were made square")
    return out


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


def _unequal(aspect: Fraction | None) -> bool:
    return bool(aspect) and aspect != 1 and 1 / WIDEST <= aspect <= WIDEST  # pyright: ignore[reportOptionalOperand]


def _square(image: Float[Tensor, "3 h w"], aspect: Fraction | None) -> Tensor:
    """Stretch the axis along which pixels are too narrow, so that nothing is thrown away."""
    if not _unequal(aspect):
        return image
    assert aspect is not None
    height, width = image.shape[1:]
    size = (height, round(width * aspect)) if aspect > 1 else (round(height / aspect), width)
    return interpolate(image[None], size, mode="bilinear", align_corners=False)[0].clamp(0, 1)


def _tone_mapped(frame: Any) -> np.ndarray:
    """Return a frame of high dynamic range as sRGB in [0, 1], [height, width, 3]."""
    signal = frame.to_ndarray(format="rgb48le").astype(np.float32) / 65535
    nits = _pq_nits(signal) if frame.color_trc == PQ else _hlg_nits(signal)
    linear = (nits / WHITE_NITS) @ np.array(REC2020_TO_SRGB, np.float32).T
    linear = linear.clip(0, None)
    # The largest channel is compressed and the others with it, so that hues stay.
    peak = linear.max(-1, keepdims=True)
    over = (peak - KNEE) / (1 - KNEE)
    held = np.where(peak > KNEE, KNEE + (1 - KNEE) * (1 - np.exp(-over.clip(0, None))), peak)
    linear = linear * held / peak.clip(1e-6, None)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(1e-8, None) ** (1 / 2.4) - 0.055)
    return encoded.clip(0, 1).astype(np.float32)


def _pq_nits(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084's electro-optical transfer function."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    root = signal ** (1 / m2)
    return 10000 * ((root - c1).clip(0, None) / (c2 - c3 * root)) ** (1 / m1)


def _hlg_nits(signal: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100's inverse opto-electrical function and display gamma."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array((0.2627, 0.6780, 0.0593), np.float32)
    return HLG_PEAK_NITS * luminance.clip(1e-6, None)[..., None] ** 0.2 * scene
