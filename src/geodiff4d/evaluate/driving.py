"""Portraits driven by other people's videos: the driven videos, and how much of the drivers' expression is in them.

There is no truth: what is measured is the driver's own change of expression, frame by frame, against the driven video's
(`expression_gain`). All methods hold the head still before a camera in front, as an avatar's training clip does.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.drive import performed, render_sequence, wants_tokens
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.video import read_video, write_video
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.gain_tables import Scores, tables
from geodiff4d.evaluate.made import Made
from geodiff4d.evaluate.methods import Maker
from geodiff4d.evaluate.protocol import Settings, maker_of, settled
from geodiff4d.evaluate.readers import Reader, Reading, compare_identities, readers
from geodiff4d.evaluate.taught_avatars import fit_avatar
from geodiff4d.pipeline import clip_cameras, tracked
from geodiff4d.tracking.source import frames_of
from geodiff4d.video.generate import GenerationRequest, WarpGenerator
from geodiff4d.video.inputs import (
    Driving,
    Portrait,
    load_driving,
    load_portrait,
    still_head,
    with_identity_of,
)

DRIVEN_METHODS = ("video_model", "mesh_warp", "avatar")


@dataclass(frozen=True)
class Source:
    """A tracked portrait or driver."""

    name: str
    path: Path
    clip: Clip
    of: str
    """Fingerprint of the file and of how it was tracked."""


@dataclass(frozen=True)
class Job:
    """A portrait and who drives it."""

    portrait: Source
    driver: Source

    @property
    def name(self) -> str:
        return f"{self.portrait.name}_by_{self.driver.name}"


def run_driving(
    portraits: Sequence[Path], drivers: Sequence[Path], settings: Settings, frames: int = 96,
    judges: Path | None = None, progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Drive every portrait by the first `frames` frames of every driver; returns what it writes to OUT/metrics.json.

    Writes OUT/videos/{portrait}_by_{driver}_{method}.mp4 and OUT/table.md; videos that are there, made of the same
    files by the same model, are not made again. An avatar is fitted per portrait, to the range of motion alone: it has
    seen no driver. `judges` is the folder of an environment with independent networks.

    Raises:
        UserError: bad input, or no portrait or driver shows a face.
    """
    if unknown := [m for m in settings.methods if m not in DRIVEN_METHODS]:
        raise UserError(f"--methods {unknown[0]} is not for driving: expected some of {', '.join(DRIVEN_METHODS)}")
    _require_distinct(portraits, "portraits")
    _require_distinct(drivers, "drivers")
    settings = settled(settings)
    maker, out = maker_of(settings), settings.out
    each, missing = readers(maker.head, judges)
    failed: dict[str, str] = {}
    faces = list(_sources(out / "portraits", portraits, maker, 1, failed))
    actors = list(_sources(out / "drivers", drivers, maker, frames, failed))
    if not faces or not actors:
        raise UserError(f"nothing can be driven: {next(iter(failed.values()))}")
    jobs = [Job(face, actor) for face in faces for actor in actors]
    for job in progress(jobs, "driving", len(jobs)):
        make_videos(out, job, settings, maker, frames)
    scores, absent = score_videos(out, jobs, settings.methods, each, frames, progress)
    result = {
        "portraits": [f.name for f in faces], "drivers": [a.name for a in actors], "failed": failed,
        "methods": scores.summary(settings.methods), "missing": missing | absent,
        "config": {"preset": settings.preset.name, "seed": settings.seed, "frames": frames,
                   "model": "shipped" if settings.model is None else settings.model.name},
    }  # fmt: skip
    write_json(out / "metrics.json", result)
    with fresh_file(out / "table.md") as file:
        file.write_text(table_markdown(result), encoding="utf-8")
    return result


def _require_distinct(paths: Sequence[Path], option: str) -> None:
    if not paths:
        raise UserError(f"evaluate driving needs --{option}: expected at least one file")
    for path in paths:
        if not path.exists():
            raise UserError(f"--{option} {path} does not exist: expected a picture, a video or a tracked folder")
    names = [p.stem for p in paths]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"--{option} has {twice[0]} twice: expected files of different names, which name the videos")


def _sources(folder: Path, paths: Sequence[Path], maker: Maker, limit: int, failed: dict[str, str]) -> Iterator[Source]:
    """Track files, or open those that are tracked; notes in `failed` which show no face."""
    head, size = maker.head, maker.model.config.size
    for path in paths:
        try:
            if path.is_dir():
                yield Source(path.stem, path, tracked(path, head, size, path), fingerprint(str(path.resolve())))
                continue
            digest = hashlib.blake2b(path.read_bytes()).hexdigest()
            of = fingerprint(digest, size, head.name, head.template, limit)
            out = folder / f"{path.stem}_{of[:8]}"
            there = (out / "transforms.json").exists()
            yield Source(path.stem, path, Clip(out) if there else tracked(path, head, size, out, limit), of)
        except UserError as error:
            failed[path.name] = str(error)


# Making


def video_path(out: Path, job: Job, method: str) -> Path:
    """Return where a driven video lies."""
    return out / "videos" / f"{job.name}_{method}.mp4"


def make_videos(out: Path, job: Job, settings: Settings, maker: Maker, frames: int) -> None:
    """Make the driven videos of all methods that are not there yet."""
    folder = out / "jobs" / job.name
    there = Made(folder, fingerprint(job.portrait.of, job.driver.of, frames, settings.makers))
    wanted = there.missing(settings.methods)
    if not wanted:
        return
    portrait = load_portrait(job.portrait.clip, maker.model.config.size)
    crop = maker.model.config.expression.size
    driving = load_driving(job.driver.clip, maker.head, crop, frames)
    for method in wanted:
        if method == "avatar":
            avatar = fit_avatar(out / "avatars" / f"{job.portrait.name}_{job.portrait.of[:8]}", maker, portrait)
            made: Iterable[Tensor] = driven_avatar(avatar, maker, driving)
        else:
            made = driven_frames(method, maker, portrait, driving)
        write_video(video_path(out, job, method), made, driving.fps)
        there.add(method)


@torch.no_grad()
def driven_frames(
    method: str, maker: Maker, portrait: Portrait, driving: Driving
) -> Float[Tensor, "frames 3 height width"]:
    """Animate a portrait by the video model or by mesh warp, its head still, before a camera in front."""
    still = replace(driving, params=with_identity_of(portrait, still_head(driving.params)))
    camera: Camera = clip_cameras(maker.head, portrait, 1, portrait.camera.width)[0]
    generator = maker.generator if method == "video_model" else WarpGenerator()
    made = generator.generate(GenerationRequest(portrait, still, maker.head), camera.expand(len(driving)))
    return made.rgb.cpu()


def driven_avatar(folder: Path, maker: Maker, driving: Driving) -> Iterator[Float[Tensor, "3 height width"]]:
    """Let an avatar do what a driver does before its front camera; yields RGB in [0, 1] on grey."""
    avatar, tokens, encoder = Avatar.load(folder), None, maker.model.expression
    if wants_tokens(avatar):
        with torch.no_grad():
            parts = [encoder.tokens(encoder(c.to(maker.device))).float().cpu() for c in driving.crops.split(16)]
        tokens = torch.cat(parts)
    performance = performed(avatar, driving.params, tokens, driving.fps)
    for frame in render_sequence(avatar, performance, [avatar.camera] * len(performance)):
        yield frame.rgb.clamp(0, 1).cpu()


# Scoring


def source_frames(source: Source, limit: int) -> Iterable[Float[Tensor, "3 _height _width"]]:
    """Stream what a reader sees of a portrait or driver: the file's own frames, or a clip's from its first camera."""
    if source.path.is_dir():
        first: dict[int, int] = {}
        for i, record in enumerate(source.clip.records):
            first.setdefault(record.timestep, i)
        return (source.clip.frame(first[t]).image for t in sorted(first)[:limit])
    return frames_of(source.path, limit)


def score_videos(
    out: Path, jobs: Sequence[Job], methods: Sequence[str], each: Sequence[Reader], limit: int,
    progress: Progress = silent,
) -> tuple[Scores, dict[str, str]]:  # fmt: skip
    """Read every driven video beside its driver; also returns which readings there were not, and why."""
    scores, absent = Scores(), {}
    for reader in each:
        drivers: dict[str, Reading] = {}
        portraits: dict[str, Reading] = {}
        for job in progress(jobs, f"reading by {reader.key}", len(jobs)):
            if job.driver.name not in drivers:
                drivers[job.driver.name] = reader.read(source_frames(job.driver, limit), video=True)
            if job.portrait.name not in portraits:
                portraits[job.portrait.name] = reader.read(source_frames(job.portrait, 1))
            driver, own = drivers[job.driver.name], portraits[job.portrait.name]
            absent |= driver.missing
            for method in methods:
                made = reader.read(read_video(video_path(out, job, method)), video=True)
                if driver.expression is not None and made.expression is not None:
                    scores.add_video(method, reader.key, made.names, driver.expression, made.expression)
                for key, vectors in made.identity.items():
                    same = torch.from_numpy(compare_identities(key, vectors, own.identity[key]))
                    scores.add_identity(method, key, [float(same.nanmean())])
    return scores, absent


def table_markdown(result: dict[str, Any]) -> str:
    """Write table.md."""
    portraits, drivers = len(result["portraits"]), len(result["drivers"])
    lines = [
        "# Driven videos",
        "",
        f"{portraits} portraits, each driven by {drivers} videos; identity is compared with",
    ]
    lines += [f"the portrait's. At most {result['config']['frames']} frames of a driver.", ""]
    lines += tables(result["methods"], "corr", result["missing"])
    if result["failed"]:
        lines += ["## Left out", "", *(f"- {name}: {why}" for name, why in result["failed"].items()), ""]
    return "\n".join(lines)
