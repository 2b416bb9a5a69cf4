"""Which frames make a training sample: cross-view pairs (Sec. 3.1), deterministic in (seed, sample index)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairConfig:
    """How references, targets and driving frames are drawn."""

    references: int = 4
    """Subjects in a batch, one reference each."""
    targets: int = 6
    """Target frames that share a reference; they fill the frame axis."""
    cross_view: bool = True
    """Drive from another camera of the same instant; off, the driving frame is the target (`--ablate cross-view`)."""
    frontal_reference: float = 0.5
    """Share of references taken from camera 0; the rest comes from any that can serve."""
    reference_views: int = 2
    """Cameras, the first ones, that can serve as reference."""
    moved: float = 0.0
    """Share of targets whose warped portrait moves as their expression says; under the others it stands still."""


@dataclass(frozen=True)
class Pairs:
    """Indices into a store of subjects × instants × views."""

    subject: np.ndarray
    """[references]"""
    reference: np.ndarray
    """[references, 2]: instant and view."""
    target: np.ndarray
    """[references, targets, 2]: instant and view."""
    driving_view: np.ndarray
    """[references, targets]: the view that drives, at the target's instant."""
    moved: np.ndarray
    """[references, targets]: whether the warped portrait moves."""


def draw_pairs(store: tuple[int, int, int], config: PairConfig, seed: int, index: int) -> Pairs:
    """Draw the batch with a global index; the same whatever came before it, so resume and scaling are exact.

    `store` is (subjects, instants, views). The reference is of another instant than its targets wherever there is one.

    Raises:
        ValueError: cross-view pairing needs at least two views.
    """
    subjects, instants, views = store
    if config.cross_view and views < 2:
        raise ValueError(
            f"cross-view pairing needs two views of an instant, got {views}: render more or ablate cross-view"
        )
    rng = np.random.default_rng((seed, index))
    b, t = config.references, config.targets
    subject = rng.choice(subjects, b, replace=b > subjects)
    view = np.where(rng.random(b) < config.frontal_reference, 0, rng.integers(0, min(config.reference_views, views), b))
    instant = rng.integers(0, instants, b)
    away = rng.integers(1, instants, (b, t)) if instants > 1 else np.zeros((b, t), np.int64)
    target = np.stack([(instant[:, None] + away) % instants, rng.integers(0, views, (b, t))], -1)
    other = (target[..., 1] + rng.integers(1, views, (b, t))) % views if config.cross_view else target[..., 1]
    return Pairs(subject, np.stack([instant, view], -1), target, other, rng.random((b, t)) < config.moved)
