"""Live tracking: from a webcam, or from a video file that is still being written.

The first frames determine identity, focal length and camera; from then on every frame is fitted by itself, with a prior
at the last one. Without future frames it lags and jitters a little more than `track` does.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.films import CONTAINERS, Frame, decoded, video_stream
from geodiff4d.core.presentation import presented
from geodiff4d.core.workers import streamed
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.tracking.blend import blended
from geodiff4d.tracking.detect import Detection, FollowingDetector
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.fit import HeadFit, fit
from geodiff4d.tracking.layout import Layout, landmark_head
from geodiff4d.tracking.observe import observe, shared_points
from geodiff4d.tracking.problem import Anchor, HeadFitConfig, Problem, limits
from geodiff4d.tracking.solve import Unknowns, minimise
from geodiff4d.tracking.source import focal_length

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class LiveConfig:
    """How frames are tracked as they come."""

    warmup: int = 6
    """Number of frames with a face that determine identity and camera; they are yielded once the last has come."""
    steps: int = 4
    """Levenberg–Marquardt steps per frame."""
    rotation_sigma_rad: float = 0.05
    """σ of the head's rotation from one frame to the next; likewise the next three."""
    translation_sigma_m: float = 0.01
    expr_sigma: float = 0.2
    gaze_sigma_rad: float = 0.2
    focal_px: float | None = None
    """Focal length of the uncut frames; None assumes one."""
    fit: HeadFitConfig = field(default_factory=HeadFitConfig)
    """Weights of the fit to the landmarks."""


@dataclass(frozen=True)
class LiveFrame:
    """One tracked frame."""

    params: HeadParams
    """No batch axis; the shape is the same in all frames."""
    camera: Camera
    """Camera of the uncut image, the same in all frames."""
    seen: bool
    """Whether there was a face; if not, the last frame's parameters are repeated."""
    error_px: float
    """Mean landmark distance [px]."""
    image: Float[Tensor, "3 height width"] | None
    """None where whoever tracks has no use for it."""


def track_live(
    images: Iterable[Float[Tensor, "3 _height _width"]], head: Head, detector: FollowingDetector | None = None,
    config: LiveConfig = LiveConfig(),
) -> Iterator[LiveFrame]:  # fmt: skip
    """Yield the tracked frames of a stream, one by one.

    Frames before the first face are skipped.

    Example:
        >>> for frame in track_live(live_frames(Path("/dev/video0")), load_head("openhead")):  # doctest: +SKIP
        ...     drive(frame.params)
    """
    yield from _fitted(_followed(images, detector or EmbeddedDetector(dense=False)), head, config)


def track_source(
    source: Path, head: Head, images: bool = True, config: LiveConfig = LiveConfig(), patience_s: float = 5.0
) -> Iterator[LiveFrame]:
    """Yield the tracked frames of a webcam or a growing file (`live_frames`), whose faces are found by a process of
    their own: the next frame's while one is fitted and shown. `images` says whether the frames themselves are wanted.

    Raises:
        UserError: as `live_frames`.
    """
    watched = streamed(_watched, source, images, patience_s)
    try:
        yield from _fitted(watched, head, config)
    finally:
        watched.close()


@dataclass(frozen=True)
class _Seen:
    """A frame, and the face in it."""

    size: tuple[int, int]
    """Height and width [px]."""
    detection: Detection | None
    image: Tensor | Frame | None
    """A decoded frame has a quarter of its image's bytes; None where nobody wants it."""


def _watched(source: Path, images: bool, patience_s: float) -> Iterator[_Seen]:
    for seen in _followed(_decoded(source, patience_s), EmbeddedDetector(dense=False)):
        yield seen if images else replace(seen, image=None)


def _followed(images: Iterable[Tensor | Frame], detector: FollowingDetector) -> Iterator[_Seen]:
    kept: list[tuple[Tensor | Frame, tuple[int, int]]] = []

    def passing() -> Iterator[Tensor]:
        for given in images:
            image = presented(given) if isinstance(given, Frame) else given
            kept.append((given, (image.shape[1], image.shape[2])))
            yield image

    for detection in detector.follow(passing()):
        given, size = kept.pop()
        yield _Seen(size, detection, given)


def _fitted(frames: Iterable[_Seen], head: Head, config: LiveConfig) -> Iterator[LiveFrame]:
    """Yield tracked frames, once enough of them have determined identity and camera."""
    waiting: list[_Seen] = []
    follower: Follower | None = None
    for seen in frames:
        if follower is not None:
            yield follower.step(seen)
            continue
        if seen.detection is None and not waiting:
            continue
        waiting.append(seen)
        if sum(s.detection is not None for s in waiting) >= config.warmup:
            follower = Follower.settle(head, waiting, config)
            yield from map(follower.step, waiting)
            waiting = []
    if waiting:
        follower = Follower.settle(head, waiting, config)
        yield from map(follower.step, waiting)


class Follower:
    """Fits frame after frame to a head whose identity and camera are known."""

    def __init__(self, head: Head, settled: HeadFit, example: Detection, config: LiveConfig):
        self.head, self.settled, self.config = head, settled, config
        self.shared = shared_points(head, example)
        self.small = landmark_head(head, self.shared[0])
        self.layout = Layout(self.small)
        self.limits = limits(self.layout, config.fit, example.reading is not None)
        self.limits = replace(self.limits, free_shared=torch.zeros_like(self.limits.free_shared))
        shape = settled.params.shape[0].double()
        self.fixed = torch.cat([shape, torch.zeros(1, dtype=torch.float64)])
        sigma = self.layout.fill(
            config.expr_sigma, rotation=config.rotation_sigma_rad, translation=config.translation_sigma_m,
            eyes_pose=config.gaze_sigma_rad,
        )  # fmt: skip
        self.precision = sigma.square().reciprocal()
        self.K = settled.camera.K.double()
        first = int(settled.seen.nonzero()[0])
        self.last = self.shown = self._unknowns(settled.params[first : first + 1])
        self.error = float("nan")

    @staticmethod
    def settle(head: Head, frames: list[_Seen], config: LiveConfig) -> "Follower":
        """Return a follower with the identity and camera that the first frames determine."""
        height, width = frames[0].size
        detections = [s.detection for s in frames]
        focal_px, _ = focal_length(None, width, height, config.focal_px)
        settled = fit(head, detections, width, height, focal_px, config.fit)
        return Follower(head, settled, next(d for d in detections if d is not None), config)

    def step(self, frame: _Seen) -> LiveFrame:
        """Return one fitted frame; without a face the last frame's parameters are repeated."""
        detection = frame.detection
        if detection is not None:
            seen = observe(self.head, [detection], self.config.fit.weighting, self.shared)
            problem = Problem(self.small, self.layout, seen, self.K, self.config.fit, self.limits)
            problem.anchor = Anchor(self.last, self.precision)
            x = Unknowns(self.last, self.fixed)
            x = minimise(problem, x, self.limits, self.config.steps, self.config.fit.tolerance)
            self.last, self.shown = x.frame, blended(self.layout, seen, x.frame)
            off = (problem.projection.project(x.frame, x.shared) - seen.points).norm(dim=-1)[0, seen.inner]
            self.error = float(off.mean())
        params = self.layout.params(self.shown, self.fixed[:-1][None]).map(lambda v: v[0].float())
        params = replace(params, translation=params.translation - self._mean)
        image = presented(frame.image) if isinstance(frame.image, Frame) else frame.image
        return LiveFrame(params, self.settled.camera, detection is not None, self.error, image)

    @property
    def _mean(self) -> Float[Tensor, "3"]:
        """Return the mean translation, which `fit` moves from the parameters into the camera."""
        T = self.settled.camera.T_cam_world
        return T[:3, :3].T @ (T[:3, 3] - torch.tensor([0.0, 0.0, 1.0]))

    def _unknowns(self, params: HeadParams) -> Float[Tensor, "one unknowns"]:
        whole = replace(params, translation=params.translation + self._mean)
        return torch.cat([getattr(whole, name) for name in self.layout.slices], -1).double()


class GrowingFile:
    """A file that is read while another program writes it: at its end, reading waits until it stops growing."""

    def __init__(self, path: Path, patience_s: float):
        self._file = path.open("rb")
        self._patience, self._ended = patience_s, False

    def read(self, size: int = -1) -> bytes:
        """Return at least one byte, or none once the file has not grown for `patience_s`, which is then its end."""
        waited = 0.0
        while True:
            data = self._file.read(size)
            if data or self._ended or waited >= self._patience:
                self._ended = not data
                return data
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS

    def close(self) -> None:
        self._file.close()


def live_frames(source: Path, patience_s: float = 5.0) -> Iterator[Float[Tensor, "3 height width"]]:
    """Yield frames as they come from a webcam (a device such as /dev/video0) or a growing file.

    A file must be of a kind that can be read before it is finished: MPEG-TS, Matroska, WebM or fragmented MP4.

    Raises:
        UserError: it is missing, or no frame can be decoded.
    """
    yield from map(presented, _decoded(source, patience_s))


def _decoded(source: Path, patience_s: float) -> Iterator[Frame]:
    import av

    source = Path(source)
    if not source.exists():
        raise UserError(
            f"{source} does not exist: expected a webcam (/dev/video0) or a video file that is being written"
        )
    growing = None if source.is_char_device() else GrowingFile(source, patience_s)
    count = 0
    try:
        with av.open(
            growing or str(source),
            "r",
            format=None if growing else "v4l2",
            options=CONTAINERS if growing else {},
            metadata_errors="replace",
        ) as container:
            aspect = video_stream(container, source).sample_aspect_ratio
            for frame in container.decode(video=0):
                count += 1
                yield decoded(frame, source, aspect)
    except (av.FFmpegError, IndexError) as error:
        if not count:
            raise UserError(
                f"{source} cannot be read while it grows ({error}): expected MPEG-TS, Matroska, WebM or fragmented MP4"
            ) from None
    finally:
        if growing is not None:
            growing.close()
