"""The `vae`, `image` and `video` stages of `geodiff4d train`: data, model and starting weights for the loops."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geodiff4d.cli._photographs import tracked_photographs
from geodiff4d.cli._training_args import Args
from geodiff4d.cli.progress import bar, record_lines
from geodiff4d.core.errors import UserError
from geodiff4d.core.rundir import lock_folder
from geodiff4d.data.augment import AugmentConfig
from geodiff4d.data.footage.clips import clips_below
from geodiff4d.data.footage.encoded import EncodedFootage
from geodiff4d.data.footage.photographs import PhotographFootage
from geodiff4d.data.footage.render import build_store, build_tracks
from geodiff4d.data.footage.rendered import RenderedFootage, Store, StoreConfig
from geodiff4d.data.footage.take import HELD_OUT, Footage
from geodiff4d.data.remote import remote_url
from geodiff4d.data.sampling import ReadConfig, Samples, held_out_footage, open_footage
from geodiff4d.data.shards import NOTE, is_store, stores_below
from geodiff4d.pipeline import SHIPPED_MODEL
from geodiff4d.presets import Preset, ablated, preset, with_temporal_modules
from geodiff4d.tracking.relabel import render_tracked
from geodiff4d.video.batches import Batches
from geodiff4d.video.encode import encode_store, fits
from geodiff4d.video.model import VideoModelConfig, load_video_model
from geodiff4d.video.objective import trained_state
from geodiff4d.video.recode import continued, start_from_stable_diffusion, starting_weights
from geodiff4d.video.train import VideoTraining, train_video_model
from geodiff4d.video.train_codec import train_codec
from geodiff4d.video.vae import Codec, PatchCodec, load_codec

if TYPE_CHECKING:
    from accelerate import PartialState

Sources = dict[str, list[Footage]]
"""What is trained on (`train`) and validated on (`val`)."""


def codec(args: Args) -> None:
    """Train the codec on rendered people."""
    p = preset(args.preset)
    if args.preset == "paper":
        raise UserError("--preset paper uses Stable Diffusion's autoencoder: there is no codec to train")
    stores = rendered(args.data[0] if args.data else args.out / "data", p, args.workers)
    config = p.codec if args.steps is None else replace(p.codec, steps=args.steps)
    train_codec(args.out, stores["train"], replace(config, seed=args.seed), record_lines(config.steps), stores["val"])
    print(f"{args.out / 'vae'}: the codec")


def image(args: Args) -> None:
    """Stage 1."""
    p = preset(args.preset)
    model, pairs = ablated(p, args.ablate)
    config = training_config(args, replace(p.image, pairs=pairs))
    model, codec, start = beginning(args, p, model)
    p = replace(p, store=replace(p.store, parameters=args.parameters),
                val_store=replace(p.val_store, parameters=args.parameters))  # fmt: skip
    train, val = batches(args, p, model, codec, config, p.augment)
    if not train.samples.knows_motion:
        model = replace(model, moves=False)
    train_video_model(args.out, model, codec, train, config, val, start, record_lines(config.steps))
    print(f"{args.out / 'model'}: the model, for --model")


def video(args: Args) -> None:
    """Stage 2: temporal modules alone, in a model that stage 1 left."""
    p = preset(args.preset)
    if args.start is None and args.preset != "embedded":
        raise UserError(f"--start: stage 2 of preset {args.preset} needs a stage-1 model, as `train image` writes it")
    first = load_video_model(args.start or SHIPPED_MODEL)
    model = with_temporal_modules(first.config, p.temporal)
    pairs = replace(p.video.pairs, cross_view="cross-view" not in args.ablate)
    config = training_config(args, replace(p.video, pairs=pairs))
    train, val = batches(args, p, model, first.codec, config, p.clip_augment)
    # What temporal modules change is finished as before: the decoder is handed on.
    train_video_model(
        args.out, model, first.codec, train, config, val, trained_state(first), record_lines(config.steps),
        first.decoder,
    )  # fmt: skip
    print(f"{args.out / 'model'}: the model with temporal modules, for --model")


def process_state() -> "PartialState":
    """Return which of how many processes this is (`accelerate launch`)."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def training_config(args: Args, config: VideoTraining) -> VideoTraining:
    """Apply the options, and share the preset's batch out: over processes, and over the parts of a step.

    Raises:
        UserError: it cannot be shared evenly.
    """
    whole, processes = config.pairs.references, process_state().num_processes
    if whole % (processes * args.accumulate):
        raise UserError(
            f"a batch of {whole} references cannot be shared by {processes} process(es) in {args.accumulate} part(s): "
            f"choose processes and --accumulate so that their product divides {whole}"
        )
    pairs = replace(
        config.pairs, references=whole // (processes * args.accumulate), importance=args.importance
    )  # fmt: skip
    return replace(
        config, pairs=pairs, accumulate=args.accumulate,
        seed=args.seed, steps=args.steps or config.steps, autocast=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing or config.gradient_checkpointing,
        save_minutes=args.save_minutes, keep_checkpoints=args.keep_checkpoints, ema_on_host=args.ema_on_host,
        zero=args.zero,
        **{k: v for k in ("parts", "beta2", "ema", "clip", "weight_decay") if (v := getattr(args, k)) is not None},
    )  # fmt: skip


# What it starts from


def beginning(
    args: Args, p: Preset, like: VideoModelConfig
) -> tuple[VideoModelConfig, Codec, dict[str, Tensor] | None]:
    """Return the model to train, its codec, and its first weights (None: random ones).

    Raises:
        UserError: a codec or a model that does not fit the preset, or two things to start from.
    """
    if args.preset != "paper":
        found = load_codec(args.vae or SHIPPED_MODEL / "vae")
        if not isinstance(found, PatchCodec) or found.config != p.codec.codec:
            raise UserError(
                f"the codec does not fit preset {args.preset}: train one with `geodiff4d train vae --preset "
                f"{args.preset}` and give --vae"
            )
        if args.start is None:
            return like, found, None
        begun, weights = starting_weights(args.start, found)
        # Its weights mean something at the scale of residuals and the schedule that they were trained with alone.
        return replace(like, diffusion=begun.diffusion), found, weights
    if args.start is not None:
        if args.sd is not None:
            raise UserError("--sd: --start names a whole model to continue from: leave one of the two out")
        return continued(args.start, like)
    return start_from_stable_diffusion(args.sd, like)


# What it sees


def batches(
    args: Args, p: Preset, model: VideoModelConfig, codec: Codec, config: VideoTraining, augment: AugmentConfig
) -> tuple[Batches, Batches | None]:
    """Open --data, encode what is rendered, and return batches to train on and, if there is anything, to validate on.

    Raises:
        UserError: there is nothing to train on, --importance does not fit the folders, or another process writes to
            --out.
    """
    encoded_pose = model.pose == "codec"
    with process_state().main_process_first():  # It makes files that the others then find.
        sources = footage(args, p, model, codec, config.pairs.clips)
        if process_state().is_main_process:
            lock_folder(args.out)
        for split, found in sources.items():
            for i, source in enumerate(found):
                if isinstance(source, EncodedFootage):
                    source.require(lambda made: fits(made, codec, model))
                elif isinstance(source, RenderedFootage) and source.store.config.size == model.size:
                    encode_store(source, codec, args.out / f"latents_{split}_{i}.npy", encoded_pose)

    def made(split: str, seed: int, augment: AugmentConfig | None) -> Batches:
        training = split == "train"
        read = ReadConfig(model.size, model.expression.size, model.warp, model.surroundings, augment)
        pairs = config.pairs if training else replace(config.pairs, importance=())
        samples = Samples(sources[split], pairs, read, seed)
        # Validation picks its batches again and again, and what is encoded already needs no one to read ahead.
        ahead = training and any(not isinstance(s, RenderedFootage) or s.cache is None for s in sources[split])
        if ahead:
            leave_cores(args.workers)
        return Batches(samples, codec, config.weights, encoded_pose, args.workers if ahead else 0)

    train = made("train", args.seed, augment)
    if len(sources["train"]) > 1:
        for source, share in zip(train.samples.sources, train.samples.shares, strict=True):
            print(f"{source.name}: {100 * share:.0f} % of the samples")
    if not sources["val"]:
        print(f"no --data folder has a folder `{HELD_OUT}`: there will be no validation")
    return train, made("val", 1, None) if sources["val"] else None


def leave_cores(workers: int) -> None:
    """Leave a core to each process that reads ahead, where a CPU trains: threads that share one wait for each other.

    OMP_NUM_THREADS, if it is set, is what the user wants.
    """
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - workers))


def is_footage(folder: Path) -> bool:
    """Say whether a folder is a store or holds clips, and not the place where `train` renders stores."""
    if (folder / "store.json").exists() or (folder / "transforms.json").exists() or stores_below(folder):
        return True
    # Deeper than this no importer and no tracker writes.
    return folder.is_dir() and any(next(folder.glob(f"{depth}transforms.json"), None) for depth in ("*/", "*/*/"))


def footage(args: Args, p: Preset, model: VideoModelConfig, codec: Codec, clips: bool) -> Sources:
    """Open the --data folders; the open world is rendered where there is one folder without any footage.

    Raises:
        UserError: a folder has nothing, is named twice, or is held out by another.
    """
    estimated, head = "synthetic" in args.ablate, None if args.head is None else str(args.head)
    for folder in args.data:
        if (url := remote_url(folder)) and not is_store(folder):
            raise UserError(f"{url} is no store: expected a folder that `geodiff4d encode` wrote, with {NOTE}")
    folders = [folder.resolve() for folder in args.data]
    if len(set(folders)) != len(folders):
        raise UserError("--data names a folder twice: give each once, and --importance to weigh it")
    for a in folders:
        if any(b in a.parents and HELD_OUT in a.relative_to(b).parts for b in folders):
            raise UserError(f"--data: {a} is held out by a folder above it, and would be trained on: leave it out")
    photographs = () if args.photographs is None else tuple(_photographs(args, p, args.photographs))
    if len(args.data) < 2 and not any(is_footage(folder) for folder in args.data):
        like = replace(p.store, size=model.size, crop=model.expression.size, grid=model.size // codec.factor)
        place = args.data[0] if args.data else args.out / "data"
        stores = rendered(place, p, args.workers, like if clips else None)
        made = {k: [RenderedFootage(store, estimated and k == "train")] for k, store in stores.items()}
        return {k: [*made[k], *more] for k, more in zip(made, photographs or ([], []), strict=True)}
    out: Sources = {"train": [], "val": []}
    for folder in args.data:
        for split, sources in out.items():
            # A folder that `train` rendered has a store for each stage.
            made = [folder / f"{split}{end}" for end in (("_tracks", "") if clips else ("", "_tracks"))]
            if store := next((s for s in made if (s / "store.json").exists()), None):
                sources.append(open_footage(store, head, estimated and split == "train"))
            elif is_footage(folder):
                train = split == "train"
                found = open_footage(folder, head, estimated) if train else held_out_footage(folder, head)
                sources += [found] if found else []
    if len(out["train"]) < len(args.data):
        for folder in args.data:
            clips_below(folder)  # Says so of what is no folder.
        raise UserError("--data: expected one folder for rendered stores, or only folders of clips and stores")
    return {k: [*out[k], *more] for k, more in zip(out, photographs or ([], []), strict=True)}


def _photographs(args: Args, p: Preset, folder: Path) -> Iterator[list[Footage]]:
    """Yield the --photographs to train on, and those to validate on, tracked first where they are not.

    Raises:
        UserError: the model looks at no warped portrait, so that they could show it nothing but themselves.
    """
    if not p.model.warp or "warp" in args.ablate:
        raise UserError("--photographs: this model looks at no warped portrait, through which they are seen: leave out")
    folder = tracked_photographs(folder, args.out / "photographs", p.model.size, args.workers)
    for held_out in (False, True):
        yield [PhotographFootage(folder, held_out)] if clips_below(folder, held_out) else []


def rendered(folder: Path, p: Preset, workers: int, like: StoreConfig | None = None) -> dict[str, Store]:
    """Render the preset's stores of single images below a folder, or of tracks in the sizes of `like`, or open them.

    Raises:
        UserError: they would fill terabytes.
    """

    def images(name: str, config: StoreConfig) -> Store:
        render = render_tracked if config.parameters == "tracked" else None
        return build_store(folder / name, config, workers, bar, render)

    if like is None:
        return {"train": images("train", p.store), "val": images("val", p.val_store)}
    return {
        "train": build_tracks(folder / "train_tracks", p.tracks, replace(like, split="train"), workers, bar),
        "val": build_tracks(folder / "val_tracks", p.val_tracks, replace(like, split="val"), workers, bar),
    }
