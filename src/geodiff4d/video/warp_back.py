"""Warp-back: a photograph seen from the side, as far as it shows that, serves as portrait for the photograph itself.

So real skin, hair, ears and teeth become the truth for what a portrait hides, without a second photograph (ours).
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import axis_angle_to_matrix, rigid
from geodiff4d.core.images import composite
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.meshes import rasterize
from geodiff4d.video.conditions import Lifted
from geodiff4d.video.inputs import Portrait

SEEN = 0.3
"""How well the photograph must be seen in a turned view to be kept there."""


def turned(camera: Camera, pivot: Float[Tensor, " 3"], yaw_deg: float, tilt_deg: float = 0.0) -> Camera:
    """Return a camera that sees the world turned about a point: about the upright axis, then about the camera's."""
    T = camera.T_cam_world
    tilt = axis_angle_to_matrix(T[0, :3] * math.radians(tilt_deg))
    R = tilt @ axis_angle_to_matrix(torch.tensor([0.0, math.radians(yaw_deg), 0.0]))
    return replace(camera, T_cam_world=T @ rigid(R, pivot - R @ pivot))


def around(head: Head, portrait: Portrait, yaw_deg: float, tilt_deg: float = 0.0) -> Camera:
    """Return a camera that sees a portrait's head turned about its middle."""
    return turned(portrait.camera, head.pose(portrait.params).vertices.mean(0), yaw_deg, tilt_deg)


def seen_turned(head: Head, portrait: Portrait, texture: Lifted, yaw_deg: float, tilt_deg: float) -> Portrait:
    """Return a portrait as a camera sees it that is turned about the head, only where the portrait shows it."""
    cameras = Camera.stack([around(head, portrait, yaw_deg, tilt_deg)])
    posed = head.pose(HeadParams.stack([portrait.params]))
    fragments = rasterize(posed.vertices, head.faces, cameras)
    rgb, visibility = texture.shown(fragments, posed.T_world_joint, cameras)
    mask = (visibility[0, :1] > SEEN).float()
    return replace(portrait, image=composite(rgb[0], mask), mask=mask, camera=cameras[0], normal=None)
