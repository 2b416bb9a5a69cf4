"""SynthHuman (Saleh et al. 2025, DAViD): the face subset, single pictures with exact normals (`data` extra: OpenEXR).

    rgb_{sample:07d}.png   alpha_{sample:07d}.png   normal_{sample:07d}.exr   cam_{sample:07d}.txt (3×3 K)

Samples 0 to 98,039 are faces; bodies follow and are left out. Files may lie in any folders, or in the 60 zip archives
as downloaded: members are read in place, nothing is unpacked. Every sample is another person, so a clip holds a
thousand samples, timestep = sample, and says `stills`; the camera is the world's origin.

Normals are signed camera-space XYZ. Which channel of the file is x is not documented: z is the one that is positive
nearly everywhere, the other of R and B is x (`axes_of` then notices a mirrored axis).
"""

import io
import re
import tempfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import ZIP_ERRORS
from geodiff4d.core.images import decode_image
from geodiff4d.data.exr import read_exr
from geodiff4d.data.importing import Choice, Report, Source, SourceFrame, Wanted, camera_checked
from geodiff4d.data.joins import axes_of, unit

FACES = 98_040
PER_CLIP = 1000
NAME = re.compile(r"(rgb|alpha|normal|cam)_(\d{7})\.(png|exr|txt)")
MAX_BYTES = 64_000_000
"""Larger members of an archive are refused before they are unpacked; a sample's files have 0.3 to 2 MB."""

Place = Path | tuple[Path, str]
"""A file, or an archive and its member."""


def read(src: Path, choice: Choice, report: Report) -> list[Source]:
    """Find the face samples of a folder, of the archives in it, or of one archive.

    Raises:
        UserError: there are none, or an archive is damaged.
    """
    src = Path(src)
    if src.is_file() and src.suffix != ".zip":
        raise UserError(f"{src} is a file: expected SynthHuman's folder or one of its zip archives")
    index = _index(src, report)
    pictures = sorted(sample for kind, sample in index if kind == "rgb")
    if not pictures:
        raise UserError(f"{src} has no SynthHuman pictures: expected rgb_0000000.png and so on, or their zip archives")
    faces = [sample for sample in pictures if sample < FACES]
    if len(faces) < len(pictures):
        report.warn(f"{len(pictures) - len(faces)} samples are not of the face subset and were left out")
    if not faces:
        raise UserError(f"{src} has no face: expected samples 0 to {FACES - 1}, found {pictures[0]} and up")
    clips: dict[int, list[int]] = {}
    for sample in choice.picks(faces):
        clips.setdefault(sample // PER_CLIP, []).append(sample)
    return [_source(number, samples, index, report) for number, samples in sorted(clips.items())]


def _source(number: int, samples: list[int], index: dict[tuple[str, int], Place], report: Report) -> Source:
    def frames(wanted: Wanted) -> Iterator[SourceFrame]:
        for sample in samples:
            if wanted(sample, 0):
                frame = _frame(sample, index, report)
                if frame is not None:
                    yield frame

    extra = {"dataset": "SynthHuman", "stills": True, "license": "CDLA-Permissive-2.0"}
    return Source(f"faces_{number * PER_CLIP:07d}", frames, len(samples), camera_ids={0: "camera"}, extra=extra)


def _frame(sample: int, index: dict[tuple[str, int], Place], report: Report) -> SourceFrame | None:
    where = f"{sample:07d}"
    if ("cam", sample) not in index:
        report.warn("a sample without camera was left out", where)
        return None
    try:
        image = decode_image(_bytes(index["rgb", sample]), "rgb")
        camera = _camera(_bytes(index["cam", sample]), image)
    except UserError as error:
        report.warn(f"a sample was left out: {error}", where)
        return None
    mask = _part("alpha", sample, index, report)
    mask = None if mask is None else _fitted(mask, image)
    normal = _part("normal", sample, index, report)
    if normal is not None:
        normal = unit(_fitted(_xyz(normal), image)) * (1 if mask is None else (mask > 0.5).float())
        wrong = axes_of(normal, mask)
        if wrong:
            report.warn(f"normals look wrong: {wrong}", where)
    return SourceFrame(sample, 0, camera, image, mask, normal)


def _part(kind: str, sample: int, index: dict[tuple[str, int], Place], report: Report) -> Tensor | None:
    place = index.get((kind, sample))
    if place is None:
        report.warn(f"no {kind}", f"{sample:07d}")
        return None
    try:
        if kind == "alpha":
            return decode_image(_bytes(place), kind, "L")
        if isinstance(place, Path):
            return read_exr(place)
        with tempfile.TemporaryDirectory() as folder:  # the EXR library reads files only
            path = Path(folder) / f"normal_{sample:07d}.exr"
            path.write_bytes(_bytes(place))
            return read_exr(path)
    except UserError as error:
        if "needs OpenEXR" in str(error):
            raise
        short = re.sub(r"\S*normal_\d+\.exr", "file", str(error))
        report.warn(f"{kind} left out: {short}", f"{sample:07d}")
        return None


def _xyz(planes: Float[Tensor, "channels h w"]) -> Float[Tensor, "3 h w"]:
    """Order a file's three channels as x, y, z by what z must look like."""
    if planes.shape[0] < 3:
        return torch.zeros(3, *planes.shape[1:])
    planes = planes[:3].nan_to_num(0, 0, 0)
    known = (planes.square().sum(0) > 0.25) & (planes.square().sum(0) < 4)
    red, blue = (float(planes[i][known].mean()) if bool(known.any()) else 0.0 for i in (0, 2))
    return planes.flip(0) if abs(red) > abs(blue) else planes


def _camera(data: bytes, image: Tensor) -> Camera:
    try:
        K = np.loadtxt(io.StringIO(data.decode()), delimiter="," if b"," in data else None)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"cam cannot be read ({error}): expected a 3×3 matrix") from None
    if K.shape != (3, 3):
        raise UserError(f"cam has {K.shape}: expected a 3×3 matrix")
    _, height, width = image.shape
    return camera_checked(torch.eye(4), torch.from_numpy(K).double(), width, height, "cam")


def _fitted(value: Tensor, image: Tensor) -> Tensor:
    if value.shape[1:] == image.shape[1:]:
        return value
    return interpolate(value[None], image.shape[1:], mode="bilinear", antialias=True)[0]


def _index(src: Path, report: Report) -> dict[tuple[str, int], Place]:
    index: dict[tuple[str, int], Place] = {}
    archives = [src] if src.is_file() else sorted(src.rglob("*.zip"))
    for path in [] if src.is_file() else sorted(src.rglob("*_[0-9]*.*")):
        match = NAME.fullmatch(path.name)
        if match:
            index[match[1], int(match[2])] = path
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as file:
                members = file.namelist()
        except ZIP_ERRORS as error:
            if len(archives) == 1 and not index:
                raise UserError(f"{archive} is truncated or not a zip archive ({error}): download it again") from None
            report.warn(f"an archive was left out ({error})", archive.name)
            continue
        for member in members:
            path = PurePosixPath(member)
            if path.is_absolute() or ".." in path.parts:
                report.warn("an archive's member that points outside was ignored", f"{archive.name}: {member}")
                continue
            match = NAME.fullmatch(path.name)
            if match:
                index.setdefault((match[1], int(match[2])), (archive, member))
    return index


@lru_cache(maxsize=2)
def _opened(archive: Path) -> zipfile.ZipFile:
    """Keep an archive open: reading the index of twenty thousand members takes longer than a sample."""
    return zipfile.ZipFile(archive)


def _bytes(place: Place) -> bytes:
    if isinstance(place, Path):
        try:
            return place.read_bytes()
        except OSError as error:
            raise UserError(f"{place} cannot be read ({error.strerror}): copy it again") from None
    archive, member = place
    try:
        file = _opened(archive)
        if file.getinfo(member).file_size > MAX_BYTES:
            raise UserError(f"{archive.name}: {member} unpacks to more than {MAX_BYTES:,} bytes: refused")
        return file.read(member)
    except ZIP_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{archive.name}: {member} is damaged ({error}): download it again") from None
