"""Files that are whole or absent, and model folders (`config.json` + safetensors shards)."""

import ctypes
import errno
import json
import lzma
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.jsontext import parse_json
from geodiff4d.core.packing import unpacked

Config = TypeVar("Config")

SHARD_BYTES = 15_000_000
MAX_ARRAYS_BYTES = 256 * 1024**2
"""What an .npz of a user's may unpack to; tracks of heads have some megabytes."""
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, OSError, RuntimeError,
    ValueError, KeyError, OverflowError, MemoryError,
)  # fmt: skip
"""What the standard library raises for a damaged archive."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2: paths as they are, and the flag that makes them change places."""
MARKER = ".geodiff4d"
"""In every folder that we write whole: the names in it, one a line, so that nothing else is ever replaced."""
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(part|old)")
"""Names of what is being written, and of what makes room for it."""
_LEFT: dict[Path, dict[str, list[Path]]] = {}
"""By folder, what others left there before this process wrote to it."""
STRAY = (".DS_Store", "Thumbs.db", "desktop.ini")
"""What file browsers leave."""
SIGNED = "provenance.json"
"""What `provenance` writes into a folder that is whole."""


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to that takes the place of `path` only if the block succeeds, and else is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = path.parent.absolute()
    if folder not in _LEFT:  # looked through once: some folders get ten thousand files
        _LEFT[folder] = _left_in(folder)
    for left in _LEFT[folder].pop(path.name, ()):
        remove(left)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all; dataclasses are turned into objects."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    with fresh_file(path) as temporary:
        temporary.write_text(json.dumps(plain, indent=1, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return parse_json(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:  # also numbers of thousands of digits, and deep nesting
        raise UserError(f"{path} is not valid JSON ({error})") from None


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has some keys.

    Raises:
        UserError: missing, not JSON, or without them.
    """
    value = read_json(path)
    absent = [key for key in keys if not isinstance(value, dict) or key not in value]
    if not isinstance(value, dict) or absent:
        raise UserError(f"{path} is damaged: expected an object with {', '.join(keys) or 'names'}; remove it")
    return value


def read_config(path: Path, kind: type[Config], default: Mapping[str, Any] | None = None) -> Config:
    """Read the JSON that `write_json` made of a configuration; lists become tuples.

    Raises:
        UserError: missing, not JSON, or not a configuration of this kind.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in {**(default or {}), **read_object(path)}.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is another version's, or damaged ({error}): remove its folder, it is made again"
        ) from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an .npz of plain arrays: nothing is unpickled, and sizes are looked at before anything is unpacked.

    Raises:
        UserError: missing, damaged, too large, or with objects in it.
    """
    path = Path(path)
    try:
        # A damaged archive would leave the file open, had numpy opened it.
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > MAX_ARRAYS_BYTES:
                raise UserError(f"{path} unpacks to {size:,} bytes: at most {MAX_ARRAYS_BYTES:,} are read")
            file.seek(0)
            with np.load(file, allow_pickle=False) as data:
                arrays = {k: data[k] for k in data.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected an .npz file") from None
    except ZIP_ERRORS as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged or holds more than plain arrays ({reason})") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "biufSU":
            raise UserError(f"{path}: {name} is {array.dtype}, expected real numbers or text")
    return arrays


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is missing or has damaged weights ({reason}): copy it again") from None


def refuse_foreign(path: Path, *inputs: Path) -> Path:
    """Check that a new folder may take the place of `path`; returns it resolved.

    Raises:
        UserError: it is a file, the folder one is in or one above it, the home folder, a folder with something in it
            that is not ours, or a folder with one of the `inputs`.
    """
    whole = Path(path).resolve()
    for file in (p for p in (whole, *whole.parents) if p.exists() and not p.is_dir()):
        raise UserError(f"{file} is a file: expected a folder to write to, or a new name")
    for kept, what in (
        (Path.cwd(), "the folder you are in"),
        (Path(os.environ.get("HOME") or "/"), "your home folder"),
    ):
        if whole in (kept.resolve(), *kept.resolve().parents):
            raise UserError(f"{path} is {what}, or one above it: give --out a new or empty folder")
    for source in inputs:
        if whole in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{source} lies in {path}, which would be replaced: give --out a new or empty folder")
    if whole.is_dir() and not _is_ours(whole):
        raise UserError(f"{path} holds files that geodiff4d did not write: give --out a new or empty folder")
    return whole


def _is_ours(folder: Path) -> bool:
    """Whether everything in a folder was written by us; nothing is, too."""
    marker = folder / MARKER
    known = marker.read_text(errors="replace").splitlines() if marker.is_file() else []
    return {p.name for p in folder.iterdir()} <= {MARKER, SIGNED, *STRAY, *known}


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` only if the block succeeds.

    What is in it then is noted in its `MARKER`: a later call replaces that, and nothing else.

    Raises:
        UserError: what is there is not ours to replace (`refuse_foreign`).
    """
    path = refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        names = sorted(p.name for p in temporary.iterdir())
        (temporary / MARKER).write_text("".join(f"{name}\n" for name in names))
        _take_place(temporary, path)
    finally:
        # What was there before, where it had to make room.
        shutil.rmtree(temporary, ignore_errors=True)
    for left in _left_in(path.parent).get(path.name, ()):
        remove(left)


def _take_place(temporary: Path, path: Path) -> None:
    """Put a folder in another's place; whenever the process dies, one of the two is there, and whole."""
    while True:
        if path.exists() and _exchanged(temporary, path):
            return
        old = _beside(path, "old")
        try:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)  # of the turn before
                os.replace(path, old)
            os.replace(temporary, path)
        except OSError as error:
            if old.exists() and not path.exists():
                os.replace(old, path)
            # Another process put its own there, or took it away, meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not temporary.exists():
                raise
        else:
            shutil.rmtree(old, ignore_errors=True)
            return


def _exchanged(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; returns False where the system cannot (Linux can)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def _beside(path: Path, kind: str) -> Path:
    """Name a temporary that no other process has."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _left_in(folder: Path) -> dict[str, list[Path]]:
    """Return what processes that are gone left in a folder, by the name that they wrote."""
    out: dict[str, list[Path]] = {}
    # A folder that may be written to and not listed keeps what is in it.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = TEMPORARY.fullmatch(entry.name)
            if found and _is_gone(int(found["pid"])):
                out.setdefault(found["name"], []).append(Path(entry.path))
    return out


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may read the folder's other files may read too."""
    # The library writes by way of a file that only its owner can read.
    path.touch()
    mode = path.stat().st_mode
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)
    path.chmod(mode)


def save_model(folder: Path, config: Any, state: dict[str, Tensor]) -> None:
    """Write a model folder: `config.json` and safetensors shards of at most 15 MB (a larger tensor stands alone)."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        n = tensor.numel() * tensor.element_size()
        if size and size + n > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += n
    with fresh_folder(folder) as tmp:
        write_json(tmp / "config.json", config)
        for i, shard in enumerate(shards):
            name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_tensors(shard, tmp / name)


def load_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model folder: (config, tensors by name, as stored but for what is packed in eight bits).

    Raises:
        UserError: the folder, its config or its weights are missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a model folder: expected config.json and model*.safetensors")
    config = read_object(folder / "config.json")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no weights: expected model.safetensors beside config.json")
    _, of, count = files[0].stem.partition("-of-")
    if of and count.isdigit() and int(count) != len(files):
        raise UserError(f"{folder} has {len(files)} of {int(count)} weight files: copy the folder again")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_tensors(file)
    return config, unpacked(state)
