"""The expression code that conditions the deformation U-Net and the dynamics MLP.

A generated clip has tokens of the pose-free expression encoder (Sec. 3.1). Clips that were recorded or rendered have
none: their one token is the head's own expression, jaw, eyes and eyelids. Either is standardised over the clip. Whoever
drives an avatar of tokens by parameters alone gets tokens by regression (`avatar.sliders`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.sliders import TokenRegressor, features, fit_regressor
from geodiff4d.heads.rig import HeadParams

SUMMARY = 16
"""Principal components that the dynamics MLP sees; with one per timestep it could memorise every frame."""


@dataclass(frozen=True)
class Code:
    """One expression, standardised over the clip."""

    tokens: Float[Tensor, "tokens channels"]
    summary: Float[Tensor, " components"]
    """Leading principal components, of unit variance over the clip; zero for the clip's mean."""


@dataclass(frozen=True)
class ExpressionCode:
    """Maps a frame's tokens, or its parameters, to the code that conditions the networks."""

    mean: Float[Tensor, "tokens channels"]
    scale: Float[Tensor, ""]
    """One standard deviation for all numbers, so that those that hardly vary are not amplified."""
    basis: Float[Tensor, "numbers components"]
    """Projection from the standardised tokens, flattened, to the summary."""
    low: Float[Tensor, "tokens channels"]
    high: Float[Tensor, "tokens channels"]
    """`low` and `high` are each number's range over the clip; driving tokens are clamped to it."""
    regressor: TokenRegressor | None = None
    """Map from parameters to tokens; None where the parameters are the only token."""

    @property
    def size(self) -> tuple[int, int]:
        """Return the number of tokens and their channels."""
        return self.mean.shape[0], self.mean.shape[1]

    def __call__(self, params: HeadParams, tokens: Float[Tensor, "tokens channels"] | None = None) -> Code:
        """Return an expression's code (no batch axis); not differentiable in the parameters."""
        if self.regressor is None:
            tokens = features(params).detach()[None]
        elif tokens is None:
            tokens = self.regressor(params.map(Tensor.detach))
        tokens = torch.minimum(torch.maximum(tokens.to(self.mean), self.low), self.high)
        code = (tokens - self.mean) / self.scale
        return Code(code, code.flatten() @ self.basis)

    def to(self, device: torch.device | str) -> "ExpressionCode":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, as `from_tensors` takes it."""
        own = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return own | {f"regressor.{k}": v for k, v in (vars(self.regressor) if self.regressor else {}).items()}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "ExpressionCode":
        """Make a code from what `tensors` returned."""
        parts = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("regressor.")}
        own = {k: v for k, v in tensors.items() if not k.startswith("regressor.")}
        return ExpressionCode(**own, regressor=TokenRegressor(**parts) if parts else None)


def fit_expression_code(
    sequence: HeadParams, tokens: Float[Tensor, "timesteps tokens channels"] | None
) -> tuple[ExpressionCode, dict[str, float | int | None] | None]:
    """Fit the code to a clip's timesteps; returns it with the regressor's scores (`sliders.fit_regressor`) or None."""
    regressor, explained = (None, None) if tokens is None else fit_regressor(sequence, tokens)
    rows = features(sequence).detach()[:, None] if tokens is None else tokens
    mean = rows.mean(0)
    scale = (rows - mean).square().mean().sqrt().clamp(min=1e-6)
    code = ((rows - mean) / scale).flatten(1).double()
    _, values, vectors = torch.linalg.svd(code, full_matrices=False)
    keep = max(min(SUMMARY, int((values > 0.05 * values[0]).sum())), 1)
    # A clip of one expression has no components: a summary of zero.
    basis = vectors[:keep].mT * torch.where(values[:keep] > 1e-6, len(code) ** 0.5 / values[:keep].clamp(min=1e-6), 0.0)
    return ExpressionCode(mean, scale, basis.float(), rows.amin(0), rows.amax(0), regressor), explained
