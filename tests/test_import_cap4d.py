"""CAP4D's fit.npz: its own skinning, written here from its description, must land where the imported head does."""

import shutil

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.video import write_video
from geodiff4d.data import cap4d
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import ImportConfig, import_sources
from geodiff4d.data.importing import Choice, Report
from geodiff4d.heads import flame
from mini_cap4d import STEPS, H, W, make_cap4d, make_fit, posed, project
from mini_tracks import make_head, share_inside

EVERYTHING = Choice()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_head(tmp_path_factory.mktemp("model"), "flame2023_no_jaw.pkl")


@pytest.fixture(scope="module")
def data(tmp_path_factory, model):
    return make_cap4d(tmp_path_factory.mktemp("cap4d") / "felix", make_fit(), model)


@pytest.fixture(autouse=True)
def only_our_model(monkeypatch, model):
    """Heads are found by what was loaded: here ours, unless a test forgets it."""
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)
    path = next(p for p in flame.LOADED if "no_jaw" in p.name)
    monkeypatch.setattr(flame, "LOADED", [path])


def run(src, out, choice=EVERYTHING):
    report = Report()
    sources = cap4d.read(src, choice, report)
    return import_sources(sources, out, f"cap4d {src}", choice, report, ImportConfig()), report


def landed(clip, i, head):
    frame = clip.frame(i)
    return frame.camera.project(head.pose(frame.params).vertices)[0], frame


@pytest.mark.parametrize("known", [True, False])
def test_it_reprojects(data, model, tmp_path, known, monkeypatch):
    head, a = model
    if not known:
        monkeypatch.setattr(flame, "LOADED", [])
    (folder,), report = run(data, tmp_path / "out")
    assert len(report) == (0 if known else 1)
    clip, fit = Clip(folder), make_fit()
    assert (clip.head_name, clip.fps, len(clip)) == ("flame2023-no-jaw", 30, 6)
    assert clip.extra["motion"] == ("head" if known else "cameras")
    lids = head.eyelid_basis.sum(-1).double().numpy()
    for i in range(len(clip)):
        xy, frame = landed(clip, i, head)
        error = xy - project(fit, frame.camera_index, posed(fit, a, lids, frame.timestep))
        # Eyelids are added after skinning, not before; without the model its correctives' constant is missing too.
        assert error.norm(dim=1).median() < (0.05 if known else 0.7) and share_inside(xy, frame.mask) > 0.97
        assert frame.image[:, frame.mask[0] > 0.5].mean() == pytest.approx(0.2 + 0.2 * frame.timestep, abs=0.01)
    moving = torch.stack([clip.frame(i).camera.T_cam_world for i in (0, 2, 4)])
    assert (moving.std(0).max() < 1e-6) == known, "the head moves, or the cameras do"


def test_shoulders_turn_and_the_head_does_not(model, tmp_path):
    head, a = model
    fit = make_fit(1, shoulders=0.3)
    (folder,), report = run(make_cap4d(tmp_path / "in", fit, model), tmp_path / "out")
    assert report.lines() == []
    clip, lids = Clip(folder), head.eyelid_basis.sum(-1).double().numpy()
    pure = head.skin_weights[:, 0] < 1e-3
    assert pure.sum() > 10
    for i in range(len(clip)):
        xy, frame = landed(clip, i, head)
        error = (xy - project(fit, frame.camera_index, posed(fit, a, lids, frame.timestep)))[pure]
        # The neck's correctives are driven by the shoulders' turn there, by its inverse here.
        assert error.norm(dim=1).median() < 1.0
        assert frame.params.neck_pose.norm() > 0.05


def test_without_the_model_shoulders_are_said_to_stay(model, tmp_path, monkeypatch):
    monkeypatch.setattr(flame, "LOADED", [])
    _, report = run(make_cap4d(tmp_path / "in", make_fit(1, shoulders=0.3), model), tmp_path / "out")
    assert any("shoulders" in line for line in report.lines())


def test_video_choice_and_resume(data, tmp_path):
    src = tmp_path / "in"
    shutil.copytree(data, src)
    images = [torch.full((3, H, W), 0.25 * (t + 1)) for t in range(STEPS)]
    shutil.rmtree(src / "images/cam0")
    write_video(src / "images/cam0.mp4", images, 30.0)
    run(src, tmp_path / "out", Choice(limit=1, cameras=("cam0",)))
    assert len(Clip(tmp_path / "out")) == 1
    (folder,), report = run(src, tmp_path / "out")
    clip = Clip(folder)
    assert len(clip) == 6 and report.lines() == []
    assert [float(clip.frame(i).image.mean()) for i in (0, 2, 4)] == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_a_clip_has_the_motion_in_one_place(data, tmp_path, monkeypatch):
    """A second camera's frames must not put it elsewhere than the first one's."""
    ours = flame.LOADED
    monkeypatch.setattr(flame, "LOADED", [])
    run(data, tmp_path / "out", Choice(cameras=("cam0",)))
    monkeypatch.setattr(flame, "LOADED", ours)
    with pytest.raises(UserError, match="motion was in the cameras, is in the head parameters"):
        run(data, tmp_path / "out")


def test_truncated_videos_and_missing_cameras(data, tmp_path):
    src = tmp_path / "in"
    shutil.copytree(data, src)
    shutil.rmtree(src / "images/cam0")
    (folder,), report = run(src, tmp_path / "one")
    assert Clip(folder).camera_indices == [1] and "cam0" in " | ".join(report.lines())
    video = src / "images/cam0.mp4"
    write_video(video, [torch.rand(3, H, W) for _ in range(STEPS)], 30.0)
    video.write_bytes(video.read_bytes()[:300])
    (folder,), report = run(src, tmp_path / "two")
    assert Clip(folder).camera_indices == [1] and "video" in " | ".join(report.lines())


def test_several_fits_become_several_clips(data, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(data, tmp_path / f"in/{name}")
    folders, _ = run(tmp_path / "in", tmp_path / "out", Choice(limit=1, only=("b",)))
    assert folders == [tmp_path / "out/b"]
    folders, _ = run(tmp_path / "in", tmp_path / "out", Choice(limit=1))
    assert [f.name for f in folders] == ["a", "b"] and len(Clip(folders[0])) == 2


def test_missing_and_damaged_pictures_are_reported(data, tmp_path):
    src = tmp_path / "in"
    shutil.copytree(data, src)
    (src / "images/cam0/00000024.png").unlink()
    file = src / "images/side/00000017.png"
    file.write_bytes(file.read_bytes()[:60])
    (src / "bg/side/0002.png").write_text("")
    fit = make_fit()
    fit["valid_mask"][1, 0] = False
    np.savez(src / "fit.npz", **fit)
    (folder,), report = run(src, tmp_path / "out")
    clip = Clip(folder)
    assert [(r.timestep, r.camera_index) for r in clip.records] == [(0, 0), (1, 0), (2, 1)]
    lines = " | ".join(report.lines())
    for words in ("no picture", "picture is", "mask left out", "invalid", "fewer pictures"):
        assert words in lines, words


def test_a_number_that_is_none_costs_its_frame_and_is_named(data, tmp_path):
    src = tmp_path / "in"
    shutil.copytree(data, src)
    fit = make_fit()
    fit["tra"] = np.array(fit["tra"], np.float64)
    fit["tra"][1, 2] = np.nan
    np.savez(src / "fit.npz", **fit)
    (folder,), report = run(src, tmp_path / "out")
    assert {r.timestep for r in Clip(folder).records} == set(range(STEPS)) - {1}
    assert "NaN or infinite numbers in fit.npz (in/1)" in " | ".join(report.lines())


@pytest.mark.parametrize(("change", "says"), [
    ({"extr": np.full((2, 4, 4), np.nan)}, "NaN"),
    ({"extr": np.tile(np.diag([-1.0, 1, 1, 1]), (2, 1, 1))}, "mirrored"),
    ({"fx": np.float32([[0.0], [1.0]])}, "focal"),
    ({"rot": np.full((STEPS, 3), np.inf)}, "infinite numbers at every timestep"),
    ({"rot": np.zeros((STEPS, 4))}, "do not fit"),
    ({"extr": np.float32(1)}, "do not fit"),
    ({"camera_order": np.array("cam0")}, "camera_order"),
    ({"expr": np.full((4, 65), "cam0")}, "expr of <U4"),
    ({"expr": np.zeros((STEPS, 120))}, "expected at most"),
    ({"shape": np.zeros(400)}, "expected at most"),
    ({"shape": None}, "lacks shape"),
    ({"camera_order": np.array(["../../..", "/etc"])}, "outside"),
    ({"camera_order": np.array([{"a": 1}], dtype=object)}, "plain arrays"),
    ({"resolutions": np.array([[0, 0]] * 2)}, "focal length"),
])  # fmt: skip
def test_hostile_fits_are_refused(data, tmp_path, change, says):
    src = tmp_path / "in"
    shutil.copytree(data, src)
    np.savez(src / "fit.npz", **{k: v for k, v in (make_fit() | change).items() if v is not None})
    with pytest.raises(UserError, match=says):
        run(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["nothing", "no pictures", "not an archive"])
def test_what_is_not_a_fit(data, tmp_path, what):
    src = tmp_path / "in"
    src.mkdir()
    if what == "no pictures":
        shutil.copy(data / "fit.npz", src)
    elif what == "not an archive":
        (src / "fit.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError):
        run(src, tmp_path / "out")
