"""What a driver's latent says, and what it should not: agreement between views and persons, and linear probes.

Usage: `.venv/bin/python tools/latent_probe.py STORE [--model DIR]`. STORE is rendered with `StoreConfig.strangers`:
its people make every expression before several cameras, and somebody else makes it too. Prints a Markdown table:

- *views*, *persons*: cosine between what the latent changes by, from one instant to another, as two cameras see the
  same person, and as two persons make the same expressions (1: nothing but the expression);
- *expression*: share of the coefficients' variance that a linear map explains on people it was not fitted to, of their
  own crops and of the other person's;
- *identity*: how often a linear map tells whose face it is, of so many people, at instants that it was not fitted to;
- *pose*: share of the variance of the head's turn before the camera (rotation vector) that a linear map explains.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import matrix_to_axis_angle
from geodiff4d.data.footage.rendered import Store
from geodiff4d.data.rowstore import take
from geodiff4d.pipeline import SHIPPED_MODEL
from geodiff4d.video.model import load_video_model

RIDGE = 0.02
"""Strength of the probes' ridge, over the latents' variance and the number of rows."""


@dataclass(frozen=True)
class Args:
    """Options of the probe."""

    store: Annotated[Path, tyro.conf.Positional]
    """A rendered store with strangers."""
    model: Path = SHIPPED_MODEL
    """Whose expression encoder is probed."""


def fitted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (weights, bias) of a ridge regression."""
    a, b = x.mean(0), y.mean(0)
    centred = x - a
    gram = centred.T @ centred + RIDGE * len(x) * centred.var() * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (y - b))
    return weights, b - a @ weights


def explained(y: np.ndarray, guess: np.ndarray) -> float:
    """Return the share of the variance that a guess explains, over all columns together."""
    return 1 - float(np.square(y - guess).sum() / np.square(y - y.mean(0)).sum())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


@torch.no_grad()
def latents(encoder: torch.nn.Module, crops: np.ndarray) -> np.ndarray:
    """Encode crops [people, instants, 3, size, size]."""
    flat = crops.reshape(-1, *crops.shape[2:])
    parts = [encoder(take(flat, (slice(k, k + 128),), 255.0)) for k in range(0, len(flat), 128)]
    return torch.cat(parts).numpy().reshape(*crops.shape[:2], -1)


def main(args: Args) -> None:
    store, encoder = Store(args.store), load_video_model(args.model).expression.eval()
    if not store.config.strangers or store.config.instants < 3:
        raise UserError(f"{args.store} has no strangers, or fewer than three instants: render it with both")
    people, instants, views = store.config.shape
    own = np.stack([latents(encoder, store.crop[:, :, v]) for v in range(views)], 2)
    other = latents(encoder, store.stranger)
    changes = [z - np.roll(z, 1, 1) for z in (own[:, :, 0], own[:, :, -1], other)]

    expr = np.array(store.expr)
    known = np.arange(people) < 0.8 * people
    repeat = lambda y: np.repeat(y[:, :, None], views, 2).reshape(-1, y.shape[-1])  # noqa: E731
    flat = lambda z: z.reshape(-1, z.shape[-1])  # noqa: E731
    w, b = fitted(flat(own[known]), repeat(expr[known]))
    says = [
        explained(repeat(expr[~known]), flat(own[~known]) @ w + b),
        explained(flat(expr[~known]), flat(other[~known]) @ w + b),
    ]

    R = torch.from_numpy(np.array(store.T_cam_world[..., :3, :3] @ store.T_world_joint[:, :, None, 1, :3, :3]))
    upright = torch.diag(torch.tensor([1.0, -1.0, -1.0]))  # from a face that looks into the camera
    turn = matrix_to_axis_angle((upright @ R).reshape(-1, 3, 3)).reshape(people, instants, views, 3).numpy()
    w, b = fitted(flat(own[known]), flat(turn[known]))
    pose = explained(flat(turn[~known]), flat(own[~known]) @ w + b)

    names = np.eye(people)
    seen = slice(0, instants - 1)
    w, b = fitted(flat(own[:, seen]), names.repeat((instants - 1) * views, 0))
    right = (own[:, -1] @ w + b).argmax(-1) == np.arange(people)[:, None]

    print("| latent of | views | persons | expression | of strangers | identity | chance | pose |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {args.model.name} | {cosine(*changes[:2]):.2f} | {cosine(changes[0], changes[2]):.2f} | {says[0]:.2f} | "
        f"{says[1]:.2f} | {right.mean():.2f} of {people} | {1 / people:.3f} | {pose:.2f} |"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
