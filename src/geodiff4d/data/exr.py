"""OpenEXR pictures in: linear floats, signed, any range (the `data` extra: OpenEXR, BSD-3)."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError, install_extra
from geodiff4d.core.stills import MAX_PIXELS

ORDERS = ("RGBA", "XYZ")


def read_exr(path: Path) -> Float[Tensor, "channels height width"]:
    """Read the channels R, G, B (and A), or X, Y, Z, or the only one there is, in this order, as float32.

    Raises:
        UserError: the extra is not installed; the file is missing, truncated, too large or not an EXR.
    """
    try:
        import OpenEXR
    except ImportError:
        raise UserError(f"reading EXR needs OpenEXR: run `{install_extra('data')}`") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected an EXR file")
    try:
        with OpenEXR.File(str(path), separate_channels=True, header_only=True) as file:
            low, high = file.header()["dataWindow"]
            width, height = (int(h) - int(v) + 1 for v, h in zip(low, high, strict=True))
        if not 0 < width * height <= MAX_PIXELS:
            raise UserError(f"{path} has {width}×{height} pixels: at most {MAX_PIXELS:,} are read")
        with OpenEXR.File(str(path), separate_channels=True, num_threads=0) as file:
            planes = {name: np.asarray(channel.pixels, np.float32) for name, channel in file.channels().items()}
    except UserError:
        raise
    except Exception as error:
        # The binding raises RuntimeError, KeyError and others of its own for damaged files.
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is truncated or not an EXR ({reason}): copy it again") from None
    short = {name.rpartition(".")[2]: plane for name, plane in planes.items()}
    found = ([name for name in order if name in short] for order in ORDERS)
    names = next((names for names in found if len(names) > 1), sorted(short)[: len(short) == 1])
    shapes = {short[name].shape for name in names}
    if not names or len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise UserError(
            f"{path} has the channels {', '.join(sorted(planes)) or 'none'}: expected R, G, B, or X, Y, Z, or one"
        )
    return torch.from_numpy(np.stack([short[name] for name in names]))
