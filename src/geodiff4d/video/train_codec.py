"""Training of the embedded codec: a basis of patches by principal components, then a convolutional decoder."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.rundir import OnRecord, RunFolder, optimiser_tensors, restore_optimiser
from geodiff4d.data.footage.rendered import Store
from geodiff4d.video.objective import channels_last
from geodiff4d.video.sample import autocast
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig


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
    save_every: int = 250
    seed: int = 0


def train_codec(
    run: Path, store: Store, config: CodecTraining, on_record: OnRecord = lambda record: None, val: Store | None = None
) -> PatchCodec:
    """Fit the basis, then train the decoder on pictures, normals and pose maps; writes `run/vae`.

    The same call resumes an interrupted run, to the same result.
    """
    folder = RunFolder(run, config, frozenset({"steps"}), on_record=on_record)
    torch.manual_seed(config.seed)
    codec = PatchCodec(config.codec)
    saved = folder.load()
    if saved is None:
        codec.fit_basis(_images(store, np.random.default_rng(config.seed), config.basis_images))
    channels_last(codec)
    optimiser = torch.optim.AdamW(codec.parameters(), config.lr, weight_decay=1e-4)
    first = 0
    if saved is not None:
        with folder.restoring():
            first = _resume(codec, optimiser, *saved)
    for step in range(first, config.steps):
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
        if (step + 1) % config.save_every == 0 or step == config.steps - 1:
            state = {f"model.{k}": v for k, v in codec.state_dict().items()}
            folder.save(state | optimiser_tensors(optimiser) | {"random": torch.get_rng_state()}, step + 1)
    codec.save(folder.path / "vae")
    return codec


def _resume(codec: PatchCodec, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], step: int) -> int:
    codec.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    restore_optimiser(optimiser, tensors)
    torch.set_rng_state(tensors["random"])
    return step


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
