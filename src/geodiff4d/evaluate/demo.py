"""The demo: a portrait becomes an avatar, and eight pairs say how well (the controls of `metrics.json`)."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.drive import orbit as orbit_cameras
from geodiff4d.avatar.drive import render_sequence
from geodiff4d.avatar.fit import fit
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.files import read_json, read_object, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import encode_normals, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.video import write_video
from geodiff4d.core.workers import in_order
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.demo_photograph import photograph_views
from geodiff4d.evaluate.demo_report import Scored, write_overview, write_report
from geodiff4d.evaluate.metrics import PairScores, Truth, score, silhouette_iou
from geodiff4d.evaluate.pairs import Pair, make_pair, scored_shots, silhouette_orbit, track_pair, truth_frames
from geodiff4d.heads import Head, load_head
from geodiff4d.pipeline import load_model, plan_clip, synthesize
from geodiff4d.presets import PRESETS, Preset
from geodiff4d.render.meshes import pose_map
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest, WarpGenerator
from geodiff4d.video.inputs import with_identity_of
from geodiff4d.video.model import VideoModel
from geodiff4d.video.sample import SampleConfig
from geodiff4d.world.subject import WORLD_VERSION


@dataclass(frozen=True)
class DemoConfig:
    """How large a demo is."""

    preset: Preset = PRESETS["embedded"]
    pairs: int = 8
    frames_per_pair: int = 4
    """Frames that are scored."""
    driver_frames: int = 24
    """Frames of a driver's video, of which the scored ones are taken; the shown pair's is as long as the clip."""
    tracking: Literal["pixels", "truth"] = "pixels"
    """Whether portrait and driver are tracked from their files, or the truth is disturbed as a tracker would."""
    orbit_views: int = 9
    video_frames: int = 96
    seed: int = 0
    sample: SampleConfig | None = None
    """By default the preset's."""


DEBUG = DemoConfig(
    PRESETS["debug"], pairs=2, frames_per_pair=2, driver_frames=2, tracking="truth", orbit_views=3, video_frames=4
)


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 2)

    def all(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.monotonic() - self.begun, 2)}


@dataclass(frozen=True)
class Demo:
    """Which demo it is: from this a process that scores some of its pairs loads a model of its own, once."""

    out: Path
    config: DemoConfig
    model_folder: Path | None

    @cached_property
    def head(self) -> Head:
        return load_head()

    @cached_property
    def generator(self) -> DiffusionGenerator:
        sample = replace(self.config.sample or self.config.preset.sample, seed=self.config.seed)
        return DiffusionGenerator(load_model(self.model_folder), sample)

    def pair(self, i: int, progress: Progress = silent) -> Pair:
        """Make and track a pair, or read it if it was tracked before."""
        config, read = self.config, self.generator.model.config
        frames, folder = config.preset.frames if i == 0 else config.driver_frames, self.out / "pairs" / f"{i}"
        if config.tracking == "truth":
            return make_pair(folder, self.head, i, frames, read.size, read.expression.size)
        return track_pair(folder, self.head, i, frames, read.size, read.expression.size, progress=progress)

    def __reduce__(self) -> tuple[Any, ...]:
        return _demo, (self.out, self.config, self.model_folder)


@cache
def _demo(out: Path, config: DemoConfig, model_folder: Path | None) -> Demo:
    """Return the same demo for all pairs that a process scores."""
    return Demo(out, config, model_folder)


def run_demo(
    out: Path, config: DemoConfig = DemoConfig(), model_folder: Path | None = None, progress: Progress = silent,
    workers: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Run everything; write a page, overview.png, metrics.json, generated.mp4, avatar.mp4, clip/, avatar/, frames/.

    Finished stages of the same configuration and weights are kept, so an interrupted demo goes on where it was. So many
    `workers` score pairs, each a process with one thread.
    """
    out = Path(out)
    demo, p, watch = Demo(out, config, model_folder), config.preset, Stopwatch()
    head, generator = demo.head, demo.generator
    forget_others(out, fingerprint(WORLD_VERSION, config, generator.fingerprint()))
    with watch.stage("track"):
        first = demo.pair(0, progress)
    with watch.stage("synthesize"):
        clip = _clip(out / "clip", first, p, head, generator, progress)
    with watch.stage("fit"):
        metrics_path = out / "avatar" / "metrics.json"
        if not metrics_path.exists():
            fit(clip, out / "avatar", p.fit, config.seed, progress)
        fitted = read_json(metrics_path)
    avatar = Avatar.load(out / "avatar")
    with watch.stage("render"):
        _videos(out, avatar, clip, config)
    photograph = None
    if config.tracking == "pixels":
        with watch.stage("photograph"):
            photograph = photograph_views(out / "photograph", head, generator, progress)
    scores = PairScores(config.pairs)
    with watch.stage("score"):
        if config.tracking == "pixels":
            in_order([(_track_pair, demo, i) for i in range(1, config.pairs)], workers, progress, "tracking pairs")
        found = in_order([(_score_pair, demo, i) for i in range(config.pairs)], workers, progress, "scoring pairs")
        kept = [scored for scored, _ in found]
        for i, (_, rows) in enumerate(found):
            for method, row in rows.items():
                scores.add(i, method, row)
        _write_frames(out / "frames", kept)
        avatar_scores = _score_avatar(kept[0], avatar, head, config, p.views, fitted)
    metrics = {
        **scores.summary(),
        "avatar": avatar_scores,
        "seconds": watch.all(),
        "config": _described(config, generator),
    }
    metrics["differences"] = _differences(scores)
    write_json(out / "metrics.json", metrics)
    write_overview(out / "overview.png", kept[0], avatar)
    write_report(out, metrics, scores, kept, first, avatar, photograph)
    return metrics


def forget_others(out: Path, ours: str) -> None:
    """Remove the stages another configuration or other weights left in the folder."""
    note = out / "demo.json"
    if note.exists() and read_object(note).get("fingerprint") != ours:
        for stale in ("clip", "avatar", "avatar.run", "frames", "pairs", "photograph"):
            shutil.rmtree(out / stale, ignore_errors=True)
    write_json(note, {"fingerprint": ours})


def _described(config: DemoConfig, generator: DiffusionGenerator) -> dict[str, Any]:
    return {
        **vars(config),
        "preset": config.preset.name,
        "sample": generator.sample.described(),
        "size": generator.model.config.size,
    }


def _clip(folder: Path, pair: Pair, p: Preset, head: Head, generator: DiffusionGenerator, progress: Progress) -> Clip:
    if (folder / "transforms.json").exists():
        return Clip(folder)
    request = GenerationRequest(pair.portrait, pair.driving, head)
    return synthesize(plan_clip(request, p.views, p.frames, azimuth_deg=p.azimuth_deg), generator, folder, progress)


def _track_pair(demo: Demo, i: int) -> None:
    demo.pair(i)


def _score_pair(demo: Demo, i: int) -> tuple[Scored, dict[str, dict[str, float]]]:
    """Generate a pair's frames, score them and every control (see the keys in docs/CONVENTIONS.md), by method."""
    config, head, generator = demo.config, demo.head, demo.generator
    pair, other = demo.pair(i), demo.pair((i + 1) % config.pairs).portrait
    size = generator.model.config.size
    shots, truth_params, cameras = scored_shots(pair, head, config.preset.views, config.frames_per_pair, size)
    shots = replace(shots, params=with_identity_of(pair.portrait, shots.params))
    truth = truth_frames(pair, head, truth_params, cameras)
    request = GenerationRequest(pair.portrait, shots, head)
    made, warp = generator.generate(request, cameras), WarpGenerator().generate(request, cameras)
    posed, mask = pose_map(head, shots.params, cameras)
    # Another person's portrait, the pose maps unchanged: a model that ignores the portrait scores the same.
    shuffled = generator.generate(replace(request, portrait=other), cameras)
    dropped = generator.without_expression().generate(request, cameras)
    return Scored(pair, shots, truth, made, warp), {
        "generated": score(truth, made.rgb, made.normal),
        "mesh_warp": score(truth, warp.rgb, warp.normal),
        "copy_reference": score(truth, pair.portrait.on_grey.expand_as(truth.rgb)),
        "pose_map": score(truth, normal=(posed * 2 - 1) * mask),
        "vae": _codec_ceiling(truth, generator.model),
        "shuffled_reference": score(truth, shuffled.rgb, shuffled.normal),
        "dropped_expression": score(truth, dropped.rgb, dropped.normal),
    }


@torch.no_grad()
def _codec_ceiling(truth: Truth, model: VideoModel) -> dict[str, float]:
    rgb = model.codec.decode(model.codec.encode(truth.rgb))
    normal = model.codec.decode(model.codec.encode(encode_normals(truth.normal, truth.mask)))
    return score(truth, rgb, normal * 2 - 1)


def _score_avatar(
    scored: Scored, avatar: Avatar, head: Head, config: DemoConfig, views: int, fitted: dict[str, Any]
) -> dict[str, Any]:
    """Score the avatar of the shown pair on its frames and on the silhouettes of an orbit."""
    pair, size = scored.pair, scored.truth.rgb.shape[-1]
    _, _, cameras = scored_shots(pair, head, views, config.frames_per_pair, size)
    with torch.no_grad():
        frames = [avatar.render(scored.shots.params[k], cameras[k]) for k in range(len(scored.shots))]
        around, truth = silhouette_orbit(pair, head, size, config.orbit_views)
        rest = pair.portrait.params.without_expression()
        rest = replace(
            rest, **{k: torch.zeros_like(getattr(rest, k)) for k in ("rotation", "neck_pose", "translation")}
        )
        alphas = torch.stack([avatar.render(rest, around[k]).alpha for k in range(config.orbit_views)])
    against = score(scored.truth, torch.stack([f.rgb for f in frames]), torch.stack([f.normal for f in frames]))
    return {
        "psnr_fg_vs_generated": fitted["held_out"]["psnr_fg"], "psnr_fg_vs_truth": against["psnr_fg"],
        "normal_deg": against["normal_deg"], "silhouette_iou_orbit": float(silhouette_iou(alphas, truth.mask).mean()),
        "gaussians": fitted["gaussians"], "iterations_per_second": fitted["iterations_per_second"],
    }  # fmt: skip


def _videos(out: Path, avatar: Avatar, clip: Clip, config: DemoConfig) -> None:
    """Write generated.mp4 (RGB beside normals, camera by camera) and avatar.mp4 (driven, orbiting)."""

    def generated() -> Iterator[Float[Tensor, "3 height width"]]:
        for i in range(len(clip)):
            frame = clip.frame(i)
            assert frame.normal is not None
            yield torch.cat([frame.image, encode_normals(frame.normal, torch.ones_like(frame.mask))], -1)

    write_video(out / "generated.mp4", generated(), 12.0)
    n = config.video_frames
    params = avatar.sequence[torch.arange(n) % avatar.sequence.batch[0]]
    frames = render_sequence(avatar, params, orbit_cameras(avatar, n))
    write_video(
        out / "avatar.mp4", (torch.cat([f.rgb.clamp(0, 1), f.normal * 0.5 + 0.5], -1) for f in frames), avatar.fps
    )


def _write_frames(folder: Path, kept: list[Scored]) -> None:
    """Write what was scored: `{i:03d}_{generated,truth}_{rgb,normal}.png` and `{i:03d}_mask.png`."""
    i = 0
    for s in kept:
        for k in range(len(s.truth.rgb)):
            ones = torch.ones_like(s.truth.mask[k])
            write_image(folder / f"{i:03d}_generated_rgb.png", s.generated.rgb[k])
            write_image(folder / f"{i:03d}_truth_rgb.png", s.truth.rgb[k])
            write_image(folder / f"{i:03d}_generated_normal.png", encode_normals(s.generated.normal[k], ones))
            write_image(folder / f"{i:03d}_truth_normal.png", encode_normals(s.truth.normal[k], ones))
            write_image(folder / f"{i:03d}_mask.png", s.truth.mask[k])
            i += 1


COMPARISONS = (
    ("psnr_fg", "generated", "shuffled_reference"),
    ("psnr_fg", "generated", "copy_reference"),
    ("psnr_fg", "generated", "mesh_warp"),
    ("psnr_face", "generated", "dropped_expression"),
    ("normal_deg", "generated", "pose_map"),
)


def _differences(scores: PairScores) -> list[dict[str, Any]]:
    """The controls: paired differences with their intervals."""
    rows = []
    for key, a, b in COMPARISONS:
        e = scores.difference(key, a, b)
        rows.append(
            {
                "key": key,
                "method": a,
                "minus": b,
                "mean": e.mean,
                "interval": [e.low, e.high],
                "excludes_zero": e.excludes_zero,
            }
        )
    return rows
