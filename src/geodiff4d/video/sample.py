"""Sampling: reference-noised start, classifier-free guidance on both domains, any of three solvers (S-A.1)."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.video.attention import ReferenceKV
from geodiff4d.video.diffusion import SamplerName, make_sampler
from geodiff4d.video.model import Conditions, VideoModel


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
    """Frames denoised together: bounds the memory, not the result."""
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
) -> Float[Tensor, "1 d c t h w"]:
    """Generate the latents of a clip, chunk by chunk.

    Args:
        latents: expression latents per frame.
        start: latents of the reference image and its normals, which the first noise is added to; None means zeros.
        progress: called with the number of frames finished.
    """
    frames = latents.shape[1]
    total = torch.zeros_like(conditions.base)
    for draw in range(config.draws):
        # One draw for the whole clip, so that chunks do not change the result.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + draw)
        like = conditions.base[:, :, :, :1] if config.still_noise else conditions.base
        noise = model.diffusion.noise_like(like, generator, config.shared_noise).expand_as(conditions.base)
        for first in range(0, frames, config.chunk):
            part = slice(first, min(first + config.chunk, frames))
            here = Conditions(conditions.planes[:, :, part], conditions.base[:, :, :, part])
            z = _sample_chunk(model, here, latents[:, part], reference, start, config, noise[:, :, :, part])
            total[:, :, :, part] += z / config.draws
            if draw == config.draws - 1:
                progress(part.stop - part.start)
    return total


def _sample_chunk(
    model: VideoModel, conditions: Conditions, latents: Tensor, reference: list[ReferenceKV],
    start: Tensor | None, config: SampleConfig, noise: Tensor,
) -> Tensor:  # fmt: skip
    scheduler = make_sampler(config.sampler, model.config.diffusion, config.steps)
    clean = torch.zeros_like(conditions.base)
    if start is not None and config.start != "noise":
        clean = clean + (_blur(start) if config.start == "blurred" else start)[:, :, :, None]
    steps = scheduler.timesteps.to(clean.device)
    z = model.diffusion.add_noise(clean, noise, steps[:1])
    null = torch.zeros_like(latents)
    with autocast(z.device, config.autocast):
        for t in steps:
            predicted = model.predict_clean(z, t[None], conditions, latents, reference)
            if config.guidance != 1:
                without = model.predict_clean(z, t[None], conditions, null, reference)
                predicted = without + config.guidance * (predicted - without)
            z = scheduler.step(predicted.float(), t, z, return_dict=False)[0]
    return z


def _blur(z: Float[Tensor, "1 d c h w"], kernel: int = 9, sigma: float = 18.0) -> Float[Tensor, "1 d c h w"]:
    """X-NeMo's start: the reference latent through a Gaussian (facts A)."""
    x = torch.arange(kernel, dtype=z.dtype, device=z.device) - kernel // 2
    g = torch.exp(-0.5 * (x / sigma).square())
    g = (g / g.sum())[None, None]
    flat = z.flatten(0, 2)[:, None]
    pad = torch.nn.functional.pad(flat, (kernel // 2,) * 4, mode="replicate")
    blurred = torch.nn.functional.conv2d(torch.nn.functional.conv2d(pad, g[..., None]), g[:, :, None])
    return blurred[:, 0].unflatten(0, z.shape[:3])
