"""The `decoder` stage of `geodiff4d train`: frames of a video model beside the truth, then the network that finishes
them."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiff4d.presets import DecoderStage


def train(
    out: Path, stage: "DecoderStage", data: Path | None, start: Path | None, steps: int | None, workers: int, seed: int,
    photographs: Path | None,
) -> None:  # fmt: skip
    """Make the rows that are missing, then train; the same call resumes."""
    from dataclasses import replace

    from geodiff4d.cli._photographs import tracked_photographs
    from geodiff4d.cli.progress import bar, record_lines
    from geodiff4d.core.errors import UserError
    from geodiff4d.data.footage.clips import clips_below
    from geodiff4d.data.footage.take import HELD_OUT
    from geodiff4d.pipeline import SHIPPED_MODEL
    from geodiff4d.video.decoder_rows import build_decoder_rows
    from geodiff4d.video.model import load_video_model
    from geodiff4d.video.train_decoder import train_decoder

    folder, source = data or out / "data", start or SHIPPED_MODEL
    model = load_video_model(source)
    if not (model.config.warp and model.config.normals):
        raise UserError(
            f"{source} knows no warped portrait or no normals: expected a model of preset debug or embedded"
        )
    common = replace(stage.rows, model=str(Path(source).resolve()), low=model.config.size)
    configs = {
        "world": replace(common, source="world", people=stage.people),
        "world_val": replace(common, source="world", people=stage.val_people, split="val"),
    }
    if photographs is not None:
        photographs = tracked_photographs(photographs, folder / "clips", common.size, workers)
        for name, held_out in (("photographs", False), ("photographs_val", True)):
            clips = tuple(str(c.resolve()) for c in clips_below(photographs, held_out))
            if clips:
                configs[name] = replace(common, source="photographs", clips=clips)
        if "photographs" not in configs:
            raise UserError(f"{photographs} has no photographs but those in {HELD_OUT}: expected some to train on")
    rows = {name: build_decoder_rows(folder / name, config, workers, bar) for name, config in configs.items()}
    training = replace(stage.training, steps=steps or stage.training.steps, seed=seed)
    train, val = ([r for name, r in rows.items() if name.endswith("_val") == held] for held in (False, True))
    model.decoder = train_decoder(out, train, training, val, record_lines(training.steps), model.decoder)
    model.save(out / "model")
    print(f"{out / 'model'}: the model with its decoder, for --model")
