"""Training of the face reader on rendered faces; the same command resumes an interrupted run.

A coefficient's error counts over its own spread, so that small actions are learnt as well as large ones, and once more
as the motion of the skin that it means, so that what looks alike is not told apart at the cost of what does not.
"""

import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from geodiff4d.core.rundir import OnRecord, RunFolder
from geodiff4d.render.viewpoints import openhead
from geodiff4d.tracking.averaged import checkpoint, first_average, resume, update_average
from geodiff4d.tracking.network import quick
from geodiff4d.tracking.reader import EXPRS, STILL, FaceReader, Raw, ReaderConfig
from geodiff4d.tracking.reader_data import Faces, visible_skin
from geodiff4d.tracking.reader_measure import Agreement, agreement, fitted_calibration
from geodiff4d.tracking.reader_photographs import Photographs, agreed, draw_looks, photograph_loss
from geodiff4d.tracking.reader_scenes import FaceCrops, FaceScenes

LEAST_SPREAD = 0.04
"""Smallest spread of a target that its error is divided by [coefficient or rad]."""


@dataclass(frozen=True)
class ReaderTraining:
    """How the reader is trained."""

    model: ReaderConfig = field(default_factory=ReaderConfig)
    steps: int = 7000
    batch: int = 24
    sizes: tuple[tuple[float, int], ...] = ((0.65, 128),)
    """Sides of the crops at first, where steps are cheaper: (until which share of the steps, [px])."""
    backgrounds: int = 96
    lr: float = 1e-3
    trunk_lr: float = 0.3
    """Factor on the rate of a trunk that comes from an expression encoder."""
    warmup: int = 150
    fall: float = 0.5
    """Share of the steps after which the learning rate falls, in a line to a hundredth."""
    weight_decay: float = 1e-2
    clip: float = 5.0
    ema: float = 0.998
    log_every: int = 25
    validate_every: int = 500
    save_every: int = 250
    val_rows: int = 576
    photographs: int = 4
    """Unlabelled photographs per step, where there are any."""
    seed: int = 0


def train_reader(
    run: Path, faces: Faces, val: Faces, config: ReaderTraining, start: FaceReader | None = None,
    photographs: Photographs | None = None, on_record: OnRecord = lambda record: None,
    encoder: dict[str, Tensor] | None = None,
) -> FaceReader:  # fmt: skip
    """Train on `faces` and unlabelled `photographs`, report on `val`; writes `run/reader`, averaged and calibrated.

    `start` gives weights to go on from; a checkpoint in `run` goes before it. `encoder` gives the weights of an
    expression encoder (`video/expression.py`), whose trunk the reader starts from.
    """
    folder = RunFolder(run, config, frozenset({"steps"}), on_record=on_record)
    torch.manual_seed(config.seed)
    model = FaceReader(config.model)
    if start is not None:
        model.load_state_dict(start.state_dict())
    else:
        model.spread.copy_(target_spread(faces))
        if encoder is not None:
            model.take_trunk(encoder)
    quick(model).train()
    optimiser = _optimiser(model, config, encoder is not None)
    average = first_average(model)
    first = resume(folder, model, optimiser, average)
    scenes = FaceScenes(faces, config.seed, config.backgrounds)
    checked = FaceScenes(val, 12345, min(config.backgrounds, 32))
    teacher = averaged(config, average)
    began, rows = time.monotonic(), faces.ready()
    for step in range(first, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * group["factor"] * rate(step, config)
        size = next((s for share, s in config.sizes if step < share * config.steps), config.model.size)
        if step % 100 == 0:
            rows = faces.ready()
        chosen = np.random.default_rng((config.seed, step)).choice(rows, config.batch)
        batch = scenes.crops(step, chosen, size)
        # Dropout's draws depend on the step alone, so that a resumed run goes on as it would have.
        torch.manual_seed(config.seed * 1_000_003 + step)
        if photographs is None:
            terms = reader_loss(model, model(batch.images), batch)
        else:
            looks = draw_looks(photographs, step, config.photographs, size)
            teacher.load_state_dict(average)
            wanted = agreed(teacher, looks.clean)
            raw, real = model(torch.cat([batch.images, looks.images])).split(config.batch)
            terms = reader_loss(model, raw, batch) | photograph_loss(real, looks, wanted, model.spread)
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        update_average(average, model, min(config.ema, (step + 1) / (step + 10)))
        last = step == config.steps - 1
        if step % config.log_every == 0 or last:
            record: dict[str, Any] = {"step": step, "loss": round(loss.item(), 3), "rows": len(rows)}
            record |= {k: round(v.item(), 3) for k, v in terms.items()}
            if step and (step % config.validate_every == 0 or last):
                record |= validate(averaged(config, average), checked, size, config.val_rows).rounded()
            record["seconds_per_step"] = round((time.monotonic() - began) / (step - first + 1), 3)
            folder.log(record)
        if (step + 1) % config.save_every == 0 or last:
            folder.save(checkpoint(model, optimiser, average), step + 1)
    reader = averaged(config, average)
    calibrate(reader, checked)
    reader.save(folder.path / "reader")
    return reader


def _optimiser(model: FaceReader, config: ReaderTraining, pretrained: bool) -> torch.optim.AdamW:
    trunk = [*model.face.parameters(), *model.to_latent.parameters()]
    known = {id(p) for p in trunk}
    groups: list[dict[str, Any]] = [
        {"params": trunk, "factor": config.trunk_lr if pretrained else 1.0},
        {"params": [p for p in model.parameters() if id(p) not in known], "factor": 1.0},
    ]
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)


def rate(step: int, config: ReaderTraining) -> float:
    """Return the learning rate as a share of the highest: up in a line, level, then down in a line."""
    left = (1 - step / config.steps) / max(1 - config.fall, 1e-6)
    return min(1.0, (step + 1) / config.warmup) * max(min(1.0, left), 0.01)


def target_spread(faces: Faces, most: int = 20000) -> Float[Tensor, " targets"]:
    """Return each target's standard deviation over the faces, 0 for what never moves."""
    rows = faces.ready()[:most]
    labels = torch.cat([torch.from_numpy(faces.rows[k][rows]) for k in ("expr", "jaw", "eyes")], 1)
    spread = labels.double().std(0, unbiased=False).float().clamp(min=LEAST_SPREAD)
    spread[list(STILL)] = 0
    return spread


@lru_cache
def skin_motion() -> Float[Tensor, "52 52"]:
    """Return what a product of two expressions' skin motions is made of: eᵀ G e, over the mean action's."""
    basis = openhead().expr_basis[visible_skin()].reshape(-1, EXPRS)
    G = basis.T @ basis
    moving = [i for i in range(EXPRS) if i not in STILL]
    return G / G.diagonal()[moving].mean()


def reader_loss(model: FaceReader, raw: Raw, truth: FaceCrops) -> dict[str, Float[Tensor, ""]]:
    """Sum up what the reader got wrong, in parts."""
    spread = model.spread
    moves = (spread > 0).float()
    off = (raw.value - (truth.targets - model.centre) / spread.clamp(min=1e-6)) * moves
    skin = (off * spread)[:, :EXPRS]
    motion = torch.einsum("bi,ij,bj->b", skin, skin_motion(), skin)
    # The likelihood teaches the doubt alone: it would let hard targets go.
    likelihood = 0.5 * off.detach().square() * torch.exp(-2 * raw.log_sigma) + raw.log_sigma
    inside = ((truth.points > -0.05) & (truth.points < 1.05)).all(-1, keepdim=True)
    distance = smooth_l1_loss(raw.points * 100, truth.points * 100, reduction="none", beta=1.0) * inside
    return {
        "targets": off.square().sum(1).mean() / moves.sum(),
        "motion": 0.3 * motion.mean(),
        "doubt": 0.1 * (likelihood * moves).sum(1).mean() / moves.sum(),
        "points": 0.1 * distance.sum() / inside.sum().clamp(min=1),
        "turn": 0.2 * (raw.rotation - truth.turn).abs().sum((1, 2)).mean(),
    }


@torch.no_grad()
def answers(reader: FaceReader, scenes: FaceScenes, size: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reader says of faces spread over a store, degraded as in training: (value, sigma, truth).

    Values are uncalibrated, in the targets' own units.
    """
    ready = scenes.faces.ready()
    chosen = ready[np.linspace(0, len(ready) - 1, min(rows, len(ready))).round().astype(int)]
    values, sigmas, truths = [], [], []
    for k in range(0, len(chosen), 32):
        batch = scenes.crops(k, chosen[k : k + 32], size)
        raw = reader(batch.images)
        values.append(raw.value * reader.spread + reader.centre)
        sigmas.append(raw.log_sigma.exp() * reader.spread)
        truths.append(batch.targets)
    return torch.cat(values), torch.cat(sigmas), torch.cat(truths)


def validate(reader: FaceReader, scenes: FaceScenes, size: int, rows: int) -> Agreement:
    """Measure on other people, degraded as in training."""
    value, sigma, truth = answers(reader, scenes, size, rows)
    return agreement(value, truth, sigma)


def calibrate(reader: FaceReader, scenes: FaceScenes, rows: int = 10**9) -> None:
    """Set the reader's gain and offset so that the truth regressed on what it says has slope 1, in place."""
    value, _, truth = answers(reader, scenes, reader.config.size, rows)
    gain, offset = fitted_calibration(value, truth)
    moves = (reader.spread > 0).float()
    reader.gain.copy_(gain * moves)
    reader.offset.copy_(offset * moves)


def averaged(config: ReaderTraining, average: dict[str, Tensor]) -> FaceReader:
    """Return a reader with averaged weights, to measure and to ship."""
    model = FaceReader(config.model)
    model.load_state_dict(average)
    return quick(model).eval()
