"""Draw posed meshes: Numba kernels on the CPU, batched torch elsewhere; both mean the same picture."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM, Camera
from geodiff4d.core.topology import vertex_normals
from geodiff4d.render.meshes import rasterize
from geodiff4d.world import deferred
from geodiff4d.world.atlas import TEXTURE_SIZE
from geodiff4d.world.shading import Light, pack_light, sample_texture, shade, to_srgb

Pictures = tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]
Backend = Literal["numba", "torch"]


@dataclass(frozen=True)
class Scene:
    """What does not change from frame to frame."""

    faces: Int[Tensor, "faces 3"]
    uv: Float[Tensor, "uvs 2"]
    uv_faces: Int[Tensor, "faces 3"]
    kind: Int[Tensor, " faces"]
    """Layer of each face: 0 surface, 1 wet or hard, 2 strands."""
    shell: Int[Tensor, " faces"]
    """0 for whole faces; faces cut out by their texture's opacity are numbered by the shell they belong to."""
    openness: Float[Tensor, "verts 2"]
    tangents: Float[Tensor, "verts 3"]
    """Direction of the strands in the skull's frame, zero elsewhere."""
    texture: Float[Tensor, "texels 8"]
    light: Light


def normals_of(
    vertices: Float[Tensor, "*batch verts 3"], faces: Int[Tensor, "faces 3"]
) -> Float[Tensor, "*batch verts 3"]:
    """Unit vertex normals; on the CPU by a kernel, twenty times faster than the differentiable ones."""
    if vertices.device.type != "cpu":
        return vertex_normals(vertices, faces)
    flat = vertices.detach().reshape(-1, *vertices.shape[-2:]).contiguous().numpy()
    out = np.empty_like(flat)
    for i in range(len(flat)):
        deferred.vertex_normals(flat[i], faces.numpy(), out[i])
    return torch.from_numpy(out).view(vertices.shape)


def draw(
    scene: Scene, vertices: Float[Tensor, "b verts 3"], R_skull: Float[Tensor, "b 3 3"], camera: Camera,
    background: Float[Tensor, "3 h w"], supersample: int, backend: Backend | None = None,
) -> Pictures:  # fmt: skip
    """Return sRGB over the (linear) background, unit camera-space normals, and coverage.

    Without a `backend`, CPU tensors are drawn by Numba and others by torch.
    """
    normals = normals_of(vertices, scene.faces) @ R_skull
    eyes = camera.position - vertices.mean(1)
    eyes = torch.nn.functional.normalize((R_skull.mT @ eyes[..., None])[..., 0], dim=-1)
    light = pack_light(scene.light, R_skull.mT, eyes)
    to_image = IMAGE_NORMAL_FROM_CAM.to(vertices) @ camera.T_cam_world[:, :3, :3] @ R_skull
    fixed = torch.cat([scene.openness, scene.tangents], -1)
    attributes = torch.cat([normals, fixed.expand(len(vertices), -1, -1)], -1)
    backend = backend or ("numba" if vertices.device.type == "cpu" else "torch")
    drawer = _draw_numba if backend == "numba" else _draw_torch
    return drawer(scene, vertices, attributes, light, to_image, camera, background, supersample)


@lru_cache
def _curve() -> np.ndarray:
    x = torch.linspace(0, deferred.CURVE_MAX**0.5, deferred.CURVE).double().square()
    return to_srgb(x).float().numpy()


def _draw_numba(
    scene: Scene, vertices: Float[Tensor, "b verts 3"], attributes: Float[Tensor, "b verts 8"],
    light: Float[Tensor, "b 27"], to_image: Float[Tensor, "b 3 3"], camera: Camera,
    background: Float[Tensor, "3 h w"], supersample: int,
) -> Pictures:  # fmt: skip
    size, b = camera.width, len(vertices)
    fine = size * supersample
    faces, uv, uv_faces = scene.faces.numpy(), scene.uv.numpy(), scene.uv_faces.numpy()
    cut, kind, texture = (scene.shell > 0).numpy(), scene.kind.numpy(), scene.texture.numpy()
    near, face = np.empty((fine, fine), np.float32), np.empty((fine, fine), np.int32)
    screen = np.empty((vertices.shape[1], 3), np.float32)
    rgb, normal = np.empty((b, 3, size, size), np.float32), np.empty((b, 3, size, size), np.float32)
    mask = np.empty((b, 1, size, size), np.float32)
    behind, behind_srgb = background.contiguous().numpy(), to_srgb(background).contiguous().numpy()
    exposure = np.float32(scene.light.exposure)
    for i in range(b):
        T, K = camera.T_cam_world[i].contiguous().numpy(), camera.K[i].contiguous().numpy()
        deferred.project(vertices[i].contiguous().numpy(), T, K, np.float32(supersample), screen)
        deferred.zbuffer(screen, faces, cut, uv, uv_faces, texture, TEXTURE_SIZE, near, face)
        deferred.resolve(
            face, screen, faces, kind, uv, uv_faces, attributes[i].contiguous().numpy(), texture, TEXTURE_SIZE,
            light[i].numpy(), to_image[i].contiguous().numpy(), behind, behind_srgb, _curve(), exposure, rgb[i],
            normal[i], mask[i, 0],
        )  # fmt: skip
    return torch.from_numpy(rgb), torch.from_numpy(normal), torch.from_numpy(mask)


def _draw_torch(
    scene: Scene, vertices: Float[Tensor, "b verts 3"], attributes: Float[Tensor, "b verts 8"],
    light: Float[Tensor, "b 27"], to_image: Float[Tensor, "b 3 3"], camera: Camera,
    background: Float[Tensor, "3 h w"], supersample: int,
) -> Pictures:  # fmt: skip
    """Draw a whole batch without a loop over images; any device."""
    size, b = camera.width, len(vertices)
    fine = size * supersample
    face, bary = _samples(scene, vertices, camera.resized(fine, fine))
    sample = (face >= 0).nonzero()[:, 0]
    image, place = sample // (fine * fine), sample % (fine * fine)
    pixel = image * size * size + (place // fine // supersample) * size + place % fine // supersample
    # Samples of one face in one pixel are read once, at their middle.
    number = len(scene.faces)
    both, index, count = torch.unique(pixel * number + face[sample], return_inverse=True, return_counts=True)
    bary = bary.new_zeros(len(both), 3).index_add_(0, index, bary[sample]) / count[:, None]
    pixel, face, count = both // number, both % number, count[:, None]
    image = pixel // (size * size)
    texels = sample_texture(
        scene.texture, spread(scene.uv, scene.uv_faces.index_select(0, face), bary), TEXTURE_SIZE,
        len(scene.texture) // TEXTURE_SIZE,
    )  # fmt: skip
    corners = scene.faces.index_select(0, face) + (image * vertices.shape[1])[:, None]
    attributes = spread(attributes.flatten(0, 1), corners, bary)
    values = torch.cat([texels, attributes, torch.ones_like(bary[:, :1])], 1) * count
    bucket = pixel * deferred.LAYERS + scene.kind.index_select(0, face)
    # Only buckets that hold something are lit.
    used, index = torch.unique(bucket, return_inverse=True)
    rows = values.new_zeros(len(used), values.shape[1]).index_add_(0, index, values)
    count = rows[:, -1:]
    rows, pixel = rows[:, :-1] / count, used // deferred.LAYERS
    image = pixel // (size * size)
    colour = shade(rows, used % deferred.LAYERS, light.index_select(0, image))
    normal = (to_image.index_select(0, image) @ rows[:, 8:11, None])[..., 0]
    both = torch.cat([colour, normal, torch.ones_like(count)], 1) * count / supersample**2
    pooled = both.new_zeros(b * size * size, 7).index_add_(0, pixel, both)
    pooled = pooled.view(b, size * size, 7).mT.unflatten(2, (size, size))
    rgb = to_srgb(scene.light.exposure * pooled[:, :3] + (1 - pooled[:, 6:]) * background)
    length = pooled[:, 3:6].square().sum(1, keepdim=True).sqrt().clamp(min=1e-9)
    return rgb, pooled[:, 3:6] / length, pooled[:, 6:]


def _samples(
    scene: Scene, vertices: Float[Tensor, "b verts 3"], camera: Camera
) -> tuple[Int[Tensor, " samples"], Float[Tensor, "samples 3"]]:
    """Return the seen face and weights of every sample; shells are drawn one by one and cut by their opacity."""
    best_face, best_bary, best_depth = None, None, None
    for number in range(int(scene.shell.max()) + 1):
        mine = (scene.shell == number).nonzero()[:, 0]
        if not len(mine):
            continue
        fragments = rasterize(vertices, scene.faces[mine], camera)
        local, bary, depth = fragments.face_index.flatten(), fragments.bary.reshape(-1, 3), fragments.depth.flatten()
        face = torch.where(local >= 0, mine[local.clamp(min=0)], -1)
        if best_face is None or best_bary is None or best_depth is None:
            best_face, best_bary, best_depth = face, bary, depth
            continue
        nearer = ((face >= 0) & (depth < best_depth)).nonzero()[:, 0]
        uv = spread(scene.uv, scene.uv_faces[face[nearer]], bary[nearer])
        height = len(scene.texture) // TEXTURE_SIZE
        nearer = nearer[sample_texture(scene.texture[:, 7:], uv, TEXTURE_SIZE, height)[:, 0] >= 0.5]
        best_face[nearer], best_depth[nearer] = face[nearer], depth[nearer]
        best_bary = best_bary.index_copy(0, nearer, bary[nearer])
    assert best_face is not None
    assert best_bary is not None
    return best_face, best_bary


def spread(
    values: Float[Tensor, "verts c"], corners: Int[Tensor, "n 3"], bary: Float[Tensor, "n 3"]
) -> Float[Tensor, "n c"]:
    """Interpolate vertex values at points given by their corners and weights."""
    out = values.index_select(0, corners[:, 0]) * bary[:, :1]
    for i in (1, 2):
        out.addcmul_(values.index_select(0, corners[:, i]), bary[:, i : i + 1])
    return out
