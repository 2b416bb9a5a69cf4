"""Training samples from a mixture of footage: cross-view pairs (Sec. 3.1), weighted sampling (Sec. 3.2), clips (4.1).

Sample `i` is a function of (footage, configuration, seed, i) and of nothing else: `Mixture.sample` draws indices,
`Mixture[i]` decodes them. A batch is a range of consecutive samples (`video.mixed`), so that resuming, more processes
or more workers change nothing.

A sample has one reference and some targets of the same person; each target is driven by another camera of its instant
wherever there is one. Stage 1 draws targets freely; stage 2 takes consecutive frames of one camera, all driven by one
other camera, and pads what is too short by repeating its last frame, marked invalid.

Weights (the paper: "manually-set importance weights adjusted by sample count", multi-view about 10× per sample): a
source's share is its importance times its samples. Ours: a sample is one camera's recording of one take, or one still
picture, and no source falls below `least_share`, so that small synthetic sets stay represented.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import Dataset

from geodiff4d.core.errors import UserError
from geodiff4d.data.augment import AugmentConfig, augment_crops
from geodiff4d.data.clip_footage import open_footage
from geodiff4d.data.footage import Footage, FrameKey, kind_of

REFERENCE_TRIES = 4
"""Takes of a person that are searched for a reference of another instant."""


@dataclass(frozen=True)
class MixtureConfig:
    """How samples are drawn and decoded."""

    targets: Literal["images", "clip"] = "images"
    """images: stage 1, targets of any take, instant and view. clip: stage 2, consecutive frames of one view."""
    frames: int = 1
    """Targets of a sample; 16 in the paper's stage 2."""
    fps: float = 24.0
    """Rate of clips; faster footage is thinned."""
    size: int = 512
    crop: int = 224
    """Side of driving crops [px]."""
    cross_view: bool = True
    """Drive from another camera of the same instant; off, the driving frame is the target (`--ablate cross-view`)."""
    frontal_reference: float = 0.5
    """Share of references taken from the most frontal camera; the others come from any that shows the face."""
    multi_view_importance: float = 10.0
    """Importance of a multi-view sample; single-view samples have 1."""
    importance: tuple[float, ...] = ()
    """Importance per sample by source, instead of the above."""
    least_share: float = 0.05
    """No source is drawn less often than this (or than evenly, where there are many)."""
    warp: bool = False
    """Decode the portrait carried to each target's pose as well."""
    surroundings: bool = False
    """With hair and shoulders around it."""
    augment: AugmentConfig | None = AugmentConfig()
    """Of driving crops, and of nothing else."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.size < 8 or self.crop < 8:
            raise UserError(
                f"a sample needs frames and pictures, got {self.frames} of {self.size} px, crop {self.crop}"
            )
        if not 0 <= self.least_share < 1 or any(not w > 0 for w in (*self.importance, self.multi_view_importance)):
            raise UserError("importance must be positive, and the least share in [0, 1)")


@dataclass(frozen=True)
class Sample:
    """Which frames make a sample."""

    source: int
    reference: FrameKey
    target: tuple[FrameKey, ...]
    driving: tuple[FrameKey, ...]
    """Same takes and instants as the targets."""
    valid: tuple[bool, ...]
    """False where a frame only pads a clip that is too short."""


@dataclass(frozen=True)
class Example:
    """A decoded sample, or a batch of them with one more axis in front. Pictures in [0, 1] on plain grey."""

    reference: Float[Tensor, "*b 3 size size"]
    reference_normal: Float[Tensor, "*b 3 size size"]
    reference_pose: Float[Tensor, "*b 3 size size"]
    rgb: Float[Tensor, "*b frames 3 size size"]
    mask: Float[Tensor, "*b frames 1 size size"]
    normal: Float[Tensor, "*b frames 3 size size"]
    """Normal images; grey where `has_normal` is false."""
    pose: Float[Tensor, "*b frames 3 size size"]
    """Pose maps."""
    focus: Float[Tensor, "*b frames 1 size size"]
    """1 on mouth, eyes and brows."""
    driving: Float[Tensor, "*b frames 3 crop crop"]
    """Augmented face crops."""
    expr: Float[Tensor, "*b frames 52"]
    """ARKit weights, NaN where unknown; for the encoder's optional warm start alone."""
    has_normal: Bool[Tensor, "*b frames"]
    valid: Bool[Tensor, "*b frames"]
    """The padding mask: false frames count in no loss and no temporal attention."""
    warp: Float[Tensor, "*b frames 3 size size"] | None = None
    visibility: Float[Tensor, "*b frames 2 size size"] | None = None
    """What the portrait itself shows of `warp`, and where the head is at all."""


class _Shots:
    """A source's samples by weight: every (take, view) with as many samples as it counts for."""

    def __init__(self, footage: Footage):
        take, view, weight = [], [], []
        self.first: list[int] = []
        self.of_subject: dict[str, list[int]] = {}
        for i, t in enumerate(footage.takes):
            self.of_subject.setdefault(t.subject, []).append(i)
            self.first.append(len(take))
            for v, count in enumerate(t.present.sum(0).tolist()):
                if count:
                    take.append(i)
                    view.append(v)
                    weight.append(1 if t.temporal else count)
        self.first.append(len(take))
        self.take, self.view = np.array(take), np.array(view)
        self.ends = np.concatenate([[0], np.cumsum(weight)])

    @property
    def samples(self) -> int:
        return int(self.ends[-1])

    def draw(self, rng: np.random.Generator, takes: Sequence[int] | None = None) -> tuple[int, int]:
        """Draw (take, view), every sample equally often; of some takes only, if they are given."""
        if takes is None:
            k = int(np.searchsorted(self.ends, rng.integers(self.samples), "right")) - 1
            return int(self.take[k]), int(self.view[k])
        low = np.array([self.ends[self.first[t]] for t in takes])
        count = np.array([self.ends[self.first[t + 1]] for t in takes]) - low
        j = int(rng.integers(count.sum()))
        t = int(np.searchsorted(np.cumsum(count), j, "right"))
        k = int(np.searchsorted(self.ends, low[t] + j - (count[:t].sum()), "right")) - 1
        return int(self.take[k]), int(self.view[k])


class Mixture(Dataset):
    """Samples of several sources, by global index.

    Example:
        >>> mixture = Mixture([Path("data/nersemble"), Path("data/synthhuman")], MixtureConfig())  # doctest: +SKIP
        >>> batch = collate([mixture[i] for i in range(32)])  # doctest: +SKIP
    """

    def __init__(
        self, sources: Sequence[Path | Footage], config: MixtureConfig = MixtureConfig(), seed: int = 0,
        head: str | None = None,
    ):  # fmt: skip
        """Open sources: folders (see `open_footage`) or footage. `head` is the file that clips on FLAME need.

        Raises:
            UserError: a source has nothing to train on, or the importance does not fit the sources.
        """
        self.config, self.seed = config, seed
        self.sources = [open_footage(s, head) if isinstance(s, Path) else s for s in sources]
        if not self.sources:
            raise UserError("there is nothing to train on: give at least one --data folder")
        if config.importance and len(config.importance) != len(self.sources):
            raise UserError(
                f"importance has {len(config.importance)} numbers for {len(self.sources)} sources: expected one each"
            )
        self._shots = [_Shots(s) for s in self.sources]

        self.shares = self._shares()
        """How often each source is drawn, summing to 1."""

    def _shares(self) -> np.ndarray:
        kinds = [kind_of(s) for s in self.sources]
        usual = [self.config.multi_view_importance if k == "multi-view" else 1.0 for k in kinds]
        share = np.array(self.config.importance or usual) * [s.samples for s in self._shots]
        share = share / share.sum()
        least = min(self.config.least_share, 1 / len(share))
        # What the small ones are given, the others give up in proportion; which may make another one small.
        small = share < least
        while small.any():
            share = np.where(small, least, share / share[~small].sum() * (1 - least * small.sum()))
            fallen = small | (share < least * (1 - 1e-9))
            if (fallen == small).all():
                break
            small = fallen
        return share

    def sample(self, index: int) -> Sample:
        """Draw the frames of a global index."""
        rng = np.random.default_rng((self.seed, index))
        source = int(np.searchsorted(np.cumsum(self.shares), rng.random(), "right").clip(0, len(self.sources) - 1))
        draw = _Draw(self.sources[source], self._shots[source], self.config, rng)
        target, driving, valid = draw.clip() if self.config.targets == "clip" else draw.images()
        return Sample(source, draw.reference(target), target, driving, valid)

    def __getitem__(self, index: int) -> Example:
        """Draw and decode the sample with a global index."""
        s, c = self.sample(index), self.config
        footage, n = self.sources[s.source], sum(s.valid)
        ref = footage.frames(s.reference.take, s.reference.view, [s.reference.instant], c.size)
        targets, drivers = (_runs(keys[:n], c.targets == "clip") for keys in (s.target, s.driving))
        decoded = [footage.frames(k.take, k.view, at, c.size) for k, at in targets]
        crops = torch.cat([footage.driving(k.take, k.view, at, c.crop) for k, at in drivers])
        if c.augment is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            crops = augment_crops(crops, c.augment, generator)
        has = torch.cat([torch.full((len(f.rgb),), f.has_normal) for f in decoded])
        out: dict[str, Any] = {"driving": crops, "has_normal": has} | {
            k: torch.cat([getattr(f, k) for f in decoded]) for k in ("rgb", "mask", "normal", "pose", "focus", "expr")
        }
        if c.warp:
            carried = [footage.warped(s.reference, k.take, k.view, at, c.size, c.surroundings) for k, at in targets]
            out["warp"], out["visibility"] = (torch.cat([x[j] for x in carried]) for j in (0, 1))
        pad = torch.arange(c.frames).clamp(max=n - 1)
        padded = {k: v[pad] for k, v in out.items()}
        return Example(
            reference=ref.rgb[0], reference_normal=ref.normal[0],
            reference_pose=ref.pose[0], valid=torch.tensor(s.valid), **padded,
        )  # fmt: skip


def _runs(keys: Sequence[FrameKey], together: bool) -> list[tuple[FrameKey, list[int]]]:
    """Group frames that are decoded at once: a clip as a whole, independent images alone."""
    return [(keys[0], [k.instant for k in keys])] if together else [(k, [k.instant]) for k in keys]


class _Draw:
    """One sample of one source."""

    def __init__(self, footage: Footage, shots: _Shots, config: MixtureConfig, rng: np.random.Generator):
        self.footage, self.shots, self.config, self.rng = footage, shots, config, rng
        self.take, self.view = shots.draw(rng)
        self.takes = shots.of_subject[footage.takes[self.take].subject]

    def _pick(self, items: Sequence[int] | np.ndarray) -> int:
        return int(items[int(self.rng.integers(len(items)))])

    def _driver(self, take: int, view: int, overlap: Callable[[int], int]) -> int:
        """Draw another view that shows the face and overlaps with the target most; the target's own if none does."""
        if not self.config.cross_view:
            return view
        counts = {v: overlap(v) for v in self.footage.driving_views(take) if v != view}
        best = max(counts.values(), default=0)
        return self._pick([v for v, n in counts.items() if n == best]) if best else view

    def images(self) -> tuple[tuple[FrameKey, ...], tuple[FrameKey, ...], tuple[bool, ...]]:
        """Draw targets of one person, whatever the take, instant and view, and a driver for each."""
        target, driving = [], []
        for n in range(self.config.frames):
            take, view = (self.take, self.view) if n == 0 else self.shots.draw(self.rng, self.takes)
            present = self.footage.takes[take].present
            instant = self._pick(np.nonzero(present[:, view])[0])
            driver = self._driver(take, view, lambda v, p=present[instant]: int(p[v]))
            target.append(FrameKey(take, instant, view))
            driving.append(FrameKey(take, instant, driver))
        return tuple(target), tuple(driving), (True,) * len(target)

    def clip(self) -> tuple[tuple[FrameKey, ...], tuple[FrameKey, ...], tuple[bool, ...]]:
        """Draw consecutive frames of one view and of the view that drives them; what is missing is padding."""
        take, c = self.footage.takes[self.take], self.config
        here = take.present[:, self.view]
        stride = max(1, round(take.fps / c.fps))
        reach = stride * (c.frames - 1) + 1
        # Other cameras may have holes of their own: what counts is how much of a clip both can give.
        driver = self._driver(self.take, self.view, lambda v: min(int((take.present[:, v] & here).sum()), reach))
        both = np.nonzero(here & take.present[:, driver])[0]
        start = int(self.rng.integers(max(1, len(both) - reach + 1))) if take.temporal else self._pick(range(len(both)))
        chosen = both[start : start + reach] if take.temporal else both[start : start + 1]
        step = np.diff(take.timesteps).min(initial=np.iinfo(np.int64).max)
        gaps = np.nonzero(np.diff(take.timesteps[chosen]) > step)[0]
        chosen = (chosen[: gaps[0] + 1] if len(gaps) else chosen)[::stride]
        instants = [*chosen.tolist(), *([int(chosen[-1])] * (c.frames - len(chosen)))]
        valid = tuple(i < len(chosen) for i in range(c.frames))
        target, driving = (tuple(FrameKey(self.take, i, v) for i in instants) for v in (self.view, driver))
        return target, driving, valid

    def reference(self, target: tuple[FrameKey, ...]) -> FrameKey:
        """Draw the portrait: another time of the person, else another view of a target's time, else the target."""
        taken = {(k.take, k.instant) for k in target}
        for _ in range(REFERENCE_TRIES):
            take, _ = self.shots.draw(self.rng, self.takes)
            view = self._reference_view(take)
            there = np.nonzero(self.footage.takes[take].present[:, view])[0]
            free = [int(i) for i in there if (take, int(i)) not in taken]
            if free:
                return FrameKey(take, self._pick(free), view)
        key = target[0]
        present = self.footage.takes[key.take].present[key.instant]
        others = [v for v in self.footage.reference_views(key.take) if v != key.view and present[v]]
        return key._replace(view=self._pick(others)) if others else key

    def _reference_view(self, take: int) -> int:
        views = self.footage.reference_views(take)
        return views[0] if self.rng.random() < self.config.frontal_reference else self._pick(views)


def collate(examples: list[Example]) -> Example:
    """Stack examples to a batch."""
    columns = {f.name: [getattr(e, f.name) for e in examples] for f in fields(Example)}
    stacked: dict[str, Any] = {k: None if v[0] is None else torch.stack(v) for k, v in columns.items()}
    return Example(**stacked)
