"""The embedded perception network: its points, its training pictures, its training, and the detector around it."""

import math
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix, look_at
from geodiff4d.heads import load_head
from geodiff4d.tracking.degrade import backgrounds, compressed, photographed
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.learn import PerceptionTraining, find_loss, heat_loss, train_perception
from geodiff4d.tracking.network import (
    FINDER_STRIDE,
    Look,
    Perception,
    PerceptionConfig,
    expected,
    gram_schmidt,
    load_perception,
)
from geodiff4d.tracking.people import People, PeopleConfig, build_people
from geodiff4d.tracking.points import OWN, SurfacePoints, choose_points, closest, known_points
from geodiff4d.tracking.scenes import FINDER_SIZE, Scenes
from geodiff4d.tracking.squares import HeadSquare, cut_square, distinct, head_box
from geodiff4d.tracking.turn import apparent_turn, ray_rotation

TINY = PerceptionConfig(
    points=12, size=32, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), dense=8, shapes=4, finder=(2, 4, 4, 8)
)
POINTS = SurfacePoints(torch.arange(12), torch.rand(12, 3, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def head():
    return load_head("openhead")


def test_points_lie_on_the_head_and_survive_a_new_mesh(head):
    chosen = choose_points(head)
    assert len(chosen.index) == 192 and len(chosen.index.unique()) == 192
    assert (chosen.index >= OWN).sum() > 20, "ears and scalp are in"
    found = chosen.on(head)
    assert (found.on(head.template, head.faces) - chosen.position).norm(dim=1).max() < 1e-6
    irises = (chosen.index >= 468) & (chosen.index < 478)
    assert head.regions["eyes"][head.faces[found.face_index[irises]]].all()
    # Faces in another order are another mesh of the same head.
    order = torch.randperm(len(head.faces), generator=torch.Generator().manual_seed(0))
    other = replace(head, faces=head.faces[order])
    moved = chosen.on(other)
    assert (moved.on(other.template, other.faces) - chosen.position).norm(dim=1).max() < 1e-6
    landmarks, index = known_points(head)
    assert len(index) == len(landmarks.face_index) == len(head.mediapipe_index) + 68


def test_closest_place_on_triangles():
    triangle = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    points = torch.tensor([[0.2, 0.3, 0.5], [-1.0, -1.0, 0.0], [2.0, 0.2, 1.0], [0.8, 0.8, 0.0]])
    expected_places = torch.tensor([[0.2, 0.3, 0.0], [0, 0, 0], [1.0, 0, 0], [0.5, 0.5, 0.0]])
    _, weights = closest(points, triangle)
    torch.testing.assert_close(weights @ triangle[0], expected_places)


def test_apparent_turn_does_not_depend_on_where_the_head_is():
    R = axis_angle_to_matrix(torch.tensor([[0.1, 0.4, -0.1]]))
    turns = []
    for x in (0.0, 0.3):
        # Camera and head move sideways, the ray between them turns.
        T = look_at(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([x, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
        turns.append(apparent_turn(R, T[None], torch.zeros(1, 3))[0])
    torch.testing.assert_close(turns[0], turns[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(turns[0], R[0], atol=1e-5, rtol=0)
    ray = torch.nn.functional.normalize(torch.tensor([[0.2, -0.3, 1.0]]), dim=1)
    torch.testing.assert_close(ray_rotation(ray)[0] @ torch.tensor([0.0, 0, 1]), ray[0])


def test_heat_maps_and_rotations():
    points = torch.tensor([[[0.3, 0.6], [0.52, 0.11]]])
    heat = torch.full((1, 2, 8, 8), -20.0)
    for k, (x, y) in enumerate((points[0] * 8 - 0.5).tolist()):
        c, r = int(x), int(y)
        for dr, wr in ((0, r + 1 - y), (1, y - r)):
            for dc, wc in ((0, c + 1 - x), (1, x - c)):
                heat[0, k, r + dr, c + dc] = math.log(wr * wc)
    torch.testing.assert_close(expected(heat), points, atol=1e-5, rtol=0)
    look = Look(
        points,
        points[..., 0],
        heat,
        points[0, :1, 0],
        heat[:, :1].expand(1, 4, 8, 8),
        torch.eye(3)[None],
        points[0, :1],
    )
    flat = replace(look, heat=torch.full((1, 2, 8, 8), -math.log(64.0)))
    assert (heat_loss(look, points) < heat_loss(flat, points)).all()
    R = gram_schmidt(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(gram_schmidt(torch.zeros(1, 6))[0], torch.eye(3))


def test_network_shapes_and_file(tmp_path):
    model = Perception(TINY, POINTS).eval()
    look = model.look(torch.rand(2, 3, 32, 32))
    assert look.points.shape == (2, 12, 2) and look.dense.shape == (2, 4, 16, 16)
    assert model.find(torch.rand(1, 3, 64, 96)).shape == (1, 6, 4, 6)
    model.save(tmp_path / "net")
    again = load_perception(tmp_path / "net")
    torch.testing.assert_close(
        again.look(torch.full((1, 3, 32, 32), 0.3)).points,
        model.look(torch.full((1, 3, 32, 32), 0.3)).points,
        atol=1e-2,
        rtol=0,
    )
    assert torch.equal(again.points.index, POINTS.index)
    (tmp_path / "net/model.safetensors").write_bytes(b"damaged")
    load_perception.cache_clear()
    with pytest.raises(UserError, match="damaged"):
        load_perception(tmp_path / "net")
    with pytest.raises(UserError, match="not a model folder"):
        load_perception(tmp_path / "nothing")


def test_a_turned_square_is_cut_and_mapped_back():
    y, x = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    image = torch.stack([x / 120, y / 80, torch.zeros_like(x)])
    square = HeadSquare(60.0, 41.0, 30.0, 0.4)
    crop = cut_square(image, square, 24)
    v, u = torch.meshgrid(*[(torch.arange(24) + 0.5) / 24] * 2, indexing="ij")
    there = square.to_image(torch.stack([u, v], -1))
    torch.testing.assert_close(crop[0] * 120, there[..., 0], atol=0.6, rtol=0)
    torch.testing.assert_close(crop[1] * 80, there[..., 1], atol=0.6, rtol=0)
    assert len(distinct([square, replace(square, x=63.0, score=2.0), replace(square, x=110.0)])) == 2


class Someone(People):
    """One rendered person: a disc with a dot at its only point, all normals to the right."""

    def __init__(self):
        self.markup = POINTS
        size = 64
        y, x = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
        inside = ((x - 32) ** 2 + (y - 32) ** 2 < 26**2).float()
        dot = ((x - 40) ** 2 + (y - 28) ** 2 < 9).float()
        rgb = 0.5 * (1 - inside) + inside * (0.2 + 0.8 * dot)
        normal = torch.stack([inside, 0 * inside, 0 * inside]) * 0.5 + 0.5
        self.rgb = (rgb.expand(3, -1, -1) * 255).byte().numpy()[None]
        self.normal = (normal * 255).byte().numpy()[None]
        corners = [(12.0, 12.0), (52.0, 12.0), (12.0, 52.0), (52.0, 52.0)]
        self.points = np.array([[(40.0, 28.0), *corners * 3][:12]], dtype=np.float32)
        self.turn = np.eye(3, dtype=np.float32)[None]
        self.shape = np.zeros((1, 64), dtype=np.float32)


def test_training_crops_keep_points_normals_and_rotation_together():
    scenes = Scenes(Someone(), 4, spare=2)
    scenes.spare = torch.zeros_like(scenes.spare)
    for step in range(6):
        crops = scenes.crops(step, 4, 64, augment=False)
        for i in range(4):
            if not crops.face[i]:
                beside = (crops.points[i].mean(0) - 0.5).abs().max() > 0.5
                assert beside or crops.foreground[i].max() == 0
                continue
            grey = crops.images[i].mean(0)
            if float(crops.points[i, 0].min()) > 0.1 and float(crops.points[i, 0].max()) < 0.9:
                bright = (grey > 0.75).nonzero().float().mean(0).flip(0) + 0.5
                assert (bright / 64 - crops.points[i, 0]).norm() < 0.03
            # Both the normal (1, 0, 0) and the head's own x axis turn with the crop.
            inside = crops.foreground[i, 0] > 0.99
            n = crops.normal[i][:, inside].mean(1)
            torch.testing.assert_close(n / n.norm(), crops.turn[i][:, 0], atol=0.02, rtol=0)


def test_training_pictures_mark_heads():
    scenes = Scenes(Someone(), 4, spare=2)
    pictures = scenes.pictures(0, 8)
    assert pictures.images.shape == (8, 3, FINDER_SIZE, FINDER_SIZE)
    marked = pictures.target[:, 0].flatten(1).sum(1)
    assert (marked == 0).any() and (marked > 0).any()
    assert not (pictures.ignored & (pictures.target[:, 0] > 0)).any()
    perfect = pictures.target.clone()
    perfect[:, 0] = (perfect[:, 0] * 2 - 1) * 20
    assert find_loss(perfect, pictures)["found"] < 1e-3 and find_loss(perfect, pictures)["where"] == 0


def test_degraded_pictures_stay_pictures():
    g = torch.Generator().manual_seed(0)
    x = photographed(backgrounds(6, 64, g), g)
    assert x.shape == (6, 3, 64, 64) and x.min() >= 0 and x.max() <= 1 and x.std() > 0.05
    smooth = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(compressed(smooth, torch.full((1, 1, 1, 1), 1e-4)), smooth, atol=1e-3, rtol=0)


def test_training_resumes_exactly(tmp_path):
    config = PerceptionTraining(
        TINY,
        steps=4,
        batch=4,
        pictures=2,
        sizes=(),
        backgrounds=2,
        autocast=False,
        save_every=2,
        validate_every=100,
        log_every=1,
    )
    whole = train_perception(tmp_path / "a", Someone(), Someone(), config)

    class Stop(Exception):
        pass

    def interrupt(record: dict) -> None:
        if record["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train_perception(tmp_path / "b", Someone(), Someone(), config, on_record=interrupt)
    resumed = train_perception(tmp_path / "b", Someone(), Someone(), config)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert load_perception(tmp_path / "b/perception").config == TINY
    # Killed between the last checkpoint and the network that is made of it.
    shutil.rmtree(tmp_path / "b/perception")
    train_perception(tmp_path / "b", Someone(), Someone(), config)
    assert load_perception(tmp_path / "b/perception").config == TINY


def test_people_are_rendered_once_and_resume(tmp_path):
    config = PeopleConfig(subjects=2, instants=1, size=48, supersample=1)
    people = build_people(tmp_path / "people", config, workers=1)
    assert people.rgb.shape == (2, 3, 48, 48) and len(people) == 2
    centre, side = head_box(torch.from_numpy(np.array(people.points)))
    assert ((centre - 24).abs() < 5).all() and (side > 16).all() and (side < 34).all()
    np.testing.assert_allclose(people.turn @ people.turn.transpose(0, 2, 1), np.eye(3)[None].repeat(2, 0), atol=1e-5)
    rgb, done = people.rgb.copy(), np.load(tmp_path / "people/done.npy", mmap_mode="r+")
    done[1] = 0
    done.flush()
    np.load(tmp_path / "people/rgb.npy", mmap_mode="r+")[1] = 0
    with pytest.raises(UserError, match="unfinished"):
        People(tmp_path / "people")
    again = build_people(tmp_path / "people", config, workers=1)
    assert np.array_equal(again.rgb, rgb), "the same people, pixel for pixel"
    with pytest.raises(UserError, match="another configuration"):
        build_people(tmp_path / "people", replace(config, seed=1), workers=1)


class OracleFinder(torch.nn.Module):
    """Heads are where the picture is bright."""

    def forward(self, images):
        bright = torch.nn.functional.avg_pool2d((images.mean(1, keepdim=True) > 0.9).float(), FINDER_STRIDE)
        out = torch.zeros(1, 6, *bright.shape[-2:])
        out[:, 0] = bright[:, 0] * 4 - 2
        out[:, 3] = -0.5
        out[:, 4] = 1
        return out


class OracleLooker(torch.nn.Module):
    """Points are the four corners of the box about what is bright."""

    def forward(self, images):
        each = [self.one(image) for image in images]
        return Look(*(torch.cat([getattr(look, f.name) for look in each]) for f in fields(Look)))

    def one(self, image):
        mask = image.mean(0) > 0.9
        rows, columns = mask.nonzero(as_tuple=True)
        s = image.shape[-1]
        box = torch.tensor([0.4, 0.4, 0.6, 0.6])
        if len(rows):
            box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / s
        points = box[torch.tensor([[0, 1], [2, 1], [0, 3], [2, 3]] * 3)]
        dense = torch.cat([(mask.float() * 20 - 10)[None, None], torch.zeros(1, 2, s, s), torch.ones(1, 1, s, s)], 1)
        score = torch.tensor([5.0 if len(rows) else -5.0])
        sigma, heat, shape = torch.full((1, 12), -4.0), torch.zeros(1, 12, 2, 2), torch.zeros(1, 4)
        return Look(points[None], sigma, heat, score, dense, torch.eye(3)[None], shape)


def oracle() -> Perception:
    """A network that knows."""
    model = Perception(TINY, POINTS)
    model.find, model.look = OracleFinder(), OracleLooker()
    return model


def disc(x: float, y: float, radius: float, width: int = 300, height: int = 200) -> torch.Tensor:
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return ((u - x) ** 2 + (v - y) ** 2 < radius**2).float().expand(3, -1, -1)


def test_detector_finds_the_largest_and_counts():
    detector = EmbeddedDetector(oracle())
    [found] = detector.detect([torch.maximum(disc(80, 90, 30), disc(230, 60, 18))])
    assert found is not None and found.faces == 2
    torch.testing.assert_close(found.box, torch.tensor([50.0, 60, 110, 120]), atol=2.0, rtol=0)
    assert found.mask is not None and found.normal is not None and found.extent is not None
    inside = found.mask[0] > 0.5
    n = found.normal.float()[:, inside]
    assert (n[2] / n.norm(dim=0)).min() > 0.99 and n[2].median() > 0.9 and 0.1 < inside.float().mean() < 0.6
    assert found.sigma is not None and 0.5 < found.sigma[0] < 3
    assert detector.detect([torch.zeros(3, 60, 60)]) == [None]


def test_a_detector_without_masks_looks_once_at_a_face_that_has_hardly_moved():
    frames = [disc(60 + x, 90, 30) for x in (0, 1, 2, 14, 15)]
    whole = EmbeddedDetector(oracle()).detect(frames, video=True)
    light, looks = EmbeddedDetector(oracle(), dense=False), []
    light.model.look.register_forward_hook(lambda *_: looks.append(1))
    found, counts = [], []
    for detection in light.follow(frames):
        found.append(detection)
        counts.append(len(looks))
    assert np.diff(counts).tolist() == [1, 1, 2, 1]
    for a, b in zip(found, whole, strict=True):
        assert a is not None and b is not None and a.mask is None and a.normal is None and b.mask is not None
        torch.testing.assert_close(a.points, b.points, atol=2.0, rtol=0)


def test_detector_follows_a_face_through_a_gap():
    detector = EmbeddedDetector(oracle())
    frames = [disc(60 + 6 * t, 90, 30) for t in range(6)]
    frames[3] = torch.zeros_like(frames[3])
    found = detector.detect(frames, video=True)
    assert [d is None for d in found] == [False, False, False, True, False, False]
    centres = [float(d.points[:, 0].mean()) for d in found if d is not None]
    np.testing.assert_allclose(centres, [60, 66, 72, 84, 90], atol=2)
