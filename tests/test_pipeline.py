"""The path from portrait to clip: shots, cameras, what a driver gives and keeps, the warp generator, resuming."""

from dataclasses import replace

import pytest
import torch

from flame_files import arrays, write_beside, write_model
from geodiff4d import pipeline
from geodiff4d.avatar.config import FitConfig
from geodiff4d.core.errors import UserError
from geodiff4d.core.progress import silent
from geodiff4d.core.rundir import alone
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.evaluate.demo import forget_others
from geodiff4d.evaluate.metrics import score, silhouette_iou
from geodiff4d.evaluate.pairs import scored_shots, silhouette_orbit, truth_frames
from geodiff4d.heads import load_head
from geodiff4d.pipeline import (
    Shot,
    clip_cameras,
    driver_clip_index,
    following,
    plan_clip,
    plan_shots,
    synthesize,
)
from geodiff4d.presets import PRESETS
from geodiff4d.render import crops as cuts
from geodiff4d.render.viewpoints import world_region
from geodiff4d.video.decoder import DecoderConfig, GuidedDecoder
from geodiff4d.video.generate import DiffusionGenerator, Generated, GenerationRequest, Generator, WarpGenerator
from geodiff4d.video.inputs import load_driving, load_portrait, resized_frame, still_head, with_identity_of
from geodiff4d.video.parts import Devices, plan_parts, views_of

SIZE, VIEWS, FRAMES = 48, 3, 6
HEAD_POSE = ("rotation", "neck_pose", "translation")


@pytest.fixture(scope="module")
def head():
    return load_head()


def asked(pair, head, **changes) -> GenerationRequest:
    """A request of a pair, or one with another portrait or driving."""
    return replace(GenerationRequest(pair.portrait, pair.driving, head), **changes)


@pytest.fixture(scope="module")
def warped(pair, head, tmp_path_factory):
    """A clip of three cameras, two shots each, of a driver of three frames."""
    out = tmp_path_factory.mktemp("pipeline") / "clip"
    return synthesize(plan_clip(asked(pair, head), VIEWS, FRAMES), WarpGenerator(), out)


# Shots and cameras


def test_every_view_has_its_own_segment():
    shots = plan_shots(100, views=3, frames=12)
    assert [s.camera for s in shots] == [0] * 4 + [1] * 4 + [2] * 4
    assert [s.timestep for s in shots] == list(range(12))


def test_a_short_driver_wraps_around_and_instants_are_shared():
    shots = plan_shots(4, views=3, frames=6)
    assert shots == [Shot(0, 0), Shot(1, 0), Shot(2, 1), Shot(3, 1), Shot(0, 2), Shot(1, 2)]
    assert plan_shots(1, views=2, frames=1) == [Shot(0, 0), Shot(0, 1)], "at least one shot for each view"


def test_clip_cameras_see_the_whole_head(pair, head):
    cameras = clip_cameras(head, pair.portrait, VIEWS, SIZE)
    assert cameras.batch == (VIEWS,) and (cameras.width, cameras.height) == (SIZE, SIZE)
    rest = replace(head.neutral(VIEWS), shape=pair.portrait.params.shape.expand(VIEWS, -1))
    xy, depth = cameras.project(head.pose(rest).vertices[:, world_region()])
    assert (depth > 0).all() and (xy > 0).all() and (xy < SIZE).all()
    side = (xy.amax(1) - xy.amin(1)).amax(1)
    torch.testing.assert_close(side, torch.full((VIEWS,), SIZE / 1.6), rtol=1e-3, atol=0)
    positions = cameras.position
    assert torch.pdist(positions).min() > 0.2, "cameras stand apart [m]"


@pytest.mark.parametrize("degrees", [93.0, 140.0])
def test_the_outermost_cameras_of_a_plan_are_as_far_apart_as_asked(pair, head, degrees):
    plan = plan_clip(asked(pair, head), 8, 8, azimuth_deg=degrees)
    looks = -plan.views.T_cam_world[:, 2, :3]  # From the head to each camera, in the world.
    azimuth = torch.rad2deg(torch.atan2(looks[:, 0], looks[:, 2]))
    assert float(azimuth.max() - azimuth.min()) == pytest.approx(degrees, abs=0.1)
    assert float(azimuth[0]) == pytest.approx(0, abs=0.1), "the first one faces the person"


def test_a_flame_head_makes_a_clip_too(pair, tmp_path):
    write_beside(tmp_path, a := arrays())
    flame = load_head(write_model(tmp_path / "flame2023.pkl", a))
    rest = flame.neutral(3)
    portrait = replace(pair.portrait, params=rest[0])
    cameras = clip_cameras(flame, portrait, VIEWS, SIZE)
    points = flame.template[cuts.head_region(flame)]
    xy, _ = cameras.project(points.expand(VIEWS, -1, -1))
    torch.testing.assert_close((xy.amax(1) - xy.amin(1)).amax(1), torch.full((VIEWS,), SIZE / 1.6), rtol=1e-3, atol=0)
    driving = replace(pair.driving, params=rest)
    plan = plan_clip(GenerationRequest(portrait, driving, flame), 1, 1)
    clip = synthesize(plan, WarpGenerator(), tmp_path / "clip")
    clip.require_head(flame.name)
    assert len(clip) == 1


# What a driver gives


def test_a_still_head_keeps_its_expression(pair):
    moved = replace(pair.driving.params, **{k: getattr(pair.driving.params, k) + 0.3 for k in HEAD_POSE})
    still = still_head(moved)
    assert all((getattr(still, k) == 0).all() for k in HEAD_POSE)
    for name in ("shape", "expr", "jaw_pose", "eyes_pose"):
        assert torch.equal(getattr(still, name), getattr(moved, name))


def test_the_drivers_identity_is_not_used(pair):
    mine, theirs = pair.portrait.params.shape, pair.driving.params.shape
    assert (mine - theirs).norm() > 1
    given = with_identity_of(pair.portrait, pair.driving.params)
    assert torch.equal(given.shape, mine.expand_as(theirs)) and torch.equal(given.expr, pair.driving.params.expr)


def head_box(head, params, camera):
    """Centres and sides of projected heads [px], per frame; expressions do not count."""
    points = head.pose(params.without_expression()).vertices[:, cuts.head_region(head)]
    xy, _ = camera.expand(params.batch[0]).project(points)
    low, high = xy.amin(1), xy.amax(1)
    return (low + high) / 2, (high - low).amax(1)


def test_a_head_that_was_tracked_larger_is_seen_where_and_as_large_as_the_driver(pair, head):
    """Tracking finds one person's heads of different size: in the driver's picture that must not show."""
    size, driver, camera = 256, pair.driving.params, pair.driving.camera
    turn = torch.tensor([[0.0, -0.5, 0.0], [0.1, 0.0, 0.05], [0.0, 0.5, 0.0]])
    driver = replace(driver, rotation=turn, translation=torch.tensor([[0.0, 0, 0], [0.01, 0.02, -0.02], [0, -0.01, 0]]))
    larger = replace(pair.portrait.params, shape=driver.shape[0], static_offset=0.08 * head.template)
    portrait = replace(pair.portrait, params=larger, camera=pair.portrait.camera.resized(size, size))
    moving = replace(pair.driving, params=driver)
    placed, seen_by = following(portrait, moving, head)
    assert (seen_by.width, seen_by.height) == (size, size) and torch.equal(seen_by.T_cam_world, camera.T_cam_world)
    centre, side = head_box(head, driver, seen_by)
    _, too_large = head_box(head, with_identity_of(portrait, driver), seen_by)
    assert ((too_large / side - 1) > 0.06).all()
    found, found_side = head_box(head, placed.params, seen_by)
    assert (found - centre).norm(dim=1).max() < 0.5, "where the driver's is [px of 256]"
    assert (found_side / side - 1).abs().max() < 0.01, "as large"
    # One size for the clip: nothing breathes.
    assert (found_side / side).std() < 0.003
    for name in ("rotation", "neck_pose", "expr", "jaw_pose"):
        assert torch.equal(getattr(placed.params, name), getattr(driver, name))
    torch.testing.assert_close(placed.params.static_offset[0], larger.static_offset)


def test_only_one_square_camera_can_be_followed(pair, head, warped):
    assert load_driving(warped, head, 32).camera is None, "every instant of this clip has its own"
    with pytest.raises(UserError, match="the driver has several cameras"):
        following(pair.portrait, replace(pair.driving, camera=None), head)
    assert pair.driving.camera is not None
    with pytest.raises(UserError, match="frames of 96×48"):
        following(pair.portrait, replace(pair.driving, camera=replace(pair.driving.camera, width=2 * SIZE)), head)


def test_driving_is_one_frame_per_instant(warped, head):
    """Several cameras of an instant drive once, in the order of time."""
    driving = load_driving(warped, head, 32)
    assert len(driving) == len(warped.timesteps) == 3 < len(warped)
    assert driving.crops.shape == (3, 3, 32, 32) and driving.fps == warped.fps
    first = warped.frame(0)
    assert first.timestep == 0 and torch.equal(driving.params.expr[0], first.params.expr)
    assert len(load_driving(warped, head, 32, limit=2)) == 2
    picked = driving.select([2, 0])
    assert torch.equal(picked.params.expr, driving.params.expr[[2, 0]]) and picked.fps == driving.fps


def test_frames_are_picked_evenly(pair):
    assert driver_clip_index(pair.driving, 2) == [0, 2]
    assert driver_clip_index(pair.driving, 9) == [0, 1, 2]


def test_untracked_clips_are_refused(pair, head, tmp_path):
    with ClipWriter(tmp_path / "bare") as writer:
        writer.add(0, 0, pair.portrait.image, pair.portrait.camera)
    clip = Clip(tmp_path / "bare")
    with pytest.raises(UserError, match="run `geodiff4d track` on the video"):
        load_driving(clip, head, 32)
    with pytest.raises(UserError, match="run `geodiff4d track` on the image"):
        load_portrait(clip, SIZE)


def test_a_resized_frame_keeps_its_geometry(warped):
    frame = warped.frame(0)
    assert resized_frame(frame, SIZE) is frame
    small = resized_frame(frame, SIZE // 2)
    assert small.image.shape == (3, SIZE // 2, SIZE // 2) and small.mask.shape == (1, SIZE // 2, SIZE // 2)
    length = small.normal.norm(dim=0)[small.mask[0] == 1]
    torch.testing.assert_close(length, torch.ones_like(length))
    point = torch.tensor([[0.02, 0.03, 0.05]])
    torch.testing.assert_close(small.camera.project(point)[0], frame.camera.project(point)[0] / 2)
    wide = replace(frame, camera=replace(frame.camera, width=2 * SIZE))
    with pytest.raises(UserError, match="must be square crops, got 96×48"):
        resized_frame(wide, 32)


# Generating


def test_a_warped_clip_reads_back(warped, pair):
    clip = Clip(warped.folder)
    assert len(clip) == FRAMES and clip.camera_indices == [0, 1, 2] and clip.fps == pair.driving.fps
    assert clip.extra["generator"] == "warp" and (clip.folder / "reference.png").exists()
    for i in range(FRAMES):
        frame, t = clip.frame(i), clip.records[i].timestep
        torch.testing.assert_close(frame.params.shape, pair.portrait.params.shape)
        torch.testing.assert_close(frame.params.expr, pair.driving.params.expr[t])
        assert all((getattr(frame.params, k) == 0).all() for k in HEAD_POSE)
        assert frame.normal is not None and 0.1 < frame.mask.mean() < 0.9


def test_the_warp_shows_the_portrait_where_the_truth_is(pair, head):
    """Geometry, colours and normals agree with the person itself, rendered: errors of frame or axis would not."""
    shots, params, cameras = scored_shots(pair, head, VIEWS, 3, SIZE)
    shots = replace(shots, params=with_identity_of(pair.portrait, shots.params))
    truth = truth_frames(pair, head, params, cameras)
    made = WarpGenerator().generate(asked(pair, head, driving=shots), cameras)
    found, blank = (score(truth, x, made.normal) for x in (made.rgb, torch.full_like(truth.rgb, 0.5)))
    assert found["psnr_fg"] > blank["psnr_fg"] + 2 and found["normal_deg"] < 45
    assert (silhouette_iou(made.mask, truth.mask) > 0.5).all()


@pytest.mark.parametrize("kind", ["diffusion", "warp"])
def test_generators_answer_alike(pair, head, model, kind):
    """One request, whoever answers: frames on grey, unit normals where there is foreground, tokens, on the CPU."""
    generator: Generator = WarpGenerator()
    if kind == "diffusion":
        generator = DiffusionGenerator(pipeline.load_model(model), PRESETS["debug"].sample)
    assert isinstance(generator, Generator) and generator.about()["generator"] == kind
    image, mask = (
        torch.nn.functional.interpolate(x[None], (64, 64))[0] for x in (pair.portrait.image, pair.portrait.mask)
    )
    portrait = replace(pair.portrait, image=image, mask=mask, camera=pair.portrait.camera.resized(64, 64))
    driving = replace(pair.driving, params=with_identity_of(portrait, pair.driving.params))
    request, shown = GenerationRequest(portrait, driving, head), []

    def progress(items, description="", total=None):
        for item in items:
            yield item
            shown.append(item)

    camera = portrait.camera.expand(3)
    made = generator.generate(request, camera, progress)
    assert isinstance(made, Generated)
    assert shown == [0, 1, 2], "a frame that is sampled and then decoded counts once"
    assert made.rgb.shape[:2] == made.normal.shape[:2] == (3, 3) and made.mask.shape[:2] == (3, 1)
    assert made.rgb.shape[2:] == made.normal.shape[2:] == made.mask.shape[2:] and made.tokens.shape[0] == 3
    assert made.rgb.min() >= 0 and made.rgb.max() <= 1 and made.mask.min() >= 0 and made.mask.max() <= 1
    nothing = made.mask == 0
    assert (made.rgb - 0.5).abs()[nothing.expand_as(made.rgb)].sum() == 0
    length = made.normal.norm(dim=1, keepdim=True)
    assert length[nothing].sum() == 0 and ((length < 1e-3) | ((length - 1).abs() < 1e-2)).all()
    again = generator.generate(request, camera)
    assert torch.equal(again.rgb, made.rgb)


def test_diffusion_needs_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "SHIPPED_MODEL", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no shipped model: give --model"):
        pipeline.load_model()


def test_finished_stages_are_kept(pair, head, tmp_path, monkeypatch):
    calls = []

    def fit(clip, out, config, seed, progress):
        calls.append(len(clip))
        out.mkdir()
        (out / "metrics.json").write_text("{}")

    monkeypatch.setattr(pipeline, "fit", fit)
    for _ in range(2):
        plan = plan_clip(asked(pair, head), views=1, frames=2)
        pipeline.reconstruct(plan, WarpGenerator(), tmp_path / "run", PRESETS["debug"].fit)
        stamp = (tmp_path / "run/clip/transforms.json").stat().st_mtime_ns
        assert calls == [2]
        monkeypatch.setattr(pipeline, "synthesize", None)
    assert (tmp_path / "run/clip/transforms.json").stat().st_mtime_ns == stamp


def test_parts_cover_a_clip_and_divide_no_view_that_looks_across():
    assert plan_parts([30, 10, 40, 200], divide=False, most=48) == [slice(0, 40), slice(40, 80), slice(80, 280)]
    assert plan_parts([200], divide=True, most=48) == [slice(48 * k, min(48 * k + 48, 200)) for k in range(5)]
    assert views_of([(0, 1), (1, 1), (0, 2), (3, 1)]) == [2, 1, 1]


class Dying(WarpGenerator):
    """Makes so many parts and then dies."""

    left = 1

    def generate(self, request, cameras, progress=silent):
        if Dying.left == 0:
            raise KeyboardInterrupt
        Dying.left -= 1
        return super().generate(request, cameras, progress)


def test_a_clip_that_was_cut_off_goes_on(pair, head, warped, tmp_path, monkeypatch):
    """What was made is kept, in parts, and the clip is what it would have been at once."""
    monkeypatch.setattr(pipeline, "PART", 2)
    plan = plan_clip(asked(pair, head), VIEWS, FRAMES)
    with pytest.raises(KeyboardInterrupt):
        synthesize(plan, Dying(), tmp_path / "clip")
    unfinished = tmp_path / ".clip.unfinished"
    assert len(list(unfinished.glob("images/*.png"))) == 2 and not (tmp_path / "clip").exists()
    Dying.left = 2
    seen: list[int] = []

    def shown(items, description="", total=None):
        for item in items:
            yield item
            seen.append(item)

    clip = synthesize(plan, Dying(), tmp_path / "clip", shown)
    assert Dying.left == 0 and len(seen) == FRAMES and not unfinished.exists()
    assert [p.name for p in sorted(clip.folder.rglob("*"))] == [p.name for p in sorted(warped.folder.rglob("*"))]
    for name in ("transforms.json", "expression_tokens.safetensors", "images/00001_00.png", "normals/00002_02.png"):
        assert (clip.folder / name).read_bytes() == (warped.folder / name).read_bytes(), name
    Dying.left = 1
    with pytest.raises(KeyboardInterrupt):
        synthesize(plan, Dying(), tmp_path / "clip")
    Dying.left = 3
    other = plan_clip(
        asked(pair, head, portrait=replace(pair.portrait, image=pair.portrait.image * 0.9)), VIEWS, FRAMES
    )
    with alone(unfinished), pytest.raises(UserError, match="another process is writing to"):
        synthesize(other, Dying(), tmp_path / "clip")
    assert len(list(unfinished.glob("images/*.png"))) == 2, "what another process makes is left alone"
    synthesize(other, Dying(), tmp_path / "clip")
    assert Dying.left == 0, "nothing of another clip is taken"


def _warp(number: int) -> Generator:
    """Make the generator of another process."""
    return WarpGenerator()


@pytest.mark.slow
def test_processes_share_a_clip(pair, head, warped, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "PART", 2)
    clip = synthesize(
        plan_clip(asked(pair, head), VIEWS, FRAMES), WarpGenerator(), tmp_path / "clip", devices=Devices(2, _warp)
    )
    for path in (p.relative_to(warped.folder) for p in warped.folder.rglob("*.png")):
        assert (clip.folder / path).read_bytes() == (warped.folder / path).read_bytes(), path


def test_a_folder_keeps_to_one_reconstruction(pair, head, model, tmp_path, monkeypatch):
    """Whatever changes the result is noticed; what only changes how much memory sampling takes is not."""
    for stage in ("synthesize", "fit"):
        monkeypatch.setattr(pipeline, stage, lambda *a: None)
    sampling, network = PRESETS["debug"].sample, pipeline.load_model(model)
    other_network = pipeline.load_model(model)
    other_network.unet.conv_in.weight.data += 0.1
    decoding = pipeline.load_model(model)
    decoding.decoder = GuidedDecoder(DecoderConfig((8, 8), (1, 1)))
    out = tmp_path / "run"

    def planned(views=1, frames=2, motion=None, head=head, **changes):
        return plan_clip(asked(pair, head, **changes), views, frames, motion)

    plain = {"plan": planned(), "generator": DiffusionGenerator(network, sampling), "config": FitConfig()}

    def go(**options):
        pipeline.reconstruct(out=out, **plain | options)

    go()
    go(generator=DiffusionGenerator(network, replace(sampling, offload=True, batched_cfg=False, chunk=1)))
    dimmed = replace(pair.portrait, image=pair.portrait.image * 0.9)
    others: list[dict] = [
        {"plan": planned(portrait=dimmed)},
        {"plan": planned(driving=pair.driving.select([1, 0]))},
        {"plan": planned(driving=replace(pair.driving, temporal=False))},
        {"plan": planned(motion=pair.driving)},
        {"plan": planned(head=replace(head, template=head.template * 1.01))},
        {"plan": planned(views=2)},
        {"plan": planned(frames=3)},
        {"seed": 1},
        {"config": FitConfig(iterations=7)},
        {"generator": WarpGenerator()},
        {"generator": DiffusionGenerator(other_network, sampling)},
        {"generator": DiffusionGenerator(network, replace(sampling, steps=3))},
        {"generator": DiffusionGenerator(network, replace(sampling, finish=()))},
        {"generator": DiffusionGenerator(decoding, sampling)},
        {"generator": DiffusionGenerator(network, sampling, drop_expression=True)},
    ]
    for other in others:
        with pytest.raises(UserError, match="holds another reconstruction: give --out a new folder"):
            go(**other)
    (out / "reconstruction.json").unlink()
    (out / "clip").mkdir()
    (out / "clip" / "transforms.json").touch()
    with pytest.raises(UserError, match="holds another reconstruction"):
        go()


def test_a_demo_of_other_weights_starts_afresh(tmp_path):
    for name in ("clip", "avatar.run", "pairs"):
        (tmp_path / name).mkdir()
    forget_others(tmp_path, "a")
    assert (tmp_path / "avatar.run").exists()
    forget_others(tmp_path, "a")
    assert (tmp_path / "avatar.run").exists()
    forget_others(tmp_path, "b")
    assert [p.name for p in tmp_path.iterdir()] == ["demo.json"]


# The demo's pairs


def test_a_pair_is_what_a_user_would_have(pair):
    assert pair.portrait.image.shape == (3, SIZE, SIZE) and 0.2 < pair.portrait.mask.mean() < 0.9
    assert len(pair.driving) == 3 == pair.truth_params.batch[0]
    # Parameters carry a tracker's error, the truth does not.
    error = (pair.driving.params.expr - pair.truth_params.expr).abs()
    assert 0 < error.mean() < 0.3


def test_scored_frames_come_from_different_cameras(pair, head):
    shots, params, cameras = scored_shots(pair, head, 8, 3, SIZE)
    assert len(shots) == 3 == params.batch[0] == cameras.batch[0]
    assert torch.pdist(cameras.position).min() > 0.1
    assert all((getattr(shots.params, k) == 0).all() for k in HEAD_POSE)


def test_the_truth_marks_the_face_inside_the_foreground(pair, head):
    _, params, cameras = scored_shots(pair, head, VIEWS, 3, SIZE)
    truth = truth_frames(pair, head, params, cameras)
    assert ((truth.face > 0) <= (truth.mask > 0)).all() and 0 < truth.face.mean() < 0.15
    outside = (truth.mask == 0).expand_as(truth.rgb)
    torch.testing.assert_close(truth.rgb[outside], torch.full((int(outside.sum()),), 0.5))


def test_the_orbit_goes_around_the_head(pair, head):
    cameras, truth = silhouette_orbit(pair, head, SIZE, 3)
    azimuth = torch.atan2(cameras.position[:, 0], cameras.position[:, 2]).rad2deg()
    torch.testing.assert_close(azimuth, torch.tensor([-60.0, 0, 60]), atol=1.0, rtol=0)
    assert (truth.mask.mean((1, 2, 3)) > 0.2).all()
