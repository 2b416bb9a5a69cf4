"""The `reader` stage of `geodiff4d train`: render faces, then train the network that reads their expression."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiff4d.presets import ReaderStage


def train(
    out: Path, stage: "ReaderStage", data: Path | None, start: Path | None, steps: int | None, workers: int, seed: int,
    photographs: Path | None,
) -> None:  # fmt: skip
    """Render the stores if they are missing, then train; the same call resumes."""
    from dataclasses import replace

    from geodiff4d.cli.progress import bar, record_lines
    from geodiff4d.core.files import load_model
    from geodiff4d.evaluate.reader_blend import measured_blend
    from geodiff4d.pipeline import SHIPPED_MODEL
    from geodiff4d.tracking.reader import load_reader
    from geodiff4d.tracking.reader_data import build_faces
    from geodiff4d.tracking.reader_photographs import gather_photographs
    from geodiff4d.tracking.reader_training import train_reader

    folder = data or out / "data"
    faces = build_faces(folder / "train", stage.faces, workers, bar)
    val = build_faces(folder / "val", stage.val_faces, workers, bar)

    training = replace(stage.training, steps=steps or stage.training.steps, seed=seed)
    real = None if photographs is None else gather_photographs(photographs, progress=bar)
    first = None if start is None else load_reader(start)
    encoder = load_model(SHIPPED_MODEL / "expression")[1] if stage.from_encoder and first is None else None
    reader = train_reader(out, faces, val, training, first, real, record_lines(training.steps), encoder)
    reader.blend.copy_(measured_blend(out / "performances", reader, *stage.measured_on, bar))
    reader.save(out / "reader")
    print(f"{out / 'reader'}: the reader, for src/geodiff4d/assets/reader")
