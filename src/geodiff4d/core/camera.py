"""Pinhole cameras in OpenCV's convention: x right, y down, z forward; pixel centres at half integers."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.geometry import axis_angle_to_matrix, invert, rigid, transform

OPENGL_FROM_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
"""Flips y and z. `T_world_opengl = T_world_opencv @ OPENGL_FROM_OPENCV`, and back by the same product."""

IMAGE_NORMAL_FROM_CAM = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
"""Takes OpenCV camera directions to the normal convention: x right, y up, z toward the camera."""


@dataclass(frozen=True)
class Camera:
    """One camera or a batch of them that share an image size."""

    T_cam_world: Float[Tensor, "*batch 4 4"]
    """World to camera, rigid; metres."""
    K: Float[Tensor, "*batch 3 3"]
    """Intrinsics in pixels; the principal point of an uncropped image is (width/2, height/2)."""
    width: int
    height: int

    def project(
        self, points: Float[Tensor, "*batch n 3"]
    ) -> tuple[Float[Tensor, "*batch n 2"], Float[Tensor, "*batch n"]]:
        """Project world points to pixels; returns (xy [px], depth z [m]). Points behind the camera keep their sign."""
        cam = transform(self.T_cam_world, points)
        depth = cam[..., 2]
        xyw = cam @ self.K.mT
        return xyw[..., :2] / depth[..., None], depth

    @property
    def position(self) -> Float[Tensor, "*batch 3"]:
        """Camera centre in the world [m]."""
        return invert(self.T_cam_world)[..., :3, 3]

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.T_cam_world.shape[:-2])

    def __getitem__(self, index: "int | slice | Int[Tensor, ' n']") -> "Camera":
        return replace(self, T_cam_world=self.T_cam_world[index], K=self.K[index])

    def to(self, device: torch.device | str) -> "Camera":
        return replace(self, T_cam_world=self.T_cam_world.to(device), K=self.K.to(device))

    def expand(self, *batch: int) -> "Camera":
        return replace(self, T_cam_world=self.T_cam_world.expand(*batch, 4, 4), K=self.K.expand(*batch, 3, 3))

    def resized(self, width: int, height: int) -> "Camera":
        """Return the camera of the same view, sampled at another size."""
        S = torch.diag(torch.tensor([width / self.width, height / self.height, 1.0])).to(self.K)
        return replace(self, K=S @ self.K, width=width, height=height)

    def of_height(self, height: int) -> "Camera":
        """Return the camera of the same view at another height, as wide as its shape asks, but a pixel at least."""
        return self.resized(max(1, round(height * self.width / self.height)), height)

    def cropped(self, left: float, top: float, side: float, size: int) -> "Camera":
        """Return the camera of a square crop [px of this camera] that is resampled to `size`²."""
        s = size / side
        S = torch.tensor([[s, 0.0, -left * s], [0.0, s, -top * s], [0.0, 0.0, 1.0]]).to(self.K)
        return replace(self, K=S @ self.K, width=size, height=size)

    @staticmethod
    def stack(cameras: "list[Camera]") -> "Camera":
        """Stack single cameras of one size into a batch."""
        sizes = {(c.width, c.height) for c in cameras}
        if len(sizes) != 1:
            raise ValueError(f"cameras to stack must share a size, got {sorted(sizes)}")
        return replace(
            cameras[0],
            T_cam_world=torch.stack([c.T_cam_world for c in cameras]),
            K=torch.stack([c.K for c in cameras]),
        )


def pinhole(focal_px: float, width: int, height: int) -> Float[Tensor, "3 3"]:
    """Intrinsics with square pixels and a centred principal point."""
    return torch.tensor([[focal_px, 0.0, width / 2], [0.0, focal_px, height / 2], [0.0, 0.0, 1.0]])


def turned(camera: Camera, pivot: Float[Tensor, " 3"], yaw_deg: float, pitch_deg: float = 0.0) -> Camera:
    """Return a single camera swung around a world point: about the world's y axis, then about its own x axis.

    Positive yaw goes to the camera's right.
    """
    T = camera.T_cam_world
    yaw = axis_angle_to_matrix(torch.tensor([0.0, -math.radians(yaw_deg), 0.0]))
    R = axis_angle_to_matrix(T[0, :3] * math.radians(pitch_deg)) @ yaw
    return replace(camera, T_cam_world=T @ rigid(R, pivot - R @ pivot))
