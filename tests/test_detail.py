"""Fine detail is taken where the model agrees with its condition, and nowhere else."""

import torch
from torch.nn.functional import avg_pool2d, interpolate

from geodiff4d.video.detail import restore_detail


def scene(size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture with detail, and the same without."""
    g = torch.Generator().manual_seed(0)
    smooth = 0.25 + 0.5 * interpolate(torch.rand(2, 3, 3, 3, generator=g), size=(size, size), mode="bicubic")
    fine = torch.randn(2, 3, size, size, generator=g)
    return (smooth + 0.05 * fine).clamp(0, 1), avg_pool2d(smooth, 5, 1, 2, count_include_pad=False)


def test_a_soft_frame_that_agrees_becomes_sharp():
    sharp, soft = scene()
    out = restore_detail(soft, sharp, torch.ones(2, 1, 128, 128), 0.2)
    assert (out - sharp).abs().mean() < 0.2 * (soft - sharp).abs().mean()


def test_the_frame_keeps_its_own_light():
    """A condition that is darker everywhere lends its detail, not its darkness."""
    sharp, soft = scene()
    out = restore_detail(soft, sharp - 0.05, torch.ones(2, 1, 128, 128), 0.5)
    assert (out.mean() - soft.mean()).abs() < 0.003
    assert (out - soft).std() > 0.03


def test_hidden_or_contradicted_pixels_stay_as_decoded():
    sharp, soft = scene()
    torch.testing.assert_close(restore_detail(soft, sharp, torch.zeros(2, 1, 128, 128), 0.2), soft)
    other = (soft + 0.3).clamp(0, 1)
    torch.testing.assert_close(restore_detail(other, sharp, torch.ones(2, 1, 128, 128), 0.2), other)
    half = torch.zeros(2, 1, 128, 128)
    half[..., :64] = 1
    out = restore_detail(soft, sharp, half, 0.2)
    torch.testing.assert_close(out[..., 64:], soft[..., 64:])
    assert (out[..., :56] - soft[..., :56]).abs().mean() > 0.01
