"""What `geodiff4d train` trains on and starts from: folders told apart, mixtures, Stable Diffusion's weights."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fsspec
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from geodiff4d.avatar.refine import Refinement
from geodiff4d.cli import _training
from geodiff4d.cli.train import Args, run
from geodiff4d.core.errors import UserError
from geodiff4d.core.rundir import RunFolder
from geodiff4d.data.footage.clips import ClipFootage
from geodiff4d.data.footage.render import build_store
from geodiff4d.data.footage.rendered import RenderedFootage, Store
from geodiff4d.data.footage.take import FrameKey
from geodiff4d.data.sampling import PairConfig, ReadConfig, Samples, open_footage
from geodiff4d.presets import PRESETS, ablated, preset, with_temporal_modules
from geodiff4d.render.viewpoints import openhead
from geodiff4d.video.batches import UNIFORM, Batches, WeightConfig
from geodiff4d.video.encode import encode_clips, encode_store, fits, write_shard
from geodiff4d.video.model import VideoModel, load_video_model
from geodiff4d.video.recode import continued, start_from_stable_diffusion
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.train import rate_factor, train_video_model
from geodiff4d.video.vae import PatchCodec, StableCodec, load_codec
from geodiff4d.video.warm_start import warm_start
from geodiff4d.video.watch import Watch
from test_batches import CLIP, READ, Film
from test_samples import write
from tiny import EMBEDDED, PAPER, SIZE, TRAINING, tiny_codec


def clip(folder: Path) -> Path:
    folder.mkdir(parents=True)
    frames = [{"timestep_index": 0, "camera_index": 0, "flame_param_path": "x"}]
    (folder / "transforms.json").write_text(json.dumps({"frames": frames}))
    return folder


def test_folders_are_told_apart(tmp_path):
    (tmp_path / "stores" / "train").mkdir(parents=True)
    (tmp_path / "stores" / "train" / "store.json").write_text("{}")
    clip(tmp_path / "set" / "017" / "EXP-1")
    assert _training.is_footage(tmp_path / "stores" / "train") and _training.is_footage(tmp_path / "set")
    assert _training.is_footage(tmp_path / "set" / "017" / "EXP-1")
    assert not _training.is_footage(tmp_path / "stores") and not _training.is_footage(tmp_path / "nothing yet")


def arguments(tmp_path: Path, *data: Path, **options) -> Args:
    return Args("image", tmp_path / "out", "debug", data=data, **options)


def batches(args: Args) -> tuple[Batches, Batches | None]:
    config = _training.training_config(args, TRAINING)
    return _training.batches(args, PRESETS["debug"], EMBEDDED, tiny_codec(), config, PRESETS["debug"].augment)


def test_folders_are_mixed_and_val_is_kept_apart(tmp_path, capsys):
    a, b = clip(tmp_path / "a" / "train" / "one").parents[1], clip(tmp_path / "b" / "two").parent
    clip(a / "val" / "three")
    train, val = batches(arguments(tmp_path, a, b, importance=(3.0, 1.0)))
    assert [len(s.takes) for s in train.samples.sources] == [1, 1], "and not the one in val"
    assert val is not None and [t.subject for t in val.samples.sources[0].takes] == [f"{a}/val/three on flame"]
    assert "75 % of the samples" in capsys.readouterr().out
    assert batches(arguments(tmp_path, b))[1] is None
    assert "no validation" in capsys.readouterr().out
    with pytest.raises(UserError, match="twice"):
        batches(arguments(tmp_path, b, tmp_path / "a" / ".." / "b"))
    with pytest.raises(UserError, match="importance has 3 numbers"):
        batches(arguments(tmp_path, a, b, importance=(1.0, 1.0, 1.0)))
    with pytest.raises(UserError, match="is held out by a folder above it"):
        batches(arguments(tmp_path, a, a / "val" / "three"))


def test_a_world_and_clips_train_together_with_everything_that_is_known(tmp_path, monkeypatch):
    """The warm start reads both kinds; `--ablate synthetic` degrades exact normals where they are synthetic."""
    p = preset("debug")
    build_store(tmp_path / "world/train", p.store, workers=1)
    build_store(tmp_path / "world/val", p.val_store, workers=1)
    write(tmp_path / "clips/a", 3, (0.0, 30.0))
    write(tmp_path / "clips/val/b", 2, (0.0,))
    vae = tmp_path / "vae"
    codec = PatchCodec(p.codec.codec)
    codec.fit_basis(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    codec.save(vae)
    warmed: list[int] = []

    def noted(encoder, samples, *rest):
        warmed.append(len(samples.motion().expr))
        warm_start(encoder, samples, *rest)

    monkeypatch.setattr("geodiff4d.video.train.warm_start", noted)
    args = Args(
        "image", tmp_path / "out", "debug", data=(tmp_path / "world", tmp_path / "clips"), vae=vae,
        ablate=("synthetic",), workers=0, steps=2,
    )  # fmt: skip
    _training.image(args)
    assert warmed == [2 * 2 + 3], "every instant of the store and of the clip"
    _training.image(replace(args, out=tmp_path / "further", start=tmp_path / "out/model", steps=1))
    assert len(warmed) == 1, "an encoder that was trained goes without"
    model = load_video_model(tmp_path / "out/model")
    assert model.config.moves
    codec = load_codec(vae)
    # Another encoding of the same store as that would be taken as it is: what is validated on stays exact.
    for split, estimated in (("train", True), ("val", False)):
        note = tmp_path / f"out/latents_{split}_0.json"
        before = note.read_text()
        encode_store(RenderedFootage(Store(tmp_path / "world" / split), estimated), codec, note.with_suffix(".npy"))
        assert note.read_text() == before
        encode_store(RenderedFootage(Store(tmp_path / "world" / split), not estimated), codec, note.with_suffix(".npy"))
        assert note.read_text() != before


# Encoded clips

LIKE = replace(EMBEDDED, size=40, expression=replace(EMBEDDED.expression, size=24))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Clips from several cameras, a film and photographs, and the store of all of them, a recording a shard."""
    folder = tmp_path_factory.mktemp("encoded")
    smiling = replace(openhead().neutral(2), expr=torch.full((2, 52), 0.5))
    write(folder / "clips/a", 2, (40.0, 0.0), extra={"subject": "a", "params": "truth"}, motion=smiling)
    write(folder / "clips/film", 2, (10.0,), cropped=False)
    write(folder / "clips/stills", 2, (0.0,), extra={"stills": True})
    write(folder / "clips/val/b", 1, (0.0,))
    tiny_codec().save(folder / "vae")
    encode_clips([ClipFootage(folder / "clips")], folder / "store", folder / "vae", LIKE, shard_bytes=1)
    return folder


def test_a_store_gives_the_batches_of_its_clips(encoded):
    """The same frames of the same samples: latents within half precision, images within a level of 255."""
    codec, read = tiny_codec(), ReadConfig(40, 24, warp=True, augment=None)
    for index, clips in ((0, False), (1, True)):
        pairs = PairConfig(references=2, targets=2, clips=clips, moved=0.5)
        plain, stored = (Samples([open_footage(encoded / k)], pairs, read, seed=1) for k in ("clips", "store"))
        assert [plain.draw(i) for i in range(60)] == [stored.draw(i) for i in range(60)]
        stored = pickle.loads(pickle.dumps(stored))  # noqa: S301 - our own bytes: what a worker gets.
        a, b = (Batches(s, codec, WeightConfig())[index] for s in (plain, stored))
        for k, v in vars(a).items():
            if k in ("warp", "visibility"):
                assert (getattr(b, k) - v).abs().mean() < 2e-3, k
            else:
                assert_close(getattr(b, k), v, atol=1e-2, rtol=4e-3, msg=lambda m, k=k: f"{k}: {m}")
    known, same = plain.drivers(0, 3)[1], stored.drivers(0, 3)[1]
    assert_close(known.expr, same.expr)
    assert_close(known.eyes_pose, same.eyes_pose)


def test_encoding_goes_on_where_it_was_killed(encoded, monkeypatch):
    out, source = encoded / "again", ClipFootage(encoded / "clips/stills")
    rest = (encoded / "vae", LIKE, "cpu", 1, 1)
    done: list[int] = []

    def dying(*job):
        if done:
            raise KeyboardInterrupt
        done.append(job[1])
        return write_shard(*job)

    monkeypatch.setattr("geodiff4d.video.encode.write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        encode_clips([source], out, *rest)
    with pytest.raises(UserError, match="is unfinished: give the same"):
        open_footage(out)
    monkeypatch.setattr("geodiff4d.video.encode.write_shard", write_shard)
    (out / ".shard-00001.npy.1.part").write_bytes(b"half")
    assert [encode_clips([source], out, *rest) for _ in range(2)] == [1, 0]
    assert not list(out.glob(".shard*")), "nothing is left"
    whole, again = open_footage(encoded / "store"), open_footage(out)
    for i in range(2):
        of, same = (f.cached([FrameKey(k, 0, 0)]) for f, k in ((again, i), (whole, 2 + i)))
        assert torch.equal(of.planes, same.planes)
    with pytest.raises(UserError, match="holds other clips, or for another model"):
        encode_clips([ClipFootage(encoded / "clips/film")], out, *rest)


def test_stores_below_a_folder_are_one_and_say_whom_they_suit(encoded, tmp_path):
    for name in ("store", "other"):
        shutil.copytree(encoded / "store", tmp_path / "all" / name)
    whole, one = open_footage(tmp_path / "all"), open_footage(encoded / "store")
    assert [t.subject for t in whole.takes] == 2 * [t.subject for t in one.takes]
    keys = [FrameKey(k, 1, 0) for k in (1, 5)]
    assert_close(whole.cached(keys).planes, one.cached(keys[:1]).planes.expand(2, -1, -1, -1))
    codec, other = tiny_codec(), tiny_codec()
    other.basis.mul_(-1)
    paper = replace(PAPER, size=40, expression=LIKE.expression)
    assert fits(whole.stores[0].config, codec, LIKE) is None
    for wrong, model, reason in (
        (other, LIKE, "another codec"),
        (codec, EMBEDDED, "not 32 and"),
        (codec, paper, "pose maps"),
    ):
        with pytest.raises(UserError, match=reason):
            whole.require(lambda made, m=model, c=wrong: fits(made, c, m))
    with pytest.raises(UserError, match="with --estimated"):
        open_footage(tmp_path / "all", estimated=True)
    (tmp_path / "all/store/shard-00002.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="missing or damaged"):
        open_footage(tmp_path / "all").cached(keys)
    (tmp_path / "all/store/index.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        open_footage(tmp_path / "all")


@pytest.fixture
def elsewhere(encoded):
    """The store of `encoded` in an object store."""
    files = fsspec.filesystem("memory")
    files.put(str(encoded / "store"), "/bucket/store", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


def test_a_store_may_lie_elsewhere(encoded, elsewhere, monkeypatch):
    """The same records, in ranges; what was read lately is not fetched again, and what is kept is bounded."""
    there = open_footage(Path("memory://bucket/store"))
    whole, keys = open_footage(encoded / "store"), [FrameKey(1, i, 0) for i in (0, 1, 1)]
    fetched: list[int] = []
    cat = elsewhere.cat_ranges
    monkeypatch.setattr(
        elsewhere, "cat_ranges", lambda paths, *x, **k: fetched.append(len(paths)) or cat(paths, *x, **k)
    )
    for _ in range(2):
        for k, v in vars(whole.cached(keys)).items():
            assert torch.equal(getattr(there.cached(keys), k), v), k
        assert torch.equal(there.driving(keys, 24), whole.driving(keys, 24))
    assert fetched == [1, 1], "a shard's head, and then one range for two records that follow each other"
    monkeypatch.setattr("geodiff4d.data.shards.KEPT_BYTES", 1)
    there.cached([FrameKey(0, 0, 0)])
    there.cached(keys)
    assert len(fetched) >= 5, "the head of another shard, its record, and the range again"
    again = pickle.loads(pickle.dumps(there))  # noqa: S301 - our own bytes: what a worker gets.
    assert [t.subject for t in again.takes] == [t.subject for t in whole.takes]


def test_stores_elsewhere_fail_in_one_line(encoded, elsewhere, monkeypatch):
    monkeypatch.setattr("geodiff4d.data.remote.time.sleep", lambda seconds: None)
    sources = partial(_training.footage, p=preset("debug"), model=LIKE, codec=tiny_codec(), clips=False)
    args = Args("image", encoded / "run", data=(Path("memory://bucket/nothing"),))
    with pytest.raises(UserError, match=r"memory://bucket/nothing is no store: expected a folder that"):
        sources(args)
    assert len(sources(replace(args, data=(Path("memory://bucket/store"),)))["train"]) == 1
    with pytest.raises(UserError, match=r"nosuch://bucket: nosuch:// needs another|cannot be opened"):
        open_footage(Path("nosuch://bucket"))
    there = open_footage(Path("memory://bucket/store"))
    elsewhere.pipe("/bucket/store/shard-00000.npy", b"damaged")
    with pytest.raises(UserError, match=r"shard-00000.npy is damaged.*upload it again"):
        there.cached([FrameKey(0, 0, 0)])
    elsewhere.rm("/bucket/store/shard-00001.npy")
    with pytest.raises(UserError, match=r"shard-00001.npy cannot be read .there is no such file.: check the address"):
        there.cached([FrameKey(0, 0, 1)])
    tries: list[int] = []

    def failing(*given, **options):
        tries.append(1)
        raise OSError("connection reset")

    monkeypatch.setattr(elsewhere, "cat_ranges", failing)
    with pytest.raises(UserError, match="connection reset"):
        there.cached([FrameKey(1, 0, 0)])
    assert len(tries) == 4


@pytest.mark.slow
def test_a_store_behind_a_web_server(encoded):
    """fsspec needs aiohttp for it."""
    pytest.importorskip("aiohttp")

    class Ranges(SimpleHTTPRequestHandler):
        def do_GET(self):
            data = (
                (encoded / self.path.lstrip("/")).read_bytes() if (encoded / self.path.lstrip("/")).is_file() else None
            )
            if data is None:
                return self.send_error(404)
            first, last = 0, len(data) - 1
            if asked := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2]), last)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            return self.wfile.write(data[first : last + 1])

    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, keys = f"http://127.0.0.1:{server.server_port}", [FrameKey(1, i, 0) for i in (0, 1)]
        there, whole = open_footage(Path(f"{url}/store")), open_footage(encoded / "store")
        assert torch.equal(there.cached(keys).planes, whole.cached(keys).planes)
        with pytest.raises(UserError, match=r"is no store|cannot be read|nothing to train on"):
            open_footage(Path(f"{url}/nothing"))
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_training_on_a_store_goes_on_where_it_was_killed(tmp_path, processes):
    """To the same weights, bit by bit, from the middle of an epoch."""
    p = preset("debug")
    for name in ("a", "b", "c"):
        write(tmp_path / "clips" / name, 4, (0.0, 30.0))
    codec = PatchCodec(p.codec.codec)
    codec.fit_basis(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    codec.save(tmp_path / "vae")
    encode_clips([ClipFootage(tmp_path / "clips")], tmp_path / "store", tmp_path / "vae", p.model)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    train = [sys.executable, *launcher, "-m", "geodiff4d", "train", "image", "--preset", "debug", "--workers", "0"]
    train += ["--data", str(tmp_path / "store"), "--vae", str(tmp_path / "vae"), "--save-minutes", "0", "--steps", "8"]

    def started(out: str) -> subprocess.Popen:
        return subprocess.Popen([*train, "--out", str(tmp_path / out)])

    assert started("whole").wait(1500) == 0
    process, log = started("halves"), tmp_path / "halves/log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 3' in log.read_text()):
        time.sleep(0.05)
    # torchrun's processes are groups of their own.
    everybody = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in everybody:
        os.kill(one.pid, signal.SIGKILL)
    for one in everybody:
        one.wait(30)
    assert '"step": 7' not in log.read_text() and list((tmp_path / "halves").glob("checkpoint*.safetensors"))
    assert started("halves").wait(1500) == 0
    for path in sorted((tmp_path / "whole/model").rglob("*.safetensors")):
        again = load_file(tmp_path / "halves/model" / path.relative_to(tmp_path / "whole/model"))
        assert all(torch.equal(v, again[k]) for k, v in load_file(path).items()), path.name


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (dict(stage="vae", preset="paper"), "no codec to train"),
        (dict(stage="perception", preset="paper"), "no perception stage"),
        (dict(stage="vae", data=(Path("a"), Path("b"))), "one folder"),
        (dict(stage="image", preset="paper"), "needs --sd"),
        (dict(stage="video", preset="debug"), "needs a stage-1 model"),
        (dict(stage="video", preset="debug", start=Path("nowhere")), "not a video model"),
        (dict(stage="image", data=(Path("a"), Path("b"))), "a is not a folder"),
        (dict(stage="video", sd=Path("sd")), "--sd: the video stage does not read it"),
        (dict(stage="vae", bf16=False), "--no-bf16: the vae stage does not read it"),
        (dict(stage="perception", save_minutes=1.0), "--save-minutes: the perception stage"),
        (dict(stage="video", ablate=("cross-view", "joint")), "--ablate joint: the video stage knows cross-view"),
        (dict(stage="image", accumulate=0), "expected at least 1"),
        (dict(stage="image", accumulate=3), "8 references cannot be shared by 1 process"),
        (dict(stage="image", preset="paper", sd=Path("sd"), start=Path("model")), "--sd: --start names a whole model"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_options_are_one_line(tmp_path, args, says):
    with pytest.raises(UserError, match=says) as error:
        run(Args(**{"out": tmp_path / "out", "preset": "embedded", **args}))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_terabytes_are_not_rendered(tmp_path):
    p = preset("paper")
    with pytest.raises(UserError, match=r"2\.6 million rendered images in .* TB: expected at most 1 TB; give --data"):
        _training.rendered(tmp_path, p, 1)
    with pytest.raises(UserError, match=r"1\.0 million rendered images"):
        _training.rendered(tmp_path, p, 1, p.store)
    assert not list(tmp_path.iterdir())


def test_the_papers_silences_have_switches():
    stage = preset("paper").video
    given = Args("video", Path(), beta2=0.999, ema=0.0, clip=0.0, weight_decay=0.0, parts="all", ema_on_host=True)
    config = _training.training_config(given, stage)
    assert (config.beta2, config.ema, config.clip, config.weight_decay) == (0.999, 0, 0, 0)
    assert config.parts == "all" and config.ema_on_host
    plain = _training.training_config(Args("video", Path()), stage)
    assert (plain.parts, plain.beta2, plain.ema_on_host) == ("temporal", 0.99, False)


def test_the_presets_batch_is_shared_out(monkeypatch):
    """Over processes and parts: a step sees 32 references, whatever holds them."""
    monkeypatch.setattr(_training, "process_state", lambda: SimpleNamespace(num_processes=4))
    config = _training.training_config(Args("image", Path(), accumulate=2), preset("paper").image)
    assert config.pairs.references == 4 and config.accumulate == 2
    with pytest.raises(UserError, match="their product divides 32"):
        _training.training_config(Args("image", Path(), accumulate=3), preset("paper").image)


def test_the_paper_preset_is_the_papers():
    """Sec. 4.1, 4.2 and S-A; rates stay where they are once warm."""
    p = preset("paper")
    for stage, steps, references, targets in ((p.image, 80_000, 32, 1), (p.video, 20_000, 8, 16)):
        assert (stage.steps, stage.pairs.references, stage.pairs.targets) == (steps, references, targets)
        assert (
            stage.lr == 1e-5 and stage.accumulate == 1 and stage.drop_expression == 0.1 and stage.gradient_checkpointing
        )
        assert stage.temporal_loss == stage.sampled_starts == stage.warm_start == 0 and stage.weights == UNIFORM
        assert {rate_factor(step, stage) for step in (stage.warmup, steps // 2, steps - 1, steps)} == {1.0}
        assert stage.preview.guidance == 2.5 and stage.preview.steps > 1
        assert (stage.beta2, stage.weight_decay, stage.ema, stage.clip) == (0.99, 1e-2, 0.999, 1.0), "docs/PAPER.md"
    assert (p.sample.steps, p.sample.guidance, p.sample.start, p.sample.window) == (25, 2.5, "reference", 16)
    assert p.sample.finish == () and p.fit.refine.start == p.fit.refine.rate(1e-5, 0.0) == 1e-10
    assert p.fit.loss.normal_alpha == "mask" and preset("embedded").fit.loss.normal_alpha == "rendered"
    assert p.model.size == 512 and p.model.diffusion.prediction == "epsilon" and not p.model.warp
    assert (p.views, p.frames, p.fit.iterations) == (12, 200, 100_000)
    peaks = {g["name"]: g["peak"] for g in Refinement(openhead().neutral(2)).groups(p.fit.refine)}
    moved = ("expr", "jaw_pose", "eyes_pose")
    assert {peaks.pop(n) for n in moved} == {1e-4} and set(peaks.values()) == {1e-5}
    with pytest.raises(UserError, match="no warped portrait"):
        ablated(p, ("warp",))


def test_every_preset_has_a_second_stage():
    for name in PRESETS:
        p = preset(name)
        model = with_temporal_modules(p.model, p.temporal)
        assert model.unet.temporal_layers > 0 == p.model.unet.temporal_layers
        assert with_temporal_modules(model, (7, 7, 7)) == model
        assert p.video.parts == "temporal" and p.video.pairs.clips and p.video.pairs.references <= p.tracks.subjects
    assert preset("paper").video.steps == 20_000 and preset("paper").video.pairs.targets == 16


@pytest.mark.slow
def test_workers_read_ahead_what_would_have_been_read():
    samples = Samples([Film(6)], replace(CLIP, targets=2), READ)
    plain, ahead = (Batches(samples, tiny_codec(), workers=n) for n in (0, 1))
    ahead.read_ahead(3, 2)
    for index in (3, 5, 4, 7):  # 4 is not in the line, and is read on the spot.
        assert_close(ahead[index].target, plain[index].target)
        assert_close(ahead[index].crops, plain[index].crops)


def test_tensorboard_is_told_where_it_is_installed(tmp_path, monkeypatch):
    told: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder):
            told.append(("folder", Path(folder).name))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def flush(self):
            pass

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("geodiff4d.video.watch.importlib.util.find_spec", lambda name: object())
    Watch(RunFolder(tmp_path, TRAINING), SampleConfig(), 0).log({"step": 3, "loss": 0.5, "said": "words"})
    assert told == [("folder", "tensorboard"), ("loss", 0.5, 3)]
    monkeypatch.setattr("geodiff4d.video.watch.importlib.util.find_spec", lambda name: None)
    assert Watch(RunFolder(tmp_path, TRAINING), SampleConfig(), 0).board is None


@pytest.mark.parametrize(
    ("threads", "workers", "told", "left"), [(8, 2, None, 6), (2, 2, None, 1), (8, 2, "4", 8), (2, 0, None, 2)]
)
def test_a_cpu_leaves_cores_to_those_who_read_ahead(monkeypatch, threads, workers, told, left):
    from geodiff4d.cli._training import leave_cores

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    torch.set_num_threads(threads)
    try:
        leave_cores(workers)
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


def test_a_continued_model_keeps_its_scale(tmp_path):
    """The preset's deviation of residuals is another than that of the weights: taken with them, it shrinks them."""
    from geodiff4d.cli._training import beginning
    from geodiff4d.pipeline import SHIPPED_MODEL
    from geodiff4d.video.model import load_video_model

    shipped, p = load_video_model(SHIPPED_MODEL), preset("embedded")
    other = replace(shipped.config.diffusion, residual_std=(1.25, 1.5))
    shipped.config = replace(shipped.config, diffusion=other)
    shipped.save(tmp_path / "model")
    model, _, start = beginning(Args("image", tmp_path / "out", start=tmp_path / "model"), p, p.model)
    assert start is not None and model.diffusion == other != p.model.diffusion


def test_the_paper_preset_starts_from_stable_diffusion(tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, cross_attention_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "sd" / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, scaling_factor=0.18215,
    ).save_pretrained(tmp_path / "sd" / "vae")  # fmt: skip
    args = Args("image", tmp_path / "out", "paper", sd=tmp_path / "sd")
    model, codec, start = start_from_stable_diffusion(args.sd, PAPER)
    assert_close(start["unet.conv_in.weight"][:, :4], theirs.conv_in.weight)
    assert start["unet.conv_in.weight"][:, 4:].abs().max() == 0 and not any(k.startswith("codec") for k in start)
    samples = Samples([Film(3)], PairConfig(references=2, targets=2), ReadConfig(SIZE, 16, augment=None))
    given = Batches(samples, codec, UNIFORM, encoded_pose=False)
    config = replace(TRAINING, steps=2, lr=1e-5, gradient_checkpointing=True, pictures=0)
    trained = train_video_model(tmp_path / "out", model, codec, given, config, start=start)
    assert_close(trained.unet.conv_in.weight[:, :4], theirs.conv_in.weight, atol=1e-3, rtol=0)
    assert not torch.equal(trained.unet.conv_in.weight[:, :4], theirs.conv_in.weight)
    # And on from there, without Stable Diffusion.
    again, codec, start = continued(tmp_path / "out/model", replace(PAPER, normals=False))
    assert again == replace(model, normals=False) and isinstance(codec, StableCodec)
    assert_close(start["unet.conv_in.weight"], trained.unet.conv_in.weight, atol=1e-3, rtol=1e-2)
    further = train_video_model(tmp_path / "further", again, codec, given, config, start=start)
    assert_close(further.unet.conv_in.weight, trained.unet.conv_in.weight, atol=2e-3, rtol=1e-2)
    VideoModel(EMBEDDED, tiny_codec()).save(tmp_path / "embedded")
    with pytest.raises(UserError, match="holds a patch codec"):
        continued(tmp_path / "embedded", PAPER)
