"""Densification with inherited faces (GaussianAvatars, Qian et al. 2024, Sec. 3.2; Kerbl et al. 2023, Sec. 5.2).

Gaussians with a large gradient by their position in the image (`grad2d`) are cloned if small and split in two if large;
transparent ones are removed. Children are bound to their parent's face, and no face is ever emptied: where all of a
face's Gaussians would be removed, all stay. A step renders one image, so `grad2d` is averaged over the steps in which a
Gaussian was seen.

Ours / theirs: `grad2d` is the gradient by the mean in the world, carried to the image, since not every rasteriser
returns the image's; split offsets are drawn in the Gaussian's own axes (theirs mix global sizes with local rotations).
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
"""Factor by which the children of a split Gaussian are smaller."""


@dataclass(frozen=True)
class DensifyConfig:
    """When Gaussians are cloned, split, pruned and reset, and which ones."""

    start: float = 0.1
    """Share of the fit's steps before the first round."""
    stop: float = 0.7
    """Share of the fit's steps after which there is no further round."""
    every: int = 100
    """Steps from one round to the next."""
    grow_grad2d: float = 2e-4
    """Mean `grad2d` above which a Gaussian is cloned or split; positions are in half images, as gsplat's."""
    large_m: float = 0.003
    """Gaussians whose longest standard deviation exceeds this are split, others cloned [m]."""
    faint: float = 0.005
    """Opacity below which Gaussians are removed."""
    limit: int = 100_000
    """Largest number of Gaussians; where more are wanted, those with the largest `grad2d` are densified first."""
    reset_every: int = 0
    """Steps between resets of all opacities to `reset_to`; 0 for none."""
    reset_to: float = 0.01
    """Largest opacity after a reset."""

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"densification needs every >= 1 and 0 <= start <= stop <= 1, got {self}")

    def due(self, iteration: int, iterations: int) -> bool:
        """Return whether a round follows step `iteration` (from 0) of a fit of `iterations` steps."""
        progress = (iteration + 1) / iterations
        return (iteration + 1) % self.every == 0 and self.start < progress <= self.stop

    def reset_due(self, iteration: int, iterations: int) -> bool:
        """Return whether opacities are reset after step `iteration`; never after `stop`, so that they can recover."""
        return (
            self.reset_every > 0
            and (iteration + 1) % self.reset_every == 0
            and (iteration + 1) / iterations <= self.stop
        )


@dataclass(frozen=True)
class Grad2d:
    """Norms of the gradients by the positions in the image, accumulated since the last round."""

    total: Float[Tensor, " n"]
    seen: Float[Tensor, " n"]
    """Steps in which each Gaussian had a gradient."""

    @staticmethod
    def zeros(count: int, device: torch.device | str = "cpu") -> "Grad2d":
        """Return the state of `count` Gaussians that no step has seen."""
        return Grad2d(torch.zeros(count, device=device), torch.zeros(count, device=device))

    @torch.no_grad()
    def plus(self, means: Float[Tensor, "n 3"], gradient: Float[Tensor, "n 3"], camera: Camera) -> "Grad2d":
        """Return the sum with one step's gradients by the means [1/m]; a Gaussian without gradient was not seen."""
        T = camera.T_cam_world.to(means)
        depth = means @ T[2, :3] + T[2, 3]
        across = (gradient @ T[:2, :3].mT) * depth[:, None]
        half = torch.tensor([camera.width / 2, camera.height / 2]).to(means)
        grad2d = (across / camera.K[[0, 1], [0, 1]].to(means) * half).norm(dim=-1)
        return Grad2d(self.total + grad2d, self.seen + (grad2d > 0))

    @property
    def mean(self) -> Float[Tensor, " n"]:
        """Return each Gaussian's mean over the steps that saw it; 0 where none did."""
        return self.total / self.seen.clamp(min=1)


@dataclass(frozen=True)
class Round:
    """Gaussians after one round, and where each comes from."""

    local: LocalGaussians
    parent: Int[Tensor, " n"]
    """Index of the Gaussian, before the round, that each was or was made of."""
    fresh: Bool[Tensor, " n"]
    """Clones and children of splits, for which an optimiser has no state."""


@torch.no_grad()
def densify(
    local: LocalGaussians, grad2d: Float[Tensor, " n"], face_scale: Float[Tensor, " faces"], config: DensifyConfig,
    generator: torch.Generator,
) -> Round:  # fmt: skip
    """Clone, split and prune; returns survivors, clones and children of splits, in this order.

    A pure function of its inputs. `grad2d` is `Grad2d.mean`; `face_scale` is the size of each face of the surface [m].
    """
    opacity = local.opacity_logits.sigmoid()
    wanted = (grad2d > config.grow_grad2d) & (opacity > config.faint)
    room = max(config.limit - len(local), 0)
    if int(wanted.sum()) > room:
        ranked = torch.where(wanted, grad2d, -1.0).argsort(descending=True, stable=True)
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
    """Return which Gaussians stay: a face that would lose all keeps all, but parents whose children replace them."""
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
    """Return logits of opacities of at most `reset_to`; those that are not needed are removed in the next round."""
    return opacity_logits.clamp(max=math.log(config.reset_to / (1 - config.reset_to)))
