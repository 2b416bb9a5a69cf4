"""Relative driving: another person's expressions without that person's face at rest.

Trackers put a part of who somebody is into how they look: a brow that sits low, lids that hang, a mouth that smiles at
rest. Driven by such parameters as they are, an avatar wears its driver's face (the complaint about all rigs of this
kind). What is taken over is how far each expression is from the driver's own rest; it starts from the avatar's.
Nothing changes for an avatar driven by the clip that it was fitted to.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.heads.rig import Head, HeadParams

REST_QUANTILE = 0.1
"""Quantile of a weight that is taken for its value at rest: low, since weights only rise; the lowest is noise."""
MINIMUM = 8
"""Frames from which a face at rest can be estimated; for shorter performances it is taken for zero."""
BELOW = 0.05
"""Weights of an avatar's refined sequence go a little below 0."""
TOKEN_SHARE = 0.1
"""Tokens at rest are the mean of this share of the frames, those nearest to rest."""


@dataclass(frozen=True)
class Rest:
    """A face at rest, estimated from a performance."""

    expr: Float[Tensor, " exprs"]
    jaw_pose: Float[Tensor, "3"]
    eyelids: Float[Tensor, "2"] | None
    tokens: Float[Tensor, "tokens channels"] | None = None

    @staticmethod
    def of(head: Head, params: HeadParams, tokens: Float[Tensor, "frames tokens channels"] | None = None) -> "Rest":
        """Estimate a face at rest from a performance, a row per frame.

        Weights (0 to 1) rest at their tenth percentile, coefficients that go both ways at their median; the jaw rests
        nearly shut. Gaze rests straight ahead, whoever it is.
        """
        if params.batch[0] < MINIMUM:
            zero = params[0].map(torch.zeros_like)
            return Rest(zero.expr, zero.jaw_pose, zero.eyelids)
        q = REST_QUANTILE if has_weights(head) else 0.5
        expr = params.expr.quantile(q, 0)
        jaw = torch.cat([params.jaw_pose[:, :1].quantile(REST_QUANTILE, 0), params.jaw_pose[:, 1:].median(0).values])
        lids = None if params.eyelids is None else params.eyelids.quantile(REST_QUANTILE, 0)
        if tokens is None:
            return Rest(expr, jaw, lids)
        away = (params.expr - expr).square().sum(-1) + (params.jaw_pose - jaw).square().sum(-1)
        nearest = away.topk(max(1, round(TOKEN_SHARE * len(away))), largest=False).indices
        return Rest(expr, jaw, lids, tokens[nearest].mean(0))


def has_weights(head: Head) -> bool:
    """Return whether expressions are weights from 0 to 1 (OpenHead's ARKit names), not signed coefficients."""
    return "jawOpen" in head.expression_names


def transferred(head: Head, params: HeadParams, driver: Rest, own: Rest) -> HeadParams:
    """Return a driver's expressions moved from the driver's rest to the avatar's.

    Weights keep their end: rest goes to rest and 1 stays 1, or eyes would not shut. Everything else is shifted.
    """
    expr = params.expr - driver.expr + own.expr
    if has_weights(head):
        reach = (1 - own.expr) / (1 - driver.expr).clamp(min=0.1)
        expr = (own.expr + (params.expr - driver.expr) * reach).clamp(-BELOW, 1)
    lids = params.eyelids
    if lids is not None and driver.eyelids is not None and own.eyelids is not None:
        lids = lids - driver.eyelids + own.eyelids
    return replace(params, expr=expr, jaw_pose=params.jaw_pose - driver.jaw_pose + own.jaw_pose, eyelids=lids)


def transferred_tokens(
    tokens: Float[Tensor, "frames tokens channels"], driver: Rest, own: Rest
) -> Float[Tensor, "frames tokens channels"]:
    """Return a driver's tokens moved from the driver's rest to the avatar's, unchanged where either is unknown."""
    if driver.tokens is None or own.tokens is None:
        return tokens
    return tokens - driver.tokens + own.tokens
