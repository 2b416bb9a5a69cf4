"""The z-buffer against ray casts, its tie rule, and the normal convention."""

import dataclasses

import pytest
import torch
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from torch.testing import assert_close

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.heads import Head, HeadParams, Landmarks, PosedHead
from geodiff4d.render import meshes
from geodiff4d.render.meshes import interpolate, pose_map, rasterize, rasterize_uv, render_normals

SIZE = 96


def cameras(*yaw: float, size: int = SIZE, focal: float = 3.6) -> Camera:
    a = torch.tensor(yaw)
    eye = torch.stack([a.sin(), 0.1 * torch.ones_like(a), a.cos()], -1)
    T = look_at(eye, torch.zeros_like(eye), torch.tensor([0.0, 1, 0]).expand_as(eye))
    return Camera(T, pinhole(size * focal, size, size).expand(len(yaw), 3, 3), size, size)


def icosphere(subdivisions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sphere of radius 1: vertices and faces."""
    import trimesh  # takes a second, and only this file's worker needs it

    sphere = trimesh.creation.icosphere(subdivisions)
    return torch.tensor(sphere.vertices).float(), torch.tensor(sphere.faces).long()


def blob(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A bumpy closed surface of 1,280 faces about as large as a head; it hides parts of itself."""
    v, faces = icosphere(3)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(12, 3, generator=generator), dim=-1)
    bumps = (8 * (v @ directions.T - 0.8)).sigmoid().sum(-1, keepdim=True)
    return v * (0.06 + 0.06 * bumps), faces


def cast(
    vertices: torch.Tensor, faces: torch.Tensor, camera: Camera
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First hits by embree: (face or -1, barycentrics, camera z)."""
    y, x = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3) @ camera.K.inverse().T
    scene = EmbreeScene()
    cam = vertices @ camera.T_cam_world[:3, :3].T + camera.T_cam_world[:3, 3]
    TriangleMesh(scene, cam[faces].numpy())
    hit = scene.run(torch.zeros_like(rays).numpy(), rays.numpy(), output=1)
    u, v = torch.from_numpy(hit["u"]), torch.from_numpy(hit["v"])
    shape = (camera.height, camera.width)
    bary = torch.stack([1 - u - v, u, v], -1)
    return (
        torch.from_numpy(hit["primID"]).long().view(shape),
        bary.view(*shape, 3),
        torch.from_numpy(hit["tfar"]).view(shape),
    )


def inside(mask: torch.Tensor) -> torch.Tensor:
    """Pixels whose 3×3 neighbourhood is all covered."""
    return -torch.nn.functional.max_pool2d(-mask[None].float(), 3, 1, 1)[0] > 0


@pytest.mark.parametrize("yaw", [0.0, 0.7, 3.0])
def test_agrees_with_ray_casts(yaw):
    vertices, faces = blob()
    camera = cameras(yaw)[0]
    ours = rasterize(vertices, faces, camera)
    face, bary, depth = cast(vertices, faces, camera)
    assert (ours.mask == (face >= 0)).float().mean() > 0.999
    same = ours.face_index == face
    assert same[inside(face >= 0)].float().mean() > 0.999
    seen = same & ours.mask
    assert_close(ours.bary[seen], bary[seen], atol=2e-3, rtol=0)
    # A pixel on a shared edge may name the neighbour: its depth is the same all the same.
    both = ours.mask & (face >= 0)
    assert ((ours.depth - depth)[both].abs() < 1e-4).float().mean() > 0.999


def test_closed_surface_has_no_holes():
    vertices, faces = icosphere(4)
    vertices = vertices * 0.1
    camera = cameras(0.3, size=128)[0]
    y, x = torch.meshgrid(torch.arange(128) - 63.5, torch.arange(128) - 63.5, indexing="ij")
    assert rasterize(vertices, faces, camera).mask[(x.hypot(y) < 44)].all()


def test_shared_edges_are_covered_once():
    """A grid of quads with corners on pixel centres, the worst case: every pixel inside belongs to one face alone."""
    n, size = 9, 40
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    for jitter in (0.0, 0.3):
        uv = torch.stack([x, y], -1).float() * 4 + 2.5
        uv[1:-1, 1:-1] += jitter * torch.randn(n - 2, n - 2, 2, generator=generator)
        i = (torch.arange(n - 1)[:, None] * n + torch.arange(n - 1)).flatten()
        faces = torch.cat([torch.stack([i, i + 1, i + n], -1), torch.stack([i + 1, i + n + 1, i + n], -1)])
        alone = [rasterize_uv(uv.reshape(-1, 2) / size, face[None], size).mask for face in faces]
        covered = torch.stack(alone).sum(0)
        assert covered.max() == 1 and covered.sum() == 32 * 32
        assert covered[2:34, 2:34].all()


def test_large_spans_are_chunked(monkeypatch):
    vertices, faces = blob()
    camera = cameras(0.0, 0.4)
    whole = rasterize(vertices.expand(2, -1, 3), faces, camera)
    monkeypatch.setattr(meshes, "SPAN_CHUNK", 500)
    parts = rasterize(vertices.expand(2, -1, 3), faces, camera)
    assert torch.equal(whole.face_index, parts.face_index)


def test_one_huge_triangle_fills_the_image():
    vertices = torch.tensor([[-8.0, -8, 0], [8, -8, 0], [0, 8, 0]])
    fragments = rasterize(vertices, torch.tensor([[0, 1, 2]]), cameras(0.0)[0])
    assert fragments.mask.all()
    assert_close(fragments.depth[SIZE // 2, SIZE // 2], torch.tensor(1.005), atol=0.01, rtol=0)


def test_faces_that_cannot_be_drawn_are_left_out():
    good = torch.tensor([[-0.05, -0.05, 0], [0.05, -0.05, 0], [0, 0.05, 0]])
    bad = torch.tensor(
        [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 2], [0.1, 0, 0], [0, 0.1, 0], [9, 9, 0], [9.1, 9, 0], [9, 9.1, 0],
         [torch.nan, 0, 0], [0.1, 0, 0], [0, 0.1, 0]]
    )  # fmt: skip
    vertices = torch.cat([good, bad]).requires_grad_()
    camera = cameras(0.0)[0]
    fragments = rasterize(vertices, torch.arange(15).view(-1, 3), camera)
    assert set(fragments.face_index.unique().tolist()) == {-1, 0}
    fragments.depth[fragments.mask].sum().backward()
    assert vertices.grad is not None and vertices.grad.isfinite().all()
    empty = rasterize(bad[6:9], torch.tensor([[0, 1, 2]]), camera)
    assert not empty.mask.any() and empty.depth.isinf().all()


def test_back_faces_are_culled():
    vertices = torch.tensor([[-0.05, -0.05, 0], [0.05, -0.05, 0], [0, 0.05, 0]])
    back = torch.tensor([[0, 2, 1]])
    camera = cameras(0.0)[0]
    assert not rasterize(vertices, back, camera).mask.any()
    shown = rasterize(vertices, back, camera, cull_backfaces=False)
    assert shown.mask.any() and (shown.bary[shown.mask] >= 0).all()


def test_batch_equals_singles_and_must_match():
    vertices = torch.stack([blob(0)[0], blob(1)[0]])
    faces = blob()[1]
    camera = cameras(0.0, 1.0)
    together = rasterize(vertices, faces, camera)
    values = interpolate(together, faces, vertices)
    for i in range(2):
        alone = rasterize(vertices[i], faces, camera[i])
        assert torch.equal(together.face_index[i], alone.face_index)
        assert_close(values[i], interpolate(alone, faces, vertices[i]))
    assert_close(interpolate(together, faces, vertices[0])[0], values[0])
    with pytest.raises(ValueError, match="share a batch"):
        rasterize(vertices, faces, camera[0])


def test_interpolated_positions_lie_on_the_pixels_rays_and_have_gradients():
    vertices, faces = blob()
    vertices = vertices.requires_grad_()
    camera = cameras(0.2)[0]
    fragments = rasterize(vertices, faces, camera)
    points = interpolate(fragments, faces, vertices).flatten(1).T
    xy, z = camera.project(points)
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    m = fragments.mask.flatten()
    assert_close(xy[m], torch.stack([x, y], -1).view(-1, 2)[m], atol=2e-2, rtol=0)
    assert_close(z[m], fragments.depth.flatten()[m], atol=1e-5, rtol=0)
    # Moving the head 1 m away along the view moves every depth by 1 m.
    fragments.depth[fragments.mask].mean().backward()
    assert vertices.grad is not None
    forward = camera.T_cam_world[2, :3]
    assert_close((vertices.grad @ forward).sum(), torch.tensor(1.0), atol=0.1, rtol=0)


def posed(vertices: torch.Tensor, faces: torch.Tensor) -> PosedHead:
    return PosedHead(vertices, faces, torch.eye(4).expand(*vertices.shape[:-2], 5, 4, 4))


def test_normals_are_camera_space_x_right_y_up_z_toward():
    vertices, faces = icosphere(3)
    vertices = vertices * 0.1
    for yaw in (0.0, 2.0):
        normals, mask = render_normals(posed(vertices, faces), cameras(yaw)[0])
        c = SIZE // 2
        assert normals[2, c, c] > 0.99
        assert normals[0, c, c + 28] > 0.7 and normals[0, c, c - 28] < -0.7
        assert normals[1, c - 28, c] > 0.7 and normals[1, c + 28, c] < -0.7
        assert_close(normals.norm(dim=0), mask[0])


def test_texture_space_round_trip():
    uv = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    texels = rasterize_uv(uv, faces, 20)
    back = interpolate(texels, faces, uv)
    x = (torch.arange(20) + 0.5) / 20
    assert_close(back[0, 10, 2:18], x[2:18])
    assert_close(back[1, 2:18, 10], x[2:18])
    assert texels.mask.sum() == 16 * 16
    vertices = torch.cat([uv - 0.5, torch.zeros(4, 1)], -1) * 0.2
    fragments = rasterize(vertices, faces, cameras(0.0)[0])
    coords = interpolate(fragments, faces, uv)[:, SIZE // 2, SIZE // 2]
    assert_close(coords, torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)


def toy_head() -> Head:
    """A blob that has every parameter: expressions push it, joints turn it."""
    vertices, faces = blob()
    n = len(vertices)
    generator = torch.Generator().manual_seed(0)
    points = Landmarks(torch.zeros(68, dtype=torch.long), torch.full((68, 3), 1 / 3))
    weights = torch.softmax(vertices @ torch.randn(3, 5, generator=generator) * 20, -1)
    return Head(
        name="toy", template=vertices, faces=faces,
        shape_basis=0.01 * torch.randn(n, 3, 2, generator=generator),
        expr_basis=0.01 * torch.randn(n, 3, 2, generator=generator),
        joint_regressor=torch.full((5, n), 1 / n), skin_weights=weights,
        uv=vertices[:, :2] * 3 + 0.5, uv_faces=faces, regions={}, expression_names=("a", "b"),
        landmarks68=points, mediapipe=points, mediapipe_index=torch.arange(68),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["expr", "jaw_pose", "eyes_pose", "rotation", "neck_pose", "shape", "translation"])
def test_pose_map_sees_pose_and_not_expression(name):
    head = toy_head()
    rest: HeadParams = head.neutral(1)
    amount = 0.02 if name == "translation" else 0.2
    moved = dataclasses.replace(rest, **{name: torch.full_like(getattr(rest, name), amount)})
    camera = cameras(0.0, size=48)
    image, mask = pose_map(head, rest, camera)
    other, _ = pose_map(head, moved, camera)
    assert torch.equal(image, other) == (name in ("expr", "jaw_pose", "eyes_pose"))
    assert_close(image[:, :, 0, 0], torch.full((1, 3), 0.5)) and not mask[0, 0, 0, 0]
