"""Which frames of a video show a person best: a frontal one at rest, and those that show other sides of it (ours)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import transform
from geodiff4d.heads.rig import SKULL_JOINT, Head, HeadParams

MOST = 8
"""Frames that are taken of a video, at most."""
LEAST_RAD = 0.1
"""A frame is taken if it differs from those that are taken by as much: an angle [rad], or what the mouth shows."""
OPENED = 0.4
"""How much of an opened mouth weighs as much as a radian."""
SHARP = 0.7
"""Frames less sharp than this share of the sharp ones' are not taken."""


def frontal_score(
    head: Head, params: HeadParams, camera: Camera, sharpness: Float[Tensor, " frames"]
) -> Float[Tensor, " frames"]:
    """Score frames as the portrait of a person: seen from the front, at rest, sharp; larger is better."""
    ahead = seen_from(head, params, camera)[:, 2].clamp(-1, 1).acos()
    moved = params.expr.clamp(0, 1).square().sum(1).sqrt()
    sharp = (sharpness / _usual(sharpness)).clamp(max=1.2)
    return -2.0 * ahead - 0.6 * moved + sharp


def chosen_frames(
    head: Head, params: HeadParams, camera: Camera, sharpness: Float[Tensor, " frames"], most: int = MOST
) -> Int[Tensor, " chosen"]:
    """Return frames that show a person from sides as different as the video has, the most frontal first.

    Args:
        sharpness: of every frame; less than zero says that it is not to be taken.
    """
    allowed = sharpness >= 0
    sharp = allowed & (sharpness >= SHARP * _usual(sharpness))
    features = torch.cat([seen_from(head, params, camera), OPENED * _mouth(head, params)[:, None]], 1)
    score = frontal_score(head, params, camera, sharpness).masked_fill(~sharp, -torch.inf)
    chosen = [int(score.argmax())]
    while len(chosen) < most:
        away = torch.cdist(features, features[chosen]).amin(1).masked_fill(~sharp, -1)
        if float(away.max()) < LEAST_RAD:
            break
        # Of nearly equal ones, the sharpest.
        near = away > away.max() - 0.03
        chosen.append(int(sharpness.masked_fill(~near, -torch.inf).argmax()))
    return torch.tensor(chosen)


def seen_from(head: Head, params: HeadParams, camera: Camera) -> Float[Tensor, "frames 3"]:
    """Return the unit vectors to the camera in the heads' frames: z is ahead of the face."""
    T = head.pose(params).T_world_joint[:, SKULL_JOINT]
    return normalize(transform(T.inverse(), camera.position.expand(len(T), 1, 3))[:, 0], dim=-1)


def _mouth(head: Head, params: HeadParams) -> Float[Tensor, " frames"]:
    """Say how much of teeth and mouth is seen."""
    names = head.expression_names
    shown = [names.index(n) for n in ("jawOpen", "mouthUpperUpLeft", "mouthLowerDownLeft") if n in names]
    return params.expr[:, shown].sum(1) if shown else params.jaw_pose[:, 0] * 2


def _usual(sharpness: Float[Tensor, " frames"]) -> Tensor:
    return sharpness[sharpness >= 0].quantile(0.8).clamp(min=1e-9)
