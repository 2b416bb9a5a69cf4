"""Avatars of a protocol: fitted to what the video model makes of a reference, or to the truth, as an upper bound.

Both are fitted and driven alike, with the same tracked parameters; only the pictures that they learn from differ. Of an
open world's person the truth is rendered: the same performances of other people, before the same cameras. Of a real one
it is what else was recorded: other sequences, as tracked. Frames that an avatar is compared with are never among them.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.fit import fit
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_object, write_json
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.evaluate.cases import Case, Extent, self_cases, subject_of
from geodiff4d.evaluate.inputs import Tracking, cut_frame, prepare_driver, prepare_reference, source_frames, stamp
from geodiff4d.evaluate.methods import Maker
from geodiff4d.evaluate.pairs import Pair, truth_frames
from geodiff4d.heads import HeadParams
from geodiff4d.pipeline import plan_clip, synthesize, write_planned
from geodiff4d.tracking.placed import placed
from geodiff4d.video.generate import Generated, GenerationRequest
from geodiff4d.video.inputs import Driving, Portrait, load_driving, load_portrait, with_identity_of
from geodiff4d.world.subject import SyntheticSubject

FILMS = 6
"""That an avatar is trained with."""


@dataclass(frozen=True)
class Lessons:
    """What a reference's avatars may be trained with."""

    drivers: tuple[Case, ...]
    """Other people's films."""
    compared: frozenset[Path]
    """Clips whose frames drive the reference, and are compared with where both are one person."""
    own: tuple[Case, ...]
    """Films of the reference's person in clips that are neither compared nor the reference's own."""

    @property
    def foreign(self) -> tuple[Case, ...]:
        """Films of which nothing is compared."""
        return tuple(c for c in self.drivers if c.driving.clip not in self.compared)


def lessons_of(cases: Sequence[Case], clips: Sequence[Path], extent: Extent) -> list[Lessons]:
    """Choose every case's lessons: avatars perform many people's motion in training, their own never.

    `clips` are all that there are, those of no case too. Cases of one reference share their lessons.
    """
    subjects = [subject_of(Clip(c.reference.clip)) for c in cases]
    drivers = [subject_of(Clip(c.driving.clip)) for c in cases]
    people = {clip: subject_of(Clip(clip)) for clip in clips}
    first: dict[str, Lessons] = {}
    for i, case in enumerate(cases):
        if case.reference_name in first:
            continue
        compared = frozenset(c.driving.clip for c in cases if c.reference_name == case.reference_name)
        order = [j % len(cases) for j in range(i + 1, i + len(cases))]
        others = [j for j in order if drivers[j] != subjects[i]]
        apart = [j for j in others if cases[j].driving.clip not in compared]
        own = [c for c, s in people.items() if s == subjects[i] and c not in compared | {case.reference.clip}]
        films = [
            c for clip in own if len({r.timestep for r in Clip(clip).records}) > 1 for c in self_cases([clip], extent)
        ]
        first[case.reference_name] = Lessons(
            _spread([cases[j] for j in apart or others or [i]]), compared, _spread(films)
        )
    return [first[c.reference_name] for c in cases]


def _spread(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Take `FILMS` different films, spread over all."""
    seen: dict[tuple[Path, int], Case] = {}
    for case in cases:
        seen.setdefault((case.driving.clip, case.driving.camera), case)
    found = list(seen.values())
    return tuple(found[:: max(1, len(found) // FILMS)][:FILMS])


def avatar_note(folder: Path) -> dict[str, Any]:
    """What `make_avatar` said of FOLDER last; with "failed", why there is no avatar."""
    return read_object(folder / "made.json") if (folder / "made.json").exists() else {}


def make_avatar(
    method: str, maker: Maker, out: Path, folder: Path, case: Case, lessons: Lessons, tracking: Tracking, makers: str
) -> None:
    """Make a reference's avatar in FOLDER, or note why there is none; resumes, and keeps what `makers` made."""
    chosen = _taught_by(method, case, lessons)
    note = {"fingerprint": makers, "films": [f"{c.driving.clip.name}_c{c.driving.camera:02d}" for c in chosen]}
    note["of"] = stamp(case.reference, *(c.driving for c in chosen))
    known = avatar_note(folder)
    if known in (note | {"done": True}, {}, note):
        if "done" in known:
            return
    elif folder.exists():
        shutil.rmtree(folder)
    write_json(folder / "made.json", note)
    try:
        if not (folder / "clip" / "transforms.json").exists():
            _write_clip(method, maker, out, folder / "clip", case, chosen, lessons, tracking)
        if not (folder / "avatar" / "metrics.json").exists():
            fit(Clip(folder / "clip"), folder / "avatar", maker.preset.fit, maker.seed)
    except UserError as error:
        write_json(folder / "made.json", note | {"failed": str(error)})
    else:
        write_json(folder / "made.json", note | {"done": True})


def _taught_by(method: str, case: Case, lessons: Lessons) -> tuple[Case, ...]:
    if method == "avatar":
        return lessons.drivers
    return lessons.foreign if _rendered(case, lessons) else lessons.own


def _rendered(case: Case, lessons: Lessons) -> bool:
    """Whether the open world can say what the reference's person looks like in other people's performances."""
    known = [Clip(c.driving.clip).extra for c in lessons.foreign]
    return "subject_seed" in Clip(case.reference.clip).extra and any(known) and all("subject_seed" in e for e in known)


def _write_clip(
    method: str, maker: Maker, out: Path, folder: Path, case: Case, chosen: tuple[Case, ...], lessons: Lessons,
    tracking: Tracking,
) -> None:  # fmt: skip
    head, size, p = maker.head, maker.model.config.size, maker.preset
    portrait = load_portrait(prepare_reference(out, case, head, size, tracking), size)
    if not chosen:
        raise UserError(f"nothing but what is compared is known of {subject_of(Clip(case.reference.clip))}")
    tracked: list[tuple[Case, Clip]] = []
    missed = None
    for film in chosen:
        try:
            tracked.append((film, prepare_driver(out, film, head, size, tracking)))
        except UserError as error:  # The tracker sees no face.
            missed = error
    if missed is not None and not tracked:
        raise missed
    driving = _joined(maker, [clip for _, clip in tracked])
    if method == "avatar":
        plan = plan_clip(GenerationRequest(portrait, driving, head), p.views, p.frames, azimuth_deg=p.azimuth_deg)
        synthesize(plan, maker.generator, folder)
    elif _rendered(case, lessons):
        _write_performed(maker, folder, case, portrait, driving, [film for film, _ in tracked])
    else:
        _write_recorded(maker, folder, portrait, driving, tracked)


def _joined(maker: Maker, clips: Sequence[Clip]) -> Driving:
    """Read films one after the other; all in the shape of the first, which nobody uses."""
    found = [load_driving(c, maker.head, maker.model.config.expression.size) for c in clips]
    shape = found[0].params.shape[:1]
    params = [replace(d.params, shape=shape.expand(len(d), -1)) for d in found]
    rows = HeadParams.stack([p[i] for p in params for i in range(p.batch[0])])
    return Driving(rows, torch.cat([d.crops for d in found]), found[0].fps)


@torch.no_grad()
def _tokens(maker: Maker, crops: Float[Tensor, "t 3 size size"]) -> Float[Tensor, "t tokens channels"]:
    return maker.model.expression.tokens(maker.model.encode_expressions(crops.to(maker.device)))[0].cpu()


def _write_performed(
    maker: Maker, folder: Path, case: Case, portrait: Portrait, driving: Driving, films: Sequence[Case]
) -> None:
    """Render the reference's person as the video model should have drawn it, where it would have drawn it.

    Motion is the drivers' true one; the clip's parameters are as tracked, as the video model's clip has them.
    """
    extra, p = Clip(case.reference.clip).extra, maker.preset
    subject = SyntheticSubject(int(extra["subject_seed"]), extra["split"])
    true = HeadParams.stack([Clip(f.driving.clip).params(t) for f in films for t in f.driving.timesteps])
    motion = subject.params(true.expr, jaw_pose=true.jaw_pose, eyes_pose=true.eyes_pose)
    plan = plan_clip(GenerationRequest(portrait, driving, maker.head), p.views, p.frames, azimuth_deg=p.azimuth_deg)
    at = torch.tensor([s.timestep for s in plan.shots])
    truth = truth_frames(Pair(subject, portrait, driving, motion), maker.head, motion[at], plan.cameras)
    made = Generated(truth.rgb, truth.normal, truth.mask, _tokens(maker, plan.shown.driving.crops))
    write_planned(folder, plan, made, {"generator": "truth"})


def _write_recorded(
    maker: Maker, folder: Path, portrait: Portrait, driving: Driving, tracked: Sequence[tuple[Case, Clip]]
) -> None:
    """Lay a person's other films one after the other, each frame an instant of its own, as tracked."""
    head, first, t = maker.head, tracked[0][1], 0
    with ClipWriter(folder, head.name, first.fps, {"generator": "recorded"}) as writer:
        for k, (film, clip) in enumerate(tracked):
            n, camera = len(film.driving.timesteps), clip.frame(0).camera
            seen = HeadParams.stack([clip.params(step) for step in film.driving.timesteps])
            params = placed(head, with_identity_of(portrait, seen), seen, camera)
            for i, frame in enumerate(source_frames(film.driving)):
                image, mask, normal = cut_frame(frame, tuple(clip.extra["crop"]), camera.width)
                writer.add_params(t + i, params[i])
                writer.add(t + i, k, image, camera, mask, normal)
            t += n
        writer.set_reference(portrait.on_grey)
        writer.set_tokens(_tokens(maker, driving.crops))
