"""Encoded frames on disk: records of one size in `.npy` shards, and one binary index of what they hold.

The frames of one take and view are one recording, whose records follow each other: 16 frames of a clip are one range of
bytes, a driver from another camera is one record. Shards are memory-mapped, so that a sample reads what it is made of
and nothing else, and processes share what the system has read. A store is whole once its index is there.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, read_config, read_tensors, save_tensors
from geodiff4d.data.footage.take import Take
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
    """The records of a store, mapped as they are asked for."""

    def __init__(self, folder: Path):
        """Open a store.

        Raises:
            UserError: it was not finished, or is another version's.
        """
        self.folder = Path(folder)
        self.config = read_config(self.folder / NOTE, RecordConfig)
        if self.config.version != RecordConfig.version:
            raise UserError(
                f"{folder} is a store of version {self.config.version}: expected {RecordConfig.version}; encode again"
            )
        if not (self.folder / INDEX).exists():
            raise UserError(f"{folder} is unfinished: give the same `geodiff4d encode` command again to resume it")
        self.index = Index.load(self.folder)
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()

    def read(self, shard: int, rows: Sequence[int], field: str) -> np.ndarray:
        """Copy one field of some records of a shard.

        Raises:
            UserError: the shard is missing, damaged or another store's.
        """
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


def shard_name(shard: int) -> str:
    """Return the name of a shard's file, without its ending."""
    return f"shard-{shard:05d}"


def stores_below(folder: Path, held_out: str) -> list[Path]:
    """Return the stores of a folder, itself or those just below it; those in a folder `held_out` are left out."""
    if (folder / NOTE).exists():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted(p.parent for p in folder.glob(f"*/{NOTE}") if p.parent.name != held_out)
