"""Memory of a training step on one GPU, counted and not measured: tensors have shapes and no numbers.

Both stages of training run forward and backward with PyTorch's fake tensors, at true size, in the precision that the
loop trains in; the storages that are alive are added up. Attention is the CPU's flash attention, which keeps what the
GPU's keeps: its inputs, its output and a number a query. Not counted: kernels' workspaces, the CUDA context (about
0.6 GB) and what the allocator wastes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from geodiff4d.bench.count import training_peaks, weight_bytes
from geodiff4d.presets import Preset, with_temporal_modules
from geodiff4d.video.batches import Batch
from geodiff4d.video.gradient_checkpointing import checkpoint_gradients
from geodiff4d.video.model import VideoModel
from geodiff4d.video.objective import Draws, Objective
from geodiff4d.video.parallel import BUCKET, IN_FLIGHT
from geodiff4d.video.train import VideoTraining, train_parts
from geodiff4d.video.vae import PatchCodec, StableCodec


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process of a training."""

    weights: int
    """In float32, the frozen codec among them."""
    average: int
    """Of the weights (EMA)."""
    trained: int
    """Of the weights that are trained: as much as their gradients, and as each of AdamW's two moments."""
    step: int
    """Peak of forward and backward pass beside these: activations and gradients."""
    activations: int
    """The same without gradients, each of which is let go as soon as there is one."""

    def peak(self, average_on_gpu: bool = True, shares: int = 1) -> float:
        """Return the peak [GB].

        Args:
            average_on_gpu: off, it is in the host's memory (`--ema-on-host`).
            shares: processes that share gradients, moments and average (`--zero`).
        """
        kept = self.average * average_on_gpu + 2 * self.trained
        if shares == 1:
            return (self.weights + kept + self.step) / 1e9
        # Buckets of gradients under way, and the one that is being filled: as they are, and laid out to be sent.
        under_way = 2 * (IN_FLIGHT + 1) * 4 * BUCKET
        return (self.weights + (kept + self.trained) / shares + self.activations + under_way) / 1e9


def count_step(p: Preset, stage: str, references: int, checkpointing: bool = True) -> StepMemory:
    """Count a step of a preset's stage ("image" or "video") with so many references on the GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = replace(p.image if stage == "image" else p.video, gradient_checkpointing=checkpointing)
        model_config = p.model if stage == "image" else with_temporal_modules(p.model, p.temporal)
        codec = PatchCodec(p.codec.codec) if p.model.pose == "codec" else StableCodec(None)
        model = VideoModel(model_config, codec)
        train_parts(model, config.parts)
        if checkpointing:
            checkpoint_gradients(model)
        objective = Objective(model, config.temporal_loss)
        batch, draws = _given(model, config, references)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                error = objective(batch, draws)
            error.mean().backward()

        trained = [x for x in objective.parameters() if x.requires_grad]
        peak, activations = training_peaks(step, trained)
        networks = sum(weight_bytes(network) for network in model.networks().values())
        size = sum(4 * x.numel() for x in trained)
        return StepMemory(networks + weight_bytes(codec), networks, size, peak, activations)


def _given(model: VideoModel, config: VideoTraining, b: int) -> tuple[Batch, Draws]:
    """Return a batch and its draws, in the model's sizes."""
    c, t, d = model.codec.channels, config.pairs.targets, len(model.config.domains)
    side, size = model.config.size // model.codec.factor, model.config.size
    pose = c if model.config.pose == "codec" else 3
    warps: dict[str, Tensor] = {}
    if model.config.warp:
        warps = {"warp": torch.empty(b, 3, t, size, size), "visibility": torch.empty(b, 2, t, size, size)}
    crop, dropped = model.config.expression.size, torch.zeros(b, t, dtype=torch.bool)
    batch = Batch(
        index=torch.zeros(b, dtype=torch.long), reference_pose=torch.empty(b, pose, side, side),
        target=torch.empty(b, 2, c, t, side, side), pose=torch.empty(b, pose, t, side, side),
        crops=torch.empty(b, t, 3, crop, crop), weight=torch.empty(b, 2, 1, t, side, side),
        start=torch.empty(b, 2, c, side, side), valid=~dropped, **warps,
    )  # fmt: skip
    noise = torch.empty(b, d, c, t, side, side)
    return batch, Draws(torch.zeros(b, dtype=torch.long), noise, dropped, ~dropped[:, 0])
