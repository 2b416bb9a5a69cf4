"""Encode clips once, into shards that training reads: latents, pose maps, driving crops, masks and head parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from geodiff4d.cli._device import DeviceName


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d encode`."""

    src: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with clips anywhere below them (from import, track or synth). Clips in a folder `val` become OUT/val, and
    are validated on."""
    out: Path
    """Folder to write the store to. The same command goes on where it was interrupted."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    """Sizes of the model that is to be trained."""
    model: Path | None = None
    """Model folder that gives sizes and codec instead, for `train video --start` and `train image --start`."""
    vae: Path | None = None
    """Codec folder, by default the one that ships; paper needs a Stable Diffusion 1.5 folder, or its vae."""
    head: Path | None = None
    """FLAME model file, for clips on FLAME."""
    estimated: bool = False
    """Give exact synthetic normals as an estimator would see them, for `train --ablate synthetic`."""
    shard_mb: int = 256
    """Size of a shard. A recording, one camera's frames of a clip, is never divided."""
    workers: int = 2
    """Processes that decode and encode, a shard each."""
    device: DeviceName = "auto"
    """Where the codec computes; Stable Diffusion's in bf16 on CUDA."""


def run(args: Args) -> None:
    import numpy as np

    from geodiff4d.cli._device import chosen_device
    from geodiff4d.cli.progress import bar
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.files import read_object
    from geodiff4d.data.footage.clips import ClipFootage, clips_below
    from geodiff4d.data.footage.take import HELD_OUT
    from geodiff4d.data.shards import Shards
    from geodiff4d.pipeline import SHIPPED_MODEL
    from geodiff4d.presets import preset
    from geodiff4d.video.encode import encode_clips
    from geodiff4d.video.model import config_from_dict
    from geodiff4d.video.vae import PatchCodec, load_codec

    for name, value, high in (("--workers", args.workers, 256), ("--shard-mb", args.shard_mb, 100_000)):
        if not 1 <= value <= high:
            raise UserError(f"{name} is {value}: expected 1 to {high}")
    if args.model is not None and args.vae is not None:
        raise UserError("--vae: --model names a whole model, with its codec: leave one of the two out")
    if args.preset == "paper" and args.model is None and args.vae is None:
        raise UserError("--preset paper needs --vae, Stable Diffusion's folder or its vae, or --model")
    if args.model is None:
        like, codec = preset(args.preset).model, args.vae or SHIPPED_MODEL / "vae"
        codec = codec / "vae" if (codec / "vae").is_dir() else codec
    else:
        note = read_object(args.model / "unet" / "config.json", "video_model")
        like, codec = config_from_dict(note["video_model"]), args.model / "vae"
    found = load_codec(codec)
    if args.model is None and isinstance(found, PatchCodec) and found.config != preset(args.preset).codec.codec:
        raise UserError(f"{codec} does not fit preset {args.preset}: give --vae, a codec that was trained for it")
    folders = [folder.resolve() for folder in args.src]
    if len(set(folders)) != len(folders):
        raise UserError("a folder is named twice: give each once")
    if any(args.out.resolve() == f or f in args.out.resolve().parents for f in folders):
        raise UserError(f"--out {args.out} lies in what is encoded: choose another folder")
    head, device = None if args.head is None else str(args.head), chosen_device(args.device).type
    made = {"": [f for f in args.src if clips_below(f) or not clips_below(f, held_out=True)],
            HELD_OUT: [f for f in args.src if clips_below(f, held_out=True)]}  # fmt: skip
    for part, of in made.items():
        if not of:
            continue
        # What is validated on stays exact.
        sources = [ClipFootage(f, head, args.estimated and not part, bool(part)) for f in of]
        written = encode_clips(
            sources, args.out / part, codec, like, device, args.workers, args.shard_mb * 1_000_000, bar
        )
        store = Shards(args.out / part)
        frames = int(np.sum([t.present.sum() for t in store.index.takes]))
        size = sum(p.stat().st_size for p in store.folder.glob("shard-*.npy"))
        print(f"{store.folder}: {len(store.index.takes)} takes, {frames} frames, {size / 1e6:.0f} MB; "
              f"{written} shards written now")  # fmt: skip
