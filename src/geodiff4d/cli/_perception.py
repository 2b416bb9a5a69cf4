"""The `perception` stage of `geodiff4d train`: render people, then train the network that tracking looks with."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiff4d.presets import PerceptionStage


def train(
    out: Path,
    stage: "PerceptionStage",
    data: Path | None,
    start: Path | None,
    steps: int | None,
    workers: int,
    seed: int,
) -> None:
    """Render the stores if they are missing, then train; the same call resumes."""
    from dataclasses import replace

    from geodiff4d.cli.progress import bar, record_lines
    from geodiff4d.tracking.learn import train_perception
    from geodiff4d.tracking.network import load_perception
    from geodiff4d.tracking.people import build_people

    folder, stores = data or out / "data", {}
    for name, config in (("train", stage.people), ("val", stage.val_people)):
        stores[name] = build_people(folder / name, config, workers, bar)

    training = replace(stage.training, steps=steps or stage.training.steps, seed=seed)
    begin = None if start is None else load_perception(start)
    train_perception(out, stores["train"], stores["val"], training, begin, record_lines(training.steps))
    print(f"{out / 'perception'}: the network, for src/geodiff4d/assets/perception")
