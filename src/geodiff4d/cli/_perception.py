"""The `perception` stage of `geodiff4d train`: render people, then train the network that tracking looks with."""

from pathlib import Path
from typing import Literal


def train(
    out: Path, preset: Literal["debug", "embedded"], data: Path | None, start: Path | None, steps: int | None,
    workers: int, seed: int,
) -> None:  # fmt: skip
    """Render the stores if they are missing, then train; the same call resumes."""
    from dataclasses import replace
    from functools import partial

    from geodiff4d.cli._stores import with_bar
    from geodiff4d.tracking.learn import PRESETS, train_perception
    from geodiff4d.tracking.network import load_perception
    from geodiff4d.tracking.people import build_people

    p = PRESETS[preset]
    folder, stores = data or out / "data", {}
    for name, config in (("train", p.people), ("val", replace(p.people, split="val", subjects=p.val_subjects))):
        stores[name] = with_bar(name, config.subjects, partial(build_people, folder / name, config, workers))

    def report(step: int, total: int, record: dict) -> None:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()), flush=True)

    training = replace(p.training, steps=steps or p.training.steps, seed=seed)
    begin = None if start is None else load_perception(start)
    train_perception(out, stores["train"], stores["val"], training, begin, report)
    print(f"{out / 'perception'}: the network, for src/geodiff4d/assets/perception")
