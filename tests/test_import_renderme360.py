"""RenderMe-360: cameras, masks, FLAME, the raw and anno split, links and damage, on SMC files made here."""

import shutil

import h5py
import numpy as np
import pytest
import torch

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.data import renderme360
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import import_sources
from geodiff4d.data.importing import Choice, Report
from mini_datasets import make_renderme, performance

EVERYTHING = Choice()


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch):
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)


@pytest.fixture(scope="module")
def show():
    return performance(timesteps=2, width=120, height=100)


@pytest.fixture(scope="module")
def data(tmp_path_factory, show):
    return make_renderme(tmp_path_factory.mktemp("renderme"), show)


@pytest.fixture
def broken(data, tmp_path):
    shutil.copytree(data, tmp_path / "broken")
    return tmp_path / "broken"


def run(src, out, choice=EVERYTHING):
    report = Report()
    return import_sources(renderme360.read(src, choice, report), out, "renderme360", choice, report), report


@pytest.mark.parametrize("split", [True, False])
def test_it_reprojects(show, tmp_path, split):
    make_renderme(tmp_path / "data", show, split=split)
    (folder,), report = run(tmp_path / "data", tmp_path / "out")
    assert report.lines() == []
    clip = Clip(folder)
    assert (clip.timesteps, clip.camera_indices, clip.fps) == ([0, 1], [19, 25], 30.0)
    for i in range(len(clip)):
        frame = clip.frame(i)
        c = {25: 0, 19: 1}[frame.camera_index]
        torch.testing.assert_close(frame.camera.T_cam_world, show.cameras[c].T_cam_world, atol=1e-5, rtol=0)
        torch.testing.assert_close(frame.camera.K, show.cameras[c].K, atol=1e-3, rtol=0)
        torch.testing.assert_close(frame.image, show.images[frame.timestep, c], atol=0.01, rtol=0)
        points, depth = frame.camera.project(show.head.pose(show.params[frame.timestep]).vertices)
        assert (depth > 0).all()
        x, y = points.floor().long().unbind(-1)
        inside = (x >= 0) & (x < 120) & (y >= 0) & (y < 100)
        grown = torch.nn.functional.max_pool2d(frame.mask, 3, 1, 1)
        assert inside.float().mean() > 0.7
        assert grown[0, y[inside], x[inside]].mean() > 0.995


def test_flame_joins_by_frame(data, show, tmp_path):
    (folder,), _ = run(data, tmp_path / "out", Choice(limit=1))
    clip = Clip(folder)
    assert clip.head_name == "flame"
    assert clip.extra["participant"] == "0026"
    p = clip.params(0)
    assert (p.shape.shape, p.expr.shape) == ((300,), (100,))
    assert (float(p.shape[99]), float(p.shape[100]), float(p.expr[49]), float(p.expr[50])) == (0.25, 0, 0.5, 0)
    torch.testing.assert_close(p.translation, show.params.translation[0])


def test_one_file_finds_its_twin(data, tmp_path):
    (folder,), report = run(data / "0026_e3_raw.smc", tmp_path / "out", Choice(cameras=("25",)))
    assert report.lines() == []
    assert Clip(folder).camera_indices == [25]


def test_raw_alone_has_no_calibration(broken, tmp_path):
    (broken / "0026_e3_anno.smc").unlink()
    with pytest.raises(UserError, match=r"both the _raw\.smc and the _anno\.smc"):
        run(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_file(broken, tmp_path):
    whole = (broken / "0026_e3_raw.smc").read_bytes()
    (broken / "0026_e3_raw.smc").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"0026_e3_raw\.smc is not an SMC file that can be read \(truncated\)"):
        run(broken, tmp_path / "out")


def test_a_group_whose_index_is_damaged(broken, tmp_path):
    whole = (broken / "0026_e3_anno.smc").read_bytes()
    assert b"TREE" in whole, "HDF5's groups are B-trees"
    (broken / "0026_e3_anno.smc").write_bytes(whole.replace(b"TREE", b"EERT"))
    with pytest.raises(UserError, match=r"0026_e3_anno\.smc"):
        run(broken, tmp_path / "out")


def test_damaged_and_missing_frames_are_reported(broken, tmp_path):
    with h5py.File(broken / "0026_e3_raw.smc", "a") as raw:
        data = raw["Camera/25/color/1"][()]
        del raw["Camera/25/color/1"], raw["Camera/19/color/0"]
        raw["Camera/25/color/1"] = data[: len(data) // 2]
    with h5py.File(broken / "0026_e3_anno.smc", "a") as anno:
        del anno["Camera/19/mask/1"]
        del anno["FLAME/1/exp"]
    (folder,), report = run(broken, tmp_path / "out")
    clip = Clip(folder)
    assert [(r.timestep, r.camera_index, r.mask_path is not None) for r in clip.records] == [
        (0, 25, True),
        (1, 19, False),
    ]
    text = "\n".join(report.lines())
    for says in ("1 frames are missing (camera 19)", "left out: color is truncated", "no mask", "no usable FLAME"):
        assert says in text


def outside(tmp_path):
    """A file that no data set should be able to read."""
    with h5py.File(tmp_path / "secret.h5", "w") as secret:
        secret["0"] = np.frombuffer(b"secret", np.uint8)
    (tmp_path / "secret.bin").write_bytes(b"secret")


def external(raw, tmp_path):
    raw["Camera/25/color/1"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/0")


def soft(raw, tmp_path):
    raw["Camera/25/color/1"] = h5py.SoftLink("/Camera/25/color/0")


def storage(raw, tmp_path):
    raw.create_dataset("Camera/25/color/1", (6,), np.uint8, external=[(str(tmp_path / "secret.bin"), 0, 6)])


def virtual(raw, tmp_path):
    layout = h5py.VirtualLayout((6,), np.uint8)
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "0", (6,))
    raw.create_virtual_dataset("Camera/25/color/1", layout)


def bomb(raw, tmp_path):
    raw.create_dataset("Camera/25/color/1", (10**12,), np.uint8, chunks=(2**20,), compression="gzip")


@pytest.mark.parametrize("trick", [external, soft, storage, virtual, bomb])
def test_what_points_outside_is_refused(broken, tmp_path, trick):
    outside(tmp_path)
    with h5py.File(broken / "0026_e3_raw.smc", "a") as raw:
        del raw["Camera/25/color/1"]
        trick(raw, tmp_path)
    (folder,), report = run(broken, tmp_path / "out")
    assert len(Clip(folder)) == 3
    assert "bytes" in report.lines()[0] if trick is bomb else "refused" in report.lines()[0]


@pytest.mark.parametrize("says", ["NaN", "mirrored"])
def test_unsound_cameras_are_left_out(broken, tmp_path, says):
    with h5py.File(broken / "0026_e3_anno.smc", "a") as anno:
        RT = anno["Calibration/25/RT"]
        RT[0] = np.nan if says == "NaN" else -RT[0]
    (folder,), report = run(broken, tmp_path / "out")
    assert Clip(folder).camera_indices == [19]
    assert says in report.lines()[0]


def test_undistorted_pictures_obey_the_pinhole():
    """A dot drawn where a distorting lens shows a direction comes to lie where the pinhole does."""
    K = torch.tensor([[100.0, 0, 60], [0, 110, 50], [0, 0, 1]])
    camera, D = Camera(torch.eye(4), K, 120, 100), torch.tensor([-0.3, 0.05, 0.01, -0.02, 0.03])
    x, y = 0.35, -0.25
    r2 = x * x + y * y
    radial = 1 - 0.3 * r2 + 0.05 * r2**2 + 0.03 * r2**3
    seen_x = x * radial + 2 * 0.01 * x * y - 0.02 * (r2 + 2 * x * x)
    seen_y = y * radial + 0.01 * (r2 + 2 * y * y) + 2 * -0.02 * x * y
    rows, columns = torch.meshgrid(torch.arange(100) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    at = (columns - (100 * seen_x + 60)).square() + (rows - (110 * seen_y + 50)).square()
    image = torch.exp(-at / 4)[None]
    out = renderme360.undistorted(image, camera, D)[0]
    centre = (out * columns).sum() / out.sum(), (out * rows).sum() / out.sum()
    torch.testing.assert_close(torch.stack(centre), torch.tensor([100 * x + 60, 110 * y + 50]), atol=0.1, rtol=0)
