"""Fit an avatar to a clip: one frame a step, every Gaussian and every head parameter at once (Sec. 3.3, A.2)."""

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geodiff4d.avatar.binding import LocalGaussians, bind, face_frames
from geodiff4d.avatar.frames import Frames
from geodiff4d.avatar.losses import LossConfig, binding_loss, image_loss, position_tolerance
from geodiff4d.avatar.model import Avatar, AvatarFrame, render_splats
from geodiff4d.avatar.refine import RefineConfig, Refinement
from geodiff4d.avatar.start import start
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, fresh_folder, write_json
from geodiff4d.data.clip import Clip
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import Head, HeadParams

Track = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class FitConfig:
    """How an avatar is fitted."""

    iterations: int = 1200
    gaussians: int = 20_000
    """About; every face of the head gets at least one."""
    means_lr: float = 1e-2
    """In units of the face's size; decays to a twentieth, like all Gaussian rates."""
    quats_lr: float = 1e-2
    log_scales_lr: float = 1.5e-2
    opacity_lr: float = 4e-2
    color_lr: float = 2e-2
    loss: LossConfig = field(default_factory=LossConfig)
    refine: RefineConfig | None = field(default_factory=RefineConfig)
    """None trusts the clip's head parameters (`--ablate refine`)."""
    held_out_every: int = 8
    """One frame of this many is only scored; 0 trains on all."""
    checkpoint_every: int = 500
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.gaussians < 1:
            raise ValueError(f"iterations and gaussians must be positive, got {self.iterations} and {self.gaussians}")

    def ablated(self, switch: str) -> "FitConfig":
        """Switch a part off: refine or normals.

        Raises:
            UserError: an unknown part.
        """
        if switch == "refine":
            return replace(self, refine=None)
        if switch == "normals":
            return replace(self, loss=replace(self.loss, normals=0.0))
        raise UserError(f"--ablate {switch} is not known: expected refine or normals")


PRESETS: dict[str, tuple[str, FitConfig]] = {
    "debug": ("seconds: tests", FitConfig(iterations=20, gaussians=10_000, checkpoint_every=10)),
    "embedded": ("two minutes on two cores at 256 px", FitConfig()),
    "paper": (
        "100K steps on a GPU (Sec. 4.2, A.2)",
        FitConfig(
            iterations=100_000, gaussians=100_000, means_lr=5e-3, quats_lr=1e-3, log_scales_lr=5e-3, opacity_lr=2.5e-2,
            color_lr=2.5e-3, checkpoint_every=5000, device="cuda",
            refine=RefineConfig(expr=1e-4, pose=1e-5, translation=1e-5, shape=1e-5, warmup=0.2, plateau=0.8),
        ),
    ),
}  # fmt: skip


def fit(
    clip: Clip, out: Path | str, config: FitConfig | None = None, seed: int = 0, track: Track = lambda items, _: items
) -> dict:
    """Fit an avatar to `clip`, write it to `out` and return its metrics.

    The same call resumes from `OUT.checkpoint` after an interruption, to the same result.

    Raises:
        UserError: the clip lacks masks or parameters, or `out` holds something else.

    Example:
        >>> fit(Clip("runs/demo/clip"), "runs/demo/avatar")["held_out"]["psnr_fg"]  # doctest: +SKIP
    """
    config, out = config or FitConfig(), Path(out)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this preset needs a CUDA device and none was found: use --preset embedded")
    head = load_head(clip.head_name)
    frames = Frames(clip, head, config.held_out_every).to(config.device)
    tolerance = position_tolerance(head)
    local = start(frames.to("cpu"), head, config.gaussians, tolerance, seed).to(config.device)
    frames, head = frames.to(config.device), head.to(config.device)
    fitting = Fitting(head, local, frames.sequence.to(config.device), tolerance.to(config.device), config)

    checkpoint = out.with_name(out.name + ".checkpoint")
    # Loading the rasteriser's code is no part of the speed.
    first, begun = fitting.load(checkpoint / "state.safetensors", seed), time.perf_counter()
    for i in track(range(first, config.iterations), "fitting"):
        if i == first + 1:
            begun = time.perf_counter()
        fitting.step(frames, i, seed)
        if (i + 1) % config.checkpoint_every == 0 and i + 1 < config.iterations:
            fitting.save(checkpoint / "state.safetensors", i + 1, seed)
    seconds = time.perf_counter() - begun
    metrics = {
        "train": fitting.score(frames, frames.train[:: max(1, len(frames.train) // 16)]),
        "held_out": fitting.score(frames, frames.held_out),
        "iterations_per_second": max(config.iterations - first - 1, 1) / seconds,
        "gaussians": len(local),
        "seconds": seconds,
    }
    with fresh_folder(out) as folder:
        fitting.avatar(frames, clip.fps).save(folder)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "fit.json", {"clip": str(clip.folder), "seed": seed, "config": asdict(config)})
    shutil.rmtree(checkpoint, ignore_errors=True)
    return metrics


class Fitting:
    """The state of a fit: Gaussians, residuals and their optimiser."""

    def __init__(
        self,
        head: Head,
        local: LocalGaussians,
        sequence: HeadParams,
        tolerance: Float[Tensor, " faces"],
        config: FitConfig,
    ):
        self.head, self.config, self.tolerance = head, config, tolerance
        self.local = replace(local, **{n: v.clone().requires_grad_() for n, v in local.parameters.items()})
        self.refinement = Refinement(sequence)
        rates = {
            "means": config.means_lr, "quats": config.quats_lr, "log_scales": config.log_scales_lr,
            "opacity_logits": config.opacity_lr, "color_logits": config.color_lr,
        }  # fmt: skip
        gaussian_groups = [{"params": [v], "peak": rates[n], "lr": 0.0} for n, v in self.local.parameters.items()]
        self.gaussian_groups = len(gaussian_groups)
        refine_groups = self.refinement.groups(config.refine) if config.refine else []
        self.adam = torch.optim.Adam(gaussian_groups + refine_groups, eps=1e-15, fused=True)
        with torch.no_grad():
            self.rest_scale = self._frames_of(0).scale
            self.posed = None if config.refine else [self._frames_of(i) for i in range(sequence.batch[0])]

    def _frames_of(self, row: int):
        mesh = self.head.pose(self.refinement.params(row))
        return face_frames(mesh.vertices, mesh.faces)

    def render(self, row: int, camera, background: float | Tensor = 0.5) -> AvatarFrame:
        """Render a timestep of the fitted sequence."""
        splats = bind(self.local, self.posed[row] if self.posed else self._frames_of(row))
        return render_splats(splats, self.local.color_logits.sigmoid(), camera, background)

    def step(self, frames: Frames, iteration: int, seed: int) -> float:
        """Take one optimiser step on one frame; a pure function of the state, the iteration and the seed."""
        progress = iteration / self.config.iterations
        for i, group in enumerate(self.adam.param_groups):
            refine = self.config.refine if i >= self.gaussian_groups else None
            group["lr"] = group["peak"] * (refine.schedule(progress) if refine else 0.05**progress)
        epoch, place = divmod(iteration, len(frames.train))
        order = torch.randperm(len(frames.train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        # A background that changes cannot be painted on splats.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        background = torch.rand(3, generator=generator).to(self.config.device)
        target = frames.target(frames.train[int(order[place])], background)
        frame = self.render(target.row, target.camera, background)
        loss = image_loss(frame, target.image, target.mask, target.normal, target.box, self.config.loss)
        loss = loss + binding_loss(self.local, self.rest_scale, self.tolerance, self.config.loss)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        return float(loss.detach())

    @torch.no_grad()
    def score(self, frames: Frames, indices: list[int]) -> dict[str, float | None]:
        """Return the mean PSNR [dB] and normal error [deg] inside the foreground; None where there is nothing."""
        psnr, degrees = [], []
        for i in indices:
            target = frames.target(i)
            frame = self.render(target.row, target.camera)
            inside = target.mask[0] > 0.5
            error = (frame.rgb.clamp(0, 1) - target.image).square()[:, inside].mean()
            psnr.append(-10 * math.log10(max(float(error), 1e-10)))
            if target.normal is not None:
                ours = torch.nn.functional.normalize(frame.normal, dim=0)
                cosine = (ours * target.normal).sum(0)[inside].clamp(-1, 1)
                degrees.append(float(cosine.acos().rad2deg().mean()))
        return {"psnr_fg": _mean(psnr), "normal_deg": _mean(degrees)}

    def avatar(self, frames: Frames, fps: float) -> Avatar:
        """Return what was fitted, detached and on the CPU."""
        local = replace(self.local, **{n: v.detach() for n, v in self.local.parameters.items()})
        sequence = self.refinement.sequence()
        camera = frames.camera(frontal(frames, self.head, sequence))
        shape = self.refinement.shape.detach()
        return Avatar(self.head, local, shape, sequence, camera, fps).to("cpu")

    def save(self, path: Path, iteration: int, seed: int) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        with fresh_file(path) as temporary:
            save_file(self._tensors(), temporary, {"iteration": str(iteration), "run": self._run(seed)})

    def load(self, path: Path, seed: int) -> int:
        """Continue from a checkpoint of the same run, if there is one; returns the iteration to go on with."""
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt", device=self.config.device) as file:
                if file.metadata()["run"] != self._run(seed):
                    return 0
                for i, group in enumerate(self.adam.param_groups):
                    leaf = group["params"][0]
                    leaf.data.copy_(file.get_tensor(f"{i}.value"))
                    state = {k: file.get_tensor(f"{i}.{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
                    self.adam.state[leaf] = state
                return int(file.metadata()["iteration"])
        except (SafetensorError, RuntimeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}): delete {path.parent} and start again") from None

    def _run(self, seed: int) -> str:
        """What a checkpoint must share with the run that resumes it."""
        return f"{self.config} seed={seed} gaussians={len(self.local)} timesteps={self.refinement.base.batch[0]}"

    def _tensors(self) -> dict[str, Tensor]:
        out = {}
        for i, group in enumerate(self.adam.param_groups):
            leaf = group["params"][0]
            out[f"{i}.value"] = leaf.detach().contiguous()
            out |= {f"{i}.{k}": v.contiguous() for k, v in self.adam.state[leaf].items()}
        return out


def frontal(frames: Frames, head: Head, sequence: HeadParams) -> int:
    """Return the frame whose camera looks most squarely at the face."""

    def score(index: int) -> float:
        T = head.pose(sequence[frames.row(index)]).T_world_joint[1].cpu()
        face = T[:3, :3] @ torch.tensor([0.0, 0.0, 1.0])
        centre = T[:3, :3] @ head.template.mean(0).cpu() + T[:3, 3]
        return float(torch.nn.functional.normalize(frames.camera(index).position - centre, dim=0) @ face)

    return max(range(len(frames)), key=score)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
