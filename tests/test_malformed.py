"""Damaged files, each the kind of a fault that a campaign of tools/campaigns found, are refused in one line."""

import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file

from avatars import painted_avatar, talking, with_networks
from geodiff4d.avatar.compact import open_avatar, write_compact
from geodiff4d.avatar.deformation import DeformationConfig
from geodiff4d.avatar.drive import cameras
from geodiff4d.avatar.model import Avatar
from geodiff4d.cli import explain, main
from geodiff4d.core import films, sandbox, stills
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import load_model, read_arrays, read_config, read_json, read_tensors, write_json
from geodiff4d.core.images import write_image
from geodiff4d.core.progress import silent
from geodiff4d.core.rundir import RunFolder, alone, restore_optimiser
from geodiff4d.core.video import read_video, write_video
from geodiff4d.data import synthhuman
from geodiff4d.data.clip import check_params
from geodiff4d.data.importing import Choice, Report
from geodiff4d.data.rowstore import create_rows, fill_rows, open_rows
from geodiff4d.data.sheet import fits, sizes
from geodiff4d.heads import load_head
from geodiff4d.launch.jobs import read_jobs
from geodiff4d.tracking.reader_data import FacesConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An avatar with networks."""
    head = load_head()
    tokens = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(2))
    path = tmp_path_factory.mktemp("avatar") / "a"
    path.mkdir()
    with_networks(painted_avatar(head, talking(head, 2)), tokens).save(path)
    return path


def test_networks_that_do_not_fit_each_other_are_refused(folder, tmp_path):
    """Each tensor alone would load: the code's regressor takes another number of features."""
    for name in ("config.json", "params.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "avatar.safetensors")
    [name] = [k for k in tensors if k.startswith("code.regressor.") and tensors[k].dim() == 2][:1]
    save_file(tensors | {name: torch.cat([tensors[name]] * 2)}, tmp_path / "avatar.safetensors")
    with pytest.raises(UserError, match="damaged avatar"):
        Avatar.load(tmp_path)
    write_json(tmp_path / "config.json", read_json(folder / "config.json") | {"parts": 0.5})
    with pytest.raises(UserError, match=r"damaged avatar \(parts is 0\.5"):
        Avatar.load(tmp_path)


def test_archives_with_wrong_offsets_are_refused(folder, tmp_path):
    """A directory that points before the file's start makes zipfile raise what it raises for nothing else."""
    write_compact(folder, tmp_path / "a.g4d")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    for path, read in ((tmp_path / "a.g4d", open_avatar), (tmp_path / "a.npz", read_arrays)):
        data = path.read_bytes()
        for spoilt in (data[4:], data[:40] + data[44:], data[:-10] + struct.pack("<I", 2**31) + data[-6:]):
            path.write_bytes(spoilt)
            with pytest.raises(UserError):
                read(path)


def test_parameters_with_axes_too_many_are_refused():
    check_params(load_head().neutral(), "a clip")
    for name in ("shape", "expr", "jaw_pose"):
        params = load_head().neutral()
        object.__setattr__(params, name, getattr(params, name)[None])
        with pytest.raises(UserError, match=rf"a clip: {name} has the shape \[1, .* expected \["):
            check_params(params, "a clip")


def test_arrays_of_complex_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3, "c16"))
    with pytest.raises(UserError, match=r"a\.npz: x is complex128, expected real numbers"):
        read_arrays(tmp_path / "a.npz")


def test_networks_of_absurd_depth_are_refused_at_once():
    with pytest.raises(ValueError, match="multiple of"):
        DeformationConfig(levels=10**30)


def test_json_that_is_nested_too_deeply_is_refused(tmp_path):
    deep = b"[" * 100_000
    with zipfile.ZipFile(tmp_path / "a.g4d", "w") as archive:
        archive.writestr("compact.json", deep)
    (tmp_path / "a.json").write_bytes(deep)
    (tmp_path / "jobs.jsonl").write_bytes(deep)
    for read, name in ((open_avatar, "a.g4d"), (read_json, "a.json"), (partial(read_jobs, commands=()), "jobs.jsonl")):
        with pytest.raises(UserError, match="nested too deeply"):
            read(tmp_path / name)


def test_what_a_library_raises_of_a_damaged_image_is_expected(tmp_path, monkeypatch):
    """Pillow's AVIF reader raises RuntimeError, when pixels are asked for."""
    write_image(tmp_path / "a.png", torch.rand(3, 8, 8))

    def fail(image):
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=r"a\.png is truncated or damaged \(Failed to decode frame 0\)"):
        stills.read_still(tmp_path / "a.png")


def test_ranges_of_a_compact_avatar_are_numbers(folder, tmp_path):
    write_compact(folder, tmp_path / "a.g4d")
    with zipfile.ZipFile(tmp_path / "a.g4d") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.g4d", "w") as archive:
        for name, data in members.items():
            # Wherever a range may begin.
            archive.writestr(name, data if name.endswith(".json") else np.full(len(data) // 4, np.nan, "f4").tobytes())
    with pytest.raises(UserError, match=r"b\.g4d is not .* \(a range has NaN or infinite numbers\)"):
        open_avatar(tmp_path / "b.g4d")


def test_sides_of_an_image_are_whole_numbers(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"width": True}))
    with pytest.raises(UserError, match=r"width and height are \(True, "):
        Avatar.load(tmp_path / "a")
    avatar = Avatar.load(folder)
    narrow = replace(avatar, camera=avatar.camera.resized(1, 64))
    assert [(c.width, c.height) for c in cameras(narrow, "front", 2, size=16)] == [(1, 16)] * 2


def test_notes_that_are_lists_are_refused(folder, tmp_path):
    write_compact(folder, tmp_path / "a.g4d")
    with zipfile.ZipFile(tmp_path / "a.g4d") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(members["compact.json"]) | {"tensors": []}
    with zipfile.ZipFile(tmp_path / "b.g4d", "w") as archive:
        for name, data in (members | {"compact.json": json.dumps(about)}).items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match=r"b\.g4d is not a compact avatar, or is damaged"):
        open_avatar(tmp_path / "b.g4d")
    (tmp_path / "config.json").write_text("[]")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"config\.json is damaged: expected an object"):
        load_model(tmp_path)


def test_weights_with_a_damaged_header_are_refused(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for spoilt in (b"", whole[:4], whole.replace(b"F32", b"F99"), struct.pack("<Q", 2**60) + whole[8:]):
        (tmp_path / "x.safetensors").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"x\.safetensors"):
            read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="missing"):
        read_tensors(tmp_path / "none.safetensors")


def test_a_video_with_a_title_that_is_not_utf8_is_read(tmp_path):
    import av

    held = io.BytesIO()
    with av.open(held, "w", format="matroska") as container:
        container.metadata["title"] = "MARKED"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "a.mkv").write_bytes(held.getvalue().replace(b"MARKED", b"\xff\xfeRKED"))
    assert len(list(read_video(tmp_path / "a.mkv"))) == 1


def test_a_link_that_leads_to_itself_is_the_users(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert main(["track", f"{tmp_path}/loop", "--out", f"{tmp_path}/loop"]) == 2
    assert main(["export", f"{tmp_path}/loop", f"{tmp_path}/loop/out.ply"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_a_clock_before_1980_is_no_reason_to_fail(folder, tmp_path, monkeypatch):
    """Boards without a battery wake in 1970, which archives cannot say; the same avatar packs to the same bytes."""
    write_compact(folder, tmp_path / "now.g4d")
    monkeypatch.setattr("time.localtime", lambda at=None: (1970, 1, 1, 0, 0, 0, 3, 1, 0))
    write_compact(folder, tmp_path / "then.g4d")
    assert (tmp_path / "now.g4d").read_bytes() == (tmp_path / "then.g4d").read_bytes()
    with zipfile.ZipFile(tmp_path / "then.g4d") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_offsets_of_another_head_are_refused():
    head = load_head()
    params = replace(head.neutral(), static_offset=torch.zeros(7, 3))
    assert not fits(head, params) and "7" in sizes(head, params)
    with pytest.raises(UserError, match="offsets of 7 vertices"):
        head.pose(params)


def test_an_image_whose_animation_is_damaged_is_read_without_a_word(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 6), (9, 99, 199)).save(image, "PNG")
    head, rest = image.getvalue()[:33], image.getvalue()[33:]
    control = b"acTL" + struct.pack(">II", 0, 0)
    (tmp_path / "a.png").write_bytes(
        head + struct.pack(">I", 8) + control + struct.pack(">I", zlib.crc32(control)) + rest
    )
    code = f"from geodiff4d.core.stills import read_still; print(read_still({str(tmp_path / 'a.png')!r}).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(6, 8, 3)\n", "")


def test_damaged_notes_and_rows_of_a_store_are_refused(tmp_path):
    config = FacesConfig(subjects=1, instants=1, size=96, supersample=1)
    create_rows(tmp_path / "faces.json", config, {"done": ((1,), "u1")}, {})
    assert read_config(tmp_path / "faces.json", FacesConfig) == config
    whole = (tmp_path / "faces.json").read_bytes()
    for spoilt in (whole[:20], b"\xc7" + whole, b"[]", b"null", whole.replace(b"subjects", b"subjectz")):
        (tmp_path / "faces.json").write_bytes(spoilt)
        with pytest.raises(UserError):
            read_config(tmp_path / "faces.json", FacesConfig)
        with pytest.raises(UserError):
            create_rows(tmp_path / "faces.json", config, {}, {})
    for spoilt in (b"", b"\x93NUMPY", (tmp_path / "done.npy").read_bytes()[:-1]):
        (tmp_path / "done.npy").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"done\.npy"):
            open_rows(tmp_path, ["done"])
    for other in (np.zeros(2, "u1"), np.zeros((1, 1), "u1"), np.zeros(1, "f4")):
        np.save(tmp_path / "done.npy", other)
        with pytest.raises(UserError, match=r"done\.npy is .* expected uint8 \[1\]"):
            open_rows(tmp_path, ["done"], arrays={"done": ((1,), "u1")})


def test_a_store_takes_all_its_space_at_once_or_none(tmp_path, monkeypatch):
    """Written to through a map, a file on a full disk would end the process by a signal."""
    arrays = dict.fromkeys(("a", "b"), ((4, 100), "f4"))

    def full(file, start, size):
        if (tmp_path / "b.npy").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        create_rows(tmp_path / "faces.json", FacesConfig(), arrays, {})
    assert not list(tmp_path.iterdir())
    assert explain(OSError("36360 requested and 8176 written"))[1] == 2  # numpy's words for the same


def test_a_store_is_made_by_one_process(tmp_path):
    config = FacesConfig()
    with alone(tmp_path), pytest.raises(UserError, match="another process is writing to"):
        create_rows(tmp_path / "faces.json", config, {"done": ((1,), "u1")}, {})
    create_rows(tmp_path / "faces.json", config, {"done": ((1,), "u1")}, {})
    with alone(tmp_path), pytest.raises(UserError, match="another process is writing to"):
        fill_rows(tmp_path, lambda folder, s: None, 1, silent)
    rendered: list[int] = []
    for _ in range(2):
        fill_rows(tmp_path, lambda folder, s: rendered.append(s), 1, silent)
    assert rendered == [0], "whoever fills rows does not say so before they are whole"


def test_a_video_of_an_unknown_codec_is_refused(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"mp4v" in data
    (tmp_path / "a.mp4").write_bytes(data.replace(b"mp4v", b"zzzz").replace(b"esds", b"free"))
    with pytest.raises(UserError, match="decoded as video"):
        list(read_video(tmp_path / "a.mp4"))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    """Its file is whole, and the network or the optimiser is another."""
    folder = RunFolder(tmp_path, FacesConfig())
    network = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(network.parameters())
    for tensors in ({"weight": torch.zeros(3, 2)}, {"weight": torch.zeros(2, 2)}, {"other": torch.zeros(2)}):
        with pytest.raises(UserError, match="does not fit this run"), folder.restoring():
            network.load_state_dict(tensors)
    with pytest.raises(UserError, match="does not fit this run"), folder.restoring():
        restore_optimiser(optimiser, {"optimiser.x.step": torch.zeros(1)})


def test_a_folder_where_an_image_should_be_costs_one_sample(tmp_path):
    (tmp_path / "rgb_0000000.png").mkdir()
    (tmp_path / "cam_0000000.txt").write_text("1 0 0\n0 1 0\n0 0 1\n")
    report = Report()
    [source] = synthhuman.read(tmp_path, Choice(None, 1, (), ()), report)
    assert list(source.frames(lambda timestep, camera: True)) == []
    assert any("cannot be read" in line for line in report.lines())


@pytest.fixture
def limited(monkeypatch):
    """Decode in processes with limits."""
    monkeypatch.setenv(sandbox.VARIABLE, "1")
    yield
    sandbox.close()


def test_a_limited_process_decodes_what_this_one_does(tmp_path, monkeypatch, limited):
    frames = [torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    write_image(tmp_path / "a.png", frames[0])
    write_video(tmp_path / "a.mp4", frames)
    monkeypatch.chdir(tmp_path)
    image, film = Path("a.png"), Path("a.mp4")
    assert np.array_equal(sandbox.decode(stills.read_still, image, "L"), stills.read_still(image, "L"))
    next(read_video(film))  # and no more of it
    [child] = sandbox.waiting
    found = list(read_video(film, limit=2, skip=1))
    assert sandbox.decode(films.about, film) == films.about(film)
    assert sandbox.decode(films.cut_short, film, 9) is None
    for path, message in ((Path("b.png"), "b.png does not exist"), (film, "not an image")):
        with pytest.raises(UserError, match=message):
            sandbox.decode(stills.read_still, path)
    assert sandbox.waiting == [child], "one process did it all"
    monkeypatch.delenv(sandbox.VARIABLE)
    assert all(map(torch.equal, found, read_video(film, limit=2, skip=1)))


def test_a_limited_process_that_does_not_answer_is_ended(tmp_path, limited):
    child = sandbox.Child()
    child.ask(stills.read_still, tmp_path / "a.png", ())
    with pytest.raises(UserError, match=r"a\.png cannot be decoded with 4 GiB of memory and 60 s .*\(no answer\)"):
        child.answer(0.0)
    assert child.process.poll() is not None
    child.end()


@pytest.mark.slow
def test_bombs_end_a_limited_process_alone(tmp_path, monkeypatch, limited):
    """An image of 64 million pixels is within the limits; with less memory or time it is refused in one line."""
    Image.new("RGB", (8000, 8000), (9, 99, 199)).save(tmp_path / "a.png")
    assert sandbox.decode(stills.read_still, tmp_path / "a.png").shape == (8000, 8000, 3)
    for name, value in (("MEMORY_BYTES", 2**28), ("PROCESSOR_S", 0)):
        sandbox.close()
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, name, value)
            with pytest.raises(UserError, match=r"a\.png cannot be decoded"):
                sandbox.decode(stills.read_still, tmp_path / "a.png")


def test_the_header_of_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a video")
    for look in (films.about, films.described):
        with pytest.raises(UserError, match=r"notes\.txt cannot be decoded as video"):
            look(tmp_path / "notes.txt")


def test_playlists_are_no_videos(tmp_path):
    """FFmpeg would read the files that they name."""
    write_video(tmp_path / "a.mp4", [torch.rand(3, 32, 48)] * 2)
    (tmp_path / "b.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(UserError, match=r"b\.mp4 cannot be decoded"):
        next(read_video(tmp_path / "b.mp4"))
