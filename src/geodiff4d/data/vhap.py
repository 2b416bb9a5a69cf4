"""VHAP exports (Qian 2024), read and written: the NeRF-style folder that GaussianAvatars trains on.

    transforms.json            c2w in OpenGL axes, intrinsics, timestep_index, camera_index and paths of every frame
    images/ fg_masks/          {t:05d}_{c:02d}.png
    flame_param/{t:05d}.npz    translation, rotation, neck_pose, jaw_pose [1, 3], eyes_pose [1, 6], shape [300],
                               expr [1, 100], static_offset [1, 5143, 3], dynamic_offset
    canonical_flame_param.npz  the same, zero but for shape, static_offset and jaw_pose [[0.3, 0, 0]]

Such a folder is a clip as it stands (`data.clip`); importing it checks, scales and joins it. Sets that VHAP combined of
several sequences have `../sequence/…` paths, which are followed into the sequences that its `sequences_*.txt` list.
VHAP moves the world by the mean translation, and knows no eyelids.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import OPENGL_FROM_OPENCV, Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_arrays, read_json
from geodiff4d.core.geometry import invert
from geodiff4d.core.images import composite, decode_normals, read_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip, ClipWriter, read_params
from geodiff4d.data.flame_tracks import EXPRESSIONS, SHAPES
from geodiff4d.data.importing import (
    Choice,
    Report,
    Source,
    SourceFrame,
    Wanted,
    camera_checked,
    inside,
)  # fmt: skip
from geodiff4d.heads.rig import HeadParams

VERTS_WITH_TEETH = 5143
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Frame:
    """One entry of transforms.json, checked."""

    timestep: int
    camera_index: int
    camera: Camera
    image: Path
    mask: Path | None
    normal: Path | None
    params: Path | None


def read(src: Path, choice: Choice, report: Report) -> list[Source]:
    """Find VHAP exports: `src` is one, or holds some.

    Raises:
        UserError: there is none, or what there is has not been exported.
    """
    src = Path(src)
    if not src.is_dir():
        raise UserError(f"{src} is a file: expected the folder that VHAP exported, with transforms.json")
    if _transforms(src):
        return [_source("", src, choice, report)]
    folders = [p for p in sorted(src.iterdir()) if p.is_dir() and not p.name.startswith(".") and _transforms(p)]
    if folders:
        return [_source(p.name, p, choice, report) for p in folders if choice.picks_clip(p.name)]
    if any(src.rglob("tracked_flame_params_*.npz")):
        raise UserError(
            f"{src} is VHAP's tracking, not its export: run vhap/export_as_nerf_dataset.py and import what it writes"
        )
    raise UserError(f"{src} is not a VHAP export: expected transforms.json, or folders that have one")


def _transforms(folder: Path) -> list[Path]:
    """Return the files that list all frames: transforms.json, or a combined set's splits."""
    whole = folder / "transforms.json"
    return [whole] if whole.is_file() else [p for s in SPLITS if (p := folder / f"transforms_{s}.json").is_file()]


def _source(name: str, folder: Path, choice: Choice, report: Report) -> Source:
    metas = [read_json(path) for path in _transforms(folder)]
    roots = _roots(folder)
    entries: dict[tuple[int, int], _Frame] = {}
    ids: dict[int, str] = {}
    for meta in metas:
        for entry in _listed(meta, folder):
            frame = _frame(entry, meta, folder, roots)
            entries[frame.timestep, frame.camera_index] = frame
            ids[frame.camera_index] = str(entry.get("camera_id", f"{frame.camera_index:02d}"))
    cameras = {c for c in ids if choice.picks_camera(c, ids[c])}
    steps = choice.picks({t for t, c in entries if c in cameras})
    chosen = {k: f for k, f in sorted(entries.items()) if k[0] in set(steps) and k[1] in cameras}
    if not chosen:
        raise UserError(f"{folder} has no frame that was asked for: cameras are {', '.join(sorted(ids.values()))}")
    places = {t: f.params for (t, _), f in reversed(chosen.items()) if f.params is not None}

    def frames(wanted: Wanted) -> Iterator[SourceFrame]:
        for (t, c), frame in chosen.items():
            read = _read(frame, f"{name}/{t:05d}_{c:02d}".lstrip("/"), report) if wanted(t, c) else None
            if read is not None:
                yield read

    ours = metas[0].get("geodiff4d", {})
    extra = {"dataset": "VHAP export", "sequence": folder.resolve().name}
    # Of NeRSemble, VHAP names its folders by participant and sequence.
    if participant := re.match(r"(\d{3})_", folder.resolve().name):
        extra["participant"] = participant[1]
    return Source(
        name, frames, len(chosen), head=str(ours.get("head", "flame")),
        params=lambda t: _params(places.get(t), f"{name}/{t:05d}".lstrip("/"), report),
        fps=float(ours.get("fps", 24.0)) / choice.every, camera_ids={c: ids[c] for c in sorted(cameras)},
        extra=extra,
    )  # fmt: skip


def _listed(meta: object, folder: Path) -> list[dict]:
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not all(isinstance(f, dict) for f in frames):
        raise UserError(f"{folder} has transforms without a list of frames: export it again")
    return frames


def _roots(folder: Path) -> set[str]:
    """Return the names of the sequences that a combined set may refer to."""
    names: set[str] = set()
    for path in folder.glob("sequences_*.txt"):
        names |= {line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()}
    return {n for n in names if PurePosixPath(n).name == n and n != ".."}


def _frame(entry: dict, meta: dict, folder: Path, roots: set[str]) -> _Frame:
    where = f"{folder}, frame {entry.get('file_path', '?')}"

    def get(key: str) -> float:
        return float(entry[key] if key in entry else meta[key])

    try:
        T_world_opengl = torch.tensor(entry["transform_matrix"], dtype=torch.float64)
        if T_world_opengl.shape != (4, 4):
            raise ValueError("transform_matrix, expected 4×4")
        w, h = int(get("w")), int(get("h"))
        K = torch.tensor([[get("fl_x"), 0, get("cx")], [0, get("fl_y"), get("cy")], [0, 0, 1]], dtype=torch.float64)
        timestep, camera_index, image = int(entry["timestep_index"]), int(entry["camera_index"]), entry["file_path"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: missing or bad field {error}") from None
    # A mirrored or scaled matrix must be noticed before it is inverted as a rigid one.
    opencv = T_world_opengl @ OPENGL_FROM_OPENCV.double()
    camera = camera_checked(opencv, K, w, h, where)
    camera = replace(camera, T_cam_world=invert(camera.T_cam_world))

    def path(name: object) -> Path | None:
        if not name:
            return None
        parts = PurePosixPath(str(name)).parts
        if len(parts) > 2 and parts[0] == ".." and parts[1] in roots:
            return inside(folder.resolve().parent / parts[1], str(PurePosixPath(*parts[2:])))
        return inside(folder, str(name))

    found = path(image)
    if found is None or timestep < 0 or camera_index < 0:
        raise UserError(f"{where}: expected a file and indices from zero, got {timestep} and {camera_index}")
    mask, normal, params = (path(entry.get(k)) for k in ("fg_mask_path", "normal_path", "flame_param_path"))
    return _Frame(timestep, camera_index, camera, found, mask, normal, params)


def _read(frame: _Frame, where: str, report: Report) -> SourceFrame | None:
    size = (frame.camera.height, frame.camera.width)
    try:
        image = read_image(frame.image)
        if tuple(image.shape[1:]) != size:
            report.warn("frames left out: the picture's size is not the one in transforms.json", where)
            return None
    except UserError as error:
        report.warn(f"frames left out: {str(error).replace(str(frame.image), 'picture')}", where)
        return None

    def beside(path: Path | None, mode: str, what: str) -> Tensor | None:
        if path is None:
            return None
        try:
            value = read_image(path, mode)
        except UserError as error:
            report.warn(f"{what} left out: {str(error).replace(str(path), 'file')}", where)
            return None
        if tuple(value.shape[1:]) != size:
            report.warn(f"{what} left out: of another size than the picture", where)
            return None
        return value

    mask, normal = beside(frame.mask, "L", "mask"), beside(frame.normal, "RGB", "normals")
    if normal is not None:
        normal = decode_normals(normal) * (1 if mask is None else (mask > 0).float())
    return SourceFrame(frame.timestep, frame.camera_index, frame.camera, image, mask, normal)


def _params(path: Path | None, where: str, report: Report) -> HeadParams | None:
    if path is None or not path.is_file():
        report.warn("no head parameters", where)
        return None
    try:
        params = read_params(path)
        moving = read_arrays(path).get("dynamic_offset", np.zeros(0))
    except UserError as error:
        report.warn(f"head parameters left out: {str(error).replace(str(path), 'file')[:120]}", where)
        return None
    if moving.dtype.kind == "f" and np.abs(moving).max(initial=0) > 0:
        report.warn("offsets of single frames (dynamic_offset) are left out", where)
    sizes = {"shape": SHAPES, "expr": EXPRESSIONS, "rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6,
             "translation": 3}  # fmt: skip
    values = [v for v in vars(params).values() if v is not None]
    flame = params.static_offset is not None or params.expr.shape[-1] == EXPRESSIONS
    wrong = [k for k, n in sizes.items() if tuple(getattr(params, k).shape) != (n,)] if flame else []
    if wrong or not all(bool(v.isfinite().all()) for v in values):
        report.warn(f"head parameters left out: {', '.join(wrong) or 'numbers that are not finite'}", where)
        return None
    return params


def write_vhap(clip: Clip, out: Path, background: float = 1.0, progress: Progress = silent) -> list[int]:
    """Write a clip on FLAME as VHAP exports one, strictly: for programs that know nothing of clips.

    Against the clip: pictures on a plain `background`, timesteps numbered from zero, the head's mean translation moved
    into the cameras, all of FLAME's coefficients, a static offset (zero if the clip has none); no eyelids. Returns the
    timesteps that are left out, for VHAP's layout knows no frame without head parameters.

    Raises:
        UserError: the clip has no head parameters, or those of another head.
    """
    if not clip.head_name.startswith("flame"):
        raise UserError(
            f"{clip.folder} is on the head {clip.head_name!r}, VHAP's layout is FLAME's: track it with --head and your "
            "FLAME file"
        )
    with_params = {r.timestep for r in clip.records if r.params_path is not None and r.params_path.is_file()}
    rows = {t: _as_vhap(clip.params(t), clip.folder) for t in sorted(with_params)}
    if not rows:
        raise UserError(f"{clip.folder} has no head parameters: run `geodiff4d track` with --head and your FLAME file")
    mean = torch.stack([p.translation for p in rows.values()]).mean(0)
    shift = torch.eye(4)
    shift[:3, 3] = mean
    number = {t: i for i, t in enumerate(rows)}
    with ClipWriter(out, clip.head_name, clip.fps, clip.extra) as writer:
        for t, params in rows.items():
            writer.add_params(number[t], replace(params, translation=params.translation - mean))
        chosen = [(i, r) for i, r in enumerate(clip.records) if r.timestep in rows]
        for index, record in progress(chosen, "exporting", len(chosen)):
            frame = clip.frame(index)
            camera = replace(frame.camera, T_cam_world=frame.camera.T_cam_world @ shift)
            image = composite(frame.image, frame.mask, background)
            mask = frame.mask if record.mask_path else None
            writer.add(number[frame.timestep], frame.camera_index, image, camera, mask, frame.normal)
    return [t for t in clip.timesteps if t not in rows]


def _as_vhap(params: HeadParams, folder: Path) -> HeadParams:
    def full(values: Float[Tensor, " n"], length: int, name: str) -> Float[Tensor, " length"]:
        if len(values) > length:
            raise UserError(f"{folder} has {len(values)} {name} coefficients, FLAME has {length}: another head's?")
        return torch.cat([values, values.new_zeros(length - len(values))])

    offset = torch.zeros(VERTS_WITH_TEETH, 3)
    if params.static_offset is not None:
        if len(params.static_offset) > VERTS_WITH_TEETH:
            raise UserError(f"{folder} has offsets of {len(params.static_offset)} vertices: expected FLAME's")
        offset[: len(params.static_offset)] = params.static_offset
    shape, expr = full(params.shape, SHAPES, "shape"), full(params.expr, EXPRESSIONS, "expr")
    return replace(params, shape=shape, expr=expr, static_offset=offset, eyelids=None)
