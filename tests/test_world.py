"""The open world: determinism, splits, exact normals, people harder than their tracker, cameras, tracks, clips."""

from dataclasses import replace

import pytest
import torch

from geodiff4d.cli import synth
from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import Clip
from geodiff4d.data.synthetic import (
    ACTIONS,
    TRACK_KINDS,
    SyntheticSubject,
    canonical_crop,
    disturbed,
    expression_track,
    head_region,
    random_cameras,
    random_expression,
    rig,
)
from geodiff4d.heads import load_head

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
    error_mm = 1000 * (subject.vertices(params) - head.pose(params).vertices).norm(dim=-1)[:, head_region()].mean(1)
    assert (error_mm > 0.5).all() and (error_mm < 6).all()


def test_tracked_shape_is_the_best(subject):
    head = load_head("openhead")
    truth = subject.rig.template
    best = (head.pose(subject.params(torch.zeros(52))).vertices - truth).square().sum(-1)[head_region()].mean()
    for k in (0, 5, 40):
        moved = subject.params(torch.zeros(52))
        moved = replace(moved, shape=moved.shape + 0.5 * torch.eye(64)[k])
        assert (head.pose(moved).vertices - truth).square().sum(-1)[head_region()].mean() > best


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
    cameras = rig(SIZE)
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
    points = subject.rig.template[head_region()]
    for camera in (random_cameras(1, 4, SIZE)[0], rig(200)[8]):
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
    args = synth.Args(out=tmp_path / "world", subjects=1, frames=2, views=2, size=32, split="val")
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
    before = (tmp_path / "world/val_0/transforms.json").stat().st_mtime_ns
    synth.run(args)
    assert (tmp_path / "world/val_0/transforms.json").stat().st_mtime_ns == before
    assert "1 were there" in capsys.readouterr().out and (tmp_path / "world/val_sheet.png").exists()
    with pytest.raises(UserError, match="--views is 17"):
        synth.run(replace(args, views=17))
