"""The contract of every reader: what it yields, what it may be asked for, and where it says what was wrong.

A reader is one module (`data/nersemble.py`, `data/vhap.py`, …) with one function

    def read(src: Path, choice: Choice, report: Report) -> list[Source]

that looks at `src`, reads calibration and indices (never pictures), and returns one `Source` for every clip it found.
`data.importer.import_sources` then streams each source's frames into a clip folder, joins what the user computed
elsewhere (masks, normals, head parameters), draws a contact sheet and can be killed and called again.

What a reader must keep to:

- Everything it yields follows docs/CONVENTIONS.md: OpenCV `T_cam_world` in metres, `K` in pixels of the image that is
  yielded (half-integer pixel centres), images [0, 1] sRGB, camera-space normals (x right, y up, z to the camera) that
  are unit on the foreground and zero elsewhere, head parameters in the same world as the cameras.
- `Source.frames(wanted)` is a generator that holds one frame (or one per camera) at a time and yields exactly the
  frames for which `wanted(timestep, camera_index)` is true; it may be called again in a later process, and then for
  fewer frames. `camera_checked` refuses NaN, mirrored and unscaled cameras.
- `Choice.picks(timesteps)` is applied by the reader, so that nothing is decoded that nobody asked for.
- Bad input: a source that cannot be used at all raises `UserError` (one line: what, expected, got, next step); what is
  merely missing (a camera, a frame, a mask) goes to `report.warn` and the rest is read. Frames already yielded stay.
- No path from inside a file is opened before `inside` has checked it, nothing is unpacked, nothing unpickled.

Example (a whole reader):
    >>> def read(src, choice, report):
    ...     camera = camera_checked(T, K, 640, 480, where=f"{src}/camera.json")
    ...     def frames(wanted):
    ...         for t in choice.picks(range(100)):
    ...             if wanted(t, 0):
    ...                 yield SourceFrame(t, 0, camera, read_image(src / f"{t:05d}.png"))
    ...     return [Source("", frames, total=len(choice.picks(range(100))))]
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import write_json
from geodiff4d.heads.rig import HeadParams

Wanted = Callable[[int, int], bool]
"""(timestep, camera_index) → is this frame still to be read?"""
PLACES_SHOWN = 3


@dataclass(frozen=True)
class SourceFrame:
    """One frame of a source, in the project's conventions."""

    timestep: int
    camera_index: int
    camera: Camera
    """Its `width` and `height` are the image's."""
    image: Float[Tensor, "3 height width"]
    mask: Float[Tensor, "1 height width"] | None = None
    normal: Float[Tensor, "3 height width"] | None = None


def no_params(timestep: int) -> HeadParams | None:
    """Say that a source has no head parameters."""
    return None


def no_background(camera_index: int) -> Float[Tensor, "3 height width"] | None:
    """Say that a source has no picture of the empty scene."""
    return None


@dataclass(frozen=True)
class Source:
    """One clip to be: the frames of one person that a reader found."""

    name: str
    """Folder below OUT; the empty string stands for OUT itself (a source that can only ever be one clip)."""
    frames: Callable[[Wanted], Iterator[SourceFrame]]
    """Streams the frames that are wanted, in any order; raises UserError where it cannot go on."""
    total: int | None = None
    """How many frames there are to come if all are wanted, where that is known (for the progress bar)."""
    head: str = "flame"
    """Whose parameters `params` returns: "openhead", "flame", or a model's name such as "flame2023"."""
    params: Callable[[int], HeadParams | None] = no_params
    """Head parameters of a timestep, without batch axis; random access and cheap."""
    motion: str = ""
    """Where the head's motion stands, for readers that may put it elsewhere; a clip has it in one place only."""
    fps: float = 24.0
    camera_ids: dict[int, str] = field(default_factory=dict)
    """The source's own names of its cameras (serial numbers) by camera index."""
    background: Callable[[int], Float[Tensor, "3 height width"] | None] = no_background
    """The empty scene as a camera sees it, where the source has it; kept as backgrounds/{camera:02d}.png."""
    extra: dict = field(default_factory=dict)
    """Goes into transforms.json: what a user may want to know later (participant, sequence, licence, …)."""


@dataclass(frozen=True)
class Choice:
    """What the user asked for."""

    limit: int | None = None
    """At most so many timesteps of each clip (or images, where every timestep is another person)."""
    every: int = 1
    """Take every n-th timestep; the timesteps keep their numbers."""
    cameras: tuple[str, ...] = ()
    """Only these cameras, by index or by the source's own name; all if empty."""
    only: tuple[str, ...] = ()
    """Only clips whose name matches one of these patterns (`017_EXP-*`); all if empty."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}: expected at least 1")
        if self.every < 1:
            raise UserError(f"--every is {self.every}: expected at least 1")

    def picks(self, timesteps: Iterable[int]) -> list[int]:
        """Return the timesteps to read: every n-th, and at most `limit` of them."""
        return sorted(timesteps)[:: self.every][: self.limit]

    def picks_camera(self, index: int, name: str = "") -> bool:
        """Say whether a camera is asked for, by its index or its own name."""
        return not self.cameras or str(index) in self.cameras or (bool(name) and name in self.cameras)

    def picks_clip(self, name: str) -> bool:
        """Say whether a clip is asked for."""
        return not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)


class Report:
    """Warnings of one import, grouped: a camera without calibration is said once, however many frames it has.

    Example:
        >>> report = Report()
        >>> report.warn("no mask", "00003_08")
        >>> report.lines()
        ['no mask (00003_08)']
    """

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def warn(self, what: str, where: str = "") -> None:
        """Note something that was missing or skipped; the same `what` at several places becomes one line."""
        places = self._places.setdefault(" ".join(what.split()), [])
        if where not in places:
            places.append(where)

    def lines(self) -> list[str]:
        """One line for each kind of warning, in the order of their first appearance."""
        return [what + _shown([p for p in places if p]) for what, places in self._places.items()]

    def save(self, path: Path) -> None:
        """Write all warnings with all their places as JSON."""
        write_json(path, {"warnings": [{"what": k, "where": [p for p in v if p]} for k, v in self._places.items()]})

    def __len__(self) -> int:
        return len(self._places)


def _shown(places: list[str]) -> str:
    if not places:
        return ""
    more = f" and {len(places) - PLACES_SHOWN} more" if len(places) > PLACES_SHOWN else ""
    return f" ({', '.join(places[:PLACES_SHOWN])}{more})"


def camera_checked(
    T_cam_world: Float[Tensor, "4 4"], K: Float[Tensor, "3 3"], width: int, height: int, where: str
) -> Camera:
    """Return a camera whose numbers are sound; its rotation is made exactly orthonormal.

    Raises:
        UserError: not finite, mirrored (determinant −1), scaled or sheared, or a focal length that is not positive.
    """
    T, K = T_cam_world.double(), K.double()
    if not (T.isfinite().all() and K.isfinite().all()):
        raise UserError(f"{where}: the camera has NaN or infinite numbers: expected a finite pose and intrinsics")
    R = T[:3, :3]
    determinant = float(torch.linalg.det(R))
    if determinant < 0:
        raise UserError(
            f"{where}: the camera is mirrored (determinant {determinant:.3g}): expected a rotation; check the axes"
        )
    error = float((R @ R.mT - torch.eye(3, dtype=R.dtype)).abs().max())
    if error > 1e-2:
        raise UserError(f"{where}: the camera's pose is scaled or sheared (off by {error:.2g}): expected a rotation")
    if not (float(K[0, 0]) > 0 and float(K[1, 1]) > 0 and width > 0 and height > 0):
        raise UserError(
            f"{where}: focal length {float(K[0, 0]):g}, {float(K[1, 1]):g} at {width}×{height} px: "
            "expected positive numbers"
        )
    U, _, Vh = torch.linalg.svd(R)
    rigid = torch.eye(4, dtype=T.dtype)
    rigid[:3, :3], rigid[:3, 3] = U @ Vh, T[:3, 3]
    return Camera(rigid.float(), K.float(), width, height)


def inside(root: Path, name: str) -> Path:
    """Return the path of `name`, which some file inside `root` mentions, if it stays inside.

    Raises:
        UserError: the name is absolute or climbs out of `root`, itself or through a link.
    """
    path = Path(root) / name
    if PurePosixPath(name).is_absolute() or not path.resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"{root} mentions {name!r}, which lies outside of it: refused; expected a path inside")
    return path
