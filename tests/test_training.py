"""Training at toy size: stage 2, exact resumption, processes that share a batch, full disks, and what one looks at."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

from geodiff4d.cli import explain
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import read_image
from geodiff4d.core.rundir import RunFolder, read_log
from geodiff4d.core.stopping import Stopped
from geodiff4d.data.footage.rendered import RenderedFootage, TrackStoreConfig
from geodiff4d.data.sampling import PairConfig
from geodiff4d.video.batches import Batches
from geodiff4d.video.curves import write_curves
from geodiff4d.video.decoder import DecoderConfig, GuidedDecoder
from geodiff4d.video.encode import encode_store
from geodiff4d.video.flicker import flicker, measure_flicker, without_temporal_modules
from geodiff4d.video.gradient_checkpointing import checkpoint_gradients
from geodiff4d.video.model import load_video_model
from geodiff4d.video.objective import Draws, Objective, averaged, trained_state
from geodiff4d.video.preview import generated_latents, sheet
from geodiff4d.video.processes import broadcast
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.train import FREE, VideoTraining, draw, train_video_model
from tiny import EMBEDDED, TRAINING, UNET, TinyStore, build, tiny_batches, tiny_codec

VIDEO = replace(EMBEDDED, unet=replace(UNET, temporal_layers=1, temporal_ff_factor=2))
CLIPS = PairConfig(references=2, targets=4, clips=True, moved=1.0)
STAGE2 = replace(TRAINING, parts="temporal", pairs=CLIPS, sampled_starts=0.5, pictures=0)
CPU_YAML = str(Path(__file__).parents[1] / "configs/cpu.yaml")
FAST = SampleConfig(steps=1, guidance=1.0, still_noise=True, autocast=False)
LONG = replace(TRAINING, steps=20, save_every=5, pictures=0, gradient_checkpointing=False)


class TinyTracks(TinyStore):
    """Three frames and a portrait of two people."""

    def __init__(self):
        super().__init__(instants=4)
        self.tracks = TrackStoreConfig(subjects=2, frames=3, portraits=1)


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


@pytest.fixture(scope="module")
def pictures(codec, tmp_path_factory):
    return tiny_batches(codec, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def clips(codec, tmp_path_factory) -> Batches:
    return tiny_batches(codec, tmp_path_factory.mktemp("tracks"), CLIPS, TinyTracks(), augment=None)


# Stage 2


def test_tracks_are_drawn_as_clips_that_start_from_a_portrait(clips):
    footage = clips.samples.sources[0]
    track, portraits = footage.takes[:2]
    assert track.temporal and track.targets and not track.portraits
    assert portraits.portraits and not portraits.temporal and not portraits.targets
    for index in range(20):
        s = clips.samples.draw(index)
        subjects, instants, views = footage.rows((s.reference, *s.target))
        assert len(set(subjects.tolist())) == len(set(views[1:].tolist())) == 1
        assert instants.tolist() == [3, 0, 1, 2, 2] and s.padding == 1 and s.moved == (True,) * 4
        assert {k.view for k in s.driving} == {1 - s.target[0].view}


def test_padding_of_tracks_weighs_nothing(clips):
    batch = clips[0]
    assert batch.valid.tolist() == [[True, True, True, False]] * 2
    assert batch.weight[:, :, :, 3].max() == 0 and batch.weight[:, :, :, :3].mean().item() == pytest.approx(1, abs=1e-5)
    assert_close(batch.start[:, 0], batch.reference)


def test_latents_are_encoded_once(codec, tmp_path):
    footage = RenderedFootage(TinyTracks())
    assert encode_store(footage, codec, tmp_path / "latents.npy")
    when = (tmp_path / "latents.npy").stat().st_mtime_ns
    assert encode_store(footage, codec, tmp_path / "latents.npy")
    assert (tmp_path / "latents.npy").stat().st_mtime_ns == when
    other = tiny_codec()
    other.scale.mul_(2)
    encode_store(footage, other, tmp_path / "latents.npy")
    assert (tmp_path / "latents.npy").stat().st_mtime_ns > when, "another codec makes other latents"


def test_encoding_goes_on_where_it_was_cut_off(codec, tmp_path, monkeypatch):
    monkeypatch.setattr("geodiff4d.video.encode.KEPT_EVERY", 1)
    footage, path = RenderedFootage(TinyTracks()), tmp_path / "latents.npy"
    encode_store(footage, codec, tmp_path / "whole.npy", chunk=6)
    whole = np.load(tmp_path / "whole.npy")
    chunks: list[int] = []
    encode = codec.encode

    def killed(x):
        chunks.append(len(x))
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return encode(x)

    monkeypatch.setattr(codec, "encode", lambda x: encode(x) if x.shape[0] == 1 else killed(x))
    with pytest.raises(KeyboardInterrupt):
        encode_store(footage, codec, path, chunk=6)
    done = sum(chunks[:2])
    chunks[:] = [0] * 100
    encode_store(footage, codec, path, chunk=6)
    assert (np.load(path) == whole).all()
    assert sum(chunks) == 3 * 2 * 4 * 2 - done, "each image once"


def test_stage_two_trains_watches_and_loads(codec, clips, tmp_path):
    first = build(EMBEDDED, codec)
    start = {k: v for k, v in first.state_dict().items() if not k.startswith("codec.")}
    records: list[dict] = []
    config = replace(STAGE2, steps=2, pictures=2)
    decoder = GuidedDecoder(DecoderConfig((8, 8), (1, 1)))
    train_video_model(tmp_path, VIDEO, codec, clips, config, clips, start, records.append, decoder)
    seen = {k: v for r in records for k, v in r.items()}
    assert {"flicker_rgb", "flicker_rgb_alone", "flicker_normal", "clip_error", "eta", "val_rgb_999"} <= seen.keys()
    picture = read_image(tmp_path / "pictures/step_000002.png")
    assert picture.shape[1] == 2 * 132 and picture.std() > 0.05
    assert read_image(tmp_path / "curves.png").shape[0] == 3
    model = load_video_model(tmp_path / "model")
    assert model.temporal
    assert model.decoder is not None and model.decoder.config == decoder.config, "frames are finished as before"
    for name, value in first.unet.state_dict().items():
        assert_close(model.unet.state_dict()[name], value, atol=2e-3, rtol=1e-3)


def test_without_temporal_modules_a_model_is_its_image_model(codec, clips):
    video, picture = build(VIDEO, codec), build(EMBEDDED, codec)
    picture.load_state_dict(video.state_dict(), strict=False)
    batch = clips[0]
    with without_temporal_modules(video):
        alone = generated_latents(video, batch, 0, FAST)
    assert_close(alone, generated_latents(picture, batch, 0, FAST))
    assert not torch.allclose(generated_latents(video, batch, 0, FAST), alone)
    found = measure_flicker(video, clips, FAST, clips=2)
    assert found["flicker_rgb"] != found["flicker_rgb_alone"] and all(np.isfinite(v) for v in found.values())


def test_flicker_is_what_changes_otherwise_than_the_truth():
    truth = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(4, 1, 8, 8)
    inside[..., :4] = 1
    assert flicker(truth + 0.2, truth, inside) == pytest.approx(0, abs=1e-4), "steadily wrong is steady"
    jitter = torch.tensor([0.0, 0.1, 0.0, 0.1])[:, None, None, None]
    assert flicker(truth + jitter, truth, inside) == pytest.approx(25.5, rel=1e-4)
    assert flicker(truth + jitter * (1 - inside), truth, inside) == pytest.approx(0, abs=1e-4)
    assert flicker(truth[:1].expand_as(truth), truth, inside) > 10, "a frozen film misses the motion"


def test_expressions_are_dropped_by_the_frame_and_later_by_the_clip(codec, clips):
    model, batch = build(VIDEO, codec), clips[0]
    for parts in ("all", "temporal"):
        pairs = replace(CLIPS, clips=parts == "temporal")
        config = replace(STAGE2, pairs=pairs, drop_expression=0.1)
        batches = (replace(batch, index=2 * i + torch.arange(2)) for i in range(1000))
        dropped = torch.cat([draw(model, given, config).drop_expression for given in batches])
        assert dropped.shape == (2000, 4) and abs(dropped.float().mean().item() - 0.1) < 0.02
        mixed = dropped.any(1) & ~dropped.all(1)
        assert mixed.any() == (parts == "all"), "guidance's null branch is a clip without any expression"
    assert VideoTraining().drop_expression == 0.1


def test_some_clips_start_where_a_sampler_does(codec, clips):
    model = build(VIDEO, codec)
    draws = draw(model, clips[0], replace(STAGE2, sampled_starts=1.0))
    assert draws.from_portrait.all() and (draws.t == 999).all()
    assert (draws.noise == draws.noise[:, :, :, :1]).all(), "one noise for all frames"
    assert draw(model, clips[0], replace(STAGE2, sampled_starts=0.0)).from_portrait is None
    noisy: list[torch.Tensor] = []
    model.predict_clean = lambda z_t, *a: noisy.append(z_t) or z_t
    batch = clips[0]
    with torch.no_grad():
        for given in (batch, replace(batch, target=batch.target + 1.0)):
            Objective(model)(given, draws)
    assert_close(*noisy)
    assert_close(noisy[0], noisy[0][:, :, :, :1].expand_as(noisy[0]))


@torch.no_grad()
def test_the_temporal_loss_counts_changes_and_not_what_stays_wrong(codec, clips):
    model, batch = build(VIDEO, codec), clips[0]
    draws = Draws(torch.tensor([500, 900]), torch.zeros_like(batch.target), torch.zeros(2, 4) > 0, torch.ones(2) > 0)
    wrong = torch.ones_like(batch.target)
    # The last frame is padding: what it does counts nothing.
    for signs, steady in (([1.0, 1, 1, -1], True), ([1.0, -1, 1, 1], False)):
        error = wrong * torch.tensor(signs)[:, None, None]
        model.predict_clean = lambda *a, e=error: batch.target + e
        plain, both = (Objective(model, s)(batch, draws) for s in (0.0, 1.0))
        if steady:
            assert_close(both, plain)
        else:
            assert (both > 2 * plain).all()


# Memory, time and interruptions


def test_gradient_checkpointing_changes_no_gradient(codec, clips):
    gradients = []
    for again in (False, True):
        model = build(VIDEO, codec)
        if again:
            checkpoint_gradients(model)
        objective, batch = Objective(model), clips[0]
        noise = model.diffusion.noise_like(batch.target, torch.Generator().manual_seed(0))
        draws = Draws(torch.tensor([500, 900]), noise, torch.zeros(2, 4) > 0, torch.ones(2) > 0)
        objective(batch, draws).mean().backward()
        gradients.append({k: p.grad for k, p in objective.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for k, g in gradients[0].items():
        assert_close(gradients[1][k], g, atol=1e-6, rtol=1e-5)


def test_twenty_steps_equal_ten_a_kill_and_ten(codec, pictures, tmp_path):
    """Bit for bit, weights and their average; the child dies by SIGKILL two steps after a checkpoint."""
    whole = train_video_model(tmp_path / "whole", EMBEDDED, codec, pictures, LONG)
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, "kill", str(tmp_path / "parts"), threads]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    # Killed while the model was written, too: a half of it lies beside.
    (tmp_path / "parts/.model.99.part/unet").mkdir(parents=True)
    assert RunFolder(tmp_path / "parts", json_config(tmp_path / "parts")).load()[1] == 10
    assert not list((tmp_path / "parts").glob(".*.part"))
    seen: list[int] = []
    train_video_model(tmp_path / "parts", EMBEDDED, codec, pictures, LONG, on_record=lambda r: seen.append(r["step"]))
    assert seen == list(range(10, 20))
    checkpoints = [load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(torch.equal(v, checkpoints[1][k]) for k, v in checkpoints[0].items())
    assert len(whole.state_dict()) > 0


def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not(codec, pictures, tmp_path):
    config = replace(TRAINING, steps=4, save_every=100, pictures=0)
    train_video_model(tmp_path / "whole", EMBEDDED, codec, pictures, config)

    def ask(record: dict) -> None:
        if record["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="after step 2") as stopped:
        train_video_model(tmp_path / "parts", EMBEDDED, codec, pictures, config, on_record=ask)
    assert explain(stopped.value)[1] == 143 and load_video_model(tmp_path / "parts/model").config == EMBEDDED
    seen: list[int] = []
    train_video_model(tmp_path / "parts", EMBEDDED, codec, pictures, config, on_record=lambda r: seen.append(r["step"]))
    assert seen == [3]
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def json_config(run: Path):
    """Return the configuration of a run as it is on disk, in the shape that `RunFolder` takes."""
    from dataclasses import make_dataclass

    saved = json.loads((run / "config.json").read_text())["config"]
    return make_dataclass("Saved", saved.keys())(**saved)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_loses_nothing(codec, pictures, tmp_path, monkeypatch, error):
    config = replace(TRAINING, steps=4, save_every=2, pictures=0)
    written: list[int] = []

    def save(tensors, path, metadata):
        written.append(int(metadata["step"]))
        if len(written) == 2:
            Path(path).write_bytes(b"half of it")
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr("geodiff4d.core.rundir.save_tensors", save)
    with pytest.raises(type(error)) as stopped:
        train_video_model(tmp_path, EMBEDDED, codec, pictures, config)
    line, code = explain(stopped.value)
    assert code == 2 and "no space left" in line and "free some space" in line and "\n" not in line
    assert not list(tmp_path.rglob(".*.part"))
    assert load_video_model(tmp_path / "model").config == EMBEDDED
    seen: list[int] = []
    train_video_model(tmp_path, EMBEDDED, codec, pictures, config, on_record=lambda r: seen.append(r["step"]))
    assert seen == [2, 3], "it goes on from the checkpoint that was whole"


def test_checkpoints_come_by_the_clock_too(codec, pictures, tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 50))
    monkeypatch.setattr("geodiff4d.video.train.time.monotonic", lambda: float(next(now)))
    saved: list[int] = []
    monkeypatch.setattr(RunFolder, "save_later", lambda self, tensors, step, then: saved.append(step))
    config = replace(TRAINING, steps=6, save_every=100, save_minutes=2.0, log_every=100, pictures=0)
    train_video_model(tmp_path, EMBEDDED, codec, pictures, config)
    assert saved[0] < 6 and saved[-1] == 6, saved


def test_new_options_do_not_stop_old_runs(tmp_path):
    RunFolder(tmp_path, TRAINING)
    known = json.loads((tmp_path / "config.json").read_text())
    del known["config"]["save_minutes"]
    (tmp_path / "config.json").write_text(json.dumps(known))
    RunFolder(tmp_path, TRAINING)
    RunFolder(tmp_path, replace(TRAINING, gradient_checkpointing=True, accumulate=2, steps=9, preview=FAST), FREE)
    with pytest.raises(UserError, match="another configuration"):
        RunFolder(tmp_path, replace(TRAINING, lr=1.0))


# What one looks at


def test_looking_changes_nothing(codec, pictures):
    model = build(EMBEDDED, codec)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ema = {k: v * 0.5 for k, v in trained_state(model).items()}
    state = torch.random.get_rng_state()
    with averaged(model, ema):
        picture = sheet(model, pictures, FAST, 3)
    assert picture.shape == (3, 3 * 132, 6 * 132)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_curves_survive_a_log_that_was_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"warm_start": 0, "loss": 9}\n{"step": 0, "loss": 1.0}\n{"step": 0, "loss": 2.0}\n3\n{"step": 1, "lo'
    )
    assert [r.get("loss") for r in read_log(log)] == [9, 1.0, 2.0]
    write_curves(log, tmp_path / "curves.png")
    assert read_image(tmp_path / "curves.png").std() > 0


# Several processes


@pytest.mark.slow
def test_two_processes_average_to_the_gradient_of_one(tmp_path):
    """At every one of five steps, within 1e-5 relative, from the same samples, whole or in two parts; and processes
    that start differently are told so."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "ranks", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "two.safetensors")["gradients"]
    whole = replace(FIVE, pairs=replace(FIVE.pairs, references=4))
    one, samples = gradients_of(tmp_path / "one", whole)
    parts, same = gradients_of(tmp_path / "parts", replace(FIVE, accumulate=2))
    assert len(one) == len(two) == len(parts) == 5
    for step in range(5):
        for other in (two[step], parts[step]):
            assert (one[step] - other).norm() <= 1e-5 * one[step].norm(), step
    drawn = [load_file(tmp_path / f"samples{rank}.safetensors")["index"].tolist() for rank in range(2)]
    assert samples == same == list(range(20)) == sorted(drawn[0] + drawn[1])
    assert drawn[0][:4] == [0, 1, 4, 5], "every step is one range of samples"
    assert torch.equal(*(load_file(tmp_path / f"shared{rank}.safetensors")["weight"] for rank in range(2)))
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "disagree about their configuration" in said and "same command" in said
        assert "stopped after step 2" in said, "one process was asked; both stopped, after the same step"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "0/log.jsonl").read_text().splitlines()]
    expected = [json.loads(line)["loss"] for line in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(expected, rel=1e-4), "the loss is the mean over processes"


@pytest.mark.slow
def test_shares_of_the_optimiser_take_the_same_steps(tmp_path):
    """ZeRO on the two processes of configs/cpu.yaml against one: its checkpoint is anybody's, anybody's is its own."""
    whole = replace(FIVE, hold=1.0, pairs=replace(FIVE.pairs, references=4))
    gradients_of(tmp_path / "one", whole)
    gradients_of(tmp_path / "begun", replace(whole, steps=3))
    shutil.copytree(tmp_path / "begun", tmp_path / "zero_further", ignore=shutil.ignore_patterns(".lock"))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", CPU_YAML, "--main_process_port", "0"]
    command = [sys.executable, *launcher, __file__, "zero", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    gradients_of(tmp_path / "further", whole)
    expected = load_file(tmp_path / "one/checkpoint.safetensors")
    for name in ("zero", "zero_further", "further"):
        found = load_file(tmp_path / name / "checkpoint.safetensors")
        assert found.keys() == expected.keys()
        for k, v in expected.items():
            assert (found[k] - v).norm() <= 1e-5 * v.norm() + 1e-8, (name, k)
        assert load_video_model(tmp_path / name / "model").config == EMBEDDED
    shares = [json.loads((tmp_path / f"share{rank}.json").read_text()) for rank in range(2)]
    assert abs(shares[0] - shares[1]) < 0.1 * sum(shares), "moments are shared out evenly"
    records = [json.loads(line) for line in (tmp_path / "zero/log.jsonl").read_text().splitlines()]
    assert any("val_rgb_300" in r for r in records), "the average was lent to be looked at"


def _zero(out: Path) -> None:
    """One of the processes of `test_shares_of_the_optimiser_take_the_same_steps`."""
    torch.set_num_threads(1)
    rank, optimisers = int(os.environ["RANK"]), []
    vae = tiny_codec()
    (out / f"data{rank}").mkdir()
    batches = tiny_batches(vae, out / f"data{rank}", FIVE.pairs)
    handle = register_optimizer_step_pre_hook(lambda optimiser, args, kwargs: optimisers.append(optimiser))
    zero = replace(FIVE, hold=1.0, zero=True)
    train_video_model(out / "zero", EMBEDDED, vae, batches, zero, val=batches)
    handle.remove()
    state = [x for values in optimisers[-1].state.values() for x in values.values()]
    (out / f"share{rank}.json").write_text(str(sum(x.numel() for x in state)))
    train_video_model(out / "zero_further", EMBEDDED, vae, batches, zero)
    train_video_model(out / "further", EMBEDDED, vae, batches, replace(zero, steps=3))


FIVE = replace(TRAINING, steps=5, lr=1e-4, save_every=100, pictures=0)


def gradients_of(out: Path, config) -> tuple[list[torch.Tensor], list[int]]:
    """Train and return the gradient of every step, as the optimiser is given it, and the samples that were read."""
    seen: list[torch.Tensor] = []

    def note(optimiser, args, kwargs) -> None:
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        seen.append(torch.cat(flat).clone())

    samples: list[int] = []

    class Noting(Batches):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            samples.extend(batch.index.tolist())
            return batch

    out.mkdir(exist_ok=True)
    vae = tiny_codec()
    hook = register_optimizer_step_pre_hook(note)
    try:
        train_video_model(out, EMBEDDED, vae, tiny_batches(vae, out, config.pairs, kind=Noting), config)
    finally:
        hook.remove()
    return seen, samples


def _rank(out: Path) -> None:
    """One of the processes of `test_two_processes_average_to_the_gradient_of_one`."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    seen, samples = gradients_of(out / str(rank), FIVE)
    save_file({"index": torch.tensor(samples)}, out / f"samples{rank}.safetensors")
    torch.manual_seed(rank)
    net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    broadcast(Accelerator(cpu=True), net)
    save_file({"weight": net.weight.detach().contiguous()}, out / f"shared{rank}.safetensors")
    if rank == 0:
        save_file({"gradients": torch.stack(seen)}, out / "two.safetensors")
    try:
        gradients_of(out / f"odd{rank}", replace(FIVE, lr=1e-4 * (1 + rank)))
    except UserError as error:
        said = str(error)

    class Asking(Batches):
        """The second process is asked to stop as it reads its batch of step 1."""

        def __getitem__(self, index: int):
            if index == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    vae = tiny_codec()
    (out / f"{rank}data").mkdir()
    batches = tiny_batches(vae, out / f"{rank}data", FIVE.pairs, kind=Asking)
    try:
        train_video_model(out / "asked", EMBEDDED, vae, batches, FIVE)
    except Stopped as stopped:
        (out / f"{rank}.txt").write_text(f"{said} {stopped}")


def _killed(out: Path, threads: int) -> None:
    """The child of `test_twenty_steps_equal_ten_a_kill_and_ten`."""
    torch.set_num_threads(threads)

    def kill(record: dict) -> None:
        if record["step"] == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    out.mkdir()
    vae = tiny_codec()
    train_video_model(out, EMBEDDED, vae, tiny_batches(vae, out), LONG, on_record=kill)


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        _killed(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "zero":
        _zero(Path(sys.argv[2]))
    else:
        _rank(Path(sys.argv[2]))
