"""The warm start of the expression encoder, and the readout of motion from its latents."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from geodiff4d.data.sampling import Samples
from geodiff4d.heads import load_head
from geodiff4d.video.batches import Batches
from geodiff4d.video.expression import ExpressionEncoder
from geodiff4d.video.vae import PatchCodec
from geodiff4d.video.warm_start import REGIONS, fit_motion_code, warm_start
from tiny import EMBEDDED, tiny_batches, tiny_codec


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return tiny_codec()


@pytest.fixture(scope="module")
def batches(codec, tmp_path_factory) -> Batches:
    return tiny_batches(codec, tmp_path_factory.mktemp("store"))


def test_motion_codes_keep_what_moves():
    """Left and right lids, jaw and gaze each move their own components; head pose and shape move none."""
    head = load_head()
    n = len(head.expression_names)
    zero = head.neutral(2 * n)
    jaw = torch.randn(2 * n, 3, generator=torch.Generator().manual_seed(0)) * 0.05
    sample = replace(zero, expr=torch.cat([torch.eye(n), 0.5 * torch.eye(n)]), jaw_pose=jaw)
    gaze = torch.randn(zero.eyes_pose.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    code = fit_motion_code(head, replace(sample, eyes_pose=gaze))
    sides = [r.side for r in REGIONS]
    ends = np.cumsum([0] + [b.shape[1] for b in code.basis])
    left, right = (slice(ends[sides.index(s)], ends[sides.index(s) + 1]) for s in (1, -1))

    def moved(**change: torch.Tensor) -> torch.Tensor:
        return (code(head, replace(head.neutral(1), **change)) - code(head, head.neutral(1)))[0]

    blink = torch.eye(n)[head.expression_names.index("eyeBlinkLeft")][None]
    assert moved(expr=blink)[left].norm() > 20 * moved(expr=blink)[right].norm()
    assert moved(jaw_pose=torch.tensor([[0.2, 0.0, 0.0]]))[: ends[1]].norm() > 1
    looked = moved(eyes_pose=torch.full_like(head.neutral(1).eyes_pose, 0.2))
    assert looked[-4:].abs().min() > 0.5 > looked[: ends[1]].norm()
    assert moved(rotation=torch.ones(1, 3), shape=torch.ones_like(head.neutral(1).shape)).norm() == 0


def test_a_warm_encoder_knows_what_the_store_shows(batches):
    torch.manual_seed(0)
    encoder = ExpressionEncoder(EMBEDDED.expression)
    losses: list[float] = []
    plain = Samples(batches.samples.sources, batches.samples.pairs, replace(batches.samples.read, augment=None))
    warm_start(encoder, plain, 80, False, lambda r: losses.append(r["loss"]), lr=4e-3, crops=24)
    assert losses[-1] < 0.85 * losses[0], losses
