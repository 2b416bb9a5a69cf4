"""Training data as rows on disk: memory-mapped arrays that several processes fill, one person at a time.

A store is a folder with one `.npy` file an array, a JSON note of the configuration it was made by, and `done.npy`, one
flag a person: those who are done are kept when an interrupted call is repeated.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import DTypeLike
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_config, write_json
from geodiff4d.core.progress import Progress
from geodiff4d.core.rundir import alone
from geodiff4d.core.workers import in_workers

Arrays = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and type of every array, by name."""


def create_rows(note: Path, config: Any, arrays: Arrays, constants: Mapping[str, np.ndarray]) -> None:
    """Make a store's files beside its note, the arrays all zero, unless they are there.

    Raises:
        UserError: the note is another configuration's, or another process makes the store.
    """
    folder = note.parent
    if note.exists():
        if read_config(note, type(config)) != config:
            raise UserError(f"{folder} holds a store of another configuration: name another folder or remove it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        try:
            for name, (shape, kind) in arrays.items():
                create_array(folder / f"{name}.npy", shape, kind)
        except OSError:
            for name in arrays:
                (folder / f"{name}.npy").unlink(missing_ok=True)
            raise
        for name, array in constants.items():
            np.save(folder / f"{name}.npy", array)
        write_json(note, config)


def create_array(path: Path, shape: tuple[int, ...], kind: DTypeLike) -> None:
    """Make an `.npy` file of zeros to be mapped into memory, all of its space on disk taken at once.

    A mapped file that finds the disk full when it is written to ends its process, by a signal, without a word.
    """
    np.lib.format.open_memmap(path, "w+", np.dtype(kind), shape).flush()
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()
            raise


def open_rows(
    folder: Path, names: Iterable[str], writable: bool = False, arrays: Arrays | None = None
) -> dict[str, np.ndarray]:
    """Map a store's arrays into memory, by name; nothing is read before it is indexed.

    Args:
        arrays: shapes and types that they must have, as far as they are known: an axis of 0 may be of any length.

    Raises:
        UserError: one is missing, damaged, or of another shape or type.
    """
    out = {}
    for path in (folder / f"{name}.npy" for name in names):
        try:
            out[path.stem] = np.lib.format.open_memmap(path, "r+" if writable else "r")
        except (ValueError, OSError, EOFError, SyntaxError, TypeError, MemoryError, OverflowError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{path} is missing or damaged ({reason}): remove {folder}, and it is made again") from None
        found = out[path.stem]
        shape, kind = (arrays or {}).get(path.stem, (found.shape, found.dtype))
        alike = len(shape) == found.ndim and all(n in (0, m) for n, m in zip(shape, found.shape, strict=True))
        if not alike or found.dtype != kind:
            raise UserError(
                f"{path} is {found.dtype} {list(found.shape)}, expected {np.dtype(kind)} {list(shape)}: remove "
                f"{folder}, and it is made again"
            )
    return out


class RowStore:
    """A finished store: its configuration, and arrays by attribute, mapped when they are first asked for."""

    NOTE: ClassVar[str]
    """Name of the configuration's file."""
    CONFIG: ClassVar[type]
    """Its type, whose method `arrays` says what there is."""
    CONSTANTS: ClassVar[tuple[str, ...]] = ()
    """Names of arrays beside those."""

    def __init__(self, folder: Path, writable: bool = False):
        """Open a store.

        Raises:
            UserError: there is none, it is another version's, or it was not finished (and is not to be written to).
        """
        self.folder, self.writable = Path(folder), writable
        if not (self.folder / self.NOTE).exists():
            raise UserError(f"{folder} is not a training store: expected {self.NOTE}; `geodiff4d train` builds one")
        self.config = read_config(self.folder / self.NOTE, self.CONFIG)
        try:
            finished = writable or self.done.all()
        except (TypeError, ValueError) as error:  # Sizes that are none.
            raise UserError(f"{folder} is a store of another version ({error}): remove it and build it again") from None
        if not finished:
            raise UserError(f"{folder} is unfinished: run the same `geodiff4d train` command again to resume it")

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_") or "config" not in vars(self) or name not in (*self.config.arrays(), *self.CONSTANTS):
            raise AttributeError(name)
        vars(self).update(open_rows(self.folder, [name], self.writable, self.config.arrays()))
        return vars(self)[name]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        # Memory-mapped arrays would travel to workers as copies.
        return type(self), (self.folder,)


def fill_rows(folder: Path, render: Callable[[Path, int], None], workers: int, progress: Progress) -> None:
    """Call `render(folder, s)`, which fills the rows, for every person whose flag is not set, and then set the flag.

    Raises:
        UserError: another process does so.
    """
    done = open_rows(folder, ["done"])["done"]
    if np.all(done):
        return
    with alone(folder):
        todo = np.nonzero(np.array(done) == 0)[0].tolist()
        work = in_workers(_filled, ((render, folder, s) for s in todo), workers)
        for _ in progress(work, f"rendering {folder.name} people", len(todo)):
            pass


def _filled(render: Callable[[Path, int], None], folder: Path, s: int) -> None:
    render(folder, s)
    open_rows(folder, ["done"], writable=True)["done"][s] = 1


def as_bytes(x: Float[Tensor, "*shape"]) -> np.ndarray:
    """Round values in [0, 1] to bytes."""
    return (x.clamp(0, 1) * 255).round().byte().numpy()


def take(array: np.ndarray, index: tuple, scale: float = 1.0) -> Float[Tensor, "*rows"]:
    """Copy rows of a memory-mapped array as float32, divided by `scale`."""
    return torch.from_numpy(np.array(array[index])).float().div_(scale)
