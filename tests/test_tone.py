"""A portrait of one tone is known by its colours, and frames keep to it."""

import pytest
import torch

from geodiff4d.render.viewpoints import capture_cameras
from geodiff4d.video.tone import tone_of

LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def faded(image):
    """A brown print: shadows are colder than lights."""
    grey = (image * LUMA).sum(-3, keepdim=True)
    return grey ** torch.tensor([0.9, 1.0, 1.25]).view(3, 1, 1) * torch.tensor([1.0, 0.93, 0.78]).view(3, 1, 1)


def black_and_white(image):
    return (image * LUMA).sum(-3, keepdim=True).expand(3, -1, -1)


@pytest.fixture(scope="module")
def picture(subject):
    frame = subject.render(subject.params(torch.zeros(1, 52)), capture_cameras(96)[:1])
    return frame.rgb[0], frame.mask[0]


def test_a_picture_in_colour_has_no_tone(picture):
    assert tone_of(*picture) is None


@pytest.mark.parametrize("print_", [black_and_white, faded])
def test_frames_of_a_print_keep_to_its_tone(picture, print_):
    image, mask = picture
    old = print_(image)
    tone = tone_of(old + 0.004 * torch.randn_like(old), mask)
    assert tone is not None
    assert (tone.kept(old) - old).abs()[:, mask[0] > 0.95].mean() < 0.01
    kept = tone.kept(torch.stack([image, old]))
    assert (kept[0] - old).abs()[:, mask[0] > 0.95].mean() < (image - old).abs()[:, mask[0] > 0.95].mean()
    away = kept - tone.mean.view(3, 1, 1)
    across = torch.linalg.cross(away.movedim(1, -1), tone.axis.expand_as(away.movedim(1, -1)))
    assert across[(kept > 0).all(1) & (kept < 1).all(1)].abs().max() < 1e-5


def test_a_few_pixels_tell_nothing():
    assert tone_of(torch.rand(1, 32, 32).expand(3, 32, 32), torch.zeros(1, 32, 32)) is None
