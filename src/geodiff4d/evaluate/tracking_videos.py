"""How well the expressions of people of the open world are tracked in H.264 videos, beside the truth.

Every person rests for half a second and then performs a mix of everything (speech, emotions, blinks, gaze, extremes …)
while the head moves a little. A camera from the front and one from 30° each record a video; sensor noise and the codec
are in it. Gain and corr are defined in `expression_gain`; `aed_mm` is the mean distance of the face's vertices between
true and tracked expressions on the average head, and `still_aed_mm` the same for a face that never moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, write_json
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.video import read_video, write_video
from geodiff4d.evaluate.expression import GROUPS, compared
from geodiff4d.evaluate.expression_gain import Products, averaged, cell, gain_cells, pooled, video_products
from geodiff4d.evaluate.metrics import bootstrap
from geodiff4d.evaluate.pairs import loosely
from geodiff4d.heads import Head, HeadParams
from geodiff4d.render.viewpoints import orbit, world_region
from geodiff4d.tracking.detect import Detector
from geodiff4d.tracking.track import TrackingConfig, locate
from geodiff4d.world.expressions import expression_track, head_track
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import WORLD_VERSION, SyntheticSubject, plain_seed

FPS = 24.0
REST_FRAMES, EASED_FRAMES = 12, 4
"""Frames at rest at the start of every video, and frames in which the performance then begins."""
CAMERAS_DEG = (0.0, 30.0)
NOISE = 1.5 / 255
"""Standard deviation of the sensor's noise."""


@dataclass(frozen=True)
class Performance:
    """One person's performance before one camera."""

    seed: int
    split: Split
    azimuth_deg: float
    frames: int
    """That perform, after those at rest."""
    size: int
    """Side of the video [px]."""

    @property
    def name(self) -> str:
        return f"{self.split}_{self.seed}_{self.azimuth_deg:.0f}deg_{self.size}px_{self.frames}"


@dataclass(frozen=True)
class VideoScore:
    """What tracking one video was worth."""

    products: dict[str, Products]
    """Of "vertices" and every group."""
    aed_mm: float
    still_aed_mm: float
    jitter_mm: float
    """Mean distance that the face's vertices move from frame to frame while the person rests."""
    missed: int
    """Frames in which no face was found."""


def performances(count: int, split: Split, frames: int, size: int) -> list[Performance]:
    """List the videos of the first `count` people whom one could meet, from every camera of `CAMERAS_DEG`."""
    seeds = [plain_seed(i, split) for i in range(count)]
    return [Performance(seed, split, azimuth, frames, size) for seed in seeds for azimuth in CAMERAS_DEG]


def true_motion(video: Performance, subject: SyntheticSubject) -> HeadParams:
    """Return what a person does in a video, frame by frame: rest, then the performance."""
    n = video.frames
    expr, jaw, eyes = expression_track("mixed", max(n, 24), video.seed, FPS)
    ease = ((torch.arange(-REST_FRAMES, n) + 1) / EASED_FRAMES).clamp(0, 1)[:, None]

    def after_rest(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(REST_FRAMES, x.shape[1]), x[:n]]) * ease

    turn = head_track("mixed", max(n + REST_FRAMES, 24), video.seed, FPS)[: n + REST_FRAMES]
    return subject.params(after_rest(expr), rotation=turn, jaw_pose=after_rest(jaw), eyes_pose=after_rest(eyes))


def render_video(path: Path, video: Performance) -> HeadParams:
    """Render a video to PATH, unless it is there; returns the true motion."""
    subject = SyntheticSubject(video.seed, video.split)
    params = true_motion(video, subject)
    if path.exists():
        return params
    camera = orbit(torch.tensor([video.azimuth_deg]), torch.zeros(1), video.size)[0]
    points = subject.vertices(params)[:, world_region()].flatten(0, 1)
    camera = _resized(loosely(camera, points, video.size), video.size)
    rng = torch.Generator().manual_seed(int(generator("noise", video.split, video.seed).integers(1 << 31)))

    def frames():
        for t in range(params.batch[0]):
            rgb = subject.render(params[t : t + 1], camera.expand(1)).rgb[0]
            yield (rgb + NOISE * torch.randn(rgb.shape, generator=rng)).clamp(0, 1)

    write_video(path, frames(), FPS)
    return params


def _resized(camera: Camera, size: int) -> Camera:
    return camera.resized(size, size)


def score_video(head: Head, truth: HeadParams, tracked: HeadParams, missed: int) -> VideoScore:
    """Compare tracked expressions with true ones, frame by frame; identity and pose do not count."""
    rows = compared(head, truth, tracked)
    vx, vy = rows["vertices"]
    return VideoScore(
        {group: video_products(x, y) for group, (x, y) in rows.items()},
        _distance(vx, vy),
        _distance(vx, vx[:REST_FRAMES].mean(0, keepdims=True)),
        _distance(vy[1:REST_FRAMES], vy[: REST_FRAMES - 1]),
        missed,
    )


def _distance(a: Float[np.ndarray, "frames coordinates"], b: Float[np.ndarray, "_ coordinates"]) -> float:
    """Mean distance of vertices [mm]."""
    return float(np.linalg.norm((a - b).reshape(len(a), -1, 3), axis=-1).mean())


def evaluate_videos(
    out: Path, head: Head, detectors: dict[str, Detector], videos: Sequence[Performance],
    config: TrackingConfig = TrackingConfig(), progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Track every video with each detector; writes `metrics.json` and `table.md`, and keeps the videos in OUT/videos.

    Videos that are there are not rendered again; tracking is always done anew. Returns the metrics: by detector and
    camera, gain and corr of vertices and groups, AED, jitter at rest [mm], and how many videos failed.
    """
    scores: dict[str, list[VideoScore | None]] = {name: [] for name in detectors}
    for video in progress(videos, "tracking videos", len(videos)):
        path = out / "videos" / f"w{WORLD_VERSION}_{video.name}.mp4"
        truth = render_video(path, video)
        for name, detector in detectors.items():
            scores[name].append(_tracked(path, head, truth, detector, config))
    result: dict[str, Any] = {
        "split": videos[0].split, "people": len({v.seed for v in videos}), "frames": videos[0].frames,
        "size": videos[0].size,
    }  # fmt: skip
    for name, found in scores.items():
        by_camera = {f"{a:.0f} degrees": (lambda v, a=a: v.azimuth_deg == a) for a in CAMERAS_DEG}
        result[name] = {
            camera: summary([s for s, v in zip(found, videos, strict=True) if chosen(v)])
            for camera, chosen in {**by_camera, "all": lambda v: True}.items()
        }
    write_json(out / "metrics.json", result)
    with fresh_file(out / "table.md") as file:
        file.write_text(table_markdown(result, list(detectors)), encoding="utf-8")
    return result


def _tracked(
    path: Path, head: Head, truth: HeadParams, detector: Detector, config: TrackingConfig
) -> VideoScore | None:
    def frames():
        return read_video(path)

    try:
        located = locate(frames, head, detector, config, video=True)
    except UserError:
        return None
    return score_video(head, truth, located.fit.params, len(located.lost))


def summary(scores: Sequence[VideoScore | None]) -> dict[str, Any]:
    """Summarise one camera's videos: pooled gain and corr, means of distances, all with 95 % intervals over videos."""
    found = [s for s in scores if s is not None]
    out: dict[str, Any] = {"videos": len(scores), "failed": len(scores) - len(found)}
    out["frames_without_face"] = sum(s.missed for s in found)
    for group in GROUPS:
        products = [s.products[group] for s in found if group in s.products]
        row = pooled(products)
        out[group] = {"gain": row["gain"], "corr": row["cos"]}
    measures: dict[str, Callable[[VideoScore], float]] = {
        "aed_mm": lambda s: s.aed_mm, "still_aed_mm": lambda s: s.still_aed_mm, "jitter_mm": lambda s: s.jitter_mm
    }  # fmt: skip
    for key, value in measures.items():
        out[key] = averaged(bootstrap([value(s) for s in found]))
    return out


def table_markdown(result: dict[str, Any], detectors: Sequence[str]) -> str:
    """Write table.md: a table per detector, cameras by groups."""
    people, frames, size = result["people"], result["frames"], result["size"]
    lines = [f"# Tracking of videos, {result['split']}", ""]
    lines += [f"{people} people, {frames} frames each after {REST_FRAMES} at rest, H.264 at {size} px.", ""]
    for name in detectors:
        lines += [f"## {name}", "", "| gain / corr [95 % interval] | " + " | ".join(result[name]) + " |"]
        lines += ["|---" * (len(result[name]) + 1) + "|"]
        for group in GROUPS:
            rows = [{group: {"gain": r[group]["gain"], "cos": r[group]["corr"]}} for r in result[name].values()]
            lines.append(f"| {group} | " + " | ".join(gain_cells(r, [group])[0] for r in rows) + " |")
        titles = {
            "aed_mm": "AED [mm]",
            "still_aed_mm": "AED of standing still [mm]",
            "jitter_mm": "jitter at rest [mm]",
        }
        for key, title in titles.items():
            cells = [cell(r[key], 3) for r in result[name].values()]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lost = [f"{r['failed']} of {r['videos']}, {r['frames_without_face']}" for r in result[name].values()]
        lines += ["| videos that failed, frames without a face | " + " | ".join(lost) + " |", ""]
    return "\n".join(lines)
