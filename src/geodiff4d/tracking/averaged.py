"""What the trainings of tracking's networks share: rates, averaged weights, and checkpoints with them."""

import math

import torch
from torch import Tensor, nn

from geodiff4d.core.rundir import RunFolder, optimiser_tensors, restore_optimiser


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate as a share of the highest: up in a line, down along a cosine to a hundredth."""
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def first_average(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the weights and buffers, from which their average starts."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def update_average(average: dict[str, Tensor], model: nn.Module, keep: float) -> None:
    """Move the average towards the model, in place: `keep` of it stays."""
    for k, v in model.state_dict().items():
        if v.is_floating_point():
            average[k].lerp_(v, 1 - keep)
        else:
            average[k].copy_(v)


def checkpoint(model: nn.Module, optimiser: torch.optim.Optimizer, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return everything that a training goes on from."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    return state | {f"average.{k}": v for k, v in average.items()} | optimiser_tensors(optimiser)


def resume(folder: RunFolder, model: nn.Module, optimiser: torch.optim.Optimizer, average: dict[str, Tensor]) -> int:
    """Restore what `checkpoint` returned, if the run has any; returns the next step."""
    found = folder.load()
    if found is None:
        return 0
    tensors, step = found
    with folder.restoring():
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        average.update({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
        restore_optimiser(optimiser, tensors)
    return step
