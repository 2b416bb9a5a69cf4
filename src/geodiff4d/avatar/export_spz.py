"""A posed head as .spz, Niantic's compressed splats: about a tenth of a .ply, read by most splat viewers.

Version 2 of the format, which every reader knows: a header, then position, opacity, colour, scale and rotation of all
splats one kind after the other, quantised, in one gzip stream. Its axes are the head's own: x right, y up, and the face
looks towards the viewer, to +z; metres.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from geodiff4d.avatar.drive import Performance
from geodiff4d.avatar.model import Avatar
from geodiff4d.avatar.ply import SH_C0
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file
from geodiff4d.render.gaussians import Gaussians
from geodiff4d.render.harmonics import degree_of

MAGIC, VERSION = 0x5053474E, 2
"""The magic number reads NGSP, low bytes first."""
POSITION_BITS = 20
"""Bits behind the point of a position, of 24: steps of a thousandth of a millimetre, up to 8 m from the origin."""
COLOR_SCALE = 0.15
"""Of the colour's harmonic of degree 0, around 0.5."""
SCALE_STEP, SCALE_OFFSET = 16.0, 10.0
"""Codes of the logarithm of a scale: 16 · (log + 10), in steps of 6 %; what is thinner than 45 µm becomes that."""


def packed(gaussians: Gaussians, colors: Float[Tensor, "n 3"], rest: Float[Tensor, "n rest 3"] | None = None) -> bytes:
    """Return splats as a .spz file; `rest` are the harmonics from degree 1 on, if any.

    Raises:
        UserError: one lies 8 m or more from the origin.
    """
    means = gaussians.means.cpu().double().numpy()
    fixed = np.rint(means * 2**POSITION_BITS).astype(np.int64)
    if len(fixed) and np.abs(fixed).max() >= 2**23:
        raise UserError(
            f"a splat lies {np.abs(means).max():.1f} m from the head's origin: .spz holds what is within 8 m; "
            "export .ply instead"
        )
    positions = fixed.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3]
    quats = torch.nn.functional.normalize(gaussians.quats.double(), dim=-1)
    # The fourth number, w, is what is left to a length of one, and is not negative.
    quats = torch.where(quats[:, :1] < 0, -quats, quats)[:, 1:]
    harmonics = (colors.double() - 0.5) / SH_C0
    parts = (
        _codes(gaussians.opacities * 255), _codes((harmonics * COLOR_SCALE + 0.5) * 255),
        _codes((gaussians.scales.double().clamp(min=1e-9).log() + SCALE_OFFSET) * SCALE_STEP),
        _codes(quats * 127.5 + 127.5),
    )  # fmt: skip
    degree = 0
    if rest is not None:
        # Coefficient by coefficient, red, green and blue beside each other.
        degree, parts = degree_of(rest), (*parts, _codes(rest.flatten(1) * 128 + 128))
    header = struct.pack("<IIIBBBB", MAGIC, VERSION, len(means), degree, POSITION_BITS, 0, 0)
    # No time in gzip's own header: the same avatar gives the same file.
    return gzip.compress(header + positions.tobytes() + b"".join(p.tobytes() for p in parts), 9, mtime=0)


@torch.no_grad()
def export_spz(avatar: Avatar, performance: Performance, path: Path, frame: int = 0) -> int:
    """Write the avatar at one frame of a performance, whole or not at all; returns the number of splats.

    Raises:
        UserError: the performance has no such frame.
    """
    posed = avatar.posed(*performance.frame(frame))
    data = packed(posed.gaussians, posed.colors, None if posed.shading is None else posed.shading.in_world())
    with fresh_file(path) as temporary:
        temporary.write_bytes(data)
    return len(posed.gaussians)


def _codes(values: Float[Tensor, "n ..."]) -> UInt8[np.ndarray, "n ..."]:
    return values.detach().cpu().double().round().clamp(0, 255).to(torch.uint8).numpy()
