"""Fine detail is taken where the model agrees with its condition, and nowhere else."""

import torch
from torch.nn.functional import avg_pool2d, interpolate

from geodiff4d.video.detail import restore_detail

SIZE = 128


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A picture with detail, and the same without."""
    g = torch.Generator().manual_seed(0)
    smooth = 0.25 + 0.5 * interpolate(torch.rand(2, 3, 3, 3, generator=g), size=(SIZE, SIZE), mode="bicubic")
    fine = torch.randn(2, 3, SIZE, SIZE, generator=g)
    return (smooth + 0.05 * fine).clamp(0, 1), avg_pool2d(smooth, 5, 1, 2, count_include_pad=False)


def everywhere() -> torch.Tensor:
    return torch.ones(2, 1, SIZE, SIZE)


def test_a_soft_frame_that_agrees_becomes_sharp():
    sharp, soft = scene()
    out = restore_detail(soft, sharp, everywhere(), everywhere(), 0.2)
    assert (out - sharp).abs().mean() < 0.2 * (soft - sharp).abs().mean()


def test_the_frame_keeps_its_own_light():
    """A condition that is darker everywhere lends its detail, not its darkness."""
    sharp, soft = scene()
    out = restore_detail(soft, sharp - 0.05, everywhere(), everywhere(), 0.5)
    assert (out.mean() - soft.mean()).abs() < 0.003
    assert (out - soft).std() > 0.03


def test_hidden_or_contradicted_pixels_stay_as_decoded():
    sharp, soft = scene()
    nowhere = torch.zeros(2, 1, SIZE, SIZE)
    torch.testing.assert_close(restore_detail(soft, sharp, nowhere, nowhere, 0.2), soft)
    other = (soft + 0.3).clamp(0, 1)
    torch.testing.assert_close(restore_detail(other, sharp, everywhere(), everywhere(), 0.2), other)
    torch.testing.assert_close(restore_detail(other, sharp, nowhere, everywhere(), 0.2), other)
    half = nowhere.clone()
    half[..., : SIZE // 2] = 1
    out = restore_detail(soft, sharp, half, half, 0.2)
    torch.testing.assert_close(out[..., SIZE // 2 :], soft[..., SIZE // 2 :])
    assert (out[..., : SIZE // 2 - 8] - soft[..., : SIZE // 2 - 8]).abs().mean() > 0.01


def test_where_nobody_saw_only_texture_is_taken():
    """A completed texture lends what is finer than its own shapes; smooth filling leaves the frame as it was."""
    sharp, soft = scene()
    half = everywhere()
    half[..., : SIZE // 2] = 0
    inner = (..., slice(8, SIZE // 2 - 24))
    out = restore_detail(soft, sharp, half, everywhere(), 0.2)
    assert (out - sharp)[inner].std() < 0.5 * (soft - sharp)[inner].std()
    bump = torch.zeros(1, 1, SIZE, SIZE)
    bump[..., 50:80, 16:40] = 0.05
    shaped = soft + avg_pool2d(bump, 15, 1, 7)
    assert (restore_detail(soft, shaped, half, everywhere(), 0.2) - soft)[inner].abs().max() < 0.01
    grain = (soft + 0.05 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    kept = restore_detail(grain, soft, half, everywhere(), 0.2)
    assert (kept - grain)[inner].abs().mean() < 0.1 * (grain - soft)[inner].abs().mean()


def test_a_hole_in_what_the_portrait_shows_is_left_alone():
    """Mouths and eyes that a portrait hides have made-up texture."""
    sharp, soft = scene()
    seen = everywhere()
    seen[..., 60:66, 50:70] = 0
    out = restore_detail(soft, sharp, seen, everywhere(), 0.2)
    torch.testing.assert_close(out[..., 60:66, 50:70], soft[..., 60:66, 50:70])


def test_trust_is_steady():
    """What changes a little in the conditions changes frames as little: no mask is switched on or off."""
    sharp, soft = scene()
    dark = sharp - 0.12  # halfway out of the tolerance
    a = restore_detail(soft, dark, everywhere(), everywhere(), 0.2)
    b = restore_detail(soft, dark - 0.004, everywhere(), everywhere(), 0.2)
    assert (a - b).abs().max() < 0.02
