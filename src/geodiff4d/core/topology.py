"""What follows from a mesh's faces: normals, neighbours, components."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize


def face_normals(
    vertices: Float[Tensor, "*batch verts 3"], faces: Int[Tensor, "faces 3"]
) -> Float[Tensor, "*batch faces 3"]:
    """Return face normals as long as twice the face's area; counter-clockwise faces point outward."""
    a, b, c = (vertices[..., faces[:, i], :] for i in range(3))
    return torch.linalg.cross(b - a, c - a)


def vertex_normals(
    vertices: Float[Tensor, "*batch verts 3"], faces: Int[Tensor, "faces 3"]
) -> Float[Tensor, "*batch verts 3"]:
    """Return unit vertex normals, the area-weighted mean of the faces around (zero where there are none)."""
    n = face_normals(vertices, faces)
    total = torch.zeros_like(vertices)
    for i in range(3):
        total = total.index_add(-2, faces[:, i], n)
    return normalize(total, dim=-1, eps=1e-12)


def edges(faces: Int[Tensor, "faces 3"]) -> Int[Tensor, "edges 2"]:
    """Return each undirected edge once, smaller vertex first."""
    pairs = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return pairs.sort(-1).values.unique(dim=0)
