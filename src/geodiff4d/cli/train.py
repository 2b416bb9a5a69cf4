"""Train the codec, the image model or the perception network on the open world; the same command resumes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d train`."""

    stage: Annotated[Literal["vae", "image", "perception"], tyro.conf.Positional]
    """vae: the codec. image: stage 1 of the paper, the joint RGB + normal model without temporal modules. perception:
    what tracking looks with (landmarks, mask, normals); of the options below it knows preset, data, start, steps,
    workers and seed."""
    out: Path
    """Run folder: config, log, checkpoint, and the model to give to --model."""
    preset: Literal["debug", "embedded"] = "embedded"
    """debug: seconds. embedded: about an hour and a half on two cores."""
    data: Path | None = None
    """Folder of the rendered training stores (train and val); by default OUT/data. They are built if missing."""
    vae: Path | None = None
    """Codec folder for the image stage; by default the one that ships."""
    start: Path | None = None
    """Model folder whose weights to continue from (its optimiser starts afresh); another codec's are carried over."""
    steps: int | None = None
    """Train so many steps instead of the preset's."""
    ablate: tuple[Literal["joint", "domain-attention", "cross-view", "warp"], ...] = ()
    """Switch parts off: joint (no normals), domain-attention, cross-view (drive by the target itself), warp."""
    workers: int = 2
    """Processes that render the stores."""
    seed: int = 0


def run(args: Args) -> None:
    from dataclasses import replace

    from geodiff4d.cli.progress import track
    from geodiff4d.core.errors import UserError
    from geodiff4d.data.store import build_store
    from geodiff4d.pipeline import SHIPPED_MODEL
    from geodiff4d.presets import ablated, preset
    from geodiff4d.video.batches import Batches, encode_store
    from geodiff4d.video.recode import starting_weights
    from geodiff4d.video.train import train_image
    from geodiff4d.video.train_codec import train_codec
    from geodiff4d.video.vae import PatchCodec, load_codec

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}: expected at least 1")
    if args.stage == "perception":
        from geodiff4d.cli import _perception

        _perception.train(args.out, args.preset, args.data, args.start, args.steps, args.workers, args.seed)
        return
    p = preset(args.preset)
    data = args.data or args.out / "data"
    stores = {}
    for name, config in (("train", p.store), ("val", p.val_store)):
        bar = iter(track(range(config.subjects), f"rendering {name} people"))
        seen = [0]

        def show(done: int, total: int, bar=bar, seen=seen) -> None:
            while seen[0] < done:
                next(bar, None)
                seen[0] += 1

        stores[name] = build_store(data / name, config, args.workers, show)
        next(bar, None)

    def report(step: int, total: int, record: dict) -> None:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()), flush=True)

    if args.stage == "vae":
        config = p.codec if args.steps is None else replace(p.codec, steps=args.steps)
        train_codec(args.out, stores["train"], replace(config, seed=args.seed), report, stores["val"])
        print(f"{args.out / 'vae'}: the codec")
        return
    codec = load_codec(args.vae or SHIPPED_MODEL / "vae")
    if not isinstance(codec, PatchCodec) or codec.config != p.codec.codec:
        raise UserError(
            f"the codec does not fit preset {args.preset}: train one with `geodiff4d train vae --preset {args.preset}` "
            "and give --vae"
        )
    model, pairs = ablated(p, args.ablate)
    image = replace(p.image, pairs=pairs, seed=args.seed, steps=args.steps or p.image.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    latents = {k: encode_store(s, codec, args.out / f"latents_{k}.npy") for k, s in stores.items()}
    train, val = (
        Batches(stores[k], latents[k], pairs, seed, augment, image.weights, model.pose == "codec")
        for k, seed, augment in (("train", args.seed, p.augment), ("val", 1, None))
    )
    start = None if args.start is None else starting_weights(args.start, codec)
    train_image(args.out, model, codec, train, image, val, start, report)
    print(f"{args.out / 'model'}: the model, for --model")
