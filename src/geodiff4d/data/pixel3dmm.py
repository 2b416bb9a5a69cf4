"""Pixel3DMM's tracks (Giebenhain et al. 2025): the tracker's results and the pictures it cropped.

    TRACKING/{video}_nV1_noPho_uv2000.0_n1000.0/checkpoint/{t:05d}.frame    one timestep's parameters and camera
    PREPROCESSED/{video}/cropped/{t:05d}.jpg                                512² crops
    PREPROCESSED/{video}/seg_og/{t:05d}.png                                 classes by pixel, 0 is the background
    PREPROCESSED/{video}/p3dmm/normals/{t:05d}.png                          predicted normals, in FLAME's space

`PREPROCESSED` is found where PIXEL3DMM_PREPROCESSED_DATA says, or near the results. A .frame is a zip of torch's around
a pickle of numpy arrays, which the restricted reader reads (`heads.pickles`): nothing in it is run. Rotations are 6D
(the matrix's first two rows). The mesh is posed without its global rotation and then moved by R, t about the origin;
the camera is OpenGL's, world to camera, with focal length fl · S and its centre near the middle of S² pixels. FLAME is
2020's by default; jaw and neck turn by FLAME's rules, and eyelids are added after skinning.
"""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import OPENGL_FROM_OPENCV
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import ZIP_ERRORS
from geodiff4d.core.geometry import matrix_to_axis_angle, rigid
from geodiff4d.core.images import decode_normals, read_image
from geodiff4d.data.flame_tracks import EXPRESSIONS, SHAPES, known_head, motion_of, padded, place
from geodiff4d.data.importing import Choice, Report, Source, SourceFrame, Wanted, camera_checked
from geodiff4d.heads.pickles import read_bytes
from geodiff4d.heads.rig import Head, HeadParams

MODEL = "flame2020"
ENVIRONMENT = "PIXEL3DMM_PREPROCESSED_DATA"
MAX_FRAME_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class _Track:
    """One timestep, checked, in the tracker's own terms."""

    params: HeadParams
    """Without global rotation and translation."""
    T_world_mesh: Float[Tensor, "4 4"]
    T_cam_world: Float[Tensor, "4 4"]
    """OpenCV."""
    K: Float[Tensor, "3 3"]
    """For pictures of `size`² pixels, whose centres are at half integers."""
    size: int


def read(src: Path, choice: Choice, report: Report) -> list[Source]:
    """Find results: `src` is one video's tracking folder (with checkpoint/), or holds some.

    Raises:
        UserError: there is none, or its pictures cannot be found.
    """
    src = Path(src)
    if src.is_dir() and src.name == "checkpoint":
        src = src.parent
    if (src / "checkpoint").is_dir():
        return [_source("", src, choice, report)]
    below = [p.parent for p in sorted(src.glob("*/checkpoint"))] if src.is_dir() else []
    found = [_source(p.name, p, choice, report) for p in below if choice.picks_clip(p.name)]
    if not found:
        raise UserError(f"{src} is not Pixel3DMM's result: expected a folder with checkpoint/*.frame")
    return found


def _source(name: str, folder: Path, choice: Choice, report: Report) -> Source:
    video = folder.resolve().name.split("_nV")[0]
    data = _preprocessed(folder, video)
    files = {int(p.stem): p for p in sorted((folder / "checkpoint").glob("*.frame")) if p.stem.isdigit()}
    if not files or not choice.picks_camera(0, "camera"):
        raise UserError(f"{folder} has no checkpoint/00000.frame of the camera asked for: there is one, 0")
    steps = choice.picks(files)
    head = known_head(MODEL, "Pixel3DMM", report)

    def frames(wanted: Wanted) -> Iterator[SourceFrame]:
        for t in steps:
            frame = _frame(data, files[t], head, t, report, f"{name}/{t:05d}".lstrip("/")) if wanted(t, 0) else None
            if frame is not None:
                yield frame

    def params(t: int) -> HeadParams | None:
        try:
            track = read_frame(files[t])
        except UserError:
            return None
        return place(head, track.params, track.T_world_mesh)[0]

    return Source(
        name, frames, len(steps), head=MODEL, params=params, fps=24.0 / choice.every, camera_ids={0: "camera"},
        motion=motion_of(head),
        extra={"dataset": "Pixel3DMM", "sequence": video, "motion": "head" if head else "cameras"},
    )  # fmt: skip


def _preprocessed(folder: Path, video: str) -> Path:
    """Find the folder with the video's crops."""
    at = folder.resolve()
    places = [Path(os.environ[ENVIRONMENT]) / video] if os.environ.get(ENVIRONMENT) else []
    places += [at, at.parent / video, at.parent.parent / video]
    places += [p / video for p in sorted(at.parent.parent.iterdir()) if p.is_dir()]
    for found in places:
        if (found / "cropped").is_dir():
            return found
    raise UserError(
        f"{folder} is a track of {video!r}, whose pictures are not found: expected {video}/cropped/ beside it, "
        f"or set {ENVIRONMENT} to the folder that Pixel3DMM preprocessed into"
    )


def read_frame(path: Path) -> _Track:
    """Read a .frame file.

    Raises:
        UserError: it is damaged, holds more than arrays, or is not Pixel3DMM's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inner = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
            if inner.file_size > MAX_FRAME_BYTES:
                raise UserError(f"{path} unpacks to {inner.file_size:,} bytes: a .frame has some kilobytes")
            data = archive.read(inner)
    except (*ZIP_ERRORS, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or no .frame of Pixel3DMM's ({str(error)[:80]})") from None
    value = read_bytes(path, data)
    try:
        return _track(value, str(path))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is not Pixel3DMM's: missing or bad field {str(error)[:80]}") from None


def _track(value: Any, where: str) -> _Track:
    flame, camera = value["flame"], value["camera"]

    def row(name: str, length: int, source: dict = flame) -> Float[Tensor, " length"]:
        array = np.asarray(source[name])
        if array.size != length:
            raise ValueError(f"{name} of {array.size} numbers, expected {length}")
        return padded(array, length, f"{where}, {name}")

    def turn(six: Float[Tensor, " 6"]) -> Float[Tensor, " 3"]:
        return matrix_to_axis_angle(matrix_from_6d(six.double())).float()

    eyes = row("eyes", 12)
    zero = torch.zeros(3)
    params = HeadParams(
        padded(np.asarray(flame["shape"])[:1], SHAPES, f"{where}, shape"),
        padded(flame["exp"], EXPRESSIONS, f"{where}, exp"), zero, turn(row("neck", 6)), turn(row("jaw", 6)),
        torch.cat([turn(eyes[:6]), turn(eyes[6:])]), zero, row("eyelids", 2),
    )  # fmt: skip
    T_world_mesh = rigid(matrix_from_6d(row("R", 6).double()), row("t", 3).double())
    R_gl = torch.from_numpy(np.asarray(camera["R_base_0"], np.float64).reshape(3, 3))
    T_gl = rigid(R_gl, row("t_base_0", 3, camera).double())
    size = int(np.ravel(value.get("img_size", 256))[0])
    focal = float(np.ravel(camera["fl"])[0]) * size
    px, py = (float(x) for x in np.ravel(camera["pp"])[:2])
    # Its loss compares, in pixel indices, x with S/2 - 1/2 + px (S + 1)/2 and y with one more: half a pixel is ours.
    K = torch.tensor([[focal, 0, size / 2 + px * (size + 1) / 2], [0, focal, size / 2 + 1 + py * (size + 1) / 2],
                      [0, 0, 1]], dtype=torch.float64)  # fmt: skip
    return _Track(params, T_world_mesh, OPENGL_FROM_OPENCV.double() @ T_gl, K, size)


def matrix_from_6d(six: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch 3 3"]:
    """Return the rotations whose first two rows are given (Zhou et al. 2019), made orthonormal.

    Raises:
        ValueError: the rows are zero or parallel.
    """
    a, b = six[..., :3], six[..., 3:]
    x = a / a.norm(dim=-1, keepdim=True)
    y = b - (x * b).sum(-1, keepdim=True) * x
    y = y / y.norm(dim=-1, keepdim=True)
    R = torch.stack([x, y, torch.linalg.cross(x, y)], -2)
    if not R.isfinite().all():
        raise ValueError("a 6D rotation, expected two rows that are not parallel")
    return R


def _frame(data: Path, path: Path, head: Head | None, t: int, report: Report, where: str) -> SourceFrame | None:
    try:
        track = read_frame(path)
        picture = next((p for s in (".jpg", ".png") if (p := data / f"cropped/{t:05d}{s}").is_file()), None)
        if picture is None:
            report.warn(f"frames left out: no picture in {data}/cropped", where)
            return None
        image = read_image(picture)
        height, width = image.shape[1:]
        T = track.T_cam_world @ place(head, track.params, track.T_world_mesh)[1]
        own = camera_checked(T, track.K, track.size, track.size, where)
    except UserError as error:
        report.warn(f"frames left out: {str(error).replace(str(path), 'frame').replace(where, 'frame')}", where)
        return None
    camera = own.resized(width, height)

    def beside(name: str, mode: str) -> Tensor | None:
        file = data / f"{name}/{t:05d}.png"
        if not file.is_file():
            report.warn(f"no {name} in {data}", where)
            return None
        try:
            value = read_image(file, mode)
        except UserError as error:
            report.warn(f"{name} left out: {str(error).replace(str(file), 'file')}", where)
            return None
        if value.shape[1:] != image.shape[1:]:
            value = torch.nn.functional.interpolate(value[None], (height, width), mode="nearest-exact")[0]
        return value

    classes = beside("seg_og", "L")
    mask = None if classes is None else (classes > 0).float()
    normal = beside("p3dmm/normals", "RGB")
    if normal is not None:
        # FLAME's space turns by the head's rotation into the world, and OpenGL's camera axes are those of our normals.
        R = (OPENGL_FROM_OPENCV[:3, :3].double() @ (track.T_cam_world @ track.T_world_mesh)[:3, :3]).float()
        normal = torch.einsum("ij,jhw->ihw", R, decode_normals(normal)) * (1 if mask is None else mask)
    return SourceFrame(t, 0, camera, image, mask, normal)
