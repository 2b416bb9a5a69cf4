"""A relief: what a portrait shows beside the head's mesh (hair, shoulders), as a sheet that is drawn in other views.

The mesh has no hair. The sheet continues it: a grid over the portrait takes the mesh's depth where there is a mesh and,
outside, that of the nearest outline and some more, because hair covers the back of the head, not its outline; below the
chin it lies on a torso (`render/torso.py`). Every point follows the joints that the nearest outline follows. Seen from
the portrait's own view it reproduces the portrait; turned away from it, it foreshortens as a cardboard would, and what
lies behind it stays unknown. Beyond the paper; measured in docs/LOG.md.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample, max_pool2d
from torch.nn.functional import interpolate as resize

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import transform
from geodiff4d.core.images import composite
from geodiff4d.heads.rig import Head, HeadParams, PosedHead
from geodiff4d.render.meshes import Fragments, interpolate, rasterize, render_normals
from geodiff4d.render.push_pull import push_pull
from geodiff4d.render.torso import on_torso, torso
from geodiff4d.render.warp import CompletedHead, complete, sample_completed

CELL_PX = 4
"""Pixels of the portrait per cell of the sheet, up to a width of 256; a wider portrait has no more cells than that."""
MOST_CELLS = 64
BEHIND_M = 0.06
"""How far behind the nearest outline hair lies [m] (`tools/relief_probe.py` compares it with rendered people)."""
RAMP_CELLS = 3
"""Cells from the outline on over which it recedes so far: ears and collars stay with the head."""
OUTLINE_CELLS = 2
"""Width of the rim inside the mesh's outline whose depth the surroundings continue [cells]."""
SEEN = 0.3
"""How well a portrait must show a point of another view to be kept there (`seen_from`)."""


def cells(side: int) -> int:
    """Return the number of cells along a side of a portrait [px]."""
    return min(side // CELL_PX, MOST_CELLS)


@dataclass(frozen=True)
class Relief:
    """A sheet of `rows × columns` points over a portrait, at rest."""

    points: Float[Tensor, "*batch 2 points 3"]
    """Positions in the head's rest pose [m], first if the point follows the root, then if it follows the neck."""
    follows: Float[Tensor, "*batch points"]
    """Weight of the neck and its descendants, 0 to 1, the root having the rest; −1 where the portrait shows nothing."""

    def pose(self, T_world_joint: Float[Tensor, "*batch joints 4 4"]) -> Float[Tensor, "*batch points 3"]:
        """Return the sheet's points [m] moved with a head of the same shape; points that show nothing are NaN."""
        root, neck = (transform(T_world_joint[..., k, :, :], self.points[..., k, :, :]) for k in (0, 1))
        share = torch.where(self.follows < 0, torch.nan, self.follows)[..., None]
        return root + share * (neck - root)


def lift(head: Head, mesh: PosedHead, camera: Camera, mask: Float[Tensor, "1 height width"]) -> Relief:
    """Return the relief of one portrait's foreground.

    Args:
        mesh: the tracked head, without a batch axis.
        mask: the portrait's foreground.
    """
    rows, columns = (cells(n) for n in mask.shape[-2:])
    small = camera.resized(columns, rows)
    fragments = rasterize(mesh.vertices, mesh.faces, small)
    inside = fragments.mask[None].float()
    hangs = interpolate(fragments, mesh.faces, head.skin_weights[:, 1:].sum(1, keepdim=True))
    known = torch.cat([torch.where(inside > 0, fragments.depth, 0.0), hangs]) * inside
    # The outline lies halfway through the head; the face before it would pull its surroundings to the front.
    side = 2 * OUTLINE_CELLS + 1
    edge = inside * max_pool2d(1 - inside[None], side, 1, OUTLINE_CELLS)[0]
    filled = known + (1 - inside) * push_pull(known * edge, edge)
    depth, follows = filled[0].flatten(), filled[1].flatten().clamp(0, 1)
    away = torch.stack([1 - max_pool2d(inside[None], 2 * k + 1, 1, k)[0, 0] for k in range(1, RAMP_CELLS + 1)]).mean(0)
    beside = _below_the_chin(head, mesh, small, depth + BEHIND_M * away.flatten())
    depth = torch.where(inside.flatten() > 0, depth, beside)
    world = _unproject(_centres(rows, columns, mask.device), depth, small)
    rest = torch.stack([transform(mesh.T_world_joint[k].inverse(), world) for k in (0, 1)])
    # One cell more than the foreground, so that its soft border is the mask's and not the grid's.
    shown = max_pool2d(resize(mask[None], (rows, columns), mode="area"), 3, 1, 1)[0].flatten() > 0.1
    return Relief(rest, torch.where(shown & bool(inside.any()), follows, -1.0))


def carry_relief(
    relief: Relief,
    image: Float[Tensor, "*batch 4 height width"],
    T_world_joint: Float[Tensor, "*batch joints 4 4"],
    camera: Camera,
    coarse: int = 2,
) -> tuple[Float[Tensor, "*batch 3 target_height target_width"], Float[Tensor, "*batch 1 target_height target_width"]]:
    """Draw the sheet in other views; returns (rgb, alpha), rgb not multiplied by alpha.

    Args:
        image: the portrait (RGB, 0 to 1) and its mask as the fourth channel.
        camera: the target views; the sheet is drawn at `1 / coarse` of their size and its coordinates resampled.
    """
    height, width = (cells(n) for n in image.shape[-2:])
    target = camera.resized(camera.width // coarse, camera.height // coarse)
    faces = _faces(height, width, image.device)
    fragments = rasterize(relief.pose(T_world_joint), faces, target, cull_backfaces=False)
    grid = _centres(height, width, image.device) / image.new_tensor([width, height]) * 2 - 1
    ones = torch.ones_like(grid[:, :1])
    maps = interpolate(fragments, faces, torch.cat([grid, ones], 1))
    batch = maps.shape[:-3]
    maps = resize(maps.flatten(0, -4) if batch else maps[None], (camera.height, camera.width), mode="bilinear")
    inside = maps[:, 2:].clamp(min=1e-3)
    flat = image.expand(*batch, *image.shape[-3:]).reshape(-1, *image.shape[-3:])
    look = grid_sample(flat, (maps[:, :2] / inside).movedim(1, -1), padding_mode="border", align_corners=False)
    alpha = look[:, 3:] * (maps[:, 2:] > 0.5)
    return look[:, :3].view(*batch, 3, *look.shape[-2:]), alpha.view(*batch, 1, *look.shape[-2:])


@dataclass(frozen=True)
class LiftedPortrait:
    """A portrait as a textured head, with the relief of what surrounds it."""

    head: CompletedHead
    image: Float[Tensor, "4 height width"]
    """The portrait on grey, then its foreground as ones and zeros."""
    relief: Relief | None = None

    def shown(
        self, fragments: Fragments, T_world_joint: Float[Tensor, "t joints 4 4"], cameras: Camera
    ) -> tuple[Float[Tensor, "t 3 height width"], Float[Tensor, "t 2 height width"]]:
        """Draw the portrait in other poses and views, on grey.

        Args:
            fragments: the posed head, rasterised; they may be coarser than the cameras.
            T_world_joint: the posed head's joints.

        Returns:
            (rgb; two masks: where the portrait itself shows the pixel, and where the head's mesh is).
        """
        colour, visible, inside = sample_completed(self.head, fragments, cameras.height, cameras.width)
        rgb = composite(colour, inside)
        if self.relief is not None:
            n = len(T_world_joint)
            sheet = Relief(self.relief.points.expand(n, -1, -1, -1), self.relief.follows.expand(n, -1))
            under, alpha = carry_relief(sheet, self.image.expand(n, -1, -1, -1), T_world_joint, cameras)
            alpha = alpha * (1 - inside)
            rgb, visible = rgb + alpha * (under - rgb), visible + alpha
        return rgb, torch.cat([visible, inside], 1)


def lift_portrait(
    head: Head, image: Float[Tensor, "3 height width"], mask: Float[Tensor, "1 height width"], mesh: PosedHead,
    camera: Camera, texels: int, surroundings: bool = True,
) -> LiftedPortrait:  # fmt: skip
    """Return a portrait (on grey) lifted with its tracked head; with `surroundings`, what is beside the mesh too."""
    texture = complete(head, image, mesh.vertices, camera, mask, texels)
    foreground = (mask > 0.5).to(image.dtype)
    relief = lift(head, mesh, camera, foreground) if surroundings else None
    return LiftedPortrait(texture, torch.cat([image, foreground]), relief)


@runtime_checkable
class Shows(Protocol):
    """One portrait, or several merged, that can be drawn in other poses and views (`LiftedPortrait.shown`)."""

    def shown(
        self, fragments: Fragments, T_world_joint: Float[Tensor, "t joints 4 4"], cameras: Camera
    ) -> tuple[Float[Tensor, "t 3 height width"], Float[Tensor, "t 2 height width"]]:
        """Draw it on grey; returns (rgb, visibility)."""
        ...


def render_lifted(
    portrait: Shows, mesh: PosedHead, cameras: Camera
) -> tuple[
    Float[Tensor, "t 3 height width"], Float[Tensor, "t 3 height width"], Float[Tensor, "t 1 height width"]
]:  # fmt: skip
    """Draw a lifted portrait in any pose, expression and view; returns (rgb on grey, camera-space normals, mask).

    Beside the mesh, normals continue those of its outline.
    """
    fragments = rasterize(mesh.vertices, mesh.faces, cameras)
    rgb, visibility = portrait.shown(fragments, mesh.T_world_joint, cameras)
    normals, inside = render_normals(mesh, cameras, fragments)
    mask = torch.maximum(inside, visibility[:, :1] * (1 - inside))
    around = torch.stack([push_pull(n * m, m) for n, m in zip(normals, inside, strict=True)])
    around = around * (around.square().sum(1, keepdim=True) + 1e-12).rsqrt()
    return rgb, torch.where(inside > 0, normals, around * (mask > 0)), mask


def render_still(
    portrait: Shows, head: Head, params: HeadParams, cameras: Camera,
    read: HeadParams | None = None, moved: Bool[Tensor, " t"] | None = None,
) -> tuple[Float[Tensor, "t 3 height width"], Float[Tensor, "t 2 height width"]]:  # fmt: skip
    """Draw a portrait on heads without expression, and where `moved`, with the one in `read`; (rgb, visibility)."""
    still = head.pose(params.without_expression())
    vertices = still.vertices
    if read is not None and moved is not None:
        vertices = torch.where(moved[:, None, None], head.pose(read).vertices, vertices)
    return portrait.shown(rasterize(vertices, still.faces, cameras), still.T_world_joint, cameras)


def seen_from(
    portrait: Shows, mesh: PosedHead, cameras: Camera
) -> tuple[Float[Tensor, "t 3 height width"], Float[Tensor, "t 1 height width"]]:
    """Draw of a portrait only what it shows itself of other views, on grey: (image, mask of ones and zeros)."""
    rgb, visibility = portrait.shown(rasterize(mesh.vertices, mesh.faces, cameras), mesh.T_world_joint, cameras)
    mask = (visibility[:, :1] > SEEN).to(rgb.dtype)
    return composite(rgb, mask), mask


def _below_the_chin(
    head: Head, mesh: PosedHead, camera: Camera, depth: Float[Tensor, " points"]
) -> Float[Tensor, " points"]:
    """Return the depths [m] with what lies below the chin on a torso (`render/torso.py`)."""
    T_world_cam = camera.T_cam_world.inverse()
    far = _unproject(_centres(camera.height, camera.width, depth.device), torch.ones_like(depth), camera)
    eye = T_world_cam[:3, 3]
    return on_torso(torso(head), mesh.T_world_joint[0].inverse(), eye, far - eye, depth)


def _centres(rows: int, columns: int, device: torch.device) -> Float[Tensor, "points 2"]:
    """Return x, y of the sheet's points in cells: their centres, but the outermost lie on the border."""
    axes = []
    for n in (rows, columns):
        x = torch.arange(n, device=device) + 0.5
        x[0], x[-1] = 0.0, float(n)
        axes.append(x)
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _faces(rows: int, columns: int, device: torch.device) -> Int[Tensor, "faces 3"]:
    """Return two triangles for every square of neighbouring points."""
    index = torch.arange(rows * columns, device=device).view(rows, columns)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    return torch.cat([torch.stack([a, c, b], -1).view(-1, 3), torch.stack([b, c, d], -1).view(-1, 3)])


def _unproject(
    xy: Float[Tensor, "points 2"], depth: Float[Tensor, " points"], camera: Camera
) -> Float[Tensor, "points 3"]:
    """Return the world points [m] at pixel positions and camera depths [m]."""
    rays = torch.cat([xy, torch.ones_like(xy[:, :1])], 1) @ camera.K.inverse().mT
    return transform(camera.T_cam_world.inverse(), rays * depth[:, None])
