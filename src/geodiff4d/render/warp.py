"""Mesh warp: a portrait's texture carried by the tracked head into another view (beyond the paper).

`carry` finds where each vertex lies in the portrait and whether it is seen there; `warp` then paints another view of
the same mesh with the portrait's own pixels. `complete` makes a full texture: hidden texels take the colour of the
other half of the face, then of a pyramid of their surroundings, so that the head can be drawn from any side.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample, max_pool2d, normalize, pad
from torch.nn.functional import interpolate as resize

from geodiff4d.core.camera import Camera
from geodiff4d.core.topology import vertex_normals
from geodiff4d.heads.rig import Head
from geodiff4d.render.hidden import LASHES, eyes_and_lids, met_lids, paint_hidden
from geodiff4d.render.meshes import Fragments, interpolate, rasterize, rasterize_uv
from geodiff4d.render.push_pull import push_pull

DEPTH_TOLERANCE_M = 0.004
"""A vertex this far behind the z-buffer still counts as seen (more where the surface is steep)."""

FACING = (0.12, 0.30)
"""Cosine between normal and view at which a vertex starts to count as seen, and where it counts fully."""

SEAM_LEVELS = 6
"""Pyramid levels over which the colour of mirrored texels is blended into that around them: about 2⁶ texels."""

STRETCHED = (0.3, 0.65)
"""Portrait pixels per target pixel, over the median's, at which the portrait's colours begin to count and count fully:
a lid that was folded away, two pixels high, does not say how it looks when it is closed."""


@dataclass(frozen=True)
class Carried:
    """Where a mesh's vertices lie in a reference image."""

    grid: Float[Tensor, "*batch verts 2"]
    """Image coordinates in [-1, 1] between the outer edges of the border pixels (`align_corners=False`)."""
    visibility: Float[Tensor, "*batch verts"]
    """1 seen, 0 hidden, outside the image or turned away; in between where the surface turns away."""


@dataclass(frozen=True)
class CompletedHead:
    """A portrait completed to a texture of the whole head."""

    head: Head
    image: Float[Tensor, "3 height width"]
    carried: Carried
    texture: Float[Tensor, "3 texels texels"]


def carry(
    vertices: Float[Tensor, "*batch verts 3"],
    faces: Int[Tensor, "faces 3"],
    camera: Camera,
    mask: Float[Tensor, "*batch 1 height width"] | None = None,
) -> Carried:
    """Return the places and visibilities of the reference's vertices in its image.

    A vertex is seen when it faces the camera (`FACING`), lies in the image and in its foreground
    `mask` if one is given, and is not behind the nearest of the four pixels around it by more than `DEPTH_TOLERANCE_M`,
    plus what the surface's slope adds over one pixel. Not differentiable in visibility.
    """
    xy, z = camera.project(vertices)
    size = xy.new_tensor([camera.width, camera.height])
    grid = xy / size * 2 - 1
    with torch.no_grad():
        to_camera = normalize(camera.position[..., None, :] - vertices, dim=-1)
        cosine = (vertex_normals(vertices, faces) * to_camera).sum(-1)
        facing = ((cosine - FACING[0]) / (FACING[1] - FACING[0])).clamp(0, 1)
        slope = (1 - cosine.square()).clamp(min=0).sqrt() / cosine.clamp(min=FACING[0])
        pixel_m = z / camera.K[..., 0, 0, None]
        nearest = _nearest_depth(rasterize(vertices, faces, camera).depth, xy)
        seen = (z > 0) & (grid.abs() < 1).all(-1) & (z - nearest < DEPTH_TOLERANCE_M + pixel_m * slope)
        visibility = facing * seen
        if mask is not None:
            visibility = visibility * (sample(mask, grid.unsqueeze(-2))[..., 0, :, 0] > 0.9)
    return Carried(grid.nan_to_num(), visibility.to(grid.dtype))


def warp(
    image: Float[Tensor, "*batch channels height width"],
    carried: Carried,
    fragments: Fragments,
    faces: Int[Tensor, "faces 3"],
) -> tuple[
    Float[Tensor, "*batch channels target_height target_width"], Float[Tensor, "*batch 1 target_height target_width"]
]:
    """Paint a target view with the reference's pixels; returns (warped, visibility), both 0 to 1.

    A pixel is visible only where all three corners of its face are; `warped` is zero where it is not.
    """
    grid, visibility = _spread(carried, fragments, faces)
    return sample(image, grid) * (visibility > 0), visibility


def _trusted(
    image: Float[Tensor, "*batch channels height width"], carried: Carried, fragments: Fragments,
    faces: Int[Tensor, "faces 3"],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Warp, and see less where a target pixel shows only a sliver of the portrait (`STRETCHED`)."""
    grid, visibility = _spread(carried, fragments, faces)
    surface = (fragments.face_index >= 0).to(visibility.dtype)[..., None, :, :]
    visibility = visibility * _unstretched(grid, visibility, surface)
    return sample(image, grid) * (visibility > 0), visibility


def _unstretched(
    grid: Float[Tensor, "*batch height width 2"], visibility: Float[Tensor, "*batch 1 height width"],
    surface: Float[Tensor, "*batch 1 height width"],
) -> Float[Tensor, "*batch 1 height width"]:  # fmt: skip
    """Return 1 where a pixel's share of the portrait is as large as its image's median, 0 where it is a sliver."""
    across = (grid[..., 1:-1, 2:, :] - grid[..., 1:-1, :-2, :]).unbind(-1)
    down = (grid[..., 2:, 1:-1, :] - grid[..., :-2, 1:-1, :]).unbind(-1)
    area = (across[0] * down[1] - across[1] * down[0]).abs()
    # Beside an outline differences are of two surfaces: there the portrait is believed.
    whole = -max_pool2d(-surface.reshape(-1, 1, *surface.shape[-2:]), 3, 1).reshape(area.shape)
    seen = (whole > 0) & (visibility[..., 0, 1:-1, 1:-1] > 0.9)
    flat = torch.where(seen, area, torch.nan).flatten(-2)
    usual = flat.nanmedian(-1).values.nan_to_num(0.0).clamp(min=1e-12)[..., None, None]
    trust = (area / usual - STRETCHED[0]) / (STRETCHED[1] - STRETCHED[0])
    return pad(torch.where(whole > 0, trust.clamp(0, 1), 1.0), (1, 1, 1, 1), value=1.0)[..., None, :, :]


def mirror_vertices(head: Head) -> Int[Tensor, " verts"]:
    """Return each vertex's counterpart on the other side: the one nearest to (-x, y, z) of the template."""
    return _mirror(head.name, head.template)


@lru_cache(maxsize=4)
def _mirror(name: str, template: Float[Tensor, "verts 3"]) -> Int[Tensor, " verts"]:
    # Tensors hash by identity: one search for each head that is loaded.
    mirrored = template * template.new_tensor([-1.0, 1.0, 1.0])
    return torch.cat([torch.cdist(part, template).argmin(-1) for part in mirrored.split(1024)])


def complete(
    head: Head,
    image: Float[Tensor, "3 height width"],
    vertices: Float[Tensor, "verts 3"],
    camera: Camera,
    mask: Float[Tensor, "1 height width"] | None = None,
    texels: int = 512,
) -> CompletedHead:
    """Return the texture of a whole head from a portrait and its tracked head.

    Seen texels keep the portrait; hidden ones take their mirror image's colour; those hidden on both sides take the
    mean of a push-pull pyramid of what is around them; mouth, eyes and lids have colours of their own there
    (`render/hidden.py`), for expressions far from the portrait's.

    Example:
        >>> portrait = complete(head, image, head.pose(params).vertices, camera)
        >>> rgb, visibility, _ = sample_completed(portrait, rasterize(posed.vertices, posed.faces, cameras), 512, 512)
    """
    carried = carry(vertices, head.faces, camera, mask)
    atlas = rasterize_uv(head.uv, head.uv_faces, texels)
    own, other = both_sides(head, image, carried, atlas)
    return CompletedHead(head, image, carried, completed_texture(head, own, other, atlas))


Texels = tuple[Float[Tensor, "3 texels texels"], Float[Tensor, "1 texels texels"]]
"""Colours of a texture, and how far they are known, 0 to 1."""


def both_sides(
    head: Head, image: Float[Tensor, "3 height width"], carried: Carried, atlas: Fragments
) -> tuple[Texels, Texels]:
    """Return what a portrait shows of every texel, and what it shows of the texel's mirror image."""
    twin = mirror_vertices(head)
    mirrored = Carried(carried.grid[twin], carried.visibility[twin])
    own, other = (_trusted(image, c, atlas, head.faces) for c in (carried, mirrored))
    return own, other


def completed_texture(head: Head, seen: Texels, mirrored: Texels, atlas: Fragments) -> Float[Tensor, "3 texels texels"]:
    """Complete a texture from what is seen of it and of its mirror image (`complete`)."""
    (own, own_weight), (other, other_weight) = seen, mirrored
    weight = own_weight + (1 - own_weight) * other_weight
    # What nobody saw continues the mean of both sides, so that the back of the head has no middle seam.
    mean = (own * own_weight + other * other_weight) / (own_weight + other_weight).clamp(min=1e-6)
    hidden = push_pull(mean * weight, weight)
    # Light differs between the sides: hide the seam by what the two disagree by where both are seen, fading out.
    both = own_weight * other_weight
    other = (other + push_pull((own - other) * both, both, SEAM_LEVELS)).clamp(0, 1)
    texture = own_weight * own + (weight - own_weight) * other + (1 - weight) * hidden
    return paint_hidden(head, texture, weight, own_weight, atlas).clamp(0, 1)


def sample_completed(
    portrait: CompletedHead, fragments: Fragments, height: int, width: int
) -> tuple[
    Float[Tensor, "*batch 3 height width"],
    Float[Tensor, "*batch 1 height width"],
    Float[Tensor, "*batch 1 height width"],
]:  # fmt: skip
    """Return the colours of fragments of the portrait's head, how much of each the portrait shows, and the head's mask.

    Of coarser fragments than the image that is asked for, coordinates are resampled and not colours.
    """
    head, v = portrait.head, portrait.carried.visibility[..., None]
    eyes = eyes_and_lids(head).to(v) if head.regions else v.new_zeros(v.shape[-2], 2)
    eyes = eyes.expand(*v.shape[:-1], 2)
    corners = torch.cat([portrait.carried.grid, v, (v > 0).to(v.dtype), torch.ones_like(v), eyes], -1)
    maps = torch.cat([
        interpolate(fragments, head.faces, corners), interpolate(fragments, head.uv_faces, head.uv * 2 - 1)
    ], -3)  # fmt: skip
    batch = maps.shape[:-3]
    maps = maps.reshape(-1, *maps.shape[-3:])
    if maps.shape[-2:] != (height, width):
        maps = resize(maps, (height, width), mode="bilinear", align_corners=False)
    own, seen, whole, share, eye, edge, uv = maps.split((2, 1, 1, 1, 1, 1, 2), 1)
    inside = (share > 0.5).to(maps.dtype)
    visibility = seen * (whole > 0.999 * share) * inside
    visibility = visibility * _unstretched((own / share.clamp(min=1e-3)).movedim(1, -1), visibility, inside)
    # Whatever the portrait shows of the lids' edges, it shows apart from each other.
    met = met_lids(edge, eye)
    visibility = visibility * (1 - met)

    def look(image: Float[Tensor, "3 rows columns"], grid: Float[Tensor, "n 2 height width"]) -> Tensor:
        return sample(image.expand(len(grid), -1, -1, -1), (grid / share.clamp(min=1e-3)).movedim(1, -1))

    texture = look(portrait.texture, uv) * (1 - (1 - LASHES) * met)
    rgb = texture + visibility * (look(portrait.image, own) - texture)
    return tuple(x.view(*batch, *x.shape[1:]) for x in (rgb, visibility, inside))  # pyright: ignore[reportReturnType]


def _spread(
    carried: Carried, fragments: Fragments, faces: Int[Tensor, "faces 3"]
) -> tuple[Float[Tensor, "*batch height width 2"], Float[Tensor, "*batch 1 height width"]]:
    v = carried.visibility[..., None]
    values = interpolate(fragments, faces, torch.cat([carried.grid, v, (v > 0).to(v.dtype)], -1))
    whole = values[..., 3:4, :, :] > 0.999
    return values[..., :2, :, :].movedim(-3, -1), values[..., 2:3, :, :] * whole


def sample(
    image: Float[Tensor, "*batch channels height width"], grid: Float[Tensor, "*batch rows columns 2"]
) -> Float[Tensor, "*batch channels rows columns"]:
    """Look images up at coordinates in [-1, 1], bilinearly; beyond the border its colours go on."""
    out = grid_sample(
        image.reshape(-1, *image.shape[-3:]),
        grid.reshape(-1, *grid.shape[-3:]),
        padding_mode="border",
        align_corners=False,
    )
    return out.view(*grid.shape[:-3], *out.shape[1:])


def _nearest_depth(
    depth: Float[Tensor, "*batch height width"], xy: Float[Tensor, "*batch verts 2"]
) -> Float[Tensor, "*batch verts"]:
    """Return the least depth of the four pixels around each point."""
    height, width = depth.shape[-2:]
    corner = (xy.nan_to_num() - 0.5).floor()
    values = []
    for dx in (0, 1):
        for dy in (0, 1):
            x = (corner[..., 0] + dx).clamp(0, width - 1).long()
            y = (corner[..., 1] + dy).clamp(0, height - 1).long()
            values.append(depth.flatten(-2).gather(-1, y * width + x))
    return torch.stack(values).amin(0)
