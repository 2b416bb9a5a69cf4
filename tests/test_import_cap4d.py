"""CAP4D's fit.npz: its own skinning, written here from its description, must land where the imported head does."""

import shutil

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.core.video import write_video
from geodiff4d.data import cap4d
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import ImportConfig, import_sources
from geodiff4d.data.importing import Choice, Report
from geodiff4d.heads import flame
from mini_tracks import make_head, save_png, share_inside, silhouette

W, H, STEPS = 64, 48, 3
NAMES = ("cam0", "side")
EVERYTHING = Choice()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_head(tmp_path_factory.mktemp("model"), "flame2023_no_jaw.pkl")


def turn(v) -> np.ndarray:
    return axis_angle_to_matrix(torch.as_tensor(np.asarray(v), dtype=torch.float64)).numpy()


def posed(fit: dict, a: dict, lids: np.ndarray, t: int) -> np.ndarray:
    """CAP4D's vertices in its world, OpenCV: joints turn without a chain, correctives stand at minus the identity."""
    v = a["v_template"] + a["shapedirs"][..., :150] @ fit["shape"] + a["shapedirs"][..., 300:364] @ fit["expr"][t, :64]
    joints = a["J_regressor"] @ v
    eye = turn(fit["eye_rot"][t])
    R = np.stack([turn(fit["neck_rot"][t]), np.eye(3), np.eye(3), eye, eye])
    away = R[[0, 2, 3, 4]] - 2 * np.eye(3)
    v = v + a["posedirs"] @ away.reshape(-1)
    moved = np.stack([(v - j) @ r.T + j for r, j in zip(R, joints, strict=True)], 1)
    v = (moved * a["weights"][..., None]).sum(1) + lids * fit["expr"][t, 64]
    return (v @ turn(fit["rot"][t]).T + fit["tra"][t]) * np.array([1, -1, -1])


def project(fit: dict, c: int, v: np.ndarray) -> torch.Tensor:
    cam = v @ fit["extr"][c, :3, :3].T + fit["extr"][c, :3, 3]
    K = np.array([[fit["fx"][c, 0], 0, fit["cx"][c, 0]], [0, fit["fy"][c, 0], fit["cy"][c, 0]], [0, 0, 1]])
    xyw = cam @ K.T
    return torch.from_numpy(xyw[:, :2] / xyw[:, 2:]).float()


def make_fit(seed: int = 0, shoulders: float = 0.0) -> dict[str, np.ndarray]:
    g = np.random.default_rng(seed)
    extr = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    extr[1, :3, :3] = turn([0, 0.25, 0.02])
    extr[1, :3, 3] = [-0.3, 0.02, 0.05]
    f = np.float32([[150.0], [160.0]])
    return {
        "fx": f, "fy": f, "cx": np.float32([[W / 2], [0.52 * W]]), "cy": np.float32([[H / 2], [0.47 * H]]),
        "extr": extr, "shape": g.normal(size=150).astype("f4"), "expr": 0.5 * g.normal(size=(STEPS, 65)).astype("f4"),
        "rot": 0.3 * g.normal(size=(STEPS, 3)).astype("f4"), "eye_rot": 0.2 * g.normal(size=(STEPS, 3)).astype("f4"),
        "neck_rot": shoulders * g.normal(size=(STEPS, 3)).astype("f4"),
        "tra": np.float32([0.01, -0.02, -1.1]) + 0.02 * g.normal(size=(STEPS, 3)).astype("f4"),
        "camera_order": np.array(NAMES), "fps": np.array(30), "resolutions": np.array([[H, W]] * 2),
        "valid_mask": np.ones((2, STEPS), bool), "error": np.array(2.1),
    }  # fmt: skip


def write(folder, fit, model):
    head, a = model
    lids = head.eyelid_basis.sum(-1).double().numpy()
    folder.mkdir(parents=True)
    np.savez(folder / "fit.npz", **fit)
    faces = head.faces
    for c, name in enumerate(NAMES):
        K = torch.eye(3)
        K[0, 0], K[1, 1], K[0, 2], K[1, 2] = (float(fit[k][c, 0]) for k in ("fx", "fy", "cx", "cy"))
        camera = cap4d.Camera(torch.from_numpy(fit["extr"][c]), K, W, H)
        for t in range(STEPS):
            mask = silhouette(torch.from_numpy(posed(fit, a, lids, t)).float(), faces, camera)
            # Names say nothing: their order does.
            save_png(folder / f"images/{name}/{10 + 7 * t:08d}.png", mask * (0.2 + 0.2 * t) * torch.ones(3, 1, 1))
            save_png(folder / f"bg/{name}/{t:04d}.png", mask)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, model):
    return write(tmp_path_factory.mktemp("cap4d") / "felix", make_fit(), model)


@pytest.fixture(autouse=True)
def only_our_model(monkeypatch, model):
    """Heads are found by what was loaded: here ours, unless a test forgets it."""
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)
    path = next(p for p in flame._loaded if "no_jaw" in p.name)
    monkeypatch.setattr(flame, "_loaded", [path])


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
        monkeypatch.setattr(flame, "_loaded", [])
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
    (folder,), report = run(write(tmp_path / "in", fit, model), tmp_path / "out")
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
    monkeypatch.setattr(flame, "_loaded", [])
    _, report = run(write(tmp_path / "in", make_fit(1, shoulders=0.3), model), tmp_path / "out")
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


@pytest.mark.parametrize(("change", "says"), [
    ({"extr": np.full((2, 4, 4), np.nan)}, "NaN"),
    ({"extr": np.tile(np.diag([-1.0, 1, 1, 1]), (2, 1, 1))}, "mirrored"),
    ({"fx": np.float32([[0.0], [1.0]])}, "focal"),
    ({"rot": np.full((STEPS, 3), np.inf)}, "rot has NaN"),
    ({"rot": np.zeros((STEPS, 4))}, "do not fit"),
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
