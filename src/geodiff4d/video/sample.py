"""Sampling: reference-noised start, classifier-free guidance on both domains, any of three solvers (S-A.1)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.video.attention import ReferenceKV
from geodiff4d.video.diffusion import SamplerName, make_sampler
from geodiff4d.video.model import Conditions, VideoModel
from geodiff4d.video.windows import plan_windows


@dataclass(frozen=True)
class SampleConfig:
    """How to sample; defaults are the paper's (Sec. 4.2, S-A.1)."""

    steps: int = 25
    guidance: float = 2.5
    """Scale on the expression; 1 runs a single branch."""
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
    """Frames denoised together by a model without temporal modules: bounds the memory, not the result."""
    window: int = 16
    """Frames that temporal modules see at once, as in training (Sec. 4.1)."""
    overlap: int = 4
    """Frames that neighbouring windows share; their predictions are averaged."""
    detail: float = 0.0
    """How far a frame may be from its condition and still get back the detail that the codec lost, as a mean absolute
    difference in [0, 1]; 0 leaves frames as decoded. Needs a warp-conditioned model."""
    autocast: bool = True
    """bf16 where the machine has it."""


def autocast(device: torch.device, enabled: bool):
    """bf16 autocast if asked for and supported natively, else nothing."""
    if not enabled:
        return nullcontext()
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if native else nullcontext()


@torch.no_grad()
def sample(
    model: VideoModel,
    conditions: Conditions,
    latents: Float[Tensor, "1 t f"],
    reference: list[ReferenceKV],
    start: Float[Tensor, "1 d c h w"] | None,
    config: SampleConfig,
    progress: Callable[[int], None] = lambda n: None,
    runs: Sequence[int] | None = None,
) -> Float[Tensor, "1 d c t h w"]:
    """Generate the latents of a clip.

    Args:
        latents: expression latents per frame.
        start: latents of the reference image and its normals, which the first noise is added to; None means zeros.
        progress: called with the number of frames finished.
        runs: lengths of the consecutive stretches of frames that belong together in time (the views of a clip); by
            default all of it. Temporal modules see windows inside them.
    """
    frames = latents.shape[1]
    if model.temporal:
        windows = plan_windows(runs or [frames], config.window, config.overlap)
    else:
        windows = plan_windows([frames], config.chunk)
    report = _Progress(frames, config.draws * config.steps * len(windows), progress)
    total = torch.zeros_like(conditions.base)
    for draw in range(config.draws):
        # One draw for the whole clip, so that windows do not change the noise.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + draw)
        like = conditions.base[:, :, :, :1] if config.still_noise else conditions.base
        noise = model.diffusion.noise_like(like, generator, config.shared_noise).expand_as(conditions.base)
        total += _denoise(model, conditions, latents, reference, start, config, noise, windows, report)
    return total / config.draws


class _Progress:
    """Turns finished windows into finished frames."""

    def __init__(self, frames: int, windows: int, tell: Callable[[int], None]):
        self.frames, self.windows, self.tell, self.done, self.told = frames, windows, tell, 0, 0

    def window(self) -> None:
        self.done += 1
        frames = self.frames * self.done // self.windows
        if frames > self.told:
            self.tell(frames - self.told)
            self.told = frames


def _denoise(
    model: VideoModel, conditions: Conditions, latents: Tensor, reference: list[ReferenceKV],
    start: Tensor | None, config: SampleConfig, noise: Tensor, windows: list[slice], report: _Progress,
) -> Tensor:  # fmt: skip
    """Run the solver over the whole clip; where windows overlap, their predictions are averaged in every step."""
    scheduler = make_sampler(config.sampler, model.config.diffusion, config.steps)
    clean = torch.zeros_like(conditions.base)
    if start is not None and config.start != "noise":
        clean = clean + (_blur(start) if config.start == "blurred" else start)[:, :, :, None]
    steps = scheduler.timesteps.to(clean.device)
    z = model.diffusion.add_noise(clean, noise, steps[:1])
    shared = torch.zeros(z.shape[3], device=z.device)
    for part in windows:
        shared[part] += 1
    with autocast(z.device, config.autocast):
        for t in steps:
            predicted = torch.zeros_like(z)
            for part in windows:
                here = Conditions(conditions.planes[:, :, part], conditions.base[:, :, :, part])
                predicted[:, :, :, part] += _guided(
                    model, z[:, :, :, part], t, here, latents[:, part], reference, config.guidance
                )
                report.window()
            z = scheduler.step(predicted / shared[:, None, None], t, z, return_dict=False)[0]
    return z


def _guided(
    model: VideoModel, z: Tensor, t: Tensor, conditions: Conditions, latents: Tensor, reference: list[ReferenceKV],
    guidance: float,
) -> Tensor:  # fmt: skip
    """Predict the clean latents, driven and undriven in one batch (S-A.1: guidance acts on both domains at once)."""
    if guidance == 1:
        return model.predict_clean(z, t[None], conditions, latents, reference).float()

    def twice(x: Tensor) -> Tensor:
        return x.expand(2, *x.shape[1:])

    both = Conditions(twice(conditions.planes), twice(conditions.base))
    kv = [(twice(k), twice(v)) for k, v in reference]
    out = model.predict_clean(twice(z), t.expand(2), both, torch.cat([latents, torch.zeros_like(latents)]), kv).float()
    driven, undriven = out.chunk(2)
    return undriven + guidance * (driven - undriven)


def _blur(z: Float[Tensor, "1 d c h w"], kernel: int = 9, sigma: float = 18.0) -> Float[Tensor, "1 d c h w"]:
    """X-NeMo's start: the reference latent through a Gaussian (facts A)."""
    x = torch.arange(kernel, dtype=z.dtype, device=z.device) - kernel // 2
    g = torch.exp(-0.5 * (x / sigma).square())
    g = (g / g.sum())[None, None]
    flat = z.flatten(0, 2)[:, None]
    pad = torch.nn.functional.pad(flat, (kernel // 2,) * 4, mode="replicate")
    blurred = torch.nn.functional.conv2d(torch.nn.functional.conv2d(pad, g[..., None]), g[:, :, None])
    return blurred[:, 0].unflatten(0, z.shape[:3])
