"""Pixel3DMM's results: .frame files as torch writes them; projection by the tracker's own formula; hostile pickles."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.data import pixel3dmm
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import ImportConfig, import_sources, summary
from geodiff4d.data.importing import Choice, Report
from geodiff4d.heads import flame
from mini_pixel3dmm import FOLDER, SIDE, STEPS, TRACKED, as_frame, draw, make_pixel3dmm, mesh, screen
from mini_tracks import make_head, share_inside

EVERYTHING = Choice()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return make_head(tmp_path_factory.mktemp("model"), "flame2020.pkl")[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory, head):
    return make_pixel3dmm(tmp_path_factory.mktemp("pixel3dmm"), head)


@pytest.fixture(autouse=True)
def only_our_model(monkeypatch, head):
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)
    monkeypatch.delenv(pixel3dmm.ENVIRONMENT, raising=False)
    monkeypatch.setattr(flame, "LOADED", [p for p in flame.LOADED if p.name == "flame2020.pkl"][-1:])


def run(src, out, choice=EVERYTHING):
    report = Report()
    sources = pixel3dmm.read(src, choice, report)
    return import_sources(sources, out, f"pixel3dmm {src}", choice, report, ImportConfig()), report


@pytest.mark.parametrize("known", [True, False])
def test_it_reprojects(data, head, tmp_path, known, monkeypatch):
    if not known:
        monkeypatch.setattr(flame, "LOADED", [])
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


def test_a_clip_has_the_motion_in_one_place(data, tmp_path, monkeypatch):
    """Begun without the FLAME file and taken up with it, or the other way round: refused, what is there stays."""
    ours = flame.LOADED
    for begun, then, was in (([], ours, "in the cameras"), (ours, [], "in the head parameters")):
        out = tmp_path / was.replace(" ", "_")
        monkeypatch.setattr(flame, "LOADED", begun)
        run(data / "tracking" / FOLDER, out, Choice(limit=1))
        before = (out / "transforms.json").read_bytes()
        monkeypatch.setattr(flame, "LOADED", then)
        with pytest.raises(UserError, match=rf"motion was {was}, is .*give the same --head as before"):
            run(data / "tracking" / FOLDER, out)
        assert (out / "transforms.json").read_bytes() == before and len(Clip(out)) == 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/geodiff4d_was_run",)


@pytest.mark.parametrize(
    "damage", ["evil", "tensor", "cut", "nan", "zero rotation", "no camera", "mirrored", "list", "bomb"]
)
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
    elif damage == "mirrored":
        frame["camera"]["R_base_0"][:, 0] *= -1
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
    assert summary(folder).endswith("96×96 px, masks on 1, head parameters")
    written = (folder / "transforms.json").read_bytes()
    assert b"no seg_og" in written
    run(tmp_path / "in/tracking" / FOLDER, tmp_path / "out")
    assert (folder / "transforms.json").read_bytes() == written, "what is finished stays, warnings included"


def test_what_is_not_a_result(tmp_path):
    with pytest.raises(UserError, match="checkpoint"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "a_nV1/checkpoint").mkdir(parents=True)
    (tmp_path / "a/cropped").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint/00000\.frame"):
        run(tmp_path / "a_nV1", tmp_path / "out")
