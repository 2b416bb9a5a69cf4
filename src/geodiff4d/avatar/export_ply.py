"""Posed splats for other programs: one standard 3DGS .ply, or a numbered sequence.

GaussianAvatars and others export what they optimise, which is local to triangles and looks like mist elsewhere; these
files hold splats in the world, at one instant.

Axes are those of the scenes that the format grew up with (OpenCV, COLMAP): x right, y **down**, z away. The face looks
to -z, and the units stay metres. Viewers that turn such scenes upright show the head upright.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.drive import Performance
from geodiff4d.avatar.model import Avatar
from geodiff4d.avatar.ply import SH_C0, Columns, rest_columns, splat_columns, write_ply
from geodiff4d.core.files import fresh_folder, write_json
from geodiff4d.core.geometry import quat_multiply
from geodiff4d.core.progress import Progress, silent
from geodiff4d.render.gaussians import Gaussians
from geodiff4d.render.harmonics import TurnedHarmonics

FILE_FROM_WORLD = torch.tensor([1.0, -1.0, -1.0])
"""Signs that turn the head's axes (y up, face to +z) half about x into the file's, and back."""
HALF_TURN = torch.tensor([0.0, 1.0, 0.0, 0.0])
SMALLEST_M = 1e-9
FAINTEST = 1e-6


def posed_columns(
    gaussians: Gaussians, colors: Float[Tensor, "n 3"], shading: TurnedHarmonics | None = None
) -> Columns:
    """Return splats as the file's columns: in its axes, with logarithms of scales and logits of opacities."""
    quats = torch.nn.functional.normalize(gaussians.quats, dim=-1)
    turned = quat_multiply(HALF_TURN.to(quats).expand_as(quats), quats)
    arrays = (
        gaussians.means * FILE_FROM_WORLD.to(gaussians.means), (colors - 0.5) / SH_C0,
        torch.logit(gaussians.opacities.clamp(FAINTEST, 1 - FAINTEST)), gaussians.scales.clamp(min=SMALLEST_M).log(),
        turned,
    )  # fmt: skip
    rest = None if shading is None else rest_columns(shading.in_world(torch.diag(FILE_FROM_WORLD)).cpu().numpy())
    return splat_columns(*(a.detach().cpu().float().numpy() for a in arrays), f_rest=rest)


@torch.no_grad()
def export_ply(avatar: Avatar, performance: Performance, path: Path, frame: int = 0) -> int:
    """Write the avatar at one frame of a performance; returns the number of splats.

    Raises:
        UserError: the performance has no such frame.
    """
    posed = avatar.posed(*performance.frame(frame))
    write_ply(path, posed_columns(posed.gaussians, posed.colors, posed.shading))
    return len(posed.gaussians)


@torch.no_grad()
def export_sequence(avatar: Avatar, performance: Performance, folder: Path, progress: Progress = silent) -> int:
    """Write `frame_00000.ply …` and `sequence.json` into a new folder, whole or not at all; returns the Gaussians."""
    with fresh_folder(folder) as temporary:
        for i in progress(range(len(performance)), "exporting"):
            count = export_ply(avatar, performance, temporary / f"frame_{i:05d}.ply", i)
        about = {
            "format": "3D Gaussian splats, one .ply a frame", "frames": len(performance), "fps": performance.fps,
            "gaussians": count, "axes": "x right, y down, z away; the face looks to -z; metres",
        }  # fmt: skip
        write_json(temporary / "sequence.json", about)
    return count
