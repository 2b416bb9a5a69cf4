"""VHAP exports: read with every convention checked by reprojection, written, and read again; bad ones refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from geodiff4d.cli import main
from geodiff4d.core.errors import UserError
from geodiff4d.data import vhap
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import ImportConfig, import_sources
from geodiff4d.data.importing import Choice, Report
from mini_tracks import VERTS, make_head, share_inside
from mini_vhap import STEPS, camera, make_vhap, params

EVERYTHING = Choice()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return make_head(tmp_path_factory.mktemp("model"), "flame2023.pkl")[0]


@pytest.fixture(scope="module")
def export(head, tmp_path_factory):
    return make_vhap(tmp_path_factory.mktemp("vhap") / "074_EMO-1", head)


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch):
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)


def run(src, out, choice=EVERYTHING, **config):
    report = Report()
    sources = vhap.read(src, choice, report)
    return import_sources(sources, out, f"vhap {src}", choice, report, ImportConfig(**config)), report


def assert_reprojects(clip, head, least=0.97):
    for i in range(len(clip)):
        frame = clip.frame(i)
        xy, depth = frame.camera.project(head.pose(frame.params).vertices)
        assert (depth > 0).all() and share_inside(xy, frame.mask) > least


def test_it_reprojects(export, head, tmp_path):
    (folder,), report = run(export, tmp_path / "out")
    assert report.lines() == [] and folder == tmp_path / "out"
    clip = Clip(folder)
    assert clip.extra["participant"] == "074"
    assert clip.head_name == "flame" and (clip.timesteps, clip.camera_indices) == ([0, 1, 2], [2, 8])
    assert_reprojects(clip, head)
    frame = clip.frame(3)
    torch.testing.assert_close(frame.camera.T_cam_world, camera(8).T_cam_world, atol=1e-5, rtol=0)
    torch.testing.assert_close(frame.params.expr, params(head, 1).expr)
    assert frame.image[:, frame.mask[0] > 0.5].mean(1).sub(torch.tensor([0.4, 0.8, 0.6])).abs().max() < 0.01
    meta = json.loads((folder / "transforms.json").read_text())
    assert {f["camera_id"] for f in meta["frames"]} == {"222200002", "222200008"}


def test_an_export_is_a_clip_as_it_stands(export, head):
    assert_reprojects(Clip(export), head)


def test_choice_and_resume(export, tmp_path, monkeypatch):
    run(export, tmp_path / "out", Choice(limit=1, cameras=("222200008",)))
    assert len(Clip(tmp_path / "out")) == 1
    (folder,), _ = run(export, tmp_path / "out", Choice(every=2))
    assert Clip(folder).timesteps == [0, 2] and len(Clip(folder)) == 4
    # Killed at the third frame, then called again: the first two are not read twice.
    real, seen = vhap.read_image, []

    def dying(path, mode="RGB"):
        seen.append(path.name)
        if len(seen) > 4:
            raise KeyboardInterrupt
        return real(path, mode)

    monkeypatch.setattr(vhap, "read_image", dying)
    with pytest.raises(KeyboardInterrupt):
        run(export, tmp_path / "killed")
    assert len(Clip(tmp_path / "killed")) == 2
    seen.clear()
    monkeypatch.setattr(vhap, "read_image", lambda path, mode="RGB": seen.append(path.name) or real(path, mode))
    run(export, tmp_path / "killed")
    assert len(Clip(tmp_path / "killed")) == 6 and len(seen) == 8


def test_written_exports_come_back(export, head, tmp_path):
    (folder,), _ = run(export, tmp_path / "clip")
    vhap.write_vhap(Clip(folder), tmp_path / "written")
    means = [Clip(tmp_path / "written").params(t).translation for t in range(STEPS)]
    assert torch.stack(means).mean(0).abs().max() < 1e-6
    with np.load(tmp_path / "written/flame_param/00001.npz") as row:
        sizes = {k: row[k].shape for k in row.files}
    assert sizes == {
        "shape": (300,), "expr": (1, 100), "rotation": (1, 3), "neck_pose": (1, 3), "jaw_pose": (1, 3),
        "eyes_pose": (1, 6), "translation": (1, 3), "static_offset": (1, 5143, 3),
    }  # fmt: skip
    splits = [json.loads((tmp_path / f"written/transforms_{s}.json").read_text())["frames"] for s in vhap.SPLITS]
    assert [sorted({f["camera_index"] for f in s}) for s in splits] == [[2], [8], [2, 8]]
    run(tmp_path / "written", tmp_path / "back")
    before, after = Clip(folder), Clip(tmp_path / "back")
    for i in range(len(before)):
        a, b = before.frame(i), after.frame(i)
        offset = b.params.static_offset[:VERTS]
        xy = [f.camera.project(head.pose(replace(p, static_offset=offset)).vertices)[0] for f, p in
              ((a, a.params), (b, b.params))]  # fmt: skip
        assert (xy[0] - xy[1]).abs().max() < 2e-3 and (a.mask - b.mask).abs().max() < 0.01
        assert b.image[:, b.mask[0] < 0.5].min() > 0.99, "on white"


def test_export_command(export, tmp_path, capsys):
    """Frames without parameters are left out and said; nothing is overwritten; other heads are refused."""
    shutil.copytree(export, tmp_path / "clip")
    (tmp_path / "clip/flame_param/00001.npz").unlink()
    line = ["export", str(tmp_path / "clip"), str(tmp_path / "out"), "--to", "vhap"]
    assert main(line) == 0
    said = capsys.readouterr()
    assert "4 frames, 2 timesteps × 2 cameras on flame" in said.out and "1 timesteps have no head" in said.err
    written = Clip(tmp_path / "out")
    assert written.timesteps == [0, 1]
    torch.testing.assert_close(written.params(1).expr, Clip(export).params(2).expr)
    assert main(line) == 2 and "exists" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "clip/flame_param")
    assert main(["export", str(tmp_path / "clip"), str(tmp_path / "none")]) == 2
    assert "no head parameters" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_one_camera_trains_on_it(export, tmp_path):
    run(export, tmp_path / "out", Choice(cameras=("8",)))
    train, val = (json.loads((tmp_path / f"out/transforms_{s}.json").read_text())["frames"] for s in ("train", "val"))
    assert len(train) == 2 and val == []


def test_combined_sets_reach_their_sequences_and_no_further(export, tmp_path):
    shutil.copytree(export, tmp_path / "seq")
    union = tmp_path / "UNION"
    union.mkdir()
    meta = json.loads((export / "transforms.json").read_text())
    for f in meta["frames"]:
        for k in ("timestep_index_original", "timestep_id"):
            del f[k]
        for k in ("file_path", "fg_mask_path", "flame_param_path"):
            f[k] = f"../seq/{f[k]}"
    (union / "transforms_train.json").write_text(json.dumps({**meta, "frames": meta["frames"][:4]}))
    (union / "transforms_test.json").write_text(json.dumps({**meta, "frames": meta["frames"][4:]}))
    with pytest.raises(UserError, match="outside"):
        run(union, tmp_path / "refused")
    (union / "sequences_trainval.txt").write_text("seq\n")
    (folder,), report = run(union, tmp_path / "out")
    assert len(Clip(folder)) == 6 and report.lines() == []
    meta["frames"][0]["file_path"] = "../seq/../../etc/passwd"
    (union / "transforms_train.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="outside"):
        run(union, tmp_path / "refused")


def spoil(frames, key, value):
    frames[1][key] = value


@pytest.mark.parametrize(("key", "value", "says"), [
    ("transform_matrix", [[float("nan")] * 4] * 4, "NaN"),
    ("transform_matrix", np.diag([-1.0, 1, 1, 1]).tolist(), "mirrored"),
    ("transform_matrix", np.diag([2.0, 2, 2, 1]).tolist(), "scaled"),
    ("transform_matrix", [[1.0, 0, 0]], "4×4"),
    ("fl_x", -3.0, "focal"),
    ("fl_x", "wide", "bad field"),
    ("file_path", "/etc/passwd", "outside"),
    ("fg_mask_path", "../../secret.png", "outside"),
    ("timestep_index", -1, "from zero"),
])  # fmt: skip
def test_hostile_cameras_and_paths_are_refused(export, tmp_path, key, value, says):
    shutil.copytree(export, tmp_path / "bad")
    meta = json.loads((export / "transforms.json").read_text())
    spoil(meta["frames"], key, value)
    (tmp_path / "bad/transforms.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=says):
        run(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_reported_and_the_rest_is_read(export, head, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(export, bad)
    (bad / "images/00000_02.png").write_bytes((bad / "images/00000_02.png").read_bytes()[:100])
    (bad / "images/00000_08.png").unlink()
    (bad / "fg_masks/00001_02.png").unlink()
    (bad / "flame_param/00001.npz").write_bytes(b"PK\x03\x04nothing")
    with np.load(export / "flame_param/00002.npz") as row:
        rows = dict(row)
    np.savez(bad / "flame_param/00002.npz", **(rows | {"expr": rows["expr"] * np.nan}))
    (folder,), report = run(bad, tmp_path / "out")
    clip = Clip(folder)
    assert clip.timesteps == [1, 2] and len(clip) == 4 and all(r.params_path is None for r in clip.records)
    lines = " | ".join(report.lines())
    for words in ("truncated", "does not exist", "mask left out", "damaged", "not finite"):
        assert words in lines, words
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(bad / "flame_param/00002.npz", **(rows | {"shape": objects}))
    _, report = run(bad, tmp_path / "again")
    assert "head parameters left out" in " | ".join(report.lines()), "pickles are not read"


@pytest.mark.parametrize("what", ["empty", "tracking", "broken json", "no frames"])
def test_what_is_not_an_export(tmp_path, what):
    src = tmp_path / "src"
    src.mkdir()
    if what == "tracking":
        np.savez(src / "tracked_flame_params_30.npz", rotation=np.zeros((1, 3)))
    elif what == "broken json":
        (src / "transforms.json").write_text("{")
    elif what == "no frames":
        (src / "transforms.json").write_text('{"frames": 3}')
    with pytest.raises(UserError, match="export" if what == "tracking" else "."):
        run(src, tmp_path / "out")


def test_openhead_is_not_vhaps(tmp_path, export):
    (folder,), _ = run(export, tmp_path / "clip")
    text = (folder / "transforms.json").read_text().replace('"head": "flame"', '"head": "openhead"')
    (folder / "transforms.json").write_text(text)
    with pytest.raises(UserError, match="'openhead', VHAP's layout is FLAME's"):
        vhap.write_vhap(Clip(folder), tmp_path / "out")
