"""`SyntheticSubject`: one person of the open world, a pure function of (seed, split).

A subject is harder than the head that tracks it: its identity comes from a wider basis than OpenHead exposes, its
surface carries smooth offsets of its own, its actions have personal strengths, sides and shapes, and its hair and
clothes lie outside the head mesh (design: the world must be harder than its tracker).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM, Camera
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.core.topology import edges, vertex_normals
from geodiff4d.data.synthetic import appearance, hair
from geodiff4d.data.synthetic.cameras import openhead
from geodiff4d.data.synthetic.canvas import TEXTURE_SIZE, noise, smooth_on_mesh, smooth_regions, smoothstep
from geodiff4d.data.synthetic.seeds import Split, generator
from geodiff4d.data.synthetic.shading import Surface, sample_texture, shade, shade_hair, to_srgb, visibility
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
        >>> frames = subject.render(subject.params(expr, jaw_pose=jaw, eyes_pose=eyes), random_cameras(4, 0))  # doctest: +SKIP
    """

    def __init__(self, seed: int, split: Split = "train"):
        self.seed, self.split = seed, split
        self.key = ("subject", split, seed)
        rng = generator(*self.key, "traits")
        self.traits = appearance.draw_traits(rng)
        self.style = hair.draw_style(rng)
        self.light = appearance.draw_light(generator(*self.key, "light"), self.traits.melanin)
        self.rig = _personal_rig(self.key)
        self.tracked_shape: Float[Tensor, " shapes"] = fit_shape(self.rig.template)
        self.mesh = _Mesh.build(self)
        self._texture: Tensor | None = None

    @property
    def texture(self) -> Float[Tensor, "texels 8"]:
        """The painted atlas, made when it is first needed."""
        if self._texture is None:
            self._texture = appearance.paint_subject(self.traits, self.style, self.key, generator)
        return self._texture

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
            shape, expr, given(rotation, 3), given(neck_pose, 3), given(jaw_pose, 3), given(eyes_pose, 6), given(translation, 3)
        )

    def vertices(self, params: HeadParams) -> Float[Tensor, "*batch verts 3"]:
        """Pose the subject's own geometry (without hair): its identity and actions, not `params.shape`."""
        return _pose(self.rig, params)[0]

    def background(self, size: int) -> Float[Tensor, "3 size size"]:
        """Return the subject's background, linear RGB."""
        return appearance.background(size, generator(*self.key, "background"))

    def render(self, params: HeadParams, camera: Camera, supersample: float = 2.0) -> SyntheticFrames:
        """Render frames; params and camera share one batch (or both have none), square images.

        `supersample` times `camera.width` must be a whole number; 2 is clean, 1.5 a third faster.
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

    def _render(self, params: HeadParams, camera: Camera, supersample: float) -> tuple[Tensor, Tensor, Tensor]:
        size, device = camera.width, params.rotation.device
        fine = round(size * supersample)
        if fine % size and size % (2 * (fine - size)):
            raise ValueError(f"supersample × width must suit area pooling, got {supersample} × {size}")
        mesh = self.mesh.to(device)
        vertices, R_skull = mesh.posed(self.rig_on(device), params)
        big = camera.resized(fine, fine)
        fragments = rasterize(vertices, mesh.faces, big)
        # Normals and light live in the skull's frame, where the texture's bumps do.
        normals = vertex_normals(vertices, mesh.faces) @ R_skull
        if mesh.weld is not None:
            normals = normals[:, mesh.weld]
        back = self.background(size).to(device)
        texture, light, position = self.texture.to(device), self.light.to(device), camera.position
        out = []
        for i in range(len(vertices)):
            pixel = (fragments.face_index[i].flatten() >= 0).nonzero()[:, 0]
            face, bary = fragments.face_index[i].flatten()[pixel], fragments.bary[i].reshape(-1, 3)[pixel]
            to_eye = normalize(R_skull[i].T @ (position[i] - vertices[i].mean(0)), dim=0)
            colour, n = self._shade_pixels(mesh, texture, light, face, bary, normals[i], R_skull[i], to_eye)
            R = IMAGE_NORMAL_FROM_CAM.to(device) @ big.T_cam_world[i, :3, :3] @ R_skull[i]
            canvas = torch.zeros(fine * fine, 7, device=device)
            canvas[pixel] = torch.cat([colour * light.exposure, n @ R.T, torch.ones_like(colour[:, :1])], 1)
            out.append(_resolve(canvas.T.reshape(1, 7, fine, fine), size))
        pooled = torch.cat(out)
        coverage = pooled[:, 6:]
        rgb = to_srgb(pooled[:, :3] + (1 - coverage) * back)
        normal = normalize(pooled[:, 3:6], dim=1, eps=1e-9) * (coverage > 0)
        return rgb, normal, coverage

    def rig_on(self, device: torch.device) -> Head:
        return self.rig if self.rig.template.device == device else self.rig.to(device)

    def _shade_pixels(self, mesh: "_Mesh", texture, light, face, bary, normals, R_skull, to_eye):  # type: ignore[no-untyped-def]
        corners = mesh.faces[face]

        def spread(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return values[index[:, 0]] * weights[:, :1] + values[index[:, 1]] * weights[:, 1:2] + values[index[:, 2]] * weights[:, 2:]

        attributes = spread(torch.cat([normals, mesh.openness], 1), corners, bary)
        n = normalize(attributes[:, :3], dim=-1)
        texels = sample_texture(texture, spread(mesh.uv, mesh.uv_faces[face], bary), TEXTURE_SIZE, appearance.TEXTURE_HEIGHT)
        kind = mesh.face_kind[face]
        eye = (kind == 1).nonzero()[:, 0]
        if len(eye):
            local = normalize(spread(mesh.eye_local, corners[eye], bary[eye]), dim=-1)
            texels[eye, :3] = appearance.eye_colour(local, self.traits)
            texels[eye, 3] = 0.6
        surface = Surface(n, to_eye, texels, attributes[:, 3:])
        colour = shade(surface, light, R_skull.T)
        strands = (kind == 2).nonzero()[:, 0]
        if len(strands):
            tangent = spread(mesh.tangents, corners[strands] - mesh.head_vertices, bary[strands])
            part = Surface(n[strands], to_eye, texels[strands], attributes[strands, 3:])
            colour[strands] = shade_hair(part, normalize(tangent, dim=-1), colour[strands], light, R_skull.T)
        return colour, n


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
    head_vertices: int
    weld: Int[Tensor, " allverts"] | None = None

    @staticmethod
    def build(subject: "SyntheticSubject") -> "_Mesh":
        head, rest = openhead(), subject.rig.template
        scale = torch.tensor([1.0, TEXTURE_SIZE / appearance.TEXTURE_HEIGHT])
        offset = torch.tensor([0.0, scale[1]])
        strands = hair.build(subject.style, rest, generator(*subject.key, "hair"))
        faces, uv, uv_faces = head.faces, head.uv * scale, head.uv_faces
        eyes = head.regions["eyes"][head.faces].all(1).long()
        hair_rest = tangents = torch.zeros(0, 3)
        if strands is not None:
            faces = torch.cat([faces, strands.faces + len(rest)])
            # A margin of a texel keeps bilinear reads off the atlas above.
            v = (strands.uv[:, 1:] * (appearance.HAIR_ROWS - 3) + 1.5) / appearance.TEXTURE_HEIGHT + offset[1]
            uv_faces = torch.cat([uv_faces, strands.uv_faces + len(uv)])
            uv = torch.cat([uv, torch.cat([strands.uv[:, :1], v], 1)])
            eyes = torch.cat([eyes, torch.full((len(strands.faces),), 2)])
            hair_rest, tangents = strands.vertices, strands.tangents
        cloth = 0.006 * appearance.cloth_cover(head.template, generator(*subject.key, "clothes"))
        joints = head.joint_regressor @ head.template
        eye_centre = torch.where(head.template[:, :1] > 0, joints[3], joints[4])
        body = rest + cloth[:, None] * vertex_normals(rest, head.faces)
        openness = _openness(torch.cat([body, hair_rest]), faces, subject.light.direction)
        return _Mesh(faces, uv, uv_faces, hair_rest, tangents, cloth, openness, eyes, head.template - eye_centre, len(rest))

    def to(self, device: torch.device) -> "_Mesh":
        if self.faces.device == device:
            return self
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def posed(self, rig: Head, params: HeadParams) -> tuple[Float[Tensor, "b allverts 3"], Float[Tensor, "b 3 3"]]:
        """Return all vertices in the world, clothes and hair included, and the skull's rotation."""
        vertices, T_skull = _pose(rig, params)
        vertices = vertices + self.cloth[:, None] * vertex_normals(vertices, rig.faces)
        R = T_skull[..., :3, :3]
        strands = self.hair_rest @ R.mT + T_skull[..., None, :3, 3]
        return torch.cat([vertices, strands], -2), R


def _pose(rig: Head, params: HeadParams) -> tuple[Float[Tensor, "*batch verts 3"], Float[Tensor, "*batch 4 4"]]:
    own = replace(params, shape=params.shape[..., :0], static_offset=None)
    posed = rig.pose(own)
    return posed.vertices, posed.T_world_joint[..., SKULL_JOINT, :, :]


def _resolve(image: Float[Tensor, "1 c h w"], size: int) -> Float[Tensor, "1 c size size"]:
    """Average a supersampled image down to size²."""
    factor, rest = divmod(image.shape[-1], size)
    if rest == 0:
        return avg_pool2d(image, factor) if factor > 1 else image
    return torch.nn.functional.interpolate(image, (size, size), mode="area")


@lru_cache
def _wide() -> Head:
    from geodiff4d.heads.openhead import load_wide

    return load_wide()


@lru_cache
def _fit_matrix() -> tuple[Float[Tensor, "shapes coordinates"], Float[Tensor, " coordinates"]]:
    """Least squares of the exposed basis, as one matrix; the weight follows the surface that a tracker sees."""
    head = openhead()
    weight = torch.ones(len(head.template))
    for name in ("mouth", "teeth", "tongue", "eyes", "sockets", "neck"):
        weight[head.regions.get(name, torch.zeros_like(weight, dtype=torch.bool))] = 0.15
    w = weight.repeat_interleave(3).sqrt()
    A = head.shape_basis.reshape(-1, head.shape_basis.shape[-1]) * w[:, None]
    # A little of the prior (unit variance, in the basis's own units) keeps weak components tame.
    inverse = torch.linalg.solve(A.T @ A + 1e-5 * torch.eye(A.shape[1]), A.T)
    return inverse * w, w


def fit_shape(vertices: Float[Tensor, "verts 3"]) -> Float[Tensor, " shapes"]:
    """Return the exposed shape coefficients that come nearest to a neutral mesh."""
    inverse, _ = _fit_matrix()
    return inverse @ (vertices - openhead().template).flatten()


@lru_cache
def _edges() -> Int[Tensor, "edges 2"]:
    return edges(openhead().faces)


@lru_cache
def _fixed() -> Float[Tensor, " verts"]:
    """1 where a subject may deviate from the basis freely, 0 on parts that must keep fitting together."""
    head = openhead()
    free = torch.ones(len(head.template))
    for name in ("eyes", "teeth", "tongue", "mouth", "sockets", "lids"):
        free[head.regions.get(name, torch.zeros_like(free, dtype=torch.bool))] = 0
    return smooth_on_mesh(free[:, None], _edges(), 6)[:, 0]


def _personal_rig(key: tuple[object, ...]) -> Head:
    """Return the subject's own head: wide identity, smooth offsets, personal actions; it has no shape basis left."""
    head, wide = openhead(), _wide()
    rng = generator(*key, "identity")
    # Shrunk a little: full variance of the phenotype space holds faces that nobody has.
    weights = torch.from_numpy(np.clip(rng.normal(0, 0.85, wide.shape_basis.shape[-1]), -2.2, 2.2).astype(np.float32))
    template = wide.template + wide.shape_basis @ weights
    offset = 0.0017 * noise(head.template, rng, 0.10, 3) + 0.0004 * noise(head.template, rng, 0.04, 3)
    template = template + offset * _fixed()[:, None]
    return replace(head, template=template, shape_basis=template.new_zeros(len(template), 3, 0), expr_basis=_actions(head, generator(*key, "actions")))


def _actions(head: Head, rng: np.random.Generator) -> Float[Tensor, "verts 3 exprs"]:
    """Personalise the expression basis: log-normal strength per action and side, and a smooth change of direction."""
    names = head.expression_names
    gain = np.exp(rng.normal(0, 0.15, (2, len(names))))
    for i, name in enumerate(names):
        if name.startswith(("eyeBlink", "tongueOut", "mouthClose")):
            gain[:, i] = 1 + 0.2 * np.clip(gain[:, i] - 1, -0.2, 0.2)  # lids still meet
    left = smoothstep(-0.02, 0.02, head.template[:, 0])[:, None]
    gains = torch.from_numpy(gain.astype(np.float32))
    basis = head.expr_basis * (left * gains[0] + (1 - left) * gains[1])[:, None]
    field = noise(head.template, rng, 0.07, 12).view(-1, 3, 4)
    mixing = torch.from_numpy(rng.normal(0, 0.5, (4, len(names))).astype(np.float32))
    size = head.expr_basis.norm(dim=1, keepdim=True) * _fixed()[:, None, None]
    return basis + 0.13 * size * (field @ mixing)


@lru_cache
def _sky() -> Float[Tensor, "dirs 3"]:
    """Directions spread evenly over the sphere, those from below left out (Fibonacci)."""
    i = torch.arange(40) + 0.5
    y = 1 - 1.55 * i / 40
    turn = i * 2.399963
    r = (1 - y * y).sqrt()
    return torch.stack([r * turn.cos(), y, r * turn.sin()], -1)


def _openness(vertices: Float[Tensor, "n 3"], faces: Int[Tensor, "m 3"], key_light: Float[Tensor, "3"]) -> Float[Tensor, "n 2"]:
    """Bake per vertex how much of the sky and of the (soft) key light is open, in the rest pose."""
    normals = vertex_normals(vertices, faces)
    spread = torch.tensor([[0, 0, 0], [0.16, 0, 0], [-0.16, 0, 0], [0, 0.16, 0], [0, -0.16, 0], [0, 0, 0.16]])
    directions = torch.cat([_sky(), normalize(key_light + spread, dim=-1)])
    seen = visibility(vertices, normals, faces, directions)
    n_sky = len(_sky())
    weight = (directions[:n_sky] @ normals.T).clamp(min=0)
    sky = (weight * seen[:n_sky]).sum(0) / weight.sum(0).clamp(min=1e-3)
    lit = seen[n_sky:].mean(0)
    out = smooth_on_mesh(torch.stack([sky, lit], 1), edges(faces), 2)
    n_head = len(openhead().template)
    floor = torch.zeros(len(vertices))
    regions = smooth_regions()
    for name, low in (("mouth", 0.10), ("tongue", 0.35), ("teeth", 0.45), ("eyes", 0.55)):
        floor[:n_head] = torch.maximum(floor[:n_head], low * regions[name])
    # Light bounces: nothing outside the mouth is black.
    out[:, 0] = (0.25 + 0.75 * out[:, 0]) * (1 - regions_inside(n_head, len(out)))
    return torch.maximum(out, floor[:, None])


def regions_inside(n_head: int, n: int) -> Float[Tensor, " n"]:
    """1 inside the mouth, 0 elsewhere."""
    out = torch.zeros(n)
    out[:n_head] = (smooth_regions()["mouth"] + smooth_regions()["tongue"]).clamp(0, 1)
    return out


__all__ = ["SyntheticFrames", "SyntheticSubject", "fit_shape"]
_UNUSED = (Bool, axis_angle_to_matrix)
