"""The state of a fit and its optimiser step: one frame, and all Gaussians, head parameters and network weights."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.binding import LocalGaussians, face_frames
from geodiff4d.avatar.config import COARSE_PX, FitConfig
from geodiff4d.avatar.deformable import DeformableSurface, Posing
from geodiff4d.avatar.densify import Grad2d, densify, reset_opacity
from geodiff4d.avatar.frames import FitFrames, Target
from geodiff4d.avatar.losses import binding_loss, image_loss
from geodiff4d.avatar.model import Avatar, AvatarFrame, render_splats
from geodiff4d.avatar.refine import Refinement
from geodiff4d.core.errors import UserError
from geodiff4d.core.rundir import optimiser_tensors, restore_optimiser
from geodiff4d.heads.rig import SKULL_JOINT, Head, HeadParams

LAST_RATE = 0.05
"""Learning rates of Gaussians and networks at the end, as a share of those at the start."""


@dataclass(frozen=True)
class Score:
    """Errors of one rendered frame inside the foreground."""

    psnr_fg: float
    """Peak signal-to-noise ratio [dB]."""
    normal_deg: float | None
    """Mean angle between normals [degrees]; None where the clip has no normals."""


class Fitting:
    """The state of a fit: Gaussians, residuals of the head parameters, networks, and their optimiser."""

    def __init__(
        self, deformable: DeformableSurface, local: LocalGaussians, frames: FitFrames,
        tolerance: Float[Tensor, " faces"], config: FitConfig,
    ):  # fmt: skip
        self.deformable, self.frames, self.config, self.tolerance = deformable, frames, config, tolerance
        self.tokens = None if frames.tokens is None else frames.tokens.to(config.device)
        self.degree = config.harmonics
        """Degree of the harmonics that are used; the fit's first steps use lower ones."""
        self.refinement = Refinement(frames.sequence.to(config.device))
        with torch.no_grad():
            self.rest_scale = face_frames(self._vertices_of(0), deformable.surface.faces).scale
            still = config.refine is None and deformable.deformation is None
            self.posed = [self._vertices_of(i) for i in range(len(self))] if still else None
        self._take(local)

    def __len__(self) -> int:
        """Return the number of timesteps."""
        return self.refinement.base.batch[0]

    def _vertices_of(self, row: int) -> Tensor:
        params = self.refinement.params(row)
        return self.deformable.vertices(params, self.deformable.expression(params, self._tokens_of(row)))[0]

    def _tokens_of(self, row: int) -> Tensor | None:
        return None if self.tokens is None else self.tokens[row]

    def _take(self, local: LocalGaussians) -> None:
        """Make these Gaussians the ones that are learned, with a new optimiser."""
        self.local = replace(local, **{n: v.detach().clone().requires_grad_() for n, v in local.parameters.items()})
        self.adam = torch.optim.Adam(self._groups(), eps=1e-15, fused=True)
        self.grad2d = Grad2d.zeros(len(local), self.config.device)

    def _groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: Gaussians, networks, and the head parameters with a schedule of their own."""
        config = self.config
        rates = {
            "means": config.means_lr, "quats": config.quats_lr, "log_scales": config.log_scales_lr,
            "opacity_logits": config.opacity_lr, "color_logits": config.color_lr,
            "features": config.dynamics.feature_lr if config.dynamics else 0.0, "harmonics": config.harmonics_lr,
        }  # fmt: skip
        groups = [{"params": [v], "peak": rates[n], "name": n} for n, v in self.local.parameters.items()]
        for name, network in self.deformable.networks().items():
            groups.append({"params": list(network.parameters()), "peak": network.config.lr, "name": name})
        refined = self.refinement.groups(config.refine) if config.refine else []
        return [{"lr": 0.0, "refine": False, **g} for g in groups] + [{"refine": True, **g} for g in refined]

    def pose(self, row: int) -> Posing:
        """Return the Gaussians posed at one timestep, a row of the fitted sequence."""
        vertices = self.posed[row] if self.posed else None
        local = self.local
        if local.harmonics is not None:
            local = replace(local, harmonics=local.harmonics[:, : (self.degree + 1) ** 2 - 1])
        return self.deformable.pose(local, self.refinement.params(row), self._tokens_of(row), vertices)

    def render(self, row: int, camera, background: float | Tensor = 0.5) -> AvatarFrame:
        """Render one timestep, a row of the fitted sequence."""
        posing = self.pose(row)
        return render_splats(posing.gaussians, posing.colors, camera, background, posing.shading)

    def step(self, iteration: int, seed: int) -> tuple[AvatarFrame, Target]:
        """Take one step on one training frame; returns the rendering and its target.

        A pure function of the state, the iteration and the seed.
        """
        config, frames = self.config, self.frames
        self._set_rates(iteration / config.iterations)
        epoch, place = divmod(iteration, len(frames.train))
        order = torch.randperm(len(frames.train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        # A background that changes cannot be painted on splats.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        background = torch.rand(3, generator=generator).to(config.device)
        index = frames.train[int(order[place])]
        halved = iteration < config.coarse * config.iterations and frames.camera(index).width > COARSE_PX
        target = frames.target(index, background, halved)
        self.degree = min(config.harmonics, iteration // config.harmonics_every)
        posing = self.pose(target.row)
        means = posing.gaussians.means
        if config.densify:
            means.retain_grad()
        frame = render_splats(posing.gaussians, posing.colors, target.camera, background, posing.shading)
        loss = image_loss(frame, target.image, target.mask, target.normal, target.box, config.loss)
        loss = loss + binding_loss(self.local, self.rest_scale, self.tolerance, config.loss) + self._penalties(posing)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        if config.densify and means.grad is not None:
            self.grad2d = self.grad2d.plus(means.detach(), means.grad, target.camera)
        self.adam.step()
        self._rearrange(iteration, generator)
        return frame, target

    def _set_rates(self, progress: float) -> None:
        refine = self.config.refine
        for group in self.adam.param_groups:
            peak = group["peak"]
            group["lr"] = refine.rate(peak, progress) if refine and group["refine"] else peak * LAST_RATE**progress

    def _penalties(self, posing: Posing) -> Tensor:
        total = torch.zeros((), device=self.config.device)
        if self.deformable.deformation is not None and posing.displacement is not None:
            total = total + self.deformable.deformation.penalty(posing.displacement)
        if self.deformable.dynamics is not None and posing.residuals is not None:
            total = total + self.deformable.dynamics.penalty(posing.residuals)
        return total

    def _rearrange(self, iteration: int, generator: torch.Generator) -> None:
        """Densify and reset opacities where the schedule says so; Adam's memory follows its Gaussians."""
        config = self.config.densify
        if config is None:
            return
        if config.due(iteration, self.config.iterations):
            done = densify(self.local, self.grad2d.mean, self.rest_scale, config, generator)
            kept = {n: self.adam.state.get(v, {}) for n, v in self.local.parameters.items()}
            others = {
                p: s for p, s in self.adam.state.items() if all(p is not v for v in self.local.parameters.values())
            }
            self._take(done.local)
            self.adam.state.update(others)
            for name, leaf in self.local.parameters.items():
                self.adam.state[leaf] = _inherited(kept[name], done.parent, done.fresh)
        if config.reset_due(iteration, self.config.iterations):
            leaf = self.local.opacity_logits
            leaf.data = reset_opacity(leaf.data, config)
            # Momentum would carry opacities back to where they were.
            for value in (v for k, v in self.adam.state[leaf].items() if k != "step"):
                value.zero_()

    @torch.no_grad()
    def score(self, indices: list[int]) -> dict[str, float | None]:
        """Return the mean PSNR [dB] and normal error [deg] inside the foreground; None where there is nothing."""
        scores = []
        for i in indices:
            target = self.frames.target(i)
            scores.append(compare(self.render(target.row, target.camera), target))
        degrees = [s.normal_deg for s in scores if s.normal_deg is not None]
        return {"psnr_fg": _mean([s.psnr_fg for s in scores]), "normal_deg": _mean(degrees)}

    def avatar(self, fps: float) -> Avatar:
        """Return what was fitted, detached and on the CPU."""
        sequence = self.refinement.sequence()
        camera = self.frames.camera(frontal(self.frames, self.deformable.head, sequence))
        plain = not self.deformable.surface.remeshed and not self.deformable.networks()
        described = self.deformable.described()
        tensors = {k: v.detach().cpu() for k, v in self.deformable.tensors().items()}
        head = self.deformable.head.to("cpu")
        return Avatar(
            head, replace(self.local, **{n: v.detach() for n, v in self.local.parameters.items()}).to("cpu"),
            self.refinement.shape.detach().cpu(), sequence.to("cpu"), camera.to("cpu"), fps,
            None if plain else DeformableSurface.restored(head, described, tensors),
            None if self.tokens is None or plain else self.tokens.cpu(),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the next step depends on, by name, for a checkpoint."""
        leaves = {f"{g['name']}.{i}": p for g in self.adam.param_groups for i, p in enumerate(g["params"])}
        state = {"face_index": self.local.face_index, "grad2d": self.grad2d.total, "seen": self.grad2d.seen}
        return {**leaves, **state, **optimiser_tensors(self.adam)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state that `tensors` returned.

        Raises:
            UserError: they are another fit's.
        """
        device = self.config.device
        try:
            gaussians = {n: tensors[f"{n}.0"].to(device) for n in self.local.parameters}
            self._take(LocalGaussians(face_index=tensors["face_index"].to(device), **gaussians))
            for group in self.adam.param_groups:
                for i, leaf in enumerate(group["params"]):
                    leaf.data.copy_(tensors[f"{group['name']}.{i}"])
            restore_optimiser(self.adam, tensors)
            self.grad2d = Grad2d(tensors["grad2d"].to(device), tensors["seen"].to(device))
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint is another fit's ({error}): remove its folder to start over") from None


@torch.no_grad()
def compare(frame: AvatarFrame, target: Target) -> Score:
    """Return the errors of a frame that was rendered on the target's background."""
    inside = target.mask[0] > 0.5
    error = (frame.rgb.clamp(0, 1) - target.image).square()[:, inside].mean()
    degrees = None
    if target.clip_normal is not None:
        ours = torch.nn.functional.normalize(frame.normal, dim=0)
        degrees = float((ours * target.clip_normal).sum(0)[inside].clamp(-1, 1).acos().rad2deg().mean())
    return Score(-10 * math.log10(max(float(error), 1e-10)), degrees)


def frontal(frames: FitFrames, head: Head, sequence: HeadParams) -> int:
    """Return the frame whose camera looks most squarely at the face."""

    def score(index: int) -> float:
        T = head.pose(sequence[frames.row(index)]).T_world_joint[SKULL_JOINT].cpu()
        face = T[:3, :3] @ torch.tensor([0.0, 0.0, 1.0])
        centre = T[:3, :3] @ head.template.mean(0).cpu() + T[:3, 3]
        return float(torch.nn.functional.normalize(frames.camera(index).position - centre, dim=0) @ face)

    return max(range(len(frames)), key=score)


def _inherited(state: dict[str, Any], parent: Tensor, fresh: Tensor) -> dict[str, Any]:
    """Reorder Adam's state of a row per Gaussian; what is fresh has no past."""

    def rows(value: Tensor) -> Tensor:
        out = value[parent]
        out[fresh] = 0
        return out

    return {k: v if k == "step" else rows(v) for k, v in state.items()}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
