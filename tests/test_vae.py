"""The codecs: what a linear patch code promises, and Stable Diffusion's autoencoder behind the same interface."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.errors import UserError
from geodiff4d.data.footage.rendered import Store, StoreConfig
from geodiff4d.video.train_codec import CodecTraining, train_codec
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig, StableCodec, load_codec

CONFIG = PatchCodecConfig(factor=4, channels=6, trunk=8, detail=8)


def smooth_images(n: int, seed: int = 0, rank: int = 6) -> torch.Tensor:
    """Images whose patches span few directions, so that a code of that rank is exact."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(48, rank, generator=torch.Generator().manual_seed(7)))[0]
    sizes = torch.linspace(1.0, 0.2, rank)
    patches = (torch.randn(n, 4, 4, rank, generator=g) * sizes) @ directions.mT * 0.3
    return torch.pixel_shuffle(patches.permute(0, 3, 1, 2).contiguous(), 4).clamp(-0.95, 0.95) / 2 + 0.5


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    torch.manual_seed(0)
    codec = PatchCodec(CONFIG)
    codec.fit_basis(smooth_images(64))
    return codec.eval()


@torch.no_grad()
def test_channels_count_as_they_show_in_pixels():
    """Orthonormal components: the pixels' squared error is the weighted sum of the channels'."""
    codec = PatchCodec(PatchCodecConfig(factor=4, channels=5, trunk=8, detail=8))
    codec.fit_basis(torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    a, b = torch.randn(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels = (codec.decode_linear(a) - codec.decode_linear(b)).square().sum((1, 2, 3))
    latents = ((a - b).square() * codec.visibility[:, None, None]).sum((1, 2, 3))
    assert_close(latents / latents[0], pixels / pixels[0])
    assert_close(codec.visibility.mean(), torch.tensor(1.0))


def test_the_basis_is_orthonormal_and_latents_have_unit_variance(codec):
    assert_close(codec.basis.mT @ codec.basis, torch.eye(6), atol=1e-5, rtol=0)
    z = codec.encode(smooth_images(64))
    assert z.shape == (64, 6, 4, 4)
    assert_close(z.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    variance = z.var((0, 2, 3))
    assert_close(variance.mean(), torch.tensor(1.0), atol=0.01, rtol=0)
    # Half of the deviation is divided out: large components keep part of their weight.
    assert (variance.diff() < 0).all() and variance[0] > 2 * variance[-1]


@torch.no_grad()
def test_images_in_the_span_come_back(codec):
    images = smooth_images(3, seed=5)
    assert_close(codec.decode(codec.encode(images)), images, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_projection_is_not_projected_again(codec):
    z = codec.encode(torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)))
    assert_close(codec.encode(codec.decode_linear(z) / 2 + 0.5), z, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoded_images_stay_in_range(codec):
    out = codec.decode(torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1)) * 20)
    assert out.min() == 0 and out.max() == 1


@torch.no_grad()
def test_a_patch_codec_survives_its_folder(codec, tmp_path):
    torch.manual_seed(1)
    trained = PatchCodec(CONFIG)
    trained.load_state_dict(codec.state_dict())
    for p in trained.parameters():
        torch.nn.init.normal_(p, std=0.1)
    trained.save(tmp_path / "vae")
    again = load_codec(tmp_path / "vae")
    assert isinstance(again, PatchCodec) and again.config == CONFIG and (again.channels, again.factor) == (6, 4)
    for k, v in trained.state_dict().items():
        assert_close(again.state_dict()[k], v.half().float(), atol=0, rtol=0)
    images = smooth_images(2, seed=9)
    assert_close(again.decode(again.encode(images)), trained.decode(trained.encode(images)), atol=5e-3, rtol=0)


def test_what_is_no_codec_is_refused(codec, tmp_path):
    folder = tmp_path / "vae"
    with pytest.raises(UserError, match="not a model folder"):
        load_codec(folder)
    codec.save(folder)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"kind": "other"}, "not a codec"),
        ({"colour": 3}, "does not fit its config"),
        ({"channels": 5}, "does not fit its config"),
        ({"factor": 6}, "does not fit its config"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_codec(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        load_codec(folder)


# Stable Diffusion's autoencoder


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.18215, sample_size=16,
    ).eval()  # fmt: skip
    folder = tmp_path_factory.mktemp("sd") / "vae"
    vae.save_pretrained(folder)
    return vae, folder


@torch.no_grad()
def test_a_stable_codec_is_the_autoencoder_scaled(stable):
    vae, folder = stable
    codec = load_codec(folder)
    assert isinstance(codec, StableCodec) and (codec.channels, codec.factor) == (4, 4)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z = codec.encode(images)
    assert z.shape == (5, 4, 4, 4)
    assert_close(z, vae.encode(images * 2 - 1).latent_dist.mean * 0.18215, atol=1e-5, rtol=1e-4)
    assert_close(codec.decode(z), (vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-4)
    small = StableCodec(folder, chunk=2)
    assert_close(small.encode(images), z, atol=1e-5, rtol=1e-4)
    assert_close(small.decode(z), codec.decode(z), atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in codec.parameters())


@torch.no_grad()
def test_a_stable_codec_survives_its_folder(stable, tmp_path):
    from diffusers import AutoencoderKL

    codec = load_codec(stable[1])
    codec.save(tmp_path / "vae")
    images = torch.rand(1, 3, 16, 16)
    assert_close(load_codec(tmp_path / "vae").encode(images), codec.encode(images), atol=0, rtol=0)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    assert_close(theirs, stable[0].state_dict(), atol=0, rtol=0)
    weights, config = (tmp_path / "vae" / name for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode, "whoever may read one may read the other"


class TinyStore(Store):
    """Pictures of noise, two people by two instants by two views."""

    def __init__(self) -> None:
        self.config = StoreConfig(subjects=2, instants=2, views=2, size=16, crop=16)
        rng = np.random.default_rng(0)
        self.rgb, self.normal, self.pose = rng.integers(0, 255, (3, 2, 2, 2, 3, 16, 16)).astype(np.uint8)


def test_resumed_codec_training_equals_uninterrupted(tmp_path):
    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] == 3:
            raise StopError

    config = CodecTraining(CONFIG, steps=4, batch=2, basis_images=4, save_every=2)
    whole = train_codec(tmp_path / "whole", TinyStore(), config)
    with pytest.raises(StopError):
        train_codec(tmp_path / "parts", TinyStore(), config, stop)
    torch.manual_seed(99)
    parts = train_codec(tmp_path / "parts", TinyStore(), config)
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    seen: list[int] = []
    again = train_codec(tmp_path / "parts", TinyStore(), config, lambda record: seen.append(record["step"]))
    assert not seen and torch.equal(again.detail[3].weight, whole.detail[3].weight)
    with pytest.raises(UserError, match="another configuration"):
        train_codec(tmp_path / "parts", TinyStore(), replace(config, batch=3))
