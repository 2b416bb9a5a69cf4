"""Pixel3DMM's results: .frame files as torch writes them; projection by the tracker's own formula; hostile pickles."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.core.images import encode_normals
from geodiff4d.data import pixel3dmm
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import ImportConfig, import_sources
from geodiff4d.data.importing import Choice, Report
from geodiff4d.heads import flame
from geodiff4d.heads.rig import HeadParams
from mini_tracks import make_head, save_png, share_inside

SIDE, TRACKED, STEPS = 96, 48, 3
FOLDER = "clip_01_nV1_noPho_uv2000.0_n1000.0"
EVERYTHING = Choice()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return make_head(tmp_path_factory.mktemp("model"), "flame2020.pkl")[0]


def six(angles) -> np.ndarray:
    return axis_angle_to_matrix(torch.as_tensor(angles, dtype=torch.float32))[..., :2, :].reshape(1, -1).numpy()


def draw(t: int) -> dict[str, np.ndarray]:
    """Random axis-angles and coefficients of one timestep."""
    g = np.random.default_rng(t)
    same = np.random.default_rng(77)
    return {
        "shape": 0.5 * same.normal(size=300), "exp": 0.5 * g.normal(size=100), "R": 0.25 * g.normal(size=3),
        "t": np.array([0.02, -0.01, 0.0]) + 0.02 * g.normal(size=3), "neck": 0.2 * g.normal(size=3),
        "jaw": 0.2 * g.normal(size=3), "eyes": 0.2 * g.normal(size=(2, 3)), "eyelids": g.random(2),
        "fl": np.array([[2.6]]), "pp": np.array([[0.03, -0.02]]), "t_base": np.array([[0.01, 0.02, -1.0]]),
        "R_base": axis_angle_to_matrix(torch.tensor([0.02, -0.05, 0.01])).numpy(),
    }  # fmt: skip


def as_frame(d: dict, t: int) -> dict:
    """The tracker's dictionary, key by key."""

    def f(x, *shape):
        return np.asarray(x, np.float32).reshape(*shape)

    return {
        "flame": {
            "exp": f(d["exp"], 1, 100), "shape": f(d["shape"], 1, 300), "eyes": f(six(d["eyes"]), 1, 12),
            "eyelids": f(d["eyelids"], 1, 2), "jaw": six(d["jaw"]), "neck": six(d["neck"]), "R": six(d["R"]),
            "R_rotation_matrix": axis_angle_to_matrix(torch.tensor(d["R"])).float()[None].numpy(), "t": f(d["t"], 1, 3),
        },
        "img_size": np.array([TRACKED, TRACKED]), "frame_id": t, "global_step": 200 * t,
        "camera": {"R_base_0": f(d["R_base"], 1, 3, 3), "t_base_0": f(d["t_base"], 1, 3), "fl": f(d["fl"], 1, 1),
                   "pp": f(d["pp"], 1, 2)},
        "joint_transforms": np.zeros((1, 5, 4, 4), np.float32),
    }  # fmt: skip


def mesh(head, d: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The posed vertices before and after the global motion, which is about the origin."""
    zero = torch.zeros(3)
    p = {k: torch.from_numpy(np.asarray(d[k], np.float32)) for k in ("shape", "exp", "neck", "jaw", "eyes", "eyelids")}
    params = HeadParams(
        p["shape"], p["exp"], zero, p["neck"], p["jaw"], p["eyes"].flatten(), zero, eyelids=p["eyelids"]
    )
    v = head.pose(params).vertices
    R = axis_angle_to_matrix(torch.tensor(d["R"])).float()
    return v, v @ R.T + torch.from_numpy(d["t"]).float()


def screen(d: dict, world: torch.Tensor) -> torch.Tensor:
    """The tracker's project_points_screen_space, by its description: pixel indices of the tracked size."""
    cam = world.double() @ torch.from_numpy(d["R_base"]).double().T + torch.from_numpy(d["t_base"][0])
    K = torch.eye(3, dtype=torch.float64)
    K[0, 0] = K[1, 1] = float(d["fl"][0, 0]) * TRACKED
    K[:2, 2] = TRACKED / 2 + 0.5 + torch.from_numpy(d["pp"][0]) * (TRACKED / 2 + 0.5)
    K[0, 2] = TRACKED - K[0, 2]
    flat = -((cam / -cam[:, 2:]) @ K.T)[:, :2]
    return torch.stack([TRACKED - 1 - flat[:, 0], flat[:, 1]], -1).float()


def painted(xy: torch.Tensor) -> torch.Tensor:
    """A mask with every pixel in which a point falls, and its neighbours."""
    mask = torch.zeros(1, SIDE, SIDE)
    x, y = xy.round().long().clamp(0, SIDE - 1).unbind(-1)
    mask[0, y, x] = 1
    return torch.nn.functional.max_pool2d(mask, 5, 1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory, head):
    """TRACKING and PREPROCESSED side by side, as the environment file of the real thing suggests."""
    root = tmp_path_factory.mktemp("pixel3dmm")
    results, pictures = root / f"tracking/{FOLDER}", root / "preprocessed/clip_01"
    (results / "checkpoint").mkdir(parents=True)
    for t in range(STEPS):
        d = draw(t)
        torch.save(as_frame(d, t), results / f"checkpoint/{t:05d}.frame")
        _, world = mesh(head, d)
        mask = painted((screen(d, world) + 0.5) * SIDE / TRACKED - 0.5)
        save_png(pictures / f"cropped/{t:05d}.png", mask * (0.2 + 0.2 * t) * torch.ones(3, 1, 1))
        save_png(pictures / f"seg_og/{t:05d}.png", mask * 13 / 255)
        # All of the face looks along FLAME's +z.
        forward = torch.tensor([0.0, 0.0, 1.0])[:, None, None] * torch.ones_like(mask)
        save_png(pictures / f"p3dmm/normals/{t:05d}.png", encode_normals(forward, torch.ones_like(mask)))
    return root


@pytest.fixture(autouse=True)
def only_our_model(monkeypatch, head):
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)
    monkeypatch.delenv(pixel3dmm.ENVIRONMENT, raising=False)
    monkeypatch.setattr(flame, "_loaded", [p for p in flame._loaded if p.name == "flame2020.pkl"][-1:])


def run(src, out, choice=EVERYTHING):
    report = Report()
    sources = pixel3dmm.read(src, choice, report)
    return import_sources(sources, out, f"pixel3dmm {src}", choice, report, ImportConfig()), report


@pytest.mark.parametrize("known", [True, False])
def test_it_reprojects(data, head, tmp_path, known, monkeypatch):
    if not known:
        monkeypatch.setattr(flame, "_loaded", [])
    (folder,), report = run(data / "tracking" / FOLDER, tmp_path / "out")
    assert len(report) == (0 if known else 1)
    clip = Clip(folder)
    assert clip.head_name == "flame2020" and len(clip) == STEPS and clip.extra["sequence"] == "clip_01"
    for t in range(STEPS):
        frame, d = clip.frame(t), draw(t)
        xy, depth = frame.camera.project(head.pose(frame.params).vertices)
        # Pixel indices count from the first pixel's centre, ours from its edge.
        expected = (screen(d, mesh(head, d)[1]) + 0.5) * SIDE / TRACKED
        assert (depth > 0).all() and (xy - expected).abs().max() < 2e-2
        assert share_inside(xy, frame.mask) > 0.99
        assert frame.image[:, frame.mask[0] > 0.5].mean() == pytest.approx(0.2 + 0.2 * t, abs=0.01)
        # What looks along the head's +z is seen by the camera as the third axis of its turn, in OpenGL's axes.
        R = torch.from_numpy(d["R_base"]) @ axis_angle_to_matrix(torch.tensor(d["R"])).float()
        normal = frame.normal[:, frame.mask[0] > 0.5]
        assert (normal - R[:, 2:]).abs().max() < 0.02 and (frame.normal[:, frame.mask[0] < 0.5] == 0).all()
    cameras = torch.stack([r.camera.T_cam_world for r in clip.records])
    assert (cameras.std(0).max() < 1e-6) == known


def test_pictures_are_found_by_the_environment_or_not_at_all(data, tmp_path, monkeypatch):
    shutil.copytree(data / "tracking" / FOLDER, tmp_path / "elsewhere/deep" / FOLDER)
    src = tmp_path / "elsewhere/deep" / FOLDER / "checkpoint"
    with pytest.raises(UserError, match="PIXEL3DMM_PREPROCESSED_DATA"):
        run(src, tmp_path / "out")
    monkeypatch.setenv(pixel3dmm.ENVIRONMENT, str(data / "preprocessed"))
    (folder,), _ = run(src, tmp_path / "out", Choice(every=2))
    assert Clip(folder).timesteps == [0, 2]


def test_resume_and_several(data, tmp_path, monkeypatch):
    real, seen = pixel3dmm.read_image, []

    def dying(path, mode="RGB"):
        seen.append(path)
        if len(seen) > 4:
            raise KeyboardInterrupt
        return real(path, mode)

    monkeypatch.setattr(pixel3dmm, "read_image", dying)
    with pytest.raises(KeyboardInterrupt):
        run(data / "tracking", tmp_path / "out")
    assert len(Clip(tmp_path / "out" / FOLDER)) == 1
    seen.clear()
    monkeypatch.setattr(pixel3dmm, "read_image", lambda path, mode="RGB": seen.append(path) or real(path, mode))
    (folder,), _ = run(data / "tracking", tmp_path / "out")
    assert len(Clip(folder)) == 3 and len(seen) == 6


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/geodiff4d_was_run",)


@pytest.mark.parametrize("damage", ["evil", "tensor", "cut", "nan", "zero rotation", "no camera", "list", "bomb"])
def test_hostile_frames_are_left_out_and_nothing_runs(data, tmp_path, damage, monkeypatch):
    shutil.copytree(data, tmp_path / "in")
    src = tmp_path / "in/tracking" / FOLDER
    path = src / "checkpoint/00001.frame"
    frame = as_frame(draw(1), 1)
    if damage == "evil":
        torch.save(frame | {"x": Evil()}, path)
    elif damage == "tensor":
        torch.save(frame | {"flame": {"exp": torch.zeros(1, 100)}}, path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "nan":
        frame["flame"]["t"][0, 0] = np.nan
        torch.save(frame, path)
    elif damage == "zero rotation":
        frame["flame"]["jaw"][:] = 0
        torch.save(frame, path)
    elif damage == "no camera":
        del frame["camera"]
        torch.save(frame, path)
    elif damage == "list":
        torch.save([1, 2], path)
    else:
        monkeypatch.setattr(pixel3dmm, "MAX_FRAME_BYTES", 100_000)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", b"\0" * 200_000)
    (folder,), report = run(src, tmp_path / "out")
    assert Clip(folder).timesteps == [0, 2] and len(report) == 1, report.lines()
    assert not os.path.exists("/tmp/geodiff4d_was_run")


def test_missing_parts_are_reported(data, tmp_path):
    shutil.copytree(data, tmp_path / "in")
    pictures = tmp_path / "in/preprocessed/clip_01"
    (pictures / "cropped/00000.png").unlink()
    (pictures / "seg_og/00001.png").unlink()
    shutil.rmtree(pictures / "p3dmm")
    (folder,), report = run(tmp_path / "in/tracking" / FOLDER, tmp_path / "out")
    clip = Clip(folder)
    assert clip.timesteps == [1, 2] and [r.mask_path is None for r in clip.records] == [True, False]
    assert all(r.normal_path is None for r in clip.records)
    lines = " | ".join(report.lines())
    for words in ("no picture", "no seg_og", "no p3dmm/normals"):
        assert words in lines, words


def test_what_is_not_a_result(tmp_path):
    with pytest.raises(UserError, match="checkpoint"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "a_nV1/checkpoint").mkdir(parents=True)
    (tmp_path / "a/cropped").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint/00000\.frame"):
        run(tmp_path / "a_nV1", tmp_path / "out")
