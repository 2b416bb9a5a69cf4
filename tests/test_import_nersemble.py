"""NeRSemble v2: calibration, colours, backgrounds, joins, resuming and bad input, on a data set made here."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import encode_normals, read_image
from geodiff4d.data import nersemble
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import ImportConfig, import_sources
from geodiff4d.data.importing import Choice, Report
from geodiff4d.data.joins import Joins
from geodiff4d.data.sheet import GAP, TILE
from mini_datasets import COLOUR_MATRIX, make_nersemble, performance, write_by_frame, write_params

NAME = "017_EXP-1-head"


@pytest.fixture(scope="module")
def show():
    return performance()


@pytest.fixture(scope="module")
def data(tmp_path_factory, show):
    """The data set, and beside it masks, normals and head parameters by frame."""
    root = tmp_path_factory.mktemp("data")
    make_nersemble(root / "nersemble", show, COLOUR_MATRIX)
    # Camera indices are places in the serial order: 8 and 3.
    for name, values in (("masks", show.masks), ("normals", encode_normals(show.normals, show.masks))):
        write_by_frame(root / name, values)
        for old in sorted((root / name).iterdir()):
            old.rename(old.with_name(old.name.replace("_00", "_08").replace("_01", "_03")))
    write_params(root / "params", show.params)
    return root


EVERYTHING = Choice()


@pytest.fixture(autouse=True)
def no_sheets(request, monkeypatch):
    """Drawing contact sheets is most of an import this small; one test looks at one."""
    if "sheet" not in request.node.name:
        monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)


def run(src, out, choice=EVERYTHING, **config):
    report = Report()
    sources = nersemble.read(src, choice, report)
    return import_sources(sources, out, f"nersemble {src}", choice, report, ImportConfig(**config)), report


def test_it_reprojects(data, show, tmp_path):
    joins = Joins(data / "masks", data / "normals", data / "params")
    (folder,), report = run(data / "nersemble", tmp_path / "out", joins=joins)
    assert report.lines() == []
    assert folder == tmp_path / "out" / NAME
    clip = Clip(folder)
    assert (clip.timesteps, clip.camera_indices) == ([0, 1, 2], [3, 8])
    assert clip.extra["participant"] == "017"
    for i in range(len(clip)):
        frame = clip.frame(i)
        c = {8: 0, 3: 1}[frame.camera_index]
        points, depth = frame.camera.project(show.head.pose(frame.params).vertices)
        assert (depth > 0).all()
        x, y = points.floor().long().unbind(-1)
        inside = (x >= 0) & (x < 110) & (y >= 0) & (y < 160)
        within_a_pixel = torch.nn.functional.max_pool2d(frame.mask, 3, 1, 1)
        assert inside.float().mean() > 0.9
        assert within_a_pixel[0, y[inside], x[inside]].mean() > 0.995
        # The picture's foreground is where the head is: it is brighter than the blue background.
        seen = frame.image[0] > 0.3
        assert (seen == (frame.mask[0] > 0.5)).float().mean() > 0.97
        assert (frame.normal[2][frame.mask[0] > 0.5] > 0).float().mean() > 0.98
        error = (frame.normal * show.normals[frame.timestep, c]).sum(0)[frame.mask[0] > 0.5]
        assert error.mean() > 0.999


def test_sheet(data, show, tmp_path):
    """The pose map lies on the picture: where it is drawn, the picture is the head."""
    joins = Joins(data / "masks", data / "normals", data / "params")
    report = Report()
    sources = nersemble.read(data / "nersemble", EVERYTHING, report)
    (folder,) = import_sources(sources, tmp_path, "x", EVERYTHING, report, ImportConfig(joins=joins), show.head)
    sheet = read_image(folder / "sheet.png")
    assert sheet.shape == (3, 6 * (TILE + GAP), 4 * (TILE + GAP))
    tiles = [sheet[:, :TILE, i * (TILE + GAP) + 35 : i * (TILE + GAP) + 189] for i in range(4)]
    image, mask, normal, over = tiles
    head = mask[0] > 0.5
    assert (((over - image).abs().sum(0) > 0.1) == head).float().mean() > 0.97
    assert (((normal - 0.5).abs().sum(0) > 0.2) == head).float().mean() > 0.97
    # It is written last: an import that was killed before goes on with it.
    (folder / "sheet.png").unlink()
    import_sources(sources, tmp_path, "x", EVERYTHING, report, ImportConfig(joins=joins), show.head)
    assert torch.equal(read_image(folder / "sheet.png"), sheet)


def test_parameters_that_are_no_persons_are_refused(data, show, tmp_path):
    """Imported, they would make a clip that nothing can read."""
    shutil.copytree(data / "params", tmp_path / "params")
    path = next(iter(sorted((tmp_path / "params").glob("*.npz"))))
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"jaw_pose": np.full_like(arrays["jaw_pose"], np.nan)}))
    report, joins = Report(), Joins(params=tmp_path / "params")
    sources = nersemble.read(data / "nersemble", EVERYTHING, report)
    with pytest.raises(UserError, match=r"timestep 0: jaw_pose has NaN"):
        import_sources(sources, tmp_path / "out", "x", EVERYTHING, report, ImportConfig(joins=joins), show.head)
    assert not (tmp_path / "out").exists()


def test_colours_are_corrected(data, show, tmp_path):
    (folder,), _ = run(data / "nersemble", tmp_path / "out")
    clip = Clip(folder)
    first = next(i for i, r in enumerate(clip.records) if (r.timestep, r.camera_index) == (0, 8))
    core = show.masks[0, 0, 0] > 0.5
    true = show.images[0, 0][:, core].mean(1)
    torch.testing.assert_close(clip.frame(first).image[:, core].mean(1), true, atol=0.02, rtol=0)
    background = read_image(folder / "backgrounds/08.png")
    torch.testing.assert_close(background.mean((1, 2)), torch.tensor([0.1, 0.2, 0.35]), atol=0.02, rtol=0)


def test_every_polynomial_is_the_papers():
    """Against the values of colour-science's own tests for one colour."""
    rgb = torch.tensor([0.17224810, 0.09170660, 0.06416938])
    known = {
        4: [1.0],
        5: [0.00101364, 1.0],
        7: [0.01579629, 0.01105305, 0.00588476, 1.0],
        10: [0.01579629, 0.01105305, 0.00588476, 0.02966941, 0.00841010, 0.00411771, 1.0],
    }
    for terms, powers in nersemble.TERMS.items():
        assert len(powers) == terms == len(set(powers))
        values = torch.tensor([float((rgb ** torch.tensor(p)).prod()) for p in powers])
        torch.testing.assert_close(values[:3], rgb)
        if terms in known:
            torch.testing.assert_close(values[3:], torch.tensor(known[terms]), atol=1e-7, rtol=1e-5)


def test_size_scales_the_camera(data, show, tmp_path):
    (folder,), _ = run(data / "nersemble", tmp_path / "out", size=80)
    clip = Clip(folder)
    camera = clip.records[0].camera
    assert (camera.width, camera.height) == (55, 80)
    torch.testing.assert_close(camera.K[0], show.cameras[0].K[0] / 2, atol=1e-3, rtol=0)


def test_choice(data, tmp_path):
    (folder,), _ = run(data / "nersemble", tmp_path / "a", Choice(every=2, cameras=("222200037",)))
    clip = Clip(folder)
    assert (clip.timesteps, clip.camera_indices) == ([0, 2], [8])
    assert clip.fps == pytest.approx(36.5)
    with pytest.raises(UserError, match=r"no clip that matches 018"):
        run(data / "nersemble", tmp_path / "b", Choice(only=("018*",)))
    assert not (tmp_path / "b").exists()


def test_killed_and_resumed(data, tmp_path):
    """What was there stays byte for byte, only the rest is read, and the result is the uninterrupted one."""
    joins = Joins(data / "masks", None, data / "params")
    (whole,), _ = run(data / "nersemble", tmp_path / "whole", joins=joins)

    class Killed(BaseException):
        pass

    def dying(items, description, total):
        for i, item in enumerate(items):
            if i == 4:
                raise Killed
            yield item

    choice, report = Choice(), Report()
    src, out = data / "nersemble", tmp_path / "out"
    config = ImportConfig(joins=joins)
    sources = nersemble.read(src, choice, report)
    with pytest.raises(Killed):
        import_sources(sources, out, f"nersemble {src}", choice, report, config, progress=dying)
    folder = out / NAME
    assert len(Clip(folder)) == 4
    # A kill that nobody could catch: no transforms.json, half a journal line, half a picture.
    (folder / "transforms.json").unlink()
    with (folder / "import.jsonl").open("a") as journal:
        journal.write('{"frame": {"timestep_ind')
    (folder / "images/.00002_08.png.part").write_bytes(b"half")
    times = {p: p.stat().st_mtime_ns for p in (folder / "images").glob("[0-9]*.png")}
    run(src, out, joins=joins)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert not list(folder.rglob("*.part"))
    assert len(Clip(folder)) == 6
    ours, theirs = (json.loads((f / "transforms.json").read_text())["frames"] for f in (folder, whole))
    assert ours == theirs


def test_a_larger_limit_adds(data, tmp_path):
    (folder,), _ = run(data / "nersemble", tmp_path / "out", Choice(limit=1))
    assert len(Clip(folder)) == 2
    run(data / "nersemble", tmp_path / "out", Choice(limit=2))
    assert Clip(folder).timesteps == [0, 1]
    with pytest.raises(UserError, match=r"another import \(size was None, is 64\)"):
        run(data / "nersemble", tmp_path / "out", size=64)
    assert Clip(folder).timesteps == [0, 1]


def test_whose_parameters(data, show, tmp_path):
    """The clip says the head that the user named, and parameters of another do not pass for it."""
    joins = Joins(params=data / "params")
    (folder,), _ = run(data / "nersemble", tmp_path / "a", joins=joins, head="openhead")
    assert Clip(folder).head_name == "openhead"
    report = Report()
    sources = nersemble.read(data / "nersemble", EVERYTHING, report)
    other = replace(show.head, name="other", expr_basis=show.head.expr_basis[..., :10], gaze=None)
    config = ImportConfig(joins=joins, head="other")
    with pytest.raises(
        UserError, match=r"not other's: expected 64 shape and 10 expression coefficients, got 64 and 52"
    ):
        import_sources(sources, tmp_path / "b", "x", EVERYTHING, report, config, other)
    assert not (tmp_path / "b").exists()


def test_an_unrelated_folder_is_not_touched(data, tmp_path):
    (tmp_path / "out" / NAME).mkdir(parents=True)
    (tmp_path / "out" / NAME / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not this import"):
        run(data / "nersemble", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / NAME).iterdir()] == ["thesis.txt"]


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data set to break."""
    shutil.copytree(data / "nersemble", tmp_path / "broken")
    return tmp_path / "broken"


def edit(path: Path, change):
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_truncated_video(broken, tmp_path):
    """One camera's header is lost, and the import goes on without it; without any, it is one clear line."""
    videos = sorted((broken / "017/sequences/EXP-1-head/images").iterdir())
    videos[0].write_bytes(videos[0].read_bytes()[:300])
    (folder,), report = run(broken, tmp_path / "out")
    assert Clip(folder).camera_indices == [3]
    assert any("cannot be decoded" in line for line in report.lines())
    videos[1].write_bytes(videos[1].read_bytes()[:300])
    with pytest.raises(UserError, match="no camera that can be read"):
        run(broken, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_video_that_ends_early(broken, tmp_path):
    from geodiff4d.core.video import read_video, write_video

    video = broken / "017/sequences/EXP-1-head/images/cam_222200037.mp4"
    write_video(video, list(read_video(video, 2)), 73.0)
    (folder,), report = run(broken, tmp_path / "out")
    assert len(Clip(folder)) == 5
    assert report.lines() == [f"{NAME}: a video ends early, 1 frames are missing (camera 222200037)"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda T: [[float("nan")] * 4, *T[1:]], "NaN or infinite"),
        (lambda T: [[-v for v in T[0]], *T[1:]], "mirrored"),
        (lambda T: [*[[3 * v for v in row] for row in T[:3]], T[3]], "scaled or sheared"),
    ],
)
def test_unsound_cameras_are_left_out(broken, tmp_path, change, says):
    def spoil(meta):
        meta["world_2_cam"]["222200037"] = change(meta["world_2_cam"]["222200037"])

    edit(broken / "017/calibration/camera_params.json", spoil)
    (folder,), report = run(broken, tmp_path / "out")
    assert Clip(folder).camera_indices == [3]
    assert any(says in line for line in report.lines())


def test_missing_calibration(broken, tmp_path):
    edit(broken / "017/calibration/camera_params.json", lambda m: m["world_2_cam"].pop("222200037"))
    (broken / "017/calibration/color_calibration.json").unlink()
    (folder,), report = run(broken, tmp_path / "out")
    assert Clip(folder).camera_indices == [3]
    assert any("without calibration" in line for line in report.lines())
    assert any("no colour calibration" in line for line in report.lines())
    (broken / "017/calibration/camera_params.json").unlink()
    with pytest.raises(UserError, match=r"camera_params\.json does not exist"):
        run(broken, tmp_path / "none")


def test_joined_files_that_are_wrong(data, show, tmp_path):
    """Missing, broken and upside-down files become warnings; the frames are kept."""
    shutil.copytree(data / "masks", tmp_path / "masks")
    (tmp_path / "masks/00001_08.png").unlink()
    (tmp_path / "masks/00002_08.png").write_bytes(b"not a picture")
    down = show.normals * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    write_by_frame(tmp_path / "normals", encode_normals(down, show.masks))
    for old in sorted((tmp_path / "normals").iterdir()):
        old.rename(old.with_name(old.name.replace("_00", "_08").replace("_01", "_03")))
    joins = Joins(tmp_path / "masks", tmp_path / "normals")
    (folder,), report = run(data / "nersemble", tmp_path / "out", joins=joins)
    assert len(Clip(folder)) == 6
    text = "\n".join(report.lines())
    assert f"({NAME}/00001_08)" in text
    assert "mask left out" in text
    assert "y points down" in text
    assert (tmp_path / "out/import_report.json").exists()


def test_normals_of_any_kind(show, tmp_path):
    """NPY in either layout reads as PNG does."""
    from geodiff4d.data.joins import axes_of, find, read_normals

    normal = show.normals[0, 0]
    np.save(tmp_path / "00000.npy", normal.numpy())
    np.save(tmp_path / "00001.npy", normal.permute(1, 2, 0).numpy())
    for t in (0, 1):
        path = find(tmp_path, t, 0, "", True)
        torch.testing.assert_close(read_normals(path), normal, atol=1e-5, rtol=0)
    assert axes_of(normal, show.masks[0, 0]) == ""
    assert "left" in axes_of(normal * torch.tensor([-1.0, 1.0, 1.0])[:, None, None], show.masks[0, 0])
    assert "away" in axes_of(-normal, show.masks[0, 0])
    assert "not the axis" in axes_of(normal.flip(0), show.masks[0, 0])


def test_camera_checks_are_exact(show):
    from geodiff4d.data.importing import camera_checked

    camera = show.cameras[1]
    same = camera_checked(camera.T_cam_world, camera.K, camera.width, camera.height, "here")
    torch.testing.assert_close(same.T_cam_world, camera.T_cam_world)
    assert replace(camera, T_cam_world=same.T_cam_world, K=same.K).width == same.width
