"""Batches of any footage: samples by themselves, padding and unknown normals count nothing, caches change nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.errors import UserError
from geodiff4d.data.footage.rendered import RenderedFootage
from geodiff4d.data.footage.take import DecodedFrames, Footage, FrameKey, Take
from geodiff4d.data.sampling import PairConfig, ReadConfig, Samples
from geodiff4d.video.batches import Batches, WeightConfig
from geodiff4d.video.encode import encode_store
from geodiff4d.video.model import load_video_model
from geodiff4d.video.objective import Draws, Objective
from geodiff4d.video.train import train_video_model
from geodiff4d.video.vae import StableCodec
from tiny import EMBEDDED, PAPER, SIZE, TRAINING, UNET, TinyStore, build, tiny_codec


class Film(Footage):
    """A ramp that moves with time and view; `normals` off: nobody knows its surface."""

    def __init__(self, instants: int, normals: bool = True):
        self.name, self.normals = "film", normals
        self.takes = [Take("a", np.arange(instants), np.ones((instants, 2), bool), temporal=True)]

    def reference_views(self, take):
        return [0, 1]

    driving_views = reference_views

    def _pictures(self, keys, size):
        ramp = torch.linspace(0, 1, size).expand(3, size, size)
        return torch.stack([0.5 + 0.4 * torch.cos(3 * ramp + 0.3 * k.instant + k.view) for k in keys])

    def frames(self, keys, size):
        rgb = self._pictures(keys, size)
        mask = torch.zeros(len(rgb), 1, size, size)
        mask[..., : size // 2] = 1
        known = torch.full((len(rgb),), self.normals)
        return DecodedFrames(rgb, mask, rgb.flip(1), known, rgb.flip(2), mask)

    def cached(self, keys):
        return None

    def driving(self, keys, size):
        return self._pictures(keys, size)

    def warped(self, reference, keys, size, surroundings=False, moved=None):
        return self._pictures(keys, size), torch.ones(len(keys), 2, size, size)


CLIP = PairConfig(references=2, targets=4, clips=True)
READ = ReadConfig(SIZE, 16, warp=True, augment=None)
VIDEO = replace(EMBEDDED, unet=replace(UNET, temporal_layers=1, temporal_ff_factor=2))
WEIGHTS = WeightConfig(background=0.5, foreground=1.0, focus=0.0)


def batches(instants: int = 3, normals: bool = True, **options) -> Batches:
    samples = Samples([Film(instants, normals)], CLIP, READ)
    return Batches(samples, tiny_codec(), **{"weights": WEIGHTS, **options})


def test_batches_are_ranges_of_samples():
    all_in_all = batches()
    batch, x, codec = all_in_all[3], all_in_all.samples[7], all_in_all.codec
    assert all_in_all.targets == 8 and batch.index.tolist() == [6, 7] and x.padding == 1
    assert_close(batch.crops[1, :3], x.driving)
    assert_close(batch.target[1, 0, :, :3], codec.encode(x.frames.rgb[1:]).movedim(0, 1))
    assert_close(batch.pose[1, :, :3], codec.encode(x.frames.pose[1:]).movedim(0, 1))
    assert_close(batch.reference[1], codec.encode(x.frames.rgb[:1])[0])
    for v in (batch.target, batch.pose, batch.warp, batch.crops.movedim(1, 2)):
        frames = v.movedim(3 if v.ndim == 6 else 2, 0)
        assert torch.equal(frames[3], frames[2]), "what is missing repeats the last frame"
    resized = batches(encoded_pose=False)[3]
    assert resized.pose.shape == (2, 3, 4, 8, 8) and resized.reference_pose.shape == (2, 3, 8, 8)


def test_a_cache_and_encoding_on_the_fly_agree(tmp_path):
    """Of one store: latents within half precision, and everything else alike."""
    pairs, codec = PairConfig(references=2, targets=3, moved=0.5), tiny_codec()
    made = []
    for cached in (False, True):
        footage = RenderedFootage(TinyStore())
        if cached:
            assert encode_store(footage, codec, tmp_path / "latents.npy")
            assert footage.cached([FrameKey(0, 0, 0)]).planes.shape == (1, 18, 8, 8)
        made.append(Batches(Samples([footage], pairs, READ), codec, WeightConfig(1.0, 0.0, 0.0))[4])
    for k, v in vars(made[0]).items():
        assert_close(getattr(made[1], k), v, atol=4e-3, rtol=2e-3, msg=k)


def test_cached_and_decoded_samples_share_a_batch(tmp_path):
    footage, codec = RenderedFootage(TinyStore()), tiny_codec()
    encode_store(footage, codec, tmp_path / "latents.npy")
    pairs = PairConfig(references=4, targets=2, least_share=0.5)
    samples = Samples([footage, Film(3, normals=False)], pairs, READ)
    given, sources = Batches(samples, codec), [samples.draw(i).source for i in range(4)]
    assert set(sources) == {0, 1}
    batch = given[0]
    for row, source in enumerate(sources):
        assert (batch.weight[row, 1].max() == 0) == (source == 1) and batch.weight[row, 0].max() > 0
        assert batch.weight[row, 0].mean().item() == pytest.approx(1, abs=1e-5), "each by itself"
        alone = Batches(Samples(samples.sources, replace(pairs, references=1), READ), codec)[row]
        assert_close(alone.target[0], batch.target[row])


def test_examples_follow_the_codec_to_its_device(monkeypatch):
    """Stable Diffusion's autoencoder has parameters and no buffers."""
    with torch.device("meta"):
        codec = StableCodec(None)
    seen: list[str] = []
    small = lambda x: x[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4]  # noqa: E731
    monkeypatch.setattr(codec, "encode", lambda x: seen.append(x.device.type) or small(x))
    batch = Batches(Samples([Film(3)], CLIP, READ), codec)[0]
    assert batch.crops.device.type == "meta" and batch.target.device.type == "meta" and set(seen) == {"meta"}


def test_padding_and_unknown_normals_count_nothing():
    known, unknown = batches()[0], batches(normals=False)[0]
    assert known.valid.tolist() == [[True, True, True, False]] * 2
    assert known.weight[:, :, :, :3].min() > 0 == known.weight[:, :, :, 3].max()
    assert_close(known.weight[:, :, :, :3].mean(), torch.tensor(1.0))
    assert known.weight[0, 0, 0, 0, 0, 0] > 2 * known.weight[0, 0, 0, 0, 0, -1], "foreground counts more"
    assert unknown.weight[:, 0].max() > 0 == unknown.weight[:, 1].max()


def test_what_pads_a_clip_teaches_nothing():
    model = build(VIDEO, tiny_codec())
    objective, batch = Objective(model), batches()[0]
    noise = model.diffusion.noise_like(batch.target, torch.Generator().manual_seed(0))
    given = Draws(torch.tensor([500, 900]), noise, torch.zeros(2, 4) > 0, torch.ones(2) > 0)
    gradients = []
    for scale in (1.0, 5.0):
        changed = replace(batch, target=batch.target.clone(), crops=batch.crops.clone())
        changed.target[:, :, :, 3] *= scale
        changed.crops[:, 3] *= scale
        objective.zero_grad()
        objective(changed, given).mean().backward()
        gradients.append({k: p.grad.clone() for k, p in objective.named_parameters() if p.grad is not None})
    for k, g in gradients[0].items():
        assert_close(gradients[1][k], g, atol=1e-6, rtol=1e-4)


def test_stage_two_moves_temporal_modules_alone(tmp_path):
    first = build(EMBEDDED, tiny_codec())
    config = replace(TRAINING, parts="temporal", steps=2)
    trained = train_video_model(tmp_path, VIDEO, tiny_codec(), batches(), config, start=first.state_dict())
    moved = {k for k, v in trained.state_dict().items() if k in first.state_dict() and not k.startswith("codec")}
    assert all(torch.equal(trained.state_dict()[k], first.state_dict()[k]) for k in moved)
    changed = [k for k, v in trained.named_parameters() if k.endswith("proj_out.weight") and ".temporals." in k]
    assert changed and all(trained.state_dict()[k].abs().max() > 0 for k in changed)
    again = load_video_model(tmp_path / "model")
    assert again.temporal and again.config == VIDEO
    with pytest.raises(UserError, match="no temporal modules"):
        train_video_model(tmp_path / "image", EMBEDDED, tiny_codec(), batches(), config)


@pytest.mark.parametrize("config", [PAPER, replace(PAPER, normals=False)], ids=["joint", "without normals"])
def test_the_papers_conditions_come_from_a_mixture_too(config, tmp_path):
    given = batches(normals=False, encoded_pose=False)
    losses: list[float] = []
    listen = lambda record: losses.append(record["loss"])  # noqa: E731
    train_video_model(tmp_path, config, tiny_codec(), given, replace(TRAINING, steps=2), on_record=listen)
    assert len(losses) == 2 and all(np.isfinite(losses))
