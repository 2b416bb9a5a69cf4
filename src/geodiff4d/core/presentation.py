"""Decoded frames as they are meant to be seen: upright, with square pixels, in standard dynamic range.

A file says beside its pixels how a player shows them: a display matrix that turns and mirrors (telephones), pixels that
are not square (DV, broadcasts), a transfer function of high dynamic range (HLG and PQ, telephones since 2020). Whoever
leaves that out sees an upside-down, squeezed or grey head, and no residual tells.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.films import HLG, PQ, Frame

WHITE_NITS, HLG_PEAK_NITS = 203.0, 1000.0
"""Reference white (ITU-R BT.2408), which becomes sRGB's 1, and the display that HLG is shown on."""
KNEE = 0.8
"""Light above this share of reference white is compressed."""
REC2020_TO_SRGB = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))


def presented(frame: Frame) -> Float[Tensor, "3 height width"]:
    """Return a decoded frame as float32 sRGB in [0, 1]."""
    wide = frame.transfer in (PQ, HLG)
    rgb = _tone_mapped(frame) if wide else frame.pixels.astype(np.float32)
    image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
    image = _square(image if wide else image / 255, frame.aspect)
    image = image.mT if frame.turned else image
    mirrored = [axis for axis, flip in ((-1, frame.left), (-2, frame.down)) if flip]
    return (image.flip(mirrored) if mirrored else image).contiguous()


def _square(image: Float[Tensor, "3 h w"], aspect: float) -> Tensor:
    """Stretch the axis along which pixels are too narrow, so that nothing is thrown away."""
    if aspect == 1:
        return image
    height, width = image.shape[1:]
    size = (height, round(width * aspect)) if aspect > 1 else (round(height / aspect), width)
    return interpolate(image[None], size, mode="bilinear", align_corners=False)[0].clamp(0, 1)


def _tone_mapped(frame: Frame) -> np.ndarray:
    """Return a frame of high dynamic range as sRGB in [0, 1], [height, width, 3]."""
    signal = frame.pixels.astype(np.float32) / 65535
    nits = _pq_nits(signal) if frame.transfer == PQ else _hlg_nits(signal)
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
