"""SynthHuman: the face subset from folders and archives, normals' axes, and bad input, on samples made here."""

import shutil
import zipfile

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.data import synthhuman
from geodiff4d.data.clip import Clip
from geodiff4d.data.exr import read_exr
from geodiff4d.data.importer import import_sources
from geodiff4d.data.importing import Choice, Report
from mini_datasets import make_synthhuman, performance

EVERYTHING = Choice()


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch):
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)


@pytest.fixture(scope="module")
def show():
    return performance(timesteps=2, width=96, height=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory, show):
    return make_synthhuman(tmp_path_factory.mktemp("synthhuman"), show)


@pytest.fixture
def broken(data, tmp_path):
    shutil.copytree(data, tmp_path / "broken")
    return tmp_path / "broken"


def zipped(folder, archive, prefix="part/"):
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.iterdir()):
            file.write(path, prefix + path.name)
    return archive


def run(src, out, choice=EVERYTHING):
    report = Report()
    return import_sources(synthhuman.read(src, choice, report), out, "synthhuman", choice, report), report


def check(folder, show):
    clip = Clip(folder)
    assert clip.timesteps == [0, 1, 2, 3]
    assert clip.extra["stills"] is True
    for i in range(len(clip)):
        frame = clip.frame(i)
        t, c = divmod(frame.timestep, 2)
        assert frame.params is None
        torch.testing.assert_close(frame.camera.K, show.cameras[c].K, atol=1e-3, rtol=0)
        # The camera is the origin: seen from it, the head stands where the pictures show it.
        world = show.head.pose(show.params[t]).vertices
        from geodiff4d.core.geometry import transform

        points, depth = frame.camera.project(transform(show.cameras[c].T_cam_world, world))
        assert (depth > 0).all()
        x, y = points.floor().long().unbind(-1)
        inside = (x >= 0) & (x < 96) & (y >= 0) & (y < 128)
        grown = torch.nn.functional.max_pool2d(frame.mask, 3, 1, 1)
        assert grown[0, y[inside], x[inside]].mean() > 0.995
        agree = (frame.normal * show.normals[t, c]).sum(0)[frame.mask[0] > 0.5]
        assert agree.mean() > 0.999
        assert (frame.normal[2][frame.mask[0] > 0.5] > 0).float().mean() > 0.98


def test_folder(data, show, tmp_path):
    (folder,), report = run(data, tmp_path / "out")
    assert report.lines() == ["1 samples are not of the face subset and were left out"]
    assert folder.name == "faces_0000000"
    check(folder, show)


def test_archive(data, show, tmp_path):
    archive = zipped(data, tmp_path / "synthhuman_00.zip")
    (folder,), _ = run(archive, tmp_path / "out")
    check(folder, show)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "synthhuman_00.zip"]


def test_the_other_channel_order_reads_the_same(data, show, tmp_path):
    """Were x stored as R instead of B, the clip would not differ."""
    import OpenEXR

    shutil.copytree(data, tmp_path / "rgb")
    for path in (tmp_path / "rgb").glob("*.exr"):
        b, g, r = (np.ascontiguousarray(p.numpy().astype(np.float16)) for p in read_exr(path))
        OpenEXR.File({"type": OpenEXR.scanlineimage}, {"R": r, "G": g, "B": b}).write(str(path))
    (folder,), report = run(tmp_path / "rgb", tmp_path / "out")
    assert len(report) == 1
    check(folder, show)


def test_limit_counts_pictures_and_resumes(data, tmp_path):
    (folder,), _ = run(data, tmp_path / "out", Choice(limit=3))
    assert Clip(folder).timesteps == [0, 1, 2]
    run(data, tmp_path / "out")
    assert Clip(folder).timesteps == [0, 1, 2, 3]


def test_bad_samples_are_reported(broken, tmp_path):
    exr = broken / "normal_0000000.exr"
    exr.write_bytes(exr.read_bytes()[: exr.stat().st_size // 2])
    (broken / "normal_0000001.exr").unlink()
    (broken / "cam_0000001.txt").write_text("nan 0 1\n0 1 1\n0 0 1\n")
    (broken / "cam_0000002.txt").unlink()
    (broken / "alpha_0000003.png").write_bytes(b"\x89PNG")
    (folder,), report = run(broken, tmp_path / "out")
    clip = Clip(folder)
    assert [(r.timestep, r.mask_path is None, r.normal_path is None) for r in clip.records] == [
        (0, False, True),
        (3, True, False),
    ]
    text = "\n".join(report.lines())
    for says in ("truncated or not an EXR", "NaN", "without camera", "alpha left out"):
        assert says in text


def test_bad_archives(data, tmp_path):
    archive = zipped(data, tmp_path / "a.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.zip is truncated or not a zip"):
        run(archive, tmp_path / "out")
    escaping = zipped(data, tmp_path / "b.zip", prefix="../")
    with pytest.raises(UserError, match="no SynthHuman pictures"):
        run(escaping, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_damage_inside_an_archive(data, tmp_path):
    archive = zipped(data, tmp_path / "a.zip")
    whole = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        at = file.getinfo("part/rgb_0000002.png").header_offset + 200
    whole[at : at + 20] = bytes(20)
    archive.write_bytes(whole)
    (folder,), report = run(archive, tmp_path / "out")
    assert Clip(folder).timesteps == [0, 1, 3]
    assert any("damaged" in line for line in report.lines())


def test_not_the_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no SynthHuman pictures"):
        run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
