"""Training: the codec, then the image model (stage 1 of Sec. 4.1); one process or many, CPU or CUDA.

The loops read top to bottom. Every random draw is a function of (seed, step, process), so that a resumed run equals an
uninterrupted one; weights are averaged (EMA), and the average is what is saved for use.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from geodiff4d.core.errors import UserError
from geodiff4d.core.rundir import RunFolder, optimiser_tensors, restore_optimiser
from geodiff4d.data.pairs import PairConfig
from geodiff4d.data.store import Store
from geodiff4d.video.attention import MultiHead
from geodiff4d.video.batches import UNIFORM, Batch, Batches, WeightConfig
from geodiff4d.video.mixed import MixedBatches
from geodiff4d.video.model import ConditionImages, VideoModel, VideoModelConfig
from geodiff4d.video.sample import autocast
from geodiff4d.video.unet import Resnet
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig, StableCodec
from geodiff4d.video.warm_start import fit_motion_readout, warm_start

Progress = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class CodecTraining:
    """How the embedded codec is trained."""

    codec: PatchCodecConfig = PatchCodecConfig()
    steps: int = 1500
    batch: int = 12
    lr: float = 1.5e-3
    basis_images: int = 384
    latent_noise: float = 0.05
    """Noise added to latents, so that the decoder forgives what a sampler leaves."""
    seed: int = 0


@dataclass(frozen=True)
class ImageTraining:
    """How the image model is trained (Sec. 4.1: AdamW 1e-5, 80K steps of 32; the embedded preset differs)."""

    steps: int = 80_000
    pairs: PairConfig = field(default_factory=PairConfig)
    lr: float = 1e-5
    expression_lr: float = 1.0
    """Factor on the encoder's rate."""
    warmup: int = 100
    hold: float = 0.4
    """Share of the steps before the rate decays along a cosine."""
    weight_decay: float = 1e-2
    clip: float = 1.0
    accumulate: int = 1
    """Batches whose gradients are averaged for one step; each has `pairs.references × pairs.targets` targets."""
    ema: float = 0.999
    drop_expression: float = 0.1
    """S-A.1."""
    drop_warp: float = 0.15
    weights: WeightConfig = UNIFORM
    """What a latent cell counts, by what it shows; the paper's loss is uniform."""
    timestep_power: float = 1.0
    """t = 1000 u^power: 1 is uniform, below 1 favours high noise."""
    parts: Literal["all", "temporal"] = "all"
    """What is trained: everything (stage 1), or temporal modules alone (stage 2, as in AnimateAnyone's recipe)."""
    warm_start: int = 0
    """Steps of regressing the known motion before denoising starts (`video/warm_start.py`; the paper has none)."""
    autocast: bool = True
    log_every: int = 20
    validate_every: int = 250
    save_every: int = 250
    seed: int = 0


@dataclass(frozen=True)
class _Run:
    """What a checkpoint depends on: it is resumed only by the same."""

    training: ImageTraining
    model: VideoModelConfig


def train_codec(
    run: Path, store: Store, config: CodecTraining, progress: Progress = lambda *a: None, val: Store | None = None
) -> PatchCodec:
    """Fit the basis, then train the decoder on pictures, normals and pose maps; writes `run/vae`."""
    folder = RunFolder(run, config)
    torch.manual_seed(config.seed)
    codec = PatchCodec(config.codec)
    rng = np.random.default_rng(config.seed)
    codec.fit_basis(_images(store, rng, config.basis_images))
    _channels_last(codec)
    optimiser = torch.optim.AdamW(codec.parameters(), config.lr, weight_decay=1e-4)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = (
                config.lr
                * min(1, (step + 1) / 50)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
            )
        images = _images(store, np.random.default_rng((config.seed, step)), config.batch)
        with torch.no_grad():
            z = codec.encode(images)
            z = z + torch.randn_like(z) * config.latent_noise
            linear = codec.decode_linear(z)
        with autocast(torch.device("cpu"), True):
            out = codec.refine(z)
        out, target = linear + out.float(), images * 2 - 1
        loss = (out - target).abs().mean() + 0.5 * _gradients(out - target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == config.steps - 1:
            record = {"step": step, "loss": round(loss.item(), 5)}
            if val is not None and (step % 500 == 0 or step == config.steps - 1):
                record |= _codec_psnr(codec, val)
            folder.log(record)
            progress(step, config.steps, record)
    codec.save(folder.path / "vae")
    return codec


def _images(store: Store, rng: np.random.Generator, n: int) -> Float[Tensor, "n 3 height width"]:
    """Draw whole pictures, normals and pose maps in the ratio 9 : 8 : 3."""
    kinds = rng.choice(["rgb", "normal", "pose"], n, p=[0.45, 0.4, 0.15])
    picks = [tuple(rng.integers(0, k) for k in store.config.shape) for _ in range(n)]
    return torch.from_numpy(np.stack([getattr(store, k)[p] for k, p in zip(kinds, picks, strict=True)])).float() / 255


def _gradients(x: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


@torch.no_grad()
def _codec_psnr(codec: PatchCodec, store: Store, n: int = 32) -> dict[str, float]:
    rng = np.random.default_rng(0)
    picks = [tuple(rng.integers(0, k) for k in store.config.shape) for _ in range(n)]
    out = {}
    for kind in ("rgb", "normal"):
        x = torch.from_numpy(np.stack([getattr(store, kind)[p] for p in picks])).float() / 255
        normals = torch.from_numpy(np.stack([store.normal[p] for p in picks])).float()
        mask = (normals - 127.5).abs().amax(1, keepdim=True) > 2
        error = ((codec.decode(codec.encode(x)) - x) ** 2)[mask.expand_as(x)].mean()
        out[f"psnr_fg_{kind}"] = round(-10 * math.log10(error.item()), 2)
    return out


class Objective(nn.Module):
    """The denoising loss, and nothing else (Sec. 3.1): what is distributed and differentiated."""

    def __init__(self, model: VideoModel):
        super().__init__()
        self.unet, self.reference, self.expression = model.unet, model.reference, model.expression
        self._model = [model]  # A list hides it: its parameters are registered above already.

    def forward(
        self, batch: Batch, t: Int[Tensor, " b"], noise: Tensor, drop_expression: Tensor, keep_warp: Tensor
    ) -> Float[Tensor, " d"]:
        """Return the weighted error of the predicted clean latents, per domain.

        Channels count as they show in pixels: in a principal-component code most channels hold detail that no one can
        predict, and would drown what moves a mouth.
        """
        model = self._model[0]
        d = len(model.config.domains)
        b = len(batch.crops)
        # Conditions are encoded in full precision, as when sampling.
        with torch.no_grad(), torch.autocast(batch.target.device.type, enabled=False):
            images = ConditionImages(batch.warp, batch.warp, batch.visibility)
            conditions = model.conditions(images, keep_warp, pose_planes=batch.pose)
        latent = rearrange(model.expression(batch.crops.flatten(0, 1)), "(b t) f -> b t f", b=b)
        latent = model.expression.drop(latent, drop_expression)
        kv = model.reference_kv(batch.reference, batch.reference_pose)
        z = batch.target[:, :d]
        z_t = model.diffusion.add_noise(z, noise, t)
        clean = model.predict_clean(z_t, t, conditions, latent, kv, batch.valid)
        seen = model.codec.visibility[None, None, :, None, None, None]
        error = (clean - z).square() * seen * batch.weight[:, :d] * model.diffusion.loss_weight(t)
        return error.mean((0, 2, 3, 4, 5))


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


@torch.no_grad()
def residual_std(batches: Batches, model: VideoModel, n: int = 8) -> tuple[float, float]:
    """Measure the deviation of `z - base` per domain, cells weighted as the loss does."""
    total, count = torch.zeros(2), 0
    for i in range(n):
        b = batches[10**9 + i]
        base = model.conditions(ConditionImages(b.warp, b.warp, b.visibility), pose_planes=b.pose).base
        total += ((b.target - base).square() * b.weight).mean((0, 2, 3, 4, 5))
        count += 1
    rgb, normal = (total / count).sqrt().tolist()
    return round(rgb, 3), round(normal, 3)


def train_image(
    run: Path, model_config: VideoModelConfig, codec: PatchCodec | StableCodec, batches: Batches | MixedBatches,
    config: ImageTraining, val: Batches | MixedBatches | None = None, start: dict[str, Tensor] | None = None,
    progress: Progress = lambda *a: None,
) -> VideoModel:  # fmt: skip
    """Train the denoiser and write `run/model` (EMA, fp16); a repeated call resumes from the last checkpoint.

    Stage 1 takes batches of images. Stage 2 takes batches of clips, a model with temporal modules, and `start`.

    Args:
        start: weights to continue from (an EMA of an earlier run); the optimiser starts afresh.

    Raises:
        UserError: the run folder is another configuration's, or the loss is not finite.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Nothing reads the reference network's last block beyond the hidden states it hands over: it has no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Said aloud, because processes without a GPU would else train on their own, each unaware of the others.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])
    folder = RunFolder(run, _Run(config, model_config))
    torch.manual_seed(config.seed)
    model = VideoModel(model_config, codec)
    if model_config.diffusion.prediction == "residual":
        initialise(model)
    if start is not None:
        model.load_state_dict(start, strict=False)
    if accelerator.device.type == "cpu":
        _channels_last(model)
    model = model.to(accelerator.device)
    if config.parts == "temporal":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".temporals." in name)
    groups: list[dict[str, Any]] = [
        {"params": [p for n in names for p in getattr(model, n).parameters() if p.requires_grad], "factor": factor}
        for names, factor in ((("unet", "reference"), 1.0), (("expression",), config.expression_lr))
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the model has no temporal modules to train: give it some (UNetConfig.temporal_layers)")
    optimiser = torch.optim.AdamW(groups, config.lr, (0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    objective, prepared = accelerator.prepare(Objective(model), optimiser)
    ema = {k: v.detach().clone() for k, v in _trained(model).items()}
    first = 0
    if (saved := folder.load(accelerator.print)) is not None:
        tensors, first = saved
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, strict=False
        )
        ema = {k: tensors[f"ema.{k}"].to(v) for k, v in ema.items()}
        restore_optimiser(optimiser, tensors)
    elif config.warm_start and isinstance(batches, Batches):
        warm_start(
            model.expression, batches, config.warm_start, config.autocast,
            lambda step, total, record: progress(0, config.steps, record),
        )  # fmt: skip
        ema = {k: v.detach().clone() for k, v in _trained(model).items()}

    rank, ranks = accelerator.process_index, accelerator.num_processes
    clock = _Clock(first, config.steps, batches.targets * config.accumulate * ranks)
    for step in range(first, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * group["factor"] * _rate(step, config)
        per_domain = torch.zeros(len(model_config.domains), device=accelerator.device)
        for part in range(config.accumulate):
            index = (step * config.accumulate + part) * ranks + rank
            batch = batches[index].to(accelerator.device)
            draws = _draws(model, batch, config, index)
            # Processes exchange gradients once a step, after the last part.
            waits = part < config.accumulate - 1
            with accelerator.no_sync(objective) if waits else nullcontext():
                with autocast(accelerator.device, config.autocast):
                    error = objective(batch, *draws) / config.accumulate
                accelerator.backward(error.mean())
            per_domain += error.detach()
        norm = accelerator.clip_grad_norm_(objective.parameters(), config.clip)
        loss, last = per_domain.mean(), step == config.steps - 1
        logs, saves = step % config.log_every == 0 or last, (step + 1) % config.save_every == 0 or last
        # A GPU is asked only where it must answer anyway; weights are not touched by a step that went wrong.
        if accelerator.device.type == "cpu" or logs or saves:
            _check_finite(loss, norm, step, folder.path)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        _average(ema, model, min(config.ema, (1 + step) / (10 + step)))

        if accelerator.is_main_process and logs:
            record = {"step": step, "loss": round(loss.item(), 5), "lr": optimiser.param_groups[0]["lr"]}
            record |= {f"loss_{d}": round(x, 5) for d, x in zip(("rgb", "normal"), per_domain.tolist(), strict=False)}
            record |= clock.at(step)
            folder.log(record)
            progress(step, config.steps, record)
        if accelerator.is_main_process and saves:
            tensors = {f"model.{k}": v for k, v in _trained(model).items()} | {f"ema.{k}": v for k, v in ema.items()}
            folder.save(tensors | optimiser_tensors(optimiser), step + 1)
            model.save(folder.path / "model", ema)
        if accelerator.is_main_process and val is not None and ((step + 1) % config.validate_every == 0 or last):
            record = {"step": step, **validate(model, ema, val, config.autocast)}
            folder.log(record)
            progress(step, config.steps, record)
    model.load_state_dict(ema, strict=False)
    if model_config.expression.motion and isinstance(batches, Batches):
        fit_motion_readout(model.expression, batches)
        if accelerator.is_main_process:
            model.save(folder.path / "model")
    return model.eval()


def _check_finite(loss: Tensor, norm: Tensor | float | None, step: int, folder: Path) -> None:
    """Stop before a bad gradient reaches the weights.

    Raises:
        UserError: the loss or the gradient's norm is not finite.
    """
    if math.isfinite(loss.item()) and (norm is None or math.isfinite(float(norm))):
        return
    raise UserError(
        f"step {step}: loss {loss.item():.3g}, gradient norm {float(norm or 0):.3g}: expected finite numbers; "
        f"the last good checkpoint stays in {folder}: run again with a lower rate"
    )


class _Clock:
    """Throughput and time to go, measured over this process's own steps."""

    def __init__(self, first: int, steps: int, targets: int):
        """`targets` is how many a step sees, over all processes."""
        self.first, self.steps, self.targets, self.started = first, steps, targets, time.monotonic()

    def at(self, step: int) -> dict[str, float]:
        """Return targets per second and seconds left after a step."""
        seconds = (time.monotonic() - self.started) / (step + 1 - self.first)
        return {
            "targets_per_second": round(self.targets / seconds, 1), "eta": round(seconds * (self.steps - step - 1))
        }  # fmt: skip


@torch.no_grad()
def validate(
    model: VideoModel, ema: dict[str, Tensor], val: Batches | MixedBatches, mixed: bool, n: int = 4
) -> dict[str, float]:
    """Measure the averaged model's clean-latent error on held-out subjects, with and without expression."""
    current = {k: v.detach().clone() for k, v in _trained(model).items()}
    model.load_state_dict(ema, strict=False)
    model.eval()
    out: dict[str, float] = {}
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
                    error = objective(batch, steps, noise, flags, keep) / model.diffusion.loss_weight(steps).mean()
                for d, e in zip(("rgb", "normal"), error.tolist(), strict=False):
                    key = f"val_{d}_{t}{name}"
                    out[key] = round(out.get(key, 0.0) + e / n, 5)
    model.load_state_dict(current, strict=False)
    model.train()
    return out


def _channels_last(module: nn.Module) -> None:
    """Lay convolution weights out as CPUs like them."""
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch's overloads omit it


def _trained(model: VideoModel) -> dict[str, Tensor]:
    return {f"{name}.{k}": v for name, network in model.networks().items() for k, v in network.state_dict().items()}


@torch.no_grad()
def _average(ema: dict[str, Tensor], model: VideoModel, decay: float) -> None:
    current = _trained(model)
    torch._foreach_lerp_(list(ema.values()), [current[k] for k in ema], 1 - decay)


def _rate(step: int, config: ImageTraining) -> float:
    progress = step / config.steps
    if progress < config.hold:
        return min(1.0, (step + 1) / config.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - config.hold) / (1 - config.hold)))


def _draws(model: VideoModel, batch: Batch, config: ImageTraining, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw (t, noise, dropped expressions, kept warps) of a batch from its index."""
    g = torch.Generator().manual_seed(config.seed * 7_368_787 + index)
    b, frames = batch.crops.shape[:2]
    steps = model.config.diffusion.steps
    t = ((steps - 0.01) * torch.rand(b, generator=g) ** config.timestep_power).long()
    noise = model.diffusion.noise_like(batch.target[:, : len(model.config.domains)].cpu(), g)
    dropped = torch.rand(b, frames, generator=g) < config.drop_expression
    kept = torch.rand(b, generator=g) >= config.drop_warp
    device = batch.target.device
    return t.to(device), noise.to(device), dropped.to(device), kept.to(device)
