"""A user's points: named places are where they say, neighbours come along, and the head follows."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import write_image
from geodiff4d.evaluate.tracking import make_case
from geodiff4d.heads import load_head
from geodiff4d.tracking.corrections import ANCHORS, anchors, corrected, read_points
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.track import TrackingConfig, locate, track


@pytest.fixture(scope="module")
def image():
    return make_case(3, "val", size=256).image


@pytest.fixture(scope="module")
def seen(image) -> Detection:
    [found] = EmbeddedDetector().detect([image])
    assert found is not None
    return found


def test_points_that_are_told_are_taken_and_others_stay(seen):
    told = anchors(seen)
    assert list(told) == list(ANCHORS)
    x, y = told["mouth, left"]
    after = corrected(seen, {"mouth, left": (x + 12, y + 6)})
    now = anchors(after)
    np.testing.assert_allclose(now["mouth, left"], (x + 12, y + 6), atol=0.02)
    for name in set(told) - {"mouth, left"}:
        np.testing.assert_allclose(now[name], told[name], atol=0.02)
    # A neighbour at the mouth's corner comes along.
    near = (seen.points - torch.tensor([x, y])).norm(dim=1) < 4
    assert ((after.points - seen.points)[near].norm(dim=1) > 6).all() and near.sum() > 1
    assert (after.sigma[seen.index == ANCHORS["mouth, left"]] == 0).all()
    assert torch.equal(after.sigma[seen.index == ANCHORS["chin"]], seen.sigma[seen.index == ANCHORS["chin"]])


def test_a_shifted_face_is_found_where_it_is_said_to_be(image, seen, tmp_path):
    """A detector that saw everything 15 px too far right and 8 px too low is put right by its user."""

    class Wrong:
        def detect(self, images, video=False):
            return [replace(seen, points=seen.points + torch.tensor([15.0, 8.0]), reading=None) for _ in images]

    head, truth = load_head("openhead"), anchors(seen)
    frames = lambda: [image]  # noqa: E731

    def off(located) -> float:
        xy, _ = located.fit.camera.project(head.landmarks68.on(located.mesh.vertices[0], head.faces))
        return float((xy[30] - torch.tensor(truth["nose"])).norm())

    def looked(told) -> float:
        (tmp_path / "points.json").write_text(json.dumps(told))
        points = tmp_path / "points.json" if told else None
        return off(locate(frames, head, Wrong(), TrackingConfig(points=points), video=False))

    assert looked({}) > 10
    assert looked(truth) < 4


def test_what_was_found_can_be_given_back(image, tmp_path):
    write_image(tmp_path / "me.png", image)
    head = load_head("openhead")
    first = track(tmp_path / "me.png", tmp_path / "first", head)
    (tmp_path / "points.json").write_text(json.dumps(first.extra["points"]))
    again = track(tmp_path / "me.png", tmp_path / "again", head,
                  config=TrackingConfig(points=tmp_path / "points.json"))  # fmt: skip
    a, b = (torch.tensor(list(c.extra["points"].values())) for c in (first, again))
    assert (a - b).abs().max() < 0.05
    assert abs(first.extra["crop"][2] - again.extra["crop"][2]) < 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "object"), ("{}", "no points"), ('{"ear": [1, 2]}', "names 'ear'"),
        ('{"chin": [1]}', "expected \\[x, y\\]"),
        ('{"chin": [1, NaN]}', "points.json"), ('{"chin": ["a", 2]}', "expected \\[x, y\\]"),
        ('{"chin": [true, 2]}', "expected \\[x, y\\]"), ('{"chin": [1e9, 2]}', "far outside"), ("{", "points.json"),
    ],
)  # fmt: skip
def test_bad_points(tmp_path, text, words):
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_points(path, 100, 100)


def test_points_on_top_of_each_other_are_a_slip(seen):
    told = anchors(seen)
    with pytest.raises(UserError, match="one place"):
        corrected(seen, {"mouth, left": told["mouth, right"]})
