"""The `person` stage of `geodiff4d train`: render and track people, then train the network that cuts them out."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiff4d.presets import PersonStage


def train(
    out: Path, stage: "PersonStage", data: Path | None, start: Path | None, steps: int | None, workers: int, seed: int,
    photographs: Path | None,
) -> None:  # fmt: skip
    """Render people and track photographs if they are missing, then train; the same call resumes."""
    from dataclasses import replace

    from geodiff4d.cli._photographs import tracked_photographs
    from geodiff4d.cli.progress import bar, record_lines
    from geodiff4d.core.progress import advancing
    from geodiff4d.data.footage.clips import clips_below
    from geodiff4d.data.world_clips import is_complete, write_world
    from geodiff4d.tracking.cutouts import gather_cutouts, is_held_out
    from geodiff4d.tracking.person import load_person_net
    from geodiff4d.tracking.person_training import train_person
    from geodiff4d.world.seeds import Split

    folder, p = data or out / "data", stage.people
    clips: dict[str, list[Path]] = {"train": [], "val": []}
    splits: tuple[tuple[Split, int], ...] = ("train", p.subjects), ("val", p.val_subjects)
    for split, count in splits:
        place = folder / "rendered" / split
        todo = [s for s in range(count) if not is_complete(place / f"{split}_{s}", p.frames, p.views, p.size)]
        with advancing(bar, f"{split} people", len(todo)) as advance:
            for _ in write_world(place, split, todo, p.frames, p.views, p.size, workers):
                advance(1)
        clips[split] += clips_below(place)
    if photographs is not None:
        for clip in clips_below(tracked_photographs(photographs, folder / "photographs", 2 * p.size, workers)):
            clips["val" if is_held_out(clip) else "train"].append(clip)

    training = replace(stage.training, steps=steps or stage.training.steps, seed=seed)
    cut = {split: gather_cutouts(paths, training.model.size, bar) for split, paths in clips.items()}
    first = None if start is None else load_person_net(start)
    train_person(out, cut["train"], cut["val"], training, first, record_lines(training.steps))
    print(f"{out / 'person'}: the network, for src/geodiff4d/assets/person")
