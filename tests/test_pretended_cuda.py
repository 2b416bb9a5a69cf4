"""Whole steps of the pipeline on a GPU that is pretended: no tensor on the wrong device, no wait that is not known."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from geodiff4d.avatar.fit import fit
from geodiff4d.data.footage.rendered import TrackStoreConfig
from geodiff4d.data.sampling import PairConfig
from geodiff4d.presets import preset
from geodiff4d.video.model import Conditions
from geodiff4d.video.sample import ClipInputs, SampleConfig, sample
from geodiff4d.video.train import train_video_model
from pretended_cuda import pretended_cuda
from test_avatar import clip, head  # noqa: F401
from tiny import EMBEDDED, TRAINING, UNET, TinyStore, build, ingredients, tiny_batches, tiny_codec

VIDEO = replace(EMBEDDED, unet=replace(UNET, temporal_layers=1, temporal_ff_factor=2))
STEPS = replace(TRAINING, steps=3, log_every=100, save_every=100, save_minutes=0, pictures=0, autocast=True)
LOGGED = {"video/train.py:check_finite": 4, "video/train.py:train_video_model": 4}
"""Two steps of three are logged, the first and the last: loss and what is not finite, loss and its domains."""
SAVED = ("core/rundir.py", "core/files.py")


def besides_saving(waits: Counter[str]) -> dict[str, int]:
    return {where: count for where, count in waits.items() if not where.startswith(SAVED)}


def test_what_a_gpu_refuses_is_refused():
    with pretended_cuda() as waits:
        x = torch.ones(3, device="cuda")
        assert x.is_cuda and x.device == torch.device("cuda:0") and (x[None, 1:] + 1).is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.sum().item() == 3 and not x.cpu().is_cuda and not waits, "only the package's waits are counted"
    assert not torch.cuda.is_available()


def test_steps_of_stage_one_wait_only_where_they_are_logged(tmp_path):
    codec = tiny_codec()
    batches = tiny_batches(codec, tmp_path)
    with pretended_cuda() as waits:
        trained = train_video_model(tmp_path / "run", EMBEDDED, codec, batches, STEPS)
    assert trained.device.type == "cuda" and besides_saving(waits) == LOGGED


@pytest.mark.slow
def test_steps_of_stage_two_wait_only_where_they_are_logged(tmp_path):
    codec, store = tiny_codec(), TinyStore(instants=4)
    store.tracks = TrackStoreConfig(subjects=2, frames=3, portraits=1)
    pairs = PairConfig(references=2, targets=4, clips=True, moved=1.0)
    clips = tiny_batches(codec, tmp_path, pairs, store, augment=None)
    config = replace(STEPS, parts="temporal", pairs=pairs, sampled_starts=0.5, gradient_checkpointing=True)
    with pretended_cuda() as waits:
        train_video_model(tmp_path / "run", VIDEO, codec, clips, config)
    assert besides_saving(waits) == LOGGED


def test_sampling_with_guidance_and_windows_waits_for_nothing():
    model = build(VIDEO, tiny_codec())
    conditions, latents, reference, start = ingredients(model, frames=6)
    config = SampleConfig(steps=2, guidance=2.5, window=4, overlap=2)
    with pretended_cuda() as waits:
        model.to("cuda")
        given = ClipInputs(
            Conditions(conditions.planes.to("cuda"), conditions.base.to("cuda")), latents.to("cuda"),
            [(k.to("cuda"), v.to("cuda")) for k, v in reference], start.to("cuda"),
        )  # fmt: skip
        assert sample(model, given, config).is_cuda and not waits


@pytest.mark.slow
def test_steps_of_a_fit_wait_for_nothing(clip, tmp_path):  # noqa: F811
    """What is waited for is the score, at the end, and the fitted avatar that goes to the host."""
    config = replace(preset("debug").fit, device="cuda", checkpoint_every=100)
    waited = []
    for iterations in (2, 5):
        with pretended_cuda() as waits:
            fit(clip, tmp_path / str(iterations), replace(config, iterations=iterations))
        waited.append(besides_saving(waits))
    assert waited[0] == waited[1] and not any(where.startswith("avatar/model.py") for where in waited[0])
