"""The mesh that Gaussians are bound to: the head's own, or the head remeshed in texture space (Sec. 3.3, A.2).

The remesh lays a grid over the atlas. A grid point on a chart becomes a vertex; two triangles span a cell. CAP4D keeps
a triangle if its corners are covered, which bridges charts and the slits between lips and lids. Here a triangle needs
more: its corners lie on one face of the head, or on faces that reach each other in at most five steps over shared
edges.

Ours / theirs: points just outside a chart are pulled onto its border, since a plain raster loses half a cell all around
every chart; a cell is cut along the diagonal that keeps more of it; and where the grid is too coarse for the head,
which has more faces in a lid than the atlas has texels, five steps puncture it: there the head's own faces stay.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.topology import face_normals
from geodiff4d.heads.rig import Head
from geodiff4d.render.meshes import rasterize_uv

SLIVER = 0.02
"""Triangles below this share of the mean area are dropped; they arise where points coincide on a border."""
COVERED = 0.9
"""The head's faces of which the grid covers a smaller share are kept as they are."""
SAMPLES = 8
"""Sample points along a face's edge for measuring its coverage."""
REACH_TEXELS = 1.42
"""Distance beyond which grid points touch no cell of a chart: a cell's diagonal."""


@dataclass(frozen=True)
class RemeshConfig:
    """How the head is remeshed."""

    size: int = 128
    """Grid points along each side of the atlas."""
    max_hops: int = 5
    """Largest number of steps between the faces that one triangle spans (A.2)."""

    def __post_init__(self) -> None:
        if self.size < 8 or self.max_hops < 0:
            raise ValueError(f"a remesh needs size >= 8 and max_hops >= 0, got {self.size} and {self.max_hops}")


@dataclass(frozen=True)
class Surface:
    """Points on the head's faces, and triangles between them."""

    faces: Int[Tensor, "faces 3"]
    head_face: Int[Tensor, " faces"]
    """The head's face below each triangle (below its first corner, where it spans several)."""
    corners: Int[Tensor, "verts 3"]
    """The head's vertices around each point."""
    bary: Float[Tensor, "verts 3"]
    uv: Float[Tensor, "verts 2"]
    of_grid: Bool[Tensor, " faces"]
    """Triangles of the grid; the others are faces of the head's own."""
    covered: Float[Tensor, " head_faces"]
    """Share of each of the head's faces that the grid covers."""
    remeshed: bool = True
    """False for the head's own mesh, whose points are the head's vertices."""

    def on(self, values: Float[Tensor, "*batch head_verts channels"]) -> Float[Tensor, "*batch verts channels"]:
        """Return values at the surface's points, interpolated from the head's vertices; differentiable in them."""
        if not self.remeshed:
            return values
        a, b, c = (values.index_select(-2, self.corners[:, i]) * self.bary[:, i, None] for i in range(3))
        return a + b + c

    def check(self, head: Head) -> None:
        """Check a surface that was read from a file against itself and the head.

        Raises:
            ValueError: an index is out of range, or a tensor has the wrong shape or type.
        """
        verts, faces = len(self.corners), len(self.faces)
        ends = {"faces": verts, "head_face": len(head.faces), "corners": len(head.template)}
        shapes = {"faces": (faces, 3), "head_face": (faces,), "corners": (verts, 3), "bary": (verts, 3),
                  "uv": (verts, 2), "of_grid": (faces,), "covered": (len(head.faces),)}  # fmt: skip
        kinds = {"bary": torch.float32, "uv": torch.float32, "of_grid": torch.bool, "covered": torch.float32}
        for name, shape in shapes.items():
            value: Tensor = getattr(self, name)
            if value.shape != shape or value.dtype != kinds.get(name, torch.int64):
                raise ValueError(f"surface.{name} is {value.dtype} {list(value.shape)}, expected {list(shape)}")
            if name in ends and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < ends[name]:
                raise ValueError(f"surface.{name} points outside of the {ends[name]} that there are")

    def compact(self) -> "Surface":
        """Return the surface without the points that no triangle uses."""
        used, faces = self.faces.unique(return_inverse=True)
        return replace(self, faces=faces, corners=self.corners[used], bary=self.bary[used], uv=self.uv[used])

    def to(self, device: torch.device | str) -> "Surface":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def own_surface(head: Head) -> Surface:
    """Return the head's own mesh as a surface; a vertex on a seam takes one of its texture coordinates."""
    verts = len(head.template)
    uv = head.template.new_zeros(verts, 2)
    # The last to write wins on a CPU only: sort, so that the choice is the same everywhere.
    order = head.uv_faces.flatten().argsort(stable=True)
    uv[head.faces.flatten()[order]] = head.uv[head.uv_faces.flatten()[order]]
    index = torch.arange(verts, device=uv.device)[:, None].expand(-1, 3)
    bary = torch.tensor([1.0, 0.0, 0.0], device=uv.device).expand(verts, 3)
    faces = torch.arange(len(head.faces), device=uv.device)
    none = torch.zeros(len(faces), device=uv.device)
    return Surface(head.faces, faces, index, bary, uv, none > 0, none, remeshed=False)


def remesh(head: Head, config: RemeshConfig = RemeshConfig()) -> Surface:
    """Return the head remeshed over its atlas; every triangle passes the hop test, and none is a sliver.

    Example:
        >>> from geodiff4d.heads import load_head
        >>> len(remesh(load_head("openhead"), RemeshConfig(size=32)).faces) > 500
        True
    """
    head = head.to("cpu")
    face, bary = texels(head, config.size)
    reached = within_hops(head.faces, config.max_hops)
    grid = _grid(face, reached)
    covered = _covered(head, grid, face, reached)
    triangles = _wound_as(head, grid[grid[..., 0] >= 0], face.flatten(), bary.flatten(0, 1))
    used = triangles.unique()
    number = torch.full((config.size**2,), -1).index_copy(0, used, torch.arange(len(used)))
    on, weights = face.flatten()[used], bary.flatten(0, 1)[used]
    uv = (head.uv[head.uv_faces[on]] * weights[..., None]).sum(1)
    own, rest = own_surface(head), (covered < COVERED).nonzero()[:, 0]
    return Surface(
        faces=torch.cat([number[triangles], head.faces[rest] + len(used)]),
        head_face=torch.cat([on[number[triangles[:, 0]]], rest]),
        corners=torch.cat([head.faces[on], own.corners]),
        bary=torch.cat([weights, own.bary]),
        uv=torch.cat([uv, own.uv]),
        of_grid=torch.arange(len(triangles) + len(rest)) < len(triangles),
        covered=covered,
    ).compact()


def texels(head: Head, size: int) -> tuple[Int[Tensor, "size size"], Float[Tensor, "size size 3"]]:
    """Return the face under each texel (-1 off all charts) and barycentrics on it; charts grow by `REACH_TEXELS`."""
    seen = rasterize_uv(head.uv, head.uv_faces, size)
    face, bary = seen.face_index.clone(), seen.bary.clone()
    border = _border(head.uv_faces)
    a, b = (head.uv[head.uv_faces[border[:, 0], border[:, i]]] * size for i in (1, 2))
    outside = (face < 0).nonzero()
    points = outside.flip(-1) + 0.5
    distance, edge, along = _nearest_edge(points.float(), a, b)
    near = distance < REACH_TEXELS
    row, column, edge, along = outside[near, 0], outside[near, 1], border[edge[near]], along[near]
    on_border = torch.zeros(len(edge), 3)
    on_border = on_border.scatter(1, edge[:, 1:2], 1 - along[:, None]).scatter(1, edge[:, 2:3], along[:, None])
    face[row, column], bary[row, column] = edge[:, 0], on_border
    return face, bary


def within_hops(faces: Int[Tensor, "faces 3"], hops: int) -> csr_matrix:
    """Return the matrix of faces that reach each other in at most `hops` steps over shared edges, breadth first."""
    n = len(faces)
    keys, owner = _edge_keys(faces)
    order = np.argsort(keys, kind="stable")
    keys, owner = keys[order], owner[order]
    same = keys[1:] == keys[:-1]
    i, j = owner[:-1][same], owner[1:][same]
    step = coo_matrix((np.ones(len(i), np.int8), (i, j)), (n, n))
    step = ((step + step.T + coo_matrix((np.ones(n, np.int8), (range(n), range(n))), (n, n))) > 0).tocsr()
    reached = csr_matrix((np.ones(n, bool), (range(n), range(n))), (n, n))
    for _ in range(hops):
        reached = (reached @ step).astype(bool)
    return reached


def kept(head: Head, surface: Surface) -> Float[Tensor, " faces"]:
    """Return the share of each of the head's faces that the surface covers, by points spread over the face."""
    if not surface.remeshed:
        return torch.ones(len(head.faces))
    own = torch.zeros(len(head.faces), dtype=torch.bool)
    own[surface.head_face[~surface.of_grid]] = True
    return torch.where(own, 1.0, surface.covered)


def _edge_keys(faces: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each of the three edges of all faces, the same from both sides, and their faces."""
    ends = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(-1).values.numpy().astype(np.int64)
    return ends[:, 0] * (int(faces.max()) + 1) + ends[:, 1], np.tile(np.arange(len(faces)), 3)


def _border(uv_faces: Tensor) -> Int[Tensor, "borders 3"]:
    """Return the charts' border edges as (face, corner, next corner)."""
    keys, owner = _edge_keys(uv_faces)
    _, inverse, count = np.unique(keys, return_inverse=True, return_counts=True)
    alone = count[inverse] == 1
    corner = np.repeat(np.arange(3), len(uv_faces))[alone]
    return torch.from_numpy(np.stack([owner[alone], corner, (corner + 1) % 3], -1))


def _nearest_edge(points: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each point's distance to the nearest of the segments a-b, which one it is, and how far along."""
    best, index, along = [], [], []
    d = b - a
    length = d.square().sum(-1).clamp(min=1e-12)
    for chunk in points.split(1024):
        t = (((chunk[:, None] - a) * d).sum(-1) / length).clamp(0, 1)
        distance = (chunk[:, None] - a - t[..., None] * d).norm(dim=-1)
        near, i = distance.min(1)
        best.append(near)
        index.append(i)
        along.append(t.gather(1, i[:, None])[:, 0])
    return torch.cat(best), torch.cat(index), torch.cat(along)


def _grid(face: Tensor, reached: csr_matrix) -> Int[Tensor, "cells 2 3"]:
    """Cut each cell along the diagonal that keeps more triangles; texels of each, -1 where one fails the test.

    The first triangle of a cell is the one at its upper left or, cut the other way, at its upper right.
    """
    size = len(face)
    a = (torch.arange(size - 1)[:, None] * size + torch.arange(size - 1)).flatten()
    b, c, d = a + 1, a + size, a + size + 1
    ways = torch.stack([torch.stack([a, b, c, b, d, c], -1), torch.stack([a, b, d, a, d, c], -1)]).unflatten(-1, (2, 3))
    f = face.flatten()[ways].numpy()
    valid = np.all(f >= 0, axis=-1)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        valid[valid] = np.asarray(reached[f[valid][:, i], f[valid][:, j]]).ravel()
    good = torch.from_numpy(valid)
    second = good[1].sum(-1) > good[0].sum(-1)
    cut = torch.where(second[:, None, None], ways[1], ways[0])
    return torch.where(torch.where(second[:, None], good[1], good[0])[..., None], cut, -1)


def _covered(head: Head, grid: Tensor, face: Tensor, reached: csr_matrix) -> Float[Tensor, " faces"]:
    """Return the share of points on each of the head's faces that lie in a triangle of the grid, and on its sheet."""
    size = len(face)
    steps = torch.arange(1, 2 * SAMPLES, 2) / (2 * SAMPLES)
    u, v = torch.meshgrid(steps, steps, indexing="ij")
    inside = u + v < 1
    bary = torch.stack([u[inside], v[inside], 1 - u[inside] - v[inside]], -1)
    uv = torch.einsum("fcx,pc->fpx", head.uv[head.uv_faces], bary) * size - 0.5
    cell = uv.floor().clamp(0, size - 2).long()
    x, y = (uv - cell).unbind(-1)
    triangles = grid[cell[..., 1] * (size - 1) + cell[..., 0]]
    # Of the two triangles the second holds what is below the cut; which way it goes, the first one's corners tell.
    other_way = (triangles[..., 1, 0] == cell[..., 1] * size + cell[..., 0]) | (
        triangles[..., 0, 2] == (cell[..., 1] + 1) * size + cell[..., 0] + 1
    )
    below = torch.where(other_way, y > x, x + y > 1)
    corner = torch.where(below[..., None], triangles[..., 1, :], triangles[..., 0, :])
    there = corner[..., 0] >= 0
    mine = torch.arange(len(head.faces))[:, None].expand_as(there)[there].numpy().copy()
    theirs = face.flatten()[corner[there][:, 0]].numpy().copy()
    near = np.asarray(reached[mine, theirs]).ravel()
    found = torch.zeros(there.shape)
    found[there] = torch.from_numpy(near).float()
    return found.mean(-1)


def _wound_as(head: Head, triangles: Tensor, face: Tensor, bary: Tensor) -> Int[Tensor, "faces 3"]:
    """Turn triangles counter-clockwise as the head's faces are, whichever way their chart lies; drop slivers."""
    used = face >= 0
    points = torch.zeros(len(face), 3)
    points[used] = (head.template[head.faces[face[used]]] * bary[used][..., None]).sum(1)
    normals = face_normals(points, triangles)
    theirs = normalize(face_normals(head.template, head.faces), dim=-1)[face[triangles]].mean(1)
    triangles = torch.where(((normals * theirs).sum(-1) < 0)[:, None], triangles.flip(-1), triangles)
    area = normals.norm(dim=-1)
    return triangles[area > SLIVER * area.mean()]
