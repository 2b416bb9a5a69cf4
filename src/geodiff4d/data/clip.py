"""The one data contract: frames of one person, with cameras, masks, normals and head parameters.

On disk a clip is VHAP's NeRF-style export (`transforms.json`, OpenGL camera-to-world, `flame_param/`), extended
by `normals/`, expression tokens and the reference portrait, so a VHAP export is a clip and a clip with a FLAME head is
a VHAP export. In memory everything follows the project's conventions (OpenCV, metres, [0, 1]).
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import OPENGL_FROM_OPENCV, Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_folder, read_arrays, read_json, read_tensors, save_tensors, write_json
from geodiff4d.core.geometry import invert
from geodiff4d.core.images import decode_normals, encode_normals, read_image, write_image
from geodiff4d.data.importing import camera_checked, inside
from geodiff4d.heads.rig import HeadParams

FORMAT_VERSION = 1
MAX_FPS = 1000.0
MAX_PARAM = 1e3
"""Radians, metres and standard deviations of people stay far below."""
SIZES = {"rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3, "eyelids": 2}


@dataclass(frozen=True)
class ClipHeader:
    """What transforms.json says of a clip as a whole; its frames are not looked at yet."""

    head_name: str
    fps: float
    extra: dict
    """Free notes of whoever wrote the clip: subject, track, where parameters came from …"""
    frames: list[dict]
    shared: dict
    """Intrinsics that hold for all frames that name none."""


def read_header(folder: Path) -> ClipHeader:
    """Read what a clip says of itself, opening no frame.

    Raises:
        UserError: no transforms.json, or one that is not a clip's.
    """
    path = folder / "transforms.json"
    if not path.exists():
        raise UserError(
            f"{folder} is not a clip: expected a folder with transforms.json (from track, import, synth or synthesize)"
        )
    meta = read_json(path)
    try:
        if not isinstance(meta, dict):
            raise TypeError(f"(expected an object, got {type(meta).__name__})")
        ours, frames = meta.get("geodiff4d", {}), meta["frames"]
        head, fps, extra = ours.get("head", "flame"), float(ours.get("fps", 24.0)), ours.get("extra", {})
        if not 0 < fps <= MAX_FPS:
            raise ValueError(f"fps ({fps}: expected more than 0 and at most {MAX_FPS:g})")
        if not isinstance(head, str) or not isinstance(extra, dict):
            raise TypeError("head or extra (expected text and an object)")
        if not isinstance(frames, list) or not all(isinstance(f, dict) for f in frames):
            raise TypeError("frames (expected a list of objects)")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise not_a_clip(folder, error) from None
    return ClipHeader(head, fps, extra, frames, meta)


def not_a_clip(folder: Path, error: Exception) -> UserError:
    """Return the error to raise where a transforms.json lacks a field or holds a wrong one."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{folder}/transforms.json is not a clip's: missing or bad field {reason}")


@dataclass(frozen=True)
class FrameRecord:
    """Where one frame's files are, and the camera that saw it."""

    timestep: int
    camera_index: int
    camera: Camera
    image_path: Path
    mask_path: Path | None
    normal_path: Path | None
    params_path: Path | None
    unread: bool = False
    """Whether its parameters were not read off the image (no face was seen, or a doubtful one) but off its neighbours:
    such a frame is neither trained on nor read for expressions."""


@dataclass(frozen=True)
class ClipFrame:
    """One frame in memory."""

    timestep: int
    camera_index: int
    camera: Camera
    image: Float[Tensor, "3 height width"]
    mask: Float[Tensor, "1 height width"]
    """Foreground, 0 to 1; all ones if the clip has no masks."""
    normal: Float[Tensor, "3 height width"] | None
    """Camera-space unit normals (x right, y up, z to the camera), zero on the background."""
    params: HeadParams | None


class Clip:
    """A clip on disk, read frame by frame.

    Example:
        >>> clip = Clip("runs/demo/clip")  # doctest: +SKIP
        >>> clip.frame(0).image.shape  # doctest: +SKIP
        torch.Size([3, 256, 256])
    """

    def __init__(self, folder: Path | str):
        """Open a clip.

        Raises:
            UserError: no transforms.json, or one that is not a clip's.
        """
        self.folder = Path(folder)
        header = read_header(self.folder)
        self.head_name, self.fps, self.extra = header.head_name, header.fps, header.extra
        self._checked: set[Path] = set()
        try:
            self.records = [self._record(frame, header.shared) for frame in header.frames]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise not_a_clip(self.folder, error) from None
        if not self.records:
            raise UserError(f"{self.folder} has no frames: expected at least one")

    def _record(self, frame: dict, shared: dict) -> FrameRecord:
        def get(key: str) -> float:
            return float(frame[key] if key in frame else shared[key])

        T = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        if T.shape != (4, 4) or not T.isfinite().all():
            raise ValueError("transform_matrix (expected a finite 4×4 matrix)")
        K = torch.tensor([[get("fl_x"), 0, get("cx")], [0, get("fl_y"), get("cy")], [0, 0, 1]], dtype=torch.float32)
        T_world_cam, width, height = T @ OPENGL_FROM_OPENCV.double(), int(get("w")), int(get("h"))
        camera_checked(T_world_cam, K, width, height, f"{self.folder}/transforms.json, {frame['file_path']}")
        camera = Camera(invert(T_world_cam).float(), K, width, height)

        def place(name: str) -> Path:
            """Look at each folder's links once: a clip has thousands of files."""
            path = self.folder / name
            if path.parent not in self._checked:
                inside(self.folder, name)
                self._checked.add(path.parent)
            return path

        def path(key: str) -> Path | None:
            return place(frame[key]) if frame.get(key) else None

        return FrameRecord(
            int(frame["timestep_index"]), int(frame["camera_index"]), camera, place(frame["file_path"]),
            path("fg_mask_path"), path("normal_path"), path("flame_param_path"), bool(frame.get("unread")),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def timesteps(self) -> list[int]:
        """The timesteps present, ascending."""
        return sorted({r.timestep for r in self.records})

    @cached_property
    def camera_indices(self) -> list[int]:
        return sorted({r.camera_index for r in self.records})

    def require_head(self, name: str) -> None:
        """Check that the parameters are this head's. A VHAP export says "flame" without a year: any FLAME will do.

        Raises:
            UserError: they belong to another head; sizes alone would not tell, FLAME's years share them.
        """
        if self.head_name != name and not (self.head_name == "flame" and name.startswith("flame")):
            raise UserError(
                f"{self.folder} was tracked with the head {self.head_name!r}, expected {name!r}: coefficients of "
                f"different heads do not mix; track it again with the head {name}"
            )

    def frame(self, index: int) -> ClipFrame:
        """Read one frame with everything the clip has for it.

        Raises:
            UserError: a file is missing or damaged, or its size is not the camera's.
        """
        r = self.records[index]
        image = read_image(r.image_path)
        mask = read_image(r.mask_path, "L") if r.mask_path else torch.ones_like(image[:1])
        normal = decode_normals(read_image(r.normal_path)) if r.normal_path else None
        for path, picture in ((r.image_path, image), (r.mask_path, mask), (r.normal_path, normal)):
            if picture is not None and picture.shape[1:] != (r.camera.height, r.camera.width):
                raise UserError(
                    f"{path} has {picture.shape[2]}×{picture.shape[1]} pixels, but its camera {r.camera.width}×"
                    f"{r.camera.height}: make them equal, in the file or in {self.folder.name}/transforms.json"
                )
        params = self.params(r.timestep) if r.params_path else None
        normal = None if normal is None else normal * (mask > 0)
        return ClipFrame(r.timestep, r.camera_index, r.camera, image, mask, normal, params)

    def params(self, timestep: int) -> HeadParams:
        """Read the head parameters of a timestep (no batch axis).

        Raises:
            UserError: the clip has none for it, or what it has is no person's.
        """
        paths = [r.params_path for r in self.records if r.timestep == timestep and r.params_path]
        if not paths or not paths[0].exists():
            raise UserError(
                f"{self.folder} has no head parameters for timestep {timestep}: run `geodiff4d track` on it first"
            )
        params = read_params(paths[0])
        check_params(params, f"{self.folder}, timestep {timestep}")
        return params

    @property
    def expression_tokens(self) -> Float[Tensor, "timesteps tokens channels"] | None:
        """Expression tokens by position in `timesteps`, if the clip was generated."""
        path = self.folder / "expression_tokens.safetensors"
        if not path.exists():
            return None
        tokens = read_tensors(path).get("tokens")
        count = len(self.timesteps)
        if tokens is None or tokens.dim() != 3 or len(tokens) != count or not bool(tokens.isfinite().all()):
            raise UserError(f"{path} is damaged: expected finite tokens of {count} timesteps; make the clip again")
        return tokens.float()

    @property
    def reference(self) -> Float[Tensor, "3 height width"] | None:
        path = self.folder / "reference.png"
        return read_image(path) if path.exists() else None

    @property
    def reference_normal(self) -> Float[Tensor, "3 height width"] | None:
        path = self.folder / "reference_normal.png"
        return decode_normals(read_image(path)) if path.exists() else None


def write_params(path: Path, params: HeadParams) -> None:
    """Write VHAP's layout: every array has a leading row axis, but `shape` has none."""
    present = {k: v.detach().cpu().numpy().astype(np.float32) for k, v in vars(params).items() if v is not None}
    np.savez(path, **{k: v if k == "shape" else v[None] for k, v in present.items()})


def check_params(params: HeadParams, where: str) -> None:
    """Check that head parameters are a person's; the message begins with `where`.

    Raises:
        UserError: they have NaN, numbers that are far too large, or another size.
    """
    for name, value in vars(params).items():
        if value is not None and not bool((value.abs() <= MAX_PARAM).all()):
            raise UserError(
                f"{where}: {name} has NaN or numbers beyond ±{MAX_PARAM:g}: expected head parameters; track it again"
            )
        if value is None:
            continue
        rows = ("vertices", 3) if name == "static_offset" else (SIZES.get(name, "any"),)
        if value.dim() != len(rows) or any(
            isinstance(n, int) and n != m for n, m in zip(rows, value.shape, strict=True)
        ):
            expected = ", ".join(map(str, rows))
            raise UserError(f"{where}: {name} has the shape {list(value.shape)}, expected [{expected}]; track it again")


def read_params(path: Path) -> HeadParams:
    """Read one timestep's head parameters as a clip (or VHAP) stores them, without batch axis.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    known = {f.name for f in fields(HeadParams)}
    arrays = {k: v for k, v in read_arrays(path).items() if k in known}
    try:
        tensors = {k: torch.from_numpy(v.astype(np.float32)) for k, v in arrays.items()}
        return HeadParams(**{k: v if k == "shape" else v[0] for k, v in tensors.items()})
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not head parameters ({error}): expected FLAME-named arrays, as in a clip") from None


FRAME_FOLDERS = ("images", "fg_masks", "normals")
"""Of a clip: an image for every frame in each."""


def write_frame(
    folder: Path, timestep: int, camera_index: int, image: Float[Tensor, "3 height width"],
    mask: Float[Tensor, "1 height width"] | None = None, normal: Float[Tensor, "3 height width"] | None = None,
) -> None:  # fmt: skip
    """Write a frame's images where a clip has them: image and mask in [0, 1], camera-space unit normals."""
    stem = f"{timestep:05d}_{camera_index:02d}.png"
    write_image(folder / "images" / stem, image)
    if mask is not None:
        write_image(folder / "fg_masks" / stem, mask)
    if normal is not None:
        write_image(folder / "normals" / stem, encode_normals(normal, torch.ones_like(normal[:1])))


class ClipWriter:
    """Write a clip; the folder appears when the `with` block ends well, and not at all otherwise.

    Example:
        >>> with ClipWriter("out", head="openhead") as clip:  # doctest: +SKIP
        ...     clip.add_params(0, params)
        ...     clip.add(0, 0, image, camera, mask, normal)
    """

    def __init__(self, folder: Path | str, head: str = "openhead", fps: float = 24.0, extra: dict | None = None):
        self.folder, self.head, self.fps, self.extra = Path(folder), head, fps, extra or {}
        self._frames: list[dict] = []
        self._with_params: set[int] = set()
        self._unread: set[int] = set()
        self._fresh = fresh_folder(self.folder)

    def __enter__(self) -> "ClipWriter":
        self.path = self._fresh.__enter__()
        for name in (*FRAME_FOLDERS, "flame_param"):
            (self.path / name).mkdir()
        return self

    def add_params(self, timestep: int, params: HeadParams) -> None:
        """Store a timestep's head parameters (no batch axis)."""
        write_params(self.path / f"flame_param/{timestep:05d}.npz", params)
        if not self._with_params:
            zero = params.map(torch.zeros_like)
            open_mouth = torch.tensor([0.3, 0.0, 0.0])
            canonical = replace(zero, shape=params.shape, static_offset=params.static_offset, jaw_pose=open_mouth)
            write_params(self.path / "canonical_flame_param.npz", canonical)
        self._with_params.add(timestep)

    def mark_unread(self, timestep: int) -> None:
        """Say that a timestep's parameters were not read off its images: no face was seen, or a doubtful one."""
        self._unread.add(timestep)

    def add(
        self, timestep: int, camera_index: int, image: Float[Tensor, "3 height width"], camera: Camera,
        mask: Float[Tensor, "1 height width"] | None = None, normal: Float[Tensor, "3 height width"] | None = None,
    ) -> None:  # fmt: skip
        """Store a frame: image and mask in [0, 1], camera-space unit normals."""
        write_frame(self.path, timestep, camera_index, image, mask, normal)
        self._list(timestep, camera_index, camera, mask is not None, normal is not None)

    def take_written(self, folder: Path, frames: Iterable[tuple[int, int, Camera]]) -> None:
        """Store frames (timestep, camera index, camera) whose image, mask and normals `write_frame` left in a folder.

        Files are linked where the file system can, so that the folder stays whole.
        """
        for timestep, camera_index, camera in frames:
            for kind in FRAME_FOLDERS:
                name = f"{kind}/{timestep:05d}_{camera_index:02d}.png"
                try:
                    os.link(folder / name, self.path / name)
                except OSError:
                    shutil.copyfile(folder / name, self.path / name)
            self._list(timestep, camera_index, camera, True, True)

    def _list(self, timestep: int, camera_index: int, camera: Camera, mask: bool, normal: bool) -> None:
        stem = f"{timestep:05d}_{camera_index:02d}.png"
        K, c2w = camera.K.double(), invert(camera.T_cam_world.double()) @ OPENGL_FROM_OPENCV.double()
        frame = {
            "timestep_index": timestep, "timestep_index_original": timestep, "timestep_id": f"{timestep:05d}",
            "camera_index": camera_index, "camera_id": f"{camera_index:02d}",
            "cx": K[0, 2].item(), "cy": K[1, 2].item(), "fl_x": K[0, 0].item(), "fl_y": K[1, 1].item(),
            "w": camera.width, "h": camera.height,
            "camera_angle_x": 2 * torch.atan(camera.width / 2 / K[0, 0]).item(),
            "camera_angle_y": 2 * torch.atan(camera.height / 2 / K[1, 1]).item(),
            "transform_matrix": c2w.tolist(), "file_path": f"images/{stem}",
            "flame_param_path": f"flame_param/{timestep:05d}.npz",
        }  # fmt: skip
        if mask:
            frame["fg_mask_path"] = f"fg_masks/{stem}"
        if normal:
            frame["normal_path"] = f"normals/{stem}"
        self._frames.append(frame)

    def set_reference(
        self, image: Float[Tensor, "3 height width"], normal: Float[Tensor, "3 height width"] | None = None
    ) -> None:
        """Store the portrait the clip was made from, and its camera-space normals."""
        write_image(self.path / "reference.png", image)
        if normal is not None:
            write_image(self.path / "reference_normal.png", encode_normals(normal, torch.ones_like(normal[:1])))

    def set_tokens(self, tokens: Float[Tensor, "timesteps tokens channels"]) -> None:
        """Store expression tokens, one row per timestep in ascending order."""
        save_tensors({"tokens": tokens.half()}, self.path / "expression_tokens.safetensors")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write_transforms()
        self._fresh.__exit__(kind, error, trace)

    def _write_transforms(self) -> None:
        for frame in self._frames:
            if frame["timestep_index"] not in self._with_params:
                del frame["flame_param_path"]
            if frame["timestep_index"] in self._unread:
                frame["unread"] = True
        first = self._frames[0] if self._frames else {}
        top = {k: first.get(k) for k in ("cx", "cy", "fl_x", "fl_y", "h", "w", "camera_angle_x", "camera_angle_y")}
        top["timestep_indices"] = sorted({f["timestep_index"] for f in self._frames})
        top["camera_indices"] = sorted({f["camera_index"] for f in self._frames})
        ours = {
            "version": FORMAT_VERSION,
            "head": self.head,
            "fps": self.fps,
            "extra": json.loads(json.dumps(self.extra)),
        }
        write_json(self.path / "transforms.json", {"geodiff4d": ours, **top, "frames": self._frames})
        # VHAP's split: the first 70 % of timesteps train; camera 8, else the last of several, validates.
        steps, cameras = top["timestep_indices"], top["camera_indices"]
        train_steps = set(steps[: max(1, int(0.7 * len(steps)))])
        held_camera = None if len(cameras) < 2 else 8 if 8 in cameras else cameras[-1]
        split = {
            "train": [
                f for f in self._frames if f["timestep_index"] in train_steps and f["camera_index"] != held_camera
            ],
            "val": [f for f in self._frames if f["timestep_index"] in train_steps and f["camera_index"] == held_camera],
            "test": [f for f in self._frames if f["timestep_index"] not in train_steps],
        }
        for name, frames in split.items():
            write_json(self.path / f"transforms_{name}.json", {"geodiff4d": ours, **top, "frames": frames})
