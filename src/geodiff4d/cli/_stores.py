"""Rendered stores for training, with a bar while people are rendered."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from geodiff4d.cli.progress import bar
from geodiff4d.core.errors import UserError
from geodiff4d.data.store import Store, StoreConfig, build_store
from geodiff4d.data.tracks import TrackConfig, TrackStore, build_tracks
from geodiff4d.presets import Preset
from geodiff4d.render.viewpoints import openhead
from geodiff4d.tracking.relabel import render_tracked
from geodiff4d.world.seeds import Split

Built = TypeVar("Built")


def is_footage(folder: Path) -> bool:
    """Say whether a folder is a store or holds clips, and not the place where `train` renders stores."""
    if (folder / "store.json").exists() or (folder / "transforms.json").exists():
        return True
    # Deeper than this no importer and no tracker writes.
    return folder.is_dir() and any(next(folder.glob(f"{depth}transforms.json"), None) for depth in ("*/", "*/*/"))


def rendered_stores(folder: Path, p: Preset, workers: int) -> dict[str, Store]:
    """Render the preset's stores of single pictures below a folder, or open them.

    Raises:
        UserError: they would fill terabytes.
    """

    def built(name: Split, config: StoreConfig) -> Store:
        _refuse_terabytes(folder / name, config)
        render = render_tracked if config.parameters == "tracked" else None
        return with_bar(name, config.subjects, partial(build_store, folder / name, config, workers, render=render))

    return {"train": built("train", p.store), "val": built("val", p.val_store)}


def rendered_tracks(folder: Path, p: Preset, like: StoreConfig, workers: int) -> dict[str, TrackStore]:
    """Render the preset's tracks below a folder, in the sizes that a model needs, or open them.

    Raises:
        UserError: they would fill terabytes.
    """

    def built(name: Split, config: TrackConfig) -> TrackStore:
        sizes = replace(like, split=name)
        place = folder / f"{name}_tracks"
        _refuse_terabytes(place, config.store(sizes))
        return with_bar(
            f"{name} tracks", config.subjects, lambda show: build_tracks(place, config, sizes, workers, show)
        )

    return {"train": built("train", p.tracks), "val": built("val", p.val_tracks)}


def _refuse_terabytes(place: Path, config: StoreConfig) -> None:
    """Do not begin a store that no disk at hand holds."""
    if (place / "store.json").exists():
        return
    arrays = config.arrays(len(openhead().template)).values()
    terabytes = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in arrays) / 1e12
    if terabytes > 1:
        raise UserError(
            f"{place} would hold {math.prod(config.shape) / 1e6:.1f} million rendered pictures in {terabytes:.1f} TB: "
            "expected at most 1 TB; give --data your own clips, imported data sets, or stores rendered by a smaller "
            "preset (each is a folder with store.json or transforms.json)"
        )


def with_bar(name: str, people: int, build: Callable[[Callable[[int, int], None]], Built]) -> Built:
    """Call `build(show)` and let `show(done, total)` move a bar."""
    shown = iter(bar(range(people), f"rendering {name} people"))
    seen = 0

    def show(done: int, total: int) -> None:
        nonlocal seen
        while seen < done:
            next(shown, None)
            seen += 1

    built = build(show)
    next(shown, None)
    return built
