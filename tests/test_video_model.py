"""The joint model from end to end at toy size: conditions, sampling, folders, generation, training."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import look_at
from geodiff4d.core.images import encode_normals
from geodiff4d.core.progress import silent
from geodiff4d.data.augment import AugmentConfig, augment_crops
from geodiff4d.data.pairs import PairConfig, draw_pairs
from geodiff4d.data.store import Store, StoreConfig
from geodiff4d.heads import load_head
from geodiff4d.video.batches import Batches, encode_store
from geodiff4d.video.conditions import condition_images, lifted, moved_by
from geodiff4d.video.diffusion import DiffusionConfig
from geodiff4d.video.expression import ExpressionConfig, ExpressionEncoder
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import Driving, Portrait
from geodiff4d.video.model import (
    ConditionImages,
    Conditions,
    VideoModel,
    VideoModelConfig,
    config_from_dict,
    load_video_model,
)
from geodiff4d.video.objective import Draws, Objective
from geodiff4d.video.recode import recode, starting_weights
from geodiff4d.video.sample import SampleConfig, sample
from geodiff4d.video.train import VideoTraining, _check_finite, train_video_model
from geodiff4d.video.unet import UNetConfig
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig
from geodiff4d.video.warm_start import REGIONS, fit_motion_code, fit_motion_readout, warm_start
from geodiff4d.video.windows import plan_windows, runs_of

GOLDEN = Path(__file__).parent / "golden" / "image_loss.txt"
SIZE = 32
CHANNELS = 6

UNET = UNetConfig(
    in_channels=2 * CHANNELS + CHANNELS + 2, out_channels=CHANNELS, widths=(16, 16), layers=1,
    down_attention=(False, True), up_attention=(1, 0), heads=2, groups=8, ff_factor=2, cross_dim=None,
    expression_dim=4, expression_layers=1, expression_ff_factor=2, expression_latent=8, every_layer=False,
)  # fmt: skip
EMBEDDED = VideoModelConfig(
    unet=UNET,
    reference=replace(UNET, in_channels=2 * CHANNELS, expression_dim=None, expression_latent=None, reference=True),
    expression=ExpressionConfig(size=16, widths=(8, 8), attention=True, squeeze=4, latent=8, tokens=4, token_dim=4),
    diffusion=DiffusionConfig(prediction="residual"), size=SIZE, pose="codec", warp=True,
)  # fmt: skip
"""Like the embedded preset: warp, pose map through the codec, residual around both."""
PAPER = replace(
    EMBEDDED, unet=replace(UNET, in_channels=CHANNELS + 3),
    reference=replace(EMBEDDED.reference, in_channels=CHANNELS + 3), diffusion=DiffusionConfig(),
    pose="interpolate", warp=False,
)  # fmt: skip
"""Like the paper: noise prediction, pose map resized, nothing else."""


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return tiny_codec()


def tiny_codec() -> PatchCodec:
    torch.manual_seed(0)
    codec = PatchCodec(PatchCodecConfig(factor=4, channels=CHANNELS, trunk=8, detail=8))
    waves = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    codec.fit_basis(torch.nn.functional.interpolate(waves, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1))
    return codec


def build(config: VideoModelConfig, codec: PatchCodec, seed: int = 0) -> VideoModel:
    """Random weights in every module: those that start at zero would hide what they do."""
    torch.manual_seed(seed)
    model = VideoModel(config, codec)
    for network in model.networks().values():
        for p in network.parameters():
            p.data = torch.randn_like(p) * 0.15 + (p.data if p.ndim == 1 else 0)
    return model.eval()


def images(frames: int = 3, seed: int = 0) -> ConditionImages:
    g = torch.Generator().manual_seed(seed)
    return ConditionImages(*(torch.rand(1, c, frames, SIZE, SIZE, generator=g) for c in (3, 3, 2)))


def ingredients(model: VideoModel, frames: int = 3) -> tuple:
    """Return (conditions, expression latents, reference, start) of a random clip."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        portrait = model.codec.encode(torch.rand(1, 3, SIZE, SIZE, generator=g))
        pose = model.pose_planes(torch.rand(1, 3, 1, SIZE, SIZE, generator=g))[:, :, 0]
        latents = model.expression(torch.rand(frames, 3, 16, 16, generator=g))[None]
        start = portrait[:, None].expand(-1, len(model.config.domains), -1, -1, -1)
        return model.conditions(images(frames)), latents, model.reference_kv(portrait, pose), start


FAST = SampleConfig(steps=2, autocast=False)
VARIANTS = {
    "embedded": EMBEDDED, "paper": PAPER, "without normals": replace(EMBEDDED, normals=False),
    "without normals, paper": replace(PAPER, normals=False),
    "without joint attention": replace(EMBEDDED, joint_attention=False),
    "v": replace(PAPER, diffusion=DiffusionConfig(prediction="v")),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_samples(codec, name):
    model = build(VARIANTS[name], codec)
    conditions, latents, kv, start = ingredients(model)
    z = sample(model, conditions, latents, kv, start, FAST)
    d = len(model.config.domains)
    assert z.shape == (1, d, CHANNELS, 3, 8, 8) and z.isfinite().all()
    pictures = model.decode_latents(z)
    assert pictures.shape == (1, d, 3, 3, SIZE, SIZE) and pictures.min() >= 0 and pictures.max() <= 1


@torch.no_grad()
def test_normals_reach_colours_only_by_joint_attention(codec):
    for joint in (True, False):
        model = build(replace(EMBEDDED, joint_attention=joint), codec)
        conditions, latents, kv, _ = ingredients(model)
        g = torch.Generator().manual_seed(3)
        z, t = torch.randn(conditions.base.shape, generator=g), torch.tensor([600])
        other = z.clone()
        other[:, 1] += 1
        a, b = (model.predict_clean(x, t, conditions, latents, kv) for x in (z, other))
        moved = a - b
        assert moved[:, 1].abs().max() > 1e-2
        assert (moved[:, 0].abs().max() > 1e-4) == joint


@torch.no_grad()
def test_the_portrait_matters(codec):
    model = build(EMBEDDED, codec)
    conditions, latents, _, start = ingredients(model)
    a, b = torch.rand(2, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    pose = torch.zeros(1, CHANNELS, 8, 8)
    outs = [
        sample(model, conditions, latents, model.reference_kv(model.codec.encode(x), pose), start, FAST) for x in (a, b)
    ]
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@torch.no_grad()
def test_dropped_warps_leave_the_pose_alone(codec):
    model = build(EMBEDDED, codec)
    one, other = images(seed=0), images(seed=1)
    two = ConditionImages(*(torch.cat([getattr(x, k) for x in (one, other)]) for k in ("pose", "warp", "visibility")))
    whole = model.conditions(two)
    some = model.conditions(two, keep_warp=torch.tensor([True, False]))
    assert torch.equal(some.planes[0], whole.planes[0]) and torch.equal(some.base[0], whole.base[0])
    assert torch.equal(some.planes[1, :CHANNELS], whole.planes[1, :CHANNELS])
    assert some.planes[1, CHANNELS:].abs().max() == 0 and some.base[1, 0].abs().max() == 0
    assert torch.equal(some.base[1, 1], whole.base[1, 1]), "the pose map is the normals' base with or without a warp"


def test_missing_warps_and_wrong_widths_are_named(codec):
    model = build(EMBEDDED, codec)
    with pytest.raises(ValueError, match="warped portrait"):
        model.conditions(ConditionImages(images().pose))
    with pytest.raises(ValueError, match=r"unet\.in_channels must be 20"):
        VideoModel(replace(EMBEDDED, unet=replace(UNET, in_channels=7)), codec)
    with pytest.raises(ValueError, match="residual"):
        replace(EMBEDDED, warp=False)


# Sampling


class Oracle(VideoModel):
    """Predict a known function of the expression latents, and note what is asked."""

    def predict_clean(self, z_t, t, conditions: Conditions, latent, reference, words=None):
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
    return sample(oracle, conditions, latents, [], reference, replace(FAST, **options), progress)


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

    def predict_clean(self, z_t, t, conditions: Conditions, latent, reference, words=None):
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
    z = sample(model, conditions, latents, kv, start, FAST, runs=[2, 3])
    changed = latents.clone()
    changed[:, 0] += 1
    other = sample(model, conditions, changed, kv, start, FAST, runs=[2, 3])
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
    made = [sample(model, *ingredients(model), replace(FAST, seed=s)) for s in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


# Folders


@torch.no_grad()
def test_a_model_survives_its_folder(codec, tmp_path):
    model = build(EMBEDDED, codec)
    model.save(tmp_path / "model", extra={"preset": "tiny"})
    again = load_video_model(tmp_path / "model")
    assert again.config == model.config and not again.training
    for k, v in model.state_dict().items():
        assert_close(again.state_dict()[k], v.half().float(), atol=0, rtol=0)
    z, other = (sample(m, *ingredients(m), FAST) for m in (model, again))
    assert_close(other, z, atol=0.05, rtol=0.05)
    assert json.loads((tmp_path / "model/unet/config.json").read_text())["preset"] == "tiny"


@torch.no_grad()
def test_a_model_moves_to_a_larger_code(codec, tmp_path):
    """Same pictures in, same pictures out: the first 6 of 9 components, mixed and scaled otherwise."""
    larger = PatchCodec(replace(codec.config, channels=9))
    g = torch.Generator().manual_seed(3)
    mix = torch.linalg.qr(torch.randn(9, 9, generator=g))[0]
    rest = torch.randn(48, 3, generator=g)
    basis = torch.linalg.qr(torch.cat([codec.basis, rest - codec.basis @ (codec.basis.mT @ rest)], 1))[0]
    larger.basis.copy_(basis @ mix)
    larger.scale.copy_(torch.rand(9, generator=g) + 0.5)
    larger.mean.copy_(codec.mean)
    model = build(EMBEDDED, codec)
    grown = replace(
        EMBEDDED, unet=replace(UNET, in_channels=3 * 9 + 2, out_channels=9),
        reference=replace(EMBEDDED.reference, in_channels=2 * 9),
    )  # fmt: skip
    moved = VideoModel(grown, larger)
    model.save(tmp_path / "model")
    assert set(moved.load_state_dict(recode(model.state_dict(), codec, larger), strict=False).missing_keys) == {
        k for k in moved.state_dict() if k.startswith("codec.")
    }

    picture = torch.rand(3, 3, SIZE, SIZE, generator=g)
    seen = torch.rand(1, 1, 2, 1, SIZE // 4, SIZE // 4, generator=g)
    out = []
    for m in (model, moved.eval()):
        latents = m.codec.encode(picture)
        planes = latents.flatten(0, 1)[None, None, :, None]
        bank = m.reference_kv(latents[:1], latents[1:2])
        y, _ = m.unet(torch.cat([planes, seen], 2), torch.ones(1), reference=bank, domain_ids=(0,))
        out.append(m.codec.decode_linear(y[:, 0, :, 0]))
    assert_close(out[1], out[0], atol=1e-4, rtol=1e-4)
    assert_close(
        starting_weights(tmp_path / "model", larger)["unet.conv_in.weight"],
        moved.unet.conv_in.weight,
        atol=2e-3,
        rtol=1e-2,
    )
    with pytest.raises(UserError, match="factor 8"):
        starting_weights(tmp_path / "model", PatchCodec(PatchCodecConfig(factor=8, channels=6, trunk=8, detail=8)))


def test_configurations_round_trip_through_json():
    for config in VARIANTS.values():
        assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_foreign_configurations_are_refused():
    good = json.loads(json.dumps(asdict(EMBEDDED)))
    for change in (
        {"colour": 1}, {"unet": {**good["unet"], "depth": 3}}, {"unet": None}, {"warp": False},
        {"unet": {**good["unet"], "widths": [8]}}, {"expression": []},
    ):  # fmt: skip
        with pytest.raises(UserError, match="does not fit this version"):
            config_from_dict({**good, **change})
    with pytest.raises(UserError, match="unet"):
        config_from_dict({})


def test_damaged_folders_are_refused(codec, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="not a video model"):
        load_video_model(folder)
    model = build(EMBEDDED, codec)

    def fresh() -> None:
        model.save(folder)

    fresh()
    weights = folder / "reference/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_video_model(folder)
    fresh()
    weights.unlink()
    with pytest.raises(UserError, match="no weights"):
        load_video_model(folder)
    fresh()
    weights.write_bytes((folder / "expression/model.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not fit its config"):
        load_video_model(folder)
    fresh()
    PatchCodec(PatchCodecConfig(factor=4, channels=5, trunk=8, detail=8)).save(folder / "vae")
    with pytest.raises(UserError, match="parts of different models"):
        load_video_model(folder)
    fresh()
    (folder / "unet/config.json").write_text("{}")
    with pytest.raises(UserError, match="does not fit this version"):
        load_video_model(folder)


# Generation


def cameras(head, *yaw: float) -> Camera:
    a = torch.tensor(yaw)
    middle = head.landmarks68.on(head.template, head.faces).mean(0).expand(len(yaw), -1)
    eye = middle + torch.stack([a.sin(), torch.zeros_like(a), a.cos()], -1)
    T = look_at(eye, middle, torch.tensor([0.0, 1, 0]).expand_as(eye))
    return Camera(T, pinhole(SIZE * 3.0, SIZE, SIZE).expand(len(yaw), 3, 3), SIZE, SIZE)


@pytest.mark.parametrize("name", ["embedded", "paper", "without normals"])
def test_a_portrait_is_driven(codec, name):
    head, model = load_head("openhead"), build(VARIANTS[name], codec)
    view, g = cameras(head, 0.0)[0], torch.Generator().manual_seed(0)
    portrait = Portrait(torch.rand(3, SIZE, SIZE, generator=g), torch.ones(1, SIZE, SIZE), view, head.neutral())
    request = GenerationRequest(portrait, Driving(head.neutral(2), torch.rand(2, 3, 16, 16, generator=g)), head)
    generator, views = DiffusionGenerator(model, FAST), cameras(head, -0.3, 0.4)
    made = generator.generate(request, views)
    assert made.rgb.shape == made.normal.shape == (2, 3, SIZE, SIZE) and made.mask.shape == (2, 1, SIZE, SIZE)
    assert made.rgb.min() >= 0 and made.rgb.max() <= 1 and made.tokens.shape == (2, 4, 4)
    length = made.normal.norm(dim=1)
    assert ((length < 1e-3) | ((length - 1).abs() < 1e-2)).all()
    if name == "embedded":
        normal = torch.nn.functional.normalize(torch.randn(3, SIZE, SIZE, generator=g), dim=0)
        own = generator.generate(replace(request, portrait=replace(portrait, normal=normal)), views)
        assert not torch.equal(own.rgb, made.rgb)


@pytest.mark.parametrize("name", ["embedded", "without normals"])
def test_a_black_and_white_portrait_stays_so(codec, name):
    head, model = load_head("openhead"), build(VARIANTS[name], codec)
    picture = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    portrait = Portrait(picture, torch.ones(1, SIZE, SIZE), cameras(head, 0.0)[0], head.neutral())
    request = GenerationRequest(portrait, Driving(head.neutral(1), torch.rand(1, 3, 16, 16)), head)
    made = DiffusionGenerator(model, FAST).generate(request, cameras(head, 0.4))
    assert (made.rgb.amax(1) - made.rgb.amin(1)).max() < 1e-5


@torch.no_grad()
def test_sampling_starts_from_the_portrait_and_its_normals(codec, monkeypatch):
    head, model, g = load_head("openhead"), build(PAPER, codec), torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize(torch.randn(3, SIZE, SIZE, generator=g), dim=0)
    picture, mask = torch.rand(3, SIZE, SIZE, generator=g), torch.ones(1, SIZE, SIZE)
    portrait = Portrait(picture, mask, cameras(head, 0.0)[0], head.neutral(), normal)
    starts = []

    def spy(model, conditions, latents, reference, start, *rest, **more):
        starts.append(start)
        return sample(model, conditions, latents, reference, start, *rest, **more)

    monkeypatch.setattr("geodiff4d.video.generate.sample", spy)
    crops = torch.rand(2, 3, 16, 16, generator=g)
    request = GenerationRequest(portrait, Driving(head.neutral(2), crops), head)
    generator, views = DiffusionGenerator(model, FAST), cameras(head, -0.3, 0.4)
    generator.generate(request, views)
    own = [codec.encode(x[None])[0] for x in (portrait.on_grey, encode_normals(normal, mask))]
    torch.testing.assert_close(starts.pop(), torch.stack(own)[None])
    # Without an estimator's, the normals are the model's own: sampled from noise.
    generator.generate(replace(request, portrait=replace(portrait, normal=None)), views)
    assert starts[0] is None and torch.equal(starts[1][:, 0], codec.encode(picture[None]))
    DiffusionGenerator(model, replace(FAST, start="noise")).generate(request, views)
    assert starts[2] is None


@torch.no_grad()
def test_the_warped_portrait_moves_as_the_latents_say(codec):
    head = load_head("openhead")
    n = len(head.expression_names)
    model = build(replace(EMBEDDED, expression=replace(EMBEDDED.expression, motion=n + 3)), codec)
    readout = model.expression.to_motion
    readout.weight.zero_()
    readout.bias.zero_()[head.expression_names.index("jawOpen")] = 1.0
    views, neutral, latents = cameras(head, -0.3, 0.4), head.neutral(2), torch.ones(1, 2, 8)
    moved, null = (moved_by(model, head, neutral, x) for x in (latents, torch.zeros_like(latents)))
    assert moved.expr.sum() == 2 and moved.expr.argmax(1).tolist() == [readout.bias.argmax()] * 2
    assert null.expr.abs().max() == 0 == null.jaw_pose.abs().max()
    g = torch.Generator().manual_seed(0)
    portrait = Portrait(torch.rand(3, SIZE, SIZE, generator=g), torch.ones(1, SIZE, SIZE), views[0], head.neutral())
    texture = lifted(head, portrait, surroundings=False)
    still, open_mouth, same = (condition_images(head, texture, neutral, views, m) for m in (None, moved, null))
    assert torch.equal(still.pose, open_mouth.pose) and torch.equal(still.warp, same.warp)
    assert (still.warp - open_mouth.warp).abs().max() > 0.05
    other = build(replace(EMBEDDED, expression=replace(EMBEDDED.expression, motion=7)), codec)
    assert moved_by(other, head, neutral, latents) is None, "read out for a head of other expressions"


# Pairs and augmentation


@settings(max_examples=40, deadline=None)
@given(
    store=st.tuples(st.integers(1, 9), st.integers(2, 6), st.integers(2, 5)), cross=st.booleans(),
    references=st.integers(1, 6), seed=st.integers(0, 99), index=st.integers(0, 10**9),
)  # fmt: skip
def test_pairs_are_drawn_as_said(store, cross, references, seed, index):
    config = PairConfig(references=references, targets=4, cross_view=cross, reference_views=2)
    p, again = (draw_pairs(store, config, seed, index) for _ in range(2))
    assert all(np.array_equal(v, getattr(again, k)) for k, v in vars(p).items())
    subjects, instants, views = store
    assert p.subject.max() < subjects and p.driving_view.max() < views
    assert references > subjects or len(set(p.subject.tolist())) == references
    assert (p.reference[:, 0] < instants).all() and (p.reference[:, 1] < min(2, views)).all()
    assert (p.target[..., 0] != p.reference[:, None, 0]).all() and (p.target < (instants, views)).all()
    assert ((p.driving_view != p.target[..., 1]) == cross).all()


def test_pairs_of_one_view_need_the_ablation():
    with pytest.raises(ValueError, match="ablate cross-view"):
        draw_pairs((2, 2, 1), PairConfig(), 0, 0)
    alone = draw_pairs((1, 1, 1), PairConfig(cross_view=False), 0, 0)
    assert alone.target.max() == alone.reference.max() == alone.driving_view.max() == 0


def test_batches_differ_by_index():
    drawn = {draw_pairs((50, 6, 5), PairConfig(), 0, i).target.tobytes() for i in range(20)}
    assert len(drawn) == 20


def test_augmented_crops_stay_pictures():
    crops = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    out, again, other = (augment_crops(crops, AugmentConfig(), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert out.shape == crops.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, again) and not torch.equal(out, other)
    assert (out - crops).abs().mean((1, 2, 3)).min() > 0.01
    nothing = AugmentConfig(0, 0, 0, 0, 0, 0, 0, 0)
    assert_close(augment_crops(crops, nothing, torch.Generator()), crops, atol=1e-5, rtol=0)


# Training


class TinyStore(Store):
    """A store in memory: two people of two colours, an expression that is a stripe, two triangles for a head."""

    def __init__(self, subjects: int = 2, instants: int = 3, views: int = 2):
        self.config = StoreConfig(
            subjects=subjects, instants=instants, views=views, size=SIZE, crop=16, texels=16, grid=8, reference_views=2
        )
        rng, n = np.random.default_rng(0), (subjects, instants, views)
        for name, (shape, kind) in self.config.arrays(4).items():
            setattr(self, name, np.zeros(shape, kind))
        ramp = np.linspace(0, 1, SIZE)
        self.expr[:] = rng.normal(0, 1, self.expr.shape)
        self.joints[:] = np.random.default_rng(1).normal(0, 0.1, self.joints.shape)
        for s, i, v in np.ndindex(n):
            stripe = 0.5 + 0.3 * np.cos(6 * ramp + 2 * self.expr[s, i, 0])
            picture = np.stack([np.outer(stripe, ramp), np.outer(ramp, stripe), np.full((SIZE, SIZE), 0.2 + 0.6 * s)])
            turn = np.broadcast_to(np.array([0.3 + 0.4 * v, 0.5, 0.9])[:, None, None], picture.shape)
            self.rgb[s, i, v], self.pose[s, i, v] = picture * 255, turn * 255
            self.normal[s, i, v] = (turn * 0.8 + 0.2 * stripe[:, None]) * 255
            self.crop[s, i, v] = picture[:, ::2, ::2] * 255
            self.texture[s, i, min(v, 1)] = picture[:, ::2, ::2] * 255
        a, b = np.meshgrid(np.linspace(0, 1, SIZE // 2), np.linspace(0, 1, SIZE // 2))
        self.face[:] = np.where(a + b < 1, 0, -1)
        self.bary[:] = np.stack([a, b]) * (a + b < 1) * 255
        corners = np.array([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
        self.moved_face[:], self.moved_bary[:] = self.face[..., ::-1, :], self.bary[..., ::-1, :]
        self.carried[..., :2], self.carried[..., 2] = corners, np.array([1.0, 1, 1, 0])
        self.cover[:], self.focus[:] = 255, rng.integers(0, 255, self.focus.shape)
        self.faces = self.uv_faces = np.array([[1, 2, 0], [2, 1, 3]])
        self.uv = ((corners + 1) / 2).astype(np.float32)


@pytest.fixture(scope="module")
def batches(codec, tmp_path_factory) -> Batches:
    return tiny_batches(codec, tmp_path_factory.mktemp("store"))


def tiny_batches(codec: PatchCodec, folder: Path) -> Batches:
    store = TinyStore()
    latents = encode_store(store, codec, folder / "latents.npy")
    return Batches(store, latents, PairConfig(references=2, targets=2), seed=0)


TRAINING = VideoTraining(
    steps=4, lr=2e-3, warmup=1, pairs=PairConfig(references=2, targets=2), autocast=False, log_every=1, save_every=2
)  # fmt: skip


def test_warped_portraits_move_where_they_are_told_to(batches):
    def warps(share: float) -> torch.Tensor:
        pairs = replace(batches.pairs, moved=share)
        return Batches(batches.store, batches.latents, pairs, seed=0)[5].warp

    still, moved, some = warps(0.0), warps(1.0), warps(0.5)
    # The tiny head moves by standing on its head.
    assert not torch.equal(still, moved) and ((moved == 0.5) != (still == 0.5)).any()
    each = [[torch.equal(some[i, :, j], x[i, :, j]) for x in (still, moved)] for i in range(2) for j in range(2)]
    assert all(any(e) for e in each)


def test_batches_are_functions_of_their_index(batches):
    a, b, c = batches[5], batches[5], batches[6]
    for k, v in vars(a).items():
        assert v is getattr(b, k) if v is None else torch.equal(v, getattr(b, k)), k
    assert not torch.equal(a.target, c.target)
    assert a.target.shape == (2, 2, CHANNELS, 2, 8, 8) and a.warp.shape == (2, 3, 2, SIZE, SIZE)
    assert a.weight.mean().item() == pytest.approx(1, abs=1e-5)
    assert a.warp.min() >= 0 and a.warp.max() <= 1 and set(a.visibility[:, 1].unique().tolist()) == {0.0, 1.0}


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """Each rank draws batches of its own and ends with the weights of the other."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(v, ranks[1][k]) for k, v in ranks[0].items() if not k.startswith("codec"))
    assert not (tmp_path / "1" / "log.jsonl").exists(), "the second process writes nothing"


class Interrupted(Exception):
    pass


def test_a_resumed_run_equals_an_uninterrupted_one(codec, batches, tmp_path):
    whole = train_video_model(tmp_path / "whole", EMBEDDED, codec, batches, TRAINING)

    def stop(step: int, total: int, record: dict) -> None:
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_video_model(tmp_path / "parts", EMBEDDED, codec, batches, TRAINING, progress=stop)
    seen: list[int] = []
    resumed = train_video_model(
        tmp_path / "parts", EMBEDDED, codec, batches, TRAINING, progress=lambda step, *_: seen.append(step)
    )
    assert seen == [2, 3]
    for k, v in whole.state_dict().items():
        assert torch.equal(v, resumed.state_dict()[k]), k
    # What is saved for use is the average that is returned.
    saved = load_video_model(tmp_path / "parts/model")
    assert_close(saved.unet.conv_in.weight, whole.unet.conv_in.weight, atol=1e-3, rtol=1e-3)
    with pytest.raises(UserError, match="another configuration"):
        train_video_model(tmp_path / "parts", EMBEDDED, codec, batches, replace(TRAINING, lr=1.0))


class Poisoned(Batches):
    """Batches whose numbers are gone from index 2 on."""

    def __getitem__(self, index: int):
        batch = super().__getitem__(index)
        return batch if index < 2 else replace(batch, target=batch.target * float("nan"))


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(codec, batches, tmp_path):
    config = replace(TRAINING, steps=4, save_every=1)
    with pytest.raises(UserError, match="step 2: loss nan"):
        poisoned = Poisoned(batches.store, batches.latents, batches.pairs, batches.seed)
        train_video_model(tmp_path, EMBEDDED, codec, poisoned, config)
    assert all(p.isfinite().all() for p in load_video_model(tmp_path / "model").parameters())
    whole = train_video_model(tmp_path, EMBEDDED, codec, batches, config)
    assert all(p.isfinite().all() for p in whole.parameters())


def test_between_checks_a_bad_gradient_touches_no_weight(codec, batches, tmp_path, monkeypatch):
    """As on a GPU, which is not asked at every step: the next one that is asked tells."""
    told: list[float] = []
    monkeypatch.setattr(
        "geodiff4d.video.train._check_finite", lambda loss, norm, bad, step, folder: told.append(bad.item())
    )
    poisoned = Poisoned(batches.store, batches.latents, batches.pairs, batches.seed)
    whole = train_video_model(tmp_path, EMBEDDED, codec, poisoned, replace(TRAINING, steps=4))
    assert told == [0, 0, 1, 1] and all(p.isfinite().all() for p in whole.parameters())
    monkeypatch.undo()
    fine = torch.ones(())
    _check_finite(fine, fine, torch.zeros(()), 3, tmp_path)
    with pytest.raises(UserError, match="since the last line"):
        _check_finite(fine, fine, torch.ones(()), 3, tmp_path)


def test_accumulated_batches_make_one_step(codec, batches, tmp_path):
    """Two batches for one step have the mean of their gradients: three steps of two see batches 0 to 5 once each."""
    seen: list[int] = []

    class Noting(Batches):
        def __getitem__(self, index: int):
            seen.append(index)
            return super().__getitem__(index)

    noting = Noting(batches.store, batches.latents, batches.pairs, batches.seed)
    config = replace(TRAINING, steps=3, accumulate=2, clip=1e9)
    got = train_video_model(tmp_path / "two", EMBEDDED, codec, noting, config)
    assert seen == [0, 1, 2, 3, 4, 5]
    one = train_video_model(tmp_path / "one", EMBEDDED, codec, batches, replace(config, accumulate=1))
    assert not torch.equal(got.unet.conv_in.weight, one.unet.conv_in.weight)


def test_ten_steps_lose_what_they_lost_before(codec, batches, tmp_path):
    """float32, no autocast. To renew the file after a wanted change: delete it and run this test once."""
    losses: list[float] = []
    config = replace(TRAINING, steps=10, save_every=100)
    train_video_model(
        tmp_path, EMBEDDED, codec, batches, config, progress=lambda step, total, r: losses.append(r["loss"])
    )  # fmt: skip
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text("".join(f"{x:.5f}\n" for x in losses))
    expected = [float(x) for x in GOLDEN.read_text().split()]
    assert losses == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("config", [EMBEDDED, replace(EMBEDDED, normals=False)], ids=["joint", "without normals"])
def test_one_batch_can_be_learnt(codec, batches, config):
    torch.manual_seed(0)
    model = VideoModel(config, codec)
    objective, batch = Objective(model), batches[0]
    optimiser = torch.optim.AdamW(objective.parameters(), 3e-3)
    d = len(config.domains)
    noise = model.diffusion.noise_like(batch.target[:, :d], torch.Generator().manual_seed(0))
    losses = []
    for _ in range(16):
        loss = objective(batch, Draws(torch.tensor([500, 900]), noise, torch.zeros(2, 2) > 0, torch.ones(2) > 0))
        assert loss.shape == (d,)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_motion_codes_keep_what_moves():
    """Left and right lids, jaw and gaze each move their own components; head pose and shape move none."""
    head = load_head()
    n = len(head.expression_names)
    zero = head.neutral(2 * n)
    jaw = torch.randn(2 * n, 3, generator=torch.Generator().manual_seed(0)) * 0.05
    sample = replace(zero, expr=torch.cat([torch.eye(n), 0.5 * torch.eye(n)]), jaw_pose=jaw)
    gaze = torch.randn(zero.eyes_pose.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    code = fit_motion_code(head, replace(sample, eyes_pose=gaze))
    sides = [r.side for r in REGIONS]
    ends = np.cumsum([0] + [b.shape[1] for b in code.basis])
    left, right = (slice(ends[sides.index(s)], ends[sides.index(s) + 1]) for s in (1, -1))

    def moved(**change: torch.Tensor) -> torch.Tensor:
        return (code(head, replace(head.neutral(1), **change)) - code(head, head.neutral(1)))[0]

    blink = torch.eye(n)[head.expression_names.index("eyeBlinkLeft")][None]
    assert moved(expr=blink)[left].norm() > 20 * moved(expr=blink)[right].norm()
    assert moved(jaw_pose=torch.tensor([[0.2, 0.0, 0.0]]))[: ends[1]].norm() > 1
    looked = moved(eyes_pose=torch.full_like(head.neutral(1).eyes_pose, 0.2))
    assert looked[-4:].abs().min() > 0.5 > looked[: ends[1]].norm()
    assert moved(rotation=torch.ones(1, 3), shape=torch.ones_like(head.neutral(1).shape)).norm() == 0


@torch.no_grad()
def test_the_readout_is_the_best_linear_guess(batches):
    torch.manual_seed(0)
    encoder = ExpressionEncoder(replace(EMBEDDED.expression, motion=55))
    plain = Batches(batches.store, batches.latents, batches.pairs, augment=None)
    assert (encoder.motion(torch.randn(2, 8)) == 0).all(), "it says nothing before it is fitted"
    fit_motion_readout(encoder, plain, ridge=1e-6)
    crops, row = plain.drivers(999, 64)
    motion = batches.store.motion()
    truth = torch.cat([motion.expr, motion.jaw_pose], 1)[row]
    guess = encoder.to_motion(encoder(crops))
    assert (guess - truth).square().mean() < 0.5 * truth.var(0).mean()
    assert encoder.motion(encoder(crops))[:, :-3].min() >= 0
    assert (encoder.motion(torch.zeros(1, 8)) == 0).all(), "the null expression moves nothing"
    assert not encoder.to_motion.weight.requires_grad


def test_a_warm_encoder_knows_what_the_store_shows(batches):
    torch.manual_seed(0)
    encoder = ExpressionEncoder(EMBEDDED.expression)
    losses: list[float] = []
    plain = Batches(batches.store, batches.latents, batches.pairs, augment=None)
    warm_start(encoder, plain, 80, False, lambda step, total, r: losses.append(r["loss"]), lr=4e-3, crops=24)
    assert losses[-1] < 0.85 * losses[0], losses


def test_the_encoder_learns_from_the_denoising_loss_alone(codec, batches):
    model = build(EMBEDDED, codec)
    objective, batch = Objective(model), batches[0]
    noise = model.diffusion.noise_like(batch.target, torch.Generator().manual_seed(0))
    keep = torch.ones(2, dtype=torch.bool)
    for dropped in (False, True):
        objective.zero_grad()
        draws = Draws(torch.tensor([500, 900]), noise, torch.full((2, 2), dropped), keep)
        objective(batch, draws).mean().backward()
        gradient = model.expression.to_latent.weight.grad
        assert (gradient is not None and gradient.abs().max() > 0) != dropped
    assert not [k for k, p in objective.named_parameters() if k.startswith("codec")]


if __name__ == "__main__":  # One of the processes of `test_two_processes_train_one_model`.
    torch.set_num_threads(1)
    rank, out = os.environ["RANK"], Path(sys.argv[1])
    (out / rank).mkdir()
    vae = tiny_codec()
    trained = train_video_model(out / rank, EMBEDDED, vae, tiny_batches(vae, out / rank), TRAINING)
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, out / f"{rank}.safetensors")
