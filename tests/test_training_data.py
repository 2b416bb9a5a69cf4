"""What `geodiff4d train` trains on and starts from: folders told apart, mixtures, Stable Diffusion's weights."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.avatar.refine import Refinement
from geodiff4d.cli import _training
from geodiff4d.cli._stores import is_footage, rendered_stores, rendered_tracks
from geodiff4d.cli.train import Args, run
from geodiff4d.core.errors import UserError
from geodiff4d.core.rundir import RunFolder
from geodiff4d.data.mixture import Mixture, MixtureConfig
from geodiff4d.presets import PRESETS, ablated, preset, with_temporal_modules
from geodiff4d.render.viewpoints import openhead
from geodiff4d.video.batches import UNIFORM
from geodiff4d.video.mixed import MixedBatches
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.train import _rate, train_video_model
from geodiff4d.video.watch import Watch
from test_mixed import CLIP, Film
from test_video_model import EMBEDDED, PAPER, SIZE, TRAINING, tiny_codec


def clip(folder: Path) -> Path:
    folder.mkdir(parents=True)
    frames = [{"timestep_index": 0, "camera_index": 0, "flame_param_path": "x"}]
    (folder / "transforms.json").write_text(json.dumps({"frames": frames}))
    return folder


def test_folders_are_told_apart(tmp_path):
    (tmp_path / "stores" / "train").mkdir(parents=True)
    (tmp_path / "stores" / "train" / "store.json").write_text("{}")
    clip(tmp_path / "set" / "017" / "EXP-1")
    assert is_footage(tmp_path / "stores" / "train") and is_footage(tmp_path / "set")
    assert is_footage(tmp_path / "set" / "017" / "EXP-1")
    assert not is_footage(tmp_path / "stores") and not is_footage(tmp_path / "nothing yet")


def arguments(tmp_path: Path, *data: Path, **options) -> Args:
    return Args("image", tmp_path / "out", "debug", data, **options)


def mixed(args: Args) -> tuple[MixedBatches, MixedBatches | None]:
    return _training._mixtures(args, EMBEDDED, tiny_codec(), TRAINING, PRESETS["debug"].augment)


def test_folders_are_mixed_and_val_is_kept_apart(tmp_path, capsys):
    a, b = clip(tmp_path / "a" / "train" / "one").parents[1], clip(tmp_path / "b" / "two").parent
    clip(a / "val" / "three")
    train, val = mixed(arguments(tmp_path, a, b, importance=(3.0, 1.0)))
    assert [Path(s.name) for s in train.mixture.sources] == [a / "train", b]
    assert val is not None and [Path(s.name) for s in val.mixture.sources] == [a / "val"]
    assert "75 % of the samples" in capsys.readouterr().out
    assert mixed(arguments(tmp_path, b))[1] is None
    assert "no validation" in capsys.readouterr().out
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "store.json").write_text("{}")
    (tmp_path / "t" / "track.json").write_text("{}")
    with pytest.raises(UserError, match="holds tracks"):
        mixed(arguments(tmp_path, tmp_path / "t"))
    with pytest.raises(UserError, match="twice"):
        mixed(arguments(tmp_path, b, b))
    with pytest.raises(UserError, match="importance has 3 numbers"):
        mixed(arguments(tmp_path, a, b, importance=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (dict(stage="vae", preset="paper"), "no codec to train"),
        (dict(stage="perception", preset="paper"), "no perception stage"),
        (dict(stage="vae", data=(Path("a"), Path("b"))), "one folder"),
        (dict(stage="image", preset="paper"), "needs --sd"),
        (dict(stage="video", preset="debug"), "needs a stage-1 model"),
        (dict(stage="video", preset="debug", start=Path("nowhere")), "not a video model"),
        (dict(stage="image", data=(Path("a"), Path("b"))), "expected one folder"),
        (dict(stage="video", sd=Path("sd")), "--sd: the video stage does not read it"),
        (dict(stage="vae", bf16=False), "--no-bf16: the vae stage does not read it"),
        (dict(stage="perception", save_minutes=1.0), "--save-minutes: the perception stage"),
        (dict(stage="video", ablate=("cross-view", "joint")), "--ablate joint: the video stage knows cross-view"),
        (dict(stage="image", accumulate=0), "expected at least 1"),
        (dict(stage="image", accumulate=3), "4 references cannot be shared by 1 process"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_options_are_one_line(tmp_path, args, says):
    with pytest.raises(UserError, match=says) as error:
        run(Args(**{"out": tmp_path / "out", "preset": "embedded", **args}))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_terabytes_are_not_rendered(tmp_path):
    p = preset("paper")
    with pytest.raises(UserError, match=r"2\.6 million rendered pictures in .* TB: expected at most 1 TB; give --data"):
        rendered_stores(tmp_path, p, 1)
    with pytest.raises(UserError, match=r"1\.0 million rendered pictures"):
        rendered_tracks(tmp_path, p, p.store, 1)
    assert not list(tmp_path.iterdir())


def test_the_presets_batch_is_shared_out(monkeypatch):
    """Over processes and parts: a step sees 32 references, whatever holds them."""
    monkeypatch.setattr(_training, "_processes", lambda: SimpleNamespace(num_processes=4))
    config = _training._training(Args("image", Path(), accumulate=2), preset("paper").image)
    assert config.pairs.references == 4 and config.accumulate == 2
    with pytest.raises(UserError, match="their product divides 32"):
        _training._training(Args("image", Path(), accumulate=3), preset("paper").image)


def test_the_paper_preset_is_the_papers():
    """Sec. 4.1, 4.2 and S-A; rates stay where they are once warm."""
    p = preset("paper")
    for stage, steps, references, targets in ((p.image, 80_000, 32, 1), (p.video, 20_000, 8, 16)):
        assert (stage.steps, stage.pairs.references, stage.pairs.targets) == (steps, references, targets)
        assert stage.lr == 1e-5 and stage.accumulate == 1 and stage.drop_expression == 0.1 and stage.recompute
        assert stage.steadiness == stage.sampled_starts == stage.warm_start == 0 and stage.weights == UNIFORM
        assert {_rate(step, stage) for step in (stage.warmup, steps // 2, steps - 1, steps)} == {1.0}
        assert stage.preview.guidance == 2.5 and stage.preview.steps > 1
    assert (p.sample.steps, p.sample.guidance, p.sample.start, p.sample.window) == (25, 2.5, "reference", 16)
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
        assert p.video.parts == "temporal" and p.video.pairs.references <= p.tracks.subjects
    assert preset("paper").video.steps == 20_000 and preset("paper").video.pairs.targets == 16


@pytest.mark.slow
def test_workers_read_ahead_what_would_have_been_read():
    mixture = Mixture([Film(6)], replace(CLIP, frames=2))
    plain, ahead = (MixedBatches(mixture, tiny_codec(), 2, workers=n) for n in (0, 1))
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
    model, codec, start = _training._from_stable_diffusion(args, PAPER)
    assert_close(start["unet.conv_in.weight"][:, :4], theirs.conv_in.weight)
    assert start["unet.conv_in.weight"][:, 4:].abs().max() == 0 and not any(k.startswith("codec") for k in start)
    mixture = Mixture([Film(3, normals=True)], MixtureConfig(frames=2, size=SIZE, crop=16, augment=None))
    config = replace(TRAINING, steps=2, lr=1e-5, recompute=True, pictures=0)
    trained = train_video_model(tmp_path / "out", model, codec, MixedBatches(mixture, codec, 2), config, start=start)
    assert_close(trained.unet.conv_in.weight[:, :4], theirs.conv_in.weight, atol=1e-3, rtol=0)
    assert not torch.equal(trained.unet.conv_in.weight[:, :4], theirs.conv_in.weight)
