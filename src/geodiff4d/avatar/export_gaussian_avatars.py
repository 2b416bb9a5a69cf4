"""Read and write the folder of GaussianAvatars (Qian et al. 2024): point_cloud.ply and flame_param.npz.

Their splats and ours live in the same frames of the same triangles, FLAME's with teeth, so positions, rotations, scales
and opacities are copied bit by bit. What one format lacks is kept in a second file, and used as long as it is
consistent with the rest: our logits of colours, camera and rate in `geodiff4d.npz`, their spherical harmonics in the
avatar's `gaussian_avatars.npz`. So both round trips are exact to the bit. Networks cannot be exported: splats are
written as bound at rest.

Ours / theirs: their harmonics look along directions of the world, whatever the face does; ours turn with it. They are
exchanged as they are on the person's head at rest.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.avatar.binding import LocalGaussians, face_frames, to_local
from geodiff4d.avatar.drive import own_rest
from geodiff4d.avatar.model import Avatar, check_avatar
from geodiff4d.avatar.ply import SH_C0, Columns, gather, read_ply, rest_columns, splat_columns, write_ply
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_folder, read_arrays
from geodiff4d.core.geometry import look_at, matrix_to_quat, quat_multiply
from geodiff4d.heads.rig import SKULL_JOINT, Head, HeadParams
from geodiff4d.render.harmonics import rotate_harmonics

VERTS, FACES, SHAPES, EXPRS = 5143, 10144, 300, 100
POSES = {"rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
PLY, PARAMS, OURS, THEIRS = "point_cloud.ply", "flame_param.npz", "geodiff4d.npz", "gaussian_avatars.npz"
FPS = 25.0
"""Rate of their data sets: every third of NeRSemble's 73 frames/s."""


def export_gaussian_avatars(avatar: Avatar, out: Path, source: Path | None = None) -> int:
    """Write the folder that GaussianAvatars' viewers and renderers load; returns the number of timesteps.

    `source` is the avatar's own folder, which may hold what an import could not use.

    Raises:
        UserError: the avatar is not on FLAME with teeth.
    """
    _require_flame(avatar.head)
    local = bound_to_head(avatar)
    theirs = _kept(None if source is None else source / THEIRS)
    f_dc = _coefficients(local.color_logits)
    head, shape, face = avatar.head, avatar.shape, local.face_index
    f_rest = None if local.harmonics is None else rest_columns(_turned(local.harmonics, head, shape, face).numpy())
    if (
        theirs
        and np.array_equal(_logits(theirs["f_dc"]), local.color_logits.numpy())
        and _same(_harmonics(theirs["f_rest"], head, shape, face), local.harmonics)
    ):
        f_dc, f_rest = theirs["f_dc"], theirs["f_rest"]
    else:
        theirs = {}
    means, opacities, scales, quats = (
        v.numpy() for v in (local.means, local.opacity_logits, local.log_scales, local.quats)
    )
    columns = splat_columns(means, f_dc, opacities, scales, quats, f_rest)
    columns["binding_0"] = local.face_index.numpy().astype(np.float32)
    params = _flame_arrays(avatar, theirs)
    camera = avatar.camera
    ours: dict[str, Any] = {
        "color_logits": local.color_logits, "T_cam_world": camera.T_cam_world, "K": camera.K, "fps": avatar.fps,
        "size": [camera.width, camera.height], "static": avatar.sequence.static_offset is not None,
        "shapes": avatar.shape.shape[-1], "exprs": avatar.sequence.expr.shape[-1],
    }  # fmt: skip
    if avatar.sequence.eyelids is not None:
        ours["eyelids"] = avatar.sequence.eyelids
    if local.harmonics is not None:
        ours["harmonics"] = local.harmonics
    kept: dict[str, Any] = {k: np.asarray(v) for k, v in ours.items()}
    with fresh_folder(out) as folder:
        write_ply(folder / PLY, columns)
        np.savez(folder / PARAMS, **params)
        np.savez(folder / OURS, **kept)
    return len(params["expr"])


@torch.no_grad()
def bound_to_head(avatar: Avatar) -> LocalGaussians:
    """Return the Gaussians in the frames of the head's own triangles.

    Those of a plain avatar are there already. Others are posed at rest first: what remeshing, deformation and dynamics
    add at rest is kept, how it changes with the expression is not.
    """
    if avatar.parts is None:
        return avatar.local
    rest = own_rest(avatar)
    params = replace(avatar.neutral(), expr=rest.expr, jaw_pose=rest.jaw_pose, eyelids=rest.eyelids)
    posed, mesh = avatar.posed(params, rest.tokens), avatar.head.pose(params)
    frames, face = face_frames(mesh.vertices, mesh.faces), posed.face_index
    back = matrix_to_quat(frames.R[face]) * torch.tensor([1.0, -1.0, -1.0, -1.0])
    return LocalGaussians(
        face_index=face,
        means=to_local(posed.gaussians.means, frames, face),
        quats=quat_multiply(back, torch.nn.functional.normalize(posed.gaussians.quats, dim=-1)),
        log_scales=(posed.gaussians.scales / frames.scale[face, None].clamp(min=1e-9)).clamp(min=1e-9).log(),
        opacity_logits=torch.logit(posed.gaussians.opacities.clamp(1e-6, 1 - 1e-6)),
        color_logits=torch.logit(posed.colors.clamp(1e-4, 1 - 1e-4)),
        harmonics=None if posed.shading is None else rotate_harmonics(posed.shading.in_world(), frames.R[face].mT),
    )


def import_gaussian_avatars(source: Path, head: Head, out: Path) -> Avatar:
    """Read GaussianAvatars' folder (or its .ply) as an avatar on the user's FLAME, write it to `out` and return it.

    Raises:
        UserError: files are missing, truncated or of another head.
    """
    _require_flame(head)
    source = source.parent if source.suffix == ".ply" else source
    columns, arrays = read_ply(source / PLY), read_arrays(source / PARAMS)
    if "binding_0" not in columns:
        raise UserError(
            f"{source / PLY} has no column 'binding_0': expected GaussianAvatars' own file, not a posed one"
        )
    ours = _kept(source / OURS)
    try:
        avatar, f_dc, f_rest = _avatar(source, head, columns, arrays, ours)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source / OURS} does not fit {PLY} beside it, or is damaged ({reason}): remove it") from None
    with fresh_folder(out) as folder:
        avatar.save(folder)
        offsets = {k: arrays[k] for k in ("dynamic_offset", "static_offset") if k in arrays}
        kept: dict[str, Any] = {"f_dc": f_dc, "f_rest": f_rest, **offsets}
        np.savez(folder / THEIRS, **kept)
    return avatar


def _avatar(
    source: Path, head: Head, columns: Columns, arrays: dict[str, np.ndarray], ours: dict[str, np.ndarray]
) -> tuple[Avatar, np.ndarray, np.ndarray]:
    """Return the avatar, and the colours' coefficients of degree 0 and of higher ones."""
    f_dc, f_rest = gather(columns, "f_dc", 3, source / PLY), _rest(columns, source / PLY)
    logits = _logits(f_dc)
    if ours and np.array_equal(_coefficients(torch.from_numpy(ours["color_logits"])), f_dc):
        logits = ours["color_logits"]
    local = _local(columns, logits, source / PLY)
    sequence = _sequence(arrays, source / PARAMS, ours)
    if not bool(((local.face_index >= 0) & (local.face_index < len(head.faces))).all()):
        raise UserError(f"{source / PLY} is bound to faces that {head.name} does not have: expected FLAME with teeth")
    shape, face = sequence.shape[0], local.face_index
    harmonics = _harmonics(f_rest, head, shape, face)
    if "harmonics" in ours:
        kept = torch.from_numpy(ours["harmonics"])
        if np.array_equal(rest_columns(_turned(kept, head, shape, face).numpy()), f_rest):
            harmonics = kept
    local = replace(local, harmonics=harmonics)
    camera, fps = _view(ours, head, sequence)
    avatar = Avatar(head, local, sequence.shape[0], sequence, camera, fps)
    check_avatar(avatar, str(source))
    return avatar, f_dc, f_rest


def _require_flame(head: Head) -> None:
    if len(head.template) != VERTS or len(head.faces) != FACES:
        raise UserError(
            f"GaussianAvatars needs FLAME with teeth ({VERTS} vertices, {FACES} faces), this is {head.name!r} with "
            f"{len(head.template)} and {len(head.faces)}: fit the avatar on your FLAME file (docs/FLAME.md)"
        )


def _coefficients(color_logits: Float[Tensor, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return ((color_logits.float().sigmoid() - 0.5) / SH_C0).numpy()


def _logits(f_dc: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return torch.logit((0.5 + SH_C0 * torch.from_numpy(np.ascontiguousarray(f_dc))).clamp(1e-4, 1 - 1e-4)).numpy()


def _turned(
    harmonics: Float[Tensor, "n rest 3"], head: Head, shape: Float[Tensor, " shapes"], face: Int[Tensor, " n"],
    back: bool = False,
) -> Float[Tensor, "n rest 3"]:  # fmt: skip
    """Turn coefficients from the frames of a person's faces at rest to the world, or `back`."""
    mesh = head.pose(replace(head.neutral(), shape=shape))
    R = face_frames(mesh.vertices, mesh.faces).R[face]
    return rotate_harmonics(harmonics, R.mT if back else R)


def _harmonics(
    f_rest: Float[np.ndarray, "n columns"], head: Head, shape: Float[Tensor, " shapes"], face: Int[Tensor, " n"]
) -> Float[Tensor, "n rest 3"] | None:
    """Read a file's coefficients into the frames of the faces, up to the highest degree that says anything."""
    if not f_rest.any():
        return None
    world = torch.from_numpy(np.ascontiguousarray(f_rest.reshape(len(f_rest), 3, -1).transpose(0, 2, 1)))
    used = int(world.flatten(2).abs().amax((0, 2)).nonzero().max()) + 1
    count = next(n for n in (3, 8, 15) if n >= used)
    return _turned(world[:, :count].contiguous(), head, shape, face, back=True)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _rest(columns: Columns, path: Path) -> Float[np.ndarray, "n rest"]:
    count = sum(name.startswith("f_rest_") for name in columns)
    return gather(columns, "f_rest", count, path) if count else np.zeros((len(columns["x"]), 0), np.float32)


def _local(columns: Columns, logits: Float[np.ndarray, "n 3"], path: Path) -> LocalGaussians:
    means, scales, quats = (
        torch.from_numpy(gather(columns, k, n, path)) for k, n in (("", 3), ("scale", 3), ("rot", 4))
    )
    if "opacity" not in columns:
        raise UserError(f"{path} has no column 'opacity': expected 3D Gaussian splats; is it a mesh?")
    opacity = torch.from_numpy(columns["opacity"].astype(np.float32))
    face = torch.from_numpy(columns["binding_0"].astype(np.int64))
    local = LocalGaussians(face, means, quats, scales, opacity, torch.from_numpy(np.ascontiguousarray(logits)))
    if not all(bool(v.isfinite().all()) for v in local.parameters.values()):
        raise UserError(f"{path} has numbers that are not finite: export it again")
    return local


def _flame_arrays(avatar: Avatar, theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Lay the fitted sequence out as flame_param.npz has it."""
    s = avatar.sequence
    n = s.batch[0]

    def padded(values: Tensor, length: int) -> np.ndarray:
        return torch.nn.functional.pad(values, (0, length - values.shape[-1])).numpy()

    static, dynamic = np.zeros((1, VERTS, 3), np.float32), np.zeros((n, VERTS, 3), np.float32)
    if "dynamic_offset" in theirs and theirs["dynamic_offset"].shape == dynamic.shape:
        static, dynamic = theirs["static_offset"], theirs["dynamic_offset"]
    elif s.static_offset is not None:
        static = s.static_offset[:1].numpy()
        dynamic = (s.static_offset - s.static_offset[:1]).numpy()
    out = {"shape": padded(avatar.shape, SHAPES), "expr": padded(s.expr, EXPRS)}
    out |= {k: getattr(s, k).numpy() for k in POSES}
    return {
        k: np.asarray(v, np.float32) for k, v in (out | {"static_offset": static, "dynamic_offset": dynamic}).items()
    }


def _sequence(arrays: dict[str, np.ndarray], path: Path, ours: dict[str, np.ndarray]) -> HeadParams:
    """Read flame_param.npz; offsets that are zero are left out."""
    frames = len(arrays["expr"]) if arrays.get("expr", np.zeros(0)).ndim == 2 else 0
    wanted = {"shape": (SHAPES,), "expr": (frames, EXPRS), **{k: (frames, d) for k, d in POSES.items()}}
    for name, shape in wanted.items():
        if name not in arrays or arrays[name].shape != shape or not frames or not np.isfinite(arrays[name]).all():
            got = f"{arrays[name].shape}" if name in arrays else "none"
            raise UserError(f"{path} is not GaussianAvatars': expected finite {name} of shape {shape}, got {got}")
    tensors = {k: torch.from_numpy(arrays[k].astype(np.float32)) for k in wanted}
    if ours:
        shapes, exprs = int(ours["shapes"]), int(ours["exprs"])
        if not (0 <= shapes <= SHAPES and 0 <= exprs <= EXPRS):
            raise UserError(f"{path}: the note beside it says {shapes} shapes and {exprs} expressions of another head")
        tensors["shape"], tensors["expr"] = tensors["shape"][:shapes], tensors["expr"][:, :exprs]
    offset = None
    for name, rows in (("static_offset", 1), ("dynamic_offset", frames)):
        if name in arrays and (arrays[name].any() or (name == "static_offset" and ours and bool(ours["static"]))):
            if arrays[name].shape != (rows, VERTS, 3):
                raise UserError(f"{path}: {name} is {arrays[name].shape}, expected {(rows, VERTS, 3)}: another head's?")
            part = torch.from_numpy(arrays[name].astype(np.float32))
            offset = part if offset is None else offset + part
    offset = None if offset is None else offset.expand(frames, -1, -1).contiguous()
    lids = torch.from_numpy(ours["eyelids"]) if "eyelids" in ours else None
    shape = tensors.pop("shape").expand(frames, -1).contiguous()
    return HeadParams(shape=shape, static_offset=offset, eyelids=lids, **tensors)


def _view(ours: dict[str, np.ndarray], head: Head, sequence: HeadParams) -> tuple[Camera, float]:
    """Return the camera and rate that our own export kept, else one that looks at the face from 1 m."""
    if ours:
        width, height = (int(v) for v in ours["size"])
        return Camera(torch.from_numpy(ours["T_cam_world"]), torch.from_numpy(ours["K"]), width, height), float(
            ours["fps"]
        )
    mesh = head.pose(sequence[0])
    T = mesh.T_world_joint[SKULL_JOINT]
    centre = mesh.vertices.mean(0)
    eye = centre + T[:3, :3] @ torch.tensor([0.0, 0.0, 1.0])
    return Camera(look_at(eye, centre, torch.tensor([0.0, 1.0, 0.0])), pinhole(1280.0, 512, 512), 512, 512), FPS


def _kept(path: Path | None) -> dict[str, np.ndarray]:
    return read_arrays(path) if path is not None and path.is_file() else {}
