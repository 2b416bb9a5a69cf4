"""A portrait's pixels carried by the mesh: identity, other views, visibility and completion by symmetry."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.heads import Head, Landmarks, PosedHead
from geodiff4d.render.meshes import interpolate, rasterize
from geodiff4d.render.relief import LiftedPortrait, render_lifted
from geodiff4d.render.warp import Carried, CompletedHead, carry, complete, mirror_vertices, warp

SIZE = 96


def camera(*yaw: float, size: int = SIZE) -> Camera:
    a = torch.tensor(yaw)
    eye = torch.stack([a.sin(), torch.zeros_like(a), a.cos()], -1)
    T = look_at(eye, torch.zeros_like(eye), torch.tensor([0.0, 1, 0]).expand_as(eye))
    return Camera(T, pinhole(size * 3.6, size, size).expand(len(yaw), 3, 3), size, size)


@pytest.fixture(scope="module")
def head() -> Head:
    """An egg with a nose, mirror-symmetric, its texture unwrapped by longitude with the seam at the back."""
    rows, columns = 40, 65
    t = torch.linspace(0.02, torch.pi - 0.02, rows)[:, None]
    a = torch.linspace(-torch.pi, torch.pi, columns)
    v = torch.stack([t.sin() * a.sin(), t.cos().expand(-1, columns), t.sin() * a.cos()], -1).reshape(-1, 3)
    nose = torch.exp(-((v - torch.tensor([0.0, 0, 1])) ** 2).sum(-1, keepdim=True) / 0.02)
    v = v * torch.tensor([0.08, 0.11, 0.1]) + nose * torch.tensor([0.0, 0, 0.02])
    uv = torch.stack([a.expand(rows, -1) / (2 * torch.pi) + 0.5, t.expand(-1, columns) / torch.pi], -1).reshape(-1, 2)
    i = (torch.arange(rows - 1)[:, None] * columns + torch.arange(columns - 1)).flatten()
    quad = (i, i + columns, i + columns + 1, i + 1)
    faces = torch.cat([torch.stack([quad[0], quad[1], quad[2]], -1), torch.stack([quad[0], quad[2], quad[3]], -1)])
    n = len(v)
    points = Landmarks(torch.zeros(68, dtype=torch.long), torch.full((68, 3), 1 / 3))
    mouth = (v[:, 1] + 0.05).abs() + v[:, 0].abs() < 0.02
    return Head(
        name="egg", template=v, faces=faces, shape_basis=torch.zeros(n, 3, 1), expr_basis=torch.zeros(n, 3, 1),
        joint_regressor=torch.full((5, n), 1 / n), skin_weights=torch.eye(5)[0].expand(n, 5), uv=uv, uv_faces=faces,
        regions={"mouth": mouth & (v[:, 2] > 0)}, expression_names=("none",),
        landmarks68=points, mediapipe=points, mediapipe_index=torch.arange(68),
    )  # fmt: skip


def paint(head: Head, view: Camera, colours: torch.Tensor) -> torch.Tensor:
    """Draw vertex colours on grey."""
    fragments = rasterize(head.template.expand(*view.batch, -1, 3), head.faces, view)
    image = interpolate(fragments, head.faces, colours)
    return torch.where(fragments.mask[..., None, :, :], image, 0.5)


def waves(head: Head) -> torch.Tensor:
    """Smooth colours, the same on both sides."""
    x, y, z = head.template.unbind(-1)
    return torch.stack(
        [0.5 + 0.3 * torch.cos(60 * x), 0.5 + 0.3 * torch.sin(50 * y), 0.5 + 0.3 * torch.sin(40 * z)], -1
    )


def test_warp_onto_its_own_camera_is_the_portrait(head):
    view = camera(0.2)[0]
    image = paint(head, view, waves(head))
    carried = carry(head.template, head.faces, view)
    warped, visible = warp(image, carried, rasterize(head.template, head.faces, view), head.faces)
    sure = visible[0] > 0.999
    assert sure.float().sum() > 0.7 * rasterize(head.template, head.faces, view).mask.sum()
    assert (warped - image)[:, sure].abs().max() < 4 / 255
    assert (warped - image)[:, sure].abs().mean() < 1 / 255
    assert (warped * (visible == 0)).abs().max() == 0


@pytest.mark.parametrize("yaw", [-0.52, 0.52])
def test_spots_follow_the_surface(head, yaw):
    """Red dots on the frontal portrait turn up where the surface points project in the other view, at another size."""
    front, side = camera(0.0)[0], camera(yaw, size=128)[0]
    image = paint(head, front, waves(head) * torch.tensor([0.0, 1, 1]))
    spots = torch.tensor([[0.03, 0.03], [-0.03, 0.03], [0.02, -0.05], [-0.02, -0.05]])
    near = torch.cdist(spots, head.template[:, :2]) + (head.template[:, 2] < 0)
    spots = head.template[near.argmin(-1)]
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    for point in front.project(spots)[0]:
        image[0] += torch.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 4)
    carried = carry(head.template, head.faces, front)
    warped, visible = warp(image, carried, rasterize(head.template, head.faces, side), head.faces)
    found = 0
    for px, py in side.project(spots)[0].tolist():
        left, top = int(px) - 5, int(py) - 5
        window = warped[0, top : top + 11, left : left + 11] * visible[0, top : top + 11, left : left + 11]
        yy, xx = torch.meshgrid(torch.arange(11.0) + top + 0.5, torch.arange(11.0) + left + 0.5, indexing="ij")
        centre = torch.stack([(window * xx).sum(), (window * yy).sum()]) / window.sum()
        assert (centre - torch.tensor([px, py])).norm() < 1.0
        found += 1
    assert found == 4


def test_visibility_knows_back_side_occlusion_frame_and_mask(head):
    view = camera(0.0)[0]
    seen = carry(head.template, head.faces, view).visibility
    z = head.template[:, 2]
    assert (seen[z < 0] == 0).all() and seen[z > 0.06].mean() > 0.95
    # From the side the nose hides the far corner of the face beside it.
    side = camera(1.0)[0]
    seen = carry(head.template, head.faces, side).visibility
    x, y = head.template[:, 0], head.template[:, 1]
    beside = (y.abs() < 0.01) & (z > 0.085) & (x < -0.012) & (x > -0.03)
    assert beside.any() and (seen[beside] == 0).all()
    closer = camera(0.0)[0].cropped(0, 0, SIZE / 2, SIZE)
    assert (carry(head.template, head.faces, closer).visibility[(y < -0.01) | (x > 0.01)] == 0).all()
    mask = torch.zeros(1, SIZE, SIZE)
    assert (carry(head.template, head.faces, view, mask).visibility == 0).all()


def test_batches_equal_singles(head):
    views, target = camera(0.0, 0.6), camera(0.3, -0.3)
    vertices = head.template.expand(2, -1, 3)
    images = paint(head, views, waves(head))
    fragments = rasterize(vertices, head.faces, target)
    carried = carry(vertices, head.faces, views)
    together, visible = warp(images, carried, fragments, head.faces)
    for i in range(2):
        one = Carried(carried.grid[i], carried.visibility[i])
        assert_close(carry(head.template, head.faces, views[i]).visibility, one.visibility)
        alone, seen = warp(images[i], one, fragments[i], head.faces)
        assert_close(alone, together[i])
        assert_close(seen, visible[i])


def test_mirror_vertices_is_an_involution_on_a_symmetric_head(head):
    twin = mirror_vertices(head)
    flipped = head.template * torch.tensor([-1.0, 1, 1])
    assert_close(head.template[twin], flipped, atol=1e-5, rtol=0)
    assert_close(head.template[twin[twin]], head.template, atol=1e-5, rtol=0)


def posed(head: Head, *batch: int) -> PosedHead:
    return PosedHead(head.template.expand(*batch, -1, 3), head.faces, torch.eye(4).expand(*batch, 5, 4, 4))


def drawn(portrait: CompletedHead, cameras: Camera):
    """The texture alone, on the head at rest: (rgb, normals, mask)."""
    whole = torch.cat([portrait.image, torch.ones_like(portrait.image[:1])])
    return render_lifted(LiftedPortrait(portrait, whole), posed(portrait.head, *cameras.batch), cameras)


def test_symmetry_fills_the_hidden_half(head):
    view, other = camera(0.8)[0], camera(-0.8, 0.8)
    colours = waves(head)
    portrait = complete(head, paint(head, view, colours), head.template, view, texels=256)
    rgb, normals, mask = drawn(portrait, other)
    truth = paint(head, other, colours)
    inner = -torch.nn.functional.max_pool2d(-mask, 9, 1, 4) > 0
    error = ((rgb - truth).abs() * inner).sum((1, 2, 3)) / inner.sum((1, 2, 3)) / 3
    assert error[1] < 0.01
    assert error[0] < 0.03
    assert_close(normals.norm(dim=1, keepdim=True), mask)
    assert_close(rgb[:, :, 0, 0], torch.full((2, 3), 0.5))


def test_light_from_one_side_leaves_no_seam(head):
    """The mirrored half takes on the shade of its neighbourhood instead of the other side's."""
    shade = 0.5 + 3 * head.template[:, :1]
    view, other = camera(0.6)[0], camera(-0.3)
    portrait = complete(head, paint(head, view, shade.expand(-1, 3)), head.template, view, texels=256)
    rgb, _, mask = drawn(portrait, other)
    inner = -torch.nn.functional.max_pool2d(-mask[0], 7, 1, 3)[0] > 0
    step = (rgb[0, 0, :, 1:] - rgb[0, 0, :, :-1]).abs()[inner[:, 1:] & inner[:, :-1]]
    assert step.max() < 0.06


def test_what_no_one_saw_has_a_colour(head):
    """A portrait from behind: the mouth becomes dark red, the rest goes on from what is around it."""
    view = camera(3.14)[0]
    blue = torch.tensor([0.2, 0.3, 0.8]).expand(len(head.template), 3)
    portrait = complete(head, paint(head, view, blue), head.template, view, texels=128)
    (rgb,), _, _ = drawn(portrait, camera(0.0))
    xy = camera(0.0)[0].project(torch.tensor([[0.0, -0.05, 0.09], [0.03, 0.04, 0.08]]))[0].long()
    mouth, cheek = (rgb[:, y, x] for x, y in xy.tolist())
    assert mouth[0] > 2 * mouth[2] and mouth[0] < 0.4
    assert_close(cheek, blue[0], atol=0.02, rtol=0)
    assert_close(rgb[:, 0, 0], torch.full((3,), 0.5))
    empty = dataclasses.replace(camera(0.0)[0], T_cam_world=torch.eye(4))
    assert complete(head, torch.rand(3, SIZE, SIZE), head.template, empty, texels=32).texture.isfinite().all()
