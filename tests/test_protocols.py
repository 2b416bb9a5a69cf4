"""Which frames a protocol asks for, what its tables say, and that a run goes on where it was, to the digit."""

import json
import math
import multiprocessing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from geodiff4d.cli import evaluate as cli
from geodiff4d.core import workers
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.images import composite, write_image
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.evaluate import pairs, protocol
from geodiff4d.evaluate.avatars import Lessons, avatar_note, lessons_of, make_avatar
from geodiff4d.evaluate.cases import (
    Case,
    Extent,
    cross_cases,
    found_clips,
    render_world_clip,
    self_cases,
    subject_of,
    world_clips,
)
from geodiff4d.evaluate.cross_view import consistency
from geodiff4d.evaluate.inputs import performed, prepare_case, source_frames
from geodiff4d.evaluate.judges import MEASURES
from geodiff4d.evaluate.metrics import psnr
from geodiff4d.evaluate.protocol import Settings, Work, maker_of, run_protocol, score_case, settled
from geodiff4d.evaluate.protocol_page import write_results
from geodiff4d.evaluate.tables import gathered, metrics_of, ordered, ranked, table_markdown
from geodiff4d.heads import HeadParams, load_head
from geodiff4d.pipeline import load_model
from geodiff4d.presets import PRESETS
from geodiff4d.video.diffusion import DiffusionConfig
from geodiff4d.world.subject import SyntheticSubject

SMALL = Extent(subjects=2, sequences=1, cameras=1, frames=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> list[Path]:
    """Two people, two cameras, two frames, at the size of the debug preset."""
    folder = tmp_path_factory.mktemp("world")
    return [render_world_clip(folder, clip) for clip in world_clips(SMALL, 64, 2)]


def empty_clip(folder: Path, frames: int, cameras: int, subject: str, fps: float = 24.0) -> Path:
    """A clip whose pictures nobody looks at."""
    camera = Camera(torch.eye(4), pinhole(8.0, 4, 4), 4, 4)
    with ClipWriter(folder, fps=fps, extra={"subject": subject}) as clip:
        for t in range(frames):
            for c in range(cameras):
                clip.add(t, c, torch.zeros(3, 4, 4), camera)
    return folder


# Cases


def test_cases_are_the_papers(tmp_path):
    """Ten subjects, two sequences, four cameras are 80 clips (here three are 24); another camera sees the reference."""
    assert len(world_clips(Extent(), 256, 5)) * Extent().cameras == 80
    clips = [empty_clip(tmp_path / f"{s}_{q}", 2, 6, f"{s}") for s in range(3) for q in range(2)]
    cases = self_cases(clips, Extent(frames=2))
    assert len({c.name for c in cases}) == len(cases) == 24
    assert all(c.reference.camera != c.driving.camera and c.reference.clip == c.driving.clip for c in cases)
    assert len({c.reference_name for c in cases}) == 6
    assert cases == self_cases(clips, Extent(frames=2))
    crossed = cross_cases(clips, Extent(frames=2))
    assert len(crossed) == 24
    assert all(subject_of(Clip(c.reference.clip)) != subject_of(Clip(c.driving.clip)) for c in crossed)
    assert all(not c.same for c in crossed)


def test_frames_come_from_the_middle_at_twelve_a_second(tmp_path):
    clip = empty_clip(tmp_path / "a", 40, 2, "a")
    [case] = self_cases([clip], Extent(cameras=1, frames=16))
    steps = case.driving.timesteps
    assert len(steps) == 16
    assert {b - a for a, b in pairwise(steps)} == {2}
    assert abs(steps[0] - (39 - steps[-1])) <= 1
    assert case.reference.timesteps[0] in steps


def test_a_film_of_one_camera_drives_itself(tmp_path):
    [case] = self_cases([empty_clip(tmp_path / "a", 6, 1, "a")], Extent(frames=4))
    assert case.reference.camera == case.driving.camera
    assert case.reference.timesteps[0] not in case.driving.timesteps


def test_found_clips_are_counted_by_person(tmp_path):
    for name in ("a0", "a1", "a2", "b0", "b1"):
        empty_clip(tmp_path / name, 2, 1, name[0])
    found = found_clips(tmp_path, Extent(subjects=2, sequences=2))
    assert [f.name for f in found] == ["a0", "a1", "b0", "b1"]
    with pytest.raises(UserError, match="has no clips"):
        found_clips(tmp_path / "a0" / "images", Extent())
    with pytest.raises(UserError, match="two people"):
        cross_cases(found[:2], Extent(frames=2))
    with pytest.raises(UserError, match="--frames is 1"):
        Extent(frames=1)


# Inputs


def test_the_performed_truth_is_the_persons_own_film(world):
    """Driven by themselves, from true parameters, people are seen where they were: the alignment moves nothing."""
    [case, _] = self_cases(world, SMALL)
    frames = source_frames(case.driving)
    extra = Clip(case.driving.clip).extra
    subject, params = (
        SyntheticSubject(extra["subject_seed"], "test"),
        HeadParams.stack([f.params for f in frames if f.params]),
    )
    box = (0.0, 0.0, float(frames[0].camera.width))
    rgb, _, mask = performed(subject, frames, params, frames[0].camera, box, load_head())
    assert psnr(rgb, torch.stack([f.image for f in frames]), mask).min() > 24  # the mesh is not the subject's own


def test_inputs_are_written_once_and_read_back(world, tmp_path):
    [case, _] = self_cases(world, SMALL)
    head = load_head()
    a = prepare_case(tmp_path, case, head, 64, "clip")
    stamp = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    b = prepare_case(tmp_path, case, head, 64, "clip")
    assert stamp == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    assert a.truth is not None and b.truth is not None
    assert torch.equal(a.truth.rgb, b.truth.rgb)
    assert a.truth.face.sum() > 20
    assert (a.truth.normal.norm(dim=1) - a.truth.mask[:, 0]).abs().mean() < 0.1
    assert a.yaw_difference_deg.shape == (2,)
    # Of another size, and of other frames, it is made again.
    c = prepare_case(tmp_path, case, head, 48, "clip")
    assert c.portrait.image.shape[-1] == c.camera.width == 48 and c.truth is not None and len(c.truth.rgb) == 2
    shorter = replace(case, driving=replace(case.driving, timesteps=case.driving.timesteps[:1]))
    d = prepare_case(tmp_path, shorter, head, 48, "clip")
    assert d.truth is not None and len(d.driving) == len(d.truth.rgb) == 1


# A whole run


def test_a_run_goes_on_and_repeats_to_the_digit(world, model, tmp_path):
    (tmp_path / "rival").mkdir()
    methods = ("video_model", "mesh_warp", "pose_map", "shuffled_reference")
    settings = Settings(
        tmp_path / "a", PRESETS["debug"], model, methods=methods, tracking="clip", results=tmp_path / "rival"
    )  # fmt: skip

    def run(out: Path):
        cases, found = run_protocol("self", Settings(**{**vars(settings), "out": out}), SMALL, world[0].parent)
        return cases, write_results(out, "self", cases, found, {"data": "two people"})

    cases, metrics = run(tmp_path / "a")
    name = cases[0].name
    assert [p.name for p in (tmp_path / "a" / "clips").iterdir()]
    for method in methods:
        assert set(metrics[method]) == {*MEASURES, "interval"}
    assert metrics["video_model"]["lpips"] is None and metrics["video_model"]["akd"] is None
    assert metrics["mesh_warp"]["psnr_fg"] > metrics["video_model"]["psnr_fg"]  # which is untrained
    assert "lpips" in metrics["missing"]
    table = (tmp_path / "a" / "table.md").read_text()
    assert "n/a, LPIPS: give --lpips" in table
    assert (tmp_path / "a" / "report.html").exists() and (tmp_path / "a" / "psnr_by_yaw.svg").exists()

    # Interrupted: one case is gone, and comes back the same.
    kept = (tmp_path / "a" / "clips" / name / "scores.json").read_text()
    for file in (tmp_path / "a" / "clips" / name).rglob("scores.json"):
        file.unlink()
    run(tmp_path / "a")
    assert (tmp_path / "a" / "clips" / name / "scores.json").read_text() == kept
    assert (tmp_path / "a" / "table.md").read_text() == table

    # A rival who hands in the truth is perfect, and one who hands in something else is told what.
    truth = Clip(tmp_path / "a" / "truth" / name)
    for k in range(len(truth)):
        frame = truth.frame(k)
        write_image(tmp_path / "rival" / name / f"{k:05d}_rgb.png", composite(frame.image, frame.mask))
    metrics = metrics_of(run_protocol("self", settings, SMALL, world[0].parent)[1])
    assert metrics["results:rival"]["psnr_fg"] > 55
    assert metrics["results:rival"]["normal_deg"] is None
    write_image(tmp_path / "rival" / name / "00001_rgb.png", torch.zeros(3, 32, 32))
    with pytest.raises(UserError, match="32×32 pixels: expected 64×64"):
        run_protocol("self", settings, SMALL, world[0].parent)


def test_scores_of_other_frames_are_made_again(world, model, tmp_path):
    settings = settled(Settings(tmp_path, PRESETS["debug"], model, methods=("mesh_warp",), tracking="clip"))
    [case, _] = self_cases(world, SMALL)
    shorter = replace(case, driving=replace(case.driving, timesteps=case.driving.timesteps[:1]))

    def frames(of: Case) -> int:
        return len(score_case(settings, Work(of, of, lessons_of([of], world, SMALL)[0]))["yaw_difference_deg"])

    assert frames(shorter) == 1 and frames(case) == 2


def test_a_tracked_pair_is_of_one_size_and_length(pair, tmp_path, monkeypatch):
    made = []

    def tracked(source, head, size, out, progress):
        made.append((source.name, size))
        return Clip(empty_clip(out, 1, 1, "someone"))

    monkeypatch.setattr(pairs, "write_photograph", lambda path, *a: path.touch())
    monkeypatch.setattr(pairs, "write_driving_video", lambda path, *a: path.touch())
    monkeypatch.setattr(pairs, "tracked", tracked)
    monkeypatch.setattr(pairs, "load_portrait", lambda *a: pair.portrait)
    monkeypatch.setattr(pairs, "load_driving", lambda *a: pair.driving)
    for frames, size in ((3, 64), (3, 64), (5, 64), (5, 48)):
        pairs.track_pair(tmp_path, load_head(), 0, frames, size, 32)
    assert made == [(n, s) for s in (64, 64, 48) for n in ("portrait.png", "driving.mp4")]


def test_the_upper_bound_is_fitted_to_the_truth_of_other_films(world, model, tmp_path):
    """Open world: the person performs what another did, which is never what is compared; real ones need more films."""
    cases = self_cases(world, SMALL)
    lessons = lessons_of(cases, world, SMALL)[0]
    assert [c.driving.clip for c in lessons.foreign] == [world[1]] and lessons.compared == {world[0]}
    settings = settled(Settings(tmp_path, PRESETS["debug"], model, tracking="clip"))
    maker, folder = maker_of(settings), tmp_path / "avatar_trues" / cases[0].reference_name

    def make(known: Lessons) -> dict:
        make_avatar("avatar_true", maker, tmp_path, folder, cases[0], known, "clip", settings.makers)
        return avatar_note(folder)

    assert make(lessons)["done"]
    clip = Clip(folder / "clip")
    subject, shown = SyntheticSubject(Clip(world[0]).extra["subject_seed"], "test"), clip.frame(0)
    assert clip.extra["generator"] == "truth" and shown.normal is not None and clip.expression_tokens is not None
    # The person itself: its colours, rendered by the clip's camera.
    own = subject.render(subject.params(torch.zeros(1, 52)), shown.camera.expand(1))
    inside = (shown.mask * own.mask[0])[0] > 0.5
    assert (shown.image[:, inside].mean(1) - own.rgb[0][:, inside].mean(1)).abs().max() < 0.1
    stamp = (folder / "made.json").stat().st_mtime_ns
    assert make(lessons)["done"] and (folder / "made.json").stat().st_mtime_ns == stamp
    alone = replace(lessons, drivers=(cases[0],), own=())
    assert "nothing but what is compared" in make(alone)["failed"]

    # The closing table places it, and says why others are not there.
    assert ordered(["perception", "avatar_true", "mesh_warp", "avatar"])[:2] == ["avatar", "avatar_true"]
    found = [{**scored("a", [5], [20], [20]), "unavailable": {"avatar_true": "no other films"}}]
    said = table_markdown(metrics_of(found), "T")
    assert "n/a for 1 clips, avatar on true frames (upper bound): no other films." in said


def test_own_films_are_those_that_nothing_is_compared_with(tmp_path):
    clips = [empty_clip(tmp_path / f"{s}{q}", 4, 3, s) for s in "ab" for q in range(3)]
    small = Extent(cameras=1, frames=2)
    cases = self_cases([clips[0], clips[3]], small)
    found = lessons_of(cases, clips, small)[0]
    assert {c.driving.clip for c in found.own} == {clips[1], clips[2]}
    crossed = lessons_of(cross_cases([clips[0], clips[3]], small), clips, small)[0]
    assert crossed.compared == {clips[3]} and not crossed.foreign and len(crossed.drivers) == 1


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fresh_runs_agree_to_the_digit_whatever_the_workers(world, model, tmp_path, workers):
    """The command twice, into fresh folders."""
    protocol = cli.ProtocolArgs(world[0].parent, methods=("video_model", "mesh_warp"), frames=2)

    def run(name: str, **changed: object) -> str:
        cli.run(cli.Args("self", tmp_path / name, model=model, preset="debug", protocol=replace(protocol, **changed)))
        return (tmp_path / name / "metrics.json").read_text()

    first = run("a", workers=1)
    assert run("b", workers=workers) == first
    for name in ("table.md", "report.html"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_every_gpu_has_a_process(monkeypatch, model, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.devices_named("cpu") == ("cpu",)
    devices = cli.devices_named("auto")
    assert devices == ("cuda:0", "cuda:1") and cli.workers_for(None, devices) == 2 and cli.workers_for(5, devices) == 5

    chosen, fitting = [], []
    monkeypatch.setattr(protocol, "placed_on", lambda model, device: chosen.append(str(device)) or model)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: fitting.append(str(device)))
    monkeypatch.setattr(workers, "number", 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(workers.signal, "signal", lambda *given: None)
    started = multiprocessing.get_context("spawn").Value("i", 0)
    for _ in range(3):
        workers.start_worker(started)
        maker_of.cache_clear()
        maker_of(Settings(tmp_path, PRESETS["debug"], model, devices=devices))
    maker_of.cache_clear()
    assert chosen == fitting == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_protocol_samples_as_the_model_was_trained(monkeypatch, model, tmp_path):
    """One of the paper's schedule would be scored on a single step's noise."""
    assert cli.settings_of(cli.Args("self", tmp_path, model=model), ("cpu",)).preset.name == "embedded"
    trained = load_model(model)
    trained.config = replace(trained.config, diffusion=DiffusionConfig())
    monkeypatch.setattr("geodiff4d.pipeline.load_model", lambda folder: trained)
    assert cli.settings_of(cli.Args("self", tmp_path, model=model), ("cpu",)).preset.name == "paper"
    assert cli.settings_of(cli.Args("self", tmp_path, model=model, preset="debug"), ("cpu",)).preset.name == "debug"


def test_float32_is_another_run(model, tmp_path):
    full = Settings(tmp_path, PRESETS["debug"], model, bf16=False)
    assert not maker_of(full).sample.autocast and maker_of(replace(full, bf16=True)).sample.autocast
    assert settled(full).makers != settled(replace(full, bf16=True)).makers, "frames of the other are made again"


# Tables


def scored(case: str, yaw: list[float], ours: list[float], theirs: list[float]) -> dict:
    rows = {"video_model": {"psnr_fg": ours, "flicker": 2.0}, "mesh_warp": {"psnr_fg": theirs}}
    return {"case": case, "scores": rows, "yaw_difference_deg": yaw, "judges": {}}


def test_tables_average_frames_first_and_part_them_by_yaw():
    found = [
        scored("a", [5, 40, 40], [20, 30, 32], [20, 28, 30]),
        scored("b", [5, 5, 5], [22, 24, math.nan], [21, 21, 21]),
        {"case": "c", "failed": "no face"},
    ]
    metrics = metrics_of(found)
    assert metrics["video_model"]["psnr_fg"] == pytest.approx((82 / 3 + 23) / 2)
    assert metrics["video_model"]["flicker"] == 2.0
    assert metrics["mesh_warp"]["flicker"] is None and metrics["video_model"]["lpips"] is None
    assert metrics["failed"] == {"c": "no face"} and metrics["clips"] == 3
    beyond = metrics["yaw"]["over 30"]
    assert beyond["frames"] == 2
    assert beyond["video_model"]["psnr_fg"] == 31
    [difference] = [d for d in beyond["differences"] if d["minus"] == "mesh_warp"]
    assert (difference["mean"], difference["clips"]) == (2, 1)
    assert metrics["yaw"]["0 to 15"]["video_model"]["psnr_fg"] == pytest.approx((20 + 23) / 2)
    assert math.isnan(gathered(found, 30, 180).values("video_model", "psnr_fg")[1])
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    table = table_markdown(metrics, "Test")
    assert "Means over 2 clips" in table and "- c: no face" in table
    assert ranked(found, "video_model") == [0, 1]


def test_views_that_agree_are_consistent_and_noise_is_not():
    g = torch.Generator().manual_seed(0)
    motion = torch.randn(1, 16, 50, generator=g)
    assert consistency(motion.expand(12, -1, -1)) == pytest.approx(1, abs=1e-5)
    noise = torch.randn(12, 16, 50, generator=g)
    assert consistency(noise) < 0.1
    # As much leaked view as motion: half of the variance.
    leak = torch.randn(12, 1, 50, generator=g).expand(-1, 16, -1)
    assert 0.4 < consistency(motion + leak) < 0.6
