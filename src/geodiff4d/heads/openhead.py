"""Read a head's data file: OpenHead, which ships with the package, or any .npz of the same format.

OpenHead is cut from MakeHuman's CC0 assets by tools/build_openhead.py; docs/OPENHEAD.md describes every array.
"""

import zipfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import ZIP_ERRORS, read_arrays
from geodiff4d.heads.rig import JOINTS, Head, Landmarks, PosedHead

OPENHEAD = Path(__file__).parents[1] / "assets" / "openhead.npz"
REQUIRED = (
    "template", "faces", "shape_basis", "expr_basis", "expression_names", "joint_regressor", "skin_weights", "uv",
    "uv_faces", "landmarks68_face_index", "landmarks68_bary",
)  # fmt: skip


def load(source: str | Path = "openhead") -> Head:
    """Load a head: "openhead", or the path of an .npz in its format.

    OpenHead comes with 64 identity components, what a tracker can fit; `load_wide` has all of them.

    Raises:
        UserError: the file is missing or not a head.

    Example:
        >>> head = load("openhead")
        >>> head.expression_names[head.expression_names.index("jawOpen")]
        'jawOpen'
    """
    head, exposed = _read(_find(source))
    return replace(head, shape_basis=head.shape_basis[..., :exposed].contiguous())


def load_wide(source: str | Path = "openhead") -> Head:
    """Return a head with its full identity basis, for people beyond the identities of the tracker's head.

    The first components are `load`'s: pad its coefficients with zeros to use them here.

    Raises:
        UserError: as `load`.
    """
    return _read(_find(source))[0]


def load_field(name: str, source: str | Path = "openhead") -> Float[Tensor, " verts"]:
    """Return a smooth per-vertex field whose zero level is a region's edge, positive inside.

    OpenHead has `hairline`, `brows` and `lashes` (signed distances on the mean head [m]) and `lips` (dimensionless,
    ±0.5).

    Raises:
        UserError: as `load`, or the head has no such field.
    """
    path = _find(source)
    _read(path)
    with np.load(path, allow_pickle=False) as data:
        if f"field_{name}" not in data:
            has = ", ".join(k.removeprefix("field_") for k in data.files if k.startswith("field_")) or "none"
            raise UserError(f"{path} has no field {name!r}: expected one of: {has}; use the head openhead")
        return torch.from_numpy(data[f"field_{name}"].astype(np.float32))


@dataclass(frozen=True)
class Shell:
    """The scalp as a sheet of its own, cut along the hairline, that is lifted off the head for hair or a cap."""

    points: Landmarks
    """Places of its vertices on the head."""
    faces: Int[Tensor, "faces 3"]
    lift: Float[Tensor, " points"]
    """Height over that of the scalp's middle: 0 at the hairline, 1 from 20 mm inside it."""

    def on(self, mesh: PosedHead, height_m: float) -> Float[Tensor, "*batch points 3"]:
        """Return the sheet's vertices on a posed head, lifted along its normals."""
        at, normals = self.points.on(mesh.vertices, mesh.faces), self.points.on(mesh.normals, mesh.faces)
        return at + height_m * self.lift[:, None] * torch.nn.functional.normalize(normals, dim=-1)


def load_shell(source: str | Path = "openhead") -> Shell:
    """Return the scalp shell.

    Raises:
        UserError: as `load`, or the head has none.

    Example:
        >>> head, shell = load("openhead"), load_shell()
        >>> hair = shell.on(head.pose(head.neutral(1)), height_m=0.02)
    """
    data = _arrays(source, "shell_", "scalp shell")
    points = Landmarks(torch.from_numpy(data["face_index"].astype(np.int64)), torch.from_numpy(data["bary"]))
    return Shell(points, torch.from_numpy(data["faces"].astype(np.int64)), torch.from_numpy(data["lift"]))


def load_attributes(source: str | Path = "openhead") -> dict[str, Float[Tensor, " shapes"]]:
    """Return named directions in `load_wide`'s shape space: female, age, weight, muscle, african, asian, caucasian.

    Each is the mean of MakeHuman's adults one standard deviation above the trait's average, with what correlates
    with the trait (women are smaller, for one). `load`'s coefficients are the first of them.

    Raises:
        UserError: as `load`, or the head has none.
    """
    data = _arrays(source, "attribute_", "named directions")
    return {str(k): torch.from_numpy(v) for k, v in zip(data["names"], data["directions"], strict=True)}


def _arrays(source: str | Path, prefix: str, what: str) -> dict[str, np.ndarray]:
    path = _find(source)
    _read(path)
    with np.load(path, allow_pickle=False) as data:
        found = {k.removeprefix(prefix): data[k] for k in data.files if k.startswith(prefix)}
    if not found:
        raise UserError(f"{path} has no {what}: expected arrays {prefix}*; use the head openhead")
    return found


def _find(source: str | Path) -> Path:
    if str(source) == "openhead":
        return OPENHEAD
    path = Path(source)
    if not path.exists():
        raise UserError(f"no head at {path}: expected openhead or the path of an .npz head; check --head")
    if not path.is_file():
        raise UserError(f"{path} is a folder: expected openhead or the path of an .npz head; check --head")
    return path


def lacks_names(path: Path) -> bool:
    """Return whether an .npz has FLAME's arrays instead of this format's: a converted FLAME file."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return "v_template.npy" in file.namelist() and "template.npy" not in file.namelist()
    except ZIP_ERRORS:
        return False


@cache
def _parse(path: Path, modified_ns: int) -> tuple[Head, int]:
    try:
        data = read_arrays(path)
    except UserError as error:
        raise UserError(
            f"{path} is not a head: expected an .npz written by tools/build_openhead.py ({error})"
        ) from None
    missing = [k for k in REQUIRED if k not in data]
    if missing:
        raise UserError(
            f"{path} is not a head: it lacks {', '.join(missing)}; expected OpenHead's format (docs/OPENHEAD.md)"
        )
    _check(path, data)
    return _assemble(path, data), int(data["exposed_shapes"]) if "exposed_shapes" in data else data[
        "shape_basis"
    ].shape[-1]


def _read(path: Path) -> tuple[Head, int]:
    return _parse(path, path.stat().st_mtime_ns)


def _check(path: Path, data: dict[str, np.ndarray]) -> None:
    n = len(data["template"])
    expected = {
        "template": (n, 3), "faces": (None, 3), "shape_basis": (n, 3, None),
        "expr_basis": (n, 3, len(data["expression_names"])), "joint_regressor": (len(JOINTS), n),
        "skin_weights": (n, len(JOINTS)), "uv": (None, 2), "uv_faces": (len(data["faces"]), 3),
    }  # fmt: skip
    for key, shape in expected.items():
        got = data[key].shape
        if len(got) != len(shape) or any(s is not None and s != g for s, g in zip(shape, got, strict=True)):
            words = "×".join("any" if s is None else str(s) for s in shape)
            raise UserError(f"{path} is not a head: `{key}` should be {words}, is {got}; build it again")
    for key, count in (("faces", n), ("uv_faces", len(data["uv"])), ("landmarks68_face_index", len(data["faces"]))):
        if data[key].size and not 0 <= data[key].min() <= data[key].max() < count:
            raise UserError(f"{path} is not a head: `{key}` points outside its {count} entries; build it again")


def _assemble(path: Path, data: dict[str, np.ndarray]) -> Head:
    def real(key: str) -> Tensor:
        return torch.from_numpy(data[key].astype(np.float32))

    def index(key: str) -> Tensor:
        return torch.from_numpy(data[key].astype(np.int64))

    prefix = "region_"
    has_mediapipe = "mediapipe_face_index" in data
    none = Landmarks(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))
    return Head(
        name="openhead" if path == OPENHEAD else path.stem,
        template=real("template"),
        faces=index("faces"),
        shape_basis=real("shape_basis"),
        expr_basis=real("expr_basis"),
        joint_regressor=real("joint_regressor"),
        skin_weights=real("skin_weights"),
        uv=real("uv"),
        uv_faces=index("uv_faces"),
        regions={
            k.removeprefix(prefix): torch.from_numpy(v.astype(bool)) for k, v in data.items() if k.startswith(prefix)
        },
        expression_names=tuple(str(n) for n in data["expression_names"]),
        landmarks68=Landmarks(index("landmarks68_face_index"), real("landmarks68_bary")),
        mediapipe=Landmarks(index("mediapipe_face_index"), real("mediapipe_bary")) if has_mediapipe else none,
        mediapipe_index=index("mediapipe_index") if has_mediapipe else none.face_index,
        gaze=real("gaze") if "gaze" in data else None,
    )
