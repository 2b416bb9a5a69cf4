"""`SyntheticSubject`: one person of the open world, a pure function of (seed, split).

A subject is harder than the head that tracks it: its identity comes from a wider basis than OpenHead exposes, its
surface carries smooth offsets of its own, its actions have personal strengths, sides and shapes, and its hair and
clothes lie outside the head mesh (design: the world must be harder than its tracker).
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM, Camera
from geodiff4d.core.topology import vertex_normals
from geodiff4d.data.synthetic import appearance, hair, stage
from geodiff4d.data.synthetic.bust import RINGS, STRIP_ROWS, Bust, bust, skirt
from geodiff4d.data.synthetic.cameras import openhead
from geodiff4d.data.synthetic.canvas import TEXTURE_SIZE, smooth_on_mesh, smooth_regions
from geodiff4d.data.synthetic.identity import fit_shape, head_edges, personal_rig
from geodiff4d.data.synthetic.seeds import Split, generator
from geodiff4d.data.synthetic.shading import (
    Light,
    Surface,
    glint,
    sample_texture,
    shade,
    shade_hair,
    to_srgb,
    visibility,
)
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.meshes import rasterize

SKULL_JOINT = 1
"""The neck joint carries the whole head in FLAME's rig."""
RENDER_BATCH = 4


@dataclass(frozen=True)
class SyntheticFrames:
    """Rendered images and their exact normals."""

    rgb: Float[Tensor, "*batch 3 height width"]
    """sRGB in [0, 1], on the subject's background."""
    normal: Float[Tensor, "*batch 3 height width"]
    """Unit, camera space (x right, y up, z to the camera); zero on the background."""
    mask: Float[Tensor, "*batch 1 height width"]
    """Foreground coverage in [0, 1], antialiased."""


class SyntheticSubject:
    """One person: geometry, appearance, light and background, all fixed by (seed, split).

    Example:
        >>> subject = SyntheticSubject(0, "train")  # doctest: +SKIP
        >>> expr, jaw, eyes = random_expression(0, 4)  # doctest: +SKIP
        >>> params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)  # doctest: +SKIP
        >>> frames = subject.render(params, random_cameras(4, 0))  # doctest: +SKIP
    """

    def __init__(self, seed: int, split: Split = "train"):
        self.seed, self.split = seed, split
        self.key = ("subject", split, seed)
        rng = generator(*self.key, "traits")
        self.traits = appearance.draw_traits(rng)
        self.style = hair.draw_style(rng)
        self.light = stage.draw_light(generator(*self.key, "light"), self.traits.melanin)
        self.rig = personal_rig(self.key)
        self.tracked_shape: Float[Tensor, " shapes"] = fit_shape(self.rig.template)
        self.mesh = _Mesh.build(self)
        self._rigs: dict[torch.device, Head] = {self.rig.template.device: self.rig}
        self._looks: dict[torch.device, _Look] = {}
        self._backgrounds: dict[tuple[int, torch.device], Tensor] = {}

    @cached_property
    def texture(self) -> Float[Tensor, "texels 8"]:
        """The painted atlas, made when it is first needed."""
        return appearance.paint_subject(self.traits, self.style, self.key, generator)

    def _rig_on(self, device: torch.device) -> Head:
        if device not in self._rigs:
            self._rigs[device] = self.rig.to(device)
        return self._rigs[device]

    def _look(self, device: torch.device) -> "_Look":
        if device not in self._looks:
            mesh, texture, light = self.mesh.to(device), self.texture.to(device), self.light.to(device)
            self._looks[device] = _Look(self._rig_on(device), mesh, texture, light, self.traits)
        return self._looks[device]

    def params(
        self, expr: Float[Tensor, "*batch 52"], rotation: Float[Tensor, "*batch 3"] | None = None,
        neck_pose: Float[Tensor, "*batch 3"] | None = None, jaw_pose: Float[Tensor, "*batch 3"] | None = None,
        eyes_pose: Float[Tensor, "*batch 6"] | None = None, translation: Float[Tensor, "*batch 3"] | None = None,
    ) -> HeadParams:  # fmt: skip
        """Return OpenHead parameters of this subject, as a perfect tracker would report them."""
        zero = expr.new_zeros(*expr.shape[:-1], 6)

        def given(x: Tensor | None, n: int) -> Tensor:
            return zero[..., :n] if x is None else x

        shape = self.tracked_shape.to(expr).expand(*expr.shape[:-1], -1)
        return HeadParams(
            shape,
            expr,
            given(rotation, 3),
            given(neck_pose, 3),
            given(jaw_pose, 3),
            given(eyes_pose, 6),
            given(translation, 3),
        )

    def vertices(self, params: HeadParams) -> Float[Tensor, "*batch verts 3"]:
        """Pose the subject's own geometry (without hair): its identity and actions, not `params.shape`."""
        return _pose(self._rig_on(params.expr.device), params)[0]

    def background(self, size: int, device: torch.device | str = "cpu") -> Float[Tensor, "3 size size"]:
        """Return the subject's background, linear RGB; the same from every camera."""
        key = (size, torch.device(device))
        if key not in self._backgrounds:
            self._backgrounds[key] = stage.background(size, generator(*self.key, "background")).to(device)
        return self._backgrounds[key]

    def render(self, params: HeadParams, camera: Camera, supersample: int = 2) -> SyntheticFrames:
        """Render frames; params and camera share one batch (or both have none), square images.

        `supersample`² samples per pixel: 2 is clean, 1 is fast and has jagged edges.
        """
        batch = params.batch
        flat = params.map(lambda v: v.reshape(-1, *v.shape[len(batch) :]))
        cameras = replace(camera, T_cam_world=camera.T_cam_world.reshape(-1, 4, 4), K=camera.K.reshape(-1, 3, 3))
        parts = [
            self._render(flat[i : i + RENDER_BATCH], cameras[i : i + RENDER_BATCH], supersample)
            for i in range(0, flat.rotation.shape[0], RENDER_BATCH)
        ]
        rgb, normal, mask = (torch.cat(x) for x in zip(*parts, strict=True))
        return SyntheticFrames(*(x.reshape(*batch, *x.shape[1:]) for x in (rgb, normal, mask)))

    def _render(self, params: HeadParams, camera: Camera, supersample: int) -> tuple[Tensor, Tensor, Tensor]:
        size, device = camera.width, params.rotation.device
        look = self._look(device)
        mesh = look.mesh
        vertices, R_skull = mesh.posed(look.rig, params)
        fragments = rasterize(vertices, mesh.faces, camera.resized(size * supersample, size * supersample))
        # Normals and light are taken to the skull's frame, where the texture's bumps live.
        normals = vertex_normals(vertices, mesh.faces) @ R_skull
        eyes = camera.position - vertices.mean(1)
        pooled = torch.zeros(len(vertices), size * size, 7, device=device)
        for i in range(len(vertices)):
            view = View(normals[i], R_skull[i].T, normalize(R_skull[i].T @ eyes[i], dim=0))
            face = fragments.face_index[i].flatten()
            pixel = (face >= 0).nonzero()[:, 0]
            bary = fragments.bary[i].reshape(-1, 3).index_select(0, pixel)
            colour, n = mesh.shade(face.index_select(0, pixel), bary, view, look)
            to_camera = IMAGE_NORMAL_FROM_CAM.to(device) @ camera.T_cam_world[i, :3, :3] @ R_skull[i]
            values = torch.cat([colour, n @ to_camera.T, torch.ones_like(colour[:, :1])], 1)
            fine = size * supersample
            place = (pixel // fine // supersample) * size + pixel % fine // supersample
            pooled[i].index_add_(0, place, values)
        pooled = (pooled / supersample**2).mT.reshape(-1, 7, size, size)
        coverage = pooled[:, 6:]
        behind = (1 - coverage) * self.background(size, device)
        rgb = to_srgb(look.light.exposure * pooled[:, :3] + behind)
        length = pooled[:, 3:6].square().sum(1, keepdim=True).sqrt().clamp(min=1e-9)
        return rgb, pooled[:, 3:6] / length, coverage


@dataclass(frozen=True)
class View:
    """One image's normals and directions in the skull's frame."""

    normals: Float[Tensor, "allverts 3"]
    T_skull_world: Float[Tensor, "3 3"]
    to_eye: Float[Tensor, "3"]


@dataclass(frozen=True)
class _Look:
    """What a subject looks like, on one device."""

    rig: Head
    mesh: "_Mesh"
    texture: Float[Tensor, "texels 8"]
    light: Light
    traits: appearance.Traits


@dataclass(frozen=True)
class _Mesh:
    """Head and hair as one mesh, with what shading reads per vertex and face."""

    faces: Int[Tensor, "allfaces 3"]
    uv: Float[Tensor, "alluvs 2"]
    uv_faces: Int[Tensor, "allfaces 3"]
    hair_rest: Float[Tensor, "hairverts 3"]
    tangents: Float[Tensor, "hairverts 3"]
    cloth: Float[Tensor, " verts"]
    """Thickness of the clothes [m]."""
    openness: Float[Tensor, "allverts 2"]
    face_kind: Int[Tensor, " allfaces"]
    """0 surface, 1 eyeball, 2 hair."""
    eye_local: Float[Tensor, "verts 3"]
    uv_vertex: Int[Tensor, " alluvs"]
    """The vertex of each texture vertex."""
    skirt_offset: Float[Tensor, "skirtverts 3"]
    """From the rim, at rest; it turns with the root."""
    skirt_rim: Int[Tensor, " skirtverts"]
    first_strand: int
    """Vertices are the head's, the skirt's, the hair's, in this order."""

    @staticmethod
    def build(subject: "SyntheticSubject") -> "_Mesh":
        head, rest, below = openhead(), subject.rig.template, bust()
        height = appearance.TEXTURE_HEIGHT
        cloth = 0.006 * appearance.cloth_cover(head.template, generator(*subject.key, "clothes"))
        body = rest + cloth[:, None] * vertex_normals(rest, head.faces)
        rings = skirt(body)
        n, loop = len(rest), len(below.loop)
        # The skirt's first ring is the rim itself.
        index = torch.cat([below.loop, n + torch.arange(rings[1:].numel() // 3)])
        # A margin of a texel keeps bilinear reads inside each part of the texture.
        parts = [
            (below.faces, head.uv * torch.tensor([1.0, TEXTURE_SIZE / height]), below.uv_faces, 0),
            (index[below.skirt_faces], _strip_uv(below.skirt_uv, TEXTURE_SIZE, STRIP_ROWS), below.skirt_uv_faces, 0),
        ]
        strands = hair.build(subject.style, rest, generator(*subject.key, "hair"))
        hair_rest = tangents = torch.zeros(0, 3)
        first_strand = n + loop * (len(rings) - 1)
        if strands is not None:
            parts.append(
                (
                    strands.faces + first_strand,
                    _strip_uv(strands.uv, appearance.HAIR_TOP, appearance.HAIR_ROWS),
                    strands.uv_faces,
                    2,
                )
            )
            hair_rest, tangents = strands.vertices, strands.tangents
        starts = np.cumsum([0, *(len(uv) for _, uv, _, _ in parts)])
        faces, uv = torch.cat([f for f, _, _, _ in parts]), torch.cat([uv for _, uv, _, _ in parts])
        uv_faces = torch.cat([f + int(start) for (_, _, f, _), start in zip(parts, starts[:-1], strict=True)])
        kind = torch.cat([torch.full((len(f),), k) for f, _, _, k in parts])
        kind[: len(below.faces)] = head.regions["eyes"][below.faces].all(1).long()
        uv_vertex = torch.zeros(len(uv), dtype=torch.int64).index_put((uv_faces.flatten(),), faces.flatten())
        joints = head.joint_regressor @ head.template
        eye_centre = torch.where(head.template[:, :1] > 0, joints[3], joints[4])
        skirt_offset = (rings[1:] - rings[:1]).reshape(-1, 3)
        openness = _openness(body, below, hair_rest, parts[-1][0] - first_strand, subject.light.direction)
        return _Mesh(
            faces, uv, uv_faces, hair_rest, tangents, cloth, openness, kind, head.template - eye_centre, uv_vertex,
            skirt_offset, below.loop.repeat(len(rings) - 1), first_strand,
        )  # fmt: skip

    def to(self, device: torch.device) -> "_Mesh":
        if self.faces.device == device:
            return self
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def posed(self, rig: Head, params: HeadParams) -> tuple[Float[Tensor, "b allverts 3"], Float[Tensor, "b 3 3"]]:
        """Return all vertices in the world, clothes and hair included, and the skull's rotation."""
        vertices, T = _pose(rig, params)
        vertices = vertices + self.cloth[:, None] * vertex_normals(vertices, rig.faces)
        R_root, R = T[..., 0, :3, :3], T[..., SKULL_JOINT, :3, :3]
        strands = self.hair_rest @ R.mT + T[..., SKULL_JOINT, None, :3, 3]
        below = vertices[:, self.skirt_rim] + self.skirt_offset @ R_root.mT
        return torch.cat([vertices, below, strands], -2), R

    def shade(
        self, face: Int[Tensor, " n"], bary: Float[Tensor, "n 3"], view: View, look: "_Look"
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:  # fmt: skip
        """Shade the visible points of one image: linear RGB and normals, both in the skull's frame."""
        # One table indexed by texture vertices: every attribute is read in one pass (row gathers are what this costs).
        table = torch.cat([torch.cat([view.normals, self.openness], 1).index_select(0, self.uv_vertex), self.uv], 1)
        at = spread(table, self.uv_faces.index_select(0, face), bary)
        texels = sample_texture(look.texture, at[:, 5:], TEXTURE_SIZE, appearance.TEXTURE_HEIGHT)
        kind = self.face_kind.index_select(0, face)
        eye, strand = (kind == 1).nonzero()[:, 0], (kind == 2).nonzero()[:, 0]
        if len(eye):
            local = spread(self.eye_local, self.faces[face[eye]], bary[eye])
            texels[eye, :3] = appearance.eye_colour(normalize(local, dim=-1), look.traits)
            texels[eye, 3] = 0.05
        surface = Surface(at[:, :3], view.to_eye, texels, at[:, 3:5])
        colour = shade(surface, look.light, view.T_skull_world)
        if len(eye):
            colour[eye] += glint(surface.at(eye), look.light, view.T_skull_world)
        if len(strand):
            part = surface.at(strand)
            tangent = spread(self.tangents, self.faces[face[strand]] - self.first_strand, bary[strand])
            colour[strand] = shade_hair(part, tangent, colour[strand], look.light, view.T_skull_world)
        return colour, surface.normal


def spread(
    values: Float[Tensor, "verts c"], corners: Int[Tensor, "n 3"], bary: Float[Tensor, "n 3"]
) -> Float[Tensor, "n c"]:
    """Interpolate vertex values at points given by their corners and weights."""
    out = values.index_select(0, corners[:, 0]) * bary[:, :1]
    for i in (1, 2):
        out.addcmul_(values.index_select(0, corners[:, i]), bary[:, i : i + 1])
    return out


def _strip_uv(uv: Float[Tensor, "n 2"], top: int, rows: int) -> Float[Tensor, "n 2"]:
    """Place unit coordinates in rows `top` to `top + rows` of the texture, a texel off its neighbours."""
    return torch.stack([uv[:, 0], (top + 1.5 + uv[:, 1] * (rows - 3)) / appearance.TEXTURE_HEIGHT], -1)


def _pose(rig: Head, params: HeadParams) -> tuple[Float[Tensor, "*batch verts 3"], Float[Tensor, "*batch joints 4 4"]]:
    own = replace(params, shape=params.shape[..., :0], static_offset=None)
    posed = rig.pose(own)
    return posed.vertices, posed.T_world_joint


@lru_cache
def _sky() -> Float[Tensor, "dirs 3"]:
    """Directions spread evenly over the sphere, those from below left out (Fibonacci)."""
    i = torch.arange(24) + 0.5
    y = 1 - 1.55 * i / 24
    turn = i * 2.399963
    r = (1 - y * y).sqrt()
    return torch.stack([r * turn.cos(), y, r * turn.sin()], -1)


def _openness(
    body: Float[Tensor, "verts 3"], below: Bust, strands: Float[Tensor, "hairverts 3"],
    strand_faces: Int[Tensor, "m 3"], key_light: Float[Tensor, "3"],
) -> Float[Tensor, "allverts 2"]:  # fmt: skip
    """Bake per vertex how much of the sky and of the (soft) key light is open, in the rest pose."""
    vertices, n_head = torch.cat([body, strands]), len(body)
    faces = torch.cat([below.faces, strand_faces + n_head]) if len(strands) else below.faces
    normals = vertex_normals(vertices, faces)
    jitter = torch.tensor([[0, 0, 0], [0.16, 0, 0], [-0.16, 0, 0], [0, 0.16, 0], [0, -0.16, 0]])
    directions = torch.cat([_sky(), normalize(key_light + jitter, dim=-1)])
    seen = visibility(vertices, normals, faces, directions)
    n_sky = len(_sky())
    weight = (directions[:n_sky] @ normals.T).clamp(min=0)
    sky = (weight * seen[:n_sky]).sum(0) / weight.sum(0).clamp(min=1e-3)
    out = torch.stack([sky, seen[n_sky:].mean(0)], 1)
    out[:n_head] = smooth_on_mesh(out[:n_head], head_edges(), 2)
    floor = torch.zeros(len(vertices))
    regions = smooth_regions()
    for name, low in (("mouth", 0.10), ("tongue", 0.35), ("teeth", 0.35), ("eyes", 0.55)):
        floor[:n_head] = torch.maximum(floor[:n_head], low * regions[name])
    inside = (regions["mouth"] + regions["tongue"] + regions["teeth"]).clamp(0, 1)
    out[:, 0] = 0.25 + 0.75 * out[:, 0]  # light bounces: only the mouth is dark
    out[:n_head] *= 1 - inside[:, None]
    out = torch.maximum(out, floor[:, None])
    # The skirt is as open as the rim it hangs from.
    return torch.cat([out[:n_head], out[below.loop].repeat(RINGS, 1), out[n_head:]])
