"""Image files to arrays of bytes: upright, in sRGB, without transparency. Without torch, which decoding needs not."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from geodiff4d.core.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: a bomb, or a scan to downscale first."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""What is opened, whatever a file's name is: for others, such as EPS, Pillow would start programs of the system."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Pillow reads on after a damaged animation, EXIF tag or colour profile, in words that no user can act upon.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


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


def is_image(path: Path) -> bool:
    """Say whether a file is an image, by content."""
    if is_heif(path):
        return True
    try:
        with open_image(path):
            return True
    except Exception:
        return False


def read_still(path: Path, mode: str = "RGB") -> np.ndarray:
    """Read an image file as bytes, turned upright by its EXIF tag: [height, width, 3], or [height, width] in mode L.

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
    return decode_still(path, str(path), mode)


def decode_still(source: Path | io.BytesIO, name: str, mode: str) -> np.ndarray:
    """Decode an image as `read_still` does; messages call it `name`."""
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
            return np.array(shown.convert(mode))
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read: expected PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} is too large to decode safely: at most {MAX_PIXELS:,} pixels are read") from None
    except PermissionError:
        raise UserError(f"{name} cannot be read (permission denied): change its permissions or copy it") from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is truncated or damaged ({error}): export it again as PNG or JPEG") from None


def focal_length_mm(path: Path) -> float | None:
    """Return the focal length that an image's EXIF states, of a full-frame camera with its field of view [mm]."""
    from PIL import ExifTags

    try:
        with open_image(path) as image:
            value = float(image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm, 0))
    except Exception:
        # Damaged EXIF is no reason to refuse an image.
        return None
    return value if 5 < value < 2000 else None


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
