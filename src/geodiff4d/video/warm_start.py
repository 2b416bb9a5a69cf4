"""A warm start of the expression encoder on motion that is known (ours; the paper has none).

Denoising alone teaches a small encoder little in hours: mouths and lids are a few cells of a loss that hair dominates.
So the encoder first regresses how the face moves, through a readout that is thrown away. What it regresses matters:
the 52 coefficients of an action basis hide one another (a closed mouth is `jawOpen` with `mouthClose`), the motion of
the surface does not. On 24 held-out people 300 steps of 128 crops explain 70 % of the mouth's first component, where
400 steps on the coefficients explained 23 % of `jawOpen`.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from geodiff4d.core.rundir import OnRecord
from geodiff4d.data.sampling import Samples
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.viewpoints import openhead
from geodiff4d.video.expression import ExpressionEncoder
from geodiff4d.video.sample import autocast


@dataclass(frozen=True)
class Region:
    """A part of the face whose motion is summed up on its own, so that lids count beside a jaw that moves further."""

    names: tuple[str, ...]
    vertices: int
    """How many of its vertices are looked at, drawn at random."""
    components: int
    side: int = 0
    """+1: the person's left half, −1: the right, 0: both."""


REGIONS = (
    Region(("lips", "teeth"), 160, 12), Region(("skin",), 200, 8), Region(("lids",), 60, 3, 1),
    Region(("lids",), 60, 3, -1), Region(("brows",), 60, 4), Region(("tongue",), 40, 2),
)  # fmt: skip


@dataclass(frozen=True)
class MotionCode:
    """Principal components of each region's motion, and the gaze."""

    vertices: tuple[Tensor, ...]
    """Indices per region."""
    mean: tuple[Tensor, ...]
    basis: tuple[Tensor, ...]
    gaze: tuple[Tensor, Tensor]
    """Mean and deviation of the eyes' pitch and yaw."""

    def __call__(self, head: Head, motion: HeadParams) -> Float[Tensor, "n targets"]:
        """Encode expression, jaw and gaze; components have a variance between 0 and 1, the first of a region 1."""
        moved = _motion(head, motion, torch.cat(self.vertices)).split([len(v) for v in self.vertices], 1)
        parts = [(m.flatten(1) - mean) @ basis for m, mean, basis in zip(moved, self.mean, self.basis, strict=True)]
        return torch.cat([*parts, (_gaze(motion) - self.gaze[0]) / self.gaze[1]], 1)


def fit_motion_code(head: Head, motion: HeadParams, seed: int = 0) -> MotionCode:
    """Choose each region's vertices and the components of their motion over a sample.

    A component is divided by the root of its deviation: what moves little counts less, but counts.
    """
    generator = torch.Generator().manual_seed(seed)
    vertices, mean, basis = [], [], []
    for region in REGIONS:
        index = _mask(head, region).nonzero()[:, 0]
        index = index[torch.randperm(len(index), generator=generator)[: region.vertices]]
        moved = _motion(head, motion, index).flatten(1)
        _, values, axes = torch.linalg.svd(moved - moved.mean(0), full_matrices=False)
        k = min(region.components, len(values))
        deviation = (values[:k] / len(moved) ** 0.5).clamp(min=1e-6)
        vertices.append(index)
        mean.append(moved.mean(0))
        basis.append(axes[:k].mT / deviation * (deviation / deviation[0]).sqrt())
    gaze = _gaze(motion)
    return MotionCode(tuple(vertices), tuple(mean), tuple(basis), (gaze.mean(0), gaze.std(0).clamp(min=1e-3)))


def _mask(head: Head, region: Region) -> Bool[Tensor, " verts"]:
    known = [head.regions[name] for name in region.names if name in head.regions]
    mask = torch.stack(known).any(0)
    return mask & (head.template[:, 0] * region.side > 0) if region.side else mask


def _motion(head: Head, motion: HeadParams, vertices: Tensor, chunk: int = 200) -> Float[Tensor, "n k 3"]:
    """Displacements [m] of some vertices of the mean head under expression, jaw and gaze, its pose at rest."""
    rest = head.pose(head.neutral(1)).vertices[0, vertices]
    parts = []
    for i in range(0, len(motion.expr), chunk):
        part = motion[i : i + chunk]
        still = head.neutral(len(part.expr))
        posed = head.pose(replace(still, expr=part.expr, jaw_pose=part.jaw_pose, eyes_pose=part.eyes_pose))
        parts.append(posed.vertices[:, vertices] - rest)
    return torch.cat(parts)


def _gaze(motion: HeadParams) -> Float[Tensor, "n 4"]:
    return motion.eyes_pose.flatten(1)[:, [0, 1, 3, 4]]


def warm_start(
    encoder: ExpressionEncoder, samples: Samples, steps: int, mixed: bool = True,
    on_record: OnRecord = lambda record: None, lr: float = 1e-3, crops: int = 128,
) -> None:  # fmt: skip
    """Let the encoder regress the motion of people, seen in augmented driving crops.

    Args:
        samples: some of whose takes know their motion (`Samples.drivers`).
        steps: of `crops` crops each.
    """
    device = next(encoder.parameters()).device
    head, known = openhead(), samples.motion()
    code = fit_motion_code(head, known)
    readout = nn.Linear(encoder.config.latent, code(head, known[:1]).shape[1]).to(device)
    nn.init.zeros_(readout.weight)
    nn.init.zeros_(readout.bias)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *readout.parameters()], betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        images, motion = samples.drivers(step, crops)
        with autocast(device, mixed):
            guess = readout(encoder(images.to(device)))
        loss = (guess.float() - code(head, motion).to(device)).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            on_record({"warm_start": step, "loss": round(loss.item(), 5)})
