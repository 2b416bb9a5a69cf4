"""The `identity` stage of `geodiff4d train`: fit the open measure of identity to rendered people."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiff4d.presets import IdentityStage


def train(out: Path, stage: "IdentityStage", seed: int) -> None:
    """Render people, fit the projection, and say how well it separates people it has not seen."""
    from dataclasses import replace

    from geodiff4d.cli.progress import bar
    from geodiff4d.evaluate.identity_training import train_identity

    found = train_identity(out, replace(stage, seed=seed), bar)
    print("  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    print(f"{out / 'identity'}: the projection, for src/geodiff4d/assets/identity")
