"""A batched z-buffer in plain torch: which triangle each pixel sees, and where on it.

Every triangle is cut into pixel rows, every row into the span between the two edges it crosses, and every pixel of a
span competes by depth for its place (one `scatter_reduce` over packed depth and face). Work follows the covered pixels:
neither large nor tiny triangles waste any, and no loop runs over triangles.

Tie rule: a pixel belongs to a triangle when its centre lies in [left, right) of the row and in [top, bottom) of the
triangle. Two triangles cut a shared edge by the same arithmetic, so it is covered exactly once and has no holes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM, Camera
from geodiff4d.core.geometry import transform
from geodiff4d.core.images import encode_normals
from geodiff4d.heads.rig import Head, HeadParams, PosedHead

NEAR_M = 1e-3
"""Faces with a vertex nearer than this (or behind the camera) are dropped whole."""

SPAN_CHUNK = 4_000_000
"""Covered pixels that are expanded at once, which bounds the memory to some hundred MB whatever the batch."""

_FACE_BITS = 32
_FACE_MAX = (1 << _FACE_BITS) - 1


@dataclass(frozen=True)
class Fragments:
    """The face, the place on it and the depth that each pixel of a rasterised mesh shows."""

    face_index: Int[Tensor, "*batch height width"]
    """Index of the face, -1 on the background."""
    bary: Float[Tensor, "*batch height width 3"]
    """Perspective-correct weights of the face's corners; differentiable in the vertices, zero on the background."""
    depth: Float[Tensor, "*batch height width"]
    """Camera z [m], infinite on the background."""

    @property
    def mask(self) -> Bool[Tensor, "*batch height width"]:
        return self.face_index >= 0

    def __getitem__(self, index: "int | slice | Int[Tensor, ' n']") -> "Fragments":
        return Fragments(self.face_index[index], self.bary[index], self.depth[index])


def rasterize(
    vertices: Float[Tensor, "*batch verts 3"],
    faces: Int[Tensor, "faces 3"],
    camera: Camera,
    cull_backfaces: bool = True,
) -> Fragments:
    """Return the nearest face at every pixel centre.

    Barycentrics and depth are differentiable in vertices and camera where a face is seen; silhouettes have no gradient.

    Raises:
        ValueError: the camera's batch is not the vertices' batch.

    Example:
        >>> fragments = rasterize(mesh.vertices, mesh.faces, camera)
        >>> fragments.mask.shape[-2:] == (camera.height, camera.width)
        True
    """
    batch = tuple(vertices.shape[:-2])
    if camera.batch != batch:
        raise ValueError(
            f"cameras and meshes must share a batch, got {camera.batch} and {batch}: use camera.expand(*batch)"
        )
    return _fragments(_to_screen(vertices, camera), faces, camera.height, camera.width, cull_backfaces)


def rasterize_uv(uv: Float[Tensor, "uvs 2"], uv_faces: Int[Tensor, "faces 3"], size: int) -> Fragments:
    """Rasterise the texture atlas: returns the face that each texel of a size² texture lies on (depth is 1)."""
    screen = torch.cat([uv.T * size, torch.ones_like(uv.T[:1])])
    return _fragments(screen, uv_faces, size, size, cull_backfaces=False)


def interpolate(
    fragments: Fragments,
    faces: Int[Tensor, "faces 3"],
    attributes: Float[Tensor, "*batch_or_none verts channels"],
) -> Float[Tensor, "*batch channels height width"]:
    """Return vertex attributes (one set per mesh, or one for all) interpolated at the pixels, zero on the background.

    Differentiable in the attributes and, through the barycentrics, in the vertices.
    """
    *batch, height, width = fragments.face_index.shape
    channels = attributes.shape[-1]
    index = fragments.face_index.flatten()
    pixel = (index >= 0).nonzero()[:, 0]
    corners = faces.index_select(0, index.index_select(0, pixel)).T
    if attributes.ndim > 2:
        corners = corners + (pixel // (height * width)) * attributes.shape[-2]
    weights = fragments.bary.movedim(-1, 0).reshape(3, -1).index_select(1, pixel).to(attributes.dtype)
    flat = attributes.reshape(-1, channels).T.contiguous()
    a, b, c = (flat.index_select(1, corners[i]) * weights[i] for i in range(3))
    out = attributes.new_zeros(channels, len(index)).index_copy(1, pixel, a + b + c)
    return out.view(channels, *batch, height, width).movedim(0, -3).contiguous()


def render_normals(
    mesh: PosedHead, camera: Camera, fragments: Fragments | None = None
) -> tuple[Float[Tensor, "*batch 3 height width"], Float[Tensor, "*batch 1 height width"]]:
    """Return smooth unit normals in camera space (x right, y up, z toward the camera), zero outside; and the mask."""
    fragments = fragments or rasterize(mesh.vertices, mesh.faces, camera)
    R = IMAGE_NORMAL_FROM_CAM.to(mesh.vertices) @ camera.T_cam_world[..., :3, :3]
    normals = interpolate(fragments, mesh.faces, mesh.normals @ R.mT)
    # torch's normalize is forty times slower over a leading axis.
    normals = normals * (normals.square().sum(-3, keepdim=True) + 1e-20).rsqrt()
    return normals, fragments.mask[..., None, :, :].to(normals.dtype)


def pose_map(
    head: Head, params: HeadParams, camera: Camera
) -> tuple[Float[Tensor, "*batch 3 height width"], Float[Tensor, "*batch 1 height width"]]:
    """Render the pose map: the head's camera-space normals without any expression, as an image on grey (Sec. 3.2).

    Expression, jaw, eyes and eyelids are set to zero; rotation, neck and shape stay, so that the map has the head's
    pose and none of its expression. Returns (image n/2 + 0.5, mask).
    """
    normals, mask = render_normals(head.pose(params.without_expression()), camera)
    return encode_normals(normals, mask), mask


def _to_screen(vertices: Float[Tensor, "*batch verts 3"], camera: Camera) -> Float[Tensor, "3 *batch verts"]:
    """Project to x, y [px] and 1/z; 1/z is zero for vertices that cannot be drawn, whose gradient is zero, not NaN."""
    points = transform(camera.T_cam_world, vertices)
    drawable = (points[..., 2] > NEAR_M) & points.isfinite().all(-1)
    points = torch.where(drawable[..., None], points, points.new_tensor([0.0, 0.0, 1.0]))
    inverse_z = 1 / points[..., 2]
    x, y, _ = (points @ camera.K.mT).unbind(-1)
    return torch.stack([x * inverse_z, y * inverse_z, inverse_z * drawable])


def _fragments(screen: Tensor, faces: Tensor, height: int, width: int, cull_backfaces: bool) -> Fragments:
    batch, verts = screen.shape[1:-1], screen.shape[-1]
    screen = screen.reshape(3, -1)
    with torch.no_grad():
        index = _nearest_faces(screen.detach(), verts, faces, height, width, cull_backfaces)
    pixel = (index >= 0).nonzero()[:, 0]
    image = pixel // (height * width)
    place = pixel - image * (height * width)
    row = place // width
    corners = faces.index_select(0, index.index_select(0, pixel)).T + image * verts
    bary, depth = _weights(screen, corners, (place - row * width) + 0.5, row + 0.5)
    # Channels first in memory, as everything that reads them wants it.
    spread = screen.new_zeros(3, len(index)).index_copy(1, pixel, bary)
    return Fragments(
        index.view(*batch, height, width),
        spread.view(3, *batch, height, width).movedim(0, -1),
        screen.new_full((len(index),), torch.inf).index_copy(0, pixel, depth).view(*batch, height, width),
    )


def _weights(screen: Tensor, corners: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Perspective-correct barycentrics [3, n] and depth [n] of triangles (corners [3, n]) at pixel centres."""
    a, b, c = (screen.index_select(1, corners[i]) for i in range(3))
    # Relative to the pixel, so that small triangles far from the origin keep their digits.
    (ax, bx, cx), (ay, by, cy) = ([p[0] - x for p in (a, b, c)], [p[1] - y for p in (a, b, c)])
    areas = (bx * cy - cx * by, cx * ay - ax * cy, ax * by - bx * ay)
    sign = (areas[0] + areas[1] + areas[2]).detach().sign()
    # A centre on an edge may round to just outside; a sliver may round to nothing.
    u, v, w = ((area * sign).clamp(min=0) * p[2] for area, p in zip(areas, (a, b, c), strict=True))
    total = u + v + w
    lost = total.detach() < 1e-12
    scale = 1 / torch.where(lost, 1.0, total)
    bary = torch.where(lost, 1 / 3, torch.stack([u * scale, v * scale, w * scale]))
    return bary, bary[0] / a[2] + bary[1] / b[2] + bary[2] / c[2]


def _nearest_faces(screen: Tensor, verts: int, faces: Tensor, height: int, width: int, cull: bool) -> Tensor:
    """Return the winning face of every pixel, [batch · height · width], -1 where none is."""
    images = screen.shape[1] // verts
    corners = (faces.T[:, None] + torch.arange(images, device=faces.device)[:, None] * verts).flatten()
    p = screen.index_select(1, corners).view(3, 3, -1)
    kept, area = _visible(p, height, width, cull)
    p, area = p.view(9, -1).index_select(1, kept).view(3, 3, -1), area.index_select(0, kept)
    image = kept // len(faces)
    code = _FACE_MAX - (kept - image * len(faces))
    count, place, w, slope, half = _spans(p, area, height, width)
    tri = half % len(kept)
    spans = torch.stack([place + image.index_select(0, tri) * (height * width), code.index_select(0, tri)])
    best = torch.zeros(images * height * width, dtype=torch.int64, device=screen.device)
    for part in _chunks(count):
        _compete(best, count[part], spans[:, part], torch.stack([w[part], slope[part]]))
    return torch.where(best > 0, _FACE_MAX - (best & _FACE_MAX), -1)


def _visible(p: Tensor, height: int, width: int, cull: bool) -> tuple[Tensor, Tensor]:
    """Of triangles [(x, y, 1/z), corner, n] return which may cover a pixel, and twice the signed area of all."""
    (ax, bx, cx), (ay, by, cy), (aw, bw, cw) = (q.unbind(0) for q in p)
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    # Counter-clockwise from outside turns clockwise where y points down.
    keep = (area < 0) if cull else (area != 0)
    keep &= aw * bw * cw > 0
    for a, b, c, size in ((ax, bx, cx, width), (ay, by, cy, height)):
        first = (torch.minimum(torch.minimum(a, b), c) - 0.5).ceil_().clamp_(min=0)
        last = (torch.maximum(torch.maximum(a, b), c) - 0.5).ceil_().clamp_(max=size)
        keep &= last > first
    return keep.nonzero()[:, 0], area


def _spans(p: Tensor, area: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cut triangles into row spans: (pixels, first pixel in its image, 1/z there, its slope along x, half-triangle).

    Half-triangle h of n triangles belongs to triangle h mod n: first the n upper halves (down to the middle corner),
    then the n lower ones. Each half lies between the long edge and one short edge, and every edge is evaluated from
    its upper end: both triangles of a shared edge find the same crossing to the last bit.
    """
    ax, ay, bx, by, cx, cy = _sorted_by_y(p)
    top = torch.cat([ay, by])
    rows_from = (top - 0.5).ceil_().clamp_(0, height)
    rows = ((torch.cat([by, cy]) - 0.5).ceil_().clamp_(0, height) - rows_from).clamp_(min=0).long()
    long = (cx - ax) / (cy - ay)
    short = torch.cat([(bx - ax) / (by - ay), (cx - bx) / (cy - by)])
    # The plane of 1/z over the image; bounded below, since slivers have no plane to speak of.
    x, y, w = p.unbind(0)
    dwdx = ((w[1] - w[0]) * (y[2] - y[0]) - (w[2] - w[0]) * (y[1] - y[0])) / area
    dwdy = ((w[2] - w[0]) * (x[1] - x[0]) - (w[1] - w[0]) * (x[2] - x[0])) / area
    low, high = torch.minimum(torch.minimum(w[0], w[1]), w[2]), torch.maximum(torch.maximum(w[0], w[1]), w[2])

    half, j = _ragged(rows)
    edges = torch.stack([rows_from, ax.repeat(2), ay.repeat(2), long.repeat(2), torch.cat([ax, bx]), top, short])
    first, lx, ly, dl, sx, sy, ds = edges.index_select(1, half).unbind(0)
    row = first + j
    centre = row + 0.5
    one, other = lx + (centre - ly) * dl, sx + (centre - sy) * ds
    start = (torch.minimum(one, other) - 0.5).ceil_().clamp_(0, width)
    stop = (torch.maximum(one, other) - 0.5).ceil_().clamp_(0, width)

    some = (stop > start).nonzero()[:, 0]
    half, row, start, stop = (q.index_select(0, some) for q in (half, row, start, stop))
    plane = torch.stack([x[0], y[0], w[0], dwdx, dwdy, low, high]).index_select(1, half % len(area))
    x0, y0, w0, dx, dy, low, high = plane.unbind(0)
    w_start = torch.clamp(w0 + dy * (row + 0.5 - y0) + dx * (start + 0.5 - x0), low, high)
    count = stop - start
    w_stop = torch.clamp(w_start + dx * (count - 1), low, high)
    slope = (w_stop - w_start) / (count - 1).clamp(min=1)
    return count.long(), (row * width + start).long(), w_start, slope, half


def _sorted_by_y(p: Tensor) -> tuple[Tensor, ...]:
    """Return the corners' x and y from top to bottom: (ax, ay, bx, by, cx, cy)."""
    (x0, x1, x2), (y0, y1, y2) = p[0].unbind(0), p[1].unbind(0)
    swap = y0 > y1
    x0, x1 = torch.where(swap, x1, x0), torch.where(swap, x0, x1)
    y0, y1 = torch.minimum(y0, y1), torch.maximum(y0, y1)
    swap = y1 > y2
    x1, x2 = torch.where(swap, x2, x1), torch.where(swap, x1, x2)
    y1, y2 = torch.minimum(y1, y2), torch.maximum(y1, y2)
    swap = y0 > y1
    x0, x1 = torch.where(swap, x1, x0), torch.where(swap, x0, x1)
    return x0, torch.minimum(y0, y1), x1, torch.maximum(y0, y1), x2, y2


def _compete(best: Tensor, count: Tensor, spans: Tensor, depths: Tensor) -> None:
    """Write the nearest of the spans' pixels into `best`: keys are 1/z (positive floats sort like integers), face."""
    span, i = _ragged(count)
    place, face = spans.index_select(1, span).unbind(0)
    w, slope = depths.index_select(1, span).unbind(0)
    key = (w + slope * i).float().view(torch.int32).long().bitwise_left_shift_(_FACE_BITS).bitwise_or_(face)
    best.scatter_reduce_(0, place + i, key, "amax")


def _ragged(count: Tensor) -> tuple[Tensor, Tensor]:
    """Expand [3, 1] to owners [0, 0, 0, 1] and places in them [0, 1, 2, 0]."""
    ends = count.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    owner = torch.repeat_interleave(count, output_size=total)
    return owner, torch.arange(total, device=count.device) - (ends - count).index_select(0, owner)


def _chunks(count: Tensor) -> list[slice]:
    """Split spans so that each part expands to about `SPAN_CHUNK` pixels."""
    total = count.cumsum(0)
    n = len(total)
    if n == 0 or int(total[-1]) <= SPAN_CHUNK:
        return [slice(0, n)]
    steps = torch.arange(SPAN_CHUNK, int(total[-1]), SPAN_CHUNK, device=count.device)
    ends = torch.searchsorted(total, steps).tolist()
    return [slice(a, b) for a, b in zip([0, *ends], [*ends, n], strict=True) if b > a]
