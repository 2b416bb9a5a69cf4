"""Dynamics of single Gaussians: an MLP that adds expression-dependent residuals to every attribute (Sec. 3.3).

Attributes shared by all expressions cannot show a wrinkle that comes and goes. Each Gaussian has a learned feature; the
MLP reads it beside the expression's code. The paper says neither sizes nor inputs: ours are small, and the code is the
clip's leading principal components, so that the MLP cannot tell every timestep apart.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from geodiff4d.avatar.binding import LocalGaussians

SIZES = {"means": 3, "quats": 4, "log_scales": 3, "opacity_logits": 1, "color_logits": 3}
"""Outputs of the MLP, in the order of the attributes."""
STRENGTH = {"means": 0.1, "quats": 0.1, "log_scales": 0.2, "opacity_logits": 0.5, "color_logits": 0.5}
"""The residual of an output of 1: in face sizes for means, in the attribute's own units for the others."""


@dataclass(frozen=True)
class DynamicsConfig:
    """Size, learning rates and penalty of the dynamics MLP."""

    features: int = 8
    """Length of each Gaussian's learned feature."""
    hidden: int = 32
    lr: float = 2e-3
    """Peak learning rate of the MLP; it decays as the Gaussians' rates do."""
    feature_lr: float = 1e-2
    small: float = 0.01
    """Weight of the mean square of the outputs."""

    def __post_init__(self) -> None:
        if min(self.features, self.hidden) < 1:
            raise ValueError(f"features and hidden must be positive, got {self.features} and {self.hidden}")


class Dynamics(nn.Module):
    """MLP from a Gaussian's feature and the expression's summary to residuals; zero at the start."""

    def __init__(self, config: DynamicsConfig, components: int):
        super().__init__()
        self.config = config
        self.of_feature = nn.Linear(config.features, config.hidden)
        self.of_code = nn.Linear(components, config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, sum(SIZES.values()), bias=False)
        nn.init.zeros_(self.out.weight)
        strength = [STRENGTH[name] for name, size in SIZES.items() for _ in range(size)]
        self.register_buffer("strength", torch.tensor(strength), persistent=False)
        self.strength: Tensor

    def forward(
        self, features: Float[Tensor, "n features"], summary: Float[Tensor, " components"]
    ) -> Float[Tensor, "n outputs"]:
        """Return residuals in units of `STRENGTH`; they are zero for the clip's mean expression, a summary of zero."""
        own = self.of_feature(features)
        # The same for every Gaussian: a row, not a matrix.
        return self.out(silu(own + self.of_code(summary)) - silu(own))

    def penalty(self, outputs: Float[Tensor, "n outputs"]) -> Float[Tensor, ""]:
        """Return the penalty that keeps residuals small."""
        return self.config.small * outputs.square().mean()

    def applied(self, local: LocalGaussians, outputs: Float[Tensor, "n outputs"]) -> LocalGaussians:
        """Return the Gaussians with the residuals added."""
        parts = (outputs * self.strength).split(list(SIZES.values()), -1)
        changed = {n: getattr(local, n) + d.view_as(getattr(local, n)) for n, d in zip(SIZES, parts, strict=True)}
        return replace(local, **changed)


def first_features(count: int, config: DynamicsConfig, generator: torch.Generator) -> Float[Tensor, "n features"]:
    """Draw the Gaussians' first features, which differ so that the MLP can tell Gaussians apart."""
    return torch.randn(count, config.features, generator=generator)
