"""Encode frames once, for all the steps that would encode them anew: clips into shards (`data.shards`), and stores.

A shard is the unit of work: it is written whole by one process, or not at all, so an interrupted call goes on with the
next one. Which recordings lie in which shard depends on the clips alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geodiff4d.core import workers as processes
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, read_config, read_object, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.progress import Progress, advancing, silent
from geodiff4d.core.rundir import lock_folder
from geodiff4d.core.workers import in_workers
from geodiff4d.data.footage.clips import ClipFootage, clip_head
from geodiff4d.data.footage.encoded import packed, packed_width
from geodiff4d.data.footage.rendered import RenderedFootage
from geodiff4d.data.footage.take import FrameKey, on_grid
from geodiff4d.data.rowstore import as_bytes, create_array
from geodiff4d.data.shards import INDEX, NOTE, Index, RecordConfig, shard_name
from geodiff4d.heads.rig import HeadParams
from geodiff4d.video.batches import encode_planes
from geodiff4d.video.model import VideoModelConfig
from geodiff4d.video.vae import Codec, StableCodec, load_codec

CHUNK, KEPT_EVERY = 32, 64
"""Frames that are decoded and encoded at once, and chunks of a store between notes of how far it got."""
PROBED = 64
"""Numbers by which a codec is known again."""
PROBE_TOLERANCE = 0.05
"""Of the largest of them: bf16 and another machine's kernels stay below, other codecs do not."""


@dataclass(frozen=True)
class Recording:
    """The frames of one take from one view."""

    source: int
    take: int
    """Its number in the source."""
    view: int
    frames: int


def encode_clips(
    sources: Sequence[ClipFootage], out: Path, codec_folder: Path, like: VideoModelConfig, device: str = "cpu",
    workers: int = 1, shard_bytes: int = 256_000_000, progress: Progress = silent,
) -> int:  # fmt: skip
    """Encode clips for a model into the shards of a folder; return how many shards were written now.

    Args:
        codec_folder: the model's codec; Stable Diffusion's computes in bf16 on CUDA.
        like: the model's sizes, and whether it looks at a warped portrait.
        device: "cpu" or "cuda"; processes take GPUs in turn.

    Raises:
        UserError: the folder holds a store of other clips, or for another model.
    """
    recordings = [
        Recording(s, t, v, int(n))
        for s, source in enumerate(sources)
        for t, take in enumerate(source.takes)
        for v, n in enumerate(take.present.sum(0))
    ]
    config = record_config(sources, load_codec(codec_folder), like)
    shards = shared_out(recordings, shard_bytes // config.record().itemsize)
    config = replace(config, made_of=fingerprint([[vars(t) for t in s.takes] for s in sources], shards))
    _begin(out, config)
    todo = [k for k in range(len(shards)) if not (out / f"{shard_name(k)}.npy").exists()]
    jobs = ((out, k, config, _needed(sources, shards[k]), codec_folder, device) for k in todo)
    with advancing(progress, f"encoding {out.name}", sum(r.frames for k in todo for r in shards[k])) as advance:
        for frames in in_workers(write_shard, jobs, min(workers, len(todo))):
            advance(frames)
    if not (out / INDEX).exists():
        _index(sources, out, config, shards).save(out)
    return len(todo)


def record_config(sources: Sequence[ClipFootage], codec: Codec, like: VideoModelConfig) -> RecordConfig:
    """Return what the records of some clips hold for a model."""
    heads = {s.head_name(t): (s, t) for s in reversed(sources) for t in reversed(range(len(s.takes)))}
    encoded_pose, params, offsets = like.pose == "codec", 0, 0
    if like.warp:
        for name, (source, take) in heads.items():
            head = clip_head(name, source.head_path)
            params = max(params, packed_width(head))
            if source.params(take, [0]).static_offset is not None:
                offsets = max(offsets, len(head.template))
    return RecordConfig(
        like.size, like.expression.size, like.size // codec.factor,
        3 * codec.channels if encoded_pose else 2 * codec.channels + 3, encoded_pose, codec_probe(codec), like.warp,
        any(s.estimated for s in sources), tuple(sorted(heads)), params, offsets,
    )  # fmt: skip


def codec_probe(codec: Codec) -> tuple[float, ...]:
    """Return what a codec makes of an image that is always the same."""
    return tuple(round(x, 5) for x in _probe(codec).flatten()[:PROBED].tolist())


@torch.no_grad()
def _probe(codec: Codec) -> Tensor:
    side = 8 * codec.factor
    return codec.encode(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(_home(codec)))


def _home(codec: Codec) -> torch.device:
    return next(chain(codec.parameters(), codec.buffers())).device


def fits(config: RecordConfig, codec: Codec, like: VideoModelConfig) -> str | None:
    """Say in which respect a store was not encoded for a model; None if it was."""
    probe, known = (np.array(x) for x in (codec_probe(codec), config.codec))
    if probe.shape != known.shape or np.abs(probe - known).max() > PROBE_TOLERANCE * np.abs(probe).max():
        return "with another codec"
    if (config.size, config.crop) != (like.size, like.expression.size):
        sizes = f"{config.size} and {config.crop}"
        return f"in images and crops of {sizes} px, and not {like.size} and {like.expression.size}"
    if config.encoded_pose != (like.pose == "codec"):
        return "with pose maps " + ("through the codec" if config.encoded_pose else "resized")
    return "without images to warp" if like.warp and not config.portraits else None


def shared_out(recordings: Sequence[Recording], most: int) -> list[list[Recording]]:
    """Share recordings out to shards of at most so many frames each; a longer recording has a shard of its own."""
    shards: list[list[Recording]] = []
    frames = most
    for r in recordings:
        if frames + r.frames > most and (r.frames or not shards):
            shards.append([])
            frames = 0
        shards[-1].append(r)
        frames += r.frames
    return shards


def _begin(out: Path, config: RecordConfig) -> None:
    note = out / NOTE
    if note.exists():
        if read_config(note, RecordConfig) != config:
            raise UserError(f"{out} holds other clips, or for another model: name another folder or remove it")
        lock_folder(out.resolve())
        for left in out.glob(".shard-*.part"):  # By a process that was killed.
            left.unlink()
        return
    if out.is_dir() and any(not p.name.startswith(".") and p.name != "val" for p in out.iterdir()):
        raise UserError(f"{out} holds other files: give --out a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out.resolve())
    write_json(note, config)


def _needed(sources: Sequence[ClipFootage], shard: Sequence[Recording]) -> list[tuple[ClipFootage, list[Recording]]]:
    """Return what a process needs to write a shard."""
    runs = ((s, list(run)) for s, run in groupby(shard, lambda r: r.source))
    return [(sources[s].part(r.take for r in run), run) for s, run in runs]


def write_shard(
    out: Path, k: int, config: RecordConfig, needed: list[tuple[ClipFootage, list[Recording]]], codec_folder: Path,
    device: str,
) -> int:  # fmt: skip
    """Encode the recordings of a shard and write it; return how many frames it has."""
    codec = _codec(codec_folder, device)
    parts = [records(source, r, config, codec) for source, run in needed for r in run if r.frames]
    whole = np.concatenate(list(chain.from_iterable(parts))) if parts else np.zeros(0, config.record())
    with fresh_file(out / f"{shard_name(k)}.npy") as file, file.open("wb") as stream:
        np.save(stream, whole)
    return len(whole)


@cache
def _codec(folder: Path, device: str) -> Codec:
    codec = load_codec(folder)
    if device == "cuda":
        codec.to(torch.device("cuda", processes.number % torch.cuda.device_count()))
        if isinstance(codec, StableCodec):
            codec.to(torch.bfloat16)
    return codec


@torch.no_grad()
def records(source: ClipFootage, r: Recording, config: RecordConfig, codec: Codec) -> Iterator[np.ndarray]:
    """Yield the records of a recording, some frames at a time."""
    here = np.nonzero(source.takes[r.take].present[:, r.view])[0].tolist()
    places = [list(views(r.take)) for views in (source.reference_views, source.driving_views)]
    for i in range(0, len(here), CHUNK):
        instants = here[i : i + CHUNK]
        keys = [FrameKey(r.take, t, r.view) for t in instants]
        f, out = source.frames(keys, config.size), np.zeros(len(keys), config.record())
        images = (x.to(_home(codec)) for x in (f.rgb, f.normal, f.pose))
        out["planes"] = encode_planes(codec, *images, encoded_pose=config.encoded_pose).half().cpu().numpy()
        cover, focus = on_grid(f.mask, f.focus, config.grid)
        out["cover"], out["focus"], out["has_normal"] = as_bytes(cover), as_bytes(focus), f.has_normal.numpy()
        out["crop"] = as_bytes(source.driving(keys, config.crop))
        if (motion := source.motion(keys)) is not None:
            out["motion"] = torch.cat([motion.expr, motion.jaw_pose, motion.eyes_pose], 1).numpy()
        for name, views in zip(("portrait", "driver"), places, strict=True):
            out[name] = views.index(r.view) if r.view in views else -1
        if config.portraits:
            out["image"] = as_bytes(torch.cat([f.rgb, f.mask], 1))
            params, moved, cameras = source.poses(r.take, r.view, instants, config.size)
            out["K"], out["T_cam_world"] = cameras.K.numpy(), cameras.T_cam_world.numpy()
            head = clip_head(source.head_name(r.take), source.head_path)
            out["params"], out["moved"] = (packed(p, head, config.params) for p in (params, moved))
            if config.offsets:
                out["offset"] = _offset(params, config.offsets)
        yield out


def _offset(params: HeadParams, verts: int) -> np.ndarray | float:
    if params.static_offset is None:
        return np.nan
    return torch.nn.functional.pad(params.static_offset, (0, 0, 0, verts - params.static_offset.shape[-2])).numpy()


def _index(sources: Sequence[ClipFootage], out: Path, config: RecordConfig, shards: list[list[Recording]]) -> Index:
    """Say where everything lies; what views can do is read from their first records."""
    shard, row, portrait, driver = [], [], [], []
    for k, recordings in enumerate(shards):
        records, at = np.load(out / f"{shard_name(k)}.npy", mmap_mode="r"), 0
        for r in recordings:
            shard.append(k)
            row.append(at)
            portrait.append(int(records["portrait"][at]) if r.frames else -1)
            driver.append(int(records["driver"][at]) if r.frames else -1)
            at += r.frames
    takes = [t for s in sources for t in s.takes]
    names = [s.head_name(t) for s in sources for t in range(len(s.takes))]
    first = np.concatenate([[0], np.cumsum([t.present.shape[1] for t in takes])])
    head = np.array([config.heads.index(name) for name in names], np.int64)
    return Index(takes, first, head, *(np.array(x, np.int64) for x in (shard, row, portrait, driver)))


@torch.no_grad()
def encode_store(
    footage: RenderedFootage, codec: Codec, path: Path, encoded_pose: bool = True, chunk: int = CHUNK
) -> bool:
    """Encode a store's frames once, `[subjects, instants, views, p, h, w]` fp16 at `path`, for `footage.cached`.

    A finished file of the same store and codec is taken as it is; one that was cut off goes on. CUDA encodes where
    there is CUDA. Returns whether the store fits the codec's grid; one that does not is encoded as it comes.
    """
    store, config = footage.store, footage.store.config
    side = config.size // codec.factor
    if side != config.grid:
        return False
    built = (store.folder / store.NOTE).stat().st_mtime_ns if hasattr(store, "folder") else 0
    made_of = fingerprint(config, built, _probe(codec).half(), encoded_pose, footage.estimated)
    note, frames = path.with_suffix(".json"), math.prod(config.shape)
    known = read_object(note) if path.exists() and note.exists() else {}
    done = known.get("encoded", 0) if known.get("made_of") == made_of else 0
    footage.cache = path
    if not done:
        note.unlink(missing_ok=True)
        planes = 3 * codec.channels if encoded_pose else 2 * codec.channels + 3
        create_array(path, (*config.shape, planes, side, side), np.float16)
    if done == frames:
        return True
    out = np.lib.format.open_memmap(path, "r+")
    flat, home = out.reshape(-1, *out.shape[3:]), _home(codec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec.to(device)
    for i in range(done, frames, chunk):
        end = min(i + chunk, frames)
        subject, instant, view = np.unravel_index(np.arange(i, end), config.shape)
        f = footage.frames_at((subject, instant, view), config.size)
        images = (x.to(device) for x in (f.rgb, f.normal, f.pose))
        flat[i:end] = encode_planes(codec, *images, encoded_pose=encoded_pose).half().cpu().numpy()
        if (i // chunk + 1) % KEPT_EVERY == 0 or end == frames:
            out.flush()
            write_json(note, {"made_of": made_of, "encoded": end})
    codec.to(home)
    return True
