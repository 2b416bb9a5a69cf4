"""Sampling at toy size: guidance, schedules, windows and starts, against a network that is known."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from geodiff4d.core.camera import Camera
from geodiff4d.core.progress import silent
from geodiff4d.video.model import (
    Conditions,
    VideoModel,
)
from geodiff4d.video.sample import ClipInputs, sample
from geodiff4d.video.vae import PatchCodec
from geodiff4d.video.windows import plan_windows, runs_of
from tiny import CHANNELS, EMBEDDED, FAST, UNET, build, ingredients, tiny_codec


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return tiny_codec()


class Oracle(VideoModel):
    """Predict a known function of the expression latents, and note what is asked."""

    def predict_clean(self, z_t, t, conditions: Conditions, latent, reference, image_context=None):
        self.asked.append((t[0].item(), latent.clone(), z_t.clone()))
        return latent.mean(-1)[:, None, None, :, None, None].expand_as(z_t)


@pytest.fixture
def oracle(codec) -> Oracle:
    oracle = Oracle(EMBEDDED, codec).eval()
    oracle.asked = []
    return oracle


class Shown:
    """A progress that remembers what was finished."""

    def __call__(self, items, description="", total=None):
        self.finished = []
        for item in items:
            yield item
            self.finished.append(item)


def ask(oracle: Oracle, frames: int = 3, reference=None, progress=silent, **options) -> torch.Tensor:
    """Sample with the frame's number as its expression."""
    latents = torch.arange(1.0, frames + 1)[None, :, None].expand(1, -1, 8)
    conditions = Conditions(torch.zeros(1, 14, frames, 8, 8), torch.zeros(1, 2, CHANNELS, frames, 8, 8))
    return sample(oracle, ClipInputs(conditions, latents, [], reference), replace(FAST, **options), progress)


def test_guidance_extrapolates_from_the_null_expression(oracle):
    """null + g·(driven - null), with the null's prediction 0 and the driven frame's 1, 2, 3 here."""
    for guidance in (1.0, 2.5, 0.0):
        z = ask(oracle, guidance=guidance)
        assert_close(z.mean((0, 1, 2, 4, 5)), guidance * torch.arange(1.0, 4), atol=1e-5, rtol=1e-5)


def test_without_guidance_there_is_one_branch(oracle):
    ask(oracle, guidance=1.0)
    assert len(oracle.asked) == 2
    ask(oracle, guidance=2.5)
    assert len(oracle.asked) == 2 + 2, "both branches go through the model together"
    assert all(a[1][0].abs().min() > 0 and a[1][1].abs().max() == 0 for a in oracle.asked[2:])


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "dpm++"])
def test_every_sampler_reaches_the_prediction_from_the_last_timestep(oracle, sampler):
    z = ask(oracle, sampler=sampler, guidance=1.0, steps=5)
    assert oracle.asked[0][0] == 999 and len(oracle.asked) == 5
    assert_close(z[0, 0, 0, :, 0, 0], torch.arange(1.0, 4), atol=1e-4, rtol=1e-4)


def test_chunks_bound_the_memory_and_do_not_change_the_noise(oracle):
    shown = Shown()
    ask(oracle, frames=5, chunk=2, progress=shown)
    assert shown.finished == list(range(5)) and max(a[1].shape[1] for a in oracle.asked) == 2
    first = oracle.asked[0][2]
    oracle.asked.clear()
    ask(oracle, frames=5, chunk=5)
    assert torch.equal(first, oracle.asked[0][2][:, :, :, :2]), "one draw for the whole clip"


@given(runs=st.lists(st.integers(1, 60), min_size=1, max_size=4), size=st.integers(1, 20), overlap=st.integers(0, 19))
def test_windows_cover_every_run_and_cross_none(runs, size, overlap):
    if overlap >= size:
        with pytest.raises(ValueError, match="cannot overlap"):
            plan_windows(runs, size, overlap)
        return
    windows = plan_windows(runs, size, overlap)
    ends = np.cumsum([0, *runs])
    covered = {i for w in windows for i in range(w.start, w.stop)}
    assert covered == set(range(ends[-1])) and all(w.stop - w.start <= size for w in windows)
    for w in windows:
        run = int(np.searchsorted(ends, w.start, side="right")) - 1
        assert w.stop <= ends[run + 1]
        assert not overlap or w.stop - w.start == min(size, runs[run])
    for a, b in pairwise(windows):
        together = a.stop - b.start
        assert together >= overlap if b.start not in ends else together == 0
        assert overlap or together == 0, "without an overlap nothing is computed twice"


class Counting(Oracle):
    """Predict the number of the window, so that averages show."""

    temporal = True

    def predict_clean(self, z_t, t, conditions: Conditions, latent, reference, image_context=None):
        self.asked.append((t[0].item(), latent.clone(), z_t.clone()))
        return torch.full_like(z_t, float(len(self.asked)))


def test_overlapping_windows_are_averaged(codec):
    counting = Counting(EMBEDDED, codec).eval()
    counting.asked = []
    shown = Shown()
    z = ask(counting, frames=7, steps=1, guidance=1.0, window=4, overlap=2, progress=shown)
    assert_close(z[0, 0, 0, :, 0, 0], torch.tensor([1.0, 1.0, 1.5, 2.0, 2.5, 2.5, 3.0]), atol=1e-5, rtol=0)
    assert [a[1][0, :, 0].tolist() for a in counting.asked] == [[1, 2, 3, 4], [3, 4, 5, 6], [4, 5, 6, 7]]
    assert shown.finished == list(range(7))


def test_a_view_is_a_film_of_its_own(codec):
    model = build(replace(EMBEDDED, unet=replace(UNET, temporal_layers=1, temporal_ff_factor=2)), codec)
    conditions, latents, kv, start = ingredients(model, 5)
    z = sample(model, ClipInputs(conditions, latents, kv, start, runs=[2, 3]), FAST)
    changed = latents.clone()
    changed[:, 0] += 1
    other = sample(model, ClipInputs(conditions, changed, kv, start, runs=[2, 3]), FAST)
    assert (z - other).abs()[:, :, :, :2].amax((0, 1, 2, 4, 5)).min() > 1e-4, "frames of a view hear of each other"
    assert_close(other[:, :, :, 2:], z[:, :, :, 2:])
    T = torch.eye(4).expand(5, 4, 4).clone()
    T[2:, 0, 3] = 1
    assert runs_of(Camera(T, torch.eye(3).expand(5, 3, 3), 8, 8)) == [2, 3]


def test_starts_are_noised_alike_in_both_domains(oracle):
    start = torch.stack([torch.full((1, CHANNELS, 8, 8), 30.0), torch.full((1, CHANNELS, 8, 8), -30.0)], 1)
    first: dict[str, torch.Tensor] = {}
    for kind in ("reference", "blurred", "noise"):
        oracle.asked.clear()
        ask(oracle, reference=start, start=kind)
        first[kind] = oracle.asked[0][2]
    noise = first["noise"]
    assert torch.equal(noise[:, 0], noise[:, 1])
    a = oracle.diffusion.alpha(torch.tensor([999])).sqrt()
    for kind in ("reference", "blurred"):
        # A constant image is its own blur.
        assert_close(first[kind] - noise, (a * start[:, :, :, None]).expand_as(noise), atol=1e-4, rtol=1e-4)


def test_samples_repeat_with_their_seed(codec):
    model = build(EMBEDDED, codec)
    made = [sample(model, ClipInputs(*ingredients(model)), replace(FAST, seed=s)) for s in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
