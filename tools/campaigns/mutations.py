"""Ways in which files go bad: of any bytes, and within the formats whose checksums would notice."""

import json
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

EXTREMES = (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 0.5, 1e308, -1e308, 10**30, 2**31, 2**63, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "\x00", "é" * 300, [], [[]], {}, [None], {"a": 1}, [1e9] * 3, [[0.0] * 4] * 4, "1", "nan",
)  # fmt: skip
DTYPES = ("f2", "f4", "f8", "i1", "i8", "u1", "u8", "c8", "?", "U4", "S3", "M8[s]")

# ---- any bytes


def flip(data: bytes, random: Random) -> bytes:
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        out[random.randrange(len(out))] ^= 1 << random.randrange(8)
    return bytes(out)


def flip_early(data: bytes, random: Random) -> bytes:
    """Change the header, where sizes and offsets are."""
    out = bytearray(data)
    for _ in range(random.choice((1, 2, 4))):
        out[random.randrange(min(len(out), 256))] = random.randrange(256)
    return bytes(out)


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.choice((0, 1, random.randrange(len(data)), len(data) - 1, random.randrange(len(data))))]


def cut(data: bytes, random: Random) -> bytes:
    a = random.randrange(len(data))
    return data[:a] + data[a + random.choice((1, 4, 100, 4000)) :]


def insert(data: bytes, random: Random) -> bytes:
    a = random.randrange(len(data))
    return data[:a] + random.randbytes(random.choice((1, 4, 100, 4000))) + data[a:]


def zero(data: bytes, random: Random) -> bytes:
    a, n = random.randrange(len(data)), random.choice((4, 64, 512, 4096))
    return data[:a] + bytes(len(data[a : a + n])) + data[a + n :]


def extreme(data: bytes, random: Random) -> bytes:
    """Write an extreme number over an aligned word."""
    a = 4 * random.randrange(max(1, min(len(data), random.choice((64, 1024, len(data)))) // 4))
    return data[:a] + random.choice(EXTREMES) + data[a + 4 :]


def shuffle(data: bytes, random: Random) -> bytes:
    a, b = sorted(random.randrange(len(data)) for _ in range(2))
    return data[b:] + data[a:b] + data[:a]


def twice(data: bytes, random: Random) -> bytes:
    return data + data[: random.randrange(len(data)) + 1]


def other(data: bytes, random: Random) -> bytes:
    """Replace the whole by something else."""
    return random.choice((b"", b"\n", b"{}", b"[]", b"null", b"PK\x05\x06" + bytes(18), random.randbytes(2000), b"0"))


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (
    flip, flip, flip_early, flip_early, truncate, cut, insert, zero, extreme, extreme, shuffle, twice, other,
)  # fmt: skip

# ---- within formats


def png(data: bytes, random: Random) -> bytes:
    """Change a chunk and mend its checksum."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    i = random.randrange(len(chunks)) if random.random() < 0.5 else 0
    kind, body = chunks[i]
    how = random.randrange(5)
    if how == 0 and body:
        chunks[i] = kind, random.choice(BYTES)(body, random)
    elif how == 1:
        del chunks[i]
    elif how == 2:
        chunks.insert(i, random.choice(chunks))
    elif how == 3:
        width, height = (random.choice((0, 1, 3, 128, 60000, 2**31 - 1)) for _ in range(2))
        depth, colour = random.choice((1, 2, 4, 8, 16, 7)), random.choice((0, 2, 3, 4, 6, 5))
        chunks[0] = b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, random.randrange(2))
    else:
        extra = random.choice((b"tRNS", b"iCCP", b"eXIf", b"acTL", b"gAMA", b"zTXt"))
        chunks.insert(1, (extra, random.randbytes(random.choice((0, 6, 40)))))
    out = data[:8]
    for kind, body in chunks:
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            _nodes(value[key], found)
    return found


def tree(value: Any, random: Random) -> Any:
    """Change one place of a JSON value."""
    places = _nodes(value, [])
    if not places or random.random() < 0.05:
        return random.choice(VALUES)
    # Leaves are many: half of the time something near the root.
    container, key = random.choice(places[:12] if random.random() < 0.3 else places)
    how = random.randrange(8)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, list):
        container.extend([container[key]] * random.choice((1, 50)))
    elif how == 2 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif how == 3 and isinstance(container[key], list):
        container[key] = container[key][: random.randrange(len(container[key]) + 1)]
    elif how == 4 and isinstance(container[key], int | float):
        container[key] = random.choice(
            (-container[key], container[key] * 1e6, container[key] * 1e-9, str(container[key]))
        )
    elif how == 5:
        deep: Any = 0
        for _ in range(random.choice((3, 2000))):
            deep = [deep]
        container[key] = deep
    else:
        container[key] = random.choice(VALUES)
    return value


def text_json(data: bytes, random: Random) -> bytes:
    value = tree(json.loads(data), random)
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 100_000


def text_lines(data: bytes, random: Random) -> bytes:
    """Change one line of JSON lines."""
    lines = data.splitlines() or [b"{}"]
    i = random.randrange(len(lines))
    lines[i] = random.choice((text_json, text_json, *BYTES[:4]))(lines[i] or b"{}", random) or b"x"
    return b"\n".join(lines) + b"\n"


def array(a: np.ndarray, random: Random) -> np.ndarray:
    """Spoil an array's numbers, type or shape."""
    how = random.randrange(9)
    if how <= 2 and a.size and a.dtype.kind in "fiu":
        out = a.copy()
        poison = (float("nan"), float("inf"), 1e30, -1e30) if a.dtype.kind == "f" else (0, np.iinfo(a.dtype).max, 127)
        with np.errstate(all="ignore"):
            out.reshape(-1)[random.randrange(a.size) if random.random() < 0.7 else slice(None)] = random.choice(poison)
        if a.dtype.kind == "i" and random.random() < 0.3:
            out = -out - 1
        return out
    if how == 3:
        return a[: random.randrange(len(a) + 1)] if a.ndim else a[None]
    if how == 4:
        return a[None] if random.random() < 0.5 else a.reshape(-1)
    if how == 5:
        return np.concatenate([a, a]) if a.ndim else np.stack([a, a])
    if how == 6:
        return np.zeros([0] * max(a.ndim, 1), a.dtype)
    if how == 7:
        return a.astype(object) if random.random() < 0.2 and a.size < 1000 else np.swapaxes(a, 0, -1) if a.ndim else a
    try:
        with np.errstate(all="ignore"):
            return a.astype(random.choice(DTYPES))
    except (ValueError, TypeError):
        return np.zeros(3, random.choice(DTYPES))


def _some_array(named: dict[str, Any], random: Random) -> dict[str, Any]:
    name = random.choice(sorted(named) or ["none"])
    how = random.randrange(8)
    if how == 0:
        named.pop(name, None)
    elif how == 1 and name in named:
        named[f"{name}x"] = named.pop(name)
    elif how == 2 and len(named) > 1:
        named[name] = named[random.choice(sorted(named))]
    elif name in named:
        named[name] = array(np.asarray(named[name]), random)
    return named


def npz(data: bytes, random: Random) -> bytes:
    with np.load(BytesIO(data), allow_pickle=False) as file:
        named = {k: file[k] for k in file.files}
    out = BytesIO()
    np.savez(out, **_some_array(named, random))
    return out.getvalue()


def npy(data: bytes, random: Random) -> bytes:
    out = BytesIO()
    np.save(out, array(np.load(BytesIO(data)), random))
    return out.getvalue()


def safetensors(data: bytes, random: Random) -> bytes:
    """Change a tensor, or the header's description of it."""
    from safetensors.numpy import load, save

    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if random.random() < 0.4:
        text = text_json(json.dumps(header).encode(), random)
        return struct.pack("<Q", random.choice((len(text), len(text), 0, 2**63))) + text + data[8 + size :]
    meta = header.pop("__metadata__", None)
    if meta is not None and random.random() < 0.2:
        key = random.choice(list(meta))
        meta[key] = random.choice(("", "x", "-1", "99999999", "nan"))
    named = _some_array(load(data), random)
    kept = {k: np.ascontiguousarray(v) for k, v in named.items() if v.dtype.kind in "fiub"}
    return save(kept, meta)


def hdf5(data: bytes, random: Random) -> bytes:
    """Change one dataset of an HDF5 file."""
    import h5py

    held = BytesIO(data)
    with h5py.File(held, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = random.choice(names)
        value = np.asarray(file[name][()])  # pyright: ignore[reportIndexIssue]
        del file[name]
        if random.random() < 0.8:
            spoilt = array(value, random)
            if spoilt.dtype.kind not in "OUM":
                file[name] = spoilt
    return held.getvalue()


def zipped(data: bytes, random: Random) -> bytes:
    """Change one member of an archive by its own rules, checksums mended."""
    import zipfile

    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        names = source.namelist()
        chosen = random.choice([n for n in names if n.endswith(".json")] if random.random() < 0.6 else names)
        for name in names:
            member = source.read(name)
            if name == chosen and random.random() < 0.9:
                member = text_json(member, random) if name.endswith(".json") else random.choice(BYTES)(member, random)
            elif name == chosen:
                continue
            target.writestr(name, member)
    return out.getvalue()


def text(data: bytes, random: Random) -> bytes:
    """Change a line of a text header (PLY, camera files), leaving what follows."""
    head, mark, body = data.partition(b"end_header\n")
    lines = head.split(b"\n")
    i = random.randrange(len(lines))
    words = lines[i].split(b" ")
    j = random.randrange(len(words))
    words[j] = random.choice((b"", b"-1", b"99999999999", b"nan", b"1e400", b"double", b"list", b"x", b"\xff"))
    lines[i] = b" ".join(words)
    if random.random() < 0.3:
        lines.insert(i, random.choice(lines))
    elif random.random() < 0.2:
        del lines[i]
    return b"\n".join(lines) + mark + body


FORMATS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".png": png, ".json": text_json, ".jsonl": text_lines, ".npz": npz, ".npy": npy, ".safetensors": safetensors,
    ".smc": hdf5, ".g4d": zipped, ".ply": text, ".txt": text, ".frame": zipped, ".zip": zipped,
}  # fmt: skip


def mutate(path: Path, random: Random) -> str:
    """Spoil a file in place; returns how."""
    how = FORMATS.get(path.suffix.lower())
    data = path.read_bytes()
    if random.random() < 0.02:
        path.unlink()
        if random.random() < 0.5:
            path.mkdir()
            return "a folder"
        path.symlink_to(random.choice(("nowhere", path.name)))
        return "a dangling link"
    chosen = how if how is not None and random.random() < 0.75 else random.choice(BYTES)
    if not data:
        chosen = other
    try:
        spoilt = chosen(data, random)
    except (ValueError, KeyError, IndexError, OSError, TypeError, RecursionError, OverflowError):
        chosen = flip
        spoilt = flip(data, random)
    path.unlink()
    path.write_bytes(spoilt)
    return chosen.__name__
