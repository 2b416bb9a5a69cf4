"""Warp-back: a photograph seen from the side, as far as it shows that, serves as portrait for the photograph itself.

So real skin, hair, ears and teeth become the truth for what a portrait hides, without a second photograph (ours).
"""

from dataclasses import replace

from geodiff4d.core.camera import Camera, turned
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.relief import seen_from
from geodiff4d.video.conditions import Lifted
from geodiff4d.video.inputs import Portrait


def around(head: Head, portrait: Portrait, yaw_deg: float, tilt_deg: float = 0.0) -> Camera:
    """Return a camera that sees a portrait's head turned about its middle."""
    return turned(portrait.camera, head.pose(portrait.params).vertices.mean(0), -yaw_deg, tilt_deg)


def seen_turned(head: Head, portrait: Portrait, texture: Lifted, yaw_deg: float, tilt_deg: float) -> Portrait:
    """Return a portrait as a camera sees it that is turned about the head, only where the portrait shows it."""
    cameras = Camera.stack([around(head, portrait, yaw_deg, tilt_deg)])
    image, mask = seen_from(texture, head.pose(HeadParams.stack([portrait.params])), cameras)
    return replace(portrait, image=image[0], mask=mask[0], camera=cameras[0], normal=None)
