"""Random cameras around the capture cameras' range (`render/viewpoints.py`)."""

import numpy as np
import torch
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.render.viewpoints import CAPTURE_AZIMUTH_DEG, CAPTURE_ELEVATION_DEG, orbit
from geodiff4d.world.seeds import generator


def random_cameras(n: int, seed: int, size: int = 256, radius_m: float = 1.0) -> Camera:
    """Return cameras that cover the capture cameras' range and more: angles ±10 %, distance and zoom ±8 %, roll ±3°."""
    rng = generator("cameras", seed)

    def uniform(limit: float) -> Tensor:
        return torch.from_numpy(rng.uniform(-limit, limit, n).astype(np.float32))

    base = orbit(uniform(CAPTURE_AZIMUTH_DEG * 0.55), uniform(CAPTURE_ELEVATION_DEG * 0.55), size, radius_m)
    roll, zoom = torch.deg2rad(uniform(3.0)), 1 + uniform(0.08)
    R = torch.eye(4).repeat(n, 1, 1)
    R[:, 0, 0], R[:, 0, 1], R[:, 1, 0], R[:, 1, 1] = roll.cos(), -roll.sin(), roll.sin(), roll.cos()
    T = R @ base.T_cam_world
    T[:, 2, 3] *= 1 + uniform(0.08)
    K = base.K.clone()
    K[:, 0, 0] *= zoom
    K[:, 1, 1] *= zoom
    K[:, :2, 2] += torch.stack([uniform(0.02 * size), uniform(0.02 * size)], -1)
    return Camera(T, K, size, size)


def portrait_and_other_cameras(views: int, seed: int, size: int) -> Camera:
    """Return view 0 near the front, as portraits are, and others from anywhere (`random_cameras`)."""
    azimuth, elevation = np.random.default_rng(seed).uniform(-1, 1, 2) * (25.0, 10.0)
    front = orbit(torch.tensor([azimuth]).float(), torch.tensor([elevation]).float(), size)
    others = random_cameras(views - 1, seed, size)
    return Camera.stack([front[0], *(others[k] for k in range(views - 1))])
