"""What a video model generates, beside the truth of the open world: whose face, which expression, how much flicker."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from geodiff4d.core.files import write_json
from geodiff4d.core.progress import Progress, silent
from geodiff4d.evaluate.metrics import score
from geodiff4d.evaluate.pairs import Pair, make_pair, track_pair, truth_frames
from geodiff4d.evaluate.retrieval import expression_ranks, identity_ranks
from geodiff4d.heads import Head
from geodiff4d.pipeline import clip_cameras
from geodiff4d.video.flicker import flicker, without_temporal_modules
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import still_head, with_identity_of
from geodiff4d.video.model import VideoModel
from geodiff4d.video.sample import SampleConfig
from geodiff4d.world.seeds import Split


@dataclass(frozen=True)
class VideoEvaluation:
    """How much is measured."""

    subjects: int = 10
    expressions: int = 8
    driver_frames: int = 48
    window: int = 16
    """Consecutive frames that flicker is measured on."""
    split: Split = "test"
    tracking: Literal["pixels", "truth"] = "pixels"


def evaluate_video(
    out: Path, head: Head, model: VideoModel, sample: SampleConfig, config: VideoEvaluation = VideoEvaluation(),
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Measure retrieval and flicker; writes OUT/metrics.json and keeps the pairs in OUT/pairs.

    `identity_top1`: share of subjects whose frame is nearest to their own truth. `expression_top3`: share of driven
    expressions whose truth is among the three nearest.
    """
    began = time.monotonic()
    size, crop = model.config.size, model.config.expression.size
    generator = DiffusionGenerator(model, sample)
    make = track_pair if config.tracking == "pixels" else make_pair
    pairs = [
        make(out / "pairs" / f"{i}", head, i, config.driver_frames, size, crop, config.split)
        for i in progress(range(config.subjects), "pairs")
    ]
    identity = identity_ranks(pairs, head, generator, progress)
    expression = expression_ranks(pairs, head, generator, config.expressions, progress)
    result: dict[str, Any] = {
        "identity_top1": (identity == 0).float().mean().item(), "identity_ranks": identity.tolist(),
        "expression_top1": (expression == 0).float().mean().item(),
        "expression_top3": (expression < 3).float().mean().item(), "expression_ranks": expression.tolist(),
    }  # fmt: skip
    clips = [_flicker(pair, head, generator, config.window) for pair in progress(pairs, "flicker")]
    result |= {k: sum(c[k] for c in clips) / len(clips) for k in clips[0]}
    result["config"] = {**vars(config), "sample": sample.described(), "seconds": round(time.monotonic() - began, 1)}
    write_json(out / "metrics.json", result)
    return result


def _flicker(pair: Pair, head: Head, generator: DiffusionGenerator, window: int) -> dict[str, float]:
    """Generate consecutive frames from the front: their error and flicker, with temporal modules and without."""
    size = pair.portrait.camera.width
    n = min(window, len(pair.driving))
    camera = clip_cameras(head, pair.portrait, 8, size)[:1].expand(n)
    shots = pair.driving.select(list(range(n)))
    shots = replace(shots, params=with_identity_of(pair.portrait, still_head(shots.params)))
    truth = truth_frames(pair, head, pair.truth_params[torch.arange(n)], camera)

    def measure(suffix: str) -> dict[str, float]:
        made = generator.generate(GenerationRequest(pair.portrait, shots, head), camera)
        found = score(truth, made.rgb, made.normal)
        return {
            f"psnr_fg{suffix}": found["psnr_fg"], f"psnr_face{suffix}": found["psnr_face"],
            f"flicker{suffix}": flicker(made.rgb, truth.rgb, truth.mask),
            f"flicker_normal{suffix}": flicker(made.normal / 2, truth.normal / 2, truth.mask),
        }  # fmt: skip

    out = measure("")
    if generator.model.temporal:
        with without_temporal_modules(generator.model):
            out |= measure("_without_temporal")
    return out
