"""Polygon files of splats (.ply, binary, little endian): named float32 columns in, named float32 columns out.

The layout is the one that INRIA's 3D Gaussian splatting introduced and all viewers read: position, normal (zero),
spherical harmonics, logit of the opacity, logarithm of the standard deviations, rotation wxyz.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file

SH_C0 = 0.28209479177387814
"""Spherical harmonic of degree 0: colour = 0.5 + SH_C0 · f_dc."""
REST = 45
"""Coefficients of degrees 1 to 3 for three channels."""
MAX_HEADER_BYTES = 64 * 1024
MAX_SPLATS = 20_000_000
TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "<i2", "int16": "<i2", "ushort": "<u2",
    "uint16": "<u2", "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4", "float": "<f4", "float32": "<f4",
    "double": "<f8", "float64": "<f8",
}  # fmt: skip

Columns = dict[str, Float[np.ndarray, " n"]]


def splat_columns(
    means: Float[np.ndarray, "n 3"], f_dc: Float[np.ndarray, "n 3"], opacity_logits: Float[np.ndarray, " n"],
    log_scales: Float[np.ndarray, "n 3"], quats: Float[np.ndarray, "n 4"],
    f_rest: Float[np.ndarray, "n rest"] | None = None,
) -> Columns:  # fmt: skip
    """Return the columns of INRIA's layout, in its order; without `f_rest` colours do not depend on the view."""
    n = len(means)
    rest = np.zeros((n, REST), np.float32) if f_rest is None else f_rest
    zero = np.zeros((n, 3), np.float32)
    groups = [
        (("x", "y", "z"), means), (("nx", "ny", "nz"), zero), (_numbered("f_dc", 3), f_dc),
        (_numbered("f_rest", rest.shape[1]), rest), (("opacity",), opacity_logits[:, None]),
        (_numbered("scale", 3), log_scales), (_numbered("rot", 4), quats),
    ]  # fmt: skip
    return {name: values[:, i] for names, values in groups for i, name in enumerate(names)}


def rest_columns(harmonics: Float[np.ndarray, "n rest 3"]) -> Float[np.ndarray, "n 45"]:
    """Return coefficients from degree 1 on as the file has them: all of red, of green, of blue, to degree 3."""
    whole = np.zeros((len(harmonics), 3, REST // 3), np.float32)
    whole[..., : harmonics.shape[1]] = harmonics.transpose(0, 2, 1)
    return whole.reshape(len(harmonics), REST)


def gather(columns: Columns, prefix: str, count: int, path: Path) -> Float[np.ndarray, "n count"]:
    """Return the columns `prefix_0 … prefix_{count - 1}` (x, y, z for an empty prefix) as one array.

    Raises:
        UserError: one of them is missing.
    """
    names = _numbered(prefix, count) if prefix else ("x", "y", "z")
    missing = [n for n in names if n not in columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}: expected 3D Gaussian splats; is it a mesh?")
    return np.stack([columns[n] for n in names], -1).astype(np.float32)


def write_ply(path: Path, columns: Columns) -> None:
    """Write one `vertex` element of float32 columns; the file is written whole or not at all."""
    table = np.zeros(len(next(iter(columns.values()))), [(name, "<f4") for name in columns])
    for name, values in columns.items():
        table[name] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in columns]
    with fresh_file(path) as temporary:
        temporary.write_bytes(("\n".join([*header, "end_header"]) + "\n").encode() + table.tobytes())


def read_ply(path: Path) -> Columns:
    """Return the columns of a file's first element, `vertex`, by name and in the file's types.

    Raises:
        UserError: missing, truncated, not a binary .ply of points, or absurdly large.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a .ply file of splats")
    with path.open("rb") as file:
        count, dtype = _header(file, path)
        need = count * dtype.itemsize
        data = file.read(need)
    if len(data) < need:
        raise UserError(
            f"{path} is truncated: its header promises {count:,} splats ({need:,} bytes), {len(data):,} bytes follow; "
            "copy or export it again"
        )
    table = np.frombuffer(data, dtype)
    return {name: table[name] for name in dtype.names or ()}


def _header(file, path: Path) -> tuple[int, np.dtype]:
    if file.readline(16).strip() != b"ply":
        raise UserError(f"{path} is not a .ply file: expected one of 3D Gaussian splats")
    fields, count, element, binary, size = [], None, "", False, 0
    while (line := file.readline(1024)).strip() != b"end_header":
        size += len(line)
        words = line.decode("ascii", "replace").split()
        if not line or size > MAX_HEADER_BYTES:
            raise UserError(f"{path} is truncated or damaged: its header has no end; copy or export it again")
        if words[:1] == ["format"]:
            binary = words[1:2] == ["binary_little_endian"]
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdigit():
            element, count = words[1], int(words[2]) if words[1] == "vertex" else count
        elif words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in TYPES:
                raise UserError(f"{path} has a column that splats do not have ({' '.join(words[1:])}): is it a mesh?")
            fields.append((words[2], TYPES[words[1]]))
    if not binary or not fields or count is None or count > MAX_SPLATS or len({n for n, _ in fields}) != len(fields):
        raise UserError(f"{path} is not a binary little-endian .ply of points: expected 3D Gaussian splats")
    return count, np.dtype(fields)


def _numbered(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{i}" for i in range(count))
