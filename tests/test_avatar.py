"""The avatar: binding, normals, a fit that reaches a PSNR, resumes and survives a round trip, and bad clips."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from avatars import painted_avatar, talking
from geodiff4d.avatar import drive
from geodiff4d.avatar.binding import NORMAL_AXIS, LocalGaussians, bind, face_frames, sample_surface, to_local
from geodiff4d.avatar.config import FitConfig
from geodiff4d.avatar.densify import DensifyConfig
from geodiff4d.avatar.fit import fit
from geodiff4d.avatar.frames import FitFrames, HoldOut
from geodiff4d.avatar.losses import LossConfig, image_loss, position_tolerance
from geodiff4d.avatar.model import Avatar, AvatarFrame, splat_normals
from geodiff4d.avatar.refine import RefineConfig, Refinement
from geodiff4d.avatar.shoulders import continued
from geodiff4d.avatar.surface import RemeshConfig, remesh
from geodiff4d.cli.fit import Args as FitArgs
from geodiff4d.cli.fit import run as run_fit
from geodiff4d.cli.render import Args as RenderArgs
from geodiff4d.cli.render import run as run_render
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix, look_at, quat_to_matrix
from geodiff4d.core.topology import face_normals
from geodiff4d.core.video import read_video
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import Head
from geodiff4d.presets import PRESETS
from geodiff4d.render.meshes import interpolate, rasterize, render_normals
from geodiff4d.render.photometric import ssim

SIZE = 64


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head("openhead")


def camera(yaw_deg: float) -> Camera:
    yaw = math.radians(yaw_deg)
    eye = torch.tensor([1.2 * math.sin(yaw), 0.0, 1.2 * math.cos(yaw)])
    T = look_at(eye, torch.tensor([0.0, -0.03, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    return Camera(T, pinhole(2.6 * SIZE, SIZE, SIZE), SIZE, SIZE)


@pytest.fixture(scope="module")
def clip(head, tmp_path_factory) -> Clip:
    """Three timesteps of a coloured head from three sides, with parameters that are half a degree off."""
    folder = tmp_path_factory.mktemp("data") / "clip"
    color = 0.5 + 0.4 * torch.sin(
        head.template @ torch.tensor([[90.0, 10.0, 0.0], [20.0, 70.0, 40.0], [0.0, 30.0, 60.0]])
    )
    with ClipWriter(folder, fps=12) as writer:
        for t in range(3):
            params = replace(head.neutral(), jaw_pose=torch.tensor([0.1 * t, 0.0, 0.0]))
            mesh = head.pose(params)
            writer.add_params(t, replace(params, rotation=torch.tensor([0.0, math.radians(0.5), 0.0])))
            for c, yaw in enumerate((-40.0, 0.0, 40.0)):
                fragments = rasterize(mesh.vertices, mesh.faces, camera(yaw))
                normal, mask = render_normals(mesh, camera(yaw), fragments)
                writer.add(t, c, interpolate(fragments, head.faces, color), camera(yaw), mask, normal)
    return Clip(folder)


@pytest.fixture(scope="module")
def avatar_folder(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("avatar") / "avatar"
    fit(clip, out, replace(PRESETS["debug"].fit, iterations=40))
    return out


def splats(count: int, faces: int, seed: int = 0) -> LocalGaussians:
    g = torch.Generator().manual_seed(seed)
    face = torch.randint(faces, (count,), generator=g)
    r = torch.randn(count, 12, generator=g, dtype=torch.float64)
    return LocalGaussians(face, r[:, :3], r[:, 3:7], r[:, 7:10], r[:, 10], r[:, :3])


def triangles(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(30, 3, generator=g, dtype=torch.float64), torch.arange(30).view(10, 3)


def test_binding_moves_rigidly():
    vertices, faces = triangles()
    R, t = axis_angle_to_matrix(torch.tensor([0.3, -1.0, 2.0]).double()), torch.tensor([1.0, 2.0, 3.0]).double()
    local = splats(40, 10)
    before = bind(local, face_frames(vertices, faces))
    after = bind(local, face_frames(vertices @ R.mT + t, faces))
    torch.testing.assert_close(after.means, before.means @ R.mT + t)
    torch.testing.assert_close(quat_to_matrix(after.quats), R @ quat_to_matrix(before.quats))
    torch.testing.assert_close(after.scales, before.scales)


def test_binding_scales_with_the_face():
    vertices, faces = triangles()
    local = splats(40, 10)
    a, b = bind(local, face_frames(vertices, faces)), bind(local, face_frames(2 * vertices, faces))
    torch.testing.assert_close(b.scales, 2 * a.scales)
    torch.testing.assert_close(b.means, 2 * a.means)


def test_frames_are_gaussian_avatars():
    """Columns: first edge, normal, and the third so that R is a rotation; k is the mean of edge and height."""
    vertices = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    frames = face_frames(vertices, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(frames.R[0], torch.eye(3)[:, [0, 1, 2]] * torch.tensor([1.0, 1.0, 1.0]))
    assert frames.scale[0] == 1.5 and torch.equal(frames.centre[0], vertices.mean(0))


def test_degenerate_triangles_are_harmless():
    vertices = torch.tensor(
        [[0.0, 0.0, 0.0]] * 3 + [[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 0.0, 0.0]], requires_grad=True
    )
    local = splats(4, 2)
    local = replace(local, **{n: v.float() for n, v in local.parameters.items()})
    out = bind(local, face_frames(vertices, torch.arange(6).view(2, 3)))
    assert all(v.isfinite().all() for v in vars(out).values())
    torch.stack([v.sum() for v in vars(out).values()]).sum().backward()
    assert vertices.grad is not None and vertices.grad.isfinite().all()


def test_start_is_flat_on_the_surface(head):
    local = sample_surface(
        head.template, head.faces, torch.ones(len(head.faces)), 12_000, torch.Generator().manual_seed(0)
    )
    assert len(local) >= len(head.faces) and len(local.face_index.unique()) == len(head.faces)
    frames = face_frames(head.template, head.faces)
    world = bind(local, frames)
    assert (world.scales.argmin(-1) == NORMAL_AXIS).all()
    normal = normalize(face_normals(head.template, head.faces), dim=-1)[local.face_index]
    axis = quat_to_matrix(world.quats)[..., NORMAL_AXIS]
    assert ((axis * normal).sum(-1) > 0.999).float().mean() > 0.999
    torch.testing.assert_close(to_local(world.means, frames, local.face_index), local.means, atol=1e-3, rtol=1e-3)


def test_splat_normals_face_the_viewer(head):
    local = sample_surface(head.template, head.faces, torch.ones(len(head.faces)), 1, torch.Generator().manual_seed(0))
    cam = camera(30.0)
    world = bind(local, face_frames(head.template, head.faces))
    normals = splat_normals(world, cam)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(len(normals)))
    to_camera = torch.diag(torch.tensor([1.0, -1.0, -1.0])) @ cam.T_cam_world[:3, :3]
    view = (cam.position - world.means) @ to_camera.T
    assert ((normals * view).sum(-1) > -1e-4).all()


def test_tolerance_is_tight_on_the_face_and_loose_on_hair(head):
    tolerance = position_tolerance(head)
    lips, scalp = (head.regions[n][head.faces].all(-1) for n in ("lips", "scalp"))
    assert tolerance[lips].max() < 0.0031 and tolerance[scalp].min() > 0.059


def test_ssim_of_equal_and_different():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 32, 40, generator=g)
    assert abs(float(ssim(a, a)) - 1) < 1e-5 and float(ssim(a, b)) < 0.2
    small = torch.rand(2, 3, 8, 9, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ssim(x, small[1]), small[0].requires_grad_())


def test_images_are_compared_as_eq_2_says():
    """Ours / theirs: alpha is the rendered one, or the mask. Where they are equal, both are the same."""
    config = LossConfig(ssim=0.0, normals=0.1, alpha=0.2)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:, 4:] = 1
    image = torch.full((3, 16, 16), 0.5)
    normal = torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 16, 16)
    box = (slice(4, 16), slice(4, 16))

    def loss(alpha: torch.Tensor, rendered: torch.Tensor, given: torch.Tensor | None = normal) -> float:
        return float(image_loss(AvatarFrame(image, rendered, alpha), image, mask, given, box, config))

    assert loss(mask, mask * normal) == pytest.approx(0, abs=1e-6)
    assert loss(mask, mask * normal * 0.4) == pytest.approx(0.1 * 0.6 / 3, abs=1e-6), "lambda L1 per channel"
    assert loss(mask, mask * normal * 0.4, None) == pytest.approx(0, abs=1e-6)
    assert loss(mask * 0.5, mask * normal * 0.5) == pytest.approx(0.2 * 0.5 * 144 / 256, abs=1e-6), "alpha alone"
    outside = torch.where(mask > 0, normal, torch.ones(3, 16, 16))
    assert loss(mask, outside) == pytest.approx(0, abs=1e-6), "normals count on the foreground"
    config = replace(config, normal_alpha="mask")
    assert loss(mask, mask * normal) == pytest.approx(0, abs=1e-6)
    whole = loss(mask * 0.5, mask * normal * 0.5) - 0.2 * 0.5 * 144 / 256
    assert whole == pytest.approx(0.1 * 0.5 / 3, abs=1e-6), "half an alpha is half a normal too few"


def test_refinement_groups_follow_the_paper():
    config = RefineConfig(expr=4.0, pose=3.0, face=2.0, translation=1.0, shape=5.0)
    groups = {g["name"]: g["peak"] for g in Refinement(load_head("openhead").neutral(2)).groups(config)}
    known = {
        "expr": 4.0, "rotation": 3.0, "neck_pose": 3.0, "jaw_pose": 2.0, "eyes_pose": 2.0, "translation": 1.0,
        "shape": 5.0,
    }  # fmt: skip
    assert groups == known
    assert RefineConfig().face == RefineConfig().pose == 2e-4


def test_refinement_schedule():
    config = RefineConfig()
    rates = [config.rate(1.0, x) for x in (0.0, 0.05, 0.1, 0.5, 0.7, 1.0)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 0.01]))
    assert replace(config, start=0.25).rate(1.0, 0.0) == 0.25 and replace(config, start=0.25).rate(1.0, 0.05) == 0.625


def test_refinement_starts_at_the_clip(head, clip):
    base = replace(head.neutral(3), jaw_pose=torch.rand(3, 3))
    refined = Refinement(base).sequence()
    assert all(torch.equal(v, getattr(refined, n)) for n, v in vars(base).items() if v is not None)


def test_fit_reaches_a_psnr(avatar_folder):
    metrics = json.loads((avatar_folder / "metrics.json").read_text())
    assert metrics["held_out"]["psnr_fg"] > 17.5 and metrics["held_out"]["normal_deg"] < 15
    assert metrics["iterations_per_second"] > 0 and metrics["gaussians"] >= 10_000
    assert {p.name for p in avatar_folder.iterdir()} >= {
        "config.json",
        "avatar.safetensors",
        "params.npz",
        "preview.png",
    }


def test_avatar_round_trip(avatar_folder, tmp_path):
    avatar = Avatar.load(avatar_folder)
    (tmp_path / "again").mkdir()
    avatar.save(tmp_path / "again")
    again = Avatar.load(tmp_path / "again")
    assert torch.equal(
        avatar.render(avatar.sequence[1], camera(20)).rgb, again.render(again.sequence[1], camera(20)).rgb
    )
    silhouette = avatar.render(avatar.sequence[0], avatar.camera).alpha > 0.5
    mesh = avatar.head.pose(replace(avatar.sequence[0], shape=avatar.shape))
    truth = rasterize(mesh.vertices, mesh.faces, avatar.camera).mask[None]
    assert (silhouette & truth).sum() / (silhouette | truth).sum() > 0.85


def test_resume_equals_uninterrupted(clip, tmp_path):
    config = replace(
        PRESETS["debug"].fit,
        iterations=6,
        gaussians=1,
        checkpoint_every=3,
        densify=DensifyConfig(every=2, grow_grad2d=1e-6),
        harmonics=2,
        harmonics_every=2,
    )

    def interrupted(items, *_):
        for i in items:
            if i == 4:
                raise KeyboardInterrupt
            yield i

    fit(clip, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        fit(clip, tmp_path / "halves", config, progress=interrupted)
    assert not (tmp_path / "halves").exists()
    seen: list[int] = []
    fit(clip, tmp_path / "halves", config, progress=lambda items, *_: (seen.append(i) or i for i in items))
    assert seen == [3, 4, 5] and not list(tmp_path.glob("*.run"))
    a, b = Avatar.load(tmp_path / "whole"), Avatar.load(tmp_path / "halves")
    assert all(torch.equal(v, getattr(b.local, n)) for n, v in a.local.tensors.items())
    assert torch.equal(a.sequence.expr, b.sequence.expr) and torch.equal(a.shape, b.shape)
    learned = a.local.harmonics.abs().amax((0, 2))
    assert (learned > 0).all(), "the first degree from the third step on, the second from the fifth"


def test_a_fit_is_not_resumed_on_other_images(clip, tmp_path):
    config = replace(PRESETS["debug"].fit, iterations=2, gaussians=1, checkpoint_every=1, densify=None)

    def interrupted(items, *_):
        raise KeyboardInterrupt

    mine = edited(clip, tmp_path / "clip", lambda frames: None)
    with pytest.raises(KeyboardInterrupt):
        fit(mine, tmp_path / "out", config, progress=interrupted)
    run = tmp_path / "out.run/config.json"
    known = json.loads(run.read_text())
    shutil.rmtree(tmp_path / "clip")
    theirs = edited(clip, tmp_path / "clip", lambda frames: None)
    image = theirs.records[0].image_path
    image.write_bytes(theirs.records[1].image_path.read_bytes())
    with pytest.raises(UserError, match="another configuration"):
        fit(theirs, tmp_path / "out", config)
    del known["config"]["files"]  # As runs were that began before anybody looked.
    run.write_text(json.dumps(known))
    fit(theirs, tmp_path / "out", config)


def test_ablations():
    config = FitConfig().ablated("refine").ablated("normals")
    assert config.refine is None and config.loss.normals == 0
    with pytest.raises(UserError, match="expected one of refine"):
        config.ablated("hair")


def test_orbit_keeps_the_head_in_the_middle(avatar_folder):
    avatar = Avatar.load(avatar_folder)
    centre = drive.head_centre(avatar)
    cameras = drive.orbit(avatar, 8)
    places = torch.stack([c.project(centre[None])[0][0] for c in cameras])
    assert (places - places[0]).abs().max() < 1e-2
    right = torch.linalg.inv(cameras[2].T_cam_world)[:3, 3] - torch.linalg.inv(cameras[0].T_cam_world)[:3, 3]
    assert right[0] > 0.5  # positive yaw goes to the viewer's right


@pytest.mark.parametrize("which", ["orbit", "front", "file"])
def test_render_command(avatar_folder, clip, tmp_path, which):
    where = str(clip.folder / "transforms.json") if which == "file" else which
    out = tmp_path / "v.mp4"
    run_render(RenderArgs(avatar_folder, out, driving=clip.folder, camera=where, normals=which == "front", size=48))
    frames = list(read_video(out))
    assert len(frames) == 3 and frames[0].shape == (3, 48, 48)


def test_fit_command(clip, tmp_path, capsys):
    without = ("refine", "normals")
    run_fit(FitArgs(clip.folder, tmp_path / "a", preset="debug", ablate=without, iterations=2, harmonics=2))
    assert Avatar.load(tmp_path / "a").local.harmonics.shape[1:] == (8, 3)
    assert "Gaussians" in capsys.readouterr().out and (tmp_path / "a/avatar.safetensors").exists()


def edited(clip: Clip, folder, change) -> Clip:
    """Copy a clip with its transforms.json changed by `change(frames)`."""
    shutil.copytree(clip.folder, folder)
    meta = json.loads((folder / "transforms.json").read_text())
    change(meta["frames"])
    (folder / "transforms.json").write_text(json.dumps(meta))
    return Clip(folder)


def test_views_and_times_are_held_out(clip, head):
    frames = FitFrames(clip, head, HoldOut(every=0, views=1, times=0.3))
    where = [(r.timestep, r.camera_index) for r in clip.records]
    assert {where[i] for i in frames.held_out_views} == {(0, 2), (1, 2)}
    assert {where[i] for i in frames.held_out_times} == {(2, 0), (2, 1)}
    assert {where[i] for i in frames.train} == {(t, c) for t in (0, 1) for c in (0, 1)}
    with pytest.raises(UserError, match="3 camera"):
        FitFrames(clip, head, HoldOut(views=3))
    with pytest.raises(UserError, match="too few"):
        FitFrames(clip, head, HoldOut(times=0.9))


def test_one_image_is_enough(clip, tmp_path):
    one = edited(clip, tmp_path / "one", lambda frames: frames.__delitem__(slice(1, None)))
    config = replace(PRESETS["debug"].fit, iterations=2)
    metrics = fit(one, tmp_path / "avatar", config)
    assert metrics["held_out"]["psnr_fg"] is None and metrics["train"]["psnr_fg"] > 5
    with pytest.raises(UserError, match="estimator was not given"):
        fit(one, tmp_path / "avatar", config.ablated("normal-source"))


def test_halved_frames_show_the_same(clip, head):
    frames = FitFrames(clip, head, HoldOut(0))
    whole, half = (frames.target(0, torch.tensor([1.0, 0.0, 0.0]), halved) for halved in (False, True))
    assert whole.normal is not None and half.normal is not None
    # Normals keep their length at outlines: what is rendered is compared with them by alpha.
    normals = whole.normal * (whole.mask > 0), half.normal * torch.nn.functional.avg_pool2d((whole.mask > 0).float(), 2)
    for a, b in ((whole.image, half.image), (whole.mask, half.mask), normals):
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(a, 2), b, atol=0.012, rtol=0)
    points = head.template[::50]
    torch.testing.assert_close(whole.camera.project(points)[0] / 2, half.camera.project(points)[0])
    assert (half.camera.width, half.camera.height) == (half.mask.shape[-1], half.mask.shape[-2])
    assert half.box[0].start == whole.box[0].start // 2 and 0 <= 2 * half.box[1].stop - whole.box[1].stop <= 1


def test_estimated_normals_train_and_the_clips_score(clip, head):
    up = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    frames = FitFrames(clip, head, HoldOut(0, 1), lambda frame: up.expand_as(frame.image))
    seen, held = frames.target(frames.train[0]), frames.target(frames.held_out[0])
    assert seen.normal is not None and seen.clip_normal is not None and held.normal is not None
    inside = seen.mask[0] > 0.99
    assert (seen.normal[1][inside] > 0.99).all() and (seen.clip_normal[2][inside] > 0.3).float().mean() > 0.5
    assert held.clip_normal is not None and torch.equal(held.normal, held.clip_normal)


def test_bad_clips(clip, tmp_path, head):
    def no_masks(frames):
        [f.pop("fg_mask_path") for f in frames]

    def no_params(frames):
        [f.pop("flame_param_path") for f in frames]

    with pytest.raises(UserError, match="no foreground mask"):
        fit(edited(clip, tmp_path / "a", no_masks), tmp_path / "out")
    with pytest.raises(UserError, match="no head parameters"):
        fit(edited(clip, tmp_path / "b", no_params), tmp_path / "out")
    hole = edited(clip, tmp_path / "c", lambda frames: None)
    hole.records[4].image_path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        fit(hole, tmp_path / "out")
    with ClipWriter(tmp_path / "d") as writer:
        writer.add_params(0, replace(head.neutral(), expr=torch.zeros(7)))
        writer.add(0, 0, torch.zeros(3, 32, 32), replace(camera(0), width=32, height=32), torch.ones(1, 32, 32))
    with pytest.raises(UserError, match="another head"):
        fit(Clip(tmp_path / "d"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_avatars(avatar_folder, tmp_path):
    with pytest.raises(UserError, match="is not an avatar"):
        Avatar.load(tmp_path)
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(avatar_folder, broken)
    (broken / "avatar.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="damaged avatar"):
        Avatar.load(broken)
    with pytest.raises(UserError, match="not a video"):
        run_render(RenderArgs(avatar_folder, tmp_path / "v.gif"))
    with pytest.raises(UserError, match="--camera"):
        run_render(RenderArgs(avatar_folder, tmp_path / "v.mp4", camera="side"))


def test_a_body_goes_on_below_what_enough_cameras_see():
    possible, known = torch.ones(3, 4, 1, dtype=torch.bool), torch.zeros(3, 4, 1, dtype=torch.bool)
    known[:, 2:] = True
    possible[0, 3], possible[2, 2:], possible[1, 0] = False, False, False
    filled = continued(possible, known)[..., 0]
    # The columns, from below: known above and carried down; ended by an image of background; never there.
    assert filled.tolist() == [[True, True, True, False], [False, True, True, True], [False] * 4]


def _harmed(tensors: dict, config: dict, params: dict, harm: str) -> None:
    """Do to an avatar's parts what a damaged disk or an unfriendly file would."""
    changed = {
        "negative face": lambda t: {"face_index": t["face_index"] - 10**9},
        "int32 face": lambda t: {"face_index": t["face_index"].int()},
        "short means": lambda t: {"means": t["means"][:5].clone()},
        "flat means": lambda t: {"means": t["means"][:, :2].contiguous()},
        "whole means": lambda t: {"means": t["means"].int()},
        "nan means": lambda t: {"means": t["means"] * float("nan")},
        "short quats": lambda t: {"quats": t["quats"][:5].clone()},
        "short opacities": lambda t: {"opacity_logits": t["opacity_logits"][:5].clone()},
        "infinite scales": lambda t: {"log_scales": t["log_scales"] + float("inf")},
        "nan camera": lambda t: {"T_cam_world": t["T_cam_world"] * float("nan")},
        "zero K": lambda t: {"K": t["K"] * 0},
    }
    if harm in changed:
        tensors |= changed[harm](tensors)
    elif harm == "no frames":
        params |= {k: v[:0] for k, v in params.items()}
    elif harm == "nan frames":
        params["expr"] = params["expr"] * np.nan
    else:
        key, value = harm.split("=")
        config[key] = float(value) if key == "fps" else int(value)


@pytest.mark.parametrize("harm", [
    "negative face", "int32 face", "short means", "flat means", "whole means", "nan means", "short quats",
    "short opacities", "infinite scales", "nan camera", "zero K", "no frames", "nan frames", "fps=0", "fps=nan",
    "fps=1e9", "width=0", "width=1000000000",
])  # fmt: skip
def test_avatars_that_would_read_foreign_memory_or_show_garbage_are_refused(head, tmp_path, harm):
    avatar = painted_avatar(head, talking(head, 3), size=16)
    avatar.save(tmp_path)
    tensors, config = load_file(tmp_path / "avatar.safetensors"), json.loads((tmp_path / "config.json").read_text())
    params = dict(np.load(tmp_path / "params.npz"))
    _harmed(tensors, config, params, harm)
    save_file(tensors, tmp_path / "avatar.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.savez(tmp_path / "params.npz", **params)
    with pytest.raises(UserError, match=r"damaged avatar|the camera has NaN|focal length 0|at 0×") as caught:
        Avatar.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["faces", "head_face", "corners"])
def test_a_surface_that_points_outside_itself_is_refused(head, name):
    surface = remesh(head, RemeshConfig(16))
    surface.check(head)
    for value in (-1, 10**6):
        broken = getattr(surface, name).clone()
        broken.view(-1)[0] = value
        with pytest.raises(ValueError, match="points outside"):
            replace(surface, **{name: broken}).check(head)
    with pytest.raises(ValueError, match="expected"):
        replace(surface, bary=surface.bary.double()).check(head)
