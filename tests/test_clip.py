"""The clip folder: a round trip, VHAP's fields, and what a broken one says."""

import json

import numpy as np
import pytest
import torch

from geodiff4d.core import files
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import look_at
from geodiff4d.core.images import write_image
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.data.footage.clips import ClipFootage
from geodiff4d.heads.rig import HeadParams


def params(seed: int) -> HeadParams:
    g = torch.Generator().manual_seed(seed)
    sizes = dict(shape=5, expr=4, rotation=3, neck_pose=3, jaw_pose=3, eyes_pose=6, translation=3)
    return HeadParams(**{k: torch.randn(n, generator=g) for k, n in sizes.items()})


def camera() -> Camera:
    T = look_at(torch.tensor([0.3, 0.1, 1.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    return Camera(T, pinhole(40.0, 16, 12), 16, 12)


def write(folder):
    image = torch.rand(3, 12, 16)
    normal = torch.nn.functional.normalize(torch.randn(3, 12, 16), dim=0)
    with ClipWriter(folder, fps=30) as w:
        for t in range(3):
            w.add_params(t, params(t))
            for c in (0, 1):
                w.add(t, c, image, camera(), torch.ones(1, 12, 16), normal)
        w.set_reference(image, normal)
        w.set_tokens(torch.randn(3, 32, 16))
    return image, normal


def test_round_trip(tmp_path):
    image, normal = write(tmp_path / "clip")
    clip = Clip(tmp_path / "clip")
    assert len(clip) == 6 and clip.timesteps == [0, 1, 2] and clip.camera_indices == [0, 1] and clip.fps == 30
    frame = clip.frame(3)
    assert (frame.image - image).abs().max() < 1 / 500
    assert (frame.normal - normal).norm(dim=0).max() < 0.02
    torch.testing.assert_close(frame.camera.T_cam_world, camera().T_cam_world, atol=1e-6, rtol=0)
    torch.testing.assert_close(frame.camera.K, camera().K)
    for name in ("shape", "expr", "rotation", "eyes_pose"):
        torch.testing.assert_close(getattr(frame.params, name), getattr(params(1), name))
    assert clip.expression_tokens.shape == (3, 32, 16)


def test_transforms_are_vhap_style(tmp_path):
    write(tmp_path / "clip")
    meta = json.loads((tmp_path / "clip/transforms.json").read_text())
    frame = meta["frames"][0]
    assert {"timestep_index", "camera_index", "transform_matrix", "fl_x", "flame_param_path", "fg_mask_path"} <= set(
        frame
    )
    # OpenGL camera-to-world: the camera looks along its own -z, here from (0.3, 0.1, 1) to the origin.
    c2w = torch.tensor(frame["transform_matrix"])
    forward = -c2w[:3, 2]
    torch.testing.assert_close(c2w[:3, 3] + forward * c2w[:3, 3].norm(), torch.zeros(3), atol=1e-5, rtol=0)
    assert (tmp_path / "clip/canonical_flame_param.npz").exists()


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ClipWriter(tmp_path / "clip") as w:
        w.add_params(0, params(0))
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["no file", "not json", "no frames", "nan camera", "mirrored camera"])
def test_broken_clip_is_a_user_error(tmp_path, damage):
    write(tmp_path / "clip")
    path = tmp_path / "clip/transforms.json"
    meta = json.loads(path.read_text())
    if damage == "no file":
        path.unlink()
    elif damage == "not json":
        path.write_text("{")
    elif damage == "no frames":
        path.write_text(json.dumps({**meta, "frames": []}))
    else:
        row = meta["frames"][0]["transform_matrix"][0]
        row[:] = [float("nan")] * 4 if damage == "nan camera" else [-x for x in row]
        path.write_text(json.dumps(meta))
    with pytest.raises(UserError):
        Clip(tmp_path / "clip")


@pytest.mark.parametrize(("recorded", "fit", "misfit"), [
    ("openhead", "openhead", "flame2023"),
    ("flame2020", "flame2020", "flame2023"),
    ("flame", "flame2023-open", "openhead"),
])  # fmt: skip
def test_another_heads_parameters_are_refused(tmp_path, recorded, fit, misfit):
    with ClipWriter(tmp_path / "clip", head=recorded) as writer:
        writer.add_params(0, params(0))
        writer.add(0, 0, torch.rand(3, 12, 16), camera(), torch.ones(1, 12, 16))
    clip = Clip(tmp_path / "clip")
    clip.require_head(fit)
    with pytest.raises(UserError, match=f"was tracked with the head '{recorded}', expected '{misfit}'"):
        clip.require_head(misfit)


@pytest.mark.parametrize("damage", ["cut", "objects", "other arrays", "no array", "bomb"])
def test_damaged_parameters_are_a_user_error(tmp_path, damage, monkeypatch):
    write(tmp_path / "clip")
    path = tmp_path / "clip/flame_param/00001.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "objects":
        np.savez(path, shape=np.array([{"a": 1}], dtype=object))
    elif damage == "other arrays":
        np.savez(path, shape=np.zeros(5), poses=np.zeros((1, 3)))
    elif damage == "no array":
        np.savez(path, **{k: np.array("x") for k in vars(params(0)) if k not in ("eyelids", "static_offset")})
    else:
        monkeypatch.setattr(files, "MAX_ARRAYS_BYTES", 10_000)
        np.savez_compressed(path, shape=np.zeros(10_000))
    with pytest.raises(UserError, match=r"00001\.npz") as caught:
        Clip(tmp_path / "clip").params(1)
    assert "\n" not in str(caught.value)


def set_frame(**values):
    return lambda meta: meta["frames"][0].update(values)


def set_ours(**values):
    return lambda meta: meta["geodiff4d"].update(values)


@pytest.mark.parametrize("harm", [
    set_frame(fl_x=0), set_frame(fl_y=-3), set_frame(w=0), set_frame(w=float("inf")), set_frame(fl_x=float("nan")),
    set_frame(file_path="/etc/passwd"), set_frame(file_path="../secret.png"), set_frame(fg_mask_path="a/../../b.png"),
    set_frame(flame_param_path="../../x.npz"), set_frame(file_path=["a"]), set_ours(fps=0), set_ours(fps=-1),
    set_ours(fps=float("nan")), set_ours(fps="fast"), set_ours(head=["openhead"]), set_ours(extra=[]),
    lambda meta: meta.update(geodiff4d="x"), lambda meta: meta.update(frames=None),
])  # fmt: skip
def test_senseless_transforms_are_a_user_error(tmp_path, harm):
    write(tmp_path / "clip")
    path = tmp_path / "clip/transforms.json"
    meta = json.loads(path.read_text())
    harm(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="clip") as caught:
        Clip(tmp_path / "clip")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    "[]", "null", "{}", '{"frames": [3]}', '{"frames": {"a": 1}}', '{"geodiff4d": [], "frames": []}',
    '{"fps": 1' + "0" * 5000 + "}", "[" * 100_000,
])  # fmt: skip
@pytest.mark.parametrize("reader", [Clip, ClipFootage])
def test_files_that_are_json_but_no_clip_are_a_user_error(tmp_path, text, reader):
    write(tmp_path / "clip")
    (tmp_path / "clip/transforms.json").write_text(text)
    with pytest.raises(UserError) as caught:
        reader(tmp_path / "clip")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_a_link_out_of_the_clip_is_refused(tmp_path):
    write(tmp_path / "clip")
    (tmp_path / "clip/images").rename(tmp_path / "elsewhere")
    (tmp_path / "clip/images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="lies outside of it"):
        Clip(tmp_path / "clip")


@pytest.mark.parametrize("folder", ["images", "fg_masks", "normals"])
def test_a_picture_of_another_size_than_its_cameras_is_refused(tmp_path, folder):
    write(tmp_path / "clip")
    write_image(tmp_path / f"clip/{folder}/00000_00.png", torch.rand(3, 24, 32))
    with pytest.raises(UserError, match="32×24 pixels, but its camera 16×12"):
        Clip(tmp_path / "clip").frame(0)


@pytest.mark.parametrize(("harm", "message"), [
    (lambda a: {"expr": a["expr"] * np.nan}, "timestep 1: expr has NaN"),
    (lambda a: {"translation": a["translation"] + 1e6}, "timestep 1: translation has NaN or numbers beyond"),
    (lambda a: {"jaw_pose": a["jaw_pose"][:, :2]}, "jaw_pose"),
])  # fmt: skip
def test_senseless_parameters_are_a_user_error(tmp_path, harm, message):
    write(tmp_path / "clip")
    path = tmp_path / "clip/flame_param/00001.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | harm(arrays))
    with pytest.raises(UserError, match=message):
        Clip(tmp_path / "clip").params(1)
