"""The compact form of an avatar: one quantised file with everything in it, for sending and for the web.

A zip with `config.json`, `compact.json` (what each tensor was) and the numbers: per-Gaussian columns in 8 to 16 bits
between their smallest and largest value, colours and opacities as 8-bit shares, matrices of networks in 8 bits with a
scale per row. Whatever an avatar's folder holds is packed by these rules, so networks that come with newer avatars are
carried too. Reading it gives an ordinary avatar; `geodiff4d import compact` writes that as a folder.
"""

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, from_numpy

from geodiff4d.avatar.model import Avatar
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import ZIP_ERRORS, fresh_file, fresh_folder, read_arrays, read_tensors, save_tensors
from geodiff4d.core.jsontext import parse_json
from geodiff4d.core.packing import SMALLEST, packed, unpacked

FORMAT, VERSION = "geodiff4d compact avatar", 1
SUFFIX = ".g4d"
MAX_BYTES = 256 * 1024**2
"""Largest size that a file may unpack to [bytes]."""
BITS = {"means": 14, "quats": 8, "log_scales": 8, "harmonics": 8}
"""Bits of per-Gaussian columns by name; others have 12."""
OTHER_BITS = 12
TABLE_BITS = 16
SHARES = 256
FEW = 2
"""Tensors of fewer rows are not quantised by a range."""
TEXT = ("config.json", "metrics.json")


def write_compact(folder: Path, path: Path) -> int:
    """Pack an avatar's folder into one file, which is written whole or not at all; returns its size [bytes].

    Raises:
        UserError: the folder is not an avatar, or is damaged.
    """
    Avatar.load(folder)
    members: dict[str, bytes] = {name: (folder / name).read_bytes() for name in TEXT if (folder / name).is_file()}
    about: dict[str, Any] = {"format": FORMAT, "version": VERSION, "tensors": {}, "arrays": {}}
    for file in sorted(folder.glob("*.safetensors")):
        for name, (kind, data) in _coded(read_tensors(file)).items():
            about["tensors"][f"{file.name}/{name}"], members[f"{file.name}/{name}"] = kind, data
    for file in sorted(folder.glob("*.npz")):
        for name, array in read_arrays(file).items():
            key = f"{file.name}/{name}"
            about["arrays"][key], members[key] = _code(array, TABLE_BITS, "")
    members["compact.json"] = json.dumps(about).encode()
    with fresh_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in members.items():
            # Without the time of the day: the same avatar is the same file.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_LZMA)
    return path.stat().st_size


def unpack(path: Path, out: Path) -> None:
    """Write a compact file's avatar as a folder, whole or not at all.

    Raises:
        UserError: missing, truncated, too large, of a newer version, or not a compact avatar.
    """
    members = _members(path)
    try:
        about = parse_json(members["compact.json"])
        if about["format"] != FORMAT:
            raise KeyError("format")
        if about["version"] > VERSION:
            raise UserError(f"{path} is of a newer version ({about['version']}, expected {VERSION}): update geodiff4d")
        with fresh_folder(out) as folder:
            for name in TEXT:
                if name in members:
                    (folder / name).write_bytes(members[name])
            for file, values in _files(about["tensors"], members).items():
                tensors: dict[str, Tensor] = {k: from_numpy(v) for k, v in values.items()}
                save_tensors(unpacked(tensors), folder / file)
            for file, values in _files(about["arrays"], members).items():
                arrays: dict[str, Any] = dict(values)
                np.savez(folder / file, **arrays)
    except (LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a compact avatar, or is damaged ({error}): export it again") from None


def open_avatar(path: Path) -> Avatar:
    """Load an avatar from its folder or its compact file.

    Raises:
        UserError: it is neither, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        return Avatar.load(path)
    with tempfile.TemporaryDirectory(prefix="geodiff4d-") as name:
        unpack(path, Path(name) / "avatar")
        return Avatar.load(Path(name) / "avatar")


def _coded(state: dict[str, Tensor]) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Code a file's tensors: per-Gaussian columns, matrices of networks, other tables, and the few numbers left."""
    count = len(state.get("face_index", ()))
    large = {k: v for k, v in state.items() if v.dim() > 1 and v.numel() >= SMALLEST and v.is_floating_point()}
    weights = {k: v for k, v in large.items() if k.endswith(".weight") and not k.startswith("code.")}
    out = {}
    for name, tensor in {**state, **packed(weights)}.items():
        if "." not in name and len(tensor) == count:
            out[name] = _code(tensor.numpy(), BITS.get(name, OTHER_BITS), name)
        elif name in large and name not in weights:
            out[name] = _code(tensor.numpy(), TABLE_BITS, "")
        else:
            out[name] = _raw(tensor.numpy())
    return out


def _code(array: np.ndarray, bits: int, name: str) -> tuple[dict[str, Any], bytes]:
    """Quantise numbers along the first axis; returns what it takes to read them, and their bytes."""
    shape = {"shape": list(array.shape)}
    if array.dtype.kind == "i":
        return shape | {"kind": "index"}, _planes(np.diff(array, prepend=0).astype(np.int32))
    if array.ndim < 1 or len(array) < FEW:
        return _raw(array)
    if name.endswith("_logits"):
        return shape | {"kind": "shares"}, _planes(np.floor(_sigmoid(array) * SHARES).clip(0, SHARES - 1).astype("u1"))
    rows = array.reshape(len(array), -1).astype(np.float64)
    low, high = rows.min(0), rows.max(0)
    step = np.where(high > low, (high - low) / (2**bits - 1), 1)
    range_ = np.stack([low, step]).astype(np.float32)
    about = shape | {"kind": "columns", "columns": rows.shape[1]}
    return about, range_.tobytes() + _planes(np.rint((rows - range_[0]) / range_[1]).clip(0, 65535).astype("<u2"))


def _raw(array: np.ndarray) -> tuple[dict[str, Any], bytes]:
    return {"shape": list(array.shape), "kind": "raw", "dtype": array.dtype.str}, _planes(array)


def _decode(about: dict[str, Any], data: bytes) -> np.ndarray:
    shape, kind = tuple(about["shape"]), about["kind"]
    if kind == "raw":
        return _merge(data, np.dtype(about["dtype"]), shape)
    if kind == "index":
        return np.cumsum(_merge(data, np.dtype(np.int32), shape), dtype=np.int64)
    if kind == "shares":
        shares = (_merge(data, np.dtype(np.uint8), shape).astype(np.float32) + 0.5) / SHARES
        return np.log(shares / (1 - shares))
    columns = int(about["columns"])
    low, step = ends = np.frombuffer(data[: 8 * columns], np.float32).reshape(2, columns)
    if not np.isfinite(ends).all():
        raise ValueError("a range has NaN or infinite numbers")
    return (low + _merge(data[8 * columns :], np.dtype("<u2"), (shape[0], columns)) * step).reshape(shape)


def _planes(array: np.ndarray) -> bytes:
    """Lay numbers out column by column, all low bytes before all high ones: likes beside likes pack better."""
    columns = np.ascontiguousarray(np.moveaxis(array, 0, -1)) if array.ndim > 1 else np.ascontiguousarray(array)
    return columns.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()


def _merge(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    flat = np.array(planes.T, order="C").reshape(-1).view(dtype)
    turned = flat.reshape(*shape[1:], shape[0]) if len(shape) > 1 else flat.reshape(shape)
    return np.ascontiguousarray(np.moveaxis(turned, -1, 0)) if len(shape) > 1 else turned


def _files(tensors: dict[str, Any], members: dict[str, bytes]) -> dict[str, dict[str, np.ndarray]]:
    """Decode tensors, by the file each belongs to."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for key, about in tensors.items():
        file, _, name = key.partition("/")
        if Path(file).name != file or file.startswith("."):
            raise ValueError(f"a member called {file!r}")
        out.setdefault(file, {})[name] = _decode(about, members[key])
    return out


def _members(path: Path) -> dict[str, bytes]:
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > MAX_BYTES:
                raise UserError(f"{path} unpacks to {size:,} bytes: at most {MAX_BYTES:,} are read")
            return {name: archive.read(name) for name in archive.namelist()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected a compact avatar ({SUFFIX})") from None
    except ZIP_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is truncated or not a compact avatar ({error}): export it again") from None


def _sigmoid(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return 1 / (1 + np.exp(-x.astype(np.float64)))
