"""Which frames of which clips a protocol asks for (Sec. 5.2, 5.3): a reference from one camera, a driver from another.

The data are clips: of the open world, rendered here once, or imported ones. Every choice is a function of names, so
that everyone who runs a protocol on the same clips measures the same frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import Clip, ClipWriter, read_header
from geodiff4d.evaluate.pairs import loosely
from geodiff4d.render.viewpoints import capture_cameras, world_region
from geodiff4d.world.expressions import TrackKind, expression_track, head_track
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import WORLD_VERSION, SyntheticSubject, plain_seed

SEQUENCES: tuple[TrackKind, ...] = ("turns", "mixed", "speech", "extremes", "emotions", "tongue")
"""What the open world's people do, a kind per sequence: the first turns the head as far as people do, others less."""
FPS = 12.0
"""Of a clip's frames: sixteen span more than a second."""


@dataclass(frozen=True)
class Recording:
    """Frames of one camera of a clip."""

    clip: Path
    camera: int
    timesteps: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One clip of a protocol: who is shown, and who drives."""

    name: str
    reference: Recording
    """One frame."""
    driving: Recording
    same: bool
    """Whether both are the same person (self-reenactment): then the driver's frames are the truth."""

    @property
    def reference_name(self) -> str:
        r = self.reference
        return f"{r.clip.name}_c{r.camera:02d}_t{r.timesteps[0]:05d}"


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    subjects: int = 10
    sequences: int = 2
    cameras: int = 4
    frames: int = 16
    split: Split = "test"
    people: Literal["plain", "randomised"] = "plain"
    """Of the open world: those with colours that people have, or with randomised ones."""

    def __post_init__(self) -> None:
        for name, least in (("subjects", 1), ("sequences", 1), ("cameras", 1), ("frames", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}: expected at least {least}")
        if self.sequences > len(SEQUENCES):
            raise UserError(f"--sequences is {self.sequences}: the open world has {len(SEQUENCES)} kinds")


# The open world


@dataclass(frozen=True)
class WorldClip:
    """A clip of the open world that is not rendered yet."""

    seed: int
    kind: TrackKind
    cameras: tuple[int, ...]
    """Capture cameras of a clip."""
    extent: Extent
    size: int
    still: bool = False
    """Whether only the face moves."""

    @property
    def name(self) -> str:
        return f"{self.extent.split}_{self.seed}_{self.kind}{'_still' * self.still}"


def world_clips(extent: Extent, size: int, cameras: int) -> list[WorldClip]:
    """List the open world's clips, each with `cameras` capture cameras, drawn by the clip's name."""
    out = []
    for i in range(extent.subjects):
        seed = world_seed(i, extent)
        for kind in SEQUENCES[: extent.sequences]:
            drawn = generator("evaluate", extent.split, seed, kind).permutation(16)[:cameras]
            out.append(WorldClip(seed, kind, tuple(sorted(int(c) for c in drawn)), extent, size))
    return out


def world_seed(index: int, extent: Extent) -> int:
    """Return the seed of a protocol's person: one whom one could meet, or one of the random ones."""
    if extent.people == "plain":
        return plain_seed(index, extent.split)
    plain = {plain_seed(i, extent.split) for i in range(index * 20 + 40)}
    return [s for s in range(max(plain)) if s not in plain][index]


def render_world_clip(folder: Path, clip: WorldClip) -> Path:
    """Render a clip FOLDER/<name> with true parameters, masks and normals; one that is there is kept.

    Frames are framed loosely, as people frame a head: trackers find the crop themselves.
    """
    out = folder / clip.name
    if (out / "transforms.json").exists() and read_header(out).extra == _about(clip):
        return out
    subject, n = SyntheticSubject(clip.seed, clip.extent.split), clip.extent.frames
    expr, jaw, eyes = expression_track(clip.kind, max(n, 24), clip.seed, FPS)
    turn = head_track(clip.kind, max(n, 24), clip.seed, FPS) * (not clip.still)
    params = subject.params(expr[:n], rotation=turn[:n], jaw_pose=jaw[:n], eyes_pose=eyes[:n])
    points = subject.vertices(params)[:, world_region()].flatten(0, 1)
    cameras = loosely(capture_cameras(clip.size)[torch.tensor(clip.cameras)], points, clip.size)
    with ClipWriter(out, "openhead", FPS, _about(clip)) as writer:
        for t in range(n):
            writer.add_params(t, params[t])
        for k, index in enumerate(clip.cameras):
            frames = subject.render(params, cameras[k].expand(n))
            for t in range(n):
                writer.add(t, index, frames.rgb[t], cameras[k], frames.mask[t], frames.normal[t])
    return out


def _about(clip: WorldClip) -> dict[str, Any]:
    return {
        "subject_seed": clip.seed, "subject": f"{clip.extent.split}_{clip.seed}", "split": clip.extent.split,
        "track": clip.kind, "params": "truth", "world_version": WORLD_VERSION, "cameras": list(clip.cameras),
        "frames": clip.extent.frames, "size": clip.size,
    }  # fmt: skip


# Choosing


def subject_of(clip: Clip) -> str:
    """Return the person of a clip, as its importer noted it; else every clip is a person."""
    return str(clip.extra.get("subject", clip.extra.get("participant", clip.folder.name)))


def all_clips(data: Path) -> list[Path]:
    """List a folder's clips by name."""
    return sorted(p.parent for p in Path(data).rglob("transforms.json") if not p.parent.name.startswith("."))


def found_clips(data: Path, extent: Extent) -> list[Path]:
    """List the clips of a folder: the first `sequences` of each of the first `subjects`, by name.

    Raises:
        UserError: there are none.
    """
    by_subject: dict[str, list[Path]] = {}
    for folder in all_clips(data):
        by_subject.setdefault(subject_of(Clip(folder)), []).append(folder)
    if not by_subject:
        raise UserError(f"--data {data} has no clips: expected folders with transforms.json (from import or synth)")
    return [f for name in sorted(by_subject)[: extent.subjects] for f in by_subject[name][: extent.sequences]]


def self_cases(clips: Sequence[Path], extent: Extent) -> list[Case]:
    """Self-reenactment: every clip's reference from one camera, driven by each of its other cameras."""
    out = []
    for folder in clips:
        reference, targets = _chosen(Clip(folder), extent)
        out += [Case(f"{folder.name}_c{t.camera:02d}", reference, t, True) for t in targets]
    return out


def cross_cases(clips: Sequence[Path], extent: Extent) -> list[Case]:
    """Cross-reenactment: every clip's reference, driven by the cameras of the next person's clip.

    Raises:
        UserError: all clips are of one person.
    """
    opened = [Clip(folder) for folder in clips]
    subjects = [subject_of(c) for c in opened]
    out = []
    for i, clip in enumerate(opened):
        others = [j % len(clips) for j in range(i + 1, i + len(clips)) if subjects[j % len(clips)] != subjects[i]]
        if not others:
            raise UserError("evaluate cross needs clips of at least two people")
        # A person's second sequence is driven by another person's second, where there is one.
        nth = [subjects[:j].count(subjects[j]) for j in range(len(clips))]
        driver = next((j for j in others if nth[j] == nth[i]), others[0])
        reference, _ = _chosen(clip, extent)
        _, targets = _chosen(opened[driver], extent)
        out += [Case(f"{clip.folder.name}_by_{t.clip.name}_c{t.camera:02d}", reference, t, False) for t in targets]
    return out


def _chosen(clip: Clip, extent: Extent) -> tuple[Recording, list[Recording]]:
    """Draw a clip's reference frame and its target cameras, by its name alone.

    A clip of one camera drives itself: its first frame is the reference, the later ones are the targets.
    """
    rng = generator("evaluate", "cases", clip.folder.name)
    cameras = sorted({r.camera_index for r in clip.records})
    order = [cameras[i] for i in rng.permutation(len(cameras))]
    steps = timesteps(clip, extent.frames)
    if len(cameras) == 1:
        first, rest = sorted({r.timestep for r in clip.records})[0], [s for s in steps if s != steps[0]]
        return Recording(clip.folder, order[0], (first,)), [Recording(clip.folder, order[0], tuple(rest))]
    reference = Recording(clip.folder, order[0], (steps[int(rng.integers(len(steps)))],))
    return reference, [Recording(clip.folder, c, steps) for c in sorted(order[1 : extent.cameras + 1])]


def timesteps(clip: Clip, count: int) -> tuple[int, ...]:
    """Take `count` timesteps from the middle of a clip, at about `FPS`.

    Raises:
        UserError: the clip has fewer than two.
    """
    steps = sorted({r.timestep for r in clip.records})
    if len(steps) < 2:
        raise UserError(f"{clip.folder} has {len(steps)} timestep: expected at least two, stills cannot drive")
    stride = max(1, round(clip.fps / FPS))
    while stride > 1 and (count - 1) * stride >= len(steps):
        stride -= 1
    count = min(count, len(steps))
    start = (len(steps) - 1 - (count - 1) * stride) // 2
    return tuple(steps[start + k * stride] for k in range(count))
