"""FLAME from the user's own file (Li et al. 2017): 2020, 2023, 2023 without jaw, 2023 Open.

The file is read by `pickles` (nothing in it runs, chumpy is not needed) and becomes a `Head` like OpenHead's: VHAP's
teeth added, Pixel3DMM's eyelids, landmarks, masks and texture coordinates taken from the files beside it. What is not
there has a fallback (docs/FLAME.md).

The years share one topology, so parameters of another year fit without any error and give another face. The year is
therefore determined from the content, is part of the head's name, and is compared wherever a name is known.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.heads import flame_atlas, flame_teeth
from geodiff4d.heads.flame_beside import (
    EYELIDS,
    FULL_EMBEDDINGS,
    MASKS,
    MEDIAPIPE,
    NAMES,
    STATIC_EMBEDDINGS,
    TEMPLATES,
    TEXTURE,
    Beside,
    Points,
    beside,
)  # fmt: skip
from geodiff4d.heads.flame_transfer import Transferred, transfer
from geodiff4d.heads.pickles import read_pickle
from geodiff4d.heads.rig import JOINTS, PARENTS, Head, Landmarks

ENVIRONMENT = "GEODIFF4D_FLAME"
"""Environment variable with the file, or folder of files, where a clip's head is looked for."""
YEARS = ("flame2020", "flame2023", "flame2023-no-jaw", "flame2023-open")
OFFICIAL = {
    "efcd14cc4a69f3a3d9af8ded80146b5b6b50df3bd74cf69108213b144eba725b": "flame2020",
    "8fb1af0db1abb51053ead8fd1f2624a63d01c9602f4a4fb4ea23bd2c82017fa0": "flame2023",
    "e75a0990728ba038c7da2a420ae4396f7ddd7781366c13026066c5b24f127623": "flame2023-open",
}
"""SHA-256 of the files that MPI distributes; the one without jaw is recognised by its name alone."""
OPEN_BOUNDS = ((-0.10978439, -0.18724248, -0.15323225), (0.10776618, 0.13212053, 0.07508866))
"""2023 Open's mean head, lowest and highest coordinates [m]: it stays recognisable when somebody converts the file."""
OPEN_KEY = "supr_expression_metadata"
"""Only 2023 Open's file has it."""
ARRAYS = ("v_template", "f", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table")
EXPRESSIONS = 100
SHAPES_AND_EXPRESSIONS = 400
MIN_LID_M = 5e-4


@dataclass(frozen=True)
class Model:
    """The arrays of a FLAME file, checked, and which model they are."""

    name: str
    """One of `YEARS`, or "flame-" and eight digits of the content's hash for an unknown model."""
    evidence: str
    """What the name was determined by: the official file, its content or its file name."""
    template: Float[np.ndarray, "verts 3"]
    faces: Int[np.ndarray, "faces 3"]
    shape_basis: Float[np.ndarray, "verts 3 shapes"]
    expr_basis: Float[np.ndarray, "verts 3 exprs"]
    pose_basis: Float[np.ndarray, "verts 3 36"]
    joint_regressor: Float[np.ndarray, "joints verts"]
    skin_weights: Float[np.ndarray, "verts joints"]


def load(path: Path | str, teeth: bool = True) -> Head:
    """Load a FLAME model with what lies beside it; `path` is its .pkl, an .npz made from one, or a folder with one.

    `teeth` adds VHAP's to models of FLAME's topology: 5143 vertices.

    Raises:
        UserError: missing, damaged or not FLAME; of another year than its name says; a file beside it does not fit.

    Example:
        >>> head = load("FLAME2023/flame2023.pkl")  # doctest: +SKIP
        >>> head.pose(head.neutral(1)).vertices.shape  # doctest: +SKIP
        torch.Size([1, 5143, 3])
    """
    path = model_file(Path(path))
    if not path.is_file():
        raise UserError(f"no FLAME model at {path}: expected its .pkl file; check --head")
    state = tuple((str(p), p.stat().st_mtime_ns) for p in (path, *beside(path).values()))
    if path not in LOADED:
        LOADED.append(path)
    return _assemble(path, state, teeth)


def find(name: str) -> Head:
    """Return the user's model of a head's name, as clips and avatars record it.

    Looks at the models already loaded, then where the environment variable GEODIFF4D_FLAME points. "flame" is FLAME of
    an unknown year (a VHAP export), which only a single model answers.

    Raises:
        UserError: there is none, or only one of another year.
    """
    models = [p for p in dict.fromkeys([*LOADED, *environment()]) if p.is_file()]
    found = {p: read_model(p).name for p in models}
    names = set(found.values())
    if name == "flame" and len(names) == 1:
        name = names.pop()
    for path, its in found.items():
        if its == name:
            return load(path)
    if not found:
        raise UserError(
            f"head {name!r} is FLAME, which you have to bring: expected its file, got none; pass --head PATH where "
            f"there is one, or set {ENVIRONMENT} to the file or its folder (docs/FLAME.md)"
        )
    listed = ", ".join(f"{n} ({p})" for p, n in found.items())
    if name == "flame":
        raise UserError(f"head 'flame' does not say which year: found {listed}; set {ENVIRONMENT} to one file")
    raise UserError(
        f"the head asked for is {name}, found {listed}: coefficients of different FLAME models do not mix; "
        f"set {ENVIRONMENT} to {name}'s file"
    )


def describe(path: Path | str) -> list[str]:
    """Return lines that describe a FLAME model and the files beside it.

    Raises:
        UserError: as `load`.
    """
    path = model_file(Path(path))
    head, model, files = load(path), read_model(path), beside(path)

    def line(what: str, names: tuple[str, ...], otherwise: str) -> str:
        found = [n for n in names if n in files]
        return f"{what}: {', '.join(found) if found else otherwise}"

    teeth = " with teeth" if "teeth" in head.regions else ""
    own = "handed over from OpenHead" if len(head.landmarks68.face_index) else "none"
    return [
        f"{head.name} (by {model.evidence}), {len(head.template)} vertices{teeth}",
        line("68 landmarks", (*FULL_EMBEDDINGS, *STATIC_EMBEDDINGS), own),
        line("MediaPipe's landmarks", (MEDIAPIPE,), own),
        line("regions", (MASKS,), own),
        line("atlas", (*TEMPLATES, TEXTURE), "a cylinder"),
        line("eyelids", EYELIDS, "none"),
    ]


def read_model(path: Path | str) -> Model:
    """Read and check a FLAME file's arrays and say which model it is.

    Raises:
        UserError: damaged or not FLAME; its name says another year than its content.
    """
    path = Path(path)
    return _read(path, path.stat().st_mtime_ns)


def model_file(path: Path) -> Path:
    """Return the model's file; a folder must hold exactly one."""
    if not path.is_dir():
        return path
    found = candidates(path)
    if len(found) != 1:
        listed = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{path} is a folder: expected one FLAME model in it, got {listed}; pass the file itself")
    return found[0]


def candidates(folder: Path) -> list[Path]:
    """Return the files in a folder, or one below, that may be FLAME models by their names."""
    files = [*folder.glob("*.pkl"), *folder.glob("*/*.pkl")]
    return sorted(p for p in files if p.name not in NAMES and not re.search(r"mask|embed|landmark", p.name.lower()))


def claimed(path: Path) -> str | None:
    """Return the year that a file's or its folder's name claims: one of `YEARS`, or None."""
    for text in (path.stem.lower(), path.parent.name.lower()):
        if re.search(r"no_?-?jaw", text):
            return "flame2023-no-jaw"
        if year := re.search(r"flame_?-?(2020|2023)(_?-?open)?", text):
            return f"flame{year[1]}{'-open' if year[2] else ''}"
    return None


LOADED: list[Path] = []
"""Model files that were loaded in this process, oldest first: `find` looks for a head's name in them."""


def environment() -> list[Path]:
    """Return the model files that the environment variable GEODIFF4D_FLAME points to."""
    value = os.environ.get(ENVIRONMENT)
    if not value:
        return []
    path = Path(value)
    return candidates(path) if path.is_dir() else [path]


@cache
def _read(path: Path, modified_ns: int) -> Model:
    data = _arrays(path)
    metadata = data.get(OPEN_KEY)
    exprs = int(metadata.get("n_expr", EXPRESSIONS)) if isinstance(metadata, dict) else EXPRESSIONS
    a = {k: np.asarray(data[k]) for k in ARRAYS}
    _check(path, a, exprs)
    template, basis = a["v_template"].astype(np.float64), a["shapedirs"]
    name, evidence = identify(path, template, basis, has_open_key=metadata is not None)
    shapes = basis.shape[-1] - exprs
    return Model(
        name, evidence, template, a["f"].astype(np.int64), basis[..., :shapes].astype(np.float32),
        basis[..., shapes:].astype(np.float32), a["posedirs"].astype(np.float32),
        a["J_regressor"].astype(np.float64), a["weights"].astype(np.float64),
    )  # fmt: skip


def identify(
    path: Path, template: Float[np.ndarray, "verts 3"], basis: np.ndarray, has_open_key: bool
) -> tuple[str, str]:
    """Return which model a file holds, and what that was determined by.

    Raises:
        UserError: the name of the file or its folder claims another year than the content has.
    """
    official = OFFICIAL.get(_sha256(path))
    bounds = np.stack([template.min(0), template.max(0)])
    if has_open_key or np.abs(bounds - OPEN_BOUNDS).max() < 1e-6:
        name, evidence = "flame2023-open", "its content"
    else:
        name, evidence = official, "the official file"
    claim = claimed(path)
    # Open has been handed out as flame2023.pkl, so that name alone contradicts nothing.
    same = claim == name or (claim == "flame2023" and name == "flame2023-open")
    if name and claim and not same:
        raise UserError(
            f"{path} is named as {claim} but holds {name}: models of different years do not mix; rename or replace it"
        )
    if name:
        return name, evidence
    if claim:
        return claim, "its name"
    print_ = hashlib.sha256(template.astype("<f4").tobytes() + np.ascontiguousarray(basis, "<f4").tobytes())
    return f"flame-{print_.hexdigest()[:8]}", "its fingerprint alone"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arrays(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {k: file[k] for k in ARRAYS if k in file.files}
        except Exception as error:  # damaged archives raise what they like
            raise UserError(f"{path} is damaged or holds objects ({error}): use FLAME's own .pkl") from None
    else:
        data = read_pickle(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a FLAME model: expected a dict of arrays; use FLAME's own .pkl")
    missing = [k for k in ARRAYS if k not in data]
    if missing:
        raise UserError(f"{path} is not a FLAME model: it lacks {', '.join(missing)}; use FLAME's own .pkl")
    return data


def _check(path: Path, a: dict[str, np.ndarray], exprs: int) -> None:
    n = len(a["v_template"]) if a["v_template"].ndim else 0
    joints = a["weights"].shape[-1] if a["weights"].ndim == 2 else 0
    if joints != len(JOINTS):
        raise UserError(f"{path} has {joints} joints: expected FLAME's {len(JOINTS)}; is it a body or hand model?")
    expected = {
        "v_template": (n, 3), "f": (*a["f"].shape[:1], 3), "shapedirs": (n, 3, SHAPES_AND_EXPRESSIONS),
        "posedirs": (n, 3, 9 * (len(JOINTS) - 1)), "J_regressor": (len(JOINTS), n), "weights": (n, len(JOINTS)),
        "kintree_table": (2, len(JOINTS)),
    }  # fmt: skip
    for key, shape in expected.items():
        if a[key].shape != shape or a[key].dtype.kind not in "iuf":
            want, got = ("×".join(map(str, s)) for s in (shape, a[key].shape))
            raise UserError(f"{path} is not a FLAME model: `{key}` should be {want} numbers, is {got}")
        if not np.isfinite(a[key]).all():
            raise UserError(f"{path} is damaged: `{key}` is not finite everywhere; download it again")
    if not 0 < exprs < SHAPES_AND_EXPRESSIONS:
        raise UserError(f"{path} is damaged: it claims {exprs} of {SHAPES_AND_EXPRESSIONS} components as expressions")
    # The root's parent is -1, stored without a sign.
    if tuple(a["kintree_table"][0].astype(np.int64)[1:]) != PARENTS[1:]:
        raise UserError(f"{path} is not a FLAME model: its joints hang together otherwise (`kintree_table`)")
    if not n or a["f"].min() < 0 or a["f"].max() >= n:
        raise UserError(f"{path} is damaged: `f` points outside its {n} vertices; download it again")
    if np.abs(a["weights"].sum(1) - 1).max() > 1e-3:
        raise UserError(f"{path} is damaged: its skinning weights do not add up to 1; download it again")


@cache
def _assemble(path: Path, state: tuple, teeth: bool) -> Head:
    m = read_model(path)
    n = len(m.template)
    has_teeth = teeth and n == flame_teeth.FLAME_VERTS
    extra = Beside(path, n, m.faces)
    lids = extra.eyelids()
    eyes = m.skin_weights[:, 3:].sum(1) > 0.5
    handed = transfer(m.template, m.faces, m.joint_regressor @ m.template, eyes)
    parts = (handed.regions if handed else {}) | regions(m.skin_weights, extra.masks(), lids)
    uv, uv_faces = extra.texture_coordinates() or flame_atlas.unwrap(m.template, m.faces, parts["eyes"])
    template, faces, weights, regressor = m.template, m.faces, m.skin_weights, m.joint_regressor
    shape, expr, pose = m.shape_basis, m.expr_basis, m.pose_basis
    if has_teeth:
        template = np.concatenate([template, flame_teeth.positions(template)])
        faces = np.concatenate([faces, flame_teeth.faces() + n])
        shape = np.concatenate([shape, flame_teeth.identity_basis(shape)])
        expr = np.concatenate([expr, flame_teeth.expression_basis(expr, weights, m.name == "flame2023-no-jaw")])
        weights = np.concatenate([weights, flame_teeth.weights()])
        uv_faces = np.concatenate([uv_faces, flame_teeth.faces() + len(uv)])
        uv = np.concatenate([uv, flame_teeth.texture_coordinates()])
    added = len(template) - n
    pose, regressor = _padded(pose, 0, added), _padded(regressor, 1, added)
    parts = {k: _padded(v, 0, added) for k, v in parts.items()}
    parts["teeth"] = np.arange(n + added) >= n
    marks, (points, index) = _embeddings(extra, handed)
    return Head(
        name=m.name, template=_real(template), faces=torch.from_numpy(faces), shape_basis=_real(shape),
        expr_basis=_real(expr), joint_regressor=_real(regressor), skin_weights=_real(weights), uv=_real(uv),
        uv_faces=torch.from_numpy(uv_faces), regions={k: torch.from_numpy(v) for k, v in parts.items() if v.any()},
        expression_names=tuple(f"expr{i:03d}" for i in range(expr.shape[-1])),
        landmarks68=_landmarks(marks), mediapipe=_landmarks(points),
        mediapipe_index=torch.from_numpy(index), pose_basis=_real(pose),
        eyelid_basis=None if lids is None else _real(_padded(lids, 0, added)),
    )  # fmt: skip


def _embeddings(extra: Beside, handed: Transferred | None) -> tuple[Points, tuple[Points, np.ndarray]]:
    """Return the 68 landmarks and MediaPipe's: from the files, else transferred from OpenHead, else none."""
    none = Points(np.zeros(0, np.int64), np.zeros((0, 3)))
    marks, mediapipe = extra.landmarks68(), extra.mediapipe()
    if handed:
        return marks or handed.landmarks68, mediapipe or (handed.mediapipe, handed.mediapipe_index)
    return marks or none, mediapipe or (none, none.face_index)


def regions(
    skin_weights: Float[np.ndarray, "verts joints"],
    masks: dict[str, Bool[np.ndarray, " verts"]] | None,
    lids: Float[np.ndarray, "verts 3 2"] | None,
) -> dict[str, Bool[np.ndarray, " verts"]]:
    """Name FLAME's parts as OpenHead's are named, as far as the files tell; the eyeballs always.

    FLAME's own masks (forehead, nose, eye_region, …) stay beside them.
    """
    masks = masks or {}
    left, right = skin_weights[:, JOINTS.index("left_eye")] > 0.5, skin_weights[:, JOINTS.index("right_eye")] > 0.5
    out = dict(masks)
    for name, sources in (("neck", ("neck", "boundary")), ("ears", ("left_ear", "right_ear"))):
        if any(s in masks for s in sources):
            out[name] = np.any([masks[s] for s in sources if s in masks], axis=0)
    if lids is not None:
        out["lids"] = np.linalg.norm(lids, axis=1).max(-1) > MIN_LID_M
    return out | {"eyes": left | right, "left_eye": left, "right_eye": right, "skin": ~(left | right)}


def _padded(array: np.ndarray, axis: int, added: int) -> np.ndarray:
    width = [(0, added if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, width)


def _real(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _landmarks(points: Points) -> Landmarks:
    return Landmarks(torch.from_numpy(points.face_index), _real(points.bary))
