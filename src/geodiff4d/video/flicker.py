"""Flicker: how far frame-to-frame changes are from the truth's, with temporal modules and without."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geodiff4d.video.batches import Batches
from geodiff4d.video.model import VideoModel
from geodiff4d.video.preview import generated_latents
from geodiff4d.video.sample import SampleConfig


def flicker(
    frames: Float[Tensor, "t 3 height width"],
    truth: Float[Tensor, "t 3 height width"],
    mask: Float[Tensor, "t 1 height width"],
) -> float:
    """Return the mean |change from frame to frame that the truth does not have|, in levels of 255.

    Where both frames are foreground. A constant error costs nothing; a frozen video pays for the motion it misses.
    Frames are consecutive, of one view.
    """
    change = (frames[1:] - frames[:-1]) - (truth[1:] - truth[:-1])
    both = torch.minimum(mask[1:], mask[:-1])
    return (255 * (change.abs() * both).sum() / (3 * both.sum()).clamp(min=1e-12)).item()


@contextmanager
def without_temporal_modules(model: VideoModel) -> Iterator[VideoModel]:
    """Take the temporal modules out of a model for a while: the image model it was trained from."""
    blocks = [module for module in model.unet.modules() if hasattr(module, "temporals")]
    modules = [block.temporals for block in blocks]
    try:
        for block in blocks:
            block.temporals = nn.ModuleList()
        yield model
    finally:
        for block, own in zip(blocks, modules, strict=True):
            block.temporals = own


@torch.no_grad()
def measure_flicker(model: VideoModel, val: Batches, config: SampleConfig, clips: int = 4) -> dict[str, float]:
    """Sample held-out clips and measure their flicker against the truth as the codec keeps it.

    Returns `flicker_rgb` and `flicker_normal`, the same without temporal modules (`…_alone`), and how far both are
    from the truth in latents (`clip_error`, `clip_error_alone`): frames could be still by being wrong.
    """
    out: dict[str, float] = {}
    index = row = 0
    batch = val[0].to(model.device)
    for _ in range(clips):
        if row == len(batch.crops):
            index, row = index + 1, 0
            batch = val[index].to(model.device)
        frames = int(batch.valid[row].sum())
        d = len(model.config.domains)
        z = batch.target[row : row + 1, :d, :, :frames]
        truth = model.decode_latents(z)[0].clamp(0, 1)
        weight = batch.weight[row : row + 1, :d, :, :frames]
        mask = _mask(truth)
        for name in ("", "_alone"):
            if name:
                with without_temporal_modules(model):
                    made = generated_latents(model, batch, row, config, frames)
            else:
                made = generated_latents(model, batch, row, config, frames)
            images = model.decode_latents(made)[0].clamp(0, 1)
            found = {"clip_error": ((made - z).square() * weight).mean().item()}
            for domain, kind in enumerate(("rgb", "normal")[:d]):
                pair = (images[domain].transpose(0, 1), truth[domain].transpose(0, 1))
                found[f"flicker_{kind}"] = flicker(*pair, mask) if frames > 1 else 0.0
            for key, value in found.items():
                out[key + name] = out.get(key + name, 0.0) + value / clips
        row += 1
    return {k: round(v, 5) for k, v in out.items()}


def _mask(images: Float[Tensor, "d 3 t height width"]) -> Float[Tensor, "t 1 height width"]:
    """Read the foreground off true normals: grey is no surface. Without normals everything counts."""
    if len(images) == 1:
        return torch.ones_like(images[0, :1].transpose(0, 1))
    return ((images[1] - 0.5).abs().amax(0, keepdim=True) > 0.1).float().transpose(0, 1)
