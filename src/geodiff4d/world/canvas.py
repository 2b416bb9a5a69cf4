"""The texture atlas as a list of texels with what painting needs: where each lies on the template and what is near.

Everything here belongs to the head and not to a subject: it is computed once per process. Noise is three-dimensional,
in template space, so no pattern shows the atlas's seams.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from geodiff4d.core.topology import edges
from geodiff4d.render.meshes import rasterize_uv
from geodiff4d.render.viewpoints import openhead
from geodiff4d.world.atlas import STRIP_ROWS, TEXTURE_SIZE
from geodiff4d.world.bust import skirt
from geodiff4d.world.lattice import add_lattice_noise

LATTICE = 24
REGIONS = ("lips", "brows", "lids", "eyes", "scalp", "ears", "teeth", "gums", "tongue", "mouth", "neck")


@dataclass(frozen=True)
class Canvas:
    """Texels of the atlas that lie on the mesh."""

    position: Float[Tensor, "texels 3"]
    """On the template [m]."""
    normal: Float[Tensor, "texels 3"]
    regions: dict[str, Float[Tensor, " texels"]]
    """Soft region weights, 0 to 1."""
    fill: Int[Tensor, " pixels"]
    """For every pixel of the square atlas, then of the skirt's strip, the nearest texel.

    It fills the gutters, so that bilinear reads never bleed.
    """
    vertices: Float[Tensor, "verts 3"]
    """Template vertices: what varies slowly is evaluated there and spread."""
    corners: Int[Tensor, "texels 3"]
    bary: Float[Tensor, "texels 3"]
    points: dict[str, Float[Tensor, "points 3"]]
    """Landmark polylines on the template: brow_left, brow_right, lid_left, lid_right, lips, jaw, nose."""

    areas: dict[str, Int[Tensor, " some"]]
    """Texels that painting visits together: face, jaw, head, body, lips, inside, lid_… and brow_…"""

    def spread(self, values: Float[Tensor, "verts c"]) -> Float[Tensor, "texels c"]:
        """Interpolate vertex values at the texels."""
        a, b, c = (values.index_select(0, self.corners[:, i]) * self.bary[:, i : i + 1] for i in range(3))
        return a + b + c


@lru_cache
def canvas() -> Canvas:
    """Rasterise OpenHead's atlas once."""
    head = openhead()
    fragments = rasterize_uv(head.uv, head.uv_faces, TEXTURE_SIZE)
    face = fragments.face_index.flatten()
    covered = face >= 0
    corners, bary = head.faces[face[covered]], fragments.bary.reshape(-1, 3)[covered]

    def spread(values: Tensor) -> Tensor:
        return (values[corners] * bary[..., None]).sum(1)

    rank = torch.full_like(face, -1)
    rank[covered] = torch.arange(int(covered.sum()))
    square = covered.view(TEXTURE_SIZE, TEXTURE_SIZE).numpy()
    indices = distance_transform_edt(~square, return_distances=False, return_indices=True)
    rows, columns = np.asarray(indices)
    fill = rank.view(TEXTURE_SIZE, TEXTURE_SIZE)[torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]
    soft = smooth_regions()
    marks = head.landmarks68.on(head.template, head.faces)
    parts = {
        "brow_right": marks[17:22], "brow_left": marks[22:27].flip(0), "lid_right": marks[[36, 37, 38, 39, 40, 41, 36]],
        "lid_left": marks[[42, 43, 44, 45, 46, 47, 42]], "lips": marks[48:60], "jaw": marks[0:17], "nose": marks[27:36],
    }  # fmt: skip
    normals = torch.nn.functional.normalize(spread(head.pose(head.neutral(1)).normals[0]), dim=-1)
    # Brows run from the nose outward on both sides.
    parts["brow_right"], parts["brow_left"] = parts["brow_right"].flip(0), parts["brow_left"].flip(0)
    strip = _strip()
    position, normals = torch.cat([spread(head.template), strip]), torch.cat([normals, torch.zeros_like(strip)])
    regions = {k: torch.cat([spread(v[:, None])[:, 0], torch.zeros(len(strip))]) for k, v in soft.items()}
    fill = torch.cat([fill.flatten(), int(covered.sum()) + torch.arange(len(strip))])
    # The strip's vertices are its own texels.
    n = len(head.template)
    own = (n + torch.arange(len(strip)))[:, None].expand(-1, 3)
    corners, bary = torch.cat([corners, own]), torch.cat([bary, torch.full((len(strip), 3), 1 / 3)])
    vertices = torch.cat([head.template, strip])
    return Canvas(position, normals, regions, fill, vertices, corners, bary, parts, _areas(position, regions, parts))


def _areas(
    position: Float[Tensor, "texels 3"], regions: dict[str, Tensor], parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    y, z = position[:, 1], position[:, 2]
    masks = {
        "face": (z > 0.015) & (y > -0.11) & (y < 0.115) & (regions["eyes"] < 0.5),
        "jaw": (z > -0.03) & (y > -0.13) & (y < 0.04) & (regions["eyes"] < 0.5),
        "head": y > -0.1,
        "body": y < -0.07,
        "lips": regions["lips"] + regions["mouth"] > 0.01,
        "inside": regions["mouth"] + regions["teeth"] + regions["tongue"] > 0.01,
    }
    for name in ("lid_left", "lid_right", "brow_left", "brow_right"):
        centre = parts[name].mean(0)
        masks[name] = (position - centre).norm(dim=1) < (0.045 if name.startswith("brow") else 0.035)
    return {name: mask.nonzero()[:, 0] for name, mask in masks.items()}


def _strip() -> Float[Tensor, "texels 3"]:
    """Template positions of the skirt's strip, row by row from the rim outward."""
    rings = skirt(openhead().template)
    grid = torch.cat([rings, rings[:, :1]], 1).permute(2, 0, 1)[None]
    size = (STRIP_ROWS, TEXTURE_SIZE)
    return (
        torch.nn.functional.interpolate(grid, size, mode="bilinear", align_corners=True)[0]
        .permute(1, 2, 0)
        .reshape(-1, 3)
    )


@lru_cache
def smooth_regions(rounds: int = 1) -> dict[str, Float[Tensor, " verts"]]:
    """Return the head's region masks, eased over `rounds` rings of vertices; missing regions are zero."""
    head = openhead()
    pairs = edges(head.faces)
    out = {}
    for name in REGIONS:
        mask = head.regions.get(name, torch.zeros(len(head.template), dtype=torch.bool)).float()
        rigid = name in ("eyes", "teeth", "gums", "tongue")
        out[name] = mask if rigid else smooth_on_mesh(mask[:, None], pairs, rounds)[:, 0]
    return out


def smooth_on_mesh(
    values: Float[Tensor, "verts c"], pairs: Int[Tensor, "edges 2"], rounds: int
) -> Float[Tensor, "verts c"]:
    """Average each vertex with its neighbours, half and half, `rounds` times."""
    degree = torch.zeros(len(values)).index_add(0, pairs.flatten(), torch.ones(pairs.numel())).clamp(min=1)[:, None]
    for _ in range(rounds):
        total = (
            torch.zeros_like(values)
            .index_add(0, pairs[:, 0], values[pairs[:, 1]])
            .index_add(0, pairs[:, 1], values[pairs[:, 0]])
        )
        values = 0.5 * values + 0.5 * total / degree
    return values


def noise(
    points: Float[Tensor, "n 3"],
    rng: np.random.Generator,
    wavelength: float,
    channels: int = 1,
    octaves: int = 1,
    gain: float = 0.55,
) -> Float[Tensor, "n channels"]:
    """Sum octaves of lattice noise over 3-D points, about unit standard deviation; `wavelength` [m] is the coarsest."""
    out, power = np.zeros((len(points), channels), np.float32), 0.0
    for octave in range(octaves):
        # A random rotation per octave hides the lattice; it repeats after `LATTICE` cells.
        Q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        lattice = rng.standard_normal((LATTICE, LATTICE, LATTICE, channels), np.float32)
        matrix = (Q.T * (2**octave / wavelength)).astype(np.float32)
        offset = rng.uniform(0, LATTICE, 3).astype(np.float32)
        # Interpolation between lattice points leaves 0.63 of the standard deviation.
        ease = wavelength > 0.01  # small patterns do not show the creases
        scale = np.float32(gain**octave / 0.63)
        add_lattice_noise(points.contiguous().numpy(), matrix, offset, lattice, ease, scale, out)
        power += gain ** (2 * octave)
    return torch.from_numpy(out / np.float32(power**0.5) if octaves > 1 else out)


def fade(t: Tensor) -> Tensor:
    """Ease 0 to 1 with zero slope at both ends."""
    return t * t * (3 - 2 * t)


def smoothstep(low: float, high: float, x: Tensor) -> Tensor:
    """Ease from 0 at `low` to 1 at `high` (either order)."""
    return fade(((x - low) / (high - low)).clamp(0, 1))


def polyline(
    points: Float[Tensor, "n 3"], line: Float[Tensor, "m 3"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n 3"]]:
    """Return each point's distance [m] to a polyline, the nearest place on it (0 to 1), and the offset from there."""
    starts, ends = line[:-1], line[1:]
    along = ends - starts
    length = along.norm(dim=-1)
    t = (((points[:, None] - starts) * along).sum(-1) / length.square().clamp(min=1e-12)).clamp(0, 1)
    offset = points[:, None] - (starts + t[..., None] * along)
    distance, index = offset.norm(dim=-1).min(1)
    before = length.cumsum(0) - length
    place = (before[index] + t.gather(1, index[:, None])[:, 0] * length[index]) / length.sum()
    return distance, place, offset[torch.arange(len(points)), index]
