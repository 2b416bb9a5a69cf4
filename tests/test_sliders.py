"""Named sliders and ARKit streams: the token regression, its held-out error and its range; bad lines."""

from dataclasses import replace

import pytest
import torch

from geodiff4d.avatar.sliders import TokenRegressor, features, fit_regressor
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import HeadParams


@pytest.fixture(scope="module")
def clip() -> tuple[HeadParams, torch.Tensor]:
    """60 timesteps whose tokens are linear in three of the weights and in the jaw, and a little noise."""
    g = torch.Generator().manual_seed(0)
    head = load_head()
    expr = torch.zeros(60, 52)
    expr[:, [3, 10, 30]] = torch.rand(60, 3, generator=g)
    jaw = 0.2 * torch.rand(60, 3, generator=g)
    params = replace(head.neutral(60), expr=expr, jaw_pose=jaw)
    x = features(params)
    weight = torch.randn(x.shape[1], 32 * 16, generator=g)
    tokens = (x @ weight).unflatten(-1, (32, 16)) + 0.02 * torch.randn(60, 32, 16, generator=g)
    return params, tokens


def test_regression_finds_a_linear_map(clip):
    params, tokens = clip
    regressor, error = fit_regressor(params, tokens)
    assert (error["explained"] or 0) > 0.99 and (error["rms"] or 1) < 0.04 and error["timesteps"] == 60
    assert (regressor(params) - tokens).square().mean() < 0.04**2
    # A weight that the clip never moved changes nothing.
    moved = replace(params[0], expr=params[0].expr.index_fill(0, torch.tensor([7]), 1.0))
    assert torch.equal(regressor(moved), regressor(params[0]))


def test_regression_stays_within_the_clip(clip):
    params, tokens = clip
    regressor, _ = fit_regressor(params, tokens)
    wild = regressor(replace(params, expr=5 * params.expr, jaw_pose=-3 * params.jaw_pose))
    assert (wild <= tokens.amax(0)).all() and (wild >= tokens.amin(0)).all()


def test_unrelated_tokens_are_not_explained(clip):
    params, tokens = clip
    _, error = fit_regressor(params, torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)))
    assert error["explained"] is not None and error["explained"] < 0.1


def test_a_short_clip_gives_no_error(clip):
    params, tokens = clip
    regressor, error = fit_regressor(params[:1], tokens[:1])
    assert error == {"explained": None, "rms": None, "timesteps": 1}
    assert isinstance(regressor, TokenRegressor) and torch.allclose(regressor(params[5]), tokens[0])
