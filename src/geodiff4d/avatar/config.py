"""What a fit learns, for how long, and which of its parts can be switched off (Sec. 3.3, 4.2, A.2)."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from geodiff4d.avatar.deformation import DeformationConfig
from geodiff4d.avatar.densify import DensifyConfig
from geodiff4d.avatar.dynamics import DynamicsConfig
from geodiff4d.avatar.frames import HoldOut
from geodiff4d.avatar.losses import LossConfig
from geodiff4d.avatar.refine import RefineConfig
from geodiff4d.avatar.surface import RemeshConfig
from geodiff4d.core.errors import UserError

Part = Literal["refine", "normals", "normal-source", "remesh", "deformation", "dynamics", "densify"]
PARTS: tuple[Part, ...] = ("refine", "normals", "normal-source", "remesh", "deformation", "dynamics", "densify")


COARSE_PX = 256
"""Frames that are not wider are never halved."""


@dataclass(frozen=True)
class FitConfig:
    """How an avatar is fitted."""

    iterations: int = 2400
    coarse: float = 0.0
    """Share of the steps, from the first, that see frames at half their size. Only where frames are wider than
    `COARSE_PX` (ours; the paper has none)."""
    gaussians: int = 20_000
    """Largest number of Gaussians at the start; every face of the surface gets at least one."""
    means_lr: float = 2e-2
    """In units of the face's size; decays to a twentieth, like all Gaussian rates."""
    quats_lr: float = 1e-2
    log_scales_lr: float = 1.5e-2
    opacity_lr: float = 4e-2
    color_lr: float = 2e-2
    harmonics: int = 0
    """Degree of the view-dependent colour, 0 (none) to 3."""
    harmonics_lr: float = 1e-3
    harmonics_every: int = 1000
    """Steps before the first degree is fitted, and from each to the next (3DGS)."""
    loss: LossConfig = field(default_factory=LossConfig)
    refine: RefineConfig | None = field(default_factory=RefineConfig)
    """None trusts the clip's head parameters (`--ablate refine`)."""
    remesh: RemeshConfig | None = None
    """None binds Gaussians to the head's own mesh."""
    deformation: DeformationConfig | None = None
    dynamics: DynamicsConfig | None = None
    densify: DensifyConfig | None = field(
        default_factory=lambda: DensifyConfig(start=0.15, stop=0.6, every=150, grow_grad2d=8e-4, limit=32_000)
    )
    normal_source: Literal["clip", "estimator"] = "clip"
    """`estimator`: the normals of a monocular estimator, which the caller passes to `fit`, replace the clip's."""
    hold_out: HoldOut = field(default_factory=HoldOut)
    checkpoint_every: int = 500
    """Steps between checkpoints; the live preview is written with each."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.gaussians < 1 or self.checkpoint_every < 1:
            raise ValueError(f"iterations, gaussians and checkpoint_every must be positive, got {self}")
        if not 0 <= self.coarse <= 1:
            raise ValueError(f"coarse is a share of the steps from 0 to 1, got {self.coarse}")
        if not 0 <= self.harmonics <= 3:
            raise UserError(f"spherical harmonics of degree {self.harmonics}: expected 0 (none) to 3")

    def ablated(self, part: str) -> "FitConfig":
        """Return the configuration with one part switched off (Table 2, lower half, and each part of the hierarchy).

        Raises:
            UserError: an unknown part.
        """
        if part not in PARTS:
            raise UserError(f"--ablate {part} is not known: expected one of {', '.join(PARTS)}")
        if part == "normals":
            return replace(self, loss=replace(self.loss, normals=0.0))
        if part == "normal-source":
            return replace(self, normal_source="estimator")
        without: dict[str, Any] = {part: None}
        return replace(self, **without)
