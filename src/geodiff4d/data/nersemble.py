"""NeRSemble v2 (Kirschstein et al. 2023; nersemble-data): 16 cameras at 73 frames/s, as the downloader lays it out.

    {participant:03d}/calibration/camera_params.json       world_2_cam {serial: 4×4}, one intrinsics 3×3
    {participant:03d}/calibration/color_calibration.json   {serial: 3×terms}
    {participant:03d}/sequences/{sequence}/images/cam_{serial}.mp4
    {participant:03d}/sequences/BACKGROUND/image_{serial}.jpg

Poses are world to camera, OpenCV, metres. The intrinsics are shared and hold for 2200×3208 pixels; they are scaled to
the video's size. Colour: sRGB to linear, Cheung et al.'s (2004) polynomial with the camera's 3×terms matrix (4 terms
are affine), and back: VHAP computes the same and then returns the uncorrected picture.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_json
from geodiff4d.core.films import open_video, video_stream
from geodiff4d.core.images import read_image
from geodiff4d.data.importing import Choice, Report, Source, SourceFrame, Wanted, camera_checked

CALIBRATED_WIDTH, CALIBRATED_HEIGHT = 2200, 3208
FPS = 73.0
SERIALS = (
    "222200042", "222200044", "222200046", "222200040", "222200036", "222200048", "220700191", "222200041",
    "222200037", "222200038", "222200047", "222200043", "222200049", "222200039", "222200045", "221501007",
)  # fmt: skip
"""Camera indices: the order that the canonical split (held out: 3, 6, 11, 15) counts in; 8 is the front."""
# Exponents of R, G and B by the number of terms (Cheung et al. 2004; Westland & Ripamonti 2004, table 8.2).
_LINEAR = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
_MIXED = ((1, 1, 0), (1, 0, 1), (0, 1, 1))
_SQUARES = ((2, 0, 0), (0, 2, 0), (0, 0, 2))
_CUBES = ((3, 0, 0), (0, 3, 0), (0, 0, 3))
_CYCLE, _BACK = ((2, 1, 0), (0, 2, 1), (1, 0, 2)), ((2, 0, 1), (1, 2, 0), (0, 1, 2))
_RGB, _ONE = ((1, 1, 1),), ((0, 0, 0),)
_SECOND = _LINEAR + _MIXED + _SQUARES
TERMS = {
    3: _LINEAR,
    4: _LINEAR + _ONE,
    5: _LINEAR + _RGB + _ONE,
    7: _LINEAR + _MIXED + _ONE,
    8: _LINEAR + _MIXED + _RGB + _ONE,
    10: _SECOND + _ONE,
    11: _SECOND + _RGB + _ONE,
    14: _SECOND + _RGB + _CUBES + _ONE,
    16: _SECOND + _RGB + _CYCLE + _CUBES,
    17: _SECOND + _RGB + _CYCLE + _CUBES + _ONE,
    19: _SECOND + _RGB + _CYCLE + _BACK + _CUBES,
    20: _SECOND + _RGB + _CYCLE + _BACK + _CUBES + _ONE,
    22: _SECOND + _RGB + _CYCLE + _BACK + _CUBES + ((2, 1, 1), (1, 2, 1), (1, 1, 2)),
}


def read(src: Path, choice: Choice, report: Report) -> list[Source]:
    """Find the sequences of a NeRSemble folder: the whole set, one participant, or one sequence.

    Raises:
        UserError: there is none, or none has a calibration.
    """
    src = Path(src)
    if not src.is_dir():
        raise UserError(f"{src} is not a folder: expected NeRSemble's, with PARTICIPANT/sequences/… in it")
    patterns = ("images/cam_*.mp4", "sequences/*/images/cam_*.mp4", "*/sequences/*/images/cam_*.mp4")
    found = next((videos for videos in map(list, map(src.glob, patterns)) if videos), [])
    folders = sorted({video.parent.parent for video in found})
    if not folders:
        raise UserError(
            f"{src} has no NeRSemble videos: expected {{participant}}/sequences/{{sequence}}/images/cam_*.mp4"
        )
    sources: list[Source] = []
    problems: list[str] = []
    for folder in folders:
        participant = folder.parent.parent
        name = f"{participant.resolve().name}_{folder.resolve().name}"
        if not choice.picks_clip(name):
            continue
        try:
            sources.append(_sequence(folder, participant, name, choice, report))
        except UserError as error:
            problems.append(str(error))
            report.warn(f"{name} was left out: {error}")
    if not sources and problems:
        raise UserError(problems[0])
    if not sources:
        raise UserError(f"{src} has no clip that matches {' '.join(choice.only)}")
    return sources


def _sequence(folder: Path, participant: Path, name: str, choice: Choice, report: Report) -> Source:
    poses, K = _calibration(participant / "calibration/camera_params.json")
    colours = _colours(participant / "calibration/color_calibration.json", report)
    names = {serial: i for i, serial in enumerate(SERIALS)}
    names |= {serial: len(SERIALS) + i for i, serial in enumerate(sorted(set(poses) - set(SERIALS)))}
    videos = {path.stem.removeprefix("cam_"): path for path in sorted((folder / "images").glob("cam_*.mp4"))}
    for serial in videos.keys() - poses.keys():
        report.warn(f"{name}: a camera without calibration was left out", serial)
    for serial in poses.keys() - videos.keys():
        report.warn(f"{name}: a calibrated camera has no video", serial)
    cameras: dict[int, Camera] = {}
    counts: dict[int, int] = {}
    ids = {names[serial]: serial for serial in videos if serial in poses}
    for index, serial in sorted(ids.items()):
        if not choice.picks_camera(index, serial):
            continue
        try:
            width, height, counts[index] = probe(videos[serial])
            cameras[index] = _camera(poses[serial], K, width, height, f"{participant.name}, camera {serial}")
        except UserError as error:
            report.warn(f"{name}: a camera was left out: {error}")
    if not cameras:
        raise UserError(f"{folder} has no camera that can be read: expected videos and calibration; check --cameras")
    steps = choice.picks(range(max(counts[i] for i in cameras)))

    def frames(wanted: Wanted) -> Iterator[SourceFrame]:
        for index, camera in cameras.items():
            serial = ids[index]
            asked = [t for t in steps if t < counts[index] and wanted(t, index)]
            got = 0
            for t, image in video_frames(videos[serial], asked):
                got += 1
                yield SourceFrame(t, index, camera, _coloured(image, colours, serial, report))
            short = len(asked) - got + sum(t >= counts[index] for t in steps)
            if short:
                report.warn(f"{name}: a video ends early, {short} frames are missing", f"camera {serial}")

    def background(index: int) -> Tensor | None:
        path = folder.parent / f"BACKGROUND/image_{ids[index]}.jpg"
        if not path.is_file():
            report.warn(f"{participant.name}: no background picture", ids[index])
            return None
        try:
            return _coloured(read_image(path), colours, ids[index], report)
        except UserError as error:
            report.warn(f"background left out: {error}")
            return None

    extra = {
        "dataset": "NeRSemble v2", "participant": participant.resolve().name, "sequence": folder.resolve().name,
        "color_corrected": sorted(ids[i] for i in cameras if ids[i] in colours), "license": "NeRSemble's terms of use",
    }  # fmt: skip
    total = sum(t < counts[i] for i in cameras for t in steps)
    return Source(
        name, frames, total, fps=FPS / choice.every, camera_ids={i: ids[i] for i in cameras}, background=background,
        extra=extra,
    )  # fmt: skip


def _calibration(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    meta = read_json(path)
    try:
        poses = {str(k): torch.tensor(v, dtype=torch.float64) for k, v in meta["world_2_cam"].items()}
        K = torch.tensor(meta["intrinsics"], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not NeRSemble's calibration: missing or bad field {error}") from None
    bad = [k for k, T in poses.items() if T.shape not in ((4, 4), (3, 4))]
    if K.shape != (3, 3) or bad or not poses:
        raise UserError(f"{path}: expected world_2_cam with 4×4 matrices and a 3×3 intrinsics{' (' * bool(bad)}"
                        f"{', '.join(bad)}{')' * bool(bad)}")  # fmt: skip
    return poses, K


def _camera(T: Tensor, K: Tensor, width: int, height: int, where: str) -> Camera:
    sx, sy = width / CALIBRATED_WIDTH, height / CALIBRATED_HEIGHT
    if not math.isclose(sx, sy, rel_tol=0.02):
        raise UserError(
            f"{where}: the video has {width}×{height} pixels, the intrinsics are for "
            f"{CALIBRATED_WIDTH}×{CALIBRATED_HEIGHT}: expected the same proportions"
        )
    full = torch.eye(4, dtype=torch.float64)
    full[: len(T)] = T
    return camera_checked(full, torch.diag(torch.tensor([sx, sy, 1.0], dtype=torch.float64)) @ K, width, height, where)


def _colours(path: Path, report: Report) -> dict[str, Tensor]:
    if not path.is_file():
        report.warn("no colour calibration: pictures are as the cameras saw them", path.parent.parent.name)
        return {}
    try:
        matrices = {str(k): torch.tensor(v, dtype=torch.float32) for k, v in read_json(path).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a colour calibration ({error}): expected {{serial: 3×terms}}") from None
    for serial, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[0] != 3 or matrix.shape[1] not in TERMS or not matrix.isfinite().all():
            raise UserError(
                f"{path}: camera {serial} has a matrix of {tuple(matrix.shape)}: expected finite 3×terms, "
                f"terms one of {', '.join(map(str, TERMS))}"
            )
    return matrices


def _coloured(image: Tensor, colours: dict[str, Tensor], serial: str, report: Report) -> Tensor:
    if serial in colours:
        return colour_corrected(image, colours[serial])
    if colours:
        report.warn("no colour calibration for a camera", serial)
    return image


def colour_corrected(
    image: Float[Tensor, "3 height width"], matrix: Float[Tensor, "3 terms"]
) -> Float[Tensor, "3 height width"]:
    """Apply a camera's colour matrix to the polynomial terms of its linear RGB, sRGB in and out."""
    rgb = linear_from_srgb(image).flatten(1)
    terms = torch.stack([_monomial(rgb, powers) for powers in TERMS[matrix.shape[1]]])
    return srgb_from_linear((matrix @ terms).clamp(0, 1)).view_as(image)


def _monomial(rgb: Tensor, powers: tuple[int, int, int]) -> Tensor:
    out = torch.ones_like(rgb[0])
    for channel, power in zip(rgb, powers, strict=True):
        for _ in range(power):
            out = out * channel
    return out


def linear_from_srgb(image: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Decode sRGB (IEC 61966-2-1)."""
    return torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055).clamp(min=0) ** 2.4)


def srgb_from_linear(image: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Encode sRGB (IEC 61966-2-1)."""
    return torch.where(image <= 0.0031308, image * 12.92, 1.055 * image.clamp(min=1e-8) ** (1 / 2.4) - 0.055)


def probe(path: Path) -> tuple[int, int, int]:
    """Return a video's width, height and number of frames, by its header.

    Raises:
        UserError: not a video, or one whose header is missing (a download that was cut short).
    """
    import av

    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            count = stream.frames
            if not count and stream.duration and stream.average_rate and stream.time_base:
                count = round(float(stream.duration * stream.time_base * stream.average_rate))
            return stream.width, stream.height, count
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path} cannot be decoded as video ({error}): download it again") from None


def video_frames(path: Path, timesteps: list[int]) -> Iterator[tuple[int, Float[Tensor, "3 height width"]]]:
    """Stream the frames of ascending timesteps; those beyond the end, or beyond damage, do not come."""
    import av

    if not timesteps:
        return
    asked = set(timesteps)
    try:
        with open_video(path) as container:
            video_stream(container, path).thread_type = "AUTO"
            for t, frame in enumerate(container.decode(video=0)):
                if t in asked:
                    yield t, torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255
                if t >= timesteps[-1]:
                    return
    except (av.FFmpegError, UserError):
        return
