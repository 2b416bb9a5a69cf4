"""The rasteriser against its oracle: values and vector-Jacobian products, odd sizes, broken scenes, threads."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import axis_angle_to_matrix, invert, look_at, matrix_to_quat, quat_multiply, transform
from geodiff4d.render import rasterizer_cpu
from geodiff4d.render.gaussians import Gaussians, rasterize, render
from geodiff4d.render.harmonics import TurnedHarmonics, rotate_harmonics, sh_basis, sh_colors


def camera(width: int = 37, height: int = 29, distance: float = 0.6) -> Camera:
    T = look_at(torch.tensor([0.1, 0.05, distance]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    return Camera(T.double(), pinhole(60.0, width, height).double(), width, height)


def scene(n: int = 60, channels: int = 4, seed: int = 0, opacity: float = 0.6) -> tuple[Gaussians, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    splats = Gaussians(
        means=0.08 * torch.randn(n, 3, generator=g, dtype=torch.float64),
        quats=torch.randn(n, 4, generator=g, dtype=torch.float64),
        scales=0.012 * torch.randn(n, 3, generator=g, dtype=torch.float64).exp(),
        opacities=(opacity + 0.39 * torch.rand(n, generator=g, dtype=torch.float64)).clamp(max=1),
    )
    return splats, torch.randn(n, channels, generator=g, dtype=torch.float64)


def single(splats: Gaussians) -> Gaussians:
    return Gaussians(*(x.float() for x in vars(splats).values()))


def assert_close(ours: torch.Tensor, oracle: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = (ours.double() - oracle).abs().max()
    assert error <= tolerance * max(1, float(oracle.abs().max())), float(error)


def vjp(splats: Gaussians, cam: Camera, features: torch.Tensor, cotangent: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (*vars(splats).values(), features)]
    out = torch.cat(rasterize(Gaussians(*leaves[:4]), cam, leaves[4]))
    return list(torch.autograd.grad(out, leaves, cotangent.to(out)))


def assert_same_vjp(cam: Camera, splats: Gaussians, features: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Kernels in float32 against the oracle in float64, along a random cotangent."""
    shape = (features.shape[1] + 1, cam.height, cam.width)
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = vjp(single(splats), cam, features.float(), cotangent), vjp(splats, cam, features, cotangent)
    for name, a, b in zip(("means", "quats", "scales", "opacities", "features"), ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name


@pytest.mark.parametrize(("width", "height", "channels"), [(37, 29, 4), (16, 16, 1), (5, 40, 7), (50, 20, 9)])
def test_equals_oracle(width, height, channels):
    cam, (splats, features) = camera(width, height), scene(channels=channels)
    image, alpha = rasterize(single(splats), cam, features.float())
    assert image.dtype == torch.float32
    assert_close(torch.cat([image, alpha]), torch.cat(rasterize(splats, cam, features)))
    assert_same_vjp(cam, splats, features)


def test_full_pixels_stop():
    """Opaque stacks end at T ≤ 1e-4, forward and backward."""
    cam, (splats, features) = camera(), scene(n=200, opacity=0.98)
    image, alpha = rasterize(single(splats), cam, features.float())
    expected = rasterize(splats, cam, features)
    assert expected[1].max() > 0.9995
    assert_close(torch.cat([image, alpha]), torch.cat(expected))
    # Light that is nearly used up is divided back out of T: fewer digits are left.
    assert_same_vjp(cam, splats, features, 2e-3)


def test_wide_angles_are_clamped():
    """Splats far outside the image use the clamped linearisation, with its true derivative."""
    cam, (splats, features) = camera(distance=0.15), scene(seed=3)
    assert_close(rasterize(single(splats), cam, features.float())[0], rasterize(splats, cam, features)[0], 1e-4)
    assert_same_vjp(cam, splats, features, 1e-3)


def test_needles_keep_their_width():
    """Across a needle a hundred pixels long the covariance's entries cancel; its width must not."""
    cam, (splats, features) = camera(64, 64), scene(n=20, seed=2)
    scales = torch.tensor([0.5, 1e-5, 1e-5], dtype=torch.float64).expand(20, 3)
    needles = Gaussians(splats.means, splats.quats, scales, splats.opacities)
    assert_close(rasterize(single(needles), cam, features.float())[0], rasterize(needles, cam, features)[0], 2e-3)


def test_same_bits_for_any_number_of_threads(monkeypatch):
    cam, (splats, features) = camera(), scene(n=300)
    cotangent = torch.ones(5, cam.height, cam.width)
    ones = [*rasterize(single(splats), cam, features.float()), *vjp(single(splats), cam, features.float(), cotangent)]
    monkeypatch.setattr(rasterizer_cpu, "BLOCK", 16)
    monkeypatch.setattr(rasterizer_cpu.numba, "get_num_threads", lambda: 7)
    more = [*rasterize(single(splats), cam, features.float()), *vjp(single(splats), cam, features.float(), cotangent)]
    assert all(torch.equal(a, b) for a, b in zip(ones, more, strict=True))


def test_order_does_not_matter():
    cam, (splats, features) = camera(), scene()
    splats, features = single(splats), features.float()
    shuffled = torch.randperm(len(splats), generator=torch.Generator().manual_seed(0))
    a, b = rasterize(splats, cam, features)[0], rasterize(splats[shuffled], cam, features[shuffled])[0]
    assert torch.equal(a, b)


def test_rigid_motion_of_world_and_camera_changes_nothing():
    cam, (splats, features) = camera(), scene()
    move = look_at(*torch.tensor([[0.3, 1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64))
    quats = quat_multiply(matrix_to_quat(move[:3, :3]).expand(len(splats), 4), normalize(splats.quats, dim=-1))
    moved = Gaussians(transform(move, splats.means), quats, splats.scales, splats.opacities)
    there = Camera(cam.T_cam_world @ invert(move), cam.K, cam.width, cam.height)
    expected = rasterize(splats, cam, features)
    torch.testing.assert_close(rasterize(moved, there, features), expected, atol=1e-9, rtol=1e-7)
    assert_close(rasterize(single(moved), there, features.float())[0], expected[0], 1e-4)


def test_batches_backgrounds_and_depth():
    """A batch is its cameras one by one; a background shines through; depth is one more channel."""
    cams = Camera.stack([camera(), camera(distance=0.5)])
    splats, features = scene(channels=3)
    splats, features = single(splats), features.float()
    behind = torch.tensor([0.2, 0.5, 0.9])
    out = render(splats, cams, features, behind, depth=True)
    assert out.image.shape == (2, 3, 29, 37) and out.dropped == 0
    for k in range(2):
        image, alpha = rasterize(splats, cams[k], features)
        torch.testing.assert_close(out.image[k], image + (1 - alpha) * behind[:, None, None])
        z = transform(cams[k].T_cam_world.float(), splats.means)[:, 2:]
        torch.testing.assert_close(out.depth[k], rasterize(splats, cams[k], z)[0])
    own = render(splats, cams, torch.stack([features, 2 * features]))
    torch.testing.assert_close(own.image[1], 2 * rasterize(splats, cams[1], features)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_broken_gaussians_are_dropped_and_counted(dtype):
    cam, (splats, features) = camera(), scene(n=40)
    splats, features = Gaussians(*(x.to(dtype) for x in vars(splats).values())), features.to(dtype)
    clean = rasterize(splats[6:], cam, features[6:])
    for x in (*vars(splats).values(), features):
        x.requires_grad_()
    with torch.no_grad():
        splats.means[0, 1] = splats.scales[1, 0] = splats.opacities[2] = torch.nan
        splats.quats[3], splats.scales[4], features[5, 2] = 0, torch.inf, -torch.inf
    out = render(splats, cam, features)
    assert out.dropped == 6 and out.broken[:6].all()
    torch.testing.assert_close((out.image, out.alpha), clean)
    (out.image.sum() + out.alpha.sum()).backward()
    for x in (*vars(splats).values(), features):
        assert x.grad.isfinite().all() and not x.grad[:6].any() and x.grad[6:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_draw(dtype):
    cam, (splats, features) = camera(), scene()
    splats, features = Gaussians(*(x.to(dtype) for x in vars(splats).values())), features.to(dtype)
    behind = Gaussians(splats.means + torch.tensor([0.0, 0.0, 100.0]), splats.quats, splats.scales, splats.opacities)
    broken = Gaussians(torch.full_like(splats.means, torch.nan), splats.quats, splats.scales, splats.opacities)
    for empty, f in ((splats[:0], features[:0]), (behind, features), (broken, features)):
        image, alpha = rasterize(empty, cam, f)
        assert image.shape == (4, cam.height, cam.width) and not image.any() and not alpha.any()
    assert not any(g.any() for g in vjp(behind, cam, features, torch.ones(5, cam.height, cam.width)))


def test_a_far_outlier_does_not_spoil_the_order():
    """Depths that differ in all bits sort exactly, as do two that differ in the last."""
    cam, (splats, features) = camera(), scene(n=40)
    far = torch.cat([splats.means[:1] - 1e6 * cam.T_cam_world[2, :3] * -1, splats.means[1:]])
    splats = Gaussians(far, splats.quats, splats.scales, splats.opacities)
    assert_close(rasterize(single(splats), cam, features.float())[0], rasterize(splats, cam, features)[0])


def test_bad_arguments():
    cam, (splats, features) = camera(), scene()
    with pytest.raises(ValueError, match="features must be"):
        rasterize(splats, cam, features[:3])
    with pytest.raises(ValueError, match="use float32"):
        rasterize(splats, Camera(cam.T_cam_world, cam.K, 4096, 4096), features)


def test_oracle_gradcheck():
    cam, (splats, features) = camera(6, 5), scene(n=3, channels=2, opacity=0.4)
    leaves = [x.clone().requires_grad_() for x in (*vars(splats).values(), features)]
    assert torch.autograd.gradcheck(lambda *x: torch.cat(rasterize(Gaussians(*x[:4]), cam, x[4])), leaves)


@pytest.mark.gpu
def test_gsplat_equals_oracle():
    cam, (splats, features) = camera(), scene()
    expected = torch.cat(rasterize(splats, cam, features))
    on_gpu = Gaussians(*(x.cuda() for x in vars(single(splats)).values()))
    error = (torch.cat(rasterize(on_gpu, cam, features.float().cuda())).cpu() - expected).abs()
    assert np.quantile(error, 0.99) < 1e-4


def test_spherical_harmonics():
    """Orthonormal over the sphere, in one pass with normals and depth, gradients down to the coefficients."""
    z, weight = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(8))
    around = 2 * torch.pi * torch.arange(16, dtype=torch.float64) / 16
    r = (1 - z**2).sqrt()[:, None]
    directions = torch.stack([r * around.cos(), r * around.sin(), z[:, None].expand(8, 16)], -1)
    basis = sh_basis(directions, 3)
    products = torch.einsum("pab,pac,p->bc", basis, basis, weight) * 2 * torch.pi / 16
    torch.testing.assert_close(products, torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0)

    cams = Camera.stack([camera(), camera(distance=0.5)])
    splats, normals = scene(n=30, channels=3)
    coefficients = (0.2 * torch.randn(30, 16, 3, generator=torch.Generator().manual_seed(2))).requires_grad_()
    splats, normals = single(splats), normals.float()
    features = torch.cat([sh_colors(splats, cams, coefficients), normals.expand(2, -1, -1)], -1)
    out = render(splats, cams, features, depth=True)
    assert out.image.shape == (2, 6, 29, 37) and out.depth is not None
    out.image.square().sum().backward()
    assert coefficients.grad is not None and coefficients.grad.isfinite().all() and coefficients.grad.any()
    with pytest.raises(ValueError, match="1, 4, 9 or 16"):
        sh_colors(splats, cams, coefficients[:, :5])


@pytest.mark.parametrize("degree", [1, 3])
def test_harmonics_turn_with_their_frames(degree):
    """Seen in frames that turned, or as coefficients in the world: the same colours, and exact gradients."""
    g = torch.Generator().manual_seed(degree)
    count = (degree + 1) ** 2 - 1
    rest = (0.05 * torch.randn(5, count, 3, generator=g, dtype=torch.float64)).requires_grad_()
    angles = (2 * torch.randn(5, 3, generator=g, dtype=torch.float64)).requires_grad_()
    splats, cam = scene(n=5, channels=3)[0], camera()
    colors = torch.rand(5, 3, generator=g, dtype=torch.float64) * 0.5 + 0.5
    turned = TurnedHarmonics(rest, axis_angle_to_matrix(angles))
    world = torch.cat([((colors - 0.5) / 0.28209479177387814)[:, None], turned.in_world()], 1)
    torch.testing.assert_close(turned.seen(colors, splats.means, cam), sh_colors(splats, cam, world), atol=1e-9, rtol=0)
    back = rotate_harmonics(turned.in_world(), turned.turn.mT)
    torch.testing.assert_close(back, rest, atol=1e-9, rtol=0)
    means = splats.means.detach().clone().requires_grad_()
    seen = lambda c, a, m: TurnedHarmonics(c, axis_angle_to_matrix(a)).seen(colors, m, cam)  # noqa: E731
    assert torch.autograd.gradcheck(seen, (rest, angles, means))
    if degree == 3:
        with pytest.raises(ValueError, match="3, 8 or 15"):
            rotate_harmonics(rest[:, :4], turned.turn)
