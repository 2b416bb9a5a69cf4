"""The rasteriser against its oracle: values and vector-Jacobian products, odd sizes, scenes with nothing to draw."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import invert, look_at, matrix_to_quat, quat_multiply, transform
from geodiff4d.render._torch import rasterize_oracle
from geodiff4d.render.gaussians import Gaussians, rasterize


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


def oracle(splats: Gaussians, cam: Camera, features: torch.Tensor) -> torch.Tensor:
    return rasterize_oracle(*vars(splats).values(), features, cam.T_cam_world, cam.K, cam.width, cam.height)


def vjp(render, splats: Gaussians, features: torch.Tensor, cotangent: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (*vars(splats).values(), features)]
    out = render(Gaussians(*leaves[:4]), leaves[4])
    return list(torch.autograd.grad(out, leaves, cotangent))


def assert_same_vjp(cam: Camera, splats: Gaussians, features: torch.Tensor, cotangent: torch.Tensor) -> None:
    ours = vjp(lambda s, f: torch.cat(rasterize(s, cam, f)), splats, features, cotangent)
    theirs = vjp(lambda s, f: oracle(s, cam, f), splats, features, cotangent)
    for name, a, b in zip(("means", "quats", "scales", "opacities", "features"), ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max(), name


@pytest.mark.parametrize(("width", "height", "channels"), [(37, 29, 4), (16, 16, 1), (5, 40, 7)])
def test_equals_oracle(width, height, channels):
    cam, (splats, features) = camera(width, height), scene(channels=channels)
    expected = oracle(splats, cam, features)
    torch.testing.assert_close(torch.cat(rasterize(splats, cam, features)), expected, atol=1e-9, rtol=1e-8)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same_vjp(cam, splats, features, cotangent)


def test_full_pixels_stop():
    """Opaque stacks end at T ≤ 1e-4, forward and backward."""
    cam, (splats, features) = camera(), scene(n=200, opacity=0.98)
    expected = oracle(splats, cam, features)
    assert expected[-1].max() > 0.9995
    torch.testing.assert_close(torch.cat(rasterize(splats, cam, features)), expected, atol=1e-9, rtol=1e-8)
    assert_same_vjp(cam, splats, features, torch.ones_like(expected))


def test_float32_is_close():
    cam, (splats, features) = camera(), scene()
    single = Gaussians(*(x.float() for x in vars(splats).values()))
    image, alpha = rasterize(single, cam, features.float())
    assert image.dtype == torch.float32
    error = (torch.cat([image, alpha]) - oracle(splats, cam, features)).abs()
    assert error.quantile(0.99) < 1e-5 and error.max() < 1e-2  # a splat at α ≈ 1/255 may flip


def test_wide_angles_are_clamped():
    """Splats far outside the picture use the clamped linearisation, with its true derivative."""
    cam, (splats, features) = camera(distance=0.15), scene(seed=3)
    expected = oracle(splats, cam, features)
    torch.testing.assert_close(torch.cat(rasterize(splats, cam, features)), expected, atol=1e-9, rtol=1e-8)
    assert_same_vjp(cam, splats, features, torch.ones_like(expected))


def test_order_does_not_matter():
    cam, (splats, features) = camera(), scene()
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


def test_nothing_to_draw():
    cam, (splats, features) = camera(), scene()
    away = torch.tensor([0.0, 0.0, 100.0], dtype=torch.float64)
    behind = Gaussians(splats.means + away, splats.quats, splats.scales, splats.opacities)
    broken = Gaussians(torch.full_like(splats.means, torch.nan), splats.quats, splats.scales, splats.opacities)
    for empty, f in ((splats[:0], features[:0]), (behind, features), (broken, features)):
        image, alpha = rasterize(empty, cam, f)
        assert image.shape == (4, cam.height, cam.width) and not image.any() and not alpha.any()
    ones = torch.ones(5, cam.height, cam.width, dtype=torch.float64)
    grads = vjp(lambda s, f: torch.cat(rasterize(s, cam, f)), behind, features, ones)
    assert not any(g.any() for g in grads)


def test_bad_arguments():
    cam, (splats, features) = camera(), scene()
    with pytest.raises(ValueError, match="one camera"):
        rasterize(splats, Camera.stack([cam, cam]), features)
    with pytest.raises(ValueError, match="features must be"):
        rasterize(splats, cam, features[:3])


def test_oracle_gradcheck():
    cam, (splats, features) = camera(6, 5), scene(n=3, channels=2, opacity=0.4)
    leaves = [x.clone().requires_grad_() for x in (*vars(splats).values(), features)]
    assert torch.autograd.gradcheck(lambda *x: oracle(Gaussians(*x[:4]), cam, x[4]), leaves)


@pytest.mark.gpu
def test_gsplat_equals_oracle():
    cam, (splats, features) = camera(), scene()
    expected = oracle(splats, cam, features)
    on_gpu = Gaussians(*(x.float().cuda() for x in vars(splats).values()))
    error = (torch.cat(rasterize(on_gpu, cam, features.float().cuda())).cpu() - expected).abs()
    assert np.quantile(error, 0.99) < 1e-4
