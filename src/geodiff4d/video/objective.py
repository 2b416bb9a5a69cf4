"""The denoising loss (Sec. 3.1), what it starts from, and how it is measured on held-out people."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from geodiff4d.video.attention import MultiHead
from geodiff4d.video.batches import Batch, Batches
from geodiff4d.video.model import VideoModel
from geodiff4d.video.sample import autocast
from geodiff4d.video.unet import Resnet


@dataclass(frozen=True)
class Draws:
    """What chance decides about a batch, sample by sample."""

    t: Int[Tensor, " b"]
    noise: Float[Tensor, "b d c t h w"]
    drop_expression: Bool[Tensor, "b t"]
    keep_warp: Bool[Tensor, " b"]
    from_portrait: Bool[Tensor, " b"] | None = None
    """Rows whose noise lies on the portrait, as a sampler starts, and not on the target."""

    def to(self, device: torch.device) -> "Draws":
        started = None if self.from_portrait is None else self.from_portrait.to(device)
        known = (x.to(device) for x in (self.t, self.noise, self.drop_expression, self.keep_warp))
        return Draws(*known, from_portrait=started)


class Objective(nn.Module):
    """The denoising loss (Sec. 3.1): what is distributed and differentiated.

    `temporal_loss` adds the error of what changes from frame to frame, so many times (ours; the paper has 0).
    """

    def __init__(self, model: VideoModel, temporal_loss: float = 0.0):
        super().__init__()
        self.temporal_loss = temporal_loss
        self.unet, self.reference, self.expression = model.unet, model.reference, model.expression
        self._model = [model]  # A list hides it: its parameters are registered above already.

    def forward(self, batch: Batch, draws: Draws) -> Float[Tensor, " d"]:
        """Return the weighted error of the predicted clean latents, per domain.

        Channels count as they show in pixels: in a principal-component code most channels hold detail that no one can
        predict, and would drown what moves a mouth. Frames that only pad a clip weigh nothing.
        """
        model = self._model[0]
        d = len(model.config.domains)
        b = len(batch.crops)
        # Conditions are encoded in full precision, as when sampling.
        with torch.no_grad(), torch.autocast(batch.target.device.type, enabled=False):
            conditions = model.join_conditions(batch.pose, batch.warp, batch.visibility, draws.keep_warp)
        latent = rearrange(model.expression(batch.crops.flatten(0, 1)), "(b t) f -> b t f", b=b)
        latent = model.expression.drop(latent, draws.drop_expression)
        kv = model.reference_kv(batch.reference, batch.reference_pose)
        z = batch.target[:, :d]
        under = z
        if draws.from_portrait is not None:
            chosen = draws.from_portrait[:, None, None, None, None, None]
            under = torch.where(chosen, batch.start[:, :d, :, None], z)
        z_t = model.diffusion.add_noise(under, draws.noise, draws.t)
        clean = model.predict_clean(z_t, draws.t, conditions, latent, kv, batch.valid)
        seen = model.codec.visibility[None, None, :, None, None, None]
        scale = seen * model.diffusion.loss_weight(draws.t)
        weight = batch.weight[:, :d]
        error = ((clean - z).square() * weight * scale).mean((0, 2, 3, 4, 5))
        if self.temporal_loss == 0 or z.shape[3] == 1:
            return error
        change = (clean - z).diff(dim=3)
        between = torch.minimum(weight[:, :, :, 1:], weight[:, :, :, :-1])
        return error + self.temporal_loss * (change.square() * between * scale).mean((0, 2, 3, 4, 5))


def initialise(model: VideoModel) -> None:
    """Start a small model as "the base, unchanged": last convolutions of every residual branch at zero."""
    for network in (model.unet, model.reference):
        for module in network.modules():
            if isinstance(module, Resnet):
                nn.init.zeros_(module.conv2.weight)
            if isinstance(module, MultiHead):
                nn.init.zeros_(module.out.weight)
    for parameter in model.unet.conv_out.parameters():
        nn.init.zeros_(parameter)


def trained_state(model: VideoModel) -> dict[str, Tensor]:
    """Return the weights of the trained networks by name; the codec's stay out."""
    return {f"{name}.{k}": v for name, network in model.networks().items() for k, v in network.state_dict().items()}


@contextmanager
def averaged(model: VideoModel, ema: dict[str, Tensor]) -> Iterator[VideoModel]:
    """Lend the averaged weights to the model, for measuring and looking; then give its own back."""
    current = {k: v.detach().clone() for k, v in trained_state(model).items()}
    model.load_state_dict(ema, strict=False)
    model.eval()
    try:
        yield model
    finally:
        model.load_state_dict(current, strict=False)
        model.train()


@torch.no_grad()
def validate(model: VideoModel, val: Batches, mixed: bool) -> dict[str, float]:
    """Measure a model's clean-latent error on held-out subjects, with and without expression."""
    out: dict[str, float] = {}
    n = 2 if model.temporal else 4  # Clips are many frames each.
    objective = Objective(model)
    for i in range(n):
        batch = val[i].to(model.device)
        b, frames = batch.crops.shape[:2]
        noise = model.diffusion.noise_like(
            batch.target[:, : len(model.config.domains)], torch.Generator().manual_seed(i)
        )
        for t in (300, 700, 999):
            for name, dropped in (("", False), ("_null", True)):
                flags = torch.full((b, frames), dropped, device=model.device)
                keep = torch.ones(b, dtype=torch.bool, device=model.device)
                with autocast(model.device, mixed):
                    steps = torch.full((b,), t, device=model.device)
                    error = objective(batch, Draws(steps, noise, flags, keep))
                    error = error / model.diffusion.loss_weight(steps).mean()
                for d, e in zip(("rgb", "normal"), error.tolist(), strict=False):
                    key = f"val_{d}_{t}{name}"
                    out[key] = round(out.get(key, 0.0) + e / n, 5)
    return out


def channels_last(module: nn.Module) -> None:
    """Lay convolution weights out as CPUs like them."""
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch's overloads omit it
