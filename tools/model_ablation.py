"""What each part of the video model is worth: small models trained from random weights at one budget (Table 2).

Usage: `.venv/bin/python tools/model_ablation.py --out runs/model_ablation`. Every variant sees the same samples in the
same order, is sampled in one step, and is scored on people of the test split, two ways: driven by another view than the
target's, and driven by the target itself, where a model that reads more than the expression off its driver shows it.
Finished trainings are kept, an interrupted one goes on, so that the same command resumes. Prints Markdown tables.

Variants are "full" or what is missing, separated by spaces. Two things are ours and not the paper's: the warped
portrait (`no-warp`) and the warm start of the expression encoder, made once for all variants (`no-warm-start`: the
denoising loss alone teaches it). Either may hide what the paper's parts do, so that variants are compared with the one
that lacks the same of the two and nothing else. `no-synthetic` trains on normals as an estimator gives them
(`data.estimated`), not on fewer people. "normals from RGB" are what the perception network sees in generated frames.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from geodiff4d.cli import progress
from geodiff4d.core.camera import Camera
from geodiff4d.core.files import fresh_file, read_json, save_tensors, write_json
from geodiff4d.core.images import composite, decode_normals
from geodiff4d.data.footage.render import build_store
from geodiff4d.data.footage.rendered import RenderedFootage, Store, StoreConfig
from geodiff4d.data.sampling import ReadConfig, Samples
from geodiff4d.data.world_clips import random_motion
from geodiff4d.evaluate.metrics import Estimate, Truth, bootstrap, paired_difference, score
from geodiff4d.evaluate.observe import Observed, perceived_normals
from geodiff4d.evaluate.pairs import face_mask
from geodiff4d.heads import Head, HeadParams, load_head
from geodiff4d.pipeline import SHIPPED_MODEL
from geodiff4d.presets import ablated, preset
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import world_region
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.video.batches import Batches
from geodiff4d.video.conditions import condition_images, lifted
from geodiff4d.video.encode import encode_store
from geodiff4d.video.expression import ExpressionEncoder
from geodiff4d.video.finish import surface_mask
from geodiff4d.video.inputs import Portrait, driving_crop
from geodiff4d.video.model import VideoModel, VideoModelConfig
from geodiff4d.video.sample import ClipInputs, sample
from geodiff4d.video.train import VideoTraining, train_video_model
from geodiff4d.video.vae import PatchCodec, load_codec
from geodiff4d.video.warm_start import warm_start
from geodiff4d.world.cameras import portrait_and_other_cameras
from geodiff4d.world.subject import SyntheticSubject, plain_seed
from geodiff4d.world.tracker_error import disturbed

PEOPLE = StoreConfig("train", subjects=150, instants=8, views=3)
"""What is trained on, unless --data says otherwise."""
WIDTHS, GROUPS, ENCODER = (48, 64, 64), 16, (16, 32, 48, 64)
"""Of denoiser and reference network, and of the encoder: half of `embedded`, which has 3.5 times the weights."""
REFERENCES, TARGETS = 4, 4
OURS = ("no-warp", "no-warm-start")
VARIANTS = (
    "full", "no-joint", "no-domain-attention", "no-cross-view", "no-warp", "no-warp no-joint",
    "no-warp no-domain-attention", "no-warp no-cross-view", "no-synthetic", "no-warp no-warm-start",
    "no-warp no-warm-start no-cross-view", "no-warp no-synthetic",
)  # fmt: skip
MEASURES = {"psnr_fg": 2, "psnr_face": 2, "ssim": 3, "normal_deg": 2, "sharpness": 2}
"""Digits that a table shows."""


@dataclass(frozen=True)
class Args:
    """Options of the ablation."""

    out: Path
    """Store, trainings and results."""
    data: Path | None = None
    """A folder with a rendered store `train`, as `geodiff4d train image` leaves one; by default OUT/data is made."""
    steps: int = 400
    """Of 16 targets each."""
    warm_start: int = 200
    """Steps of 128 crops that the encoder is warmed up for."""
    lr: float = 1e-3
    people: int = 16
    """Of the test split."""
    seed: int = 0
    variants: tuple[str, ...] = VARIANTS
    workers: int = 2
    """Processes that render."""
    threads: int | None = None


@dataclass(frozen=True)
class Case:
    """A person who is not trained on: a portrait, and other instants from several views."""

    portrait: Portrait
    params: HeadParams
    """Tracked, [targets, …]."""
    cameras: Camera
    drivers: dict[str, Float[Tensor, "targets 3 size size"]]
    """Driving crops of the targets' instants: from another view, and from the target's own."""
    truth: Truth


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    store = open_store(args)
    codec = load_codec(SHIPPED_MODEL / "vae")
    assert isinstance(codec, PatchCodec)
    head = load_head()
    cases = [held_out(head, i) for i in progress.bar(range(args.people), "rendering held-out people")]
    found = without_model(args, head, cases)
    found |= {v: result(args, v, store, codec, head, cases) for v in args.variants}
    for lines in (means(found), differences(found)):
        print("\n".join(lines), end="\n\n")


def open_store(args: Args) -> Store:
    if args.data is not None:
        return Store(args.data / "train")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"rendering {PEOPLE.subjects} people, unless they are there", flush=True)
    return build_store(args.out / "data" / "train", PEOPLE, args.workers)


# Training


def configured(args: Args, variant: str) -> tuple[VideoModelConfig, VideoTraining]:
    """Return a variant's model and training; all have the same budget.

    Raises:
        UserError: an unknown part.
    """
    p = preset("embedded")
    p = replace(p, model=replace(
        p.model, unet=replace(p.model.unet, widths=WIDTHS, groups=GROUPS),
        reference=replace(p.model.reference, widths=WIDTHS, groups=GROUPS),
        expression=replace(p.model.expression, widths=ENCODER),
    ))  # fmt: skip
    words = [word for word in variant.split() if word not in ("full", "no-warm-start")]
    model, pairs = ablated(p, tuple(word.removeprefix("no-") for word in words))
    pairs = replace(pairs, references=REFERENCES, targets=TARGETS)
    training = replace(
        p.image, pairs=pairs, steps=args.steps, lr=args.lr, warmup=1 + args.steps // 10, warm_start=0, seed=args.seed,
        save_every=100, pictures=0,
    )  # fmt: skip
    return model, training


def batches_of(args: Args, variant: str, store: Store, codec: PatchCodec) -> Batches:
    """Return what a variant is trained on: the same samples for all; their normals are estimated for `no-synthetic`."""
    model, training = configured(args, variant)
    footage = RenderedFootage(store, estimated="no-synthetic" in variant.split())
    latents = args.out / f"latents_{'estimated' if footage.estimated else 'train'}.npy"
    assert encode_store(footage, codec, latents)
    read = ReadConfig(model.size, model.expression.size, model.warp, model.surroundings, preset("embedded").augment)
    return Batches(Samples([footage], training.pairs, read, training.seed), codec, training.weights)


def trained(args: Args, variant: str, store: Store, codec: PatchCodec) -> VideoModel:
    """Train a variant, or finish its training."""
    model, training = configured(args, variant)
    batches = batches_of(args, variant, store, codec)
    start = None if "no-warm-start" in variant.split() else warmed(args, batches.samples)
    folder = args.out / "trainings" / named(args, variant)

    def report(record: dict[str, Any]) -> None:
        step, total = record["step"], training.steps
        if step % 100 == 0 or step == total - 1:
            print(f"  step {step + 1}/{total}  loss {record['loss']:.3f}", flush=True)

    return train_video_model(folder, model, codec, batches, training, start=start, on_record=report)


def warmed(args: Args, samples: Samples) -> dict[str, Tensor]:
    """Return the encoder's weights after its warm start, which variants share."""
    path = args.out / f"encoder_{args.warm_start}_{args.seed}.safetensors"
    if not path.exists():
        print(f"{time.strftime('%H:%M:%S')} warm start of the encoder", flush=True)
        torch.manual_seed(args.seed)
        encoder = ExpressionEncoder(configured(args, "no-warp")[0].expression)
        warm_start(encoder, samples, args.warm_start)
        with fresh_file(path) as temporary:
            save_tensors({f"expression.{k}": v for k, v in encoder.state_dict().items()}, temporary)
    return load_file(path)


def named(args: Args, variant: str) -> str:
    return f"{variant.replace(' ', '_')}_{args.steps}_{args.seed}"


# Evaluation


def held_out(head: Head, index: int, instants: int = 2, views: int = 3, size: int = 256, crop: int = 96) -> Case:
    """Render a person of the test split whose parameters are off as a tracker's are; one instant more is the portrait.

    The portrait's view is near the front.
    """
    seed = plain_seed(index, "test")
    subject = SyntheticSubject(seed, "test")
    m = random_motion("test", seed, instants + 1, 0)
    true = subject.params(m.expr, m.rotation, m.neck_pose, m.jaw_pose, m.eyes_pose, m.translation)
    tracked = HeadParams.stack([disturbed(true[i : i + 1], seed=1000 * seed + i)[0] for i in range(instants + 1)])
    still = head.pose(tracked.without_expression()).vertices
    frames, cameras, crops = [], [], []
    for i in range(instants + 1):
        c = portrait_and_other_cameras(views, 100 * seed + i, size)
        c = canonical_crop(c, still[i][world_region()])
        params = true[i].map(lambda x: x.expand(views, *x.shape))
        out = subject.render(params, c)
        rgb = composite(out.rgb, out.mask)
        frames.append(Truth(rgb, out.normal, out.mask, face_mask(subject, params, c) * out.mask))
        crops.append(torch.stack([driving_crop(rgb[k], head, tracked[i], c[k], crop) for k in range(views)]))
        cameras.append(c)
    first, *rest = frames
    truth = Truth(*(torch.cat([getattr(t, k) for t in rest]) for k in ("rgb", "normal", "mask", "face")))
    shown = Camera.stack([c[k] for c in cameras[1:] for k in range(views)])
    own = torch.cat(crops[1:])
    other = torch.cat([c.roll(-1, 0) for c in crops[1:]])
    params = tracked[1:].map(lambda x: x.repeat_interleave(views, 0))
    portrait = Portrait(first.rgb[0], first.mask[0], cameras[0][0], tracked[0])
    return Case(portrait, params, shown, {"another view": other, "own view": own}, truth)


@torch.no_grad()
def frames_of(
    model: VideoModel, head: Head, case: Case, crops: Float[Tensor, "t 3 size size"], drop: bool = False
) -> tuple[Float[Tensor, "t 3 height width"], Float[Tensor, "t 3 height width"] | None]:
    """Generate (rgb, normals) in one step, as decoded.

    `DiffusionGenerator` sets frames on grey by their own normals, which not every variant has.
    """
    portrait = lifted(head, case.portrait, model.config.surroundings)
    own = condition_images(
        head, portrait, HeadParams.stack([case.portrait.params]), Camera.stack([case.portrait.camera])
    )
    kv = model.reference_kv(model.codec.encode(case.portrait.on_grey[None]), model.pose_planes(own.pose)[:, :, 0])
    latents = model.encode_expressions(crops)
    latents = torch.zeros_like(latents) if drop else latents
    moved = None if drop else case.params
    conditions = model.conditions(condition_images(head, portrait, case.params, case.cameras, moved))
    z = sample(model, ClipInputs(conditions, latents, kv), preset("embedded").sample)
    images = model.decode_latents(z)[0].movedim(2, 1).clamp(0, 1)
    if not model.config.normals:
        return images[0], None
    return images[0], decode_normals(images[1]) * surface_mask(images[1])


def perceived(detector: EmbeddedDetector, rgb: Float[Tensor, "t 3 height width"]) -> Tensor:
    """Return the normals that the perception network sees in frames, zero where it finds no face."""
    found = detector.detect(list(rgb))
    nothing = Observed(found, torch.zeros(len(rgb), 0, 2), torch.zeros(len(rgb), 5, 2), None)
    seen = perceived_normals(nothing, rgb.shape[-1])
    return torch.zeros_like(rgb) if seen is None else seen


def result(args: Args, variant: str, store: Store, codec: PatchCodec, head: Head, cases: list[Case]) -> dict[str, Any]:
    """Train and score a variant, unless its figures are there: {how it is driven: {measure: one number a person}}."""
    path = args.out / "results" / f"{named(args, variant)}_{args.people}.json"
    if path.exists():
        return read_json(path)
    begun = time.process_time()
    print(f"{time.strftime('%H:%M:%S')} {variant}", flush=True)
    model = trained(args, variant, store, codec)
    detector, scores = EmbeddedDetector(), {}
    seconds = time.process_time() - begun
    for case in progress.bar(cases, f"scoring {variant}"):
        for name, crops in case.drivers.items():
            rgb, normal = frames_of(model, head, case, crops)
            note(scores, name, score(case.truth, rgb, normal))
            if name == "another view":
                note(scores, "normals from RGB", score(case.truth, normal=perceived(detector, rgb)))
        rgb, normal = frames_of(model, head, case, case.drivers["another view"], drop=True)
        note(scores, "no expression", score(case.truth, rgb, normal))
    weights = sum(p.numel() for network in model.networks().values() for p in network.parameters())
    made = {"scores": scores, "steps": args.steps, "targets": args.steps * REFERENCES * TARGETS, "weights": weights,
            "cpu_seconds": round(seconds)}  # fmt: skip
    write_json(path, made)
    return made


def without_model(args: Args, head: Head, cases: list[Case]) -> dict[str, Any]:
    """Score what needs no model: the portrait as it is, and carried on the head without expression."""
    path = args.out / "results" / f"without_model_{args.people}.json"
    if path.exists():
        return read_json(path)
    copied: dict[str, dict[str, list[float]]] = {}
    carried: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        note(copied, "another view", score(case.truth, case.portrait.on_grey.expand_as(case.truth.rgb)))
        shown = condition_images(head, lifted(head, case.portrait, True), case.params, case.cameras)
        assert shown.warp is not None
        rgb, pose = (x[0].movedim(1, 0) for x in (shown.warp, shown.pose))
        note(carried, "another view", score(case.truth, rgb, decode_normals(pose)))
    made = {"portrait copied": {"scores": copied}, "mesh warp, pose map": {"scores": carried}}
    write_json(path, made)
    return made


def note(scores: dict[str, dict[str, list[float]]], name: str, measured: dict[str, float]) -> None:
    for key, value in measured.items():
        scores.setdefault(name, {}).setdefault(key, []).append(value)


# Tables

COLUMNS = (
    *(("another view", k) for k in MEASURES), ("normals from RGB", "normal_deg"), ("own view", "psnr_fg"),
    ("own view", "psnr_face"), ("no expression", "psnr_face"),
)  # fmt: skip
"""How it is driven, and the measure."""


def means(found: dict[str, Any]) -> list[str]:
    """Lay out the means over people."""
    rows = [["", *(f"{name}: {key}" for name, key in COLUMNS)]]
    for variant, made in found.items():
        cells = [made["scores"].get(name, {}).get(key) for name, key in COLUMNS]
        rows.append([variant, *(shown(c and bootstrap(c), k) for c, (_, k) in zip(cells, COLUMNS, strict=True))])
    return markdown(rows)


def differences(found: dict[str, Any]) -> list[str]:
    """Lay out what is gained or lost against the variant that has all parts, with intervals over people.

    "own − another" is what it helps to be driven by the target itself; "expression" what it helps to be driven.
    """
    rows = [["minus all parts", *(f"{name}: {key}" for name, key in COLUMNS), "own − another: psnr_fg",
             "own − another: psnr_face", "expression: psnr_face"]]  # fmt: skip
    for variant, made in found.items():
        if "weights" not in made:
            continue
        base = found.get(" ".join(word for word in OURS if word in variant.split()) or "full")
        cells = []
        for name, key in COLUMNS:
            a, b = (x and x["scores"].get(name, {}).get(key) for x in (made, base))
            cells.append(shown(paired_difference(a, b) if a and b and made is not base else None, key, True))
        s = made["scores"]
        for a, b, key in (("own view", "another view", "psnr_fg"), ("own view", "another view", "psnr_face"),
                          ("another view", "no expression", "psnr_face")):  # fmt: skip
            cells.append(shown(paired_difference(s[a][key], s[b][key]), key, True))
        rows.append([variant, *cells])
    return markdown(rows)


def shown(e: Estimate | None, key: str, signed: bool = False) -> str:
    if e is None or math.isnan(e.mean):
        return "–"
    n, plus = MEASURES[key], "+" if signed else ""
    return f"{e.mean:{plus}.{n}f} [{e.low:{plus}.{n}f}, {e.high:{plus}.{n}f}]"


def markdown(rows: list[list[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
