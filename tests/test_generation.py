"""The generating commands: what they check, which part of the driver they take, where they compute, what they say."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from geodiff4d.avatar.drive import Performance, render_sequence
from geodiff4d.avatar.model import Avatar
from geodiff4d.cli import animate, evaluate, fit, reconstruct, render, synthesize
from geodiff4d.cli._device import chosen_device
from geodiff4d.cli._generation import GenerationArgs, clip_extent, prepare, set_up
from geodiff4d.cli.evaluate import FootageArgs, ProtocolArgs
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import write_image
from geodiff4d.core.progress import silent
from geodiff4d.core.video import write_video
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.pipeline import default_preset, load_model, placed_on
from geodiff4d.presets import preset
from geodiff4d.video.diffusion import DiffusionConfig
from geodiff4d.video.model import VideoModel
from geodiff4d.video.vae import StableCodec

FPS = 10.0


@pytest.fixture
def tracked_clip(pair, tmp_path) -> Path:
    """A portrait and driver of six frames at 10 frames a second: the pair's three, twice."""
    with ClipWriter(tmp_path / "tracked", fps=FPS, extra={"notes": ["two faces"]}) as clip:
        for t in range(6):
            clip.add_params(t, pair.driving.params[t % 3])
            clip.add(t, 0, pair.portrait.image, pair.portrait.camera, pair.portrait.mask)
    return tmp_path / "tracked"


def given(source: Path, **options) -> GenerationArgs:
    return GenerationArgs(portrait=(source,), driving=source, generator="warp", preset="debug", **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, range(4)), ({"start": 0.3}, range(3, 6)), ({"start": 0.1, "seconds": 0.2}, range(1, 3))],
)
def test_the_part_of_the_driver_that_was_asked_for_is_taken(tracked_clip, capsys, options, expected):
    args = given(tracked_clip, **options)
    request = prepare(args, set_up(args), silent, limit=4)
    clip = Clip(tracked_clip)
    want = torch.stack([clip.params(t).expr for t in expected])
    assert torch.equal(request.driving.params.expr, want)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["note: portrait: two faces", "note: driving: two faces"]
    longer = "is longer than needed: 4 of its 6 frames, from 0 s to 0.4 s; --frames takes more, --start another part"
    assert (len(said) == 3 and said[2].endswith(longer)) if not options else len(said) == 2


def test_a_start_behind_the_end_is_named(tracked_clip):
    args = given(tracked_clip, start=0.6)
    with pytest.raises(UserError, match="has 6 frames: expected more than the 6 that are left out"):
        prepare(args, set_up(args), silent, None)


def test_only_the_part_that_is_used_is_tracked_and_nothing_stays(tracked_clip, tmp_path, monkeypatch, capsys):
    """Somebody's face must not remain in the temporary folder, whatever happens."""
    write_image(tmp_path / "me.png", torch.rand(3, 32, 32))
    write_video(tmp_path / "film.mp4", torch.rand(30, 3, 32, 32), FPS)
    args = GenerationArgs(
        portrait=(tmp_path / "me.png",), driving=tmp_path / "film.mp4", generator="warp", preset="debug", start=1.0
    )
    asked, fails = [], []

    def track(source, out, head, config, progress):
        asked.append((out, config.skip, config.limit))
        if fails:
            raise UserError("no face")
        out.mkdir()
        return Clip(tracked_clip)

    monkeypatch.setattr("geodiff4d.pipeline.track", track)
    prepare(args, set_up(args), silent, 6)
    (own, *first), (film, *rest) = asked
    assert first == [0, 1] and rest == [10, 6] and not own.exists() and not film.parent.exists()
    assert "takes more" in capsys.readouterr().err
    fails.append(True)
    with pytest.raises(UserError, match="no face"):
        prepare(args, set_up(args), silent, 6)
    assert not asked[-1][0].parent.exists()


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (animate, {"frames": 0}, "--frames is 0: expected at least 1"),
        (animate, {"frames": -1}, "--frames is -1: expected at least 1"),
        (synthesize, {"views": 0}, "--views 0 --frames 4: expected 1 to 16 cameras"),
        (synthesize, {"views": 4, "frames": 3}, "at least one frame for each"),
        (reconstruct, {"views": 17}, "--views 17"),
        (synthesize, {"start": -1.0}, "--start is -1.0: expected seconds"),
        (synthesize, {"seconds": 0.0}, "--seconds is 0.0: expected more than 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_tracked(monkeypatch, tmp_path, command, options, message):
    monkeypatch.setattr("geodiff4d.pipeline.tracked", None)
    (tmp_path / "me.png").touch()
    args = command.Args(**vars(given(tmp_path / "me.png")) | {"out": tmp_path / "out"} | options)
    with pytest.raises(UserError, match=message):
        command.run(args)


def test_frames_are_as_many_for_each_camera():
    setup = SimpleNamespace(preset=preset("paper"))
    assert clip_extent(setup, None, None) == (12, 192)
    assert clip_extent(setup, 3, 10) == (3, 9)


def test_the_preset_is_the_models(model):
    """A model of the paper's schedule, sampled by embedded's single step, would show noise."""
    debug = load_model(model)
    assert default_preset(debug).name == "embedded"
    debug.config = replace(debug.config, diffusion=DiffusionConfig())
    assert default_preset(debug).name == "paper"


class Elsewhere(VideoModel):
    """Stands for a model; notes what is done to it."""

    def __init__(self, codec: object):
        torch.nn.Module.__init__(self)
        object.__setattr__(self, "codec", codec)
        self.done: list[str] = []

    def compact(self):
        self.done.append("compact")
        return self

    def to(self, device):
        self.done.append(device.type)
        return self


def test_a_gpu_is_used_where_there_is_one(monkeypatch, model, tracked_clip):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto").type == chosen_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device cuda: torch finds no CUDA device"):
        chosen_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto").type == chosen_device("cuda").type == "cuda" and chosen_device("cpu").type == "cpu"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen_device("auto", splats=True).type == "cpu"
    with pytest.raises(UserError, match="needs gsplat"):
        chosen_device("cuda", splats=True)

    monkeypatch.setattr("geodiff4d.pipeline.bf16_is_native", lambda device: True)
    small, stable = Elsewhere(object()), Elsewhere(StableCodec.__new__(StableCodec))
    for thing in (small, stable):
        placed_on(thing, torch.device("cuda"))
    placed_on(stable, torch.device("cpu"))
    assert small.done == ["cuda"] and stable.done == ["compact", "cuda", "cpu"]

    asked = []
    monkeypatch.setattr("geodiff4d.pipeline.placed_on", lambda m, device: asked.append(device.type) or m)
    args = replace(given(tracked_clip), generator="diffusion", model=model, memory="offload")
    assert set_up(args).generator.sample.offload and asked == ["cuda"]


def test_a_reconstruction_that_needs_a_gpu_says_so_first(monkeypatch, tracked_clip, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("geodiff4d.pipeline.tracked", None)
    args = reconstruct.Args(**vars(replace(given(tracked_clip), preset="paper")) | {"out": tmp_path / "out"})
    with pytest.raises(UserError, match="preset paper fits the avatar on a GPU and torch finds none"):
        reconstruct.run(args)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("self", {"detectors": ("mediapipe",)}, "--detectors is for evaluate tracking: leave it out of evaluate self"),
        ("cross", {"count": 3}, "--count is for evaluate tracking, video"),
        (
            "cross-view",
            {"protocol": ProtocolArgs(methods=("mesh_warp",))},
            "--methods is for evaluate self, cross",
        ),
        ("tracking", {"preset": "debug"}, "--preset is for"),
        ("video", {"protocol": ProtocolArgs(bf16=False)}, "--bf16 is for evaluate self, cross, cross-view"),
    ],
)
def test_options_that_a_measurement_would_ignore_are_refused(tmp_path, what, options, message):
    with pytest.raises(UserError, match=message):
        evaluate.run(evaluate.Args(what, tmp_path, **options))


def test_every_option_of_evaluate_is_read_by_some_measurement():
    groups = (evaluate.Args, ProtocolArgs, FootageArgs)
    own = {f.name for kind in groups for f in fields(kind)} - {"what", "out", "protocol", "footage"}
    assert set().union(*evaluate.READS.values()) == own
    assert set(evaluate.READS) == set(get_args(get_type_hints(evaluate.Args)["what"]))


def test_an_avatar_is_rendered_where_it_is(pair, monkeypatch):
    seen, avatar = [], Avatar.__new__(Avatar)
    object.__setattr__(avatar, "shape", torch.zeros(3, device="meta"))
    monkeypatch.setattr(Avatar, "render", lambda self, *a, **more: seen.append((*a, more)))
    show = Performance(pair.driving.params, torch.zeros(3, 4, 8))
    list(render_sequence(avatar, show, [pair.portrait.camera]))
    ((params, camera, more),) = seen
    places = (params.expr, camera.K, more["tokens"])
    assert all(x.device.type == "meta" for x in places)


def test_fit_and_render_need_gsplat_on_a_gpu(monkeypatch, tracked_clip, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="splatting on a GPU needs gsplat"):
        fit.run(fit.Args(tracked_clip, tmp_path / "avatar", device="cuda"))
    with pytest.raises(UserError, match="splatting on a GPU needs gsplat"):
        render.run(render.Args(tracked_clip, tmp_path / "a.mp4", device="cuda"))
