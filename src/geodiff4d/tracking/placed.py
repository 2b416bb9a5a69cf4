"""Placement of heads of another shape where a tracked head is seen."""

from dataclasses import replace

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import transform
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.crops import head_region


def placed(head: Head, params: HeadParams, tracked: HeadParams, camera: Camera) -> HeadParams:
    """Return `params` moved to where the tracked heads are seen, at the same size in the image.

    Of two images of one person, tracking finds heads of different size (by 5 to 10 %) at different distances, which
    look alike; one's shape at the other's distance would be too large or too small. The larger stands farther away.
    One size counts for all frames, so that a clip is as steady as its tracking.
    """
    region, T = head_region(head), camera.expand(params.batch[0]).T_cam_world
    a, b = (transform(T, head.pose(p.without_expression()).vertices[:, region]) for p in (params, tracked))
    ca, cb = a.mean(1), b.mean(1)
    scale = (b - cb[:, None]).norm() / (a - ca[:, None]).norm()
    shift = cb / scale - ca
    return replace(params, translation=params.translation + shift @ camera.T_cam_world[:3, :3])
