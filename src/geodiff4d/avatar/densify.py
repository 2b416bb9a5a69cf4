"""Densification with inherited faces (GaussianAvatars, Qian et al. 2024, Sec. 3.2; Kerbl et al. 2023, Sec. 5.2).

Gaussians whose picture position is pulled hard are cloned if small and split in two if large; transparent ones go.
Children ride on their parent's face, and no face is ever emptied: where all of a face's Gaussians would go, all stay.
The loss is shown at one picture a step, so gradients are summed over the steps in which a Gaussian was seen.

Ours / theirs: the pull is the world gradient carried to the picture, since not every rasteriser hands out the
picture's; split offsets are drawn in the Gaussian's own axes (theirs mix global sizes with local rotations).
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geodiff4d.avatar.binding import NORMAL_AXIS, LocalGaussians
from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import quat_to_matrix

CHILDREN = 2
SHRINK = 1.6
"""A split Gaussian's children are so much smaller."""


@dataclass(frozen=True)
class DensifyConfig:
    """When and what is cloned, split, pruned and reset; times are shares of the fit."""

    start: float = 0.1
    stop: float = 0.7
    every: int = 100
    """Steps from one round to the next."""
    pull: float = 2e-4
    """Mean gradient by the position on the picture, in half pictures, above which a Gaussian is too few."""
    large_m: float = 0.003
    """Gaussians with a longer axis are split, others cloned."""
    faint: float = 0.005
    """Opacity below which Gaussians go."""
    limit: int = 100_000
    """So many Gaussians at most; those pulled hardest go first."""
    reset_every: int = 0
    """Steps between resets of all opacities to `reset_to`; 0 for none."""
    reset_to: float = 0.01

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"densification needs every >= 1 and 0 <= start <= stop <= 1, got {self}")

    def due(self, iteration: int, iterations: int) -> bool:
        """Say whether a round follows the step `iteration` (from 0)."""
        progress = (iteration + 1) / iterations
        return (iteration + 1) % self.every == 0 and self.start < progress <= self.stop

    def reset_due(self, iteration: int, iterations: int) -> bool:
        """Say whether opacities are reset after the step; never so late that they cannot recover."""
        return (
            self.reset_every > 0
            and (iteration + 1) % self.reset_every == 0
            and (iteration + 1) / iterations <= self.stop
        )


@dataclass(frozen=True)
class Pulls:
    """What the pictures have asked for since the last round."""

    total: Float[Tensor, " n"]
    seen: Float[Tensor, " n"]

    @staticmethod
    def none(count: int, device: torch.device | str = "cpu") -> "Pulls":
        return Pulls(torch.zeros(count, device=device), torch.zeros(count, device=device))

    @torch.no_grad()
    def plus(self, means: Float[Tensor, "n 3"], gradient: Float[Tensor, "n 3"], camera: Camera) -> "Pulls":
        """Add one step's gradients by the means in the world; a Gaussian without gradient was not seen."""
        T = camera.T_cam_world.to(means)
        depth = means @ T[2, :3] + T[2, 3]
        across = (gradient @ T[:2, :3].mT) * depth[:, None]
        half = torch.tensor([camera.width / 2, camera.height / 2]).to(means)
        pull = (across / camera.K[[0, 1], [0, 1]].to(means) * half).norm(dim=-1)
        return Pulls(self.total + pull, self.seen + (pull > 0))

    @property
    def mean(self) -> Float[Tensor, " n"]:
        return self.total / self.seen.clamp(min=1)


@dataclass(frozen=True)
class Round:
    """The outcome of one round."""

    local: LocalGaussians
    parent: Int[Tensor, " n"]
    """Which Gaussian of before each comes from."""
    fresh: Bool[Tensor, " n"]
    """Children: an optimiser knows nothing of them yet."""


@torch.no_grad()
def densify(
    local: LocalGaussians, pull: Float[Tensor, " n"], face_scale: Float[Tensor, " faces"], config: DensifyConfig,
    generator: torch.Generator,
) -> Round:  # fmt: skip
    """Clone, split and prune; a pure function of its inputs. The order is survivors, clones, children of splits."""
    opacity = local.opacity_logits.sigmoid()
    wanted = (pull > config.pull) & (opacity > config.faint)
    room = max(config.limit - len(local), 0)
    if int(wanted.sum()) > room:
        ranked = torch.where(wanted, pull, -1.0).argsort(descending=True, stable=True)
        wanted = torch.zeros_like(wanted).index_fill(0, ranked[:room], True)
    size = (local.log_scales.amax(-1).exp()) * face_scale[local.face_index]
    split, clone = wanted & (size > config.large_m), wanted & (size <= config.large_m)
    keep = _kept(local.face_index, (opacity < config.faint) | split, split)
    parents = split.nonzero()[:, 0].repeat(CHILDREN)
    index = torch.cat([keep.nonzero()[:, 0], clone.nonzero()[:, 0], parents])
    grown = replace(local, **{name: value.detach()[index] for name, value in local.tensors.items()})
    fresh = torch.arange(len(index), device=index.device) >= int(keep.sum())
    return Round(_spread(grown, len(parents), generator), index, fresh)


def _kept(face: Tensor, going: Tensor, replaced: Tensor) -> Bool[Tensor, " n"]:
    """Return who stays: nobody goes from a face that would lose everyone, but parents whose children replace them."""
    faces = int(face.max()) + 1 if len(face) else 0
    staying = torch.zeros(faces, device=face.device).index_add(0, face, ((~going) | replaced).float())
    return ~going | ((staying[face] == 0) & ~replaced)


def _spread(local: LocalGaussians, count: int, generator: torch.Generator) -> LocalGaussians:
    """Move the last `count` Gaussians, children of splits, to random places within their parents; shrink them."""
    if count == 0:
        return local
    draw = torch.randn(count, 3, generator=generator).to(local.means)
    # In the parent's own plane: its thickness is that of the surface.
    draw[:, NORMAL_AXIS] = 0
    scales, turn = local.log_scales[-count:].exp(), quat_to_matrix(local.quats[-count:])
    means, log_scales = local.means.clone(), local.log_scales.clone()
    means[-count:] += (turn @ (scales * draw)[..., None]).squeeze(-1)
    log_scales[-count:] -= math.log(SHRINK)
    return replace(local, means=means, log_scales=log_scales)


def reset_opacity(opacity_logits: Float[Tensor, " n"], config: DensifyConfig) -> Float[Tensor, " n"]:
    """Return logits of at most `reset_to`: what is needed grows again, what is not goes in the next round."""
    return opacity_logits.clamp(max=math.log(config.reset_to / (1 - config.reset_to)))
