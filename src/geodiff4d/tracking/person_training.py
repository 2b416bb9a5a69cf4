"""Training of the network that tells the person from the background; the same command resumes an interrupted run."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from geodiff4d.core.rundir import OnRecord, RunFolder
from geodiff4d.tracking.averaged import checkpoint, cosine_rate, first_average, resume, update_average
from geodiff4d.tracking.cutouts import Cutouts
from geodiff4d.tracking.network import quick
from geodiff4d.tracking.person import PersonConfig, PersonNet
from geodiff4d.tracking.person_scenes import PersonCrops, PersonScenes

EDGE = 3.0
"""How much more a pixel counts where the truth changes."""


@dataclass(frozen=True)
class PersonTraining:
    """How the network is trained."""

    model: PersonConfig = field(default_factory=PersonConfig)
    steps: int = 4000
    batch: int = 8
    backgrounds: int = 256
    """Backgrounds that are made up before the first step."""
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 1e-3
    clip: float = 5.0
    ema: float = 0.998
    log_every: int = 25
    validate_every: int = 500
    save_every: int = 250
    val_batches: int = 8
    seed: int = 0


def train_person(
    run: Path, people: Cutouts, val: Cutouts, config: PersonTraining, start: PersonNet | None = None,
    on_record: OnRecord = lambda record: None,
) -> PersonNet:  # fmt: skip
    """Train on `people`, report on `val`; writes `run/person`, the averaged weights.

    `start` gives weights to go on from; a checkpoint in `run` goes before it.
    """
    folder = RunFolder(run, config, on_record=on_record)
    torch.manual_seed(config.seed)
    model = PersonNet(config.model)
    if start is not None:
        model.load_state_dict(start.state_dict())
    model = quick(model).train()
    optimiser = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    average = first_average(model)
    first = resume(folder, model, optimiser, average)
    scenes = PersonScenes(people, config.model.size, config.seed, config.backgrounds)
    checked = PersonScenes(val, config.model.size, 12345, min(config.backgrounds, 64))
    began = time.monotonic()
    for step in range(first, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * cosine_rate(step, config.steps, config.warmup)
        crops = scenes.crops(step, config.batch)
        terms = person_loss(model(crops.images, crops.heads), crops)
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        update_average(average, model, min(config.ema, (step + 1) / (step + 10)))
        last = step == config.steps - 1
        if step % config.log_every == 0 or last:
            record: dict[str, Any] = {"step": step, "loss": round(loss.item(), 4)}
            record |= {k: round(v.item(), 4) for k, v in terms.items()}
            if step and (step % config.validate_every == 0 or last):
                record |= validate(_averaged(config, average), checked, config.val_batches)
            record["seconds_per_step"] = round((time.monotonic() - began) / (step - first + 1), 3)
            folder.log(record)
        if (step + 1) % config.save_every == 0 or last:
            folder.save(checkpoint(model, optimiser, average), step + 1)
            _averaged(config, average).save(folder.path / "person")
    network = _averaged(config, average)
    network.save(folder.path / "person")
    return network


def person_loss(logits: Float[Tensor, "b 1 size size"], truth: PersonCrops) -> dict[str, Float[Tensor, ""]]:
    """Sum up what the network got wrong: everywhere, more where the truth changes, and the change itself."""
    alpha = truth.alpha
    rise = (alpha[..., 1:] - alpha[..., :-1], alpha[..., 1:, :] - alpha[..., :-1, :])
    edge = torch.zeros_like(alpha)
    edge[..., 1:] += rise[0].abs()
    edge[..., 1:, :] += rise[1].abs()
    shown = truth.shown
    weight = (1 + EDGE * torch.nn.functional.max_pool2d(edge, 7, 1, 3).clamp(max=1)) * shown
    told = logits.sigmoid()
    across = (told[..., 1:] - told[..., :-1] - rise[0]).abs() * shown[..., 1:]
    down = (told[..., 1:, :] - told[..., :-1, :] - rise[1]).abs() * shown[..., 1:, :]
    change = across.mean() + down.mean()
    return {
        "likelihood": (bce(logits, alpha, reduction="none") * weight).mean(),
        "off": ((told - alpha).abs() * weight).mean(), "change": 2 * change,
    }  # fmt: skip


@torch.no_grad()
def validate(model: PersonNet, scenes: PersonScenes, batches: int) -> dict[str, float]:
    """Measure on other people before other backgrounds: IoU, and the mean error beyond the tracked mesh, of 1."""
    overlap, beyond, background = [], [], []
    for k in range(batches):
        crops = scenes.crops(k, 16)
        told = model(crops.images, crops.heads).sigmoid()
        told, alpha = told * crops.shown, crops.alpha * crops.shown
        m, t = told > 0.5, alpha > 0.5
        overlap.append((m & t).sum((1, 2, 3)) / (m | t).sum((1, 2, 3)).clamp(min=1))
        outside = (1 - crops.heads[:, :1]) * crops.shown
        beyond.append(((told - alpha).abs() * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp(min=1))
        empty = (crops.alpha < 0.02) * crops.shown
        background.append((told * empty).sum((1, 2, 3)) / empty.sum((1, 2, 3)).clamp(min=1))
    return {
        "val_iou": round(float(torch.cat(overlap).mean()), 4), "val_beyond": round(float(torch.cat(beyond).mean()), 4),
        "val_background": round(float(torch.cat(background).mean()), 4),
    }  # fmt: skip


def _averaged(config: PersonTraining, average: dict[str, Tensor]) -> PersonNet:
    model = PersonNet(config.model)
    model.load_state_dict(average)
    return quick(model).eval()
