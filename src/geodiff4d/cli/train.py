"""Train the codec, the image model, the video model and its decoder, the networks of tracking, or all of them by a
recipe; the same command resumes."""

import math
from dataclasses import fields

from geodiff4d.cli._training_args import Args

_COMMON = {"stage", "out", "preset", "data", "steps", "workers", "seed"}
_LOOP = {
    "start", "importance", "head", "ablate", "bf16", "accumulate", "gradient_checkpointing", "save_minutes",
    "keep_checkpoints", "ema_on_host", "zero", "parts", "beta2", "ema", "clip", "weight_decay",
}  # fmt: skip
_READ = {
    "vae": _COMMON, "perception": _COMMON | {"start"}, "reader": _COMMON | {"start", "photographs"},
    "person": _COMMON | {"start", "photographs"},
    "decoder": _COMMON | {"start", "photographs"}, "identity": {"stage", "out", "preset", "seed"},
    "all": {"stage", "out", "preset", "recipe", "dry_run", "photographs", "workers", "seed"},
    "video": _COMMON | _LOOP, "image": _COMMON | _LOOP | {"sd", "vae", "parameters", "photographs"},
}  # fmt: skip
"""Options that each stage reads."""


def run(args: Args) -> None:
    from geodiff4d.core.errors import UserError

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}: expected at least 1")
    if args.accumulate < 1:
        raise UserError(f"--accumulate is {args.accumulate}: expected at least 1")
    for name, below in (("beta2", 1.0), ("ema", 1.0), ("clip", math.inf), ("weight_decay", math.inf)):
        value = getattr(args, name)
        if value is not None and not 0 <= value < below:
            raise UserError(f"--{name.replace('_', '-')} is {value}: expected at least 0 and below {below}")
    if args.keep_checkpoints < 1:
        raise UserError(f"--keep-checkpoints is {args.keep_checkpoints}: expected at least 1")
    for option in fields(args):
        if option.name not in _READ[args.stage] and getattr(args, option.name) != option.default:
            name = "no-bf16" if option.name == "bf16" else option.name.replace("_", "-")
            raise UserError(f"--{name}: the {args.stage} stage does not read it: leave it out")
    if args.stage == "video" and (unread := set(args.ablate) - {"cross-view"}):
        raise UserError(
            f"--ablate {' '.join(sorted(unread))}: the video stage knows cross-view alone; other parts are switched "
            "off in the image stage, whose model it takes"
        )
    if args.stage in ("vae", "decoder", "perception", "reader", "person") and len(args.data) > 1:
        raise UserError(f"--data: the {args.stage} stage takes one folder of rendered people, got {len(args.data)}")
    if args.stage == "all":
        from geodiff4d.cli import COMMANDS, ENDLESS, _recipe

        _recipe.run_all(args, [name for name in COMMANDS if name not in ("fleet", *ENDLESS)])
    elif args.stage in ("decoder", "perception", "reader", "person", "identity"):
        _small_network(args)
    else:
        from geodiff4d.cli import _training

        {"vae": _training.codec, "image": _training.image, "video": _training.video}[args.stage](args)


def _small_network(args: Args) -> None:
    """Train the guided decoder, or one of those that track or measure."""
    from geodiff4d.cli import _decoder, _identity, _perception, _person, _reader
    from geodiff4d.core.errors import UserError
    from geodiff4d.presets import preset

    p, folder = preset(args.preset), args.data[0] if args.data else None
    rest = (folder, args.start, args.steps, args.workers, args.seed)
    if args.stage == "perception" and p.perception is not None:
        _perception.train(args.out, p.perception, *rest)
    elif args.stage == "reader" and p.reader is not None:
        _reader.train(args.out, p.reader, *rest, args.photographs)
    elif args.stage == "person" and p.person is not None:
        _person.train(args.out, p.person, *rest, args.photographs)
    elif args.stage == "decoder" and p.decoder is not None:
        _decoder.train(args.out, p.decoder, *rest, args.photographs)
    elif args.stage == "identity" and p.identity is not None:
        _identity.train(args.out, p.identity, args.seed)
    else:
        raise UserError(f"--preset {args.preset} has no {args.stage} stage: expected debug or embedded")
