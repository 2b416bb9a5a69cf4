"""Viewpoints around a head: 16 capture cameras with NeRSemble's coverage (93° × 32°, two rows) and orbits.

World frame = FLAME's: y up, the face toward +z. All cameras look at the nominal head's centre from about a metre, and
their focal length makes the nominal head's box 1/1.6 of the image: the canonical crop of an average person.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import look_at
from geodiff4d.heads import Head, load_head
from geodiff4d.render import crops

CAPTURE_CAMERAS = 16
"""How many cameras the open world and the generated clips are captured by."""
FRONT_CAMERA = 8
"""As in NeRSemble, where the ninth camera faces the person."""
CAPTURE_AZIMUTH_DEG, CAPTURE_ELEVATION_DEG = 93.0, 32.0
"""Full angles between the outermost capture cameras, as NeRSemble's 16 cover them [degrees]."""
CROP_SCALE = 1.6
"""Side of the canonical crop over the side of the head's projected box."""


@dataclass(frozen=True)
class NominalHead:
    """Where the cameras look: the box of the template's head above the chin."""

    centre: Float[Tensor, "3"]
    """Centre of the box, in the head's frame [m]."""
    side_m: float
    """Longer side of its box seen from the front [m]."""


@lru_cache
def openhead() -> Head:
    """Return the head of the open world, loaded once."""
    return load_head("openhead")


@lru_cache
def world_region() -> Bool[Tensor, " verts"]:
    """Return which vertices belong to the open world's head without neck and shoulders (`render.crops.head_region`)."""
    return crops.head_region(openhead())


@lru_cache
def nominal_head() -> NominalHead:
    """Return centre and size of the template's head."""
    points = openhead().template[world_region()]
    low, high = points.amin(0), points.amax(0)
    return NominalHead((low + high) / 2, float((high - low)[:2].max()))


def orbit(
    azimuth_deg: Float[Tensor, " cameras"],
    elevation_deg: Float[Tensor, " cameras"],
    size: int = 256,
    radius_m: float = 1.0,
) -> Camera:
    """Return cameras on a sphere around the nominal head's centre, which they look at.

    Positive azimuth sees the person's left side. Images are `size` pixels square; the sphere's radius is `radius_m`.
    """
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    direction = torch.stack([azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()], -1)
    nominal = nominal_head()
    target = nominal.centre.expand_as(direction)
    up = torch.tensor([0.0, 1.0, 0.0]).expand_as(direction)
    focal_px = size * radius_m / (CROP_SCALE * nominal.side_m)
    K = pinhole(focal_px, size, size).expand(len(azimuth), 3, 3)
    return Camera(look_at(target + radius_m * direction, target, up), K, size, size)


def capture_cameras(size: int = 256, radius_m: float = 1.0, azimuth_deg: float = CAPTURE_AZIMUTH_DEG) -> Camera:
    """Return the 16 capture cameras: 15 in two rows over 93° × 32°, and the front one at index 8 (`FRONT_CAMERA`).

    Images are `size` pixels square; cameras stand `radius_m` metres from the nominal head's centre.
    `azimuth_deg` is the full angle between the outermost ones.
    """
    others = CAPTURE_CAMERAS - 1
    azimuth = torch.linspace(-azimuth_deg / 2, azimuth_deg / 2, others)
    elevation = torch.where(torch.arange(others) % 2 == 0, 1.0, -1.0) * CAPTURE_ELEVATION_DEG / 2
    zero = torch.zeros(1)
    azimuth = torch.cat([azimuth[:FRONT_CAMERA], zero, azimuth[FRONT_CAMERA:]])
    elevation = torch.cat([elevation[:FRONT_CAMERA], zero, elevation[FRONT_CAMERA:]])
    return orbit(azimuth, elevation, size, radius_m)


def capture_views(count: int) -> list[int]:
    """Return the indices of `count` capture cameras: the front one first, then others, spread evenly.

    Raises:
        UserError: `count` is less than 1 or more than `CAPTURE_CAMERAS`.
    """
    if not 1 <= count <= CAPTURE_CAMERAS:
        raise UserError(f"--views is {count}: expected 1 to {CAPTURE_CAMERAS} capture cameras")
    others = [i for i in range(CAPTURE_CAMERAS) if i != FRONT_CAMERA]
    picked = np.round(np.linspace(0, len(others) - 1, count - 1)).astype(int) if count > 1 else []
    return [FRONT_CAMERA, *(others[i] for i in picked)]
