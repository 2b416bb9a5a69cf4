"""Detail is given back where the model agrees with its condition, and nowhere else."""

import torch

from geodiff4d.video.detail import restore_detail
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig


def scene():
    torch.manual_seed(0)
    codec = PatchCodec(PatchCodecConfig(factor=8, channels=6, trunk=16, detail=8))
    smooth = torch.nn.functional.interpolate(torch.rand(6, 3, 8, 8), size=(64, 64), mode="bilinear")
    pictures = (smooth + 0.1 * torch.randn_like(smooth)).clamp(0, 1)
    codec.fit_basis(pictures)
    return codec, pictures[:2]


@torch.no_grad()
def test_a_frame_that_agrees_gets_its_pixels_back():
    codec, pictures = scene()
    decoded = codec.decode(codec.encode(pictures))
    seen = torch.ones(2, 1, 64, 64)
    assert (decoded - pictures).abs().mean() > 0.02
    torch.testing.assert_close(restore_detail(decoded, pictures, seen, codec, 0.1), pictures, atol=1e-5, rtol=0)


@torch.no_grad()
def test_hidden_or_contradicted_pixels_stay_as_decoded():
    codec, pictures = scene()
    decoded = codec.decode(codec.encode(pictures))
    unseen = restore_detail(decoded, pictures, torch.zeros(2, 1, 64, 64), codec, 0.1)
    torch.testing.assert_close(unseen, decoded)
    other = (decoded + 0.3).clamp(0, 1)
    changed = (other - decoded).abs().mean(1, keepdim=True).expand_as(other) > 0.25
    far = torch.nn.functional.max_pool2d((~changed).float(), 9, 1, 4) == 0
    kept = restore_detail(other, pictures, torch.ones(2, 1, 64, 64), codec, 0.1)
    torch.testing.assert_close(kept[far], other[far])
