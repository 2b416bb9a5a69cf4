"""Images of a training batch as the model would generate them."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

from geodiff4d.video.batches import Batch, Batches
from geodiff4d.video.model import VideoModel
from geodiff4d.video.sample import ClipInputs, SampleConfig, sample

TILE = 128
"""Side of an image on the validation sheet [px]."""
GAP = 4


@torch.no_grad()
def sheet(model: VideoModel, val: Batches, config: SampleConfig, rows: int) -> Float[Tensor, "3 height width"]:
    """Draw rows of reference, warped portrait, truth, generated, and the normals of both (truth as the codec keeps it).

    A row of a video model shows the first frame of a clip.
    """
    lines, index = [], 0
    while len(lines) < rows:
        batch = val[index].to(model.device)
        for row in range(min(len(batch.crops), rows - len(lines))):
            lines.append(_row(model, batch, row, config))
        index += 1
    return torch.cat(lines, 1)


def _row(model: VideoModel, batch: Batch, row: int, config: SampleConfig) -> Float[Tensor, "3 height width"]:
    frames = batch.crops.shape[1] if model.temporal else 1
    made = generated_clip(model, batch, row, config, frames)[:, :, 0]
    truth = model.decode_latents(batch.target[row : row + 1, : len(made), :, :1])[0, :, :, 0]
    reference = model.codec.decode(batch.reference[row : row + 1])[0]
    warp = torch.full_like(reference, 0.5) if batch.warp is None else batch.warp[row, :, 0]
    tiles = [reference, warp, truth[0], made[0], *truth[1:], *made[1:]]
    small = interpolate(torch.stack([t.float() for t in tiles]), (TILE, TILE), mode="bilinear", antialias=True)
    framed = pad(small.cpu(), (0, GAP, 0, GAP), value=1.0)
    return rearrange(framed, "n c h w -> c h (n w)")


@torch.no_grad()
def generated_clip(
    model: VideoModel, batch: Batch, row: int, config: SampleConfig, frames: int | None = None
) -> Float[Tensor, "d 3 t height width"]:
    """Sample the targets of one row of a batch as one would a clip, and decode them."""
    return model.decode_latents(generated_latents(model, batch, row, config, frames))[0].clamp(0, 1)


@torch.no_grad()
def generated_latents(
    model: VideoModel, batch: Batch, row: int, config: SampleConfig, frames: int | None = None
) -> Float[Tensor, "1 d c t h w"]:
    """Sample the latents of one row's first `frames` targets (all by default) from its conditions."""
    one, part = slice(row, row + 1), slice(0, frames)
    warp, visibility = (None if x is None else x[one, :, part] for x in (batch.warp, batch.visibility))
    conditions = model.join_conditions(batch.pose[one, :, part], warp, visibility)
    latents = model.expression(batch.crops[row, part])[None]
    kv = model.reference_kv(batch.reference[one], batch.reference_pose[one])
    start = batch.start[one, : len(model.config.domains)]
    return sample(model, ClipInputs(conditions, latents, kv, start), config)
