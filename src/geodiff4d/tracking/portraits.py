"""Track many portraits at once: single photographs become clips of one frame, for training and evaluation."""

from dataclasses import dataclass
from pathlib import Path

from geodiff4d.core.errors import UserError
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.workers import in_workers
from geodiff4d.heads import load_head
from geodiff4d.tracking.track import TrackingConfig, track

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class PortraitClips:
    """What became of a folder of photographs."""

    clips: list[Path]
    """Tracked clips of one frame, below the folder that was asked for as the photographs lie below theirs."""
    refused: dict[str, str]
    """Photographs that were left out, by their path, and why."""


def track_portraits(
    source: Path, out: Path, config: TrackingConfig, head: str = "openhead", workers: int = 2,
    progress: Progress = silent,
) -> PortraitClips:  # fmt: skip
    """Track every photograph below a folder, each to a clip of its own; those that are there already are kept.

    Raises:
        UserError: there is no folder, or nothing in it that can be tracked.
    """
    source, out = Path(source), Path(out)
    found = photographs_below(source)
    if not found:
        raise UserError(f"{source} has no photographs: expected images ({', '.join(SUFFIXES)}) in a folder")
    places = {path: out / path.relative_to(source).with_suffix("") for path in found}
    if len(set(places.values())) < len(found):
        raise UserError(f"{source} has photographs that differ in their endings alone: rename one of each")
    todo = [(path, place, config, head) for path, place in places.items() if not is_tracked(place)]
    refused: dict[str, str] = {}
    for path, problem in progress(in_workers(_track_one, todo, workers), "tracking portraits", len(todo)):
        if problem is not None:
            refused[str(path)] = problem
    clips = [place for place in places.values() if is_tracked(place)]
    if not clips:
        raise UserError(f"{source} has no photograph that can be tracked: {next(iter(refused.values()))}")
    return PortraitClips(clips, refused)


def photographs_below(folder: Path) -> list[Path]:
    """List a folder's images, and those of the folders below it, in the order of their paths.

    Raises:
        UserError: it is no folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: expected one with photographs")
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)


def is_tracked(folder: Path) -> bool:
    """Say whether a folder holds a finished clip."""
    return (folder / "transforms.json").exists()


def _track_one(path: Path, place: Path, config: TrackingConfig, head: str) -> tuple[Path, str | None]:
    try:
        track(path, place, load_head(head), config=config)
    except UserError as error:
        return path, str(error)
    return path, None
