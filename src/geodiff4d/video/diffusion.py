"""The diffusion process: schedule, what the network predicts, the training target, the sampler's steps.

Ours / theirs: the paper predicts noise (SD's convention, `prediction="epsilon"`). The embedded preset predicts the
clean latent *around a base* the conditions already give: the warped portrait for RGB and the pose map for normals,
`z = base + residual` with the residual preconditioned as in Karras et al. 2022 (EDM, Table 1). At high noise the
prediction starts from the base instead of from nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.errors import UserError


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule and parametrisation."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Literal["epsilon", "v", "residual"] = "epsilon"
    residual_std: tuple[float, float] = (0.5, 0.4)
    """Standard deviation of `z - base` per domain; only for "residual"."""
    zero_terminal: bool = False
    """End the schedule in plain noise (Lin et al. 2023, Algorithm 1). Stable Diffusion's leaves 7 % of the signal in
    its last step: training sees the target's brightness there, sampling does not. Impossible with "epsilon"."""


class Diffusion:
    """Scaled-linear schedule of Stable Diffusion and the conversions between predictions.

    `z_t = √ᾱ z + √(1-ᾱ) ε`, with the same ε in both domains (Sec. 3.2).
    """

    def __init__(self, config: DiffusionConfig):
        if config.zero_terminal and config.prediction == "epsilon":
            raise ValueError("zero_terminal needs prediction v or residual: plain noise does not tell the clean latent")
        self.config = config
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps, dtype=torch.float64) ** 2
        signal = torch.cumprod(1 - betas, 0).sqrt()
        if config.zero_terminal:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        self.alphas_cumprod = signal.square().float()
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Schedule and deviations on a device, copied once: a copy in every step would make the host wait for it."""
        if device not in self._copies:
            std = torch.tensor(self.config.residual_std, device=device)
            self._copies[device] = (self.alphas_cumprod.to(device), std)
        return self._copies[device]

    def alpha(self, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1 1 1"]:
        """ᾱ at each batch row's timestep, shaped to multiply latents."""
        return self._on(t.device)[0][t][:, None, None, None, None, None]

    def noise_like(
        self, z: Float[Tensor, "b d c t h w"], generator: torch.Generator | None = None, shared: bool = True
    ) -> Tensor:
        """Draw noise, identical in both domains unless `shared` is off."""
        b, d, *rest = z.shape
        noise = torch.randn(b, 1 if shared else d, *rest, generator=generator, dtype=torch.float32).to(z)
        return noise.expand(-1, d, *(-1,) * len(rest)) if shared else noise

    def add_noise(
        self, z: Float[Tensor, "b d c t h w"], noise: Float[Tensor, "b d c t h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b d c t h w"]:
        a = self.alpha(t)
        return a.sqrt() * z + (1 - a).sqrt() * noise

    def scale_input(
        self, z_t: Float[Tensor, "b d c t h w"], base: Float[Tensor, "b d c t h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b d c t h w"]:
        """What the network sees of the noisy latent; for "residual", its noisy residual at unit variance."""
        if self.config.prediction != "residual":
            return z_t
        a = self.alpha(t)
        s = self._std(z_t)
        return (z_t - a.sqrt() * base) / (a * s.square() + 1 - a).sqrt()

    def to_clean(
        self, out: Float[Tensor, "b d c t h w"], z_t: Float[Tensor, "b d c t h w"], base: Float[Tensor, "b d c t h w"],
        t: Int[Tensor, " b"],
    ) -> Float[Tensor, "b d c t h w"]:  # fmt: skip
        """Turn the network's output into the predicted clean latent."""
        a = self.alpha(t)
        if self.config.prediction == "epsilon":
            return (z_t - (1 - a).sqrt() * out) / a.sqrt()
        if self.config.prediction == "v":
            return a.sqrt() * z_t - (1 - a).sqrt() * out
        s2 = self._std(z_t).square()
        total = a * s2 + 1 - a
        skip = a.sqrt() * s2 / total
        gain = ((1 - a) * s2 / total).sqrt()
        return base + skip * (z_t - a.sqrt() * base) + gain * out

    def loss_weight(self, t: Int[Tensor, " b"], limit: float = 5.0) -> Float[Tensor, "b 1 1 1 1 1"]:
        """Weight of the clean-latent error at a timestep.

        "epsilon": SNR, so that the loss equals the noise error; "v": SNR + 1; "residual": 1/(1-ᾱ) up to `limit`,
        EDM's weighting without its pole.
        """
        a = self.alpha(t)
        if self.config.prediction == "epsilon":
            return a / (1 - a)
        return 1 / (1 - a) if self.config.prediction == "v" else (1 / (1 - a)).clamp(max=limit)

    def _std(self, like: Tensor) -> Tensor:
        std = self._on(like.device)[1].to(like.dtype)
        return std[None, : like.shape[1], None, None, None, None]


SamplerName = Literal["ddim", "unipc", "dpm++"]


def make_sampler(name: SamplerName, config: DiffusionConfig, steps: int) -> Any:
    """Return a diffusers scheduler that is fed the predicted clean latent.

    DDIM is the paper's (Sec. 4.2, η = 0, trailing spacing so that it starts at the last timestep).

    Raises:
        UserError: unknown sampler, or a number of steps that the schedule does not have.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    if not 1 <= steps <= config.steps:
        raise UserError(f"--steps must be 1 to {config.steps}, got {steps}")
    shared: dict[str, Any] = dict(
        num_train_timesteps=config.steps, beta_start=config.beta_start, beta_end=config.beta_end,
        beta_schedule="scaled_linear", prediction_type="sample", timestep_spacing="trailing",
        rescale_betas_zero_snr=config.zero_terminal,
    )  # fmt: skip
    if name == "ddim":
        scheduler = DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=True)
    elif name == "unipc":
        scheduler = UniPCMultistepScheduler(**shared, solver_order=2)
    elif name == "dpm++":
        scheduler = DPMSolverMultistepScheduler(**shared, solver_order=2)
    else:
        raise UserError(f"unknown sampler {name!r}: expected ddim, unipc or dpm++")
    scheduler.set_timesteps(steps)
    return scheduler
