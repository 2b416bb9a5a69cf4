"""Regression of expression tokens from head parameters, for driving an avatar where there is no image to encode.

Sliders, ARKit streams and clips of other trackers say how a face moves by head parameters; the avatar's networks want
the video model's tokens. A ridge regression, fitted on the avatar's own clip, guesses them and stays within what the
clip has shown.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.heads.rig import HeadParams

BLOCKS = 5
"""Folds of the cross-validation: runs of consecutive timesteps, since neighbours are nearly the same image."""
STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridge strengths that are tried, in units of a feature's variance summed over the rows."""
FLAT = 1e-6
"""Standard deviation below which a feature is left out."""
MINIMUM = 2 * BLOCKS
"""Timesteps from which the strength is cross-validated."""


@dataclass(frozen=True)
class TokenRegressor:
    """A linear map from expression, jaw, eyes and lids to tokens, clamped to the clip's range."""

    weight: Float[Tensor, "features outputs"]
    mean: Float[Tensor, " features"]
    bias: Float[Tensor, " outputs"]
    low: Float[Tensor, "tokens channels"]
    high: Float[Tensor, "tokens channels"]
    """`low` and `high` are the range of each number over the clip."""

    def __call__(self, params: HeadParams) -> Float[Tensor, "*batch tokens channels"]:
        """Return the tokens predicted for each row of `params`."""
        return self.clamp(((features(params) - self.mean) @ self.weight + self.bias).unflatten(-1, self.low.shape))

    def clamp(self, tokens: Float[Tensor, "*batch tokens channels"]) -> Float[Tensor, "*batch tokens channels"]:
        """Return tokens clamped to the range over the avatar's clip."""
        return torch.minimum(torch.maximum(tokens, self.low), self.high)

    def to(self, device: torch.device | str) -> "TokenRegressor":
        return TokenRegressor(**{name: value.to(device) for name, value in vars(self).items()})


def features(params: HeadParams) -> Float[Tensor, "*batch features"]:
    """Return expression, jaw, eyes and eyelids, concatenated; the head's pose is left out."""
    parts = (params.expr, params.jaw_pose, params.eyes_pose, params.eyelids)
    return torch.cat([p for p in parts if p is not None], -1)


def fit_regressor(
    params: HeadParams, tokens: Float[Tensor, "timesteps tokens channels"]
) -> tuple[TokenRegressor, dict[str, float | int | None]]:
    """Fit the map on a clip, a row per timestep; returns it with its scores on held-out timesteps.

    The scores are `explained`, the share of the tokens' variance that is predicted (1 is all, 0 no more than by their
    mean), `rms`, the error, and `timesteps`. The first two are None for clips of fewer than `MINIMUM` timesteps.
    """
    x, y = features(params).double(), tokens.flatten(1).double()
    if len(x) < MINIMUM:
        best, errors = STRENGTHS[-1], {"explained": None, "rms": None}
    else:
        losses = {s: _held_out(x, y, s) for s in STRENGTHS}
        best = min(losses, key=lambda s: losses[s][0])
        loss, spread = losses[best]
        errors = {"explained": 1 - loss / max(spread, 1e-12), "rms": (loss / y.numel()) ** 0.5}
    weight, mean, bias = _solve(x, y, best)
    low, high = tokens.amin(0).float(), tokens.amax(0).float()
    return TokenRegressor(weight.float(), mean.float(), bias.float(), low, high), {**errors, "timesteps": len(x)}


def _held_out(x: Tensor, y: Tensor, strength: float) -> tuple[float, float]:
    """Return the summed squared error over all held-out blocks, and that of the mean of the others."""
    loss = spread = 0.0
    for held in torch.arange(len(x)).tensor_split(BLOCKS):
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[held] = False
        weight, mean, bias = _solve(x[rest], y[rest], strength)
        loss += float((y[held] - ((x[held] - mean) @ weight + bias)).square().sum())
        spread += float((y[held] - bias).square().sum())
    return loss, spread


def _solve(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the ridge regression with every feature in units of its own spread; returns (weight, mean, bias)."""
    mean, bias = x.mean(0), y.mean(0)
    spread = (x - mean).square().mean(0).sqrt()
    known = spread > FLAT
    weight = x.new_zeros(x.shape[1], y.shape[1])
    if known.any():
        scaled = (x - mean)[:, known] / spread[known]
        gram = scaled.mT @ scaled / len(x) + strength / len(x) * torch.eye(int(known.sum()), dtype=x.dtype)
        weight[known] = torch.linalg.solve(gram, scaled.mT @ (y - bias) / len(x)) / spread[known, None]
    return weight, mean, bias
