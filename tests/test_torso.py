"""What lies below the chin has one place in space, from whichever view it was lifted."""

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.camera import turned
from geodiff4d.core.geometry import transform
from geodiff4d.heads import load_head
from geodiff4d.render.relief import lift
from geodiff4d.render.torso import FADE_M, on_torso, torso
from geodiff4d.render.viewpoints import FRONT_CAMERA, capture_cameras


@pytest.fixture(scope="module")
def bust():
    return torso(load_head())


def test_the_torso_continues_the_template(bust):
    """It touches the template's front in the middle and at the sides, and hides none of it by more than that."""
    head = load_head()
    level = head.template[(head.template[:, 1] - bust.shoulders_y).abs() < 0.015]
    middle, side = level[level[:, 0].abs() < 0.03], level[level[:, 0].abs() > 0.9 * bust.half_width]
    for part in (middle, side):
        assert bust.behind(part).abs().min() < 0.01 and bust.behind(part).min() > -0.015


@pytest.mark.parametrize("x", [-0.25, -0.2, 0.2, 0.25])
def test_a_shoulder_is_at_one_place_from_every_view(bust, x):
    point = torch.tensor([x, bust.shoulders_y - 0.06, 0.0])
    point[2] += bust.behind(point)
    root, found = torch.eye(4), []
    for yaw in (-40.0, 0.0, 30.0):
        eye = turned(capture_cameras(64)[FRONT_CAMERA], torch.zeros(3), yaw, 0.0).position
        ray = (point - eye) / (point - eye).norm()
        first = (point - eye).norm()[None] + 0.08  # as a sheet has it that is parallel to the image
        depth = on_torso(bust, root, eye, ray[None], first)
        found.append(eye + depth * ray)
    for place in found:
        assert_close(place, point, atol=2e-3, rtol=0)


def test_what_is_above_the_shoulders_stays(bust):
    eye = torch.tensor([0.0, 0.0, 1.0])
    target = torch.tensor([[0.1, 0.1, -0.05], [0.15, bust.shoulders_y + FADE_M[0] + 0.02, 0.0]])
    rays = (target - eye) / (eye[2] - target[:, 2:])
    depth = eye[2] - target[:, 2]
    assert_close(on_torso(bust, torch.eye(4), eye, rays, depth), depth)
    aside = torch.tensor([[3.0, -1.0, -1.0]])
    assert on_torso(bust, torch.eye(4), eye, aside, torch.ones(1)).isfinite().all(), "a ray that meets nothing"


def test_hair_lies_behind_the_outline_and_clothes_on_the_torso(bust):
    """A whole picture of foreground: beside the head the sheet recedes with distance, below it lies on the surface."""
    head, camera = load_head(), capture_cameras(128)[FRONT_CAMERA].cropped(-40.0, -20.0, 208.0, 128)
    mesh = head.pose(head.neutral())
    sheet = lift(head, mesh, camera, torch.ones(1, 128, 128))
    points = transform(mesh.T_world_joint[0], sheet.points[0])
    low = (points[:, 1] < bust.shoulders_y + FADE_M[1]) & (points[:, 0].abs() > bust.half_width + 0.02)
    assert low.sum() > 5 and bust.behind(points[low]).abs().max() < 0.01
    beside = (points[:, 1] > 0.0) & (points[:, 1] < 0.05)
    near = beside & (points[:, 0].abs() > 0.1) & (points[:, 0].abs() < 0.115)
    far = beside & (points[:, 0].abs() > 0.16)
    assert points[near, 2].mean() - points[far, 2].mean() > 0.01
