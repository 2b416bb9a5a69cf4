"""Finishing touches: done in the order they are listed, frame by frame, and none in the paper's sampling."""

from dataclasses import dataclass, replace

import pytest
import torch

from geodiff4d.core.images import encode_normals
from geodiff4d.heads import load_head
from geodiff4d.pipeline import load_model
from geodiff4d.presets import PRESETS
from geodiff4d.video.finish import Finish, surface_mask
from geodiff4d.video.frames import SampledFrames
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import Portrait, with_identity_of
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.tone import KeepTone

SIZE = 64


@dataclass(frozen=True)
class Scaled:
    """A touch that shows in what order touches are done."""

    by: float
    plus: float

    def __call__(self, frames: SampledFrames, portrait: Portrait) -> SampledFrames:
        return replace(frames, rgb=frames.rgb * self.by + self.plus)


@pytest.fixture(scope="module")
def request_(pair) -> GenerationRequest:
    """A request of the pair at the debug model's size."""
    image, mask = (
        torch.nn.functional.interpolate(x[None], (SIZE, SIZE))[0] for x in (pair.portrait.image, pair.portrait.mask)
    )
    portrait = Portrait(image, mask, pair.portrait.camera.resized(SIZE, SIZE), pair.portrait.params)
    return GenerationRequest(
        portrait, replace(pair.driving, params=with_identity_of(portrait, pair.driving.params)), load_head()
    )


@pytest.fixture(scope="module")
def finished(request_, model):
    """Generate three frames with some finishing touches."""
    network = load_model(model)

    def generate(*finish: Finish, **options):
        sample = replace(PRESETS["debug"].sample, finish=finish, **options)
        return DiffusionGenerator(network, sample).generate(request_, request_.portrait.camera.expand(3))

    return generate


def test_the_paper_finishes_nothing():
    assert SampleConfig().finish == PRESETS["paper"].sample.finish == ()
    assert PRESETS["embedded"].sample.finish == PRESETS["debug"].sample.finish == (KeepTone(),)


def test_touches_are_done_in_their_order(finished):
    plain = finished()
    half_then_more, more_then_half = Scaled(0.5, 0.0), Scaled(1.0, 0.2)
    a, b = finished(half_then_more, more_then_half), finished(more_then_half, half_then_more)
    where = (plain.mask == 1).expand_as(plain.rgb)
    assert where.any()
    torch.testing.assert_close(a.rgb[where], plain.rgb[where] * 0.5 + 0.2)
    torch.testing.assert_close(b.rgb[where], (plain.rgb[where] + 0.2) * 0.5)


def test_frames_are_finished_alone(finished):
    """However many frames are decoded at a time, each is finished as if it were the only one."""
    seen: list[tuple[SampledFrames, Portrait]] = []

    def keep(frames: SampledFrames, portrait: Portrait) -> SampledFrames:
        seen.append((frames, portrait))
        return frames

    finished(keep)
    [(frames, portrait)] = seen
    # In black and white, so that its tone is kept.
    toned = replace(portrait, image=portrait.image.mean(0, keepdim=True).expand(3, -1, -1))

    def done(part: slice) -> SampledFrames:
        here = SampledFrames(frames.rgb[part], frames.normals[part], frames.mask[part])
        for touch in PRESETS["debug"].sample.finish:
            here = touch(here, toned)
        return here

    assert (done(slice(None)).rgb - frames.rgb).abs().max() > 0.01
    whole, alone = done(slice(None)), [done(slice(i, i + 1)) for i in range(len(frames.rgb))]
    for name in ("rgb", "normals", "mask"):
        one_by_one = torch.cat([getattr(x, name) for x in alone])
        torch.testing.assert_close(getattr(whole, name), one_by_one, atol=1e-5, rtol=1e-5)


def test_without_touches_the_mask_is_where_normals_are_long(finished):
    normals = torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1) * torch.tensor([1.0, 0.6, 0.4, 0.0]).view(1, 1, 1, 4)
    assert surface_mask(encode_normals(normals, torch.ones(1, 1, 1, 4))).flatten().tolist() == [1, 1, 0, 0]
    made = finished()
    assert set(made.mask.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(made.normal.norm(dim=1, keepdim=True), made.mask)


def test_touches_without_their_ground_change_nothing(pair):
    """No single tone: frames stay as they are."""
    frames = SampledFrames(torch.rand(2, 3, 48, 48), None, torch.ones(2, 1, 48, 48))
    touch = KeepTone()
    assert isinstance(touch, Finish) and touch(frames, pair.portrait) is frames
