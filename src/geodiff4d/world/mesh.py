"""A subject's whole mesh: head and clothes, shoulders, beard, hair and glasses, posed together."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.heads.rig import EYE_JOINTS, SKULL_JOINT, Head, HeadParams
from geodiff4d.render.viewpoints import openhead
from geodiff4d.world import atlas
from geodiff4d.world.bust import RINGS, bust, skirt
from geodiff4d.world.deferred import STRAND, SURFACE, WET
from geodiff4d.world.draw import normals_of
from geodiff4d.world.openness import openness


@dataclass(frozen=True)
class Piece:
    """Something beside the head that moves rigidly with the skull; vertices in the head's rest pose."""

    vertices: Float[Tensor, "verts 3"]
    faces: Int[Tensor, "faces 3"]
    uv: Float[Tensor, "uvs 2"]
    """In the whole texture."""
    uv_faces: Int[Tensor, "faces 3"]
    tangents: Float[Tensor, "verts 3"]
    """Directions of its strands; zero where it has none."""
    kind: int
    shell: int = 0
    """Which shell of strands, cut out by opacity; 0 is whole."""


@dataclass(frozen=True)
class Fur:
    """Shells of strands over a part of the head, which move with its skin."""

    vertex: Int[Tensor, " verts"]
    """The head's vertex below each."""
    lift: Float[Tensor, " verts"]
    """Distance along the normal [m]."""
    fall: Float[Tensor, "verts 3"]
    """Displacement in the skull's frame [m]: gravity and combing."""
    faces: Int[Tensor, "faces 3"]
    uv: Float[Tensor, "uvs 2"]
    uv_faces: Int[Tensor, "faces 3"]
    tangents: Float[Tensor, "verts 3"]
    shell: Int[Tensor, " faces"]


@dataclass(frozen=True)
class SubjectMesh:
    """Vertices are the head's, the skirt's, the fur's and the rigid pieces', in this order."""

    faces: Int[Tensor, "faces 3"]
    uv: Float[Tensor, "uvs 2"]
    uv_faces: Int[Tensor, "faces 3"]
    kind: Int[Tensor, " faces"]
    shell: Int[Tensor, " faces"]
    cloth: Float[Tensor, " headverts"]
    """Thickness of the clothes [m]."""
    skirt_offset: Float[Tensor, "skirtverts 3"]
    """From the rim, at rest; it turns with the root."""
    skirt_rim: Int[Tensor, " skirtverts"]
    fur_vertex: Int[Tensor, " furverts"]
    fur_lift: Float[Tensor, " furverts"]
    fur_fall: Float[Tensor, "furverts 3"]
    rigid: Float[Tensor, "rigidverts 3"]
    tangents: Float[Tensor, "verts 3"]
    openness: Float[Tensor, "verts 2"]

    def to(self, device: torch.device) -> "SubjectMesh":
        return replace(self, **{x.name: getattr(self, x.name).to(device) for x in fields(self)})

    def posed(self, rig: Head, params: HeadParams) -> tuple[Float[Tensor, "b verts 3"], Float[Tensor, "b 3 3"]]:
        """Return all vertices in the world and the skull's rotation."""
        vertices, T = pose(rig, params)
        normals = normals_of(vertices, rig.faces)
        vertices = vertices + self.cloth[:, None] * normals
        R_root, R = T[..., 0, :3, :3], T[..., SKULL_JOINT, :3, :3]
        below = vertices[:, self.skirt_rim] + self.skirt_offset @ R_root.mT
        fur = vertices[:, self.fur_vertex] + self.fur_lift[:, None] * normals[:, self.fur_vertex]
        fur = fur + self.fur_fall @ R.mT
        rigid = self.rigid @ R.mT + T[..., SKULL_JOINT, None, :3, 3]
        return torch.cat([vertices, below, fur, rigid], -2), R


def pose(rig: Head, params: HeadParams) -> tuple[Float[Tensor, "*batch verts 3"], Float[Tensor, "*batch joints 4 4"]]:
    """Pose a subject's own rig: its identity, not `params.shape`."""
    posed = rig.pose(params.without_shape())
    return posed.vertices, posed.T_world_joint


@lru_cache
def _eyes() -> tuple[Int[Tensor, " eyefaces"], Float[Tensor, "corners 2"]]:
    """Faces of the eyeballs in the visible head, and texture coordinates for each of their corners."""
    head = openhead()
    faces = bust().faces
    mine = head.regions["eyes"][faces].all(1).nonzero()[:, 0]
    joints = head.joint_regressor @ head.template
    corners = faces[mine].flatten()
    points = head.template[corners]
    local = points - joints[torch.where(points[:, 0] > 0, EYE_JOINTS[0], EYE_JOINTS[1])]
    return mine, atlas.eye_uv(local, float(local.norm(dim=1).mean()))


def assemble(rest: Float[Tensor, "headverts 3"], cloth: Float[Tensor, " headverts"], fur: Fur | None,
    pieces: list[Piece], toward_light: Float[Tensor, "3"]) -> SubjectMesh:  # fmt: skip
    """Put a subject's mesh together in its rest pose and bake how open each vertex lies to sky and light."""
    head, below = openhead(), bust()
    n = len(rest)
    normals = normals_of(rest, head.faces)
    body = rest + cloth[:, None] * normals
    rings = skirt(body)
    skirt_offset = (rings[1:] - rings[:1]).reshape(-1, 3)
    # The skirt's first ring is the rim itself.
    index = torch.cat([below.loop, n + torch.arange(len(skirt_offset))])
    eye_faces, eye_uv = _eyes()
    uv_faces = below.uv_faces.clone()
    uv_faces[eye_faces] = len(head.uv) + torch.arange(len(eye_uv)).view(-1, 3)
    scale = torch.tensor([1.0, atlas.TEXTURE_SIZE / atlas.TEXTURE_HEIGHT])
    kind = torch.full((len(below.faces),), SURFACE)
    kind[eye_faces] = WET
    parts = [
        (below.faces, torch.cat([head.uv * scale, eye_uv]), uv_faces, kind, torch.zeros_like(kind)),
        (
            index[below.skirt_faces], atlas.place_uv(below.skirt_uv, atlas.TEXTURE_SIZE, atlas.STRIP_ROWS),
            below.skirt_uv_faces, *torch.full((2, len(below.skirt_faces)), SURFACE),
        ),
    ]  # fmt: skip
    at = n + len(skirt_offset)
    none = torch.zeros(0)
    lift, fall, fur_vertex, tangents = none, none.view(0, 3), none.long(), [torch.zeros(at, 3)]
    if fur is not None:
        lift, fall, fur_vertex = fur.lift, fur.fall, fur.vertex
        parts.append((fur.faces + at, fur.uv, fur.uv_faces, torch.full_like(fur.shell, STRAND), fur.shell))
        tangents.append(fur.tangents)
        at += len(lift)
    for piece in pieces:
        count = (len(piece.faces),)
        parts.append(
            (piece.faces + at, piece.uv, piece.uv_faces, torch.full(count, piece.kind), torch.full(count, piece.shell))
        )
        tangents.append(piece.tangents)
        at += len(piece.vertices)
    starts = np.cumsum([0, *(len(part[1]) for part in parts)])
    faces = torch.cat([part[0] for part in parts])
    rigid = torch.cat([none.view(0, 3), *(piece.vertices for piece in pieces)])
    below_rest = body[below.loop].repeat(RINGS, 1) + skirt_offset
    everything = torch.cat([body, below_rest, body[fur_vertex] + lift[:, None] * normals[fur_vertex] + fall, rigid])
    return SubjectMesh(
        faces=faces,
        uv=torch.cat([part[1] for part in parts]),
        uv_faces=torch.cat([part[2] + int(start) for part, start in zip(parts, starts[:-1], strict=True)]),
        kind=torch.cat([part[3] for part in parts]),
        shell=torch.cat([part[4] for part in parts]),
        cloth=cloth,
        skirt_offset=skirt_offset,
        skirt_rim=below.loop.repeat(RINGS),
        fur_vertex=fur_vertex,
        fur_lift=lift,
        fur_fall=fall,
        rigid=rigid,
        tangents=torch.cat(tangents),
        openness=_bake(everything, faces, toward_light, n, fur_vertex),
    )


def _bake(
    vertices: Float[Tensor, "verts 3"], faces: Int[Tensor, "faces 3"], toward: Float[Tensor, "3"], n: int,
    fur_vertex: Int[Tensor, " furverts"],
) -> Float[Tensor, "verts 2"]:  # fmt: skip
    """Bake openness; the skirt is as open as the rim it hangs from, fur as what is below it."""
    rim = bust().loop
    skirt_verts = len(rim) * RINGS
    start = n + skirt_verts + len(fur_vertex)
    # Shells of fur lie close: they would shade each other and the skin.
    solid = ((faces < n + skirt_verts) | (faces >= start)).all(1)
    out = openness(vertices, faces[solid], toward, n)
    return torch.cat([out[:n], out[rim].repeat(RINGS, 1), out[fur_vertex], out[start:]])
