"""A head's rotation relative to the ray through its centre, which is what a crop of it shows."""

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM


def apparent_turn(
    skull: Float[Tensor, "n 3 3"], T_cam_world: Float[Tensor, "n 4 4"], centre: Float[Tensor, "n 3"]
) -> Float[Tensor, "n 3 3"]:
    """Return the rotation from head to viewer, relative to the ray through the head's `centre` (world [m])."""
    to_centre = torch.nn.functional.normalize(
        (T_cam_world[:, :3, :3] @ centre[..., None])[..., 0] + T_cam_world[:, :3, 3], dim=-1
    )
    return IMAGE_NORMAL_FROM_CAM @ ray_rotation(to_centre).mT @ T_cam_world[:, :3, :3] @ skull


def ray_rotation(ray: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 3"]:
    """Return the smallest rotation that takes the optical axis to a unit ray (OpenCV camera)."""
    x, y, z = ray.unbind(-1)
    k = 1 / (1 + z)
    return torch.stack(
        [1 - x * x * k, -x * y * k, x, -x * y * k, 1 - y * y * k, y, -x, -y, z], -1
    ).unflatten(-1, (3, 3))  # fmt: skip
