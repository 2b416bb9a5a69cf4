"""The `vae`, `image` and `video` stages of `geodiff4d train`: data, model and starting weights for the loops."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from geodiff4d.cli._stores import is_footage, rendered_stores, rendered_tracks
from geodiff4d.cli._training_args import Args
from geodiff4d.core.errors import UserError
from geodiff4d.data.augment import AugmentConfig
from geodiff4d.data.mixture import Mixture, MixtureConfig
from geodiff4d.data.pairs import PairConfig
from geodiff4d.data.store import Store
from geodiff4d.pipeline import SHIPPED_MODEL
from geodiff4d.presets import Preset, ablated, preset, with_temporal_modules
from geodiff4d.video.batches import Batches, TrackBatches, encode_store
from geodiff4d.video.mixed import MixedBatches
from geodiff4d.video.model import VideoModelConfig, load_video_model
from geodiff4d.video.recode import starting_weights
from geodiff4d.video.train import VideoTraining, train_video_model
from geodiff4d.video.train_codec import train_codec
from geodiff4d.video.vae import Codec, PatchCodec, StableCodec, load_codec

if TYPE_CHECKING:
    from accelerate import PartialState


def report(step: int, total: int, record: dict[str, Any]) -> None:
    """Print one line of a run: where it is, its numbers, and how long it will take."""
    shown = {k: v for k, v in record.items() if k not in ("step", "eta")}
    words = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
    left = [f"{record['eta'] // 60:.0f} min left"] if "eta" in record else []
    print("  ".join([f"step {record.get('step', step) + 1}/{total}", *words, *left]), flush=True)


def codec(args: Args) -> None:
    p = preset(args.preset)
    if args.preset == "paper":
        raise UserError("--preset paper uses Stable Diffusion's autoencoder: there is no codec to train")
    stores = rendered_stores(_world(args), p, args.workers)
    config = p.codec if args.steps is None else replace(p.codec, steps=args.steps)
    train_codec(args.out, stores["train"], replace(config, seed=args.seed), report, stores["val"])
    print(f"{args.out / 'vae'}: the codec")


def image(args: Args) -> None:
    """Stage 1."""
    p = preset(args.preset)
    model, pairs = ablated(p, args.ablate)
    config = _training(args, replace(p.image, pairs=pairs))
    if args.preset == "paper":
        model, codec, start = _from_stable_diffusion(args, model)
    else:
        codec, start = _codec(args, p), None
    if args.start is not None:
        if not isinstance(codec, PatchCodec):
            raise UserError(
                "--start with --preset paper is not possible yet: give --sd alone, or resume with one --out"
            )
        start = starting_weights(args.start, codec)
    if any(is_footage(folder) for folder in args.data):
        # A mixture does not know what the readout is fitted to: its warped portraits keep still.
        model = replace(model, expression=replace(model.expression, motion=0))
        if "synthetic" in args.ablate:
            raise UserError("--ablate synthetic is for rendered stores: of your own folders, leave synthetic ones out")
        train, val = _mixtures(args, model, codec, config, p.augment)
    else:
        train, val = _store_batches(args, p, model, codec, config)
    train_video_model(args.out, model, codec, train, config, val, start, report)
    print(f"{args.out / 'model'}: the model, for --model")


def video(args: Args) -> None:
    """Stage 2: temporal modules alone, in a model that stage 1 left."""
    p = preset(args.preset)
    if args.start is None and args.preset != "embedded":
        raise UserError(f"--start: stage 2 of preset {args.preset} needs a stage-1 model, as `train image` writes it")
    first = load_video_model(args.start or SHIPPED_MODEL)
    model = with_temporal_modules(first.config, p.temporal)
    pairs = replace(p.video.pairs, cross_view="cross-view" not in args.ablate)
    config = _training(args, replace(p.video, pairs=pairs))
    pairs = config.pairs
    if any(is_footage(folder) for folder in args.data):
        train, val = _mixtures(args, model, first.codec, config, p.clip_augment)
    else:
        like = replace(
            p.store, size=model.size, crop=model.expression.size, grid=model.size // first.codec.factor
        )  # fmt: skip
        with _one_first():
            stores = rendered_tracks(_world(args), p, like, args.workers)
            latents = _encoded(stores, first.codec, args.out)
        train, val = (
            TrackBatches(
                stores[k], latents[k], pairs, seed, augment, config.weights, model.pose == "codec", model.surroundings
            )
            for k, seed, augment in (("train", args.seed, p.clip_augment), ("val", 1, None))
        )
    start = {k: v for k, v in first.state_dict().items() if not k.startswith("codec.")}
    train_video_model(args.out, model, first.codec, train, config, val, start, report)
    print(f"{args.out / 'model'}: the model with temporal modules, for --model")


def _processes() -> "PartialState":
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _one_first() -> AbstractContextManager[None]:
    """Let one of several processes (`accelerate launch`) make files that the others then find."""
    return _processes().main_process_first()


def _training(args: Args, config: VideoTraining) -> VideoTraining:
    """Apply the options, and share the preset's batch out: over processes, and over the parts of a step."""
    whole, processes = config.pairs.references, _processes().num_processes
    if whole % (processes * args.accumulate):
        raise UserError(
            f"a batch of {whole} references cannot be shared by {processes} process(es) in {args.accumulate} part(s): "
            f"choose processes and --accumulate so that their product divides {whole}"
        )
    pairs = replace(config.pairs, references=whole // (processes * args.accumulate))
    return replace(
        config, pairs=pairs, accumulate=args.accumulate,
        seed=args.seed, steps=args.steps or config.steps, autocast=args.bf16,
        recompute=args.recompute or config.recompute, save_minutes=args.save_minutes,
    )  # fmt: skip


def _world(args: Args) -> Path:
    """The one folder that rendered stores are in, or will be."""
    if len(args.data) > 1:
        raise UserError("--data: expected one folder for rendered stores, or folders of clips: none of these has any")
    return args.data[0] if args.data else args.out / "data"


def _codec(args: Args, p: Preset) -> PatchCodec:
    found = load_codec(args.vae or SHIPPED_MODEL / "vae")
    if not isinstance(found, PatchCodec) or found.config != p.codec.codec:
        raise UserError(
            f"the codec does not fit preset {args.preset}: train one with `geodiff4d train vae --preset {args.preset}` "
            "and give --vae"
        )
    return found


def _from_stable_diffusion(
    args: Args, like: VideoModelConfig
) -> tuple[VideoModelConfig, StableCodec, dict[str, Tensor]]:
    """Take topology, codec and first weights from a Stable Diffusion folder."""
    if args.sd is None:
        raise UserError("--preset paper needs --sd: a folder with Stable Diffusion 1.5's unet and vae")
    from geodiff4d.video.pretrained import from_stable_diffusion

    built, _ = from_stable_diffusion(args.sd, like)
    assert isinstance(built.codec, StableCodec)
    if built.image_encoder is not None:
        print(f"{args.sd}/image_encoder is not used: SD's text attention gets a zero token, in training and after it")
    state = {k: v for k, v in built.state_dict().items() if k.startswith(("unet.", "reference.", "expression."))}
    return built.config, built.codec, state


def _store_batches(
    args: Args, p: Preset, model: VideoModelConfig, codec: Codec, config: VideoTraining
) -> tuple[Batches, Batches]:
    p = replace(
        p,
        store=replace(p.store, parameters=args.parameters),
        val_store=replace(p.val_store, parameters=args.parameters),
    )
    with _one_first():
        stores = rendered_stores(_world(args), p, args.workers)
        latents = _encoded(stores, codec, args.out, "synthetic" not in args.ablate)
    train, val = (
        Batches(
            stores[k],
            latents[k],
            config.pairs,
            seed,
            augment,
            config.weights,
            model.pose == "codec",
            model.surroundings,
        )
        for k, seed, augment in (("train", args.seed, p.augment), ("val", 1, None))
    )
    return train, val


def _encoded(stores: Mapping[str, Store], codec: Codec, out: Path, exact_normals: bool = True) -> dict[str, np.ndarray]:
    """Encode the stores; what is validated on is exact in any case."""
    out.mkdir(parents=True, exist_ok=True)
    return {
        name: encode_store(store, codec, out / f"latents_{name}.npy", exact_normals=exact_normals or name != "train")
        for name, store in stores.items()
    }


def _mixtures(
    args: Args, model: VideoModelConfig, codec: Codec, config: VideoTraining, augment: AugmentConfig
) -> tuple[MixedBatches, MixedBatches | None]:
    """Mix the --data folders; what lies in a folder `val` inside one of them is validated on, if there is any."""
    held_out = [folder / "val" for folder in args.data if is_footage(folder / "val")]
    sources = [folder / "train" if is_footage(folder / "train") else folder for folder in args.data]
    if len(set(sources)) != len(sources):
        raise UserError("--data names a folder twice: give each once, and --importance to weigh it")

    def mixed(folders: list[Path], seed: int, augment: AugmentConfig | None, weigh: bool) -> MixedBatches:
        pairs: PairConfig = config.pairs
        drawn = MixtureConfig(
            targets="clip" if config.parts == "temporal" else "images", frames=pairs.targets, size=model.size,
            crop=model.expression.size, cross_view=pairs.cross_view, frontal_reference=pairs.frontal_reference,
            warp=model.warp, surroundings=model.surroundings, augment=augment,
            importance=args.importance if weigh else (),
        )  # fmt: skip
        head = None if args.head is None else str(args.head)
        mixture = Mixture(folders, drawn, seed, head)
        workers = args.workers if weigh else 0  # Validation picks its batches again and again.
        return MixedBatches(mixture, codec, pairs.references, config.weights, model.pose == "codec", workers)

    train = mixed(sources, args.seed, augment, True)
    for source, share in zip(sources, train.mixture.shares, strict=True):
        print(f"{source}: {100 * share:.0f} % of the samples")
    if not held_out:
        print("no --data folder has a folder `val`: there will be no validation")
    return train, mixed(held_out, 1, None, False) if held_out else None
