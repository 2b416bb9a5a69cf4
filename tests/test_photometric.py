"""L1 and SSIM of the kernel against torch's convolutions in float64, values and gradients."""

import pytest
import torch

from geodiff4d.render import photometric as module
from geodiff4d.render.photometric import photometric, ssim, ssim_reference


def images(height: int, width: int, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images with flat and busy parts, alike enough for SSIM to be neither 0 nor 1."""
    g = torch.Generator().manual_seed(height + width)
    a = torch.rand(channels, height, width, generator=g, dtype=torch.float64)
    a[:, : height // 2] = 0.5
    return a, (a + 0.1 * torch.randn(a.shape, generator=g, dtype=torch.float64)).clamp(0, 1)


def value_and_gradient(a: torch.Tensor, b: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    a = a.clone().requires_grad_()
    loss = photometric(a, b, weight)
    return loss.detach(), torch.autograd.grad(3 * loss, a)[0]


@pytest.mark.parametrize(("height", "width", "channels"), [(64, 48, 3), (37, 53, 3), (5, 3, 1), (80, 17, 2)])
@pytest.mark.parametrize("weight", [0.2, 1.0, 0.0])
def test_equals_reference(height, width, channels, weight):
    a, b = images(height, width, channels)
    loss, gradient = value_and_gradient(a.float(), b.float(), weight)
    expected, expected_gradient = value_and_gradient(a, b, weight)
    assert abs(loss - expected) < 1e-5
    # Per pixel and channel of the mean; equal pixels have no sign to agree on.
    differ = (a.float() - b.float()).abs() > 0
    assert ((gradient - expected_gradient).abs() * differ).max() * a.numel() < 1e-3
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_same_bits_for_any_number_of_threads(monkeypatch):
    a, b = (x.float() for x in images(100, 40))
    one = value_and_gradient(a, b, 0.2)
    monkeypatch.setattr(module.numba, "get_num_threads", lambda: 3)
    assert all(torch.equal(x, y) for x, y in zip(one, value_and_gradient(a, b, 0.2), strict=True))


def test_reference_is_the_window_written_out():
    """Eleven by eleven weights at once, in the middle of an image, by the definition."""
    a, b = images(11, 11, 1)
    x = torch.arange(11, dtype=torch.float64) - 5
    g = torch.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    w = g / g.sum()
    ma, mb = (w * a[0]).sum(), (w * b[0]).sum()
    va, vb = (w * (a[0] - ma) ** 2).sum(), (w * (b[0] - mb) ** 2).sum()
    cov = (w * (a[0] - ma) * (b[0] - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert module.ssim_map(a, b)[0, 5, 5] == pytest.approx(float(expected), abs=1e-12)


def test_equal_images_and_gradcheck():
    a, b = images(20, 24)
    assert float(ssim(a.float(), a.float())) == pytest.approx(1, abs=1e-5)
    assert value_and_gradient(a.float(), a.float(), 0.2)[1].abs().max() * a.numel() < 1e-3
    small = [x[:1, :6, :7].clone().requires_grad_() for x in (a, b)]
    assert torch.autograd.gradcheck(ssim_reference, small)
