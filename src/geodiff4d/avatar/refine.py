"""Residuals for the head parameters, learned with the avatar (Sec. A.2): trackers are never exact.

Dense tensors for the whole sequence under Adam: with sparse updates a row moves only when its timestep is drawn, and
CAP4D's residuals stay frozen. The learning rate warms up, stays, and decays exponentially.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geodiff4d.heads.rig import HeadParams


@dataclass(frozen=True)
class RefineConfig:
    """Peak learning rates of the residuals, and their schedule; times are shares of all iterations."""

    expr: float = 2e-3
    pose: float = 2e-4
    """Rotation and neck [rad]."""
    face: float = 2e-4
    """Jaw and eyes [rad]: expression to the paper, which leaves both out of its pose maps."""
    translation: float = 4e-5
    """Head translation [m]."""
    shape: float = 2e-3
    warmup: float = 0.1
    """End of the warm-up. The paper says both 20K and 40K of 100K."""
    plateau: float = 0.7
    """Where the decay begins; it ends at a hundredth."""
    start: float = 0.0
    """Rate of all residuals at the first step; the paper has 1e-10."""

    def rate(self, peak: float, progress: float) -> float:
        """Return the rate of a residual with this peak at a share of the fit in [0, 1]."""
        if progress < self.warmup:
            return self.start + (peak - self.start) * progress / self.warmup
        return peak * 0.01 ** max((progress - self.plateau) / (1 - self.plateau), 0.0)


class Refinement:
    """A sequence of head parameters with learnable residuals."""

    def __init__(self, sequence: HeadParams):
        self.base = sequence
        names = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation", "eyelids")
        present = {n: getattr(sequence, n) for n in names if getattr(sequence, n) is not None}
        self.residuals: dict[str, Tensor] = {n: torch.zeros_like(v).requires_grad_() for n, v in present.items()}
        # One person has one identity: the sequence's mean, and one residual.
        self.base_shape = sequence.shape.mean(0)
        self.residuals["shape"] = torch.zeros_like(self.base_shape).requires_grad_()

    @property
    def shape(self) -> Tensor:
        return self.base_shape + self.residuals["shape"]

    def params(self, row: int) -> HeadParams:
        """Return the refined parameters of one timestep."""
        values = {n: getattr(self.base, n)[row] + r[row] for n, r in self.residuals.items() if n != "shape"}
        return replace(self.base[row], shape=self.shape, **values)

    def sequence(self) -> HeadParams:
        """Return the refined sequence, detached."""
        rows = [self.params(i).map(Tensor.detach) for i in range(self.base.batch[0])]
        return HeadParams.stack(rows)

    def groups(self, config: RefineConfig) -> list[dict]:
        """Return Adam's parameter groups, with their peak rates under `peak`."""
        rates = {
            "expr": config.expr, "eyelids": config.expr, "jaw_pose": config.face, "eyes_pose": config.face,
            "translation": config.translation, "shape": config.shape,
        }  # fmt: skip
        return [{"params": [r], "peak": rates.get(n, config.pose), "name": n} for n, r in self.residuals.items()]
