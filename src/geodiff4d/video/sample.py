"""Sampling: reference-noised start, classifier-free guidance on both domains, any of three solvers (S-A.1)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.precision import bf16_is_native
from geodiff4d.core.progress import Progress, advancing, silent
from geodiff4d.video.attention import ReferenceKV
from geodiff4d.video.diffusion import SamplerName, make_sampler
from geodiff4d.video.finish import Finish
from geodiff4d.video.memory import alone
from geodiff4d.video.model import Conditions, VideoModel
from geodiff4d.video.temporal import MAX_FRAMES
from geodiff4d.video.windows import plan_windows


@dataclass(frozen=True)
class SampleConfig:
    """How to sample; defaults are the paper's (Sec. 4.2, S-A.1)."""

    steps: int = 25
    guidance: float = 2.5
    """Scale on the expression; 1 runs a single branch."""
    guidance_from: float = 0.0
    guidance_until: float = 1.0
    """Guide only in this share of the steps, counted from the first (a shortcut: Kynkäänniemi et al. 2024)."""
    batched_cfg: bool = True
    """Run both guidance branches in one batch; off halves what a step needs of memory."""
    sampler: SamplerName = "ddim"
    start: Literal["reference", "blurred", "noise"] = "reference"
    """What the first noise is added to: the reference image and normals, a blurred copy (X-NeMo) or nothing."""
    shared_noise: bool = True
    """Whether both domains start from the same noise, as in training."""
    still_noise: bool = False
    """Whether all frames start from the same noise: steadier frames as long as no temporal module makes them so."""
    draws: int = 1
    """Average so many samples' latents. Only sensible with one or two steps, which estimate a mean anyway."""
    seed: int = 0
    chunk: int = 16
    """Frames denoised at once by a model without temporal modules: bounds the memory, not the result."""
    window: int = 16
    """Frames that temporal modules see at once, as in training (Sec. 4.1)."""
    overlap: int = 4
    """Frames that neighbouring windows share; their predictions are averaged."""
    finish: tuple[Finish, ...] = ()
    """What is done to decoded frames, in this order (ours; `video/finish.py`). Where a model has no guided decoder, a
    frame's mask is where its generated normals are at least half a unit long (`surface_mask`)."""
    autocast: bool = True
    """bf16 where the machine has it."""
    compiled: bool = False
    """Compile the denoiser's steps: a minute or more at the start, for long clips on CUDA."""
    offload: bool = False
    """Keep on the accelerator only what a stage needs (`video.memory`), and decode a frame at a time."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_from <= self.guidance_until <= 1:
            raise UserError(
                f"guidance acts in shares of the steps from 0 to 1: got {self.guidance_from} to {self.guidance_until}"
            )
        if not 0 <= self.overlap < self.window <= MAX_FRAMES:
            raise UserError(
                f"windows of {self.window} frames that share {self.overlap} do not work: expected a window of at most "
                f"{MAX_FRAMES} frames and a smaller overlap"
            )
        if self.chunk < 1 or self.draws < 1:
            raise UserError(f"chunk and draws must be 1 or more, got {self.chunk} and {self.draws}")

    def described(self) -> dict[str, Any]:
        """Return all fields as JSON holds them; finishing touches as they are written in Python."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"finish": [repr(x) for x in self.finish]}


def autocast(device: torch.device, enabled: bool, keep_weights: bool = True):
    """bf16 autocast if asked for and supported natively, else nothing; `keep_weights` holds on to weights in bf16."""
    if not enabled or not bf16_is_native(device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=keep_weights)


@dataclass(frozen=True)
class ClipInputs:
    """What a clip is denoised from."""

    conditions: Conditions
    latents: Float[Tensor, "b t f"]
    """Expression latents per frame."""
    reference: list[ReferenceKV]
    """What the reference network reads off the portrait."""
    start: Float[Tensor, "1 d c h w"] | None = None
    """Latents of the reference image and its normals, which the first noise is added to; None means zeros."""
    image_context: Float[Tensor, "b m x"] | None = None
    """What SD's text attention reads of the portrait (`VideoModel.image_context`)."""
    runs: Sequence[int] | None = None
    """Lengths of the consecutive stretches of frames that belong together in time (the views of a clip); by default all
    of it. Temporal modules see windows inside them."""

    def part(self, frames: slice) -> "ClipInputs":
        """Return a stretch of the frames."""
        planes, base = self.conditions.planes[:, :, frames], self.conditions.base[:, :, :, frames]
        return replace(self, conditions=Conditions(planes, base), latents=self.latents[:, frames])

    def half(self, dtype: torch.dtype) -> "ClipInputs":
        """Hold the reference's keys and values in a half type: they are read in every step."""
        return replace(self, reference=[(k.to(dtype), v.to(dtype)) for k, v in self.reference])

    def twice(self) -> "ClipInputs":
        """Return driven and undriven rows: only the expression is dropped (S-A.1)."""

        def both(x: Tensor) -> Tensor:
            return x.expand(2, *x.shape[1:])

        return replace(
            self,
            conditions=Conditions(both(self.conditions.planes), both(self.conditions.base)),
            latents=torch.cat([self.latents, torch.zeros_like(self.latents)]),
            reference=[(both(k), both(v)) for k, v in self.reference],
            image_context=None if self.image_context is None else both(self.image_context),
        )

    def undriven(self) -> "ClipInputs":
        """Return the same without any expression."""
        return replace(self, latents=torch.zeros_like(self.latents))


@torch.no_grad()
def sample(
    model: VideoModel, given: ClipInputs, config: SampleConfig, progress: Progress = silent
) -> Float[Tensor, "1 d c t h w"]:
    """Generate the latents of a clip. Equal seeds give equal clips.

    `progress` is shown the number of frames finished.

    Raises:
        UserError: there are no frames, or the views' lengths do not add up to them.
    """
    frames, runs, conditions = given.latents.shape[1], given.runs, given.conditions
    if not frames or (runs is not None and sum(runs) != frames):
        raise UserError(f"nothing to sample, or views of {list(runs or [])} frames that are not {frames} in all")
    if model.temporal:
        windows = plan_windows(runs or [frames], config.window, config.overlap)
    else:
        windows = plan_windows([frames], config.chunk)
    total = torch.zeros_like(conditions.base)
    if config.compiled:
        model.compile_steps()
    with advancing(progress, "generating", frames) as advance:
        report = _FinishedFrames(frames, config.draws * config.steps * len(windows), advance)
        for draw in range(config.draws):
            # One draw for the whole clip, so that windows do not change the noise.
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + draw)
            like = conditions.base[:, :, :, :1] if config.still_noise else conditions.base
            noise = model.diffusion.noise_like(like, generator, config.shared_noise).expand_as(conditions.base)
            with alone(model, "unet", offload=config.offload):
                total += _denoise(model, given, config, noise, windows, report)
    return total / config.draws


class _FinishedFrames:
    """Turns finished windows into finished frames, and tells their number to `advance`."""

    def __init__(self, frames: int, windows: int, advance: Callable[[int], None]):
        self.frames, self.windows, self.advance, self.done, self.told = frames, windows, advance, 0, 0

    def window(self) -> None:
        self.done += 1
        frames = self.frames * self.done // self.windows
        if frames > self.told:
            self.advance(frames - self.told)
            self.told = frames


def _denoise(
    model: VideoModel, given: ClipInputs, config: SampleConfig, noise: Tensor, windows: list[slice],
    report: _FinishedFrames,
) -> Tensor:  # fmt: skip
    """Run the solver over the whole clip; where windows overlap, their predictions are averaged in every step."""
    scheduler = make_sampler(config.sampler, model.config.diffusion, config.steps)
    clean, start = torch.zeros_like(noise), given.start
    if start is not None and config.start != "noise":
        clean = clean + (_blur(start) if config.start == "blurred" else start)[:, :, :, None]
    steps = scheduler.timesteps.to(clean.device)
    z = model.diffusion.add_noise(clean, noise, steps[:1])
    shared = torch.zeros(z.shape[3], device=z.device)
    for part in windows:
        shared[part] += 1
    with autocast(z.device, config.autocast and model.unet.dtype == torch.float32):
        if torch.is_autocast_enabled(z.device.type):
            given = given.half(torch.bfloat16)
        for i in range(len(steps)):
            guided = config.guidance != 1 and config.guidance_from <= i / len(steps) < config.guidance_until
            predicted = torch.zeros_like(z)
            for part in windows:
                predicted[:, :, :, part] += _guided(
                    model, z[:, :, :, part], steps[i], given.part(part), config.guidance if guided else 1.0,
                    config.batched_cfg,
                )  # fmt: skip
                report.window()
            # The solver is told the time on the host: a number fetched from the device would make every step wait.
            z = scheduler.step(predicted / shared[:, None, None], scheduler.timesteps[i], z, return_dict=False)[0]
    return z


def _guided(model: VideoModel, z: Tensor, t: Tensor, given: ClipInputs, guidance: float, batched: bool) -> Tensor:
    """Predict the clean latents by null + g·(driven - null), on both domains at once (S-A.1)."""
    if guidance == 1:
        return _predict(model, z, t, given)
    if batched:
        driven, undriven = _predict(model, z.expand(2, *z.shape[1:]), t, given.twice()).chunk(2)
    else:
        driven, undriven = _predict(model, z, t, given), _predict(model, z, t, given.undriven())
    return undriven + guidance * (driven - undriven)


def _predict(model: VideoModel, z: Tensor, t: Tensor, given: ClipInputs) -> Tensor:
    return model.predict_clean(
        z, t.expand(len(z)), given.conditions, given.latents, given.reference, image_context=given.image_context
    ).float()


def _blur(z: Float[Tensor, "1 d c h w"], kernel: int = 9, sigma: float = 18.0) -> Float[Tensor, "1 d c h w"]:
    """X-NeMo's start: the reference latent through a Gaussian (its kernel of 9, σ 18)."""
    x = torch.arange(kernel, dtype=z.dtype, device=z.device) - kernel // 2
    g = torch.exp(-0.5 * (x / sigma).square())
    g = (g / g.sum())[None, None]
    flat = z.flatten(0, 2)[:, None]
    pad = torch.nn.functional.pad(flat, (kernel // 2,) * 4, mode="replicate")
    blurred = torch.nn.functional.conv2d(torch.nn.functional.conv2d(pad, g[..., None]), g[:, :, None])
    return blurred[:, 0].unflatten(0, z.shape[:3])
