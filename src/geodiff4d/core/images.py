"""Images in and out: C×H×W float32 in [0, 1], sRGB."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from geodiff4d.core.files import fresh_file
from geodiff4d.core.sandbox import decode
from geodiff4d.core.stills import decode_still, read_still


def read_image(path: Path, mode: str = "RGB") -> Float[Tensor, "channels height width"]:
    """Read an image as float32 in [0, 1], turned upright by its EXIF tag; `mode` is RGB or L.

    What is transparent is grey: colours below it were erased, and nobody sees them. Of 16 bits the upper eight are
    read.

    Raises:
        UserError: missing, a directory, truncated, too large or not an image.
    """
    return _image(decode(read_still, Path(path), mode))


def decode_image(data: bytes, name: str, mode: str = "RGB") -> Float[Tensor, "channels height width"]:
    """Decode an image from memory (an archive's member, a data set's field) as `read_image` does a file.

    Raises:
        UserError: truncated, too large or not an image; the message calls it `name`.
    """
    return _image(decode_still(io.BytesIO(data), name, mode))


def _image(pixels: np.ndarray) -> Float[Tensor, "channels height width"]:
    tensor = torch.from_numpy(pixels).float() / 255
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def to_uint8(image: Float[Tensor, "channels height width"]) -> np.ndarray:
    """Return H×W×3 (or H×W) bytes, rounded."""
    array = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


PNG_LEVEL = 4
"""zlib's level for PNG: at the usual 6, frames take twice as long for 2 % fewer bytes."""


def write_image(path: Path, image: Float[Tensor, "channels height width"]) -> None:
    """Write a PNG or JPEG by the name's ending; it appears whole or not at all."""
    path = Path(path)
    with fresh_file(path) as temporary:
        kind = "JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG"
        Image.fromarray(to_uint8(image)).save(temporary, format=kind, compress_level=PNG_LEVEL)


def labelled(image: Float[Tensor, "3 height width"], text: str = "AI-generated") -> Float[Tensor, "3 height width"]:
    """Return the image with a text in its lower left corner, white on a dark ground, a twentieth of its height tall."""
    from PIL import ImageDraw, ImageFont

    drawn = Image.fromarray(to_uint8(image))
    draw, size = ImageDraw.Draw(drawn), max(8, image.shape[1] // 20)
    font, pad = ImageFont.load_default(size), size // 2
    box = draw.textbbox((pad, image.shape[1] - pad), text, font, anchor="lb")
    draw.rectangle((box[0] - pad // 2, box[1] - pad // 2, box[2] + pad // 2, box[3] + pad // 2), (20, 20, 20))
    draw.text((pad, image.shape[1] - pad), text, (255, 255, 255), font, anchor="lb")
    return torch.from_numpy(np.asarray(drawn).copy()).permute(2, 0, 1).float() / 255


def encode_normals(
    normals: Float[Tensor, "*batch 3 height width"], mask: Float[Tensor, "*batch 1 height width"]
) -> Float[Tensor, "*batch 3 height width"]:
    """Turn camera-space unit normals into an image: n/2 + 0.5, grey 0.5 where the mask is zero."""
    return normals * mask * 0.5 + 0.5


def decode_normals(image: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Turn a normal image back into unit vectors (grey becomes the zero vector)."""
    n = image * 2 - 1
    # Not torch's normalize: over a strided axis it is forty times slower on a CPU.
    square = n.square().sum(-3, keepdim=True)
    # Eight bits have no 0.5: their grey is 0.007 long, and must not become a direction.
    return n * (square > 1e-2) * square.clamp(min=1e-2).rsqrt()


def composite(
    image: Float[Tensor, "*batch channels height width"],
    mask: Float[Tensor, "*batch 1 height width"] | Bool[Tensor, "*batch 1 height width"],
    background: float = 0.5,
) -> Float[Tensor, "*batch channels height width"]:
    """Put the foreground on a plain background."""
    m = mask.to(image.dtype)
    return image * m + background * (1 - m)
