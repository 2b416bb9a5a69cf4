"""Gaussians below the head's mesh: shoulders and chest, placed by the silhouettes alone.

The head's mesh ends at the neck, the images do not. Splats that start on the neck take thousands of steps to reach a
shoulder, so some start on the visual hull below the neck, bound to the neck's nearest face.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn.functional import avg_pool3d, max_pool3d, normalize

from geodiff4d.avatar.binding import NORMAL_AXIS, LocalGaussians, face_frames, to_local
from geodiff4d.avatar.frames import FitFrames
from geodiff4d.avatar.surface import Surface
from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import invert, matrix_to_quat, transform
from geodiff4d.heads.rig import Head, PosedHead

SPACING_M = 0.011
"""Spacing of the grid that the hull is carved from [m]."""
WIDTH_M, DEPTH_M, DOWN_M = 0.34, 0.24, 0.16
"""Extent of the grid: to either side of the neck, to front and back, and below its end [m]."""
TOP = 0.4
"""The hull begins this share of the neck's height above its end: higher up it fills the hollow under the chin."""
CLEAR_M = 0.012
"""Points of the hull nearer to the head's mesh are left out [m]."""
SEEN = 0.15
"""Share of the views that must see a point: where fewer do, the hull would continue below the images."""
CAMERAS = 3
"""Cameras that must see a point: the hull of fewer reaches far beyond the person (see `continued`)."""
INSIDE = 0.97
"""Share of the views of a point that must show foreground there."""
SIZE = 0.6
"""A splat's standard deviation in units of the spacing."""
SLACK_M = 0.03
"""Added to the distance that these Gaussians may leave their faces [m]."""


def add_shoulders(
    local: LocalGaussians, tolerance: Float[Tensor, " faces"], frames: FitFrames, head: Head, surface: Surface,
    posed: PosedHead, picked: list[int], generator: torch.Generator,
) -> tuple[LocalGaussians, Float[Tensor, " faces"]]:  # fmt: skip
    """Add Gaussians on the visual hull below the neck; returns all Gaussians and each face's new tolerance [m].

    `posed` is the head, a row per timestep; `picked` are indices of the frames whose silhouettes are used. Heads
    without a region "neck" are returned as they are.
    """
    neck = head.regions.get("neck")
    if neck is None:
        return local, tolerance
    vertices = posed.vertices[0]
    low, high = (float(v) for v in vertices[neck][:, 1].aminmax())
    middle = vertices[neck].mean(0)
    spans = ((-WIDTH_M, WIDTH_M), (low - DOWN_M - middle[1], low + TOP * (high - low) - middle[1]), (-DEPTH_M, DEPTH_M))
    axes = [torch.arange(float(a), float(b), SPACING_M) for a, b in spans]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) + middle
    possible, known = (x.view(grid.shape[:3]) for x in _carved(grid.flatten(0, 2), frames, posed, picked))
    inside = continued(possible, known)
    # The hull's skin: whoever has a neighbour outside. Nothing is known beyond the grid.
    outside = torch.nn.functional.pad((~inside).float(), (1,) * 6)[None, None]
    skin = inside & (max_pool3d(outside, 3, 1)[0, 0] > 0)
    points, outward = grid[skin], _outward(inside)[skin]
    points = points + (torch.rand(points.shape, generator=generator) - 0.5) * SPACING_M
    clear = torch.from_numpy(KDTree(vertices.numpy()).query(points.numpy())[0]) > CLEAR_M
    if not clear.any():
        return local, tolerance
    neck_faces = neck[head.faces].all(-1)[surface.head_face]
    return _bound(points[clear], outward[clear], local, tolerance, surface, vertices, neck_faces)


def _outward(inside: Tensor) -> Float[Tensor, "x y z 3"]:
    """Return the direction out of a filled grid, from its density around each point."""
    density = avg_pool3d(inside.float()[None, None], 5, 1, 2)[0, 0]
    return -normalize(torch.stack(torch.gradient(density), -1), dim=-1)


def continued(possible: Bool[Tensor, "x y z"], known: Bool[Tensor, "x y z"]) -> Bool[Tensor, "x y z"]:
    """Return the filled cells of a grid [x, y up, z]: possible ones that are known, or lie below filled ones."""
    inside = possible & known
    for y in range(inside.shape[1] - 2, -1, -1):
        inside[:, y] |= possible[:, y] & ~known[:, y] & inside[:, y + 1]
    return inside


def _carved(points: Tensor, frames: FitFrames, posed: PosedHead, picked: list[int]) -> tuple[Tensor, Tensor]:
    """Return which points, moved with the root joint, no image shows as background; and which enough cameras see."""
    seen, hits = torch.zeros(len(points)), torch.zeros(len(points))
    home = invert(posed.T_world_joint[0, 0])
    eyes: dict[tuple[float, ...], Tensor] = {}
    for i in picked:
        target = frames.target(i)
        moved = transform(posed.T_world_joint[frames.row(i), 0] @ home, points)
        visible, shown = _lookup(target.mask[0], target.camera, moved)
        seen += visible
        hits += visible & (shown > 0.5)
        eye = tuple(round(x, 3) for x in target.camera.position.tolist())
        eyes[eye] = eyes.get(eye, torch.zeros_like(visible)) | visible
    cameras = torch.stack([*eyes.values()]).sum(0)
    return (seen > 0) & (hits >= INSIDE * seen), (seen >= SEEN * len(picked)) & (cameras >= CAMERAS)


def _lookup(mask: Float[Tensor, "height width"], camera: Camera, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return which points a camera's image shows, and the mask there."""
    xy, depth = camera.project(points)
    column, row = (xy[:, 0].floor().long(), xy[:, 1].floor().long())
    visible = (depth > 0) & (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
    value = mask[row.clamp(0, camera.height - 1), column.clamp(0, camera.width - 1)]
    return visible, value


def _bound(
    points: Tensor, outward: Tensor, local: LocalGaussians, tolerance: Tensor, surface: Surface, vertices: Tensor,
    allowed: Tensor,
) -> tuple[LocalGaussians, Tensor]:  # fmt: skip
    """Bind points to the nearest allowed face each, as flat splats of one size that face outward."""
    frames = face_frames(surface.on(vertices), surface.faces)
    candidates = allowed.nonzero()[:, 0]
    distance, nearest = KDTree(frames.centre[candidates].numpy()).query(points.numpy())
    face = candidates[torch.from_numpy(nearest)]
    k = frames.scale[face].clamp(min=1e-9)
    log_scales = (SIZE * SPACING_M / k).log()[:, None].repeat(1, 3)
    log_scales[:, NORMAL_AXIS] -= 1.0
    n = len(points)
    side = normalize(torch.linalg.cross(outward, outward.new_tensor([0.3, 0.2, 0.9]).expand(n, 3)), dim=-1)
    turn = torch.stack([side, outward, torch.linalg.cross(side, outward)], -1)
    added = {
        "face_index": face, "means": to_local(points, frames, face), "log_scales": log_scales,
        "quats": matrix_to_quat(frames.R[face].mT @ turn), "opacity_logits": torch.full((n,), math.log(0.8 / 0.2)),
        "color_logits": torch.zeros(n, 3),
    }  # fmt: skip
    whole = replace(local, **{name: torch.cat([getattr(local, name), value]) for name, value in added.items()})
    reach = torch.from_numpy(distance).to(tolerance) + SLACK_M
    return whole, tolerance.scatter_reduce(0, face, reach, "amax")
