"""Outlines become lines, without the background that was mixed into them."""

import torch

from geodiff4d.video.outline import coverage, freed

SIZE = 128
COLOUR = torch.tensor([0.1, 0.3, 0.8]).view(1, 3, 1, 1)


def disc(softness: float) -> torch.Tensor:
    """How much of each pixel a round head covers, its outline `softness` pixels wide."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    away = ((x - SIZE / 2) ** 2 + (y - SIZE / 2) ** 2).sqrt()
    return ((40.3 - away) / softness + 0.5).clamp(0, 1)[None, None]


def test_grey_is_taken_out_of_an_unsure_outline():
    cover = disc(12.0)
    out, mask = freed(COLOUR * cover + 0.5 * (1 - cover), 0.9 * cover)
    assert (out - COLOUR).abs()[(cover >= 0.55).expand_as(out)].max() < 1e-5
    # The outline is now a line: twice as steep as what was covered, and at a half where that is 42 %.
    assert mask[0, 0, 64, :20].max() == 0
    assert torch.allclose(mask, ((0.9 * cover - 0.25) / 0.25).clamp(0, 1))


def test_noise_in_what_is_hardly_covered_is_not_blown_up():
    noisy, _ = freed(0.5 + 0.01 * torch.randn(1, 3, SIZE, SIZE), disc(12.0))
    assert (noisy - 0.5).abs().max() < 0.1


def test_a_colour_that_was_not_mixed_makes_no_dark_line():
    """The normals of a shoulder fade out while its colour does not: it stays between itself and what lies inside."""
    cover = disc(12.0)
    out, _ = freed(COLOUR.expand(1, 3, SIZE, SIZE), cover, reach=0.1)
    assert (out - COLOUR).abs()[(cover > 0.05).expand_as(out)].max() < 1e-6
    unbounded, _ = freed(COLOUR.expand(1, 3, SIZE, SIZE), 0.8 * cover)  # nothing full is near: nothing to go by
    assert (unbounded - COLOUR).abs().max() > 0.05


def test_sharp_frames_stay_as_they_are():
    cover = disc(0.01)
    rgb = torch.rand(1, 3, SIZE, SIZE) * cover + 0.5 * (1 - cover)
    out, mask = freed(rgb, cover)
    assert torch.allclose(out * cover, rgb * cover, atol=1e-6)
    assert torch.equal(mask, cover)


def test_coverage_is_a_normals_length_without_gaps():
    cover = disc(12.0)
    normals = 0.5 + 0.5 * cover * torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1)
    crease = normals.clone()
    crease[..., SIZE // 2] = 0.5 + 0.2 * (normals[..., SIZE // 2] - 0.5)
    for image in (normals, crease):
        found = coverage(image)
        assert (found - cover).abs()[..., 44:84, 44:84].max() < 1e-5
        assert found[..., :16, :].max() == 0
