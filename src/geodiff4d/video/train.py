"""Training of the video model: stage 1 on images, stage 2 on clips (Sec. 4.1); one process or many, CPU or CUDA.

The loop reads top to bottom. Every random draw is a function of (seed, sample), so that a resumed run equals an
uninterrupted one, and that processes and accumulated parts change no step; weights are averaged (EMA), and the average
is what is saved for use.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from geodiff4d.core.deferred import deferred
from geodiff4d.core.errors import UserError
from geodiff4d.core.rundir import OnRecord, RunFolder, read_log
from geodiff4d.core.stopping import Stopped, stop_requests
from geodiff4d.data.sampling import PairConfig, torch_generator
from geodiff4d.video.batches import UNIFORM, Batch, Batches, WeightConfig
from geodiff4d.video.decoder import GuidedDecoder
from geodiff4d.video.gradient_checkpointing import checkpoint_gradients
from geodiff4d.video.model import VideoModel, VideoModelConfig
from geodiff4d.video.objective import Draws, channels_last, initialise, trained_state, validate
from geodiff4d.video.parallel import Groups, Parallel, Replicated, Sharded
from geodiff4d.video.processes import Exchange, broadcast, check_consistent
from geodiff4d.video.sample import SampleConfig, autocast
from geodiff4d.video.vae import Codec
from geodiff4d.video.warm_start import warm_start
from geodiff4d.video.watch import Watch


@dataclass(frozen=True)
class VideoTraining:
    """How the video model is trained (Sec. 4.1: AdamW 1e-5, 80K steps of 32; the embedded preset differs)."""

    steps: int = 80_000
    pairs: PairConfig = field(default_factory=PairConfig)
    lr: float = 1e-5
    expression_lr: float = 1.0
    """Factor on the encoder's rate."""
    warmup: int = 100
    hold: float = 0.4
    """Share of the steps before the rate decays along a cosine; 1 keeps it."""
    weight_decay: float = 1e-2
    beta2: float = 0.99
    """AdamW's second decay rate."""
    clip: float = 1.0
    """Largest norm of a gradient; 0 clips none."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step; in every process each has `pairs.references` references, with
    `pairs.targets` targets each."""
    ema: float = 0.999
    """Decay of the averaged weights, which are validated and saved; 0 takes the weights as they are."""
    ema_on_host: bool = False
    """Keep the average in the host's memory: four bytes a weight less on the GPU. It is then brought up to date every
    `EMA_EVERY` steps, with as much decay as these have."""
    zero: bool = False
    """Share gradients, moments and average out to the processes (ZeRO, stage 2), instead of a copy for each."""
    drop_expression: float = 0.1
    """S-A.1."""
    drop_warp: float = 0.15
    weights: WeightConfig = UNIFORM
    """What a latent cell counts, by what it shows; the paper's loss is uniform."""
    timestep_power: float = 1.0
    """t = 1000 u^power: 1 is uniform, below 1 favours high noise."""
    sampled_starts: float = 0.0
    """Share of samples that begin where a sampler does: at the last timestep, one noise for all frames, on the
    portrait. For models that are sampled in one step; the paper has none."""
    still_noise: float = 0.0
    """Share of samples whose frames have one and the same noise, at whatever timestep, as `SampleConfig.still_noise`
    samples; the paper has none."""
    temporal_loss: float = 0.0
    """Weight of the error of what changes from frame to frame, beside the error of the frames (ours)."""
    parts: Literal["all", "temporal"] = "all"
    """What is trained: everything (stage 1), or temporal modules alone (stage 2, as in AnimateAnyone's recipe)."""
    warm_start: int = 0
    """Steps of regressing the known motion before denoising starts (`video/warm_start.py`; the paper has none); an
    encoder that was trained before goes without."""
    autocast: bool = True
    """bf16 where the machine has it; weights, their average and the optimiser stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, a third more work for a fraction of the
    memory."""
    log_every: int = 20
    validate_every: int = 250
    save_every: int = 250
    save_minutes: float = 10.0
    """Also save when the last checkpoint is this old; 0 turns it off."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, the newest among them."""
    pictures: int = 4
    """Rows of the validation sheet; 0 draws none."""
    preview: SampleConfig = SampleConfig(steps=1, guidance=1.0, still_noise=True)
    """How validation pictures are sampled."""
    seed: int = 0


@dataclass(frozen=True)
class _Run:
    """What a checkpoint depends on: it is resumed only by the same."""

    training: VideoTraining
    model: VideoModelConfig
    batch: int
    """References of a step, over all processes and parts."""


EMA_EVERY = 10
"""Steps between two looks at the weights by an average in the host's memory."""

FREE = frozenset({
    "steps", "gradient_checkpointing", "references", "accumulate", "save_minutes", "keep_checkpoints", "log_every",
    "validate_every", "pictures", "preview", "zero",
})  # fmt: skip
"""What may change when a run goes on: how long it is (rates follow), how a step's batch is held, and what is shown."""


def train_video_model(
    run: Path, model_config: VideoModelConfig, codec: Codec, batches: Batches,
    config: VideoTraining, val: Batches | None = None, start: dict[str, Tensor] | None = None,
    on_record: OnRecord = lambda record: None, decoder: GuidedDecoder | None = None,
) -> VideoModel:  # fmt: skip
    """Train the denoiser and write `run/model` (EMA, fp16); a repeated call resumes from the last checkpoint.

    Stage 1 takes batches of images. Stage 2 takes batches of clips, a model with temporal modules, and `start`.

    Args:
        start: weights to continue from (an EMA of an earlier run); the optimiser starts afresh.
        on_record: told what is logged, and how the warm start goes.
        decoder: written beside the networks as it is; it is not trained here.

    Raises:
        UserError: the run folder is another configuration's, processes disagree, or the loss is not finite.
        Stopped: a process was sent SIGTERM; there is a checkpoint of the last step.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Nothing reads the reference network's last block beyond the hidden states it hands over: it has no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
    # Said aloud, because processes without a GPU would else train on their own, each unaware of the others.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])
    if not accelerator.is_main_process:
        on_record = lambda record: None  # noqa: E731
    rank, ranks = accelerator.process_index, accelerator.num_processes
    known = _Run(config, model_config, config.pairs.references * config.accumulate * ranks)
    with accelerator.main_process_first():
        folder = RunFolder(run, known, FREE, accelerator.is_main_process, on_record, config.keep_checkpoints)
    model = _build(model_config, codec, config, start).to(accelerator.device)
    kind = Sharded if config.zero and ranks > 1 else Replicated
    options = (config.lr, config.beta2, config.weight_decay)
    parallel: Parallel = kind(accelerator, model, _groups(model, config), config.temporal_loss, *options)
    held = torch.device("cpu") if config.ema_on_host else accelerator.device
    ema = _first_average(parallel, model, held)
    first = 0
    if (saved := folder.load(accelerator.print)) is not None:
        tensors, first = saved
        with folder.restoring():
            parallel.restore(ema, tensors)
    elif config.warm_start and batches.samples.knows_motion and not _has_encoder(start):
        warm_start(model.expression, batches.samples, config.warm_start, config.autocast, on_record)
        # Every process did the same, but no two cards to the last bit.
        broadcast(accelerator, model.expression)
        ema = _first_average(parallel, model, held)
    # A run may have been killed between a checkpoint and its validation, which is then made up for.
    seen = (r for r in read_log(folder.path / "log.jsonl") if r.get("step") == first - 1)
    validated = any(k.startswith("val_") for r in seen for k in r)
    check_consistent(accelerator, {"configuration": known, "first step": first, "validated": validated}, model)
    parallel.begin()

    watch = Watch(folder, config.preview, config.pictures) if accelerator.is_main_process else None
    clock = _Clock(first, config.steps, batches.targets * config.accumulate * ranks)
    # Once a gradient was not finite, fused AdamW is told on the device to leave the weights alone, without a wait.
    bad = torch.zeros((), device=accelerator.device)
    optimiser = parallel.optimiser
    optimiser.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]  # what a GradScaler sets
    batches.read_ahead(first * config.accumulate * ranks + rank, ranks)

    def save_model(copies: dict[str, Tensor]) -> None:
        state = {k.removeprefix("ema."): v for k, v in copies.items() if k.startswith("ema.")}
        model.save(folder.path / "model", state, decoder=decoder)

    def look(done: int) -> None:
        """Validate the averaged weights after so many steps, if it is time to."""
        if val is None or not done or (done % config.validate_every and done != config.steps):
            return
        with parallel.averaged(ema):
            if watch is not None:
                record = {"step": done - 1, **validate(model, val, config.autocast)}
                watch.log(record | watch.look(model, val, done - 1))

    exchange, averaged_at = Exchange(ranks), first
    with folder.settled(), stop_requests() as stop:
        if not validated:
            look(first)
        for step in range(first, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * group["factor"] * rate_factor(step, config)
            per_domain = torch.zeros(len(model_config.domains), device=accelerator.device)
            for part in range(config.accumulate):
                index = (step * config.accumulate + part) * ranks + rank
                batch = batches[index].to(accelerator.device)
                draws = draw(model, batch, config)
                with parallel.part(part == config.accumulate - 1):
                    # A weight is used once a pass: kept in bf16, all of them would only take two bytes each.
                    with autocast(accelerator.device, config.autocast, keep_weights=False):
                        error = parallel.objective(batch, draws) / config.accumulate
                    accelerator.backward(error.mean())
                per_domain += error.detach()
            norm = parallel.clip(config.clip or math.inf)
            timed = watch is not None and clock.old(config.save_minutes)
            per_domain, stops, timed = exchange(per_domain, stop.asked, timed)
            loss, last = per_domain.mean(), step == config.steps - 1
            logs = step % config.log_every == 0 or last
            saves = timed or (step + 1) % config.save_every == 0 or last or stops
            torch.maximum(bad, 1 - torch.isfinite(norm).to(bad), out=bad)
            # A GPU is asked only where it must answer anyway.
            if accelerator.device.type == "cpu" or logs or saves:
                check_finite(loss, norm, bad, step, folder.path)
            parallel.step()
            if saves or (step + 1) % (EMA_EVERY if config.ema_on_host else 1) == 0:
                _average(ema, model, min(config.ema, (1 + step) / (10 + step)) ** (step + 1 - averaged_at))
                averaged_at = step + 1

            if logs and watch is not None:
                record = {"step": step, "loss": round(loss.item(), 5), "lr": optimiser.param_groups[0]["lr"]}
                record |= {
                    f"loss_{d}": round(x, 5) for d, x in zip(("rgb", "normal"), per_domain.tolist(), strict=False)
                }
                record |= clock.at(step)
                watch.log(record)
            if saves:
                everything = parallel.checkpoint(ema)
                if watch is not None:
                    folder.save_later(everything, step + 1, save_model)
                    clock.saved()
                else:
                    deque(everything, maxlen=0)  # shares are sent on the way
            if stops and not last:
                folder.settle()
                accelerator.wait_for_everyone()
                raise Stopped(f"stopped after step {step}, as SIGTERM asked: the same command goes on from there")
            look(step + 1)
    parallel.take(ema)
    return model.eval()


def _build(
    model_config: VideoModelConfig, codec: Codec, config: VideoTraining,
    start: dict[str, Tensor] | None,
) -> VideoModel:  # fmt: skip
    """Make the model, from random weights or from `start`, and mark what is trained.

    Raises:
        UserError: nothing would be trained.
    """
    torch.manual_seed(config.seed)
    with deferred() as draws:
        model = VideoModel(model_config, codec)
        if model_config.diffusion.prediction == "residual":
            initialise(model)
    given = {} if start is None else start
    # A CPU would go on to train the caller's tensors; to a GPU they are copied anyway.
    draws.fill(model, given if torch.cuda.is_available() else {k: v.clone() for k, v in given.items()}, strict=False)
    if not torch.cuda.is_available():
        channels_last(model)
    train_parts(model, config.parts)
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    return model


def train_parts(model: VideoModel, parts: Literal["all", "temporal"]) -> None:
    """Mark what of a model is trained.

    Raises:
        UserError: nothing would be.
    """
    if parts == "temporal":
        if not model.temporal:
            raise UserError("the model has no temporal modules to train: give it some (UNetConfig.temporal_layers)")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".temporals." in name)


def _groups(model: VideoModel, config: VideoTraining) -> Groups:
    """Return the names of what is trained, by the factor on their rate."""
    networks = model.networks()
    return [
        (factor, [f"{n}.{k}" for n in names for k, p in networks[n].named_parameters() if p.requires_grad])
        for names, factor in ((("unet", "reference"), 1.0), (("expression",), config.expression_lr))
    ]


def _has_encoder(start: dict[str, Tensor] | None) -> bool:
    """Return whether weights to start from hold a trained expression encoder, as Stable Diffusion's do not."""
    return any(k.startswith("expression.") for k in start or {})


def _first_average(parallel: Parallel, model: VideoModel, device: torch.device) -> dict[str, Tensor]:
    """Return what this process keeps of the average, which begins as the weights."""
    return {k: v.detach().to(device, copy=True) for k, v in trained_state(model).items() if parallel.owns(k)}


def check_finite(loss: Tensor, norm: Tensor, bad: Tensor, step: int, folder: Path) -> None:
    """Stop before a bad gradient reaches the weights.

    Raises:
        UserError: the loss is not finite, or a gradient's norm was not since the last check (`bad` is above 0).
    """
    if math.isfinite(loss.item()) and bad.item() == 0:
        return
    raise UserError(
        f"step {step}: loss {loss.item():.3g}, gradient norm {norm.item():.3g}: expected finite numbers, here and "
        f"since the last line of the log; "
        f"the last good checkpoint stays in {folder}: run again with a lower rate"
    )


class _Clock:
    """Throughput and time to go over this process's own steps, and the age of the last checkpoint."""

    def __init__(self, first: int, steps: int, targets: int):
        """`targets` is how many a step sees, over all processes."""
        self.first, self.steps, self.targets = first, steps, targets
        self.started = self.last_save = time.monotonic()

    def at(self, step: int) -> dict[str, float]:
        """Return targets per second and seconds left after a step."""
        seconds = (time.monotonic() - self.started) / (step + 1 - self.first)
        return {
            "targets_per_second": round(self.targets / seconds, 1), "eta": round(seconds * (self.steps - step - 1))
        }  # fmt: skip

    def old(self, minutes: float) -> bool:
        """Say whether the last checkpoint is older than so many minutes."""
        return minutes > 0 and time.monotonic() - self.last_save > 60 * minutes

    def saved(self) -> None:
        self.last_save = time.monotonic()


@torch.no_grad()
def _average(ema: dict[str, Tensor], model: VideoModel, decay: float) -> None:
    current = trained_state(model)
    torch._foreach_lerp_(list(ema.values()), [current[k].to(v.device) for k, v in ema.items()], 1 - decay)


def rate_factor(step: int, config: VideoTraining) -> float:
    """Return what learning rates are multiplied by in a step: it rises over the warm-up, holds, and falls to 0.02."""
    done = step / config.steps
    if done < config.hold or config.hold >= 1:
        return min(1.0, (step + 1) / config.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - config.hold) / (1 - config.hold)))


def draw(model: VideoModel, batch: Batch, config: VideoTraining) -> Draws:
    """Draw timesteps, noise and what is dropped: of every sample by its index alone, whatever batch it is in."""
    rows = [_draw_sample(model, batch, row, config) for row in range(len(batch.index))]
    t, noise, dropped, kept, started = (torch.stack(x) for x in zip(*rows, strict=True))
    return Draws(t, noise, dropped, kept, started if config.sampled_starts else None).to(batch.target.device)


def _draw_sample(model: VideoModel, batch: Batch, row: int, config: VideoTraining) -> tuple[Tensor, ...]:
    g = torch_generator("training", config.seed, int(batch.index[row]))
    frames, steps = batch.crops.shape[1], model.config.diffusion.steps
    t = ((steps - 0.01) * torch.rand((), generator=g) ** config.timestep_power).long()
    # Drawn on the CPU, where every machine draws the same; only the shape of the target is needed.
    shape = (1, len(model.config.domains), *batch.target.shape[2:])
    noise = model.diffusion.noise_like(torch.empty(shape), g)[0]
    # Stage 2 drops whole clips: the null branch of guidance is a clip without any expression.
    flags = 1 if config.pairs.clips else frames
    dropped = (torch.rand(flags, generator=g) < config.drop_expression).expand(frames)
    kept, started = torch.rand(2, generator=g) >= torch.tensor([config.drop_warp, 1 - config.sampled_starts])
    if started:
        t = torch.full_like(t, steps - 1)
    if started or torch.rand((), generator=g) < config.still_noise:
        noise = noise[:, :, :1].expand_as(noise)
    return t, noise, dropped, kept, started
