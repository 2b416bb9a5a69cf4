"""What landmarks and the face reader say of an expression, brought together.

Both shrink what they are unsure of, each in its own way: landmarks hardly see lids and irises, the reader errs by who
somebody is. Which of them to believe, and how far, is a matter of each coefficient: least squares on people whose
motion is known. Slopes are those of a person's own changes; at rest the blend says rest.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.tracking.layout import Layout
from geodiff4d.tracking.observe import Observed
from geodiff4d.world.expressions import ACTIONS

RIDGE = 0.02
"""Penalty on the slopes' distance from one half each, in shares of the truth's variance."""
FIT_ALONE = torch.tensor([[1.0], [0.0], [0.0]])
"""The blend that leaves a fit as it is."""
STRONGEST = 1.25
"""Largest coefficient: strong people go beyond 1."""
EXPR, EYES = slice(0, len(ACTIONS)), slice(len(ACTIONS) + 3, len(ACTIONS) + 9)
"""Where they are among a reader's targets."""


def reads_expression(layout: Layout) -> bool:
    """Whether the face reader's coefficients are the head's own."""
    return layout.names == ACTIONS


def blended(
    layout: Layout, seen: Observed, frame: Float[Tensor, "frames unknowns"], aligned: bool = False
) -> Float[Tensor, "frames unknowns"]:  # fmt: skip
    """Return fitted unknowns with the expression and gaze that fit and reader together say, where one read the face.

    `aligned` says that the fit has seen pixels too (`appearance.py`), and is to be believed as such.
    """
    reading = seen.reading
    if reading is None or not reads_expression(layout):
        return frame
    out, there = frame.clone(), seen.seen[:, None]
    for name, value, part in (("expr", reading.expr, EXPR), ("eyes_pose", reading.eyes_pose, EYES)):
        where = layout.slices[name]
        a, b, c = reading.blend[:, int(aligned), :, part].to(frame).unbind(1)
        both = a * frame[:, where] + b * value.to(frame) + c
        out[:, where] = torch.where(there, both, frame[:, where])
    out[:, layout.slices["expr"]] = out[:, layout.slices["expr"]].clamp(0, STRONGEST)
    return out


def fitted_blend(
    fit: Float[Tensor, "videos frames n"], reading: Float[Tensor, "videos frames n"],
    truth: Float[Tensor, "videos frames n"], rest: int,
) -> Float[Tensor, "3 n"]:  # fmt: skip
    """Return slopes of the fit and the reading, and what is added, per target.

    Args:
        rest: frames at the start of every video in which the face rests.
    """

    def changes(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)).flatten(0, 1).double()

    f, r, y = (changes(x) for x in (fit, reading, truth))
    A = torch.stack([f, r], -1)
    penalty = RIDGE * y.square().sum(0)
    square = torch.einsum("fna,fnb->nab", A, A) + penalty[:, None, None].clamp(min=1e-9) * torch.eye(2).double()
    slopes = torch.linalg.solve(square, torch.einsum("fna,fn->na", A, y) + penalty[:, None] * 0.5)
    resting = [x[:, :rest].mean((0, 1)).double() for x in (fit, reading, truth)]
    added = resting[2] - slopes[:, 0] * resting[0] - slopes[:, 1] * resting[1]
    return torch.stack([slopes[:, 0], slopes[:, 1], added]).float()
