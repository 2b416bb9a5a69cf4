"""Mixtures as training batches: padding counts nothing, unknown normals count nothing, stage 2 starts as stage 1."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.errors import UserError
from geodiff4d.data.footage import Footage, Frames, Take
from geodiff4d.data.mixture import Mixture, MixtureConfig
from geodiff4d.video.batches import WeightConfig
from geodiff4d.video.mixed import MixedBatches
from geodiff4d.video.model import load_video_model
from geodiff4d.video.objective import Draws, Objective
from geodiff4d.video.train import train_video_model
from geodiff4d.video.vae import StableCodec
from test_video_model import EMBEDDED, PAPER, SIZE, TRAINING, UNET, build, tiny_codec


class Film(Footage):
    """A ramp that moves with time and view; `normals` off: nobody knows its surface."""

    def __init__(self, instants: int, normals: bool = True):
        self.name, self.normals = "film", normals
        self.takes = [Take("a", np.arange(instants), np.ones((instants, 2), bool), temporal=True)]

    def reference_views(self, take):
        return [0, 1]

    driving_views = reference_views

    def _pictures(self, view, instants, size):
        ramp = torch.linspace(0, 1, size).expand(3, size, size)
        return torch.stack([0.5 + 0.4 * torch.cos(3 * ramp + 0.3 * t + view) for t in instants])

    def frames(self, take, view, instants, size):
        rgb = self._pictures(view, instants, size)
        mask = torch.zeros(len(rgb), 1, size, size)
        mask[..., : size // 2] = 1
        return Frames(rgb, mask, rgb.flip(1), self.normals, rgb.flip(2), mask, torch.zeros(len(rgb), 52))

    def driving(self, take, view, instants, size):
        return self._pictures(view, instants, size)

    def warped(self, reference, take, view, instants, size, surroundings=False):
        return self._pictures(view, instants, size), torch.ones(len(instants), 2, size, size)


CLIP = MixtureConfig(targets="clip", frames=4, size=SIZE, crop=16, warp=True, augment=None)
VIDEO = replace(EMBEDDED, unet=replace(UNET, temporal_layers=1, temporal_ff_factor=2))
WEIGHTS = WeightConfig(background=0.5, foreground=1.0, focus=0.0)


def batches(instants: int = 3, normals: bool = True, **options) -> MixedBatches:
    mixture = Mixture([Film(instants, normals)], CLIP)
    return MixedBatches(mixture, tiny_codec(), 2, **{"weights": WEIGHTS, "encoded_pose": True, **options})


def test_batches_are_ranges_of_samples():
    all_in_all = batches()
    batch, x = all_in_all[3], all_in_all.mixture[7]
    assert all_in_all.targets == 8
    assert_close(batch.crops[1], x.driving)
    assert_close(batch.target[1, 0], all_in_all.codec.encode(x.rgb).movedim(0, 1))
    assert_close(batch.pose[1], all_in_all.codec.encode(x.pose).movedim(0, 1))
    assert_close(batch.reference[1], all_in_all.codec.encode(x.reference[None])[0])
    resized = batches(encoded_pose=False)[3]
    assert resized.pose.shape == (2, 3, 4, 8, 8) and resized.reference_pose.shape == (2, 3, 8, 8)


def test_examples_follow_the_codec_to_its_device(monkeypatch):
    """Stable Diffusion's autoencoder has parameters and no buffers."""
    with torch.device("meta"):
        codec = StableCodec(None)
    seen: list[str] = []
    monkeypatch.setattr(codec, "encode", lambda x: seen.append(x.device.type) or x[:, :, ::8, ::8])
    given = MixedBatches(Mixture([Film(3)], CLIP), codec, 2)
    monkeypatch.setattr(given, "_weight", lambda e, side: e.mask.new_ones(2, 1, 1, 4, side, side))
    assert given[0].crops.device.type == "meta" and set(seen) == {"meta"}


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
    progress = lambda step, total, record: losses.append(record["loss"])  # noqa: E731
    train_video_model(tmp_path, config, tiny_codec(), given, replace(TRAINING, steps=2), progress=progress)
    assert len(losses) == 2 and all(np.isfinite(losses))
