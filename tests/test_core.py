"""Geometry, cameras, images, videos and files."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy.linalg import expm

from geodiff4d.core import camera as cameras
from geodiff4d.core import files, films, geometry, images, packing, stills, topology, video
from geodiff4d.core.deferred import deferred
from geodiff4d.core.errors import UserError
from geodiff4d.core.progress import advancing, in_passes, passed_on, silent
from geodiff4d.core.rundir import RunFolder
from geodiff4d.core.stopping import stop_requests

quick = settings(max_examples=40, deadline=None)
unit = st.floats(-1, 1, allow_nan=False, width=32)
vector = st.tuples(unit, unit, unit).map(lambda v: torch.tensor(v, dtype=torch.float64))


@st.composite
def rotations(draw):
    """Axis-angle vectors; near identity and near a half turn on purpose."""
    axis = draw(vector.filter(lambda v: v.norm() > 0.1))
    angle = draw(
        st.one_of(st.floats(0, math.pi), st.sampled_from([0.0, 1e-12, 1e-7, 9.9e-5, 1.01e-4, math.pi - 1e-7, math.pi]))
    )
    return torch.nn.functional.normalize(axis, dim=0) * angle


@st.composite
def poses(draw):
    return geometry.rigid(geometry.axis_angle_to_matrix(draw(rotations())), draw(vector))


# --- rotations and rigid transforms


@quick
@given(rotations())
def test_rotations_are_orthonormal_and_match_the_exponential(w):
    R = geometry.axis_angle_to_matrix(w)
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=R.dtype), atol=1e-12, rtol=0)
    # SciPy's exponential: torch's is off by 2e-10 for some small angles.
    torch.testing.assert_close(R, torch.from_numpy(expm(geometry.skew(w).numpy())), atol=1e-10, rtol=0)


@quick
@given(rotations())
def test_axis_angles_come_back_from_their_matrices(w):
    R = geometry.axis_angle_to_matrix(w)
    back = geometry.matrix_to_axis_angle(R)
    assert back.norm() <= math.pi + 1e-12
    # Half a turn has two axes: what must come back is the rotation.
    torch.testing.assert_close(geometry.axis_angle_to_matrix(back), R, atol=1e-7, rtol=0)


@quick
@given(rotations())
def test_quaternions_round_trip(w):
    R = geometry.axis_angle_to_matrix(w)
    q = geometry.matrix_to_quat(R)
    torch.testing.assert_close(geometry.quat_to_matrix(q), R, atol=1e-12, rtol=0)
    torch.testing.assert_close(geometry.quat_to_matrix(-3 * q), R, atol=1e-12, rtol=0)


@quick
@given(rotations(), rotations())
def test_quaternion_products_are_matrix_products(a, b):
    A, B = geometry.axis_angle_to_matrix(a), geometry.axis_angle_to_matrix(b)
    q = geometry.quat_multiply(geometry.matrix_to_quat(A), geometry.matrix_to_quat(B))
    torch.testing.assert_close(geometry.quat_to_matrix(q), A @ B, atol=1e-12, rtol=0)


@quick
@given(poses(), poses(), vector)
def test_transforms_chain_and_invert(T_a_b, T_b_c, p):
    p = p[None]
    chained = geometry.transform(T_a_b, geometry.transform(T_b_c, p))
    torch.testing.assert_close(geometry.transform(T_a_b @ T_b_c, p), chained, atol=1e-12, rtol=0)
    torch.testing.assert_close(geometry.invert(T_a_b) @ T_a_b, torch.eye(4, dtype=p.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 5e-5, 1e-3, 1.0, 3.0])
def test_axis_angle_has_exact_gradients(scale):
    w = (torch.tensor([[0.5, -0.3, 0.8]], dtype=torch.float64) * scale).requires_grad_()
    assert torch.autograd.gradcheck(geometry.axis_angle_to_matrix, w)


def test_axis_angle_at_zero_in_float32_is_finite_with_the_right_gradient():
    w = torch.zeros(2, 3, requires_grad=True)
    R = geometry.axis_angle_to_matrix(w)
    assert torch.equal(R, torch.eye(3).expand(2, 3, 3))
    R[:, 2, 1].sum().backward()
    assert torch.equal(w.grad, torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3))


def test_quaternions_are_wxyz():
    quarter_turn_about_z = geometry.axis_angle_to_matrix(torch.tensor([0.0, 0.0, math.pi / 2]))
    q = geometry.matrix_to_quat(quarter_turn_about_z)
    torch.testing.assert_close(q * q[0].sign(), torch.tensor([1.0, 0.0, 0.0, 1.0]) / math.sqrt(2))


# --- cameras


def front_camera(distance: float = 1.0, size: int = 64) -> cameras.Camera:
    up = torch.tensor([0.0, 1.0, 0.0])
    T = geometry.look_at(torch.tensor([0.0, 0.0, distance]), torch.zeros(3), up)
    return cameras.Camera(T, cameras.pinhole(2.0 * size, size, size), size, size)


def test_cameras_are_opencv():
    """A head's +y is up in the picture (smaller row), its left side (+x) is to the right, depth grows forward."""
    xy, depth = front_camera().project(
        torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.5]])
    )
    torch.testing.assert_close(depth, torch.tensor([1.0, 1.0, 1.0, 0.5]))
    torch.testing.assert_close(xy, torch.tensor([[32.0, 32.0], [44.8, 32.0], [32.0, 19.2], [32.0, 32.0]]))


@quick
@given(vector, vector.filter(lambda v: v.abs().max() > 0.3))
def test_look_at_centres_its_target(target, direction):
    eye = target + 2 * direction
    up = torch.tensor([0.0, 1.0, 0.0], dtype=eye.dtype)
    if torch.linalg.cross(direction, up).norm() < 1e-3:
        return
    K = cameras.pinhole(100.0, 64, 48).double()
    camera = cameras.Camera(geometry.look_at(eye, target, up), K, 64, 48)
    xy, depth = camera.project(target[None])
    torch.testing.assert_close(xy[0], torch.tensor([32.0, 24.0], dtype=eye.dtype), atol=1e-9, rtol=0)
    torch.testing.assert_close(depth[0], (2 * direction).norm(), atol=1e-9, rtol=0)
    torch.testing.assert_close(camera.position, eye, atol=1e-9, rtol=0)
    assert camera.T_cam_world[:3, :3].det() > 0.99


@quick
@given(st.floats(-20, 40), st.floats(-20, 40), st.floats(5, 100), st.integers(8, 300))
def test_crops_and_resizes_move_pixels_alike(left, top, side, size):
    camera = front_camera()
    points = torch.tensor([[0.03, -0.02, 0.1], [-0.1, 0.05, 0.0]])
    before, depth = camera.project(points)
    after, same_depth = camera.cropped(left, top, side, size).project(points)
    expected = (before - torch.tensor([left, top])) * size / side
    torch.testing.assert_close(after, expected, atol=1e-2, rtol=1e-4)
    assert torch.equal(depth, same_depth)
    resized, _ = camera.resized(size, 2 * size).project(points)
    torch.testing.assert_close(resized, before * torch.tensor([size / 64, 2 * size / 64]), atol=1e-2, rtol=1e-4)


def test_cameras_stack_and_index():
    batch = cameras.Camera.stack([front_camera(1.0), front_camera(2.0)])
    assert batch.batch == (2,)
    torch.testing.assert_close(batch.position[:, 2], torch.tensor([1.0, 2.0]))
    assert torch.equal(batch[1].T_cam_world, front_camera(2.0).T_cam_world)
    assert batch[1].expand(3).batch == (3,)
    with pytest.raises(ValueError, match="must share a size"):
        cameras.Camera.stack([front_camera(), front_camera(size=32)])


def test_opengl_cameras_look_along_minus_z():
    T_world_opengl = geometry.invert(front_camera().T_cam_world) @ cameras.OPENGL_FROM_OPENCV
    torch.testing.assert_close(T_world_opengl, geometry.rigid(torch.eye(3), torch.tensor([0.0, 0.0, 1.0])))


# --- meshes

TETRAHEDRON = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
TETRAHEDRON_FACES = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


@quick
@given(rotations())
def test_normals_turn_with_the_mesh(w):
    R = geometry.axis_angle_to_matrix(w)
    v = TETRAHEDRON.double()
    turned = topology.vertex_normals(v @ R.mT, TETRAHEDRON_FACES)
    torch.testing.assert_close(turned, topology.vertex_normals(v, TETRAHEDRON_FACES) @ R.mT, atol=1e-10, rtol=0)


def test_normals_point_outward_and_faces_close():
    n = topology.vertex_normals(TETRAHEDRON, TETRAHEDRON_FACES)
    assert ((TETRAHEDRON - TETRAHEDRON.mean(0)) * n).sum(-1).min() > 0
    torch.testing.assert_close(topology.face_normals(TETRAHEDRON, TETRAHEDRON_FACES).sum(0), torch.zeros(3))
    assert topology.edges(TETRAHEDRON_FACES).shape == (6, 2)


def test_a_vertex_without_faces_has_no_normal():
    v = torch.cat([TETRAHEDRON, torch.ones(1, 3)])
    n = topology.vertex_normals(v, TETRAHEDRON_FACES)
    assert torch.equal(n[-1], torch.zeros(3))


# --- images


@pytest.mark.parametrize("name", ["a.png", "deep/er/a.png"])
def test_images_round_trip(tmp_path, name):
    image = torch.randint(0, 256, (3, 5, 7)).float() / 255
    images.write_image(tmp_path / name, image)
    assert torch.equal(images.read_image(tmp_path / name), image)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == ["a.png"]


def test_grey_images_and_modes(tmp_path):
    mask = torch.randint(0, 256, (1, 4, 6)).float() / 255
    images.write_image(tmp_path / "m.png", mask)
    assert torch.equal(images.read_image(tmp_path / "m.png", "L"), mask)
    assert images.read_image(tmp_path / "m.png").shape == (3, 4, 6)


def test_exif_turns_the_picture_upright(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = images.read_image(tmp_path / "a.png")
    assert image.shape == (3, 6, 4)
    assert image[:, :, -1].min() == 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, mode):
    values = np.array([[0, 257], [25_700, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    read = images.read_image(tmp_path / "a.png", mode)
    assert read.mul(255).round()[0].tolist() == [[0, 1], [100, 255]]


def test_only_pictures_that_pillow_decodes_itself_are_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "photo.jpg")
    with Image.open(tmp_path / "photo.jpg") as image:
        assert image.format == "EPS"
    with pytest.raises(UserError, match="is not an image that can be read"):
        images.read_image(tmp_path / "photo.jpg")


def test_what_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    images.write_image(tmp_path / "a.png", torch.rand(3, 4, 4))
    monkeypatch.setattr(stills, "open_image", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(permission denied\)"):
        images.read_image(tmp_path / "a.png")


def truncated(path):
    images.write_image(path, torch.rand(3, 64, 64))
    path.write_bytes(path.read_bytes()[:500])


def bomb(path):
    """A PNG whose header promises 90,000 × 90,000 pixels."""
    images.write_image(path, torch.rand(3, 8, 8))
    data = bytearray(path.read_bytes())
    data[16:24] = (90_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def large(path):
    Image.new("L", (9_000, 8_000)).save(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist: expected an image file"),
        (lambda p: p.mkdir(), "is a directory: expected one image file"),
        (lambda p: p.write_text("hello"), "is not an image that can be read"),
        (lambda p: p.write_bytes(b""), "is not an image that can be read"),
        (truncated, "is truncated or damaged"),
        (bomb, "too large to decode safely|at most 64,000,000"),
        (lambda p: Image.fromarray(np.ones((2, 2), np.float32)).save(p, "TIFF"), "has 32-bit pixels"),
        (large, "9000×8000 pixels: at most 64,000,000"),
    ],
)
def test_bad_images_are_user_errors(tmp_path, make, message):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(UserError, match=message):
        images.read_image(path)


def test_a_label_changes_its_corner_alone():
    image = torch.full((3, 64, 128), 0.5)
    shown = images.labelled(image)
    off = (shown - image).abs().amax(0)
    assert (shown[:, 48:, :64] > 0.7).any() and (shown[:, 48:, :64] < 0.2).any()
    assert off[:48].max() < 0.01 and off[:, 100:].max() < 0.01


def test_normals_round_trip_through_an_image():
    n = torch.nn.functional.normalize(torch.randn(2, 3, 4, 5), dim=1)
    mask = torch.ones(2, 1, 4, 5)
    mask[..., 0] = 0
    image = images.encode_normals(n, mask)
    assert image.min() >= 0
    assert image.max() <= 1
    assert (image[..., 0] == 0.5).all()
    torch.testing.assert_close(images.decode_normals(image), n * mask, atol=1e-5, rtol=0)


def test_composite_takes_masks_of_both_kinds():
    image = torch.ones(3, 2, 2)
    mask = torch.tensor([[[True, False], [False, True]]])
    out = images.composite(image, mask, 0.25)
    assert out[0].tolist() == [[1.0, 0.25], [0.25, 1.0]]
    assert torch.equal(out, images.composite(image, mask.float(), 0.25))


# --- videos


def frames_of_colour(count=5, height=32, width=48):
    return [torch.full((3, height, width), (i + 1) / (count + 1)) for i in range(count)]


def test_videos_round_trip(tmp_path):
    frames = frames_of_colour()
    video.write_video(tmp_path / "v" / "a.mp4", frames, fps=12)
    back = list(video.read_video(tmp_path / "v" / "a.mp4"))
    assert len(back) == 5
    torch.testing.assert_close(torch.stack(back), torch.stack(frames), atol=0.02, rtol=0)
    assert len(list(video.read_video(tmp_path / "v" / "a.mp4", limit=2))) == 2
    part = list(video.read_video(tmp_path / "v" / "a.mp4", limit=2, skip=2))
    assert len(part) == 2 and torch.equal(part[0], back[2])
    with pytest.raises(UserError, match="has 5 frames: expected more than the 5 that are left out"):
        list(video.read_video(tmp_path / "v" / "a.mp4", skip=5))
    assert [p.name for p in (tmp_path / "v").iterdir()] == ["a.mp4"]


def test_a_failed_video_leaves_nothing(tmp_path):
    def frames():
        yield torch.zeros(3, 32, 32)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        video.write_video(tmp_path / "a.mp4", frames())
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_are_padded(tmp_path):
    video.write_video(tmp_path / "a.mp4", frames_of_colour(2, 33, 47))
    assert next(video.read_video(tmp_path / "a.mp4")).shape == (3, 34, 48)


def test_a_video_cut_short_yields_what_it_has(tmp_path):
    import av

    path = tmp_path / "a.mkv"  # a container that is readable from its start
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        for _ in range(20):
            noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < len(list(video.read_video(path))) < 20
    assert "ends after" in (films.cut_short(path, len(list(video.read_video(path)))) or "")


def test_a_cut_copy_of_an_mp4_is_noted(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        for _ in range(40):
            noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    assert films.cut_short(path, len(list(video.read_video(path)))) is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    count = len(list(video.read_video(path)))
    assert 0 < count < 30
    assert f"a.mp4 ends after {count} of about 40 frames" in (films.cut_short(path, count) or "")


def test_videos_too_large_are_refused(tmp_path, monkeypatch):
    video.write_video(tmp_path / "a.mp4", frames_of_colour(1))
    monkeypatch.setattr(films, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="48×32 pixels: at most 1,000"):
        next(video.read_video(tmp_path / "a.mp4"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist: expected a video file"),
        (lambda p: p.mkdir(), "is a directory: expected a video file"),
        (lambda p: p.write_text("hello"), "cannot be decoded as video.*or the file is incomplete: copy it again"),
        (lambda p: p.write_bytes(b""), "cannot be decoded as video"),
    ],
)
def test_bad_videos_are_user_errors(tmp_path, make, message):
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(UserError, match=message):
        list(video.read_video(path))


# --- files


def test_json_round_trips_and_names_what_is_wrong(tmp_path):
    files.write_json(tmp_path / "sub" / "a.json", {"x": [1, 2]})
    assert files.read_json(tmp_path / "sub" / "a.json") == {"x": [1, 2]}
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        files.read_json(tmp_path / "c.json")


@pytest.mark.parametrize("write", [images.write_image, files.write_json])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write):
    value = torch.rand(3, 8, 8) if write is images.write_image else {"a": 1}
    write(tmp_path / "x.png", value)
    before = (tmp_path / "x.png").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "x.png", value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"] and (tmp_path / "x.png").read_bytes() == before


def made(target, mark):
    with files.fresh_folder(target) as folder:
        (folder / mark).write_text("{}")


def in_it(folder):
    return {p.name for p in folder.iterdir()} - {files.MARKER}


def test_tensors_are_as_readable_as_other_files(tmp_path):
    (tmp_path / "text").write_text("")
    files.save_tensors({"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "a.safetensors", {"step": "3"})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "text").stat().st_mode
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors"), {"a": torch.arange(6.0).reshape(2, 3).T})


def test_a_fresh_folder_replaces_the_old_one_only_on_success(tmp_path):
    target = tmp_path / "out"
    made(target, "config.json")
    with pytest.raises(KeyboardInterrupt), files.fresh_folder(target) as folder:
        (folder / "b").write_text("2")
        raise KeyboardInterrupt
    assert in_it(target) == {"config.json"}
    (target / ".DS_Store").touch()
    made(target, "side_by_side.mp4")
    assert in_it(target) == {"side_by_side.mp4"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_fresh_folder_with_a_users_file_in_it_is_kept(tmp_path):
    """What the marker does not list is somebody's, and so is all of a folder that has lost its marker."""
    made(tmp_path / "out", "config.json")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="did not write: give --out a new or empty"):
        made(tmp_path / "out", "config.json")
    (tmp_path / "out/notes.txt").unlink()
    made(tmp_path / "out", "config.json")
    (tmp_path / "out" / files.MARKER).unlink()
    with pytest.raises(UserError, match="did not write: give --out a new or empty"):
        made(tmp_path / "out", "config.json")


def test_a_fresh_folder_leaves_what_is_not_ours(tmp_path, monkeypatch):
    album, nerf, here = tmp_path / "album", tmp_path / "nerf", tmp_path / "here"
    for folder in (album, nerf, here / "below"):
        folder.mkdir(parents=True)
    (album / "me.jpg").write_bytes(b"mine")
    (album / "config.json").write_text("{}")
    (nerf / "transforms.json").write_text('{"frames": []}')
    monkeypatch.chdir(here / "below")
    for target in (album, nerf):
        with pytest.raises(UserError, match="did not write: give --out a new or empty"):
            made(target, "config.json")
    for target in (Path("."), Path(".."), here, tmp_path):
        with pytest.raises(UserError, match="is the folder you are in"):
            made(target, "config.json")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="your home folder"):
        made(tmp_path / "home", "config.json")
    assert sorted(p.name for p in album.iterdir()) == ["config.json", "me.jpg"] and len(list(tmp_path.iterdir())) == 3


def test_a_fresh_folder_never_replaces_what_is_read(tmp_path):
    made(tmp_path / "clip", "config.json")
    for source in (tmp_path / "clip", tmp_path / "clip/config.json", tmp_path / "other/../clip"):
        with pytest.raises(UserError, match="would be replaced"):
            files.refuse_foreign(tmp_path / "clip", source)
    files.refuse_foreign(tmp_path / "clip", tmp_path / "clip2")


def test_a_fresh_folder_follows_a_link(tmp_path):
    made(tmp_path / "disk", "config.json")
    (tmp_path / "out").symlink_to("disk")
    made(tmp_path / "out", "scores.json")
    assert (tmp_path / "out").is_symlink() and in_it(tmp_path / "disk") == {"scores.json"}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_fresh_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    made(tmp_path / "out", "config.json")
    replace_, whole = files.os.replace, []

    def fails(a, b):
        whole.append(list(tmp_path.rglob("config.json")))
        if str(a).endswith(".part"):
            raise OSError(errno.EIO, "broken")
        replace_(a, b)

    def without_exchange(*_, **__):
        raise OSError

    monkeypatch.setattr(files.ctypes, "CDLL", without_exchange)
    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="broken"):
        made(tmp_path / "out", "scores.json")
    assert all(whole) and in_it(tmp_path) == {"out"} and in_it(tmp_path / "out") == {"config.json"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_another_process_puts_in_place_meanwhile_is_replaced(tmp_path, monkeypatch, exchange):
    """Between a look and a rename another process may write, or take away, what is there."""
    out, replace_, turns = tmp_path / "out", files.os.replace, []

    def meanwhile(a, b):
        turns.append(a)
        if len(turns) == 1:
            out.mkdir(exist_ok=True)
            (out / "theirs").touch()
        replace_(a, b)

    monkeypatch.setattr(files.os, "replace", meanwhile)
    if not exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    made(out, "ours")
    assert in_it(tmp_path) == {"out"} and in_it(out) == {"ours"} and turns


def test_two_writers_do_not_mix_and_the_dead_leave_nothing(tmp_path, monkeypatch):
    with files.fresh_folder(tmp_path / "out") as mine:
        monkeypatch.setattr(files.os, "getpid", lambda: 1)
        with files.fresh_folder(tmp_path / "out") as theirs:
            assert theirs != mine
            (theirs / "config.json").touch()
        assert not list(mine.iterdir())
        (mine / "config.json").write_text("mine")
        (tmp_path / ".out.999999999.part").mkdir()
        (tmp_path / ".out.999999999.old").mkdir()
        (tmp_path / ".a.json.999999999.part").touch()
    files.write_json(tmp_path / "a.json", {})
    (tmp_path / "a.json").unlink()
    assert (tmp_path / "out/config.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_fresh_folder_refuses_to_replace_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file: expected a folder"), files.fresh_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("shard_bytes", [15_000_000, 100])
def test_models_round_trip_in_shards(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(files, "SHARD_BYTES", shard_bytes)
    state = {"a": torch.randn(4, 5), "b.c": torch.randn(3).half(), "t": torch.randn(6, 2).T, "n": torch.arange(3)}
    files.save_model(tmp_path / "m", {"width": 8}, state)
    config, back = files.load_model(tmp_path / "m")
    assert config == {"width": 8}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in state.items())
    shards = [p.name for p in sorted((tmp_path / "m").glob("*.safetensors"))]
    assert len(shards) == (1 if shard_bytes > 100 else 2)


def damage(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage, "damaged weights"),
        (lambda m: (m / "model.safetensors").write_bytes(b"xx"), "damaged weights"),
        (lambda m: (m / "model.safetensors").unlink(), "has no weights"),
        (lambda m: (m / "config.json").unlink(), "config.json does not exist"),
        (lambda m: (m / "config.json").write_text("nope"), "not valid JSON"),
    ],
)
def test_damaged_models_are_user_errors(tmp_path, harm, message):
    files.save_model(tmp_path / "m", {}, {"a": torch.zeros(8)})
    harm(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        files.load_model(tmp_path / "m")


def test_a_missing_shard_is_a_user_error(tmp_path, monkeypatch):
    """Half a model must not load as a smaller one."""
    monkeypatch.setattr(files, "SHARD_BYTES", 40)
    files.save_model(tmp_path / "m", {}, {"a": torch.zeros(8), "b": torch.zeros(8)})
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="has 1 of 2 weight files"):
        files.load_model(tmp_path / "m")


def test_packed_weights_are_off_by_half_a_step_and_unpacked_by_loading(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = torch.tensor([1e-3, 1.0, 50.0, 0.0]).repeat(16)[:, None, None, None]
    conv, norm = torch.randn(64, 16, 3, 3, generator=g) * rows, torch.randn(64, generator=g)
    state = packing.packed({"conv.weight": conv, "norm.weight": norm})
    assert state["conv.weight"].dtype == torch.int8 and state["norm.weight"].dtype == torch.float16
    files.save_model(tmp_path / "m", {}, state)
    _, loaded = files.load_model(tmp_path / "m")
    assert sorted(loaded) == ["conv.weight", "norm.weight"]
    half_step = conv.abs().amax((1, 2, 3), keepdim=True) / 254
    assert ((loaded["conv.weight"] - conv).abs() <= half_step * 1.001).all()
    # Packing again rounds to the same numbers: a model can be loaded and packed any number of times.
    again = packing.packed(loaded)
    assert torch.equal(again["conv.weight"], state["conv.weight"])
    assert sum(t.numel() * t.element_size() for t in state.values()) < 0.3 * 4 * conv.numel()


def test_a_missing_model_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="is not a model folder"):
        files.load_model(tmp_path / "nothing")


@dataclass(frozen=True)
class Config:
    width: int = 4


def test_dataclasses_are_written_as_objects(tmp_path):
    files.write_json(tmp_path / "a.json", Config())
    assert files.read_json(tmp_path / "a.json") == {"width": 4}


# --- runs


@dataclass(frozen=True)
class RunConfig:
    lr: float = 0.1


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    run = RunFolder(tmp_path / "run", RunConfig())
    assert run.load() is None
    for step in (1, 2, 3):
        run.save({"w": torch.full((4,), float(step))}, step)
    tensors, step = run.load()
    assert step == 3 and tensors["w"][0] == 3
    newest = tmp_path / "run/checkpoint.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    said: list[str] = []
    tensors, step = RunFolder(tmp_path / "run", RunConfig()).load(said.append)
    assert step == 2 and tensors["w"][0] == 2 and "damaged" in said[0]
    (tmp_path / "run/checkpoint-previous.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint"):
        run.load()


def test_as_many_checkpoints_stay_as_are_to_be_kept(tmp_path):
    run = RunFolder(tmp_path, RunConfig(), keep=3)
    weight = torch.zeros(4)
    for step in range(1, 6):
        weight += 1
        run.save_later([("w", weight)], step, lambda copies: (tmp_path / "model").write_text(str(copies["w"][0])))
        weight += 0.25  # what goes on does not reach what is being written
        weight -= 0.25
    run.settle()
    assert (tmp_path / "model").read_text() == "tensor(5.)"
    files = sorted(tmp_path.glob("checkpoint*"))
    assert [float(load_file(f)["w"][0]) for f in files] == [3, 4, 5], [f.name for f in files]
    for file in files[1:]:
        file.write_bytes(b"")
    assert run.load()[1] == 3


def test_what_kept_a_checkpoint_from_the_disk_is_raised_by_the_next(tmp_path):
    run = RunFolder(tmp_path, RunConfig())

    def full(copies):
        raise OSError(errno.ENOSPC, "No space left on device")

    run.save_later([("w", torch.ones(4))], 1, full)
    with pytest.raises(OSError, match="No space"):
        run.save_later([("w", torch.ones(4))], 2)
    run.save({"w": torch.ones(4)}, 3)
    assert run.load()[1] == 3


def test_the_first_sigterm_asks_and_the_second_ends():
    with stop_requests() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_deferred_modules_get_the_weights_they_would_have_had():
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4))
        torch.nn.init.zeros_(made[1].weight)
        made[2].requires_grad_(False)
        return made

    plain = build().state_dict()
    with deferred() as draws:
        late = build()
    draws.fill(late, {}, strict=False)
    assert all(torch.equal(v, plain[k]) for k, v in late.state_dict().items())
    with deferred() as draws:
        late = build()
    given = {"0.weight": torch.ones(4, 3), "2.bias": torch.ones(4)}
    draws.fill(late, given, strict=False)
    assert late[0].weight.data_ptr() == given["0.weight"].data_ptr(), "it is taken over, not copied"
    assert late[0].weight.requires_grad and not late[2].bias.requires_grad
    assert late[1].weight.abs().max() == 0 and late[1].bias.abs().max() > 0 and (late[2].weight == 1).all()


def test_a_damaged_configuration_is_named(tmp_path):
    RunFolder(tmp_path, RunConfig())
    (tmp_path / "config.json").write_text('{"config"')
    with pytest.raises(UserError, match="is not valid JSON"):
        RunFolder(tmp_path, RunConfig())


def test_a_record_starts_a_line_of_its_own(tmp_path):
    run = RunFolder(tmp_path, RunConfig())
    run.log({"step": 1})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"seco')
    run.log({"step": 2})
    run.log({"step": 3})
    first, half, *rest = (tmp_path / "log.jsonl").read_text().splitlines()
    assert half == '{"seco' and [json.loads(line)["step"] for line in (first, *rest)] == [1, 2, 3]


def test_a_run_is_one_process_s(tmp_path):
    RunFolder(tmp_path / "run", RunConfig())
    RunFolder(tmp_path / "run", RunConfig())
    code = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(3)"
    )
    tried = [sys.executable, "-c", code, tmp_path / "run/.lock"]
    assert subprocess.run(tried, check=False).returncode == 3
    shutil.rmtree(tmp_path / "run")
    RunFolder(tmp_path / "run", RunConfig())
    assert subprocess.run(tried, check=False).returncode == 3
    (tmp_path / "theirs").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, tmp_path / "theirs/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is writing to"):
            RunFolder(tmp_path / "theirs", RunConfig())
        RunFolder(tmp_path / "theirs", RunConfig(), writes=False)
        other.communicate(b"\n")
    RunFolder(tmp_path / "theirs", RunConfig())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run", RunConfig())
    run.save({"w": torch.ones(4)}, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("geodiff4d.core.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        run.save({"w": torch.zeros(4)}, 2)
    assert run.load()[1] == 1


def test_advancing_finishes_items_several_at_a_time():
    finished: list[int] = []

    def shown(items, description="", total=None):
        assert (description, total) == ("people", 3)
        for item in items:
            yield item
            finished.append(item)

    with advancing(shown, "people", 3) as advance:
        assert finished == []
        advance(2)
        assert finished == [0, 1]
        advance(1)
    assert finished == [0, 1, 2]
    with advancing(silent, "people", 1) as advance:
        advance(5)


def test_work_in_several_passes_counts_every_item_once():
    """Sampling and decoding seven frames is fourteen steps and seven frames."""
    told: list[int] = []
    step = in_passes(told.append, 2)
    assert list(passed_on(step)(range(7))) == list(range(7)) and sum(told) == 3
    step(7)
    assert sum(told) == 7
