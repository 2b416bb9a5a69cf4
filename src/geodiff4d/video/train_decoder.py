"""Training of the guided decoder: pixels, gradients and a discriminator, on whole frames and on cuts of large ones."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu, relu
from torch.nn.utils.parametrizations import spectral_norm

from geodiff4d.core.images import composite
from geodiff4d.core.rundir import OnRecord, RunFolder, optimiser_tensors, restore_optimiser
from geodiff4d.video.decoder import DecoderConfig, GuidedDecoder
from geodiff4d.video.decoder_rows import DecoderBatch, DecoderRows
from geodiff4d.video.frames import WarpedFrames


@dataclass(frozen=True)
class DecoderTraining:
    """How the guided decoder is trained."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    steps: int = 4000
    batch: int = 4
    size: int = 256
    """Side of what is trained on: a whole row made smaller, or a cut out of it [px]."""
    cuts: float = 0.5
    """Share of the steps that see cuts."""
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    ema: float = 0.995
    gradients: float = 1.0
    mask: float = 0.3
    normals: float = 0.5
    adversarial: float = 0.01
    features: float = 0.1
    adversarial_from: float = 0.25
    """Share of the steps after which the discriminator counts."""
    photographs: float = 0.6
    """Share of the rows that are photographs', where there are both kinds."""
    log_every: int = 25
    validate_every: int = 500
    save_every: int = 250
    val_rows: int = 60
    seed: int = 0


class Discriminator(nn.Module):
    """Tells generated from true images, patch by patch, and gives its features."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 128)):
        super().__init__()
        inner = [3, *widths]
        self.layers = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in itertools.pairwise(inner))
        self.score = spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, image: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, list[Tensor]]:
        """Return scores of patches, higher for true ones, and the layers' features."""
        h, features = image * 2 - 1, []
        for layer in self.layers:
            h = leaky_relu(layer(h), 0.2)
            features.append(h)
        return self.score(h), features


def at(batch: DecoderBatch, size: int, box: tuple[int, int] | None) -> DecoderBatch:
    """Make rows smaller, or cut a square out of them; `box` is its corner (left, top)."""
    whole = batch.truth.shape[-1]
    if box is None:
        if whole == size:
            return batch
        warped = {f.name: getattr(batch.warped, f.name) for f in fields(WarpedFrames)}
        warped = {k: x if k == "pose" else avg_pool2d(x, whole // size) for k, x in warped.items()}
        whole_ones = {k: avg_pool2d(getattr(batch, k), whole // size) for k in ("truth", "mask", "counts")}
        return replace(batch, warped=WarpedFrames(**warped), **whole_ones)
    left, top = box

    def cut(x: Tensor) -> Tensor:
        if x.shape[-1] != whole:  # Stays at its scale, so that the network sees what it sees of a whole frame.
            x = interpolate(x, (whole, whole), mode="bilinear", align_corners=False)
        return x[..., top : top + size, left : left + size]

    warped = WarpedFrames(*(cut(getattr(batch.warped, f.name)) for f in fields(WarpedFrames)))
    names = ("rgb", "normals", "truth", "mask", "truth_normals", "counts")
    return replace(batch, warped=warped, **{k: cut(getattr(batch, k)) for k in names})


def joined(parts: Sequence[DecoderBatch]) -> DecoderBatch:
    """Join batches."""
    if len(parts) == 1:
        return parts[0]
    warped = WarpedFrames(*(torch.cat([getattr(p.warped, f.name) for p in parts]) for f in fields(WarpedFrames)))
    rest = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(DecoderBatch) if f.name != "warped"}
    return DecoderBatch(warped=warped, **rest)


def decoder_loss(
    model: GuidedDecoder, batch: DecoderBatch, config: DecoderTraining
) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "n 3 size size"], Float[Tensor, "n 3 size size"]]:
    """Return what is wrong in parts, and images to tell from each other: generated, true."""
    rgb, normals, logit = model(model.planes(batch.rgb, batch.normals, batch.warped))
    counts, mask = batch.counts, batch.mask
    made, true = composite(rgb, torch.sigmoid(logit)), composite(batch.truth, mask)
    inner = counts * mask
    colour = ((rgb - batch.truth).abs() * inner).mean() + ((made - true).abs() * counts).mean()
    size = normals.shape[-2:]
    wanted = interpolate(batch.truth_normals, size, mode="bilinear", align_corners=False)
    off = nn.functional.binary_cross_entropy_with_logits(logit, mask, reduction="none")
    terms = {
        "colour": colour,
        "gradients": config.gradients * _steps((made - true) * counts),
        "mask": config.mask * (off * counts).mean(),
        "normals": config.normals * ((normals - wanted).abs() * batch.exact).mean() / batch.exact.mean().clamp(min=0.1),
    }
    # What does not count must not be told from.
    shown = counts * made + (1 - counts) * true
    return terms, shown, true


def _steps(x: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def drawn(rows: Sequence[DecoderRows], config: DecoderTraining, step: int) -> DecoderBatch:
    """Draw a step's batch; a function of the step."""
    rng = np.random.default_rng((config.seed, step))
    kinds = [r for r in rows if not r.exact], [r for r in rows if r.exact]
    many = round(config.batch * config.photographs) if all(kinds) else config.batch * bool(kinds[0])
    parts = []
    for kind, n in zip(kinds, (many, config.batch - many), strict=True):
        if n:
            source = kind[rng.integers(len(kind))]
            parts.append(source.read(rng.choice(len(source.index), n)))
    batch = joined(parts)
    whole = batch.truth.shape[-1]
    box = None
    if rng.random() < config.cuts and whole > config.size:
        left, top = (int(x) for x in rng.integers(0, (whole - config.size) // 16 + 1, 2) * 16)
        box = (left, top)
    batch = at(batch, config.size, box)
    return mirrored(batch) if rng.random() < 0.5 else batch


def mirrored(batch: DecoderBatch) -> DecoderBatch:
    """Mirror rows, normals with their x."""

    def flipped(x: Tensor, turns: bool) -> Tensor:
        x = x.flip(-1)
        return torch.cat([1 - x[:, :1], x[:, 1:]], 1) if turns else x

    warped = {f.name: flipped(getattr(batch.warped, f.name), f.name == "pose") for f in fields(WarpedFrames)}
    names = ("rgb", "normals", "truth", "mask", "truth_normals", "counts")
    rest = {k: flipped(getattr(batch, k), "normals" in k) for k in names}
    return replace(batch, warped=WarpedFrames(**warped), **rest)


def train_decoder(
    run: Path, rows: Sequence[DecoderRows], config: DecoderTraining, val: Sequence[DecoderRows] = (),
    on_record: OnRecord = lambda record: None, start: GuidedDecoder | None = None,
) -> GuidedDecoder:  # fmt: skip
    """Train on rows and report on others; writes `run/decoder`, averaged. The same call resumes."""
    folder = RunFolder(run, config, frozenset({"steps"}), on_record=on_record)
    torch.manual_seed(config.seed)
    # Not in channels_last: on CPUs without bf16, gradients of convolutions then take twice as long.
    model, judge = GuidedDecoder(config.model), Discriminator()
    if start is not None:
        model.load_state_dict(start.state_dict())
    both = nn.ModuleDict({"model": model, "judge": judge})
    makes = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    tells = torch.optim.AdamW(judge.parameters(), 0.4 * config.lr, betas=(0.5, 0.99), weight_decay=1e-4)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first = 0
    if (found := folder.load()) is not None:
        tensors, first = found
        with folder.restoring():
            both.load_state_dict({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
            average.update({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
            restore_optimiser(makes, _part(tensors, "makes."))
            restore_optimiser(tells, _part(tensors, "tells."))
    begun, since = round(config.adversarial_from * config.steps), time.monotonic()
    for step in range(first, config.steps):
        rate = min(1.0, (step + 1) / config.warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / config.steps)))
        for optimiser, lr in ((makes, config.lr), (tells, 0.4 * config.lr)):
            optimiser.param_groups[0]["lr"] = lr * rate
        batch = drawn(rows, config, step)
        terms, made, true = decoder_loss(model, batch, config)
        telling = step >= begun
        if telling:
            judge.requires_grad_(False)
            score, features = judge(made)
            with torch.no_grad():
                _, wanted = judge(true)
            apart = [(a - b).abs().mean() for a, b in zip(features, wanted, strict=True)]
            terms["features"] = config.features * torch.stack(apart).sum()
            # Comes in gently: a discriminator knows nothing at first.
            terms["adversarial"] = -config.adversarial * min(1.0, (step - begun) / 200) * score.mean()
            judge.requires_grad_(True)
        loss = torch.stack(list(terms.values())).sum()
        makes.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        makes.step()
        if telling:
            told = relu(1 + judge(made.detach())[0]).mean() + relu(1 - judge(true)[0]).mean()
            tells.zero_grad(set_to_none=True)
            told.backward()
            tells.step()
        keep = min(config.ema, (step + 1) / (step + 10))
        for k, v in model.state_dict().items():
            average[k].lerp_(v, 1 - keep)
        last = step == config.steps - 1
        if step % config.log_every == 0 or last:
            record: dict[str, Any] = {"step": step, "loss": round(loss.item(), 4)}
            record |= {k: round(v.item(), 4) for k, v in terms.items()}
            if telling:
                record["told"] = round(told.item(), 3)
            if val and step and (step % config.validate_every == 0 or last):
                for r in val:
                    record |= {
                        f"{r.folder.name}_{k}": v for k, v in measured(averaged(config, average), r, config).items()
                    }
            record["seconds_per_step"] = round((time.monotonic() - since) / (step - first + 1), 2)
            folder.log(record)
        if (step + 1) % config.save_every == 0 or last:
            state = {f"net.{k}": v for k, v in both.state_dict().items()} | {
                f"average.{k}": v for k, v in average.items()
            }
            for name, optimiser in (("makes.", makes), ("tells.", tells)):
                state |= {name + k: v for k, v in optimiser_tensors(optimiser).items()}
            folder.save(state, step + 1)
    decoder = averaged(config, average)
    decoder.save(folder.path / "decoder")
    return decoder


def averaged(config: DecoderTraining, average: dict[str, Tensor]) -> GuidedDecoder:
    """Return a decoder with averaged weights."""
    model = GuidedDecoder(config.model)
    model.load_state_dict(average)
    return model.eval()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def measured(model: GuidedDecoder, rows: DecoderRows, config: DecoderTraining) -> dict[str, float]:
    """Compare with the truth, in the foreground: PSNR [dB] and sharpness (energy of gradients over the truth's), of
    what the decoder gives and of what the codec gave."""
    chosen = np.linspace(0, len(rows.index) - 1, min(config.val_rows, len(rows.index))).round().astype(int)
    found: dict[str, list[float]] = {k: [] for k in ("psnr", "psnr_codec", "sharp", "sharp_codec", "mask")}
    for i in chosen:
        batch = at(rows.read(np.array([i])), config.size, None)
        counts = batch.mask * batch.counts
        planes = model.planes(batch.rgb, batch.normals, batch.warped)
        rgb, _, logit = model(planes)
        for name, x in (("", rgb.clamp(0, 1)), ("_codec", planes[:, :3])):
            error = ((x - batch.truth).square() * counts).sum() / (3 * counts.sum())
            found["psnr" + name].append(-10 * math.log10(error.item()))
            found["sharp" + name].append((_energy(x, counts) / _energy(batch.truth, counts)).item())
        found["mask"].append((torch.sigmoid(logit) - batch.mask).abs().mean().item())
    return {k: round(float(np.mean(v)), 4) for k, v in found.items()}


def _energy(x: Float[Tensor, "n 3 h w"], where: Float[Tensor, "n 1 h w"]) -> Tensor:
    across = (x[..., 1:] - x[..., :-1]).square() * where[..., 1:]
    down = (x[..., 1:, :] - x[..., :-1, :]).square() * where[..., 1:, :]
    return across.sum() + down.sum()
