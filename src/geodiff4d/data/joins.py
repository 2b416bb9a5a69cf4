"""What the user computed elsewhere, joined to a source frame by frame: masks, normals and head parameters.

Masks and normals are folders of files named by frame, any of

    {t:05d}_{c:02d}.png   {camera}/{t:05d}.png   cam_{camera}/{t:05d}.png   cam_{camera}_{t:05d}.png   {t:05d}.png

(c the camera's index, `camera` its index or its own name; the last for clips of one camera), as PNG, JPEG, NPY
(float, C×H×W or H×W×C) or EXR. A source of several clips looks into the subfolder of the clip's name first. Normals may
instead come from a DAViD network (`data.david`). Head parameters are a folder of `{t:05d}.npz` in the clip's layout.

Normals are camera-space, x right, y up, z toward the camera, n/2 + 0.5 in picture files; `axes_of` notices others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import decode_normals, read_image
from geodiff4d.data.clip import read_params
from geodiff4d.data.exr import read_exr
from geodiff4d.data.importing import Report, Source, SourceFrame
from geodiff4d.heads.rig import HeadParams

SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".exr")
Normals = Callable[[Float[Tensor, "3 height width"]], Float[Tensor, "3 height width"]]
"""An estimator: image in, camera-space unit normals out."""


@dataclass(frozen=True)
class Joins:
    """Where what the user computed elsewhere lies."""

    masks: Path | None = None
    normals: Path | None = None
    """A folder; or an ONNX file of DAViD's, which `estimator` then runs."""
    params: Path | None = None

    def __post_init__(self) -> None:
        for name, path in (("--masks", self.masks), ("--normals", self.normals), ("--params", self.params)):
            if path is not None and not path.exists():
                raise UserError(f"{path} does not exist: {name} expects a folder of files named by frame")
            if path is not None and not path.is_dir() and not (name == "--normals" and path.suffix == ".onnx"):
                onnx = " or a DAViD .onnx file" if name == "--normals" else ""
                raise UserError(f"{path} is a file: {name} expects a folder of files named by frame{onnx}")

    def for_clip(self, name: str) -> "Joins":
        """Return the folders of one clip: the subfolder of its name, where there is one."""

        def below(path: Path | None) -> Path | None:
            return path / name if path is not None and name and (path / name).is_dir() else path

        return Joins(below(self.masks), below(self.normals), below(self.params))


def find(folder: Path, timestep: int, camera_index: int, camera_id: str, only_camera: bool) -> Path | None:
    """Return the file of a frame, by any of the names that this module's header lists."""
    t, c = f"{timestep:05d}", f"{camera_index:02d}"
    stems = [f"{t}_{c}"]
    for camera in filter(None, dict.fromkeys([camera_id, c])):
        stems += [f"{camera}/{t}", f"cam_{camera}/{t}", f"cam_{camera}_{t}"]
    stems += [t] if only_camera else []
    paths = (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def joined(
    frame: SourceFrame, joins: Joins, source: Source, report: Report, estimator: Normals | None = None
) -> SourceFrame:
    """Return the frame with the mask and normals that the user has for it; files win over what the source has.

    A frame whose file is missing or damaged is kept without, and reported.
    """
    camera_id = source.camera_ids.get(frame.camera_index, "")
    where = f"{source.name}/" * bool(source.name) + f"{frame.timestep:05d}_{frame.camera_index:02d}"
    size = (frame.camera.height, frame.camera.width)

    def read(folder: Path | None, what: str, decode: Callable[[Path], Tensor]) -> Tensor | None:
        if folder is None or folder.suffix == ".onnx":
            return None
        path = find(folder, frame.timestep, frame.camera_index, camera_id, len(source.camera_ids) <= 1)
        if path is None:
            report.warn(f"no {what} in {folder}", where)
            return None
        try:
            value = decode(path)
        except UserError as error:
            report.warn(f"{what} left out: {str(error).replace(str(path), 'file')}", where)
            return None
        return value if value.shape[-2:] == size else _scaled(value, size)

    mask = read(joins.masks, "mask", read_mask)
    mask = frame.mask if mask is None else mask
    normal = read(joins.normals, "normals", read_normals)
    if normal is None and estimator is not None:
        normal = estimator(frame.image)
    if normal is None:
        normal = frame.normal
    elif normal is not frame.normal:
        normal = unit(normal) * (1 if mask is None else (mask > 0.5).float())
        wrong = axes_of(normal, mask)
        if wrong:
            report.warn(
                f"normals look wrong: {wrong}; expected camera space, x right, y up, z toward the camera", where
            )
    return replace(frame, mask=mask, normal=normal)


def params_of(joins: Joins, source: Source, timestep: int) -> HeadParams | None:
    """Return a timestep's head parameters: the user's file, else the source's own.

    Raises:
        UserError: the file is damaged.
    """
    path = joins.params / f"{timestep:05d}.npz" if joins.params else None
    if path is None or not path.is_file():
        return source.params(timestep)
    return read_params(path)


def read_mask(path: Path) -> Float[Tensor, "1 height width"]:
    """Read a foreground mask, 0 to 1, from any of the formats."""
    if path.suffix in (".npy", ".exr"):
        return _channels(path, 1).clamp(0, 1)
    return read_image(path, "L")


def read_normals(path: Path) -> Float[Tensor, "3 height width"]:
    """Read normals from any of the formats: n/2 + 0.5 in pictures, signed in NPY and EXR; unit or zero."""
    return unit(_channels(path, 3)) if path.suffix in (".npy", ".exr") else decode_normals(read_image(path))


def _channels(path: Path, count: int) -> Float[Tensor, "channels height width"]:
    if path.suffix == ".exr":
        value = read_exr(path)
    else:
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}): expected a float array") from None
        if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.dtype.kind not in "fiub":
            raise UserError(f"{path} is not an image: expected numbers of shape C×H×W or H×W×C")
        value = torch.from_numpy(array.astype(np.float32))
        value = value[None] if value.ndim == 2 else value
        value = value.permute(2, 0, 1) if value.shape[0] != count and value.shape[-1] == count else value
    if value.shape[0] < count:
        raise UserError(f"{path} has {value.shape[0]} channels: expected {count}")
    return value[:count].contiguous()


def unit(normal: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    """Return unit vectors; what is shorter than a half or not finite becomes zero."""
    normal = normal.nan_to_num(0, 0, 0)
    square = normal.square().sum(0, keepdim=True)
    return normal * (square > 0.25) * square.clamp(min=1e-12).rsqrt()


def axes_of(normal: Float[Tensor, "3 height width"], mask: Float[Tensor, "1 height width"] | None) -> str:
    """Say what is wrong with the axes of a person's normals, or nothing.

    Visible surfaces face the camera, so z is positive nearly everywhere; and along the silhouette normals point out of
    it, so x and y must agree with the way the mask falls off. Below, where a bust is cut, they do not: y is judged by
    the upper part alone.
    """
    known = normal.square().sum(0) > 0.25
    if int(known.sum()) < 100:
        return ""
    z = normal[2][known]
    if float((z > 0).float().mean()) < 0.8:
        return "z points away from the camera" if float(z.mean()) < -0.3 else "z is not the axis toward the camera"
    inside = (known if mask is None else mask[0] > 0.5).float()[None, None]
    blurred = torch.nn.functional.avg_pool2d(inside, 9, 1, 4, count_include_pad=False)[0, 0]
    fall_x, fall_y = -blurred.diff(dim=1, append=blurred[:, -1:]), blurred.diff(dim=0, append=blurred[-1:])
    rim = known & (blurred < 0.9)
    rows = inside[0, 0].any(1).nonzero()[:, 0]
    upper = torch.arange(len(rim))[:, None] < rows[0] + 0.4 * (rows[-1] - rows[0])
    for name, fall, channel, where in (
        ("x points left", fall_x, normal[0], rim),
        ("y points down", fall_y, normal[1], rim & upper),
    ):
        weight, along = fall[where], channel[where]
        if float((weight * along).sum()) < -0.5 * float((weight * along).abs().sum()):
            return name
    return ""


def _scaled(value: Float[Tensor, "channels height width"], size: tuple[int, int]) -> Tensor:
    return interpolate(value[None], size, mode="bilinear", antialias=True)[0]
