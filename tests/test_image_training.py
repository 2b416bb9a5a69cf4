"""Training at toy size, stage 1: batches, resumption, accumulation, losses, and what stops a run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from geodiff4d.core.errors import UserError
from geodiff4d.data.augment import AugmentConfig, augment_crops
from geodiff4d.data.sampling import Samples
from geodiff4d.video.batches import Batches
from geodiff4d.video.model import (
    VideoModel,
    load_video_model,
)
from geodiff4d.video.objective import Draws, Objective
from geodiff4d.video.train import check_finite, draw, train_video_model
from geodiff4d.video.vae import PatchCodec
from tiny import CHANNELS, EMBEDDED, SIZE, TRAINING, build, tiny_batches, tiny_codec

GOLDEN = Path(__file__).parent / "golden" / "image_loss.txt"


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return tiny_codec()


@pytest.fixture(scope="module")
def batches(codec, tmp_path_factory) -> Batches:
    return tiny_batches(codec, tmp_path_factory.mktemp("store"))


def test_augmented_crops_stay_pictures():
    crops = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    out, again, other = (augment_crops(crops, AugmentConfig(), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert out.shape == crops.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, again) and not torch.equal(out, other)
    assert (out - crops).abs().mean((1, 2, 3)).min() > 0.01
    nothing = AugmentConfig(0, 0, 0, 0, 0, 0, 0, 0)
    assert_close(augment_crops(crops, nothing, torch.Generator()), crops, atol=1e-5, rtol=0)


def test_warped_portraits_move_where_they_are_told_to(batches):
    def warps(share: float) -> torch.Tensor:
        given = batches.samples
        pairs = replace(given.pairs, moved=share)
        return Batches(Samples(given.sources, pairs, given.read), batches.codec)[5].warp

    still, moved, some = warps(0.0), warps(1.0), warps(0.5)
    # The tiny head moves by standing on its head.
    assert not torch.equal(still, moved) and ((moved == 0.5) != (still == 0.5)).any()
    each = [[torch.equal(some[i, :, j], x[i, :, j]) for x in (still, moved)] for i in range(2) for j in range(2)]
    assert all(any(e) for e in each)


def test_batches_are_functions_of_their_index(batches):
    a, b, c = batches[5], batches[5], batches[6]
    for k, v in vars(a).items():
        assert torch.equal(v, getattr(b, k)), k
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

    def stop(record: dict) -> None:
        if record["step"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_video_model(tmp_path / "parts", EMBEDDED, codec, batches, TRAINING, on_record=stop)
    seen: list[int] = []
    resumed = train_video_model(
        tmp_path / "parts", EMBEDDED, codec, batches, TRAINING, on_record=lambda record: seen.append(record["step"])
    )
    assert seen == [2, 3]
    for k, v in whole.state_dict().items():
        assert torch.equal(v, resumed.state_dict()[k]), k
    # What is saved for use is the average that is returned.
    saved = load_video_model(tmp_path / "parts/model")
    assert_close(saved.unet.conv_in.weight, whole.unet.conv_in.weight, atol=1e-3, rtol=1e-3)
    with pytest.raises(UserError, match="another configuration"):
        train_video_model(tmp_path / "parts", EMBEDDED, codec, batches, replace(TRAINING, lr=1.0))


def test_a_validation_that_was_killed_is_made_up_for(codec, batches, tmp_path, monkeypatch):
    config = replace(TRAINING, steps=2, save_every=1, validate_every=1, pictures=1)
    arguments = (tmp_path, EMBEDDED, codec, batches, config, batches)

    def killed(*_):
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("geodiff4d.video.train.validate", killed)
        train_video_model(*arguments)
    # The checkpoint after step 0 was written, its validation was not; then the same after the last step.
    told: list[dict] = []
    train_video_model(*arguments, on_record=told.append)
    assert [r["step"] for r in told if "val_rgb_300" in r] == [0, 1]
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"step_000001.png", "step_000002.png"}
    told.clear()
    train_video_model(*arguments, on_record=told.append)
    assert not told, "a finished run has nothing to make up for"


class Poisoned(Batches):
    """Batches whose numbers are gone from index 2 on."""

    def __getitem__(self, index: int):
        batch = super().__getitem__(index)
        return batch if index < 2 else replace(batch, target=batch.target * float("nan"))


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(codec, batches, tmp_path):
    config = replace(TRAINING, steps=4, save_every=1)
    with pytest.raises(UserError, match="step 2: loss nan"):
        poisoned = Poisoned(batches.samples, batches.codec)
        train_video_model(tmp_path, EMBEDDED, codec, poisoned, config)
    assert all(p.isfinite().all() for p in load_video_model(tmp_path / "model").parameters())
    whole = train_video_model(tmp_path, EMBEDDED, codec, batches, config)
    assert all(p.isfinite().all() for p in whole.parameters())


def test_between_checks_a_bad_gradient_touches_no_weight(codec, batches, tmp_path, monkeypatch):
    """As on a GPU, which is not asked at every step: the next one that is asked tells."""
    told: list[float] = []
    monkeypatch.setattr(
        "geodiff4d.video.train.check_finite", lambda loss, norm, bad, step, folder: told.append(bad.item())
    )
    poisoned = Poisoned(batches.samples, batches.codec)
    whole = train_video_model(tmp_path, EMBEDDED, codec, poisoned, replace(TRAINING, steps=4))
    assert told == [0, 0, 1, 1] and all(p.isfinite().all() for p in whole.parameters())
    monkeypatch.undo()
    fine = torch.ones(())
    check_finite(fine, fine, torch.zeros(()), 3, tmp_path)
    with pytest.raises(UserError, match="since the last line"):
        check_finite(fine, fine, torch.ones(()), 3, tmp_path)


def test_accumulated_parts_are_the_batch(codec, batches, tmp_path):
    """Four samples at once or two by two: the same samples, noise, losses and weights after three steps."""
    four = replace(batches.samples.pairs, references=4)
    whole = Batches(Samples(batches.samples.sources, four, batches.samples.read), codec)
    seen: dict[str, list[float]] = {"whole": [], "parts": []}
    models = []
    for name, given, accumulate in (("whole", whole, 1), ("parts", batches, 2)):
        config = replace(TRAINING, steps=3, accumulate=accumulate, pairs=given.samples.pairs, clip=1e9)
        listen = lambda record, name=name: seen[name].append(record["loss"])  # noqa: E731
        models.append(train_video_model(tmp_path / name, EMBEDDED, codec, given, config, on_record=listen))
    assert seen["whole"] == pytest.approx(seen["parts"], rel=1e-4)
    for k, v in models[0].state_dict().items():
        assert_close(models[1].state_dict()[k], v, atol=2e-4, rtol=1e-3, msg=k)


def test_draws_belong_to_a_sample_and_not_to_its_batch(codec, batches):
    model = build(EMBEDDED, codec)
    single = replace(batches.samples.pairs, references=1)
    alone = Batches(Samples(batches.samples.sources, single, batches.samples.read), codec)
    config = replace(TRAINING, drop_expression=0.5, drop_warp=0.5, sampled_starts=0.3)
    for index in range(4):
        pair = batches[index]
        both = draw(model, pair, config)
        for row in range(2):
            one = alone[2 * index + row]
            for k, v in vars(one).items():
                assert_close(getattr(pair, k)[row : row + 1], v, msg=k)
            for k, v in vars(draw(model, one, config)).items():
                assert torch.equal(getattr(both, k)[row : row + 1], v), k


def test_an_average_without_decay_is_the_weights_wherever_it_is_held(codec, batches, tmp_path):
    config = replace(TRAINING, steps=2, ema=0.0, ema_on_host=True, clip=0.0, pictures=0)
    train_video_model(tmp_path, EMBEDDED, codec, batches, config)
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert all(torch.equal(v, saved[k.replace("ema.", "model.", 1)]) for k, v in saved.items() if k.startswith("ema."))


def test_a_finished_run_goes_on_when_it_is_given_more_steps(codec, batches, tmp_path):
    train_video_model(tmp_path, EMBEDDED, codec, batches, replace(TRAINING, pictures=0))
    seen: list[int] = []
    longer = replace(TRAINING, steps=6, pictures=0)
    train_video_model(tmp_path, EMBEDDED, codec, batches, longer, on_record=lambda record: seen.append(record["step"]))
    assert seen == [4, 5]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["training"]["steps"] == 6


def test_ten_steps_lose_what_they_lost_before(codec, batches, tmp_path):
    """float32, no autocast. To renew the file after a wanted change: delete it and run this test once."""
    losses: list[float] = []
    config = replace(TRAINING, steps=10, save_every=100)
    train_video_model(
        tmp_path, EMBEDDED, codec, batches, config, on_record=lambda r: losses.append(r["loss"])
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
