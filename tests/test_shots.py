"""Cuts in films: found where they are, and not where a head moves, a camera pans or a light flashes."""

import pytest
import torch

from geodiff4d.tracking.shots import Shots, longest


def scene(seed: int) -> torch.Tensor:
    """A smooth picture, larger than a frame."""
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(torch.rand(1, 3, 6, 9, generator=g), (120, 200), mode="bicubic")[0]


def panned(picture: torch.Tensor, count: int, step: int) -> list[torch.Tensor]:
    return [picture[:, 10:100, 10 + t * step : 140 + t * step] for t in range(count)]


def spans(frames):
    shots = Shots()
    assert len(list(shots.watched(frames))) == len(frames)
    return shots.spans()


def test_a_film_is_parted_at_its_cuts():
    a, b, c = (panned(scene(k), n, 1) for k, n in ((0, 20), (1, 12), (2, 30)))
    assert spans([*a, *b, *c]) == [(0, 20), (20, 32), (32, 62)]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_camera_that_pans_makes_no_cut(step):
    assert spans(panned(scene(0), 16, step)) == [(0, 16)]


def test_a_flash_and_a_change_of_brightness_make_no_cut():
    frames = panned(scene(0), 20, 1)
    frames[8] = (frames[8] * 0.3 + scene(5)[:, :90, :130] * 0.7).clamp(0, 1)
    frames[14:] = [f * 0.97 + 0.2 for f in frames[14:]]
    assert spans(frames) == [(0, 20)]


def test_one_frame_and_none():
    assert spans(panned(scene(0), 1, 0)) == [(0, 1)]
    assert Shots().spans() == []


def test_the_shot_with_most_faces_is_kept():
    faces = [None] * 10 + ["face"] * 6 + ["face"] * 4
    assert longest([(0, 10), (10, 16), (16, 20)], faces) == (10, 16)
    assert longest([(0, 2), (2, 4)], ["face"] * 4) == (0, 2)
