"""Encoded frames on disk: records of one size in `.npy` shards, and one binary index of what they hold.

The frames of one take and view are one recording, whose records follow each other: 16 frames of a clip are one range of
bytes, a driver from another camera is one record. Shards are memory-mapped, so that a sample reads what it is made of
and nothing else, and processes share what the system has read. A store is whole once its index is there.

A store may be elsewhere (`data.remote`): then ranges of records are fetched as they are asked for, and the latest of
them are kept.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, read_config, read_tensors, save_tensors
from geodiff4d.data.footage.take import HELD_OUT, Take
from geodiff4d.data.remote import RemoteFolder, remote_url
from geodiff4d.data.rowstore import open_rows

NOTE, INDEX = "encoded.json", "index.safetensors"
OPEN_SHARDS = 512
"""Shards of a store that stay mapped; a system allows a process some tens of thousands of mappings."""
MOTION = 61
"""OpenHead's 52 expression weights, jaw and gaze."""


@dataclass(frozen=True)
class RecordConfig:
    """What a record holds, and what made it."""

    size: int
    """Side of the images that were encoded [px]."""
    crop: int
    """Side of driving crops [px]."""
    grid: int
    """Side of the latent grid."""
    planes: int
    """Channels: latents of image and normals, and the pose map's planes."""
    encoded_pose: bool
    """Pose maps went through the codec, and were not resized."""
    codec: tuple[float, ...]
    """What the codec made of an image that is always the same (`video.encode.codec_probe`)."""
    portraits: bool
    """Images and head parameters are there too, for models that look at a warped portrait."""
    estimated: bool = False
    """Exact synthetic normals were degraded to an estimator's."""
    heads: tuple[str, ...] = ()
    params: int = 0
    """Numbers of the head parameters, the longest head's."""
    offsets: int = 0
    """Vertices of per-vertex offsets (VHAP), 0 if no clip has any."""
    made_of: str = ""
    """Tells the frames that were to be encoded from others."""
    version: int = 1

    def record(self) -> np.dtype:
        """Return the fields of a record; images and shares are bytes, latents half precision."""
        grid = (self.grid, self.grid)
        fields: list[Any] = [
            ("planes", "<f2", (self.planes, *grid)), ("cover", "u1", grid), ("focus", "u1", grid),
            ("crop", "u1", (3, self.crop, self.crop)), ("motion", "<f4", (MOTION,)), ("has_normal", "u1"),
        ]  # fmt: skip
        if self.portraits:
            fields += [
                ("image", "u1", (4, self.size, self.size)), ("K", "<f4", (3, 3)), ("T_cam_world", "<f4", (4, 4)),
                ("params", "<f4", (self.params,)), ("moved", "<f4", (self.params,)),
            ]  # fmt: skip
        if self.offsets:
            fields.append(("offset", "<f4", (self.offsets, 3)))
        # The view's place among those that can be the portrait, and among those that can drive; -1 if it cannot.
        return np.dtype([*fields, ("portrait", "<i2"), ("driver", "<i2")])


@dataclass(frozen=True)
class Index:
    """The takes of a store, and where the recording of each of their views lies."""

    takes: list[Take]
    first: np.ndarray
    """[takes + 1]: where the views of a take begin among the recordings."""
    head: np.ndarray
    """[takes]: position of the take's head among the configuration's."""
    shard: np.ndarray
    row: np.ndarray
    """[recordings]: its first record, in its shard."""
    portrait: np.ndarray
    """Its place among the take's views that can be the portrait, the most frontal first; -1 if it cannot."""
    driver: np.ndarray
    """Among those that can drive."""

    def save(self, folder: Path) -> None:
        """Write the index: from then on the store can be opened."""
        names = [t.subject.encode() for t in self.takes]
        flags = [[t.temporal, t.motion, t.portraits, t.targets] for t in self.takes]
        tensors = {
            "names": np.frombuffer(b"".join(names), np.uint8), "name_bytes": np.array([len(n) for n in names]),
            "shape": np.array([t.present.shape for t in self.takes]).reshape(-1, 2),
            "timesteps": np.concatenate([t.timesteps for t in self.takes]).astype(np.int64),
            "present": np.packbits(np.concatenate([t.present.ravel() for t in self.takes])),
            "fps": np.array([t.fps for t in self.takes], np.float64), "flags": np.array(flags, np.uint8),
            "head": self.head, "shard": self.shard, "row": self.row, "portrait": self.portrait, "driver": self.driver,
        }  # fmt: skip
        with fresh_file(folder / INDEX) as file:
            save_tensors({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, file)

    @staticmethod
    def load(folder: Path) -> "Index":
        """Read an index, in about a second for ten thousand clips from many cameras.

        Raises:
            UserError: it is missing or damaged.
        """
        a = {k: v.numpy() for k, v in read_tensors(folder / INDEX).items()}
        try:
            names, ends = a["names"].tobytes(), np.cumsum(a["name_bytes"]).tolist()
            shape, steps = a["shape"].tolist(), np.cumsum(a["shape"][:, 0]).tolist()
            bits = np.cumsum(a["shape"].prod(1)).tolist()
            first = np.concatenate([[0], np.cumsum(a["shape"][:, 1])])
            present = np.unpackbits(a["present"], count=bits[-1] if bits else 0).astype(bool)
            known = [a[k] for k in ("shard", "row", "portrait", "driver")]
            lengths = {len(x) for x in (shape, ends, a["head"], a["fps"], a["flags"])}
            if len(lengths) != 1 or steps[-1] != len(a["timesteps"]) or {len(x) for x in known} != {int(first[-1])}:
                raise ValueError("its arrays do not fit each other")
            takes = []
            for i, (t, v) in enumerate(shape):
                temporal, motion, portraits, targets = (bool(x) for x in a["flags"][i])
                name = names[ends[i - 1] if i else 0 : ends[i]].decode()
                there = present[bits[i] - t * v : bits[i]].reshape(t, v)
                times = a["timesteps"][steps[i] - t : steps[i]]
                takes.append(Take(name, times, there, temporal, float(a["fps"][i]), motion, portraits, targets))
        except (KeyError, ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{folder / INDEX} is damaged ({reason}): remove it and encode again") from None
        return Index(takes, first, a["head"], *known)


class Shards:
    """The records of a store, mapped or fetched as they are asked for."""

    def __init__(self, folder: Path):
        """Open a store, on this machine or elsewhere.

        Raises:
            UserError: it was not finished, or is another version's, or cannot be reached.
        """
        self.folder, url = Path(folder), remote_url(folder)
        self._remote = None if url is None else RemoteRecords(RemoteFolder(url))
        if self._remote is None:
            self._open(self.folder)
        else:
            with TemporaryDirectory(prefix="geodiff4d-") as name:
                self._remote.copy_head(Path(name))
                self._open(Path(name))
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()

    def _open(self, copy: Path) -> None:
        """Read note and index, which are small, from a folder."""
        folder = self.folder if self._remote is None else self._remote.folder.url
        self.config = read_config(copy / NOTE, RecordConfig)
        if self.config.version != RecordConfig.version:
            raise UserError(
                f"{folder} is a store of version {self.config.version}: expected {RecordConfig.version}; encode again"
            )
        if not (copy / INDEX).exists():
            raise UserError(f"{folder} is unfinished: give the same `geodiff4d encode` command again to resume it")
        self.index = Index.load(copy)

    def read(self, shard: int, rows: Sequence[int], field: str) -> np.ndarray:
        """Copy one field of some records of a shard.

        Raises:
            UserError: the shard is missing, damaged or another store's, or cannot be reached.
        """
        if self._remote is not None:
            return self._remote.read(shard, rows, self.config.record())[field]
        mapped = self._mapped.get(shard)
        if mapped is None:
            name = shard_name(shard)
            mapped = open_rows(self.folder, [name])[name]
            if mapped.dtype != self.config.record():
                raise UserError(f"{self.folder / name}.npy is of another store: remove the folder and encode again")
            self._mapped[shard] = mapped
            while len(self._mapped) > OPEN_SHARDS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(shard)
        if rows and max(rows) >= len(mapped):
            raise UserError(f"{self.folder / shard_name(shard)}.npy has too few records: remove it and encode again")
        return np.array(mapped[field][list(rows)])


KEPT_BYTES = 256_000_000
"""Of records of a store that is elsewhere, in every process that reads it: a sample reads a record field by field."""
HEADER_BYTES = 16_384
"""At the head of a shard, enough to tell where its records begin."""


class RemoteRecords:
    """Records of a store that is elsewhere; the latest stay in memory."""

    def __init__(self, folder: RemoteFolder):
        self.folder = folder
        self._begins: dict[int, tuple[int, int]] = {}
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def copy_head(self, to: Path) -> None:
        """Copy note and index.

        Raises:
            UserError: there is no store, or it cannot be reached.
        """
        (to / NOTE).write_bytes(self.folder.read(NOTE))
        if self.folder.has(INDEX):
            (to / INDEX).write_bytes(self.folder.read(INDEX))

    def read(self, shard: int, rows: Sequence[int], kind: np.dtype) -> np.ndarray:
        """Return records of a shard; those that follow each other are fetched as one range.

        Raises:
            UserError: the shard cannot be reached, is damaged or another store's.
        """
        name = f"{shard_name(shard)}.npy"
        first, length = self._begin(shard, name, kind)
        if rows and max(rows) >= length:
            raise UserError(f"{self.folder.url}/{name} has too few records: upload it again")
        missing = sorted({row for row in rows if (shard, row) not in self._kept})
        runs = [[row for _, row in run] for _, run in groupby(enumerate(missing), lambda x: x[1] - x[0])]
        size, found = kind.itemsize, {row: self._kept[shard, row] for row in rows if row not in set(missing)}
        parts = [(first + run[0] * size, first + (run[-1] + 1) * size) for run in runs]
        for run, (start, stop), data in zip(
            runs, parts, self.folder.read_parts(name, parts) if parts else (), strict=True
        ):
            if len(data) != stop - start:
                raise UserError(f"{self.folder.url}/{name} is cut off: upload it again")
            found |= zip(run, np.frombuffer(data, kind), strict=True)
        for row in rows:
            self._kept[shard, row] = found[row]
            self._kept.move_to_end((shard, row))
        while len(self._kept) * size > KEPT_BYTES:
            self._kept.popitem(last=False)
        return np.array([found[row] for row in rows], kind)

    def _begin(self, shard: int, name: str, kind: np.dtype) -> tuple[int, int]:
        """Return where the records of a shard begin, and how many there are."""
        if shard not in self._begins:
            head = BytesIO(self.folder.read(name, 0, HEADER_BYTES))
            try:
                version = np.lib.format.read_magic(head)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                (length,), _, found = read[version](head)
            except (ValueError, KeyError, EOFError, SyntaxError) as error:
                reason = " ".join(str(error).split())[:100]
                raise UserError(f"{self.folder.url}/{name} is damaged ({reason}): upload it again") from None
            if found != kind:
                raise UserError(f"{self.folder.url}/{name} is of another store: upload one store to one folder")
            self._begins[shard] = head.tell(), length
        return self._begins[shard]


def shard_name(shard: int) -> str:
    """Return the name of a shard's file, without its ending."""
    return f"shard-{shard:05d}"


def is_store(folder: Path) -> bool:
    """Say whether a folder, here or elsewhere, is a store."""
    url = remote_url(folder)
    return (folder / NOTE).exists() if url is None else RemoteFolder(url).has(NOTE)


def stores_below(folder: Path, held_out: bool = False) -> list[Path]:
    """Return the stores of a folder, itself or those up to two below it (a fleet's); elsewhere it is one by itself.

    What lies in folders `val` is left out; with `held_out`, it is what is returned.
    """
    if is_store(folder):
        found = [folder]
    else:
        notes = [note for depth in ("*", "*/*") for note in folder.glob(f"{depth}/{NOTE}")] if folder.is_dir() else []
        found = sorted(p.parent for p in notes if p.parent.name != HELD_OUT)
    return sorted(p for f in {folder, *found} if is_store(p := f / HELD_OUT)) if held_out else found
