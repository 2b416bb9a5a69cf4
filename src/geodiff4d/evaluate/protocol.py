"""The paper's protocols, `self` and `cross` (Sec. 5.2, 5.3), as one resumable run over all cases.

Stages: render the open world's clips (or take the user's), track references, fit avatars if asked for, then generate
and score case by case. Everything a stage leaves is whole or absent, so the same command goes on where it was. Every
case is worked on by one thread of one process, whatever their number: the figures do not depend on it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from geodiff4d.core import workers as processes
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_object, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import composite, encode_normals, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.workers import in_order
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.avatars import Lessons, avatar_note, lessons_of, make_avatar
from geodiff4d.evaluate.cases import (
    Case,
    Extent,
    WorldClip,
    all_clips,
    cross_cases,
    found_clips,
    render_world_clip,
    self_cases,
    subject_of,
    world_clips,
)
from geodiff4d.evaluate.identity import SHIPPED as IDENTITY
from geodiff4d.evaluate.inputs import Inputs, Tracking, prepare_case, prepare_reference, stamp
from geodiff4d.evaluate.judges import JudgeConfig, Judges, Scores, Trial, quantised
from geodiff4d.evaluate.methods import AVATARS, DEFAULT_METHODS, METHODS, Made, Maker, read_results
from geodiff4d.heads import load_head
from geodiff4d.pipeline import load_model, placed_on
from geodiff4d.presets import PRESETS, Preset
from geodiff4d.tracking.network import SHIPPED as PERCEPTION
from geodiff4d.video.inputs import Portrait, load_portrait

VERSION = 2
"""Goes up whenever the same frames would get other figures: those of another version are made again."""
WORLD_SIZE = 256
KEPT = 4
"""Frames of a case that are kept for everyone to look at, unless all are."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on; workers get it whole."""

    out: Path
    preset: Preset = PRESETS["embedded"]
    model: Path | None = None
    head: str = "openhead"
    methods: tuple[str, ...] = DEFAULT_METHODS
    results: Path | None = None
    """Another method's frames."""
    tracking: Tracking = "pixels"
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    keep: Literal["some", "all"] = "some"
    seed: int = 0
    bf16: bool = True
    """Generate in bf16 where the machine has it, else in float32."""
    devices: tuple[str, ...] = ("cpu",)
    """Where processes compute, in turn."""
    makers: str = ""
    """Fingerprint of all that frames depend on: those of another are made again."""
    fingerprint: str = ""
    """The same of scores."""

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise UserError(f"--methods {unknown[0]} is not known: expected some of {', '.join(METHODS)}")
        if self.results is not None and not self.results.is_dir():
            raise UserError(f"--results {self.results} is not a folder: expected one folder of frames per case")

    @property
    def results_name(self) -> str:
        return "results" if self.results is None else f"results:{self.results.name}"


@dataclass(frozen=True)
class Work:
    """One case, and what it takes from others."""

    case: Case
    other: Case
    """Of another person: whose reference the control gets."""
    lessons: Lessons
    """Of the reference's avatars."""


def run_protocol(
    protocol: Literal["self", "cross"], settings: Settings, extent: Extent, data: Path | None = None, workers: int = 1,
    progress: Progress = silent,
) -> tuple[list[Case], list[dict[str, Any]]]:  # fmt: skip
    """Run a protocol; returns its cases and what each left (`scores.json`, or why it failed).

    Raises:
        UserError: bad input, or no case could be tracked.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    size = load_model(settings.model).config.size
    settings = settled(settings)
    if data is None:
        wanted = world_clips(extent, max(WORLD_SIZE, size) if settings.preset.trackable else size, extent.cameras + 1)
        jobs = [(render_clip, settings.out / "data", clip) for clip in wanted]
        clips = [Path(p) for p in in_order(jobs, workers, progress, "rendering people")]
    else:
        clips = found_clips(data, extent)
    cases = self_cases(clips, extent) if protocol == "self" else cross_cases(clips, extent)
    works = _works(cases, clips if data is None else all_clips(data), extent)
    first: dict[str, Work] = {}
    for work in works:
        first.setdefault(work.case.reference_name, work)
    jobs = [(_reference, settings, w) for w in first.values()]
    in_order(jobs, workers, progress, "tracking references")
    jobs = [(_avatar, settings, w, m) for m in AVATARS if m in settings.methods for w in first.values()]
    in_order(jobs, workers, progress, "fitting avatars")
    found = in_order([(score_case, settings, w) for w in works], workers, progress, "scoring clips")
    if all("failed" in f for f in found):
        raise UserError(f"no clip could be tracked; the first: {found[0]['failed']}")
    return [w.case for w in works], found


def _works(cases: list[Case], clips: list[Path], extent: Extent) -> list[Work]:
    subjects = [subject_of(Clip(c.reference.clip)) for c in cases]
    lessons = lessons_of(cases, clips, extent)
    out = []
    for i, case in enumerate(cases):
        order = [j % len(cases) for j in range(i + 1, i + len(cases))]
        other = next((j for j in order if subjects[j] != subjects[i]), i)
        out.append(Work(case, cases[other], lessons[i]))
    return out


def settled(settings: Settings) -> Settings:
    """Note what frames and scores depend on."""
    model = load_model(settings.model)
    p = settings.preset
    made = (
        p.sample, p.fit, p.views, p.frames, p.azimuth_deg, settings.head, settings.tracking, settings.seed,
        settings.bf16,
    )  # fmt: skip
    makers = fingerprint(VERSION, made, model.state_dict())
    networks = [file.read_bytes() for folder in (PERCEPTION, IDENTITY) for file in sorted(folder.glob("*.safetensors"))]
    return replace(
        settings, makers=makers, fingerprint=fingerprint(makers, settings.judges, settings.keep, networks)
    )  # fmt: skip


def _stamp(folder: Path) -> str:
    """Of a folder's files, to see whether somebody wrote them anew."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return fingerprint(found)


# What a worker does


@lru_cache(maxsize=1)
def maker_of(settings: Settings) -> Maker:
    """Load head and model once a process, onto the device of this worker; return what makes frames with them."""
    device = torch.device(settings.devices[processes.number % len(settings.devices)])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # avatars are fitted on the current one
    model = placed_on(load_model(settings.model).eval(), device)
    return Maker(
        load_head(settings.head),
        model,
        settings.preset,
        replace(settings.preset.sample, seed=settings.seed, autocast=settings.bf16),
    )


@lru_cache(maxsize=1)
def _judges(settings: Settings) -> Judges:
    return Judges(maker_of(settings).head, settings.judges)


def render_clip(folder: Path, clip: WorldClip) -> str:
    """Render a person of the open world into a folder; return the clip's path."""
    return str(render_world_clip(folder, clip))


def _reference(settings: Settings, work: Work) -> str | None:
    maker = maker_of(settings)
    try:
        prepare_reference(settings.out, work.case, maker.head, maker.model.config.size, settings.tracking)
    except UserError as error:
        return str(error)
    return None


def _avatar(settings: Settings, work: Work, method: str) -> None:
    folder, maker = _avatar_folder(settings, work, method), maker_of(settings)
    make_avatar(method, maker, settings.out, folder, work.case, work.lessons, settings.tracking, settings.makers)


def _avatar_folder(settings: Settings, work: Work, method: str) -> Path:
    return settings.out / f"{method}s" / work.case.reference_name


def score_case(settings: Settings, work: Work) -> dict[str, Any]:
    """Make and score one case; leaves OUT/clips/<case> with frames and, last, scores.json.

    Methods that are there already are kept, so that one can be added later.
    """
    folder, maker = settings.out / "clips" / work.case.name, maker_of(settings)
    rival = None if settings.results is None else _stamp(settings.results / work.case.name)
    of = stamp(work.case.reference, work.case.driving)
    note: dict[str, Any] = {"case": work.case.name, "fingerprint": settings.fingerprint, "of": of, "scores": {}}
    if (folder / "scores.json").exists():
        known = read_object(folder / "scores.json")
        if known.get("fingerprint") != settings.fingerprint or known.get("of") != of:
            shutil.rmtree(folder)
        elif "failed" not in known:
            note = known
    if rival is not None and note.get("rivals", {}).get(settings.results_name) != rival:
        note["scores"].pop(settings.results_name, None)
    _look_at_avatars(note, settings, work)
    wanted = [m for m in settings.methods if m not in note["scores"] and m not in note["unavailable"]]
    if wanted or (rival is not None and settings.results_name not in note["scores"]):
        try:
            inputs = prepare_case(settings.out, work.case, maker.head, maker.model.config.size, settings.tracking)
        except UserError as error:
            note["failed"] = str(error)
        else:
            _add_scores(note, folder, settings, work, inputs, wanted)
            if rival is not None:
                note["rivals"] = {**note.get("rivals", {}), settings.results_name: rival}
        write_json(folder / "scores.json", note)
        note = read_object(folder / "scores.json")
    asked = [*settings.methods, *([settings.results_name] if rival is not None else [])]
    return {**note, "scores": {m: note["scores"][m] for m in asked if m in note["scores"]}}


def _look_at_avatars(note: dict[str, Any], settings: Settings, work: Work) -> None:
    """Forget scores of avatars that were made anew, and note why others are not there."""
    known, note["unavailable"] = note.setdefault("avatars", {}), {}
    for method in AVATARS:
        if method in settings.methods:
            made = avatar_note(_avatar_folder(settings, work, method))
            if known.get(method) != made:
                note["scores"].pop(method, None)
                known[method] = made
            if "failed" in made:
                note["unavailable"][method] = made["failed"]


def _add_scores(
    note: dict[str, Any], folder: Path, settings: Settings, work: Work, inputs: Inputs, wanted: Sequence[str]
) -> None:
    """Make, score and keep what is wanted of a case, and the rival's frames if there are new ones."""
    maker, judges = maker_of(settings), _judges(settings)
    driving, size = maker.driving(inputs), inputs.camera.width
    shown = [inputs.driving.frame(i) for i in range(len(inputs.driving))]
    trial = Trial(judges, inputs, torch.stack([composite(f.image, f.mask) for f in shown]))
    other = _other(settings, work, maker, inputs.portrait)
    last = len(driving) - 1
    kept = range(last + 1) if settings.keep == "all" else sorted({round(k * last / (KEPT - 1)) for k in range(KEPT)})
    scores: dict[str, Scores] = note["scores"]
    for method in wanted:
        if method == "perception":
            continue
        made = maker.make(method, inputs, driving, other, _avatar_folder(settings, work, method) / "avatar")
        scores[method], _ = trial.score(made.rgb, made.normal)
        _keep(folder / method, made, kept)
        if method == "video_model":
            generated = made
    if "perception" in wanted:
        if "video_model" not in wanted:
            generated = maker.make("video_model", inputs, driving, other, folder)
        assert generated.rgb is not None
        scores["perception"] = trial.score_perceived(judges.observe(quantised(generated.rgb), inputs), size)
    if settings.results is not None and settings.results_name not in scores:
        made = read_results(settings.results, work.case.name, len(driving), size)
        if made is not None:
            scores[settings.results_name], _ = trial.score(made.rgb, made.normal)
            _keep(folder / settings.results_name.replace(":", "_"), made, kept)
    if trial.truth is not None and not (folder / "truth").exists():
        _keep(folder / "truth", Made(trial.truth.rgb, trial.truth.normal), kept)
    note |= {"yaw_difference_deg": inputs.yaw_difference_deg.tolist(), "kept": list(kept), "judges": judges.names}


def _other(settings: Settings, work: Work, maker: Maker, own: Portrait) -> Portrait:
    size = maker.model.config.size
    try:
        return load_portrait(prepare_reference(settings.out, work.other, maker.head, size, settings.tracking), size)
    except UserError:
        return own


def _keep(folder: Path, made: Made, kept: Sequence[int]) -> None:
    for k in kept:
        if made.rgb is not None:
            write_image(folder / f"{k:05d}_rgb.png", made.rgb[k])
        if made.normal is not None:
            write_image(
                folder / f"{k:05d}_normal.png", encode_normals(made.normal[k], torch.ones_like(made.normal[k, :1]))
            )
