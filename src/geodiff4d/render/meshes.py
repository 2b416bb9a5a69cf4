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
from torch.nn.functional import normalize

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM, Camera
from geodiff4d.core.geometry import transform
from geodiff4d.core.images import encode_normals
from geodiff4d.heads.rig import Head, HeadParams, PosedHead

NEAR_M = 1e-3
"""Faces with a vertex nearer than this (or behind the camera) are dropped whole."""

SPAN_CHUNK = 4_000_000
"""Covered pixels expanded at once: bounds the memory to some hundred MB whatever the batch."""

_FACE_BITS = 32
_FACE_MAX = (1 << _FACE_BITS) - 1


@dataclass(frozen=True)
class Fragments:
    """What each pixel sees of a mesh."""

    face_index: Int[Tensor, "*batch height width"]
    """-1 where the background shows."""
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
    vertices: Float[Tensor, "*batch verts 3"], faces: Int[Tensor, "faces 3"], camera: Camera, cull_backfaces: bool = True
) -> Fragments:
    """Find the nearest face at every pixel centre.

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
        raise ValueError(f"cameras and meshes must share a batch, got {camera.batch} and {batch}: use camera.expand(*batch)")
    xy, inverse_z = _to_screen(vertices, camera)
    return _fragments(xy, inverse_z, faces, camera.height, camera.width, cull_backfaces)


def rasterize_uv(uv: Float[Tensor, "uvs 2"], uv_faces: Int[Tensor, "faces 3"], size: int) -> Fragments:
    """Rasterise the texture atlas itself: which face each texel of a size² texture lies on (depth is 1)."""
    return _fragments(uv * size, torch.ones_like(uv[:, 0]), uv_faces, size, size, cull_backfaces=False)


def interpolate(
    fragments: Fragments,
    faces: Int[Tensor, "faces 3"],
    attributes: Float[Tensor, "*batch_or_none verts channels"],
) -> Float[Tensor, "*batch channels height width"]:
    """Spread vertex attributes (one set for each mesh, or one for all) over the pixels, zero on the background.

    Differentiable in the attributes and, through the barycentrics, in the vertices.
    """
    *batch, height, width = fragments.face_index.shape
    channels = attributes.shape[-1]
    index = fragments.face_index.flatten()
    pixel = (index >= 0).nonzero()[:, 0]
    corners = faces[index[pixel]]
    if attributes.ndim > 2:
        corners = corners + (pixel // (height * width))[:, None] * attributes.shape[-2]
    weights = fragments.bary.reshape(-1, 3)[pixel].to(attributes.dtype)
    flat = attributes.reshape(-1, channels)
    values = sum(flat[corners[:, i]] * weights[:, i, None] for i in range(3))
    out = attributes.new_zeros(len(index), channels).index_copy(0, pixel, values)
    return out.view(*batch, height, width, channels).movedim(-1, -3).contiguous()


def render_normals(
    mesh: PosedHead, camera: Camera, fragments: Fragments | None = None
) -> tuple[Float[Tensor, "*batch 3 height width"], Float[Tensor, "*batch 1 height width"]]:
    """Render smooth unit normals in camera space (x right, y up, z toward the camera), zero outside; and the mask."""
    fragments = fragments or rasterize(mesh.vertices, mesh.faces, camera)
    R = IMAGE_NORMAL_FROM_CAM.to(mesh.vertices) @ camera.T_cam_world[..., :3, :3]
    normals = interpolate(fragments, mesh.faces, mesh.normals @ R.mT)
    return normalize(normals, dim=-3, eps=1e-9), fragments.mask[..., None, :, :].to(normals.dtype)


def pose_map(
    head: Head, params: HeadParams, camera: Camera
) -> tuple[Float[Tensor, "*batch 3 height width"], Float[Tensor, "*batch 1 height width"]]:
    """Render the pose map: the head's camera-space normals without any expression, as an image on grey (Sec. 3.2).

    Expression, jaw, eyes and eyelids are set to zero; rotation, neck and shape stay, so that the map tells where the
    head is and nothing of what the face does. Returns (image n/2 + 0.5, mask).
    """
    normals, mask = render_normals(head.pose(params.without_expression()), camera)
    return encode_normals(normals, mask), mask


def uv_map(
    fragments: Fragments, uv: Float[Tensor, "uvs 2"], uv_faces: Int[Tensor, "faces 3"]
) -> Float[Tensor, "*batch 2 height width"]:
    """Return each pixel's texture coordinates, zero on the background."""
    return interpolate(fragments, uv_faces, uv)


def _to_screen(
    vertices: Float[Tensor, "*batch verts 3"], camera: Camera
) -> tuple[Float[Tensor, "*batch verts 2"], Float[Tensor, "*batch verts"]]:
    """Project to (xy [px], 1/z); 1/z is zero for vertices that cannot be drawn, and their gradient is zero, not NaN."""
    points = transform(camera.T_cam_world, vertices)
    z = points[..., 2]
    drawable = (z > NEAR_M) & points.isfinite().all(-1)
    safe = torch.where(drawable, z, 1.0)
    points = torch.where(drawable[..., None], points, 0.0)
    xy = (points @ camera.K.mT)[..., :2] / safe[..., None]
    return xy, torch.where(drawable, 1 / safe, 0.0)


def _fragments(xy: Tensor, inverse_z: Tensor, faces: Tensor, height: int, width: int, cull_backfaces: bool) -> Fragments:
    batch = xy.shape[:-2]
    xy, inverse_z = xy.reshape(-1, *xy.shape[-2:]), inverse_z.reshape(-1, inverse_z.shape[-1])
    with torch.no_grad():
        index = _nearest_faces(xy.detach(), inverse_z.detach(), faces, height, width, cull_backfaces)
    pixel = (index >= 0).nonzero()[:, 0]
    bary, depth = _weights(xy, inverse_z, faces, index[pixel], pixel, height, width)
    return Fragments(
        index.view(*batch, height, width),
        xy.new_zeros(len(index), 3).index_copy(0, pixel, bary).view(*batch, height, width, 3),
        xy.new_full((len(index),), torch.inf).index_copy(0, pixel, depth).view(*batch, height, width),
    )


def _weights(
    xy: Tensor, inverse_z: Tensor, faces: Tensor, face: Tensor, pixel: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Perspective-correct barycentrics [n, 3] and depth [n] of the seen faces at their pixels."""
    image, place = pixel // (height * width), pixel % (height * width)
    corners = faces[face] + (image * xy.shape[1])[:, None]
    centre = torch.stack([place % width, place // width], -1) + 0.5
    # Relative to the pixel, so that small triangles far from the origin keep their digits.
    a, b, c = (xy.reshape(-1, 2)[corners[:, i]] - centre for i in range(3))
    w = inverse_z.reshape(-1)[corners]
    areas = torch.stack([_cross(b, c), _cross(c, a), _cross(a, b)], -1)
    weights = areas * w * areas.detach().sum(-1, keepdim=True).sign()
    # A centre on an edge may round to just outside; a sliver may round to nothing.
    weights = weights.clamp(min=0)
    total = weights.sum(-1, keepdim=True)
    bary = torch.where(total > 1e-12, weights / total.clamp(min=1e-12), 1 / 3)
    return bary, (bary / w).sum(-1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _nearest_faces(xy: Tensor, inverse_z: Tensor, faces: Tensor, height: int, width: int, cull: bool) -> Tensor:
    """Return the winning face of every pixel, [batch · height · width], -1 where none is."""
    n = len(xy)
    p, w = xy[:, faces], inverse_z[:, faces]
    area = _cross(p[..., 1, :] - p[..., 0, :], p[..., 2, :] - p[..., 0, :])
    # Counter-clockwise from outside turns clockwise where y points down.
    keep = (area < 0 if cull else area != 0) & (w > 0).all(-1)
    first = (p.amin(-2) - 0.5).ceil().clamp(min=0)
    last = (p.amax(-2) - 0.5).ceil().clamp(max=p.new_tensor([width, height]))
    keep &= (last > first).all(-1)
    image, face = keep.nonzero(as_tuple=True)
    top = first[image, face, 1].long()
    rows = last[image, face, 1].long() - top

    tri, j = _ragged(rows)
    y = top[tri] + j
    left, right, w_left, w_right = _cut(p[image, face], w[image, face], tri, y + 0.5)
    start = (left - 0.5).ceil().clamp(0, width)
    count = ((right - 0.5).ceil().clamp(0, width) - start).clamp(min=0).long()
    slope = (w_right - w_left) / (right - left).clamp(min=1e-6)
    spans = (
        (image[tri] * height + y) * width + start.long(),
        w_left + slope * (start + 0.5 - left),
        slope,
        _FACE_MAX - face[tri],
    )
    best = torch.zeros(n * height * width, dtype=torch.int64, device=xy.device)
    for part in _chunks(count):
        _compete(best, count[part], *(s[part] for s in spans))
    return torch.where(best > 0, _FACE_MAX - (best & _FACE_MAX), -1)


def _cut(p: Tensor, w: Tensor, tri: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut triangles [n, 3, 2] at heights y [rows]: (left x, right x, 1/z at both)."""
    left, right = torch.full_like(y, torch.inf), torch.full_like(y, -torch.inf)
    w_left, w_right = torch.zeros_like(y), torch.zeros_like(y)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        # The upper end comes first in both triangles of a shared edge: the crossing is the same to the last bit.
        swap = p[:, a, 1] > p[:, b, 1]
        x0, y0, w0 = (torch.where(swap, e1, e0) for e0, e1 in ((p[:, a, 0], p[:, b, 0]), (p[:, a, 1], p[:, b, 1]), (w[:, a], w[:, b])))
        x1, y1, w1 = (torch.where(swap, e0, e1) for e0, e1 in ((p[:, a, 0], p[:, b, 0]), (p[:, a, 1], p[:, b, 1]), (w[:, a], w[:, b])))
        run = torch.where(y1 > y0, y1 - y0, 1.0)
        table = torch.stack([x0, y0, y1, w0, (x1 - x0) / run, (w1 - w0) / run], -1)[tri]
        x0, y0, y1, w0, dx, dw = table.unbind(-1)
        dy = y - y0
        crosses = (dy >= 0) & (y < y1)
        x, wx = x0 + dy * dx, w0 + dy * dw
        is_left, is_right = crosses & (x < left), crosses & (x > right)
        left, w_left = torch.where(is_left, x, left), torch.where(is_left, wx, w_left)
        right, w_right = torch.where(is_right, x, right), torch.where(is_right, wx, w_right)
    return left, right, w_left, w_right


def _compete(best: Tensor, count: Tensor, place: Tensor, w: Tensor, slope: Tensor, face: Tensor) -> None:
    """Write the nearest of the spans' pixels into `best`: keys are 1/z (positive floats sort as integers), then face."""
    span, i = _ragged(count)
    inverse_z = w[span] + slope[span] * i
    key = (inverse_z.float().view(torch.int32).long() << _FACE_BITS) | face[span]
    best.scatter_reduce_(0, place[span] + i, key, "amax")


def _ragged(count: Tensor) -> tuple[Tensor, Tensor]:
    """Expand [3, 1] to owners [0, 0, 0, 1] and places in them [0, 1, 2, 0]."""
    owner = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    return owner, torch.arange(len(owner), device=count.device) - first[owner]


def _chunks(count: Tensor) -> list[slice]:
    """Split spans so that each part expands to about `SPAN_CHUNK` pixels."""
    total = count.cumsum(0)
    n = len(total)
    if n == 0 or int(total[-1]) <= SPAN_CHUNK:
        return [slice(0, n)]
    steps = torch.arange(SPAN_CHUNK, int(total[-1]), SPAN_CHUNK, device=count.device)
    ends = torch.searchsorted(total, steps).tolist()
    return [slice(a, b) for a, b in zip([0, *ends], [*ends, n], strict=True) if b > a]
