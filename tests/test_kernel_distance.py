"""The kernel distance orders sets of pictures by how unlike photographs they are, and copies gain nothing."""

import math

import numpy as np
import pytest
from torch.nn.functional import avg_pool2d

from geodiff4d.evaluate.kernel_distance import FEWEST, head_features, kernel_distance
from geodiff4d.evaluate.tracking import make_case

PEOPLE = np.random.default_rng(0).normal(size=(24, 40))


def test_photographs_are_no_distance_from_themselves_in_whatever_sample():
    found = kernel_distance(PEOPLE, PEOPLE, draws=50)
    assert found == pytest.approx((0, 0, 0), abs=1e-9)


def test_what_is_further_off_scores_more_and_scale_does_not_count():
    near, far = (kernel_distance(PEOPLE + off, PEOPLE, draws=50) for off in (0.3, 0.6))
    assert 0 < near.low < near.mean < far.mean and near.low <= near.mean <= near.high
    scale = np.exp(np.random.default_rng(1).normal(size=40))
    scaled = kernel_distance((PEOPLE + 0.3) * scale, PEOPLE * scale, draws=50)
    assert scaled == pytest.approx(near, rel=1e-4), "every feature counts by its spread among photographs"


def test_who_is_not_seen_in_both_is_left_out():
    made, real = PEOPLE + 0.5, PEOPLE.copy()
    made[3], real[7] = np.nan, np.nan
    kept = [i for i in range(len(PEOPLE)) if i not in (3, 7)]
    assert kernel_distance(made, real, draws=20) == kernel_distance(made[kept], real[kept], draws=20)
    few = FEWEST - 1
    assert all(math.isnan(v) for v in kernel_distance(made[10 : 10 + few], real[10 : 10 + few], draws=20))


def test_blurred_heads_are_further_off_the_more_they_are_blurred():
    heads = [make_case(seed, "val", size=144).image for seed in range(FEWEST + 1)]
    real = head_features(heads)
    assert np.isfinite(real).all(1).sum() >= FEWEST

    def blurred(width: int) -> float:
        return kernel_distance(head_features(avg_pool2d(h, width, 1, width // 2) for h in heads), real, draws=2).mean

    assert 0 < blurred(3) < blurred(9)
    assert np.isnan(head_features([0.5 + 0 * heads[0]])).all(), "no head in plain grey"
