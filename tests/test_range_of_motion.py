"""The range of motion: everything a face does, played by somebody whose expressions are known."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.heads import load_head
from geodiff4d.pipeline import plan_clip, plan_instants
from geodiff4d.video.generate import GenerationRequest, WarpGenerator
from geodiff4d.video.inputs import Driving, Portrait
from geodiff4d.video.range_of_motion import instants, range_of_motion
from geodiff4d.world.expressions import ACTIONS, MAX_PITCH_RAD, MAX_YAW_RAD

CROP = 32


@pytest.fixture(scope="module")
def head():
    return load_head("openhead")


def driver(head, frames: int) -> Driving:
    return Driving(head.neutral(frames), torch.rand(frames, 3, CROP, CROP, generator=torch.Generator().manual_seed(0)))


def portrait(head) -> Portrait:
    T = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0.04], [0, 0, -1, 1], [0, 0, 0, 1]])
    camera = Camera(T, pinhole(120.0, 48, 48), 48, 48)
    return Portrait(torch.full((3, 48, 48), 0.6), torch.ones(1, 48, 48), camera, head.neutral(1)[0])


def test_everything_a_face_does_is_in_it():
    expr, jaw, eyes = instants()
    assert expr[0].max() == 0 and not eyes[0].any(), "rest comes first"
    strongest = expr.amax(0)
    # The eye joints turn the eyes; a jaw that is thrust forward and lips that stay closed below it are left out.
    rare = {"jawForward", "mouthClose"}
    seldom = [n for n, x in zip(ACTIONS, strongest, strict=True) if x < 0.3 and "eyeLook" not in n and n not in rare]
    assert not seldom, f"{seldom} hardly move"
    yaw, pitch = eyes[:, 1], -eyes[:, 0]
    assert yaw.max() == pytest.approx(MAX_YAW_RAD) and yaw.min() == pytest.approx(-MAX_YAW_RAD)
    assert pitch.max() == pytest.approx(MAX_PITCH_RAD) and pitch.min() == pytest.approx(-MAX_PITCH_RAD)
    assert not jaw.any()


def test_it_is_played_by_one_person_whose_expression_is_known(head):
    played = range_of_motion(head, CROP)
    expr, _, eyes = instants()
    assert_close(played.params.expr, expr)
    assert_close(played.params.eyes_pose, eyes)
    assert not played.temporal
    assert played.crops.shape == (len(expr), 3, CROP, CROP)
    wide = expr[:, ACTIONS.index("jawOpen")].argmax()
    lower = slice(CROP // 2, None)
    assert (played.crops[wide] - played.crops[0])[:, lower].abs().mean() > 0.02, "an open mouth is seen"
    assert_close(range_of_motion(head, CROP).crops, played.crops)


def test_another_head_cannot_play_it(head):
    with pytest.raises(UserError, match="played on OpenHead and the head is flame2023"):
        range_of_motion(replace(head, name="flame2023"), CROP)


@pytest.mark.parametrize(("count", "views", "frames"), [(5, 3, 12), (57, 8, 64), (9, 4, 4), (58, 3, 3), (2, 8, 16)])
def test_instants_are_shown_equally_often_and_by_all_cameras(count, views, frames):
    shots = plan_instants(count, views, frames, first=10)
    assert len(shots) == frames
    often = Counter(s.timestep for s in shots)
    assert set(often) <= set(range(10, 10 + count)) and max(often.values()) - min(often.values()) <= 1
    assert len({(s.timestep, s.camera) for s in shots}) == frames, "no frame twice"
    assert len({s.camera for s in shots}) == min(views, frames)


def test_a_clip_shows_the_range_and_the_driver(head):
    own, played = driver(head, 20), range_of_motion(head, CROP)
    plan = plan_clip(GenerationRequest(portrait(head), own, head), 4, 24, played)
    shown = plan.request.driving
    assert len(plan.shots) == 24 and not shown.temporal
    of_range = [s for s in plan.shots if s.timestep < len(played)]
    assert len(of_range) == 16
    assert_close(shown.params.expr[: len(played)], played.params.expr)
    assert_close(shown.crops[len(played) :], own.crops[torch.linspace(0, 19, 8).round().long()])
    made = WarpGenerator().generate(plan.shown, plan.cameras)
    assert len(made.rgb) == 24
