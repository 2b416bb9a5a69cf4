"""Photographs that networks are trained on: tracked once, whichever stage asks first."""

from pathlib import Path


def tracked_photographs(folder: Path, place: Path, size: int, workers: int) -> Path:
    """Return a folder of tracked photographs: itself if it holds clips, else `place`, where they are tracked first.

    Raises:
        UserError: there is no folder, or nothing in it that can be tracked.
    """
    from geodiff4d.cli.progress import bar
    from geodiff4d.tracking.portraits import track_portraits
    from geodiff4d.tracking.track import TrackingConfig

    if any(Path(folder).rglob("transforms.json")):
        return folder
    track_portraits(folder, place, TrackingConfig(size=size), workers=workers, progress=bar)
    return place
