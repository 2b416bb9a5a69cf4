"""RenderMe-360 (Pan et al. 2023): SMC files, which are HDF5 (the `data` extra: h5py), 60 cameras at 30 frames/s.

    {actor}_{part}_raw.smc, {actor}_{part}_anno.smc        or one {actor}_{part}.smc with all of it
    Camera/{00..59}/color|mask/{frame}     encoded pictures (PNG or JPEG bytes); the mask is the largest channel
    Calibration/{00..59}/K, D, RT          3×3 in pixels of `Camera`'s resolution; 5 distortion terms; 4×4
    FLAME/{frame}/global_pose, neck_pose, jaw_pose, left_eye_pose, right_eye_pose, trans, shape 100, exp 50

Images usually are in raw, masks, calibration and FLAME in anno; either file is looked into for everything. **RT is
camera to world** in OpenCV axes, metres; the rig's world has y down and the face toward −z, and stays so: FLAME's
rotation and translation refer to it. Pictures are undistorted where D is not zero (it is, in the files we know of).

Nothing outside the files is read: links (soft or external), external storage and virtual data sets are refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError, install_extra
from geodiff4d.core.geometry import invert
from geodiff4d.core.images import decode_image
from geodiff4d.data.importing import Choice, Report, Source, SourceFrame, Wanted, camera_checked
from geodiff4d.heads.rig import HeadParams

FPS = 30.0
MAX_BYTES = 256_000_000
"""Larger entries are refused before they are read: a picture of 5 megapixels has far less."""
SHAPE, EXPR = 300, 100
"""FLAME's own sizes: the fit's 100 and 50 coefficients are padded with zeros."""
ATTRIBUTES = ("actor_id", "performance_part", "capture_date", "age", "gender")


class SmcFile:
    """An SMC file that gives out only what is inside it."""

    def __init__(self, path: Path):
        """Open it.

        Raises:
            UserError: h5py is not installed; the file is truncated or not HDF5.
        """
        try:
            import h5py
        except ImportError:
            raise UserError(f"reading RenderMe-360 needs h5py: run `{install_extra('data')}`") from None
        self._h5py: Any = h5py
        self.path = path
        try:
            self.file: Any = h5py.File(path, "r", locking="best-effort")
        except (OSError, ValueError) as error:
            reason = "truncated" if "truncated" in str(error) else str(error)
            raise UserError(f"{path} is not an SMC file that can be read ({reason}): download it again") from None

    def get(self, name: str) -> Any:
        """Return the group or data set of a path such as Camera/25/color, or None.

        Raises:
            UserError: a part of the path is a link, or the data lie outside this file.
        """
        node = self.file
        try:
            for part in name.split("/"):
                if not isinstance(node, self._h5py.Group) or part not in node.keys():  # noqa: SIM118
                    return None
                if not isinstance(node.get(part, getlink=True), self._h5py.HardLink):
                    raise UserError(f"{self.path}: {name} is a link, which may point outside: refused; expected data")
                node = node[part]
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path}: {name} is damaged ({error}): download the file again") from None
        if isinstance(node, self._h5py.Dataset) and (node.external or node.is_virtual):
            raise UserError(f"{self.path}: {name} is stored in another file: refused; expected data inside")
        return node

    def keys(self, name: str) -> list[str]:
        """Return the names below a group, none if it is missing.

        Raises:
            UserError: as `get`.
        """
        node = self.get(name)
        try:
            return list(node.keys()) if isinstance(node, self._h5py.Group) else []
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.path}: {name} is damaged ({error}): download the file again") from None

    def array(self, name: str) -> np.ndarray | None:
        """Read a data set, None if it is missing.

        Raises:
            UserError: as `get`; or it is damaged, or absurdly large.
        """
        node = self.get(name)
        if not isinstance(node, self._h5py.Dataset):
            return None
        if node.nbytes > MAX_BYTES:
            raise UserError(f"{self.path}: {name} has {node.nbytes:,} bytes: at most {MAX_BYTES:,} are read")
        try:
            return np.asarray(node[()])
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{self.path}: {name} is damaged ({str(error)[:80]}): download the file again") from None


class Performance:
    """One actor's part and the files that hold it, open while they are used: a data set has thousands."""

    def __init__(self, name: str, paths: list[Path]):
        self.name, self.paths = name, paths
        self._files: list[SmcFile] = []

    @property
    def files(self) -> list[SmcFile]:
        self._files = self._files or [SmcFile(path) for path in self.paths]
        return self._files

    def close(self) -> None:
        """Close the files; they open again when asked for something."""
        for file in self._files:
            file.file.close()
        self._files = []

    def array(self, name: str) -> np.ndarray | None:
        """Read a data set from the first file that has it."""
        return next((value for value in (file.array(name) for file in self.files) if value is not None), None)

    def keys(self, name: str) -> list[str]:
        return sorted({key for file in self.files for key in file.keys(name)})

    @property
    def resolution(self) -> tuple[int, int] | None:
        """Height and width that the intrinsics hold for, where the files say it."""
        for file in self.files:
            group = file.get("Camera")
            value = None if group is None else group.attrs.get("resolution")
            if value is not None and np.size(value) == 2:
                h, w = (int(v) for v in np.ravel(value))
                return h, w
        return None

    def about(self) -> dict[str, str]:
        """Return who it is and when, as text."""
        attrs = self.files[0].file.attrs
        found = {name: attrs[name] for name in ATTRIBUTES if name in attrs}
        return {k: v.decode() if isinstance(v, bytes) else str(v) for k, v in found.items()}


def read(src: Path, choice: Choice, report: Report) -> list[Source]:
    """Find the performances below a folder, or in one SMC file and its twin.

    Raises:
        UserError: there is none, or none that has pictures and calibration.
    """
    src = Path(src)
    found = _performances(src)
    if not found:
        raise UserError(f"{src} has no SMC files: expected {{actor}}_{{part}}_raw.smc and _anno.smc")
    chosen = [p for p in found if choice.picks_clip(p.name)]
    if not chosen:
        raise UserError(f"{src} has no clip that matches {' '.join(choice.only)}: found {found[0].name} and others")
    sources: list[Source] = []
    problems: list[str] = []
    for performance in chosen:
        try:
            sources.append(_source(performance, choice, report))
        except UserError as error:
            problems.append(str(error))
            report.warn(f"{performance.name} was left out: {error}")
        finally:
            performance.close()
    if not sources:
        raise UserError(problems[0])
    return sources


def _performances(src: Path) -> list[Performance]:
    stem = re.compile(r"(.+?)(?:_(raw|anno))?\.smc")
    if src.is_file():
        match = stem.fullmatch(src.name)
        if not match:
            raise UserError(f"{src} is not an SMC file: expected {{actor}}_{{part}}_raw.smc or a folder of them")
        folder, wanted = src.parent, match[1]
    else:
        folder, wanted = src, None
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.smc"), reverse=True):  # raw before anno: pictures are looked for first
        match = stem.fullmatch(path.name)
        if match and wanted in (None, match[1]):
            groups.setdefault(match[1], []).append(path)
    return [Performance(name, paths) for name, paths in sorted(groups.items())]


def _source(performance: Performance, choice: Choice, report: Report) -> Source:
    name = performance.name
    cameras, distortions, frames_of = _cameras(performance, choice, report)
    if not cameras:
        raise UserError(
            f"{name} has no camera with pictures and calibration: expected both the _raw.smc and the _anno.smc file"
        )
    steps = choice.picks(set().union(*frames_of.values()))

    def frames(wanted: Wanted) -> Iterator[SourceFrame]:
        try:
            for t in steps:
                for index, camera in cameras.items():
                    if t in frames_of[index] and wanted(t, index):
                        frame = _frame(performance, t, index, camera, distortions[index], report)
                        if frame is not None:
                            yield frame
        finally:
            performance.close()

    for index in cameras:
        missing = [t for t in steps if t not in frames_of[index]]
        if missing:
            report.warn(f"{name}: {len(missing)} frames are missing", f"camera {index:02d}")
    has_flame = bool(performance.keys("FLAME"))
    if not has_flame:
        report.warn(f"{name}: no FLAME parameters (only expression parts have them)")
    extra = {"dataset": "RenderMe-360", "participant": performance.about().get("actor_id", name.split("_")[0])}
    extra |= {"about": performance.about(), "license": "RenderMe-360's terms of use"}
    return Source(
        name, frames, sum(t in frames_of[i] for i in cameras for t in steps), head="flame",
        params=lambda t: _params(performance, t, report) if has_flame else None, fps=FPS / choice.every,
        camera_ids={i: f"{i:02d}" for i in cameras}, extra=extra,
    )  # fmt: skip


def _cameras(
    performance: Performance, choice: Choice, report: Report
) -> tuple[dict[int, Camera], dict[int, np.ndarray], dict[int, set[int]]]:
    cameras: dict[int, Camera] = {}
    distortions: dict[int, np.ndarray] = {}
    frames_of: dict[int, set[int]] = {}
    calibrated = set(performance.keys("Calibration"))
    for key in performance.keys("Camera"):
        if not key.isdigit() or not choice.picks_camera(int(key), key):
            continue
        where = f"{performance.name}, camera {key}"
        frames = {int(k) for k in performance.keys(f"Camera/{key}/color") if k.isdigit()}
        if not frames or key not in calibrated:
            what = "without calibration" if frames else "without pictures"
            report.warn(f"{performance.name}: a camera {what} was left out", key)
            continue
        try:
            K, RT, D = (performance.array(f"Calibration/{key}/{part}") for part in ("K", "RT", "D"))
            size = performance.resolution or _size_of(performance, key, min(frames))
            cameras[int(key)] = _camera(K, RT, size, where)
        except UserError as error:
            report.warn(f"a camera was left out: {error}")
            continue
        distortions[int(key)] = np.zeros(5) if D is None else np.ravel(D).astype(np.float64)
        frames_of[int(key)] = frames
    return cameras, distortions, frames_of


def _camera(K: np.ndarray | None, RT: np.ndarray | None, size: tuple[int, int], where: str) -> Camera:
    if K is None or RT is None or K.shape != (3, 3) or RT.shape not in ((4, 4), (3, 4)):
        raise UserError(f"{where}: expected K 3×3 and RT 4×4")
    T_world_cam = torch.eye(4, dtype=torch.float64)
    T_world_cam[: len(RT)] = torch.from_numpy(RT.astype(np.float64))
    checked = camera_checked(T_world_cam, torch.from_numpy(K.astype(np.float64)), size[1], size[0], where)
    return Camera(invert(checked.T_cam_world), checked.K, size[1], size[0])


def _size_of(performance: Performance, key: str, t: int) -> tuple[int, int]:
    image = _picture(performance, f"Camera/{key}/color/{t}")
    if image is None:
        raise UserError(f"{performance.name}, camera {key}: no picture to take the size from")
    return image.shape[1], image.shape[2]


def _picture(performance: Performance, name: str) -> Tensor | None:
    data = performance.array(name)
    return None if data is None else decode_image(data.astype(np.uint8).tobytes(), name.split("/")[2])


def _frame(
    performance: Performance, t: int, index: int, camera: Camera, distortion: np.ndarray, report: Report
) -> SourceFrame | None:
    where = f"{performance.name}/{t:05d}_{index:02d}"
    try:
        image = _picture(performance, f"Camera/{index:02d}/color/{t}")
    except UserError as error:
        report.warn(f"a frame was left out: {error}", where)
        return None
    if image is None:
        report.warn("a frame was left out: not a picture", where)
        return None
    mask = None
    try:
        mask = _picture(performance, f"Camera/{index:02d}/mask/{t}")
    except UserError as error:
        report.warn(f"mask left out: {error}", where)
    if mask is None:
        report.warn("no mask", where)
    else:
        mask = mask.amax(0, keepdim=True)
        if mask.shape[1:] != image.shape[1:]:
            mask = interpolate(mask[None], image.shape[1:], mode="bilinear", antialias=True)[0]
    camera = camera.resized(image.shape[2], image.shape[1])
    if np.abs(distortion).max(initial=0) > 1e-6:
        image = undistorted(image, camera, torch.from_numpy(distortion).float())
        mask = None if mask is None else undistorted(mask, camera, torch.from_numpy(distortion).float())
    return SourceFrame(t, index, camera, image, mask)


def undistorted(
    image: Float[Tensor, "channels height width"], camera: Camera, D: Float[Tensor, " terms"]
) -> Float[Tensor, "channels height width"]:
    """Return what a pinhole would have seen, by OpenCV's model (k1, k2, p1, p2, k3)."""
    k1, k2, p1, p2, k3 = (D.tolist() + [0.0] * 5)[:5]
    v, u = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], -1) @ torch.linalg.inv(camera.K).mT
    x, y = rays[..., 0], rays[..., 1]
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    xd = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    yd = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    seen = torch.stack([xd, yd, torch.ones_like(xd)], -1) @ camera.K.mT
    grid = seen[..., :2] / torch.tensor([camera.width / 2, camera.height / 2]) - 1
    return grid_sample(image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


def _params(performance: Performance, t: int, report: Report) -> HeadParams | None:
    def part(name: str, size: int) -> Tensor:
        value = performance.array(f"FLAME/{t}/{name}")
        flat = np.zeros(0) if value is None else np.ravel(value).astype(np.float32)
        if not 0 < flat.size <= size or not np.isfinite(flat).all():
            raise UserError(f"{name} has {flat.size} numbers")
        return torch.from_numpy(np.pad(flat, (0, size - flat.size))).float()

    try:
        eyes = torch.cat([part("left_eye_pose", 3), part("right_eye_pose", 3)])
        return HeadParams(
            shape=part("shape", SHAPE), expr=part("exp", EXPR), rotation=part("global_pose", 3),
            neck_pose=part("neck_pose", 3), jaw_pose=part("jaw_pose", 3), eyes_pose=eyes, translation=part("trans", 3),
        )  # fmt: skip
    except UserError as error:
        report.warn(f"{performance.name}: no usable FLAME parameters ({error})", f"{t:05d}")
        return None
