"""The open world: determinism, splits, exact normals, people harder than their tracker, cameras, tracks, clips."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from geodiff4d.cli import synth
from geodiff4d.core import workers
from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import Clip
from geodiff4d.data.world_clips import is_complete, write_world
from geodiff4d.heads import load_head
from geodiff4d.provenance.seal import verify
from geodiff4d.provenance.verdict import State
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import capture_cameras, world_region
from geodiff4d.world.cameras import random_cameras
from geodiff4d.world.expressions import ACTIONS, TRACK_KINDS, expression_track, head_track, random_expression
from geodiff4d.world.glasses import build as build_glasses
from geodiff4d.world.growth import BEARD_SHELL, grow_beard
from geodiff4d.world.hair import KINDS, draw_style
from geodiff4d.world.mesh import assemble
from geodiff4d.world.seeds import generator
from geodiff4d.world.subject import WORLD_VERSION, SyntheticSubject, plain_seed
from geodiff4d.world.tracker_error import disturbed
from geodiff4d.world.traits import draw_traits

SIZE = 48


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors and shared machines: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def frames(subject):
    expr, jaw, eyes = random_expression(0, 3)
    params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)
    return subject.render(params, random_cameras(3, 0, SIZE))


def test_same_seed_same_bytes(subject, frames):
    expr, jaw, eyes = random_expression(0, 3)
    again = SyntheticSubject(3, "val")
    out = again.render(again.params(expr, jaw_pose=jaw, eyes_pose=eyes), random_cameras(3, 0, SIZE))
    assert (
        torch.equal(out.rgb, frames.rgb)
        and torch.equal(out.normal, frames.normal)
        and torch.equal(out.mask, frames.mask)
    )
    # A frame does not depend on the batch it is rendered in.
    alone = again.render(again.params(expr, jaw_pose=jaw, eyes_pose=eyes)[1], random_cameras(3, 0, SIZE)[1])
    assert (alone.rgb - frames.rgb[1]).abs().max() < 1e-3


def test_kernels_draw_what_torch_draws(subject):
    """The Numba kernels and the torch renderer share no code: two oracles for each other."""
    expr, jaw, eyes = random_expression(0, 2)
    params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)
    ours, theirs = (subject.render(params, random_cameras(2, 0, SIZE), backend=b) for b in ("numba", "torch"))
    for name, most in (("rgb", 0.02), ("normal", 0.05), ("mask", 0.01)):
        error = (getattr(ours, name) - getattr(theirs, name)).abs()
        # Strands behind a gap of their own shell are seen by the kernels only.
        assert error.mean() < 0.006 and error.flatten().quantile(0.95) < most, name


def test_splits_share_nobody(subject):
    other = SyntheticSubject(3, "test")
    assert (other.tracked_shape - subject.tracked_shape).norm() > 1
    assert (other.texture - subject.texture).abs().mean() > 1e-3


def test_pictures_are_valid(frames):
    assert frames.rgb.shape == (3, 3, SIZE, SIZE)
    assert frames.rgb.min() >= 0 and frames.rgb.max() <= 1 and frames.rgb.isfinite().all()
    inside = frames.mask > 0
    length = frames.normal.norm(dim=1, keepdim=True)
    assert (length[inside] - 1).abs().max() < 1e-3 and (length[~inside] == 0).all()
    assert 0.2 < inside.float().mean() < 0.9
    # Smooth normals may turn away a little at the silhouette, nowhere else.
    z = frames.normal[:, 2:][inside]
    assert (z < -0.3).float().mean() < 0.02 and z.mean() > 0.5


def test_people_are_harder_than_their_tracker(subject):
    head = load_head("openhead")
    expr, jaw, eyes = random_expression(1, 6)
    params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)
    error_mm = 1000 * (subject.vertices(params) - head.pose(params).vertices).norm(dim=-1)[:, world_region()].mean(1)
    assert (error_mm > 0.5).all() and (error_mm < 6).all()


def test_tracked_shape_is_the_best(subject):
    head = load_head("openhead")
    truth = subject.rig.template
    best = (head.pose(subject.params(torch.zeros(52))).vertices - truth).square().sum(-1)[world_region()].mean()
    for k in (0, 5, 40):
        moved = subject.params(torch.zeros(52))
        moved = replace(moved, shape=moved.shape + 0.5 * torch.eye(64)[k])
        assert (head.pose(moved).vertices - truth).square().sum(-1)[world_region()].mean() > best


def test_disturbance_has_the_stated_statistics(subject):
    n = 1500
    params = subject.params(torch.full((n, 52), 0.5))
    noisy = disturbed(params, 0)
    for name, sigma in (("rotation", 0.01745), ("translation", 0.002), ("jaw_pose", 0.0349), ("expr", 0.1)):
        error = getattr(noisy, name) - getattr(params, name)
        assert error.std() == pytest.approx(sigma, rel=0.15)
        correlation = (error[1:] * error[:-1]).mean() / error.square().mean()
        assert correlation == pytest.approx(0.9, abs=0.03)
    assert torch.equal(noisy.rotation, disturbed(params, 0).rotation)
    assert not torch.equal(noisy.rotation, disturbed(params, 1).rotation)
    assert disturbed(subject.params(torch.zeros(64, 52)), 0).expr.min() >= 0


def test_rig_covers_nersembles_range():
    cameras = capture_cameras(SIZE)
    forward = cameras.T_cam_world[:, 2, :3]
    offset = -forward
    azimuth, elevation = torch.atan2(offset[:, 0], offset[:, 2]).rad2deg(), torch.asin(offset[:, 1]).rad2deg()
    assert cameras.batch == (16,)
    assert azimuth.max() - azimuth.min() == pytest.approx(
        93, abs=0.5
    ) and elevation.max() - elevation.min() == pytest.approx(32, abs=0.5)
    assert azimuth[8].abs() < 1e-3 and elevation[8].abs() < 1e-3
    assert len(set(elevation.round().tolist())) == 3  # two rows and the front camera


def test_canonical_crop_frames_the_head(subject):
    points = subject.rig.template[world_region()]
    for camera in (random_cameras(1, 4, SIZE)[0], capture_cameras(200)[8]):
        xy, _ = canonical_crop(camera, points, 96).project(points)
        low, high = xy.amin(0), xy.amax(0)
        assert (high - low).max() == pytest.approx(96 / 1.6, rel=1e-3)
        assert torch.allclose((low + high) / 2, torch.tensor(48.0), atol=0.1)


def test_actions_are_openheads():
    assert load_head("openhead").expression_names == ACTIONS


@pytest.mark.parametrize("kind", TRACK_KINDS)
def test_tracks_are_in_range_and_smooth(kind):
    expr, jaw, eyes = expression_track(kind, 72, seed=5)
    assert expr.shape == (72, 52) and jaw.shape == (72, 3) and eyes.shape == (72, 6)
    assert expr.min() >= 0 and expr.max() <= 1 and eyes.abs().max() <= 0.51
    assert expr.std(0).max() > 0.05
    assert (expr[2:] - 2 * expr[1:-1] + expr[:-2]).abs().max() < 0.75  # a blink closes in three frames
    assert torch.equal(expr, expression_track(kind, 72, seed=5)[0])


def test_random_expressions_use_the_whole_face():
    expr, jaw, eyes = random_expression(0, 400)
    used = (expr > 0.15).float().mean(0)
    looks = torch.tensor([name.startswith("eyeLook") for name in ACTIONS])
    assert (used[~looks] > 0.01).all() and (used[looks] == 0).all()
    assert jaw.shape == (400, 3) and eyes.abs().max() <= 0.51


def test_synth_writes_clips_and_resumes(tmp_path, capsys):
    args = synth.Args(out=tmp_path / "world", subjects=1, frames=2, views=2, size=32, split="val", workers=1)
    synth.run(args)
    clip = Clip(tmp_path / "world/val_0")
    assert (
        len(clip) == 4
        and clip.camera_indices == [0, 8]
        and clip.extra["subject_seed"] == 0
        and clip.extra["split"] == "val"
    )
    frame = clip.frame(0)
    truth = SyntheticSubject(0, "val")
    assert torch.allclose(frame.params.shape, truth.tracked_shape, atol=1e-5)
    again = truth.render(frame.params, frame.camera)
    assert (again.rgb - frame.image).abs().max() < 0.01 and frame.normal is not None
    for made in ("val_0", "val_sheet.png"):
        [verdict] = verify([tmp_path / "world" / made])
        assert verdict.state is State.UNTOUCHED and verdict.statement is not None
        assert verdict.statement.source == "algorithmicMedia", "nobody was photographed, and no model was trained"
    before = (tmp_path / "world/val_0/transforms.json").stat().st_mtime_ns
    synth.run(args)
    assert (tmp_path / "world/val_0/transforms.json").stat().st_mtime_ns == before
    assert "1 were there" in capsys.readouterr().out and (tmp_path / "world/val_sheet.png").exists()
    # A clip of an older world is written again.
    meta = tmp_path / "world/val_0/transforms.json"
    meta.write_text(meta.read_text().replace(f'"world_version": {WORLD_VERSION}', '"world_version": 0'))
    assert not is_complete(tmp_path / "world/val_0", 2, 2, 32)
    with pytest.raises(UserError, match="--views is 17"):
        synth.run(replace(args, views=17))


def test_workers_write_what_one_process_writes(tmp_path, monkeypatch):
    # Threads instead of processes: starting two takes longer than all other tests here.
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda n, *given: ThreadPoolExecutor(n))
    done = sorted(write_world(tmp_path / "two", "val", [0, 1], 1, 1, 16, workers=2))
    assert done == [0, 1]
    list(write_world(tmp_path / "one", "val", [1], 1, 1, 16))
    for name in ("images/00000_08.png", "normals/00000_08.png", "flame_param/00000.npz"):
        assert (tmp_path / f"one/val_1/{name}").read_bytes() == (tmp_path / f"two/val_1/{name}").read_bytes()


def test_plain_people_are_all_those_who_are_not_randomised():
    seeds = [plain_seed(i, "val", 3) for i in range(6)]
    assert seeds == sorted(set(seeds)) and seeds[0] >= 3
    for seed in range(3, seeds[-1] + 1):
        assert draw_traits(generator("subject", "val", seed, "traits")).randomised == (seed not in seeds)


def test_people_are_varied():
    """Shares of traits, over three hundred people (nobody is built)."""
    drawn = []
    for seed in range(300):
        rng = generator("subject", "train", seed, "traits")
        drawn.append((draw_traits(rng), draw_style(rng)))
    assert {style.kind for _, style in drawn} == set(KINDS)
    assert {t.beard for t, _ in drawn} == {"none", "stubble", "moustache", "goatee", "short", "full"}
    share = lambda test: sum(test(t) for t, _ in drawn) / len(drawn)  # noqa: E731
    assert share(lambda t: t.randomised) == pytest.approx(0.25, abs=0.06)
    assert share(lambda t: t.glasses != "none") == pytest.approx(0.16, abs=0.06)
    assert 0.1 < share(lambda t: t.beard_m > 0) < 0.35
    assert min(t.melanin for t, _ in drawn) < 0.1 and max(t.melanin for t, _ in drawn) > 0.85


def test_beards_and_glasses_fit(subject):
    head, rest = load_head("openhead"), subject.rig.template
    traits = replace(subject.traits, beard="full", beard_m=0.02, glasses="dark")
    fur = grow_beard(traits, generator("beard"))
    assert fur is not None and fur.lift.min() > 0 and fur.lift.max() < 0.03
    # A beard grows on the lower face, on both sides of it.
    below = rest[fur.vertex][fur.lift > 0.004]
    assert below[:, 1].max() < 0.045 and below[:, 0].min() < -0.03 and below[:, 0].max() > 0.03
    pieces = build_glasses(traits, rest, generator("glasses"))
    assert len(pieces) == 2
    points = pieces[0].vertices
    lids = rest[head.regions["lids"]]
    near = points[points[:, 2] > lids[:, 2].max()]
    # Lenses stand before the eyes, temples reach the ears.
    assert len(near) > 100 and (near[:, 1].mean() - lids[:, 1].mean()).abs() < 0.01
    assert points[:, 2].min() < rest[head.regions["ears"]][:, 2].mean()
    mesh = assemble(rest, torch.zeros(len(rest)), fur, pieces, torch.tensor([0.0, 0.0, 1.0]))
    vertices, R = mesh.posed(subject.rig, subject.params(torch.zeros(1, 52)))
    assert vertices.shape[1] == len(mesh.tangents) == len(mesh.openness) and R.shape == (1, 3, 3)
    assert mesh.faces.max() < vertices.shape[1] and mesh.uv_faces.max() < len(mesh.uv)
    assert mesh.shell.max() == BEARD_SHELL + 2 and mesh.uv.min() >= 0 and mesh.uv.max() <= 1


def test_heads_turn():
    turns, speech = head_track("turns", 96, 1), head_track("speech", 96, 1)
    assert turns.abs().max() < 0.75 and turns[:, 1].std() > speech[:, 1].std()
    assert (turns[2:] - 2 * turns[1:-1] + turns[:-2]).abs().max() < 0.06
