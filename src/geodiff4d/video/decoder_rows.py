"""Training rows of the guided decoder: frames that the video model made, the warped portrait, and the truth.

Rendered people give exact truth in colours, normals and mask. Photographs give real skin, hair, ears and teeth:

- *warp-back*: the photograph is carried to a turned view by its tracked head and kept only where it is seen there;
  that is taken for the portrait, and the photograph is the truth for what was hidden;
- its own view, which shows that what is known is to be kept;
- *twins*: where one person has two photographs, one is the portrait and the other, with its expression, the truth.

Rows lie in memory-mapped arrays (`data.rowstore`), so that an interrupted build goes on.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_config
from geodiff4d.core.images import composite, encode_normals
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip
from geodiff4d.data.footage.photographs import chin_heights, told
from geodiff4d.data.rowstore import Arrays, as_bytes, create_rows, fill_rows, open_rows, take
from geodiff4d.data.world_clips import random_motion
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import openhead, world_region
from geodiff4d.video.conditions import lifted, warped_frames
from geodiff4d.video.frames import WarpedFrames
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest, Sampled
from geodiff4d.video.inputs import Driving, Portrait, driving_crop, load_portrait
from geodiff4d.video.model import VideoModel, load_video_model
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.warp_back import seen_turned
from geodiff4d.world.cameras import portrait_and_other_cameras
from geodiff4d.world.seeds import Split
from geodiff4d.world.subject import SyntheticSubject
from geodiff4d.world.tracker_error import disturbed, moved_as_tracked

Source = Literal["photographs", "world"]
SAMPLED = SampleConfig(steps=1, guidance=1.0, still_noise=True)
"""How the frames are sampled that are to be finished: as the shipped model is."""


@dataclass(frozen=True)
class DecoderRowsConfig:
    """What rows are made of."""

    source: Source = "world"
    model: str = ""
    """Folder of the video model whose frames are to be finished."""
    clips: tuple[str, ...] = ()
    """Tracked photographs, for `photographs`."""
    people: int = 0
    """For `world`."""
    split: Split = "train"
    rows: int = 5
    """Of each photograph or person."""
    size: int = 512
    low: int = 256
    """Side of what the model decodes."""
    turns_deg: tuple[float, float] = (10.0, 60.0)
    """Least and largest turn of a warp-back, to either side."""
    tilt_deg: float = 12.0
    """Largest turn up or down."""
    near_deg: float = 10.0
    """Largest turn of the one row of a photograph that is nearly its own view."""
    seed: int = 0

    @property
    def units(self) -> int:
        """Number of photographs or people."""
        return len(self.clips) if self.source == "photographs" else self.people

    def arrays(self) -> Arrays:
        """Return shape and type of every array, by name."""
        n, s, low = (self.units, self.rows), (self.size, self.size), (self.low, self.low)
        return {
            "rgb": ((*n, 3, *low), "u1"), "normals": ((*n, 3, *low), "u1"), "pose": ((*n, 3, *low), "u1"),
            "warp": ((*n, 3, *s), "u1"), "known": ((*n, 3, *s), "u1"),
            "truth": ((*n, 3, *s), "u1"), "mask": ((*n, 1, *s), "u1"), "truth_normals": ((*n, 3, *low), "u1"),
            "counts": ((*n, 1, *s), "u1"), "filled": (n, "u1"), "done": ((n[0],), "u1"),
        }  # fmt: skip


def build_decoder_rows(
    folder: Path, config: DecoderRowsConfig, workers: int = 2, progress: Progress = silent
) -> "DecoderRows":
    """Make rows, or finish what was interrupted.

    Raises:
        UserError: the folder holds rows of another configuration.
    """
    create_rows(Path(folder) / "rows.json", config, config.arrays(), {})
    fill_rows(Path(folder), fill_unit, workers, progress)
    return DecoderRows(folder)


@dataclass(frozen=True)
class DecoderBatch:
    """Rows as images in [0, 1]."""

    rgb: Float[Tensor, "n 3 low low"]
    normals: Float[Tensor, "n 3 low low"]
    warped: WarpedFrames
    truth: Float[Tensor, "n 3 size size"]
    """The whole picture, background too where it is a photograph."""
    mask: Float[Tensor, "n 1 size size"]
    truth_normals: Float[Tensor, "n 3 low low"]
    counts: Float[Tensor, "n 1 size size"]
    """1 where the truth counts, 0 where a photograph shows what its portrait cannot tell of (`told`)."""
    exact: Float[Tensor, "n 1 1 1"]
    """1 where the truth's normals and mask are exact (rendered), else 0."""


class DecoderRows:
    """Rows on disk."""

    def __init__(self, folder: Path):
        """Open what `build_decoder_rows` made; rows that are not there yet are not drawn."""
        self.folder = Path(folder)
        if not (self.folder / "rows.json").exists():
            raise UserError(
                f"{folder} has no rows for a decoder: expected rows.json; `geodiff4d train decoder` makes them"
            )
        config = read_config(self.folder / "rows.json", DecoderRowsConfig)
        self.exact = config.source == "world"
        names = [name for name in config.arrays() if name != "done"]
        self._arrays = open_rows(self.folder, names, arrays=config.arrays())

    @property
    def index(self) -> np.ndarray:
        """[rows, 2]: unit and row of everything that is there."""
        return np.argwhere(np.array(self._arrays["filled"]) > 0)

    def read(self, rows: np.ndarray) -> DecoderBatch:
        """Read rows of `index`."""
        at = tuple(self.index[rows].T)
        a = {k: take(v, at, 255.0) for k, v in self._arrays.items() if k != "filled"}
        known = a["known"]
        warped = WarpedFrames(a["warp"], known[:, :1], known[:, 1:2], known[:, 2:], a["pose"])
        exact = torch.full((len(rows), 1, 1, 1), float(self.exact))
        return DecoderBatch(
            a["rgb"], a["normals"], warped, a["truth"], a["mask"], a["truth_normals"], a["counts"], exact
        )


def fill_unit(folder: Path, s: int) -> None:
    """Make the rows of one photograph or person."""
    torch.set_num_threads(1)
    config = read_config(folder / "rows.json", DecoderRowsConfig)
    arrays = open_rows(folder, config.arrays(), writable=True)
    with torch.no_grad():
        rows = photograph_rows(config, s) if config.source == "photographs" else world_rows(config, s)
    for k, row in enumerate(rows):
        for name, value in row.items():
            arrays[name][s, k] = as_bytes(value)
        arrays["filled"][s, k] = 1


@lru_cache(maxsize=1)
def _model(folder: str) -> VideoModel:
    return load_video_model(Path(folder))


def _row(
    config: DecoderRowsConfig, frames: Sampled, truth: Float[Tensor, "t 3 size size"],
    mask: Float[Tensor, "t 1 size size"], normals: Float[Tensor, "t 3 size size"] | None = None,
    chins: Float[Tensor, " t"] | None = None,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Return rows of sampled frames and their truth, which counts everywhere but in photographs (`chins`)."""
    model = _model(config.model)
    images = rearrange(model.decode_latents(frames.latents), "1 d c t h w -> d t c h w")
    warped = warped_frames(frames.targets.images())
    low = (config.low, config.low)
    exact = torch.full_like(truth, 0.5) if normals is None else normals
    small = {"pose": warped.pose, "truth_normals": exact}
    small = {k: interpolate(x, low, mode="bilinear", antialias=True, align_corners=False) for k, x in small.items()}
    known = torch.cat([warped.seen, warped.inside, warped.opened], 1)
    visibility = torch.cat([warped.seen, warped.inside], 1)
    counts = torch.ones_like(mask) if chins is None else told(mask, visibility, chins)
    whole = {
        "counts": counts, "rgb": images[0], "normals": images[1], "warp": warped.rgb, "known": known, "truth": truth,
        "mask": mask, **small,
    }  # fmt: skip
    return [{k: v[i] for k, v in whole.items()} for i in range(len(truth))]


def photograph_rows(config: DecoderRowsConfig, s: int) -> list[dict[str, Tensor]]:
    """Make a photograph's rows: its own view, warp-backs, and its twin where there is one."""
    head, model = openhead(), _model(config.model)
    generator = DiffusionGenerator(model, SAMPLED)
    portrait = load_portrait(Clip(Path(config.clips[s])), config.size)
    rng = random.Random(config.seed * 100_000 + s)
    portraits, texture = [portrait], lifted(head, portrait, True)
    twin = twin_of(config.clips, s)
    for k in range(1, config.rows - (twin is not None)):
        low, high = (0.0, config.near_deg) if k == 1 else config.turns_deg
        yaw = rng.choice((-1, 1)) * rng.uniform(low, high)
        portraits.append(seen_turned(head, portrait, texture, yaw, rng.uniform(-config.tilt_deg, config.tilt_deg)))
    truths = [portrait] * len(portraits)
    if twin is not None:
        portraits.append(load_portrait(Clip(Path(twin)), config.size))
        truths.append(portrait)
    rows: list[dict[str, Tensor]] = []
    for given, truth in zip(portraits, truths, strict=True):
        params = HeadParams.stack([truth.params])
        crop = driving_crop(truth.on_grey, head, truth.params, truth.camera, model.config.expression.size)
        request = GenerationRequest(given, Driving(params, crop[None]), head)
        frames = generator.sampled(request, Camera.stack([truth.camera]))
        sized = at_size(frames, request, model, truth.camera)
        chins = chin_heights(head, params, Camera.stack([truth.camera]))
        rows += _row(config, sized, truth.image[None], truth.mask[None], chins=chins)
    return rows


def at_size(frames: Sampled, request: GenerationRequest, model: VideoModel, *cameras: Camera) -> Sampled:
    """Let sampled frames be warped at their cameras' size, whether or not the model has a decoder for it."""
    texture = lifted(request.head, request.portrait, model.config.surroundings)
    targets = replace(frames.targets, portrait=texture, cameras=Camera.stack(list(cameras)))
    return replace(frames, targets=targets, portrait=request.portrait)


def twin_of(clips: Sequence[str], s: int) -> str | None:
    """Return another photograph of the same person, whose clip is named `ID_…` beside it."""
    path = Path(clips[s])
    who = path.name.split("_")[0]
    others = [c for c in clips if c != clips[s] and Path(c).parent == path.parent and Path(c).name.split("_")[0] == who]
    return others[0] if who != path.name and others else None


def world_rows(config: DecoderRowsConfig, s: int) -> list[dict[str, Tensor]]:
    """Make a rendered person's rows: the portrait's own view, then others at other expressions."""
    head, model = openhead(), _model(config.model)
    who = config.seed * 100_000 + s
    subject = SyntheticSubject(who, config.split)
    n = config.rows
    m = random_motion(config.split, s, n, config.seed + 7)
    truth = subject.params(m.expr, m.rotation, m.neck_pose, m.jaw_pose, m.eyes_pose, m.translation)
    tracked = HeadParams.stack([disturbed(truth[i : i + 1], seed=who * 1000 + i)[0] for i in range(n)])
    moved = moved_as_tracked(tracked, m, who)
    still = head.pose(tracked.without_expression()).vertices
    cameras = [
        canonical_crop(
            portrait_and_other_cameras(2, who * 100 + i, config.size)[min(i, 1)], still[i][world_region()], config.size
        )
        for i in range(n)
    ]  # fmt: skip
    stacked = Camera.stack(cameras)
    frames = subject.render(truth, stacked, 2)
    rgb = composite(frames.rgb, frames.mask)
    portrait = Portrait(rgb[0], frames.mask[0], cameras[0], tracked[0])
    params = replace(moved, shape=tracked[:1].shape.expand_as(moved.shape))
    side = model.config.expression.size
    crops = torch.stack([driving_crop(rgb[i], head, tracked[i], cameras[i], side) for i in range(n)])
    request = GenerationRequest(portrait, Driving(params, crops, temporal=False), head)
    made = DiffusionGenerator(model, SAMPLED).sampled(request, stacked)
    normals = encode_normals(frames.normal, frames.mask)
    return _row(config, at_size(made, request, model, *cameras), frames.rgb, frames.mask, normals)
