"""The face reader: what it is shown, what labels mean, mirrored faces, its training, its file and its calibration."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.core.images import write_image
from geodiff4d.render.viewpoints import openhead
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.face_square import SIDE, face_square
from geodiff4d.tracking.points import choose_points
from geodiff4d.tracking.reader import (
    STILL,
    TARGETS,
    FaceReader,
    ReaderConfig,
    eye_windows,
    face_crop,
    load_reader,
)
from geodiff4d.tracking.reader_data import Faces, FacesConfig, build_faces, visible_coefficients, visible_skin
from geodiff4d.tracking.reader_instants import GAZE_REACH, GROUPS, draw_expressions, draw_gaze, follow_gaze
from geodiff4d.tracking.reader_measure import agreement, fitted_calibration
from geodiff4d.tracking.reader_photographs import Photographs, agreed, draw_looks, gather_photographs, photograph_loss
from geodiff4d.tracking.reader_scenes import FaceScenes, drawn_cut, mirrored_points, mirrored_targets
from geodiff4d.tracking.reader_training import ReaderTraining, rate, reader_loss, train_reader
from geodiff4d.world.expressions import ACTIONS, INDEX, MAX_PITCH_RAD, MAX_YAW_RAD
from geodiff4d.world.identity import personal_rig

TINY = ReaderConfig(64, 32, (8, 8), 4, 16, 16, (4, 4, 8), 4, 8)


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Faces:
    config = FacesConfig(subjects=2, instants=3, size=96, supersample=1)
    return build_faces(tmp_path_factory.mktemp("faces") / "train", config)


def test_the_square_follows_the_face_in_the_plane():
    markup = choose_points(openhead())
    points = markup.position[:, :2] * torch.tensor([1000.0, -1000.0])
    square = face_square(points, markup.index)
    assert abs(square.roll) < 0.02 and 120 < square.side < 200
    angle, scale, shift = 0.4, 1.7, torch.tensor([300.0, 200.0])
    R = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = face_square(points @ R.T * scale + shift, markup.index)
    assert moved.side == pytest.approx(square.side * scale, rel=1e-4)
    assert moved.roll == pytest.approx(square.roll + angle, abs=1e-4)
    centre = R @ torch.tensor([square.x, square.y]) * scale + shift
    torch.testing.assert_close(torch.tensor([moved.x, moved.y]), centre, atol=1e-2, rtol=0)


def test_instants_show_every_action_alone_and_at_its_extremes():
    expr = draw_expressions(np.random.default_rng(0), 1000)
    assert expr.shape == (1000, 52) and expr.min() >= 0 and expr.max() <= 1
    looks = [i for i, name in enumerate(ACTIONS) if "eyeLook" in name]
    assert expr[:, looks].abs().max() == 0
    moving = [i for i in range(52) if i not in looks]
    assert len(GROUPS) == 30
    strong = (expr[:, moving] > 0.6).float().sum(0)
    assert strong.min() >= 1, f"{ACTIONS[moving[int(strong.argmin())]]} is hardly ever strong"
    assert (expr.amax(1) < 0.02).float().mean() > 0.02, "faces at rest are in"


def test_lids_go_with_the_eyes_and_gaze_reaches_its_limits():
    rng = np.random.default_rng(0)
    gaze = draw_gaze(rng, torch.zeros(2000, 2))
    limit = GAZE_REACH * torch.tensor([MAX_YAW_RAD, MAX_PITCH_RAD])
    assert (gaze.abs().amax((0, 1)) > 0.95 * limit).all() and (gaze.abs() < limit + 0.25).all()
    expr = follow_gaze(torch.zeros(2000, 52), gaze, rng)
    down = gaze.mean(1)[:, 1] < -0.3
    assert (expr[down, INDEX["eyeBlinkLeft"]] > 0.15).all() and (expr[down, INDEX["eyeWideLeft"]] == 0).all()


def test_labels_move_the_shared_head_as_the_drawn_actions_move_the_person():
    """Oracle: a strength alone is undone exactly; a person of the open world is explained better than unlabelled."""
    head, drawn = openhead(), draw_expressions(np.random.default_rng(1), 8)
    strong = personal_rig(("subject", "val", 3))
    same = visible_coefficients(head, drawn)
    torch.testing.assert_close(same, drawn, atol=2e-3, rtol=0)
    shown = visible_skin()
    ours, theirs = (h.expr_basis[shown].flatten(0, 1) for h in (head, strong))
    motion = drawn @ theirs.T
    left = lambda c: float((c @ ours.T - motion).norm() / motion.norm())  # noqa: E731
    labels = visible_coefficients(strong, drawn)
    assert left(labels) < 0.75 * left(drawn) and labels.min() >= 0


def test_mirrored_twice_is_the_same():
    order, sign = mirrored_targets()
    targets = torch.randn(5, TARGETS, generator=torch.Generator().manual_seed(0))
    once = targets[:, order] * sign
    torch.testing.assert_close(once[:, order] * sign, targets)
    assert once[0, INDEX["mouthSmileLeft"]] == targets[0, INDEX["mouthSmileRight"]]
    assert once[0, INDEX["jawLeft"]] == targets[0, INDEX["jawRight"]]
    # The left eye looks to the person's left; in the mirror the right one looks to the right.
    assert once[0, 52 + 3 + 4] == -targets[0, 52 + 3 + 1]
    points = mirrored_points(192)
    assert (points[points] == torch.arange(192)).float().mean() > 0.9


def test_eye_windows_mirror_each_other():
    crops = torch.rand(2, 3, 192, 192)
    right, left = eye_windows(crops)
    assert right.shape == (2, 3, 64, 80)
    swapped = eye_windows(crops.flip(-1))
    torch.testing.assert_close(swapped[0], left)
    torch.testing.assert_close(swapped[1], right)


def test_cuts_carry_labels_along(faces):
    """A crop that is mirrored, turned and zoomed shows its points where it says, and its head's rotation stays one."""
    scenes = FaceScenes(faces, spare=2)
    rows = np.array([0, 1, 2, 3, 4, 5])
    batch = scenes.crops(3, rows, 64)
    assert batch.images.shape == (6, 3, 64, 64) and batch.images.min() >= 0 and batch.images.max() <= 1
    torch.testing.assert_close(torch.linalg.det(batch.turn), torch.ones(6), atol=1e-4, rtol=0)
    square = torch.tensor([face_square(p * 64, faces.index).side for p in batch.points]) / 64
    assert ((square - 1).abs() < 0.25).all(), "the reader's square fills the crop"
    torch.testing.assert_close(scenes.crops(3, rows, 64).images, batch.images)
    theta = drawn_cut(400, torch.arange(400) % 2 > 0, torch.Generator().manual_seed(0))
    det = torch.linalg.det(theta[:, :, :2])
    assert (det[::2] > 0).all() and (det[1::2] < 0).all()


def test_rendered_faces_are_labelled(faces):
    rows = faces.take(np.arange(6))
    assert rows["rgb"].shape == (6, 3, 96, 96) and rows["mask"].float().mean() > 100
    for points in rows["points"]:
        square = face_square(points, faces.index)
        assert abs(square.roll) < 1e-3 and square.side == pytest.approx(96 / 1.35, rel=1e-3)
    assert (rows["eyes"][:, [2, 5]] == 0).all()
    torch.testing.assert_close(rows["turn"] @ rows["turn"].mT, torch.eye(3).expand(6, 3, 3), atol=1e-4, rtol=0)


def test_faces_are_rendered_once_and_resume(tmp_path, faces):
    with pytest.raises(UserError, match="another configuration"):
        build_faces(faces.folder, FacesConfig(subjects=3, instants=3, size=96, supersample=1))
    with pytest.raises(UserError, match="no rendered faces"):
        Faces(tmp_path)
    before = faces.take(np.arange(6))["rgb"].clone()
    done = np.load(faces.folder / "done.npy", mmap_mode="r+")
    done[1] = 0
    done.flush()
    np.load(faces.folder / "rgb.npy", mmap_mode="r+")[1] = 0
    with pytest.raises(UserError, match="unfinished"):
        Faces(faces.folder)
    assert len(Faces(faces.folder, unfinished=True).ready()) == 3
    build_faces(faces.folder, faces.config)
    assert torch.equal(faces.take(np.arange(6))["rgb"], before)


def test_loss_is_least_at_the_truth(faces):
    torch.manual_seed(0)
    batch = FaceScenes(faces, spare=2).crops(0, np.arange(6), 64)
    model = FaceReader(TINY).eval()
    raw = model(batch.images)
    spread = model.spread.clamp(min=1e-6)
    right = replace(
        raw,
        value=batch.targets / spread * (model.spread > 0),
        rotation=batch.turn,
        points=batch.points,
        log_sigma=raw.log_sigma * 0,
    )
    good, bad = reader_loss(model, right, batch), reader_loss(model, raw, batch)
    for name in ("targets", "motion", "points", "turn"):
        assert good[name] < 1e-6 < bad[name], name


def test_training_resumes_exactly(tmp_path, faces):
    config = ReaderTraining(
        TINY,
        steps=4,
        batch=4,
        sizes=((0.5, 32),),
        backgrounds=2,
        save_every=2,
        validate_every=100,
        log_every=1,
        val_rows=4,
        photographs=4,
    )
    real = Photographs(faces.take(np.arange(4))["rgb"], torch.tensor([[0, 1]]))
    whole = train_reader(tmp_path / "a", faces, faces, config, photographs=real)

    class Stop(Exception):
        pass

    def interrupt(record: dict) -> None:
        if record["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train_reader(tmp_path / "b", faces, faces, config, photographs=real, on_record=interrupt)
    resumed = train_reader(tmp_path / "b", faces, faces, config, photographs=real)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    crop = torch.rand(1, 3, 64, 64)
    saved = load_reader(tmp_path / "b/reader").read(crop)
    torch.testing.assert_close(saved.expr, resumed.read(crop).expr, atol=0.02, rtol=0.02)


class Told:
    """A detector that is told where the face is, and sees none in dark images."""

    def __init__(self, faces: Faces):
        self.faces = faces

    def detect(self, images, video=False):
        p = torch.from_numpy(self.faces.rows["points"][0].copy())
        face = Detection(p, self.faces.index, 1.0, torch.cat([p.amin(0), p.amax(0)]))
        return [None if image.mean() < 0.01 else face for image in images]


def test_photographs_are_read_alike_and_smiles_smile(tmp_path, faces):
    image = faces.take(np.arange(1))["rgb"][0].float() / 255
    for name in ("1_neutral", "1_smiling", "other", "2_smiling"):
        write_image(tmp_path / f"in/{name}.png", image)
    write_image(tmp_path / "in/deep/nobody.png", image * 0)
    with pytest.raises(UserError, match="no image with a face"):
        gather_photographs(tmp_path / "in/deep", 64, Told(faces))
    found = gather_photographs(tmp_path / "in", 64, Told(faces))
    assert found.crops.shape == (4, 3, 64, 64) and found.pairs.tolist() == [[0, 1]]
    torch.manual_seed(0)
    reader = FaceReader(TINY).eval()
    looks = draw_looks(found, 0, 8, 64)
    assert looks.pairs.tolist() == [[0, 1], [2, 3]]
    wanted = agreed(reader, looks.clean)
    torch.testing.assert_close(agreed(reader, looks.clean.flip(-1))[:, 52], wanted[:, 52], atol=1e-5, rtol=1e-4)
    raw = reader(looks.images)
    loss = photograph_loss(raw, looks, wanted, reader.spread)
    order, sign = mirrored_targets()
    said = torch.where(looks.mirrored[:, None], wanted[:, order] * sign, wanted)
    smiles = torch.tensor([INDEX["mouthSmileLeft"], INDEX["mouthSmileRight"]])
    said[torch.tensor([[1], [3]]), smiles] += 20
    good = photograph_loss(replace(raw, value=said), looks, wanted, reader.spread)
    assert good["smile"] < 0.01 < loss["smile"] and loss["alike"] > 0


def test_rate_rises_stays_and_falls():
    config = ReaderTraining(steps=1000, warmup=10, fall=0.5)
    assert [round(rate(s, config), 2) for s in (0, 9, 300, 500, 750, 999)] == [0.1, 1, 1, 1, 0.5, 0.01]


def test_calibration_undoes_shrinkage():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, TARGETS, generator=g) * 0.2 + 0.3
    shrunk = 0.4 * truth + 0.1 + 0.01 * torch.randn(truth.shape, generator=g)
    gain, offset = fitted_calibration(shrunk, truth)
    before, after = agreement(shrunk, truth), agreement(shrunk * gain + offset, truth)
    assert before.gain["jaw"] == pytest.approx(0.4, abs=0.02)
    for name in after.corr:
        assert after.inverse[name] == pytest.approx(1, abs=0.03) and after.gain[name] > 0.95


def test_a_reading_is_of_the_uncut_image(faces):
    reader = FaceReader(TINY).eval()
    rows = faces.take(np.arange(2))
    images = [rows["rgb"][0].float() / 255, torch.nn.functional.pad(rows["rgb"][0].float() / 255, (40, 0, 30, 0))]
    shift = torch.tensor([40.0, 30.0])
    points = [rows["points"][0], rows["points"][0] + shift]
    found = [Detection(p, faces.index, 1.0, torch.cat([p.amin(0), p.amax(0)])) for p in points]
    torch.testing.assert_close(
        face_crop(images[0], found[0], 64), face_crop(images[1], found[1], 64), atol=1e-2, rtol=0
    )
    crops = [face_crop(image, d, TINY.size) for image, d in zip(images, found, strict=True)]
    reading = reader.read(torch.stack(crops))
    assert reading.expr.shape == (2, 52) and reading.eyes_sigma.shape == (2, 6)
    assert (reading.expr[:, [i for i in STILL if i < 52]] == 0).all() and (reading.expr_sigma >= 0).all()
    assert SIDE > 2


def test_a_damaged_reader_says_so(tmp_path):
    FaceReader(TINY).save(tmp_path / "reader")
    assert load_reader(tmp_path / "reader").config == TINY
    (tmp_path / "reader/model.safetensors").write_bytes(b"damaged")
    load_reader.cache_clear()
    with pytest.raises(UserError, match="damaged"):
        load_reader(tmp_path / "reader")
    with pytest.raises(UserError, match="not a model folder"):
        load_reader(tmp_path / "nothing")


def test_turns_of_mirrored_heads(faces):
    """A head that looks to its left looks to its right in the mirror."""
    from geodiff4d.tracking.reader_scenes import mirrored_turn

    R = axis_angle_to_matrix(torch.tensor([[0.1, 0.5, 0.2]]))
    theta = torch.tensor([[[-1.0, 0, 0], [0, 1.0, 0]]])
    expected = axis_angle_to_matrix(torch.tensor([[0.1, -0.5, -0.2]]))
    torch.testing.assert_close(mirrored_turn(R, torch.tensor([True]), theta), expected, atol=1e-5, rtol=0)
