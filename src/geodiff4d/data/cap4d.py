"""CAP4D's tracks (Taubner et al. 2025): `fit.npz` and the pictures it was fitted to.

    fit.npz                     fx, fy, cx, cy [cameras, 1]; extr [cameras, 4, 4] world to camera, OpenCV;
                                resolutions [cameras, 2] (height, width); camera_order [cameras]; fps;
                                shape [150]; expr [T, 65], the last a blink; rot, tra, eye_rot [T, 3];
                                optional jaw_rot, neck_rot [T, 3] and valid_mask [cameras, T]
    images/{camera}/            one picture for each timestep, in the order of their names; or images/{camera}.mp4
    bg/{camera}/                foreground weights, likewise

Its model is FLAME 2023 without jaw. It skins without a kinematic chain and moves the posed mesh by rot and tra about
the origin, y up, and diag(1, -1, -1) takes that to OpenCV. `rot`, `tra` become FLAME's where the user's file is known
(`data.flame_tracks`). Then also: `neck_rot`, which turns the shoulders and not the head, becomes a turn of the root and
one back at the neck; and its surface comes along, on which the pose correctives of all joints stand at minus the
identity where FLAME has none (CAP4D subtracts the identity twice), as a static offset. The blink is what Pixel3DMM's
two eyelids are together (measured: 1.00 times their sum).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_arrays
from geodiff4d.core.geometry import axis_angle_to_matrix, matrix_to_axis_angle, rigid
from geodiff4d.core.images import read_image
from geodiff4d.data.clip import MAX_FPS
from geodiff4d.data.flame_tracks import EXPRESSIONS, SHAPES, known_head, motion_of, padded, place
from geodiff4d.data.importing import Choice, Report, Source, SourceFrame, Wanted, camera_checked, inside
from geodiff4d.data.nersemble import video_frames
from geodiff4d.heads.rig import Head, HeadParams, blend

MODEL = "flame2023-no-jaw"
BLINK = 64
"""Place of the blink among the 65 expressions."""
NEEDED = ("fx", "fy", "cx", "cy", "extr", "resolutions", "shape", "expr", "rot", "tra")
"""Arrays that a fit must have."""
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
VIDEOS = (".mp4", ".mov", ".avi", ".mkv")
OPENCV_FROM_FIT = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


@dataclass(frozen=True)
class _Fit:
    """What fit.npz says, checked."""

    names: list[str]
    cameras: list[Camera]
    """In CAP4D's world, OpenCV."""
    shape: np.ndarray
    expr: np.ndarray
    turns: dict[str, np.ndarray]
    """rot, tra, eye_rot, jaw_rot, neck_rot: [T, 3]; zero where the file has none."""
    valid: np.ndarray
    """[cameras, T]"""
    fps: float


def read(src: Path, choice: Choice, report: Report) -> list[Source]:
    """Find fits: `src` is a fit.npz, its folder, or a folder that holds such folders.

    Raises:
        UserError: there is none, or it is damaged.
    """
    src = Path(src)
    folder = src.parent if src.is_file() else src
    if (folder / "fit.npz").is_file():
        return [_source("", folder, choice, report)]
    below = [p.parent for p in sorted(folder.glob("*/fit.npz"))]
    found = [_source(p.name, p, choice, report) for p in below if choice.picks_clip(p.name)]
    if not found:
        raise UserError(f"{src} has no fit.npz: expected CAP4D's folder of one person, with fit.npz and images/")
    return found


def _source(name: str, folder: Path, choice: Choice, report: Report) -> Source:
    fit = _fit(folder / "fit.npz", report)
    head = known_head(MODEL, "CAP4D", report)
    if head is None and fit.turns["neck_rot"].any():
        report.warn("the shoulders' turn (neck_rot) is left out without FLAME's file", name)
    files, masks = ([_files(folder, what, n, len(fit.expr), report) for n in fit.names] for what in ("images", "bg"))
    asked = [i for i, n in enumerate(fit.names) if choice.picks_camera(i, n)]
    cameras = [i for i in asked if files[i] is not None]
    if not cameras:
        raise UserError(
            f"{folder} has no pictures of the cameras {', '.join(fit.names)}: expected images/{fit.names[0]}/; "
            "a fit alone, such as CAP4D's driving sequences, is no clip"
        )
    for i in asked:
        if files[i] is None:
            report.warn("a camera of the fit has no pictures", f"{name}/{fit.names[i]}".lstrip("/"))
        if isinstance(masks[i], Path):
            report.warn("mattes in a video are not read: expected a folder of pictures", f"bg/{fit.names[i]}")
    steps = choice.picks(np.nonzero(fit.valid[cameras].any(0))[0].tolist())

    def frames(wanted: Wanted) -> Iterator[SourceFrame]:
        for c in cameras:
            asked = [t for t in steps if wanted(t, c)]
            for t in asked:
                if not fit.valid[c, t]:
                    report.warn("frames left out: CAP4D marks them invalid", f"{fit.names[c]}/{t}")
            asked = [t for t in asked if fit.valid[c, t]]
            for t, image in _pictures(files[c], asked, report, f"{name}/{fit.names[c]}".lstrip("/")):
                frame = _frame(fit, head, c, t, image, masks[c], report, f"{name}/{fit.names[c]}/{t}".lstrip("/"))
                if frame is not None:
                    yield frame

    fps = fit.fps if 0 < fit.fps <= MAX_FPS else 24.0
    return Source(
        name, frames, int(fit.valid[np.ix_(cameras, steps)].sum()), head=MODEL, fps=fps / choice.every,
        params=lambda t: _placed(fit, head, t)[0], camera_ids={c: fit.names[c] for c in cameras},
        motion=motion_of(head),
        extra={"dataset": "CAP4D", "sequence": folder.resolve().name, "motion": "head" if head else "cameras"},
    )  # fmt: skip


def _fit(path: Path, report: Report) -> _Fit:
    values = read_arrays(path)
    missing = [k for k in NEEDED if k not in values]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: expected CAP4D's fit of pictures")
    n, steps = (len(np.atleast_1d(values[k])) for k in ("extr", "expr"))
    names = [str(x) for x in np.atleast_1d(values.get("camera_order", [f"cam{i}" for i in range(n)]))]
    shapes = {"extr": (n, 4, 4), "resolutions": (n, 2), "rot": (steps, 3), "tra": (steps, 3)}
    shapes |= {k: (steps, 3) for k in ("eye_rot", "jaw_rot", "neck_rot") if k in values}
    shapes |= {"valid_mask": (n, steps)} if "valid_mask" in values else {}
    bad = [f"{k} {values[k].shape}" for k, s in shapes.items() if values[k].shape != s]
    bad += [f"{k} of {values[k].dtype}" for k in {*NEEDED, *shapes} if values[k].dtype.kind not in "biuf"]
    if bad or not n or not steps or len(names) != n or values["expr"].ndim != 2:
        raise UserError(
            f"{path}: arrays do not fit {n} cameras and {steps} timesteps: {', '.join(bad) or 'camera_order'}"
        )
    turns = {k: values.get(k, np.zeros((steps, 3))).astype(np.float64) for k in
             ("rot", "tra", "eye_rot", "jaw_rot", "neck_rot")}  # fmt: skip
    if not np.isfinite(values["shape"].astype(np.float64)).all():
        raise UserError(f"{path}: shape has NaN or infinite numbers: fit the head again")
    moving = np.concatenate([values["expr"].astype(np.float64), *turns.values()], 1)
    sound = np.isfinite(moving).all(1)
    for t in np.nonzero(~sound)[0].tolist():
        report.warn(f"frames left out: NaN or infinite numbers in {path.name}", f"{path.parent.name}/{t}")
    if not sound.any():
        raise UserError(f"{path} has NaN or infinite numbers at every timestep: fit the head again")
    cameras = [_camera(values, i, f"{path}, camera {names[i]}") for i in range(n)]
    valid = values.get("valid_mask", np.ones((n, steps))).astype(bool) & sound
    fps = float(values["fps"]) if values.get("fps", np.array("")).shape == () and "fps" in values else 24.0
    return _Fit(names, cameras, values["shape"], values["expr"], turns, valid, fps)


def _camera(values: dict[str, np.ndarray], i: int, where: str) -> Camera:
    try:
        fx, fy, cx, cy = (float(np.ravel(values[k])[i]) for k in ("fx", "fy", "cx", "cy"))
        height, width = (int(x) for x in values["resolutions"][i])
    except (IndexError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: {error}; expected one number for each camera") from None
    K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    return camera_checked(torch.from_numpy(values["extr"][i].astype(np.float64)), K, width, height, where)


def _files(folder: Path, what: str, camera: str, steps: int, report: Report) -> list[Path] | Path | None:
    """Return a camera's files in the order of timesteps, or its video; None if it has none."""
    place = inside(folder / what, camera)
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        # A matte of fewer frames than the fit is a matter of the frames that lack one.
        if what == "images" and files and len(files) < steps:
            report.warn(f"the fit has {steps} timesteps, fewer pictures are there", f"{camera}: {len(files)}")
        return files or None
    return next((p for suffix in VIDEOS if (p := place.parent / f"{place.name}{suffix}").is_file()), None)


def _pictures(
    files: list[Path] | Path | None, steps: list[int], report: Report, where: str
) -> Iterator[tuple[int, Float[Tensor, "3 height width"]]]:
    if isinstance(files, Path):
        got = 0
        for frame in video_frames(files, steps):
            got += 1
            yield frame
        if got < len(steps):
            report.warn(f"a video is damaged or ends early, {len(steps) - got} frames are missing", where)
        return
    for t in steps:
        if files is None or t >= len(files):
            report.warn("frames left out: no picture", f"{where}/{t}")
            continue
        try:
            yield t, read_image(files[t])
        except UserError as error:
            report.warn(f"frames left out: {str(error).replace(str(files[t]), 'picture')}", f"{where}/{t}")


def _frame(
    fit: _Fit, head: Head | None, c: int, t: int, image: Float[Tensor, "3 height width"],
    masks: list[Path] | Path | None, report: Report, where: str,
) -> SourceFrame | None:  # fmt: skip
    camera = fit.cameras[c]
    if tuple(image.shape[1:]) != (camera.height, camera.width):
        report.warn(f"frames left out: pictures of another size than {camera.width}×{camera.height}, the fit's", where)
        return None
    mask = None
    if isinstance(masks, list) and t < len(masks):
        try:
            mask = read_image(masks[t], "L")
        except UserError as error:
            report.warn(f"mask left out: {str(error).replace(str(masks[t]), 'file')}", where)
        if mask is not None and mask.shape[1:] != image.shape[1:]:
            report.warn("mask left out: of another size than the picture", where)
            mask = None
    T = camera.T_cam_world.double() @ OPENCV_FROM_FIT @ _placed(fit, head, t)[1]
    return SourceFrame(t, c, replace(camera, T_cam_world=T.float()), image, mask)


def _placed(fit: _Fit, head: Head | None, t: int) -> tuple[HeadParams, Float[Tensor, "4 4"]]:
    """Return a timestep's head by FLAME's rules, and T_fit_world."""
    zero = torch.zeros(3)
    turn = {k: torch.from_numpy(v[t]) for k, v in fit.turns.items()}
    expr = padded(fit.expr[t][:BLINK], EXPRESSIONS, f"expr {t}")
    blink = padded(fit.expr[t][BLINK:], 1, f"expr {t}, after the {BLINK}th,").expand(2).clone()
    eyes = torch.cat([turn["eye_rot"]] * 2).float()
    still = torch.eye(3).flatten().repeat(4)
    offset = None if head is None or head.pose_basis is None else -blend(head.pose_basis, still)
    params = HeadParams(
        padded(fit.shape, SHAPES, "shape"), expr, zero, zero, turn["jaw_rot"].float(), eyes, zero, blink, offset
    )
    R = axis_angle_to_matrix(turn["rot"])
    params, T_fit_world = place(head, params, rigid(R, turn["tra"]))
    shoulders = axis_angle_to_matrix(turn["neck_rot"])
    if head is None or not turn["neck_rot"].any():
        return params, T_fit_world
    # The root's turn moves the neck's joint, and the head with it: that is taken back.
    root, neck = head.shape(params).joints[:2].to(R)
    arm = neck - root
    rotation, back = matrix_to_axis_angle(R @ shoulders), matrix_to_axis_angle(shoulders.mT)
    moved = params.translation + (R @ (arm - shoulders @ arm)).float()
    return replace(params, rotation=rotation.float(), neck_pose=back.float(), translation=moved), T_fit_world
