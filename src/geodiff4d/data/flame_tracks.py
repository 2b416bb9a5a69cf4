"""What readers of FLAME trackers share: the user's FLAME where it is known, and heads that turn about the origin.

`HeadParams.rotation` turns a head about FLAME's root joint, at the neck's base; Pixel3DMM and CAP4D turn the posed mesh
about the origin, x → R x + t. Going from one to the other needs the joint, and so the user's FLAME file (`--head`).
Without it nothing is lost but where the motion stands: the head stays and the cameras take it, T_cam · [R | t].
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import matrix_to_axis_angle
from geodiff4d.data.importing import Report
from geodiff4d.heads import flame
from geodiff4d.heads.rig import Head, HeadParams

SHAPES, EXPRESSIONS = 300, 100


def known_head(name: str, tracker: str, report: Report) -> Head | None:
    """Return the user's FLAME if it is known (`--head`, or GEODIFF4D_FLAME); else None, which is reported."""
    try:
        return flame.find(name)
    except UserError:
        report.warn(
            f"{tracker} turns heads about the origin, FLAME about its root joint: without the model the cameras carry "
            f"the head's motion; to have it in the head parameters give {name}'s file with --head, from the start"
        )
        return None


def motion_of(head: Head | None) -> str:
    """Say where `place` puts the motion, for `Source.motion`."""
    return "in the cameras" if head is None else "in the head parameters"


def place(
    head: Head | None, params: HeadParams, T_source_mesh: Float[Tensor, "4 4"]
) -> tuple[HeadParams, Float[Tensor, "4 4"]]:
    """Give a head whose posed mesh a tracker moved by T_source_mesh its pose by FLAME's rules.

    `params` is complete but for rotation and translation. Returns it with them, and T_source_world, by which to
    multiply T_cam_source: the identity if the parameters carry the motion, else all of it.
    """
    if head is None:
        return params, T_source_mesh
    R, t = T_source_mesh[:3, :3], T_source_mesh[:3, 3]
    root = head.shape(params).joints[0].to(R)
    rotation, translation = matrix_to_axis_angle(R), R @ root + t - root
    placed = replace(params, rotation=rotation.to(params.shape), translation=translation.to(params.shape))
    return placed, torch.eye(4, dtype=R.dtype)


def padded(values: np.ndarray, length: int, what: str) -> Float[Tensor, " length"]:
    """Return finite coefficients as float32, padded with zeros; what is missing are the basis' last terms.

    Raises:
        UserError: too many, or not finite.
    """
    flat = np.asarray(values).reshape(-1)
    if flat.dtype.kind not in "fiu" or len(flat) > length or not np.isfinite(flat).all():
        raise UserError(f"{what} has {len(flat)} numbers of type {flat.dtype}: expected at most {length} finite ones")
    out = torch.zeros(length)
    out[: len(flat)] = torch.from_numpy(flat.astype(np.float32))
    return out
