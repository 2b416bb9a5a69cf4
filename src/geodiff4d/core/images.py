"""Images in and out: C×H×W float32 in [0, 1], sRGB."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a bomb, or a scan to downscale first."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""What is opened, whatever a file's name is: for others, such as EPS, Pillow would start programs of the system."""


HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_heif(path: Path) -> bool:
    """Say whether a file is a HEIF photograph, as telephones write it: a grid of tiles, each coded as a video."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _allow_heif(path: Path) -> None:
    """Let Pillow open HEIF, if pillow-heif is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{path} is a HEIF photograph (HEIC): export it as JPEG, or `pip install pillow-heif`, which reads it"
        ) from None
    pillow_heif.register_heif_opener()


def open_image(source: Path | io.BytesIO) -> Image.Image:
    """Open a picture of one of `FORMATS` lazily, as `PIL.Image.open` does."""
    Image.init()
    return Image.open(source, formats=[name for name in (*FORMATS, "HEIF") if name in Image.OPEN])


def read_image(path: Path, mode: str = "RGB") -> Float[Tensor, "channels height width"]:
    """Read a picture as float32 in [0, 1], turned upright by its EXIF tag; `mode` is RGB or L.

    What is transparent is grey: colours below it were erased, and nobody sees them. Of 16 bits the upper eight are
    read.

    Raises:
        UserError: missing, a directory, truncated, too large or not an image.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: expected one image file (PNG, JPEG, WebP)")
    if not path.exists():
        raise UserError(f"{path} does not exist: expected an image file (PNG, JPEG, WebP)")
    if is_heif(path):
        _allow_heif(path)
    return _decode(path, str(path), mode)


def decode_image(data: bytes, name: str, mode: str = "RGB") -> Float[Tensor, "channels height width"]:
    """Decode a picture from memory (an archive's member, a data set's field) as `read_image` does a file.

    Raises:
        UserError: truncated, too large or not an image; the message calls it `name`.
    """
    return _decode(io.BytesIO(data), name, mode)


def _decode(source: Path | io.BytesIO, name: str, mode: str) -> Float[Tensor, "channels height width"]:
    try:
        with open_image(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{name} has {image.width}×{image.height} pixels: at most {MAX_PIXELS:,} are read; "
                    "downscale it first"
                )
            from PIL import ImageOps

            # Transparency last: putting it on grey forgets the profile.
            shown = _opaque(_in_srgb(_eight_bits(ImageOps.exif_transpose(image), name)), mode)
            array = np.asarray(shown.convert(mode))
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read: expected PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} is too large to decode safely: at most {MAX_PIXELS:,} pixels are read") from None
    except PermissionError:
        raise UserError(f"{name} cannot be read (permission denied): change its permissions or copy it") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is truncated or damaged ({error}): export it again as PNG or JPEG") from None
    tensor = torch.from_numpy(array.copy()).float() / 255
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert a picture to sRGB from the colour space of its ICC profile: telephones write Display P3.

    A profile that is damaged, or for another kind of picture, is passed over, as viewers do.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        output = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=output)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if converted is None else converted


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """Put a picture with transparency on grey, and a mask (`mode` L) on black: what is erased is not foreground."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*[0 if mode == "L" else 128] * 3, 255)), image)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit grey, which Pillow would clip to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels: expected 8 or 16 bits per channel; export it as PNG or JPEG")
    return image


def to_uint8(image: Float[Tensor, "channels height width"]) -> np.ndarray:
    """Return H×W×3 (or H×W) bytes, rounded."""
    array = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def write_image(path: Path, image: Float[Tensor, "channels height width"]) -> None:
    """Write a PNG or JPEG by the name's ending; it appears whole or not at all."""
    path = Path(path)
    with fresh_file(path) as temporary:
        Image.fromarray(to_uint8(image)).save(temporary, format="JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG")


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
