"""Sampling as a whole: what is cached, batched, windowed or moved away changes no picture."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geodiff4d.core.errors import UserError
from geodiff4d.core.precision import bf16_is_native
from geodiff4d.video import memory
from geodiff4d.video.attention import GroupNorm
from geodiff4d.video.diffusion import DiffusionConfig
from geodiff4d.video.expression import ExpressionConfig
from geodiff4d.video.model import ConditionImages, Conditions, VideoModel, VideoModelConfig
from geodiff4d.video.sample import ClipInputs, SampleConfig, sample
from geodiff4d.video.unet import UNetConfig
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig

UNET = UNetConfig(
    in_channels=6 + 3, out_channels=6, widths=(16, 16), layers=1, down_attention=(False, True), up_attention=(2, 0),
    heads=2, groups=8, ff_factor=2, cross_dim=8, expression_dim=4, expression_layers=1, expression_ff_factor=2,
)  # fmt: skip
PAPER = VideoModelConfig(
    unet=UNET, reference=replace(UNET, expression_dim=None, reference=True),
    expression=ExpressionConfig(size=16, widths=(8, 8), squeeze=4, latent=8, tokens=4, token_dim=4),
    diffusion=DiffusionConfig(), size=32,
)  # fmt: skip
"""Like the paper: noise prediction, pose map resized, text attention; a patch code in place of the autoencoder."""
VIDEO = replace(PAPER, unet=replace(UNET, temporal_layers=1, temporal_ff_factor=2))
FAST = SampleConfig(steps=2, autocast=False, window=4, overlap=2, chunk=4)


def build(config: VideoModelConfig, kind: type[VideoModel] = VideoModel) -> VideoModel:
    """Random weights in every module: those that start at zero would hide what they do."""
    torch.manual_seed(0)
    model = kind(config, PatchCodec(PatchCodecConfig(factor=4, channels=6, trunk=8, detail=8)))
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.15 + (p.data if p.ndim == 1 else 0)
    return model.eval()


@pytest.fixture(scope="module")
def image() -> VideoModel:
    return build(PAPER)


@pytest.fixture(scope="module")
def video() -> VideoModel:
    return build(VIDEO)


def known(model: VideoModel, frames: int) -> ClipInputs:
    """What a random clip is denoised from."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        pose = torch.rand(1, 3, frames, 32, 32, generator=g)
        image_context = torch.randn(1, 1, 8, generator=g)
        portrait = torch.randn(1, 6, 8, 8, generator=g), torch.rand(1, 3, 8, 8, generator=g)
        return ClipInputs(
            conditions=model.conditions(ConditionImages(pose)), latents=torch.randn(1, frames, 8, generator=g),
            reference=model.reference_kv(*portrait, image_context), start=torch.randn(1, 2, 6, 8, 8, generator=g),
            image_context=image_context,
        )  # fmt: skip


# Stage 2, references, frames


def test_a_fresh_stage_2_model_samples_what_stage_1_does(image):
    """Zero-initialised temporal modules and averaged windows of equal predictions leave every frame as it was."""
    fresh = VideoModel(VIDEO, image.codec).eval()
    report = fresh.load_state_dict(image.state_dict(), strict=False)
    assert not report.unexpected_keys and all(".temporals." in k for k in report.missing_keys)
    z = sample(image, known(image, 5), FAST)
    assert_close(sample(fresh, known(fresh, 5), FAST), z, atol=1e-4, rtol=1e-4)


class Recomputing(VideoModel):
    """Run the reference network anew whenever it is read, as a plain implementation does."""

    def predict_clean(self, z_t, t, conditions, latent, reference, valid=None, image_context=None):
        g = torch.Generator().manual_seed(1)
        torch.rand(1, 3, 3, 32, 32, generator=g), torch.randn(1, 1, 8, generator=g)
        portrait = torch.randn(1, 6, 8, 8, generator=g), torch.rand(1, 3, 8, 8, generator=g)
        anew = (torch.cat([x] * len(z_t)) for x in portrait)
        return super().predict_clean(
            z_t, t, conditions, latent, self.reference_kv(*anew, image_context), valid, image_context
        )


def test_the_reference_cache_equals_recomputation(image):
    cached = sample(image, known(image, 3), FAST)
    anew = build(PAPER, Recomputing)
    assert_close(sample(anew, replace(known(anew, 3), reference=[]), FAST), cached, atol=1e-4, rtol=1e-4)


def shuffled(given: ClipInputs, order: list[int]) -> ClipInputs:
    conditions = Conditions(given.conditions.planes[:, :, order], given.conditions.base[:, :, :, order])
    return replace(given, conditions=conditions, latents=given.latents[:, order])


def test_frames_of_the_image_model_permute(image):
    given, order, config = known(image, 5), [3, 0, 4, 2, 1], replace(FAST, still_noise=True)
    z = sample(image, given, config)
    assert_close(sample(image, shuffled(given, order), config), z[:, :, :, order], atol=1e-4, rtol=1e-4)


def test_views_of_the_video_model_permute_and_their_frames_do_not(video):
    given, config = known(video, 5), replace(FAST, still_noise=True)
    z = sample(video, replace(given, runs=[2, 3]), config)
    views = [2, 3, 4, 0, 1]
    swapped = sample(video, replace(shuffled(given, views), runs=[3, 2]), config)
    assert_close(swapped, z[:, :, :, views], atol=1e-4, rtol=1e-4)
    backwards = [1, 0, 2, 3, 4]
    turned = sample(video, replace(shuffled(given, backwards), runs=[2, 3]), config)
    assert (turned - z[:, :, :, backwards])[:, :, :, :2].abs().max() > 1e-3


@torch.no_grad()
def test_a_padded_frame_changes_nothing(video):
    given, t = known(video, 4), torch.tensor([600])
    z = torch.randn(1, 2, 6, 4, 8, 8)
    valid = torch.tensor([[True, True, True, False]])

    def predict(z, conditions, latents):
        return video.predict_clean(z, t, conditions, latents, given.reference, valid)

    before = predict(z, given.conditions, given.latents)
    planes, latents, noisy = given.conditions.planes.clone(), given.latents.clone(), z.clone()
    for x, axis in ((planes, 2), (latents, 1), (noisy, 3)):
        x.select(axis, 3).fill_(5.0)
    after = predict(noisy, Conditions(planes, given.conditions.base), latents)
    assert torch.equal(after[:, :, :, :3], before[:, :, :, :3])
    assert (after[:, :, :, 3] - before[:, :, :, 3]).abs().max() > 1e-3


# Solvers, seeds, windows, guidance


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "dpm++"])
def test_seeds_reproduce_any_number_of_views(video, sampler):
    config, given = replace(FAST, sampler=sampler, guidance=1.0), known(video, 5)
    a, b, c = (sample(video, replace(given, runs=[2, 1, 1, 1]), replace(config, seed=s)) for s in (4, 4, 5))
    assert torch.equal(a, b) and a.isfinite().all() and not torch.equal(a, c)


def test_branches_one_after_the_other_equal_both_together(video):
    given = known(video, 5)
    both = sample(video, given, FAST)
    assert_close(sample(video, given, replace(FAST, batched_cfg=False)), both, atol=1e-4, rtol=1e-4)
    assert (sample(video, given, replace(FAST, guidance=1.0)) - both).abs().max() > 1e-3


def test_guidance_acts_in_its_share_of_the_steps(image):
    rows: list[int] = []

    class Counting(VideoModel):
        def predict_clean(self, z_t, *args, **options):
            rows.append(len(z_t))
            return super().predict_clean(z_t, *args, **options)

    model = build(PAPER, Counting)
    sample(model, known(model, 2), replace(FAST, steps=4, guidance_from=0.25, guidance_until=0.75))
    assert rows == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 33}, "at most 32 frames"),
        ({"overlap": 4}, "share 4"),
        ({"guidance_from": 0.9, "guidance_until": 0.1}, "from 0 to 1"),
        ({"chunk": 0}, "1 or more"),
    ],
)
def test_sampling_that_cannot_work_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        replace(FAST, **options)


def test_views_that_are_not_the_frames_are_refused(image):
    for frames, runs in ((3, [2]), (0, None)):
        with pytest.raises(UserError, match="nothing to sample"):
            sample(image, replace(known(image, 3), latents=torch.zeros(1, frames, 8), runs=runs), FAST)


# Speed and memory


class HostTraffic(TorchDispatchMode):
    """Note what would make the host wait for the device: numbers fetched from it, tensors copied to it."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs or {}, out)) if isinstance(x, torch.Tensor)]
        if "local_scalar_dense" in str(func) or any(x.device.type == "cpu" for x in tensors):
            self.seen.append(str(func))
        return out


@torch.no_grad()
def test_no_step_makes_the_host_wait():
    """On a device without numbers: whatever needs one in the middle of a step would show."""
    model = build(VIDEO).to("meta")

    def there(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    conditions = Conditions(there(1, 3, 4, 8, 8), there(1, 2, 6, 4, 8, 8))
    kv = model.reference_kv(there(1, 6, 8, 8), there(1, 3, 8, 8))
    t = torch.empty(1, dtype=torch.long, device="meta")
    step = (there(1, 2, 6, 4, 8, 8), t, conditions, there(1, 4, 8), kv)
    model.predict_clean(*step)
    with HostTraffic() as traffic:
        model.predict_clean(*step)
    assert not traffic.seen
    with HostTraffic() as traffic:
        torch.tensor([1.0], device="meta") + there(1)
        torch.zeros(1).to("meta")
    assert traffic.seen, "the watch itself works"


def test_emulated_bf16_is_not_chosen(monkeypatch):
    """A card before Ampere emulates bf16: right, and slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not bf16_is_native(torch.device("cuda"))


@torch.no_grad()
def test_bf16_weights_predict_what_float32_does(image):
    given, t, z = known(image, 2), torch.tensor([600]), torch.randn(1, 2, 6, 2, 8, 8)
    step = (z, t, given.conditions, given.latents, given.reference)
    expected = image.predict_clean(*step)
    compact = build(PAPER).compact()
    assert compact.unet.dtype == compact.reference.dtype == torch.bfloat16
    got = compact.predict_clean(*step)
    assert got.dtype == torch.float32
    assert (got - expected).square().mean().sqrt() < 0.05 * expected.std()
    portrait = torch.randn(1, 6, 8, 8), torch.rand(1, 3, 8, 8)
    for ours, theirs in zip(compact.reference_kv(*portrait), image.reference_kv(*portrait), strict=True):
        assert (ours[0].float() - theirs[0]).square().mean().sqrt() < 0.05 * theirs[0].std()


def test_group_norms_in_bf16_keep_channels_last():
    norm = GroupNorm(4, 12)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 12, 5, 6).contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.group_norm(x, 4, norm.weight, norm.bias)
    assert torch.equal(norm(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x.bfloat16())
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got.float(), expected, atol=0.05, rtol=0.02)


def test_offloading_moves_what_a_stage_does_not_need_and_brings_it_back(image, monkeypatch):
    moved: list[tuple[str, str]] = []
    names = {id(network): name for name, network in memory.parts(image).items()}
    monkeypatch.setattr(VideoModel, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: moved.append((names[id(self)], str(where))))
    with pytest.raises(RuntimeError), memory.alone(image, "unet"):
        assert sorted(moved) == [(name, "cpu") for name in ("codec", "expression", "reference")]
        moved.clear()
        raise RuntimeError
    assert sorted(moved) == [(name, "cuda") for name in ("codec", "expression", "reference")]
    moved.clear()
    with memory.alone(image, "unet", offload=False):
        assert not moved
