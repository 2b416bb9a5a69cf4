"""Shoulders: OpenHead ends in a cut bust, a person's clothes go on beyond the frame.

The cut's closing cap is left out, and the rim is extended outward and down as a skirt of rings that continues the
surface. Its texels are a strip below the atlas, so that whatever is painted by position continues over it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.topology import vertex_normals
from geodiff4d.render.viewpoints import openhead

RINGS = 6
STEP_M = 0.035


@dataclass(frozen=True)
class Bust:
    """Topology of the visible head and of the skirt on its rim."""

    faces: Int[Tensor, "facesleft 3"]
    """The head's faces without the cap."""
    uv_faces: Int[Tensor, "facesleft 3"]
    loop: Int[Tensor, " loop"]
    """Rim vertices in order."""
    skirt_faces: Int[Tensor, "skirtfaces 3"]
    """Into [rim loop, ring 1, …], flattened."""
    skirt_uv_faces: Int[Tensor, "skirtfaces 3"]
    skirt_uv: Float[Tensor, "skirtuvs 2"]
    """u along the loop, v from the rim outward, both 0 to 1."""


@lru_cache
def bust() -> Bust:
    """Find the rim once."""
    head = openhead()
    cap = head.regions.get("cap", torch.zeros(len(head.template), dtype=torch.bool))
    keep = ~cap[head.faces].all(1)
    faces = head.faces[keep]
    loop = _loop(faces.numpy(), head.template.numpy())
    n = len(loop)
    i, k = torch.meshgrid(torch.arange(n), torch.arange(RINGS), indexing="ij")
    i, k = i.flatten(), k.flatten()

    def quads(width: int, wrap: bool) -> Tensor:
        j = (i + 1) % width if wrap else i + 1
        a, b, c, d = k * width + i, k * width + j, (k + 1) * width + j, (k + 1) * width + i
        return torch.cat([torch.stack([a, c, b], 1), torch.stack([a, d, c], 1)])

    v, u = torch.meshgrid(torch.linspace(0, 1, RINGS + 1), torch.linspace(0, 1, n + 1), indexing="ij")
    return Bust(
        faces,
        head.uv_faces[keep],
        torch.from_numpy(loop),
        quads(n, True),
        quads(n + 1, False),
        torch.stack([u, v], -1).reshape(-1, 2),
    )


def _loop(faces: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Order the vertices of the largest open boundary below the chin, along its faces' direction."""
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    present = {(int(a), int(b)) for a, b in directed}
    following = {a: b for a, b in present if (b, a) not in present and template[a, 1] < -0.1}
    best: list[int] = []
    while following:
        start, chain = next(iter(following)), []
        at = start
        while at in following:
            chain.append(at)
            at = following.pop(at)
        best = max(best, chain, key=len)
    return np.array(best, dtype=np.int64)


def skirt(vertices: Float[Tensor, "verts 3"]) -> Float[Tensor, "rings loop 3"]:
    """Extend a rest mesh's rim: ring 0 is the rim itself."""
    b = bust()
    rim = vertices[b.loop]
    outward = rim - rim.mean(0) - torch.tensor([0.0, 0.03, 0.0])
    n = vertex_normals(vertices, b.faces)[b.loop]
    for _ in range(12):  # the rim's own normals are ragged
        n = 0.5 * n + 0.25 * (n.roll(1, 0) + n.roll(-1, 0))
    n = normalize(n, dim=-1)
    tangent = normalize(outward - (outward * n).sum(-1, keepdim=True) * n, dim=-1)
    down = torch.tensor([0.0, -1.0, 0.0]).expand_as(rim)
    rings = [rim]
    for k in range(RINGS):
        step = normalize(torch.lerp(tangent, down, min(1.0, 0.12 + 0.2 * k)), dim=-1)
        rings.append(rings[-1] + STEP_M * step)
    return torch.stack(rings)
