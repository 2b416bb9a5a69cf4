"""The filter over a clip: nothing at first, blind to padding, steady where cells are alike, sharp where they differ."""

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.video.temporal import FILTER_GAIN, ClipFilter


@pytest.fixture
def clip():
    return torch.randn(2, 2, 3, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def open_filter(likeness: float = 0.0) -> ClipFilter:
    module = ClipFilter(2, 3, reach=2)
    with torch.no_grad():
        module.gate.fill_(1 / FILTER_GAIN)
        module.likeness.fill_(likeness / FILTER_GAIN)
    return module


ONES = torch.ones(3)


def test_a_fresh_filter_changes_nothing_and_learns(clip):
    module = ClipFilter(2, 3, reach=2)
    out = module(clip, ONES)
    assert torch.equal(out, clip)
    out.square().sum().backward()
    assert module.gate.grad is not None and module.gate.grad.abs().min() > 0


def test_without_likeness_it_is_a_gaussian_over_time(clip):
    module = open_filter(likeness=-60.0)
    offsets = torch.arange(-2, 3)
    weights = torch.exp(-((offsets / module.sigma) ** 2) / 2)
    t = 3
    inside = [(w, t + int(o)) for w, o in zip(weights, offsets, strict=True) if 0 <= t + o < 6]
    expected = sum(w * clip[:, :, :, i] for w, i in inside) / sum(w for w, _ in inside)
    assert_close(module(clip, ONES)[:, :, :, t], expected)


def test_padding_counts_in_no_mean(clip):
    module = open_filter()
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    other = clip.clone()
    other[0, :, :, 4:] = 100.0
    a, b = (module(x, ONES, valid)[:, :, :, :4] for x in (clip, other))
    assert_close(a, b)
    assert_close(a[:1], module(clip[:1, :, :, :4], ONES))


def test_jitter_is_steadied_and_a_blink_stays():
    still = torch.randn(1, 1, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).expand(-1, -1, -1, 7, -1, -1)
    jitter = 0.1 * torch.randn(still.shape, generator=torch.Generator().manual_seed(2))
    blink = torch.zeros_like(still)
    blink[:, :, :, 3] = 5.0
    out = open_filter(likeness=1.0)(still + jitter + blink, ONES)
    quiet = [0, 1, 5, 6]
    before, after = ((x - still)[:, :, :, quiet].std() for x in (still + jitter, out))
    assert after < 0.7 * before
    assert_close(out[:, :, :, 3], (still + jitter + blink)[:, :, :, 3], atol=1e-3, rtol=0)


def test_clips_shorter_than_its_reach_pass(clip):
    assert open_filter()(clip[:, :1, :, :1], ONES).isfinite().all()
    assert_close(open_filter()(clip[:, :, :, :1], ONES), clip[:, :, :, :1])
