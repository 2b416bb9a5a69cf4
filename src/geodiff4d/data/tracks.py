"""A store of tracks: consecutive frames of people who speak, blink, emote and turn, for stage 2 (Sec. 4.1).

The arrays are a training store's (`data/store.py`), and what reads those reads these: instants 0 … frames − 1 are a
track before cameras that stand still, the instants after them are portraits of the same person at other times. Only
portraits carry textures; where nothing is written the files take no room on disk.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_json, write_json
from geodiff4d.data.pairs import PairConfig, Pairs
from geodiff4d.data.store import Store, StoreConfig, build_store, draw_cameras, one_of, random_motion, render_instant
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import openhead, world_region
from geodiff4d.world.expressions import TRACK_KINDS, expression_track, head_track
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import SyntheticSubject
from geodiff4d.world.tracker_error import MEMORY, disturbed

LEAD_FRAMES, LONG_FRAMES = 12, 120
"""A track is cut out of a longer one, which starts near neutral."""
STILL, TURNING = 0.35, 0.3
"""Shares of people whose heads are held still, as avatars' clips have them (S-A.1), and who turn them far."""


@dataclass(frozen=True)
class TrackConfig:
    """How many tracks are rendered, and how long."""

    subjects: int = 96
    frames: int = 24
    """Consecutive frames of a person."""
    portraits: int = 2
    """Further instants of the person, to start from."""
    views: int = 2
    fps: float = 24.0

    def store(self, like: StoreConfig) -> StoreConfig:
        """Return the store that holds the tracks: the sizes, split and seed of `like`, portraits from the front."""
        instants = self.frames + self.portraits
        return replace(like, subjects=self.subjects, instants=instants, views=self.views, reference_views=1)


class TrackStore(Store):
    """A store whose first instants follow each other.

    Raises:
        UserError: there is none, or it holds pictures without time.
    """

    def __init__(self, folder: Path, writable: bool = False):
        super().__init__(folder, writable)
        if not (self.folder / "track.json").exists():
            raise UserError(f"{folder} holds single pictures: expected tracks, which `geodiff4d train video` renders")
        self.tracks = TrackConfig(**read_json(self.folder / "track.json"))


def build_tracks(
    folder: Path, config: TrackConfig, like: StoreConfig, workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrackStore:  # fmt: skip
    """Render tracks in the sizes of another store, or finish what was interrupted.

    Raises:
        UserError: the folder holds something else.
    """
    folder = Path(folder)
    note = folder / "track.json"
    if note.exists() and read_json(note) != asdict(config):
        raise UserError(f"{folder} holds tracks of another configuration: name another folder or remove it")
    if (folder / "store.json").exists() and not note.exists():
        raise UserError(f"{folder} holds single pictures: name another folder for tracks")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, config)
    build_store(folder, config.store(like), workers, progress, render_track)
    return TrackStore(folder)


def track_motion(split: Split, subject: int, seed: int, config: TrackConfig) -> HeadParams:
    """Return a person's motion over the track (shape left at zero): a piece from the middle of a longer one."""
    rng = generator("tracks", split, subject, seed)
    kind = TRACK_KINDS[int(rng.integers(len(TRACK_KINDS)))]
    long, draw = LEAD_FRAMES + config.frames + LONG_FRAMES, int(rng.integers(1 << 31))
    expr, jaw, eyes = expression_track(kind, long, draw, config.fps)
    how = rng.random()
    rotation = head_track("turns" if how > 1 - TURNING else kind, long, draw, config.fps) * float(how > STILL)
    first = LEAD_FRAMES + int(rng.integers(LONG_FRAMES))
    zero = openhead().neutral(long)
    whole = HeadParams(zero.shape, expr, rotation, zero.neck_pose, jaw, eyes, zero.translation)
    return whole[first : first + config.frames]


def _read_over_time(tracked: HeadParams, motion: HeadParams, seed: int) -> HeadParams:
    """Give tracked heads the motion that a readout of expression latents would: its error drifts, and jitters a bit."""
    rng = generator("readout", "track", seed)

    def noisy(x: Tensor, sigma: float) -> Tensor:
        drift = np.empty(tuple(x.shape))
        shocks = rng.normal(size=drift.shape)
        for t in range(len(drift)):
            drift[t] = shocks[t] if t == 0 else MEMORY * drift[t - 1] + (1 - MEMORY**2) ** 0.5 * shocks[t]
        error = sigma * (drift + 0.4 * rng.normal(size=drift.shape))
        return x * rng.uniform(0.7, 1.0) + torch.from_numpy(error).to(x)

    expr = noisy(motion.expr, 0.04).clamp(0, 1)
    return replace(tracked.without_expression(), expr=expr, jaw_pose=noisy(motion.jaw_pose, np.deg2rad(0.7)))


def render_track(folder: Path, s: int) -> None:
    """Render one person's track and portraits into the rows of a store."""
    torch.set_num_threads(1)
    store = TrackStore(folder, writable=True)
    c, n = store.config, store.tracks.frames
    who = c.seed * 100_000 + s
    subject = SyntheticSubject(who, c.split)
    track = track_motion(c.split, s, c.seed, store.tracks)
    portraits = random_motion(c.split, s, store.tracks.portraits, c.seed + 1)
    m = HeadParams.stack([*(track[i] for i in range(n)), *(portraits[i] for i in range(store.tracks.portraits))])
    truth = subject.params(m.expr, m.rotation, m.neck_pose, m.jaw_pose, m.eyes_pose, m.translation)
    # A tracker's error drifts along the track, and is drawn anew for every portrait.
    alone = [disturbed(truth[i : i + 1], seed=who * 1000 + i)[0] for i in range(n, c.instants)]
    drifting = disturbed(truth[:n], seed=who)
    if not track.rotation.any():  # A head that is held still is posed by us, not found by a tracker.
        first = {k: getattr(drifting, k)[:1].expand(n, -1) for k in ("rotation", "translation")}
        drifting = replace(drifting, **first)
    tracked = HeadParams.stack([*(drifting[i] for i in range(n)), *alone])
    head = openhead()
    posed, still = head.pose(tracked), head.pose(tracked.without_expression())
    moved = head.pose(_read_over_time(tracked, m, who)).vertices
    store.expr[s], store.joints[s] = m.expr.numpy(), torch.cat([m.jaw_pose, m.eyes_pose.flatten(1)], 1).numpy()
    standing = canonical_crop(draw_cameras(c, who * 100), still.vertices[:n][:, world_region()].flatten(0, 1))
    bare = TrackStore(folder, writable=True)
    bare.config = replace(c, reference_views=0)  # Frames of a track carry no texture.
    for i in range(c.instants):
        rows, cameras = (bare, standing) if i < n else (store, _portrait_cameras(c, who * 100 + i, still.vertices[i]))
        render_instant(rows, s, i, subject, truth[i], one_of(posed, i), one_of(still, i), moved[i], cameras)
    store.done[s] = 1


def _portrait_cameras(config: StoreConfig, seed: int, still: Tensor) -> Camera:
    return canonical_crop(draw_cameras(config, seed), still[world_region()])


def draw_clips(
    store: tuple[int, int, int], portraits: int, config: PairConfig, seed: int, index: int
) -> tuple[Pairs, Bool[Tensor, "b t"]]:
    """Draw a batch of clips by its global index: consecutive frames of one view, all driven by one other view.

    `config.targets` is the clip's length; a track that is shorter is padded by its last frame. Returns the indices
    and which frames are not padding.

    Args:
        store: subjects, instants and views; the last `portraits` instants are what the reference is drawn from.

    Raises:
        ValueError: cross-view pairing needs at least two views.
    """
    subjects, instants, views = store
    if config.cross_view and views < 2:
        raise ValueError(
            f"cross-view pairing needs two views of a track, got {views}: render more or ablate cross-view"
        )
    rng = np.random.default_rng((seed, index))
    b, t, frames = config.references, config.targets, instants - portraits
    length = min(t, frames)
    subject = rng.choice(subjects, b, replace=b > subjects)
    reference = np.stack([rng.integers(frames, instants, b), np.zeros(b, np.int64)], -1)
    view, first = rng.integers(0, views, b), rng.integers(0, frames - length + 1, b)
    other = (view + rng.integers(1, views, b)) % views if config.cross_view else view
    instant = first[:, None] + np.minimum(np.arange(t), length - 1)
    moved = rng.random(b) < config.moved

    def each(x: np.ndarray) -> np.ndarray:
        return np.repeat(x[:, None], t, 1)

    target = np.stack([instant, each(view)], -1)
    valid = (torch.arange(t) < length).expand(b, t)
    return Pairs(subject, reference, target, each(other), each(moved)), valid
