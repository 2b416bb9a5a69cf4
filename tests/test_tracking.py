"""Tracking without a detector: landmarks projected from the head itself must give the head back."""

import json
import os
import signal
import stat
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from geodiff4d.avatar.frames import FitFrames, HoldOut
from geodiff4d.cli import main
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix, rigid
from geodiff4d.core.images import write_image
from geodiff4d.core.video import read_video, write_video
from geodiff4d.data.clip import Clip
from geodiff4d.data.footage.clips import ClipFootage
from geodiff4d.heads import Head, HeadParams, load_head
from geodiff4d.pipeline import driver_clip_index
from geodiff4d.render import meshes
from geodiff4d.render.crops import canonical_crop_box, crop_image, head_region
from geodiff4d.render.meshes import rasterize
from geodiff4d.tracking import live, mediapipe_worker
from geodiff4d.tracking import track as tracking
from geodiff4d.tracking.background import corrected
from geodiff4d.tracking.detect import ENVIRONMENT_VARIABLE, Detection, MediaPipeDetector, track_environment
from geodiff4d.tracking.fit import fit, weak_perspective
from geodiff4d.tracking.layout import Layout, landmark_head
from geodiff4d.tracking.live import LiveConfig, LiveFrame, live_frames, track_live
from geodiff4d.tracking.matte import matte
from geodiff4d.tracking.observe import observe
from geodiff4d.tracking.points import choose_points
from geodiff4d.tracking.problem import HeadFitConfig
from geodiff4d.tracking.projection import FRONT
from geodiff4d.tracking.solve import Limits, Normal, Unknowns, minimise
from geodiff4d.tracking.source import focal_length
from geodiff4d.tracking.squares import HeadSquare
from geodiff4d.tracking.track import TrackingConfig, track, track_frames
from geodiff4d.tracking.turn import apparent_turn
from geodiff4d.video.inputs import load_driving

WIDTH, HEIGHT, FOCAL = 320, 240, 640.0


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head("openhead")


def camera() -> Camera:
    return Camera(rigid(FRONT, torch.tensor([0.02, -0.03, 1.0])), pinhole(FOCAL, WIDTH, HEIGHT), WIDTH, HEIGHT)


def motion(head: Head, frames: int, roll_deg: float = 0.0) -> HeadParams:
    """A person who turns, nods, smiles and looks around."""
    g = torch.Generator().manual_seed(1)
    t = torch.linspace(0, 1, frames)
    p = head.neutral(frames)
    zero = torch.zeros_like(t)
    expr = p.expr.clone()
    for name, weight in (("jawOpen", 0.5 * t), ("mouthSmileLeft", 0.6 * (1 - t)), ("mouthSmileRight", 0.6 * (1 - t))):
        expr[:, head.expression_names.index(name)] = weight
    gaze = torch.stack([zero, 0.2 * t, zero] * 2, -1)
    rotation = torch.stack([0.1 * t, 0.4 * t - 0.2, zero + np.deg2rad(roll_deg)], -1)
    shape = 0.7 * torch.randn(p.shape.shape[-1], generator=g)
    return replace(p, shape=shape.expand(frames, -1), expr=expr, rotation=rotation, eyes_pose=gaze)


def detections(head: Head, params: HeadParams, noise_px: float = 0.0) -> list[Detection | None]:
    mesh = head.pose(params)
    points, _ = camera().expand(*params.batch).project(head.mediapipe.on(mesh.vertices, head.faces))
    points = points + noise_px * torch.randn(points.shape, generator=torch.Generator().manual_seed(2))
    return [Detection(p, head.mediapipe_index, 1.0, torch.cat([p.amin(0), p.amax(0)])) for p in points]


def rotation_error_deg(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    R = axis_angle_to_matrix(a).mT @ axis_angle_to_matrix(b)
    return torch.rad2deg(torch.acos(((R.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1)))


@pytest.mark.parametrize("roll_deg", [0.0, 45.0, -45.0])
def test_pose_of_a_photo(head, roll_deg):
    truth = motion(head, 2, roll_deg)[1:]
    result = fit(head, detections(head, truth, 0.3), WIDTH, HEIGHT, FOCAL)
    assert result.error < 1
    assert rotation_error_deg(result.params.rotation, truth.rotation).max() < 3
    # The camera carries the distance: the metric size of the head gives it.
    depth = result.camera.T_cam_world[2, 3] - camera().T_cam_world[2, 3]
    assert abs(depth) < 0.08


def test_video_shares_identity_and_follows_motion(head):
    frames = 6
    truth = motion(head, frames)
    seen = detections(head, truth, 0.3)
    seen[2] = None
    result = fit(head, seen, WIDTH, HEIGHT, FOCAL)
    assert result.error < 1 and result.seen.tolist() == [True, True, False, True, True, True]
    assert (result.params.shape == result.params.shape[:1]).all()
    assert rotation_error_deg(result.params.rotation, truth.rotation).max() < 1.5
    jaw = head.expression_names.index("jawOpen")
    assert (result.params.expr[:, jaw] - truth.expr[:, jaw]).abs().max() < 0.15
    assert (result.params.expr >= 0).all() and (result.params.expr <= 1).all()
    assert (result.params.eyes_pose[-1, 1] - truth.eyes_pose[-1, 1]).abs() < 0.08
    # The mean motion is the camera's, so the clip's head stays at the origin.
    assert result.params.translation.mean(0).abs().max() < 1e-5


def test_the_start_repeats_to_the_bit(head):
    config = HeadFitConfig()
    seen = observe(head, detections(head, motion(head, 1), 0.3), config.weighting)
    small, K = landmark_head(head, seen.landmarks), pinhole(FOCAL, WIDTH, HEIGHT).double()
    layout, elsewhere, starts = Layout(small), [], set()
    for k in range(100):
        elsewhere.append(torch.zeros(7 * k + 1))
        starts.add(tuple(weak_perspective(small, layout, seen, K).frame.flatten().tolist()))
    assert len(starts) == 1


def test_outliers_lose_their_weight(head):
    truth = motion(head, 1)
    [d] = detections(head, truth)
    points = d.points.clone()
    points[::20] += 25
    result = fit(head, [replace(d, points=points)], WIDTH, HEIGHT, FOCAL)
    assert rotation_error_deg(result.params.rotation, truth.rotation).max() < 3


def test_landmark_head_moves_as_the_mesh(head):
    params = motion(head, 3)
    small = landmark_head(head, head.mediapipe)
    assert Layout(small).arkit
    double = params.map(lambda v: v.double())
    points = small.pose(double).vertices[:, : len(head.mediapipe_index)]
    expected = head.mediapipe.on(head.pose(params).vertices, head.faces)
    assert (points.float() - expected).norm(dim=-1).max() < 2e-4


def test_solver_against_one_dense_problem():
    g = torch.Generator().manual_seed(0)
    frames, n, shared = 5, 3, 2
    A, B, b = (torch.randn(frames, 6, k, generator=g, dtype=torch.float64) for k in (n, shared, 1))

    def model(x: Unknowns) -> Normal:
        r = A @ x.frame[..., None] + B @ x.shared[:, None] - b
        gradient = (A.mT @ r)[..., 0], (B.mT @ r)[..., 0].sum(0)
        return Normal(0.5 * float(r.square().sum()), A.mT @ A, A.mT @ B, (B.mT @ B).sum(0), *gradient)

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.float64)

    smoothness = torch.tensor([2.0, 0.0, 0.3], dtype=torch.float64)
    limits = Limits(zeros(n) + 1, zeros(shared) + 1, smoothness, zeros(n) - torch.inf, zeros(n) + torch.inf)
    got = minimise(model, Unknowns(zeros(frames, n), zeros(shared)), limits, steps=20, tolerance=1e-14)
    bends = torch.from_numpy(np.kron(np.diff(np.eye(frames), n=2, axis=0), np.diag(smoothness.sqrt())))
    top = torch.cat([torch.block_diag(*A), B.flatten(0, 1)], 1)
    dense = torch.cat([top, torch.cat([bends, zeros(len(bends), shared)], 1)])
    right = torch.cat([b.flatten(), zeros(len(bends))])
    expected = torch.linalg.lstsq(dense, right[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.cat([got.frame.flatten(), got.shared]), expected)
    held = replace(limits, low=zeros(n), high=zeros(n) + 0.1)
    inside = minimise(model, Unknowns(zeros(frames, n), zeros(shared)), held, steps=40)
    assert inside.frame.min() >= 0 and inside.frame.max() <= 0.1


@dataclass
class FakeDetector:
    """Answers with what it was given."""

    answers: list[Detection | None]

    def detect(self, images, video=False):
        return self.answers[: len(list(images))]


@pytest.mark.parametrize("whole", [True, False], ids=["of the whole image", "of the head's square"])
def test_whose_segmentation_counts(head, whole):
    """MediaPipe's, of the whole image, is taken; in place of the looker's the network that cuts people out is asked."""
    truth = motion(head, 1)
    [d] = detections(head, truth)
    mask, image = torch.zeros(1, HEIGHT, WIDTH), torch.rand(3, HEIGHT, WIDTH)
    mask[:, :, : WIDTH // 2] = 1
    extent, cut_out = None if whole else (0.0, 0.0, float(WIDTH)), []
    for told in (mask, 1 - mask):
        answer = FakeDetector([replace(d, mask=told.half(), extent=extent)])
        tracked = track_frames([image], head, answer, TrackingConfig(size=64, focal_px=FOCAL), video=False)
        cut_out.append(tracked.masks)
    assert torch.equal(*cut_out) != whole


def test_photo_to_clip(head, tmp_path):
    truth = motion(head, 1)
    [d] = detections(head, truth)
    write_image(tmp_path / "me.png", torch.rand(3, HEIGHT, WIDTH))
    # A square around the image, as the embedded detector looks at it.
    mask, around = torch.ones(1, 32, 32).half(), (-WIDTH / 2, -WIDTH / 2, 2.0 * WIDTH)
    clip = track(
        tmp_path / "me.png",
        tmp_path / "clip",
        head,
        FakeDetector([replace(d, mask=mask, extent=around, faces=2)]),
        TrackingConfig(size=64),
    )
    frame = clip.frame(0)
    assert frame.image.shape == (3, 64, 64) and (clip.folder / "overlay.png").exists()
    assert clip.extra["focal_source"].startswith("assumed") and "2 faces" in clip.extra["notes"][0]
    # Everything is told to be the person, and is where the crop shows the image.
    _, top, side = clip.extra["crop"]
    above, below = (y * 64 / side for y in (-top, HEIGHT - top))
    assert above > 2 or below < 62, "the crop leaves the image"
    rows = frame.mask[0, :, 28:36].amax(1)
    assert rows[: max(int(above) - 1, 0)].sum() == rows[int(below) + 2 :].sum() == 0 and rows[24:40].min() > 0.9
    # The canonical crop: the head's box takes 1/1.6 of the side and is centred.
    xy, _ = frame.camera.project(head.pose(frame.params).vertices[head_region(head)])
    low, high = xy.amin(0), xy.amax(0)
    assert abs(float((high - low).max()) - 64 / 1.6) < 0.5 and ((low + high) / 2 - 32).abs().max() < 0.5


def test_a_mask_of_the_users_is_taken(head, tmp_path):
    """It is cut as the image is; one of another size, of a video or without anything in it is refused."""
    write_image(tmp_path / "me.png", torch.rand(3, HEIGHT, WIDTH))
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, : WIDTH // 2] = 1
    write_image(tmp_path / "mask.png", mask.expand(3, -1, -1))
    config = TrackingConfig(size=64, mask=tmp_path / "mask.png")

    [seen] = detections(head, motion(head, 1))

    def tracked(source: str = "me.png", config: TrackingConfig = config) -> Clip:
        return track(tmp_path / source, tmp_path / "clip", head, FakeDetector([seen] * 2), config)

    clip = tracked()
    left, _, side = clip.extra["crop"]
    edge = (WIDTH / 2 - left) * 64 / side
    got = clip.frame(0).mask[0, 28:36]  # Above and below, the crop may leave the image.
    assert got[:, : int(edge) - 1].min() > 0.9 and got[:, int(edge) + 2 :].max() < 0.1
    write_image(tmp_path / "small.png", mask[:, ::2, ::2].expand(3, -1, -1))
    write_image(tmp_path / "none.png", torch.zeros(3, HEIGHT, WIDTH))
    write_video(tmp_path / "me.mp4", [torch.rand(3, HEIGHT, WIDTH)] * 2, fps=25)
    for name, says in (("small.png", f"expected {WIDTH}×{HEIGHT}"), ("none.png", "all of one colour")):
        with pytest.raises(UserError, match=says):
            tracked(config=replace(config, mask=tmp_path / name))
    with pytest.raises(UserError, match="is a video"):
        tracked("me.mp4")


def test_video_to_clip(head, tmp_path):
    seen = detections(head, motion(head, 4))
    write_video(tmp_path / "me.mp4", [torch.full((3, HEIGHT, WIDTH), 0.1 * t) for t in range(4)], fps=25)
    clip = track(tmp_path / "me.mp4", tmp_path / "clip", head, FakeDetector(seen), TrackingConfig(size=32, limit=3))
    assert len(clip) == 3 and clip.fps == 25 and (clip.folder / "overlay.mp4").exists()
    assert torch.equal(clip.params(0).shape, clip.params(2).shape)


def test_a_video_that_ends_early_is_noted(head, tmp_path, monkeypatch):
    seen = detections(head, motion(head, 3))
    write_video(tmp_path / "me.mp4", [torch.full((3, HEIGHT, WIDTH), 0.1 * t) for t in range(3)], fps=25)
    monkeypatch.setattr(tracking, "cut_short", lambda path, count: f"{path.name} ends after {count} of about 90 frames")
    clip = track(tmp_path / "me.mp4", tmp_path / "clip", head, FakeDetector(seen), TrackingConfig(size=32))
    assert clip.extra["notes"] == ["me.mp4 ends after 3 of about 90 frames"]


def perceived(head: Head, params: HeadParams, noise_px: float = 0.3) -> list[Detection]:
    """What the embedded network would say: its own points, how sure it is, a mask, normals and first guesses."""
    markup, mesh = choose_points(head), head.pose(params)
    points, _ = camera().expand(*params.batch).project(markup.on(head).on(mesh.vertices, head.faces))
    points = points + noise_px * torch.randn(points.shape, generator=torch.Generator().manual_seed(3))
    T = camera().T_cam_world.expand(*params.batch, 4, 4)
    centre = mesh.vertices[:, head_region(head)].mean(1)
    turns = apparent_turn(axis_angle_to_matrix(params.rotation), T, centre)
    where, _ = camera().expand(*params.batch).project(centre[:, None])
    facing = torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 16, 16).half()
    return [
        Detection(
            p, markup.index, 1.0, torch.cat([p.amin(0), p.amax(0)]), mask=torch.ones(1, 16, 16).half(),
            sigma=torch.full((len(p),), noise_px), normal=facing, extent=(0.0, -40.0, float(WIDTH)),
            square=HeadSquare(*w[0].tolist(), 100.0, 0.0), turn=R, shape=shape[:24], markup=markup,
        )
        for p, w, R, shape in zip(points, where, turns, params.shape, strict=True)
    ]  # fmt: skip


def test_own_points_guesses_and_uncertainty(head):
    truth = motion(head, 2)[1:]
    [d] = perceived(head, truth)
    result = fit(head, [d], WIDTH, HEIGHT, FOCAL)
    assert rotation_error_deg(result.params.rotation, truth.rotation).max() < 2
    # A point that is known to be unsure does not pull.
    bad = d.points.clone()
    bad[:40] += 12
    sigma = d.sigma.clone()
    sigma[:40] = 30
    unsure = fit(head, [replace(d, points=bad, sigma=sigma)], WIDTH, HEIGHT, FOCAL)
    assert rotation_error_deg(unsure.params.rotation, truth.rotation).max() < 3
    # First guesses bind as much as they are trusted.
    believing = HeadFitConfig(turn_sigma_rad=1e-3, guess_sigma=0.05)
    guessed = fit(head, [d], WIDTH, HEIGHT, FOCAL, believing)
    assert rotation_error_deg(guessed.params.rotation, truth.rotation).max() < 0.5
    assert (guessed.params.shape[0, :24] - truth.shape[0, :24]).abs().mean() < 0.15
    assert observe(head, [d]).inner.sum() > 60


def test_frames_in_memory_with_a_gap(head):
    truth = motion(head, 4)
    seen: list[Detection | None] = [*perceived(head, truth)]
    seen[2] = None
    images = [torch.full((3, HEIGHT, WIDTH), 0.2 * t) for t in range(4)]
    tracked = track_frames(images, head, FakeDetector(seen), TrackingConfig(size=48, focal_px=FOCAL))
    assert tracked.located.lost == [2] and tracked.images.shape == (4, 3, 48, 48)
    assert rotation_error_deg(tracked.params.rotation, truth.rotation).max() < 3, "the gap is interpolated"
    assert tracked.normals is not None and tracked.normals[2].abs().max() == 0
    inside = tracked.masks[0, 0] > 0.5
    assert inside.any() and (tracked.normals[0, 2][inside] > 0.99).float().mean() > 0.95
    assert tracked.masks[2].max() > 0.9, "without a segmentation the mask is the head's"


def test_of_a_film_with_cuts_the_longest_shot_is_tracked(head, tmp_path):
    g = torch.Generator().manual_seed(3)
    a, b = (torch.nn.functional.interpolate(x[None], (HEIGHT, WIDTH), mode="bicubic")[0].clamp(0, 1)
            for x in torch.rand(2, 3, 5, 6, generator=g))  # fmt: skip
    truth = motion(head, 8)
    kept: list[Detection | None] = [*perceived(head, truth)]
    kept[3] = None
    kept[5] = replace(kept[4], points=kept[4].points + 40 * torch.randn(kept[4].points.shape, generator=g))
    write_video(tmp_path / "cut.mp4", [a] * 5 + [b] * 8, 24)

    class Followed:
        """Follows the first person's face into the second shot, unless it is asked about that shot alone."""

        def detect(self, images, video=False):
            n = len(list(images))
            return kept if n == 8 else [kept[0]] * n

    clip = track(tmp_path / "cut.mp4", tmp_path / "clip", head, Followed(), TrackingConfig(size=48, focal_px=FOCAL))
    assert clip.extra["shots"] == [[0, 5], [5, 13]] and clip.extra["first_frame"] == 5 and len(clip) == 8
    assert any("2 shots (cuts before frames 5)" in note for note in clip.extra["notes"])
    assert clip.extra["lost_frames"] == [3] and clip.extra["doubtful_frames"] == [5]
    assert [r.timestep for r in clip.records if r.unread] == [3, 5]
    assert (
        rotation_error_deg(HeadParams.stack([clip.params(t) for t in range(3)]).rotation, truth.rotation[:3]).max() < 4
    )

    driving = load_driving(clip, head, 32)
    assert driving.unread == (3, 5) and len(driving) == 8, "a film stays in time"
    assert torch.equal(driving.crops[3], driving.crops[2]) and not torch.equal(driving.crops[4], driving.crops[2])
    assert set(driver_clip_index(driving, 8)) == {0, 1, 2, 4, 6, 7}
    assert ClipFootage(clip.folder).takes[0].present.sum() == 6
    frames = FitFrames(clip, head, HoldOut(every=0))
    assert frames.train == [0, 1, 2, 4, 6, 7]


def test_live_follows_a_growing_file(head, tmp_path):
    import threading
    import time

    import av

    path, count = tmp_path / "live.ts", 9
    truth = motion(head, count)

    def write() -> None:
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for t in range(count):
                frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 20 * t, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
                time.sleep(0.02)
            container.mux(stream.encode())

    path.touch()
    writer = threading.Thread(target=write)
    writer.start()
    answers: list[Detection | None] = [None, *perceived(head, truth)[1:]]
    answers[7] = None

    @dataclass
    class Following:
        def follow(self, images):
            for image, answer in zip(images, answers, strict=False):
                assert image.shape == (3, HEIGHT, WIDTH)
                yield answer

    frames = list(
        track_live(live_frames(path, patience_s=1.0), head, Following(), LiveConfig(warmup=3, focal_px=FOCAL))
    )
    writer.join()
    assert [f.seen for f in frames] == [True] * 6 + [False, True], "frames before the first face are passed over"
    assert all(torch.equal(f.params.shape, frames[0].params.shape) for f in frames)
    assert torch.equal(frames[6].params.rotation, frames[5].params.rotation)
    fitted = torch.stack([f.params.rotation for f in frames if f.seen])
    assert rotation_error_deg(fitted, truth.rotation[[1, 2, 3, 4, 5, 6, 8]]).max() < 4
    assert max(f.error_px for f in frames) < 2
    jaw = torch.stack([f.params.expr[head.expression_names.index("jawOpen")] for f in frames if f.seen])
    assert jaw[-1] - jaw[0] > 0.2, "landmarks move the expression, though nobody reads it and identity is held"


def test_live_keeps_what_it_has_seen_at_ctrl_c(head, tmp_path, monkeypatch):
    """Wherever the interrupt comes: here while a frame's panels are drawn."""
    still = motion(head, 1)[0]
    frame = LiveFrame(still, camera(), True, 0.5, torch.full((3, HEIGHT, WIDTH), 0.5))

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return rasterize(*given)

    monkeypatch.setattr(live, "track_source", lambda *given: iter([frame] * 9))
    monkeypatch.setattr(meshes, "rasterize", interrupted)
    main(["live", "somewhere", "--out", str(tmp_path / "out"), "--size", "32", "--no-sign"])
    assert len(HeadParams.load(tmp_path / "out" / "params.npz").expr) == 1
    assert len(list(read_video(tmp_path / "out" / "live.mp4"))) == 1


def test_live_sources_that_are_not(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        next(live_frames(tmp_path / "nothing"))
    (tmp_path / "text").write_text("not a video")
    with pytest.raises(UserError, match="while it grows"):
        next(live_frames(tmp_path / "text", patience_s=0.02))


@pytest.mark.parametrize("bad", ["missing", "directory", "text", "truncated", "no face", "empty video"])
def test_bad_input_is_one_line_and_leaves_nothing(head, tmp_path, bad):
    source = tmp_path / "in.png"
    if bad == "directory":
        source.mkdir()
    elif bad == "text":
        source.write_text("not an image")
    elif bad == "empty video":
        source = tmp_path / "in.mp4"
        source.write_bytes(b"")
    elif bad != "missing":
        write_image(source, torch.rand(3, 40, 40))
        if bad == "truncated":
            source.write_bytes(source.read_bytes()[:200])
    with pytest.raises(UserError) as error:
        track(source, tmp_path / "clip", head, FakeDetector([None]))
    assert "expected" in str(error.value) or "truncated" in str(error.value)
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"in.png", "in.mp4"}


def test_exif_focal_length(tmp_path):
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 85
    Image.new("RGB", (360, 240)).save(tmp_path / "a.jpg", exif=exif)
    focal, source = focal_length(tmp_path / "a.jpg", 360, 240, None)
    assert source == "exif (85 mm)" and focal == pytest.approx(85 / 36 * 360, rel=0.01)
    assert focal_length(tmp_path / "a.jpg", 360, 240, 500.0) == (500.0, "given")
    assert focal_length(None, 360, 240, None) == (None, "assumed")


@pytest.mark.parametrize("focal_px", [float("inf"), float("nan"), 1e-30, 10.0, 1e6])
def test_a_senseless_focal_length_is_refused(focal_px):
    with pytest.raises(UserError, match="expected 43 to 43267 px for an image of 360×240"):
        focal_length(None, 360, 240, focal_px)


STUB = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[2])
request = json.loads((folder / "request.json").read_text())
n = request["count"]
points = np.full((n, 478, 2), np.nan, np.float32)
for i in range(n):
    image = np.load(folder / f"{{i:05d}}.npy", allow_pickle=False)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    if image.mean() > 64:
        points[i] = np.arange(478)[:, None] % image.shape[1]
    np.save(folder / f"{{i:05d}}_mask.npy", np.full(image.shape[:2], 255, np.uint8))
    print(f"done {{i + 1}}", flush=True)
if {fails}:
    sys.exit("RuntimeError: model file is damaged")
np.savez(folder / "detections.npz", points=points, scores=np.ones(n, np.float32), faces=np.ones(n, np.int64))
"""


def stub(tmp_path: Path, fails: bool = False) -> Path:
    path = tmp_path / "env/bin/python"
    path.parent.mkdir(parents=True)
    path.write_text(STUB.format(python=sys.executable, fails=fails))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_worker_protocol(tmp_path):
    done: list[int] = []
    detector = MediaPipeDetector(python=stub(tmp_path), on_done=done.append)
    bright, dark, large = torch.full((3, 20, 30), 0.9), torch.zeros(3, 20, 30), torch.full((3, 1500, 2048), 0.9)
    found = detector.detect([bright, dark, large])
    assert done == [1, 2, 3] and found[1] is None
    assert found[0].points.shape == (478, 2) and found[0].mask.shape == (1, 20, 30) and found[0].mask.min() == 1
    # Large images are shrunk for the detector; the points come back in the image's own pixels.
    assert found[2].points.max() == pytest.approx(477 * 2, rel=0.01)
    assert detector.detect([]) == []


def test_a_broken_detector_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"model file is damaged.*make track-env"):
        MediaPipeDetector(python=stub(tmp_path, fails=True)).detect([torch.rand(3, 8, 8)])


def test_no_detector_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="make track-env"):
        track_environment()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(stub(tmp_path).parents[1]))
    assert track_environment() == tmp_path / "env/bin/python"


def test_worker_follows_a_face():
    def face(x: float, size: float) -> np.ndarray:
        return np.array([[x, 0.0], [x + size, size]])

    faces = [face(0, 10), face(40, 20)]
    assert mediapipe_worker.choose(faces, None) == 1
    assert mediapipe_worker.choose(faces, mediapipe_worker.box(face(2, 10))) == 0


def disc(size: int, centre: tuple[float, float], radius: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2


def test_matte_keeps_hair_and_shoulders():
    size = 96
    head = disc(size, (48, 36), 18)
    mesh = head.clone()
    mesh[50:76, 36:60] = True
    hair = disc(size, (48, 34), 26)
    person = hair.clone()
    person[50:, 10:86] = True
    image = torch.where(person, 0.8, 0.2).expand(3, size, size).contiguous()
    out = matte(image, person.float()[None], mesh, head)[0]
    assert out[head].min() > 0.95, "the head is foreground"
    assert out[12, 48] > 0.9 and out[34, 26] > 0.9, "so is hair beyond the skull"
    assert out[60, 48] > 0.9 and out[60, 22] > 0.9, "so are neck and shoulders"
    assert out[94, 84] < 0.1, "what is far from the bust is not"
    assert out[5, 5] == 0 and out.min() >= 0 and out.max() <= 1
    # A hole in the segmentation inside the head is filled; a bystander is dropped.
    person[30:34, 44:50] = False
    person[0:8, 0:8] = True
    out = matte(image, person.float()[None], mesh, head)[0]
    assert out[32, 47] > 0.95 and out[2, 2] == 0


def test_what_hangs_on_by_haze_alone_is_no_foreground():
    """A patch of the background above the hair, joined to it by what is hardly foreground."""
    head = disc(96, (48, 40), 18)
    person = head.float()
    person[4:12, 40:56] = 1.0
    person[12:24, 46:50] = 0.4
    # An even image: the guided filter then keeps what it is given.
    out = matte(torch.full((3, 96, 96), 0.5), person[None], head, head)[0]
    assert out[4:11, 42:54].max() == 0 and out[28:52, 38:58].min() > 0.9


def test_what_has_the_backgrounds_colours_is_no_hair():
    """A brown door was taken for hair on one side, and is known for a door on the other; real hair is red."""
    head = torch.zeros(128, 128, dtype=torch.bool)
    head[40:100, 44:84] = True
    image = torch.tensor([0.4, 0.25, 0.1])[:, None, None].expand(3, 128, 128).clone()
    image[:, head] = torch.tensor([0.8, 0.6, 0.5])[:, None]
    hair = torch.zeros_like(head)
    hair[30:100, 84:96] = hair[30:56, 44:96] = True
    image[:, hair] = torch.tensor([0.7, 0.1, 0.1])[:, None]
    image += 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    person = (head | hair).float()
    wrong = person.clone()
    wrong[30:100, 10:44] = 1
    out = corrected(image.clamp(0, 1).numpy(), wrong.numpy(), head.numpy(), 60.0)
    assert out[35:95, 12:38].max() < 0.1 and out[hair.numpy()].mean() > 0.95 and (out[head.numpy()] == 1).all()
    right = corrected(image.clamp(0, 1).numpy(), person.numpy(), head.numpy(), 60.0)
    assert abs(right - person.numpy()).mean() < 0.01
    # A lock that was hardly told hangs on the rest of the hair, and nothing of the door does.
    lock = torch.zeros_like(head)
    lock[60:76, 84:96] = True
    out = corrected(image.clamp(0, 1).numpy(), torch.where(lock, 0.3, person).numpy(), head.numpy(), 60.0)
    assert out[60:76, 86:94].mean() > 0.9 and out[35:95, 12:38].max() < 0.1
    # Without a background, or without a head, nothing is known of colours.
    for whole in (head, torch.zeros_like(head)):
        everywhere = np.ones((128, 128), np.float32)
        assert (corrected(image.numpy(), everywhere, whole.numpy(), 60.0) == 1).all()


def test_matte_without_segmentation_is_the_head_grown():
    head = disc(64, (32, 30), 16)
    out = matte(torch.rand(3, 64, 64), None, head, head)[0]
    assert out[head].min() > 0.95 and (out > 0.5).sum() < 1.3 * head.sum()


def test_crops():
    image = torch.rand(3, 40, 60)
    torch.testing.assert_close(crop_image(image, (10.0, 5.0, 20.0), 20), image[:, 5:25, 10:30])
    flat = torch.full((1, 30, 30), 0.7)
    assert (crop_image(flat, (-10.3, -7.9, 50.0), 16) - 0.7).abs().max() < 1e-6, "edges are repeated"
    filled = crop_image(flat, (-30.0, 0.0, 30.0), 8, fill=0.5)
    assert (filled - 0.5).abs().max() < 0.11 and filled[0, 4, 0] == 0.5
    # The kernel against the matrix products that doubles go by: inside, across the border, beyond it, and enlarged.
    for box in ((3.3, 1.7, 30.2), (-9.1, 11.2, 44.0), (-90.0, 0.0, 20.0), (12.4, 7.3, 5.1)):
        for outside in (None, 0.25):
            expected = crop_image(image.double(), box, 18, outside)
            torch.testing.assert_close(crop_image(image, box, 18, outside).double(), expected, atol=1e-6, rtol=0)
    # The camera of a crop sees what the crop shows.
    c = camera()
    box = canonical_crop_box(c, torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0)) * 0.05)
    point = torch.tensor([[0.01, 0.02, 0.03]])
    (xy,), (xy_crop,) = c.project(point)[0], c.cropped(*box, 64).project(point)[0]
    torch.testing.assert_close((xy - torch.tensor(box[:2])) * 64 / box[2], xy_crop)


@pytest.mark.assets
def test_mediapipe_finds_a_real_face(head, tmp_path):
    if not os.environ.get(ENVIRONMENT_VARIABLE) and not Path(".track-env/bin/python").exists():
        pytest.skip("needs `make track-env`")
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255
    write_image(tmp_path / "astronaut.png", image)
    clip = track(tmp_path / "astronaut.png", tmp_path / "clip", head, MediaPipeDetector())
    assert clip.extra["error_px_at_256"] < 1.5
    p = clip.params(0)
    assert p.rotation.abs().max() < 0.3
    assert p.expr[head.expression_names.index("mouthSmileLeft")] > 0.2, "she smiles"
    mask = clip.frame(0).mask
    assert 0.15 < mask.mean() < 0.6
    assert json.loads((clip.folder / "transforms.json").read_text())["geodiff4d"]["head"] == "openhead"
