"""Training samples, from any mixture of footage: cross-view pairs (Sec. 3.1), weighted (Sec. 3.2), clips (Sec. 4.1).

Sample `i` is a function of (footage, configuration, seed, i) and of nothing else: `Samples.draw` says which frames make
it, `Samples[i]` reads them. A batch is a range of consecutive samples (`video.batches`), so that resuming, more
processes, more workers or more accumulated parts change nothing.

A sample has one reference and some targets of the same person; each target is driven by another camera of its instant
wherever there is one, or by somebody else who makes the same expression (`PairConfig.strangers`, ours). Stage 1 draws
targets freely, at other instants than the reference's wherever there are any; stage 2 takes consecutive frames of one
camera, all driven by one other camera, and pads what is too short by its last frame, which is then marked invalid.

Weights (the paper: "manually-set importance weights adjusted by sample count", multi-view about 10× per sample): a
source's share is its importance times its samples. Ours: a sample is one camera's recording of one take, or one still
image, and no source falls below `least_share`, so that small synthetic sets stay represented.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from geodiff4d.core.errors import UserError
from geodiff4d.data.augment import AugmentConfig, augment_crops
from geodiff4d.data.footage.clips import ClipFootage, clips_below
from geodiff4d.data.footage.encoded import EncodedFootage
from geodiff4d.data.footage.photographs import PhotographFootage, told
from geodiff4d.data.footage.rendered import RenderedFootage, Store
from geodiff4d.data.footage.take import STRANGER, CachedFrames, DecodedFrames, Footage, FrameKey, Take, kind_of
from geodiff4d.data.remote import remote_url
from geodiff4d.data.shards import NOTE, stores_below
from geodiff4d.heads.rig import HeadParams
from geodiff4d.world.seeds import generator

TRIES = 4
"""Takes of a person that are searched for a frame of another instant."""


def open_footage(folder: Path, head: str | None = None, estimated: bool = False) -> Footage:
    """Open a rendered store, encoded clips, a clip, or a folder with clips anywhere below it.

    Args:
        head: path of the head that clips on FLAME need.
        estimated: give exact synthetic normals as an estimator would see them (`--ablate synthetic`).

    Raises:
        UserError: there is nothing to train on.
    """
    folder = Path(folder)
    if (folder / "store.json").exists():
        return RenderedFootage(Store(folder), estimated)
    if stores := stores_below(folder):
        encoded = EncodedFootage(stores, head)
        if encoded.estimated != estimated:
            wanted = "with" if estimated else "without"
            raise UserError(f"{folder} was encoded otherwise: `geodiff4d encode` the clips {wanted} --estimated")
        return encoded
    if url := remote_url(folder):
        raise UserError(f"{url} is no store: expected a folder that `geodiff4d encode` wrote, with {NOTE}")
    return ClipFootage(folder, head, estimated)


def held_out_footage(folder: Path, head: str | None = None) -> Footage | None:
    """Open what lies in folders `val` below clips, encoded or not; None if nothing does."""
    if stores_below(folder):
        held = stores_below(folder, held_out=True)
        return EncodedFootage(held, head) if held else None
    return ClipFootage(folder, head, held_out=True) if clips_below(folder, held_out=True) else None


@dataclass(frozen=True)
class PairConfig:
    """How references, targets and driving frames are drawn, and how often each source."""

    references: int = 4
    """Samples of a batch, one reference each."""
    targets: int = 6
    """Target frames that share a reference; they fill the frame axis."""
    clips: bool = False
    """Targets are consecutive frames of one view (stage 2), and not of any take, instant and view."""
    fps: float = 24.0
    """Rate of clips; faster footage is thinned."""
    cross_view: bool = True
    """Drive from another camera of the same instant; off, the driving frame is the target (`--ablate cross-view`)."""
    strangers: float = 0.0
    """Share of samples that somebody else drives, where there is one: their latents cannot carry who drives."""
    frontal_reference: float = 0.5
    """Share of references taken from the most frontal camera; the others come from any that shows the face."""
    moved: float = 0.0
    """Share of targets whose warped portrait moves as their expression says, where that is known; of clips, all frames
    alike. Under the others it stands still."""
    multi_view_importance: float = 10.0
    """Importance of a multi-view sample; single-view samples have 1."""
    importance: tuple[float, ...] = ()
    """Importance per sample by source, instead of the above."""
    photographs: float = 0.25
    """Share of the samples that single photographs have beside other footage, unless `importance` says otherwise."""
    least_share: float = 0.05
    """No source is drawn less often than this (or than evenly, where there are many)."""

    def __post_init__(self) -> None:
        if self.references < 1 or self.targets < 1:
            raise UserError(f"a batch needs references and targets, got {self.references} and {self.targets}")
        if not 0 <= self.least_share < 1 or any(not w > 0 for w in (*self.importance, self.multi_view_importance)):
            raise UserError("importance must be positive, and the least share in [0, 1)")


@dataclass(frozen=True)
class ReadConfig:
    """What is read of a sample's frames, as the model needs it."""

    size: int = 512
    crop: int = 224
    """Side of driving crops [px]."""
    warp: bool = False
    """Carry the portrait to each target's pose as well."""
    surroundings: bool = False
    """With hair and shoulders around it."""
    augment: AugmentConfig | None = AugmentConfig()
    """Of driving crops, and of nothing else."""


@dataclass(frozen=True)
class Sample:
    """Which frames make a sample."""

    source: int
    reference: FrameKey
    target: tuple[FrameKey, ...]
    driving: tuple[FrameKey, ...]
    """Same takes and instants as the targets."""
    moved: tuple[bool, ...]
    """Whether the warped portrait moves."""
    padding: int = 0
    """How many times the last target is repeated, because a clip is too short."""


@dataclass(frozen=True)
class Example:
    """What was read of a sample, without padding: the portrait's frame comes first, then the targets'."""

    index: int
    """The sample's."""
    frames: DecodedFrames | CachedFrames
    driving: Float[Tensor, "n 3 crop crop"]
    """Augmented face crops in [0, 1]."""
    padding: int
    warp: Float[Tensor, "n 3 size size"] | None
    visibility: Float[Tensor, "n 2 size size"] | None
    """What the portrait itself shows of `warp`, and where the head is at all."""
    counts: Float[Tensor, "n 1 size size"] | None = None
    """Where the truth counts; None everywhere."""


class _Shots:
    """A source's samples by weight: every (take, view) with as many samples as it counts for."""

    def __init__(self, takes: Sequence[Take]):
        rows: list[tuple[int, int, int]] = []
        groups: dict[str, dict[str, list[int]]] = {"portraits": {}, "targets": {}}
        for i, t in enumerate(takes):
            for v, count in enumerate(t.present.sum(0).tolist()):
                if count:
                    for kind, of in groups.items():
                        if getattr(t, kind):
                            of.setdefault(t.subject, []).append(len(rows))
                    rows.append((i, v, 1 if t.temporal else count))
        self.take, self.view, self.weight = np.array(rows, np.int64).reshape(-1, 3).T
        as_arrays = ({s: np.array(k) for s, k in of.items()} for of in groups.values())
        self.portraits, self.of_subject = as_arrays
        usable = [k for s, k in self.of_subject.items() if s in self.portraits]
        self.all = np.sort(np.concatenate(usable)) if usable else np.zeros(0, np.int64)
        self.ends = np.cumsum(self.weight[self.all])

    @property
    def samples(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def draw(self, rng: np.random.Generator, among: np.ndarray | None = None) -> tuple[int, int]:
        """Draw (take, view), every sample equally often; among some only, if they are given."""
        chosen, ends = (self.all, self.ends) if among is None else (among, np.cumsum(self.weight[among]))
        k = chosen[int(np.searchsorted(ends, rng.integers(ends[-1]), "right"))]
        return int(self.take[k]), int(self.view[k])


class Samples(Dataset):
    """Samples of several sources, by global index.

    Example:
        >>> sources = [open_footage(Path("data/nersemble")), open_footage(Path("data/train"))]  # doctest: +SKIP
        >>> example = Samples(sources, PairConfig(), ReadConfig())[0]  # doctest: +SKIP
    """

    def __init__(self, sources: Sequence[Footage], pairs: PairConfig, read: ReadConfig, seed: int = 0):
        """Mix sources.

        Raises:
            UserError: there is none, or the importance does not fit them.
        """
        self.sources, self.pairs, self.read, self.seed = list(sources), pairs, read, seed
        if not self.sources:
            raise UserError("there is nothing to train on: give at least one --data folder")
        if pairs.importance and len(pairs.importance) != len(self.sources):
            raise UserError(
                f"importance has {len(pairs.importance)} numbers for {len(self.sources)} sources: expected one each"
            )
        self._shots = [_Shots(s.takes) for s in self.sources]
        self.shares = self._shares()
        """How often each source is drawn, summing to 1."""

    def _shares(self) -> np.ndarray:
        usual = [self.pairs.multi_view_importance if kind_of(s) == "multi-view" else 1.0 for s in self.sources]
        share = np.array(self.pairs.importance or usual) * [s.samples for s in self._shots]
        share = share / share.sum()
        single = np.array([all(t.partial for t in s.takes) for s in self.sources])
        if not self.pairs.importance and single.any() and not single.all():
            of = self.pairs.photographs
            share = np.where(single, of * share / share[single].sum(), (1 - of) * share / share[~single].sum())
        least = min(self.pairs.least_share, 1 / len(share))
        # What the small ones are given, the others give up in proportion; which may make another one small.
        small = share < least
        while small.any():
            share = np.where(small, least, share / share[~small].sum() * (1 - least * small.sum()))
            fallen = small | (share < least * (1 - 1e-9))
            if (fallen == small).all():
                break
            small = fallen
        return share

    def draw(self, index: int) -> Sample:
        """Draw the frames of a global index."""
        rng = np.random.default_rng((self.seed, index))
        source = _pick_share(self.shares, rng)
        # Of its own, so that targets are the same whatever drives them.
        drivers = generator("driving", self.seed, index)
        draw = _Draw(self.sources[source], self._shots[source], self.pairs, rng, drivers)
        return draw.clip(source) if self.pairs.clips else draw.images(source)

    def __getitem__(self, index: int) -> Example:
        """Draw and read the sample with a global index."""
        s, r = self.draw(index), self.read
        footage, n = self.sources[s.source], len(s.target) - s.padding
        target, keys = s.target[:n], (s.reference, *s.target[:n])
        frames = footage.cached(keys)
        crops = footage.driving(s.driving[:n], r.crop)
        if r.augment is not None:
            crops = augment_crops(crops, r.augment, torch_generator("augment", self.seed, index))
        warp = visibility = None
        if r.warp:
            moved = np.array(s.moved[:n])
            warp, visibility = footage.warped(s.reference, target, r.size, r.surroundings, moved)
        frames = footage.frames(keys, r.size) if frames is None else frames
        counts = None
        if isinstance(footage, PhotographFootage) and visibility is not None and isinstance(frames, DecodedFrames):
            counts = told(frames.mask[1:], visibility, footage.chins(target))
        return Example(index, frames, crops, s.padding, warp, visibility, counts)

    @property
    def knows_motion(self) -> bool:
        """Whether the motion of any take is known."""
        return any(t.motion for s in self.sources for t in s.takes)

    def drivers(self, index: int, n: int) -> tuple[Float[Tensor, "n 3 crop crop"], HeadParams]:
        """Read the driving crops of samples from `index · n` on, as far as their motion is known: (crops, motion)."""
        keys: list[list[FrameKey]] = [[] for _ in self.sources]
        i, left = index * n, n
        while left:
            s, i = self.draw(i), i + 1
            known = [k for k in s.driving if self.sources[s.source].takes[k.take].motion][:left]
            keys[s.source] += known
            left -= len(known)
        there = [(footage, k) for footage, k in zip(self.sources, keys, strict=True) if k]
        crops = torch.cat([footage.driving(k, self.read.crop) for footage, k in there])
        if self.read.augment is not None:
            crops = augment_crops(crops, self.read.augment, torch_generator("drivers", self.seed, index))
        return crops, HeadParams.cat([m for footage, k in there if (m := footage.motion(k)) is not None])

    def motion(self, most: int = 6000) -> HeadParams:
        """Return the motion of every instant that is known, or of so many spread evenly over them."""
        known = [
            (source, FrameKey(i, int(t), int(take.present[t].argmax())))
            for source in self.sources
            for i, take in enumerate(source.takes)
            if take.motion
            for t in np.nonzero(take.present.any(1))[0]
        ]
        runs = groupby(known[:: -(-len(known) // most)], lambda pair: pair[0])
        told = (source.motion([key for _, key in run]) for source, run in runs)
        return HeadParams.cat([m for m in told if m is not None])


def torch_generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """Return a generator for one purpose of one sample: nothing else shares its stream."""
    return torch.Generator().manual_seed(int(generator(purpose, seed, index).integers(1 << 63)))


def _pick_share(shares: np.ndarray, rng: np.random.Generator) -> int:
    return int(np.searchsorted(np.cumsum(shares), rng.random(), "right").clip(0, len(shares) - 1))


def _pick(items: Sequence[int] | np.ndarray, rng: np.random.Generator) -> int:
    return int(items[int(rng.integers(len(items)))])


@dataclass(frozen=True)
class _Draw:
    """One sample of one source."""

    footage: Footage
    shots: _Shots
    config: PairConfig
    rng: np.random.Generator
    drivers: np.random.Generator

    def images(self, source: int) -> Sample:
        """Draw targets of one person, whatever the take, instant and view, and a driver for each."""
        take, view = self.shots.draw(self.rng)
        target = [FrameKey(take, self._instant(take, view), view)]
        reference = self._reference(target)
        person = self.shots.of_subject[self.footage.takes[take].subject]
        target += [self._other(reference, person, target[0]) for _ in range(self.config.targets - 1)]
        driving = []
        for k in target:
            present = self.footage.takes[k.take].present[k.instant]
            driving.append(k._replace(view=self._driver(k, lambda v, present=present: int(present[v]))))
        driving = self._by_strangers(driving)
        moved = self.rng.random(len(target)) < self.config.moved
        moved = [bool(m) and self.footage.takes[k.take].motion for m, k in zip(moved, target, strict=True)]
        return Sample(source, reference, tuple(target), driving, tuple(moved))

    def clip(self, source: int) -> Sample:
        """Draw consecutive frames of one view and of the view that drives them; what is missing is padding."""
        i, view = self.shots.draw(self.rng)
        take, c = self.footage.takes[i], self.config
        here = take.present[:, view]
        stride = max(1, round(take.fps / c.fps))
        reach = stride * (c.targets - 1) + 1
        # Other cameras may have holes of their own: what counts is how much of a clip both can give.
        driver = self._driver(FrameKey(i, 0, view), lambda v: min(int((take.present[:, v] & here).sum()), reach))
        both = np.nonzero(here & take.present[:, driver])[0]
        if take.temporal:
            start = int(self.rng.integers(max(1, len(both) - reach + 1)))
            chosen = both[start : start + reach]
        else:
            chosen = both[[int(self.rng.integers(len(both)))]]
        step = np.diff(take.timesteps).min(initial=np.iinfo(np.int64).max)
        gaps = np.nonzero(np.diff(take.timesteps[chosen]) > step)[0]
        chosen = (chosen[: gaps[0] + 1] if len(gaps) else chosen)[::stride]
        padding = c.targets - len(chosen)
        instants = [*chosen.tolist(), *([int(chosen[-1])] * padding)]
        target, driving = (tuple(FrameKey(i, t, v) for t in instants) for v in (view, driver))
        driving = self._by_strangers(driving)
        moved = take.motion and bool(self.rng.random() < c.moved)
        return Sample(source, self._reference(target), target, driving, (moved,) * c.targets, padding)

    def _instant(self, take: int, view: int) -> int:
        return _pick(np.nonzero(self.footage.takes[take].present[:, view])[0], self.rng)

    def _other(self, reference: FrameKey, person: np.ndarray, first: FrameKey) -> FrameKey:
        """Draw a further target, of another instant than the reference's if the first target is."""
        free = first[:2] == reference[:2]
        for _ in range(TRIES):
            take, view = self.shots.draw(self.rng, person)
            there = np.nonzero(self.footage.takes[take].present[:, view])[0]
            there = there if free or take != reference.take else there[there != reference.instant]
            if len(there):
                return FrameKey(take, _pick(there, self.rng), view)
        return first

    def _driver(self, key: FrameKey, overlap: Callable[[int], int]) -> int:
        """Draw another view that shows the face and overlaps with the target most; the target's own if none does."""
        if not self.config.cross_view:
            return key.view
        counts = {v: overlap(v) for v in self.footage.driving_views(key.take) if v != key.view}
        best = max(counts.values(), default=0)
        return _pick([v for v, n in counts.items() if n == best], self.drivers) if best else key.view

    def _by_strangers(self, driving: Sequence[FrameKey]) -> tuple[FrameKey, ...]:
        """Let somebody else drive the sample, by chance, as far as there is one."""
        if not self.config.strangers or self.drivers.random() >= self.config.strangers:
            return tuple(driving)
        takes = self.footage.takes
        return tuple(k._replace(view=STRANGER) if takes[k.take].strangers else k for k in driving)

    def _reference(self, target: Sequence[FrameKey]) -> FrameKey:
        """Draw the portrait: another time of the person, else another view of a target's time, else the target."""
        taken = {k[:2] for k in target}
        person = self.shots.portraits[self.footage.takes[target[0].take].subject]
        for _ in range(TRIES):
            take, _ = self.shots.draw(self.rng, person)
            views = self.footage.reference_views(take)
            view = views[0] if self.rng.random() < self.config.frontal_reference else _pick(views, self.rng)
            there = np.nonzero(self.footage.takes[take].present[:, view])[0]
            free = [i for i in there.tolist() if (take, i) not in taken]
            if free:
                return FrameKey(take, _pick(free, self.rng), view)
        key = target[0]
        present = self.footage.takes[key.take].present[key.instant]
        others = [v for v in self.footage.reference_views(key.take) if v != key.view and present[v]]
        return key._replace(view=_pick(others, self.rng)) if others else key
