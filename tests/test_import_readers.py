"""What every reader promises alike: a kill loses nothing and repeats nothing, a cut file costs its own frames only."""

import json
import shutil
from importlib import import_module

import pytest

from geodiff4d.core.errors import UserError
from geodiff4d.core.progress import silent
from geodiff4d.data.clip import Clip
from geodiff4d.data.importer import ImportConfig, import_sources
from geodiff4d.data.importing import Choice, Report
from mini_cap4d import make_cap4d, make_fit
from mini_datasets import COLOUR_MATRIX, make_nersemble, make_renderme, make_synthhuman, performance
from mini_pixel3dmm import make_pixel3dmm
from mini_tracks import make_head
from mini_vhap import make_vhap

MEDIA = {
    "nersemble": "*222200037.mp4", "renderme360": "*_raw.smc", "synthhuman": "rgb_0000001.png",
    "vhap": "images/00001_02.png", "pixel3dmm": "cropped/00001.png", "cap4d": "images/cam0/00000017.png",
}  # fmt: skip
"""A picture, video or archive of each, to be cut in half."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    show = performance(timesteps=2, width=60, height=88)
    make_nersemble(root / "nersemble", show, COLOUR_MATRIX)
    make_renderme(root / "renderme360", show)
    make_synthhuman(root / "synthhuman", show)
    make_vhap(root / "vhap", make_head(root / "models", "flame2023.pkl")[0])
    make_pixel3dmm(root / "pixel3dmm", make_head(root / "models", "flame2020.pkl")[0])
    make_cap4d(root / "cap4d", make_fit(), make_head(root / "models", "flame2023_no_jaw.pkl"))
    return root


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch):
    monkeypatch.setattr("geodiff4d.data.importer.write_sheet", lambda folder, head: None)


class Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


def run(name, src, out, progress=silent):
    src = src / "tracking" if name == "pixel3dmm" else src
    report = Report()
    sources = import_module(f"geodiff4d.data.{name}").read(src, Choice(), report)
    (folder,) = import_sources(sources, out, name, Choice(), report, ImportConfig(), progress=progress)
    return folder, report


@pytest.mark.parametrize("name", MEDIA)
def test_killed_and_resumed(sets, name, tmp_path):
    whole, _ = run(name, sets / name, tmp_path / "whole")
    came = []

    def dying(items, description, total):
        for item in items:
            came.append((item.timestep, item.camera_index))
            if len(came) == 3:
                raise Killed
            yield item

    with pytest.raises(Killed):
        run(name, sets / name, tmp_path / "out", dying)
    (journal,) = (tmp_path / "out").rglob("import.jsonl")
    folder = journal.parent
    assert len(Clip(folder)) == 2, "what was imported is a clip"
    # A kill that leaves no time for that: no transforms, half a line, half a picture.
    for path in folder.glob("transforms*.json"):
        path.unlink()
    with journal.open("a") as file:
        file.write('{"frame": {"timestep_ind')
    (folder / "images/.00001_00.png.part").write_bytes(b"half")
    times = {p: p.stat().st_mtime_ns for p in (folder / "images").glob("[0-9]*.png")}
    again = []

    def watching(items, description, total):
        for item in items:
            again.append((item.timestep, item.camera_index))
            yield item

    run(name, sets / name, tmp_path / "out", watching)
    assert not {*again} & {*came[:2]} and all(p.stat().st_mtime_ns == t for p, t in times.items())
    ours, theirs = (json.loads((f / "transforms.json").read_text())["frames"] for f in (folder, whole))
    assert ours == theirs and not list(folder.rglob("*.part"))


@pytest.mark.parametrize("name", MEDIA)
def test_a_cut_file_costs_its_own_frames_only(sets, name, tmp_path):
    shutil.copytree(sets / name, tmp_path / "cut")
    (path,) = (tmp_path / "cut").rglob(MEDIA[name])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if name == "renderme360":
        # An HDF5 file without its end cannot be opened at all.
        with pytest.raises(UserError, match="truncated"):
            run(name, tmp_path / "cut", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    whole, nothing = run(name, sets / name, tmp_path / "whole")
    folder, report = run(name, tmp_path / "cut", tmp_path / "out")
    kept, all_ = ({(r.timestep, r.camera_index) for r in Clip(f).records} for f in (folder, whole))
    assert 0 < len(kept) < len(all_) and kept < all_
    assert len(report) > len(nothing), report.lines()
