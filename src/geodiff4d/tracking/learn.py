"""Training of the perception network on rendered people; the same command resumes an interrupted run."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import smooth_l1_loss

from geodiff4d.core.precision import bf16_is_native
from geodiff4d.core.rundir import OnRecord, RunFolder
from geodiff4d.tracking.averaged import checkpoint, cosine_rate, first_average, resume, update_average
from geodiff4d.tracking.network import Look, Perception, PerceptionConfig, quick
from geodiff4d.tracking.people import People
from geodiff4d.tracking.scenes import Crops, Pictures, Scenes

SHARPNESS = 0.7
"""How much more a point counts that the network is surer of: the power of one over its standard deviation."""


@dataclass(frozen=True)
class PerceptionTraining:
    """How the perception network is trained."""

    model: PerceptionConfig = field(default_factory=PerceptionConfig)
    steps: int = 8000
    batch: int = 16
    """Crops per step, for the looker; 0 leaves it as it is."""
    pictures: int = 8
    """Whole pictures per step, for the finder; 0 leaves it as it is."""
    sizes: tuple[tuple[float, int], ...] = ((0.3, 96),)
    """Sides of the crops at first, where steps are cheaper: (until which share of the steps, [px])."""
    backgrounds: int = 192
    """Backgrounds that are drawn before the first step."""
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 1e-3
    clip: float = 5.0
    ema: float = 0.998
    autocast: bool = True
    """bf16 where the machine has it."""
    log_every: int = 25
    validate_every: int = 250
    save_every: int = 250
    seed: int = 0


def train_perception(
    run: Path, people: People, val: People, config: PerceptionTraining, start: Perception | None = None,
    on_record: OnRecord = lambda record: None,
) -> Perception:  # fmt: skip
    """Train on `people`, report on `val`; writes `run/perception`, the averaged weights.

    `start` gives weights to go on from; a checkpoint in `run` goes before it.
    """
    folder = RunFolder(run, config, on_record=on_record)
    torch.manual_seed(config.seed)
    model = Perception(config.model, people.markup)
    if start is not None:
        model.load_state_dict(start.state_dict())
    model = quick(model).train()
    optimiser = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    average = first_average(model)
    first = resume(folder, model, optimiser, average)
    scenes = Scenes(people, config.model.shapes, config.seed, config.backgrounds)
    checked = Scenes(val, config.model.shapes, 12345, min(config.backgrounds, 32))
    half, began = config.autocast and bf16_is_native(torch.device("cpu")), time.monotonic()
    for step in range(first, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * cosine_rate(step, config.steps, config.warmup)
        size = next((s for share, s in config.sizes if step < share * config.steps), config.model.size)
        terms: dict[str, Tensor] = {}
        if config.batch:
            crops = scenes.crops(step, config.batch, size)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                look = model.look(crops.images)
            terms |= look_loss(look, crops)
        if config.pictures:
            pictures = scenes.pictures(step, config.pictures)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found = model.find(pictures.images)
            terms |= find_loss(found, pictures)
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        update_average(average, model, min(config.ema, (step + 1) / (step + 10)))
        last = step == config.steps - 1
        if step % config.log_every == 0 or last:
            record: dict[str, Any] = {"step": step, "loss": round(loss.item(), 3)}
            record |= {k: round(v.item(), 3) for k, v in terms.items()}
            if step and (step % config.validate_every == 0 or last):
                record |= validate(_averaged(config, people, average), checked, size)
            record["seconds_per_step"] = round((time.monotonic() - began) / (step - first + 1), 3)
            folder.log(record)
        if (step + 1) % config.save_every == 0 or last:
            folder.save(checkpoint(model, optimiser, average), step + 1)
            _averaged(config, people, average).save(folder.path / "perception")
    perception = _averaged(config, people, average)
    perception.save(folder.path / "perception")
    return perception


def look_loss(look: Look, truth: Crops) -> dict[str, Float[Tensor, ""]]:
    """Sum up what the looker got wrong, in parts."""
    inside = ((truth.points > -0.02) & (truth.points < 1.02)).all(-1) * truth.face[:, None]
    # Within a crop, points that can be placed exactly count more than those under hair.
    n = look.points.shape[1]
    weight = inside * (-SHARPNESS * look.log_sigma.detach()).softmax(1) * n
    total = inside.sum().clamp(min=1)
    off = (look.points - truth.points) * 100
    distance = smooth_l1_loss(off, torch.zeros_like(off), reduction="none", beta=0.5).sum(-1)
    # The likelihood teaches the uncertainty alone: it would let hard points go.
    squared = off.detach().square().sum(-1) / 1e4
    likelihood = 0.5 * squared * torch.exp(-2 * look.log_sigma) + 2 * look.log_sigma
    face = truth.face[:, None, None, None]
    clear = truth.clear * (0.2 + 0.8 * face)
    dense = look.dense
    normals = (dense[:, 1:] * truth.foreground - truth.normal).abs().sum(1, keepdim=True) * clear
    guess = (look.rotation - truth.turn).abs().sum((1, 2)) * truth.face
    shape = (look.shape - truth.shape).square().mean(1) * truth.face
    people = truth.face.sum().clamp(min=1)
    return {
        "points": 0.5 * (distance * weight).sum() / total,
        "heat": (heat_loss(look, truth.points.clamp(0, 1)) * weight).sum() / total,
        "likelihood": 0.1 * (likelihood * inside).sum() / total,
        "face": 2 * bce(look.score, truth.face),
        "mask": 3 * (bce(dense[:, :1], truth.foreground, reduction="none") * clear).mean(),
        "normals": 2 * normals.sum() / (truth.foreground * clear).sum().clamp(min=1),
        "turn": 0.5 * guess.sum() / people,
        "shape": 0.3 * shape.sum() / people,
    }  # fmt: skip


def heat_loss(look: Look, points: Float[Tensor, "b points 2"]) -> Float[Tensor, "b points"]:
    """Cross-entropy of the heat maps with the four cells around the truth, whose weighted mean it is.

    It makes integral regression learn fast: a mean alone does not say which cells are wrong.
    """
    h, w = look.heat.shape[-2:]
    flat = look.heat.flatten(2)
    x, y = ((points[..., k] * n - 0.5).clamp(0, n - 1.001) for k, n in ((0, w), (1, h)))
    column, row = x.long(), y.long()
    fx, fy = x - column, y - row
    total = torch.zeros_like(fx)
    for dy, wy in ((0, 1 - fy), (1, fy)):
        for dx, wx in ((0, 1 - fx), (1, fx)):
            cell = (row + dy) * w + column + dx
            total = total - wx * wy * flat.gather(2, cell[..., None])[..., 0]
    return total


def find_loss(found: Float[Tensor, "b 6 rows columns"], truth: Pictures) -> dict[str, Float[Tensor, ""]]:
    """Sum up what the finder got wrong: a focal loss where faces are, distances where they are."""
    there = truth.target[:, 0]
    p = found[:, 0].sigmoid()
    weight = torch.where(there > 0, (1 - p).square(), p.square()) * ~truth.ignored
    positive = there.sum().clamp(min=1)
    centre = bce(found[:, 0], there, reduction="none") * weight
    where = (found[:, 1:] - truth.target[:, 1:]).abs().sum(1) * there
    return {"found": 2 * centre.sum() / positive, "where": where.sum() / positive}


@torch.no_grad()
def validate(model: Perception, scenes: Scenes, size: int, batches: int = 4) -> dict[str, float]:
    """Measure on crops (of side `size`) and pictures of other people, degraded as in training.

    `val_px`: median over crops of the mean point distance, in pixels of a canonical crop of 256.
    """
    off, degrees, overlap, right, sure = [], [], [], [], []
    for k in range(batches):
        c = scenes.crops(k, 32, size)
        look = model.look(c.images)
        face = c.face > 0
        side = (c.points.amax(1) - c.points.amin(1)).amax(-1)
        px = (look.points - c.points).norm(dim=-1).mean(1) / side * 160
        off.append(px[face])
        n = torch.nn.functional.normalize(look.dense[:, 1:], dim=1, eps=1e-6)
        inside = (c.foreground[:, 0] > 0.9) & (c.clear[:, 0] > 0.9)
        cosine = (n * torch.nn.functional.normalize(c.normal, dim=1, eps=1e-6)).sum(1).clamp(-1, 1)
        degrees.append(cosine.acos().rad2deg()[inside])
        m, t = look.dense[:, 0] > 0, c.foreground[:, 0] > 0.5
        use = (c.clear[:, 0] > 0.5) & face[:, None, None]
        overlap.append((m & t & use).sum() / ((m | t) & use).sum())
        right.append(((look.score > 0) == face).float())
        p = scenes.pictures(k, 16)
        best = model.find(p.images)[:, 0].flatten(1).amax(1)
        sure.append(((best > 0) == (p.target[:, 0].flatten(1).amax(1) > 0)).float())
    return {
        "val_px": round(float(torch.cat(off).median()), 3),
        "val_normal_deg": round(float(torch.cat(degrees).mean()), 2),
        "val_iou": round(float(torch.stack(overlap).mean()), 4), "val_score": round(float(torch.cat(right).mean()), 4),
        "val_found": round(float(torch.cat(sure).mean()), 4),
    }  # fmt: skip


def _averaged(config: PerceptionTraining, people: People, average: dict[str, Tensor]) -> Perception:
    model = Perception(config.model, people.markup)
    model.load_state_dict(average)
    return quick(model).eval()
