"""Does a generated frame show its own person and expression? Retrieval among truths answers without a threshold.

A blurred average of everyone may score well pixel by pixel; it is as near to one person as to the next.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.progress import Progress, silent
from geodiff4d.evaluate.metrics import psnr
from geodiff4d.evaluate.pairs import Pair, truth_frames
from geodiff4d.heads import Head, HeadParams
from geodiff4d.pipeline import clip_cameras
from geodiff4d.video.generate import GenerationRequest, Generator
from geodiff4d.video.inputs import still_head, with_identity_of

VIEWS, VIEW = 8, 3
"""The capture cameras, and the one that retrieval looks through: from the side, so that copying the portrait fails."""


def ranks(scores: Float[Tensor, "queries candidates"], own: Int[Tensor, " queries"]) -> Int[Tensor, " queries"]:
    """Place of every query's own candidate, 0 for the best; higher scores are nearer, ties count against it."""
    mine = scores.gather(1, own[:, None])
    return (scores >= mine).sum(1) - 1


def identity_ranks(
    pairs: Sequence[Pair], head: Head, generator: Generator, progress: Progress = silent
) -> Int[Tensor, " subjects"]:
    """Drive every portrait by the first pair's driver: whose truth, of all subjects', is a frame nearest to?

    Nearness is PSNR of the whole picture on grey, so that no subject's mask favours it.
    """
    first = pairs[0]
    k = len(first.driving) // 2
    made, truths = [], []
    for pair in progress(pairs, "identities"):
        size = pair.portrait.camera.width
        camera = clip_cameras(head, pair.portrait, VIEWS, size)[VIEW : VIEW + 1]
        shot = first.driving.select([k])
        shot = replace(shot, params=with_identity_of(pair.portrait, still_head(shot.params)))
        made.append(generator.generate(GenerationRequest(pair.portrait, shot, head), camera).rgb[0])
        m = first.truth_params[k : k + 1]
        motion = pair.subject.params(m.expr, jaw_pose=m.jaw_pose, eyes_pose=m.eyes_pose)
        truths.append(truth_frames(pair, head, motion, camera).rgb[0])
    scores = psnr(torch.stack(made)[:, None], torch.stack(truths)[None])
    return ranks(scores, torch.arange(len(made)))


def expression_ranks(
    pairs: Sequence[Pair], head: Head, generator: Generator, count: int = 8,
    progress: Progress = silent,
) -> Int[Tensor, "subjects expressions"]:  # fmt: skip
    """Drive every portrait to `count` expressions: which truth's mouth and eyes is a frame nearest to?

    The expressions are those of its driver that differ most. Nearness is PSNR where any of the truths shows mouth or
    eyes, from the front.
    """
    rows = []
    for pair in progress(pairs, "expressions"):
        size = pair.portrait.camera.width
        camera = clip_cameras(head, pair.portrait, VIEWS, size)[:1]
        index = distinct(pair.truth_params, count)
        made = []
        for k in index:  # Each alone: they are no film, and temporal modules would take them for one.
            shot = pair.driving.select([k])
            shot = replace(shot, params=with_identity_of(pair.portrait, still_head(shot.params)))
            made.append(generator.generate(GenerationRequest(pair.portrait, shot, head), camera).rgb)
        made = torch.cat(made)
        truth = truth_frames(pair, head, pair.truth_params[torch.tensor(index)], camera.expand(count))
        where = truth.face.amax(0).expand(count, count, -1, -1, -1)
        rows.append(
            ranks(psnr(made[:, None], truth.rgb[None].expand(count, -1, -1, -1, -1), where), torch.arange(count))
        )
    return torch.stack(rows)


def distinct(params: HeadParams, count: int) -> list[int]:
    """Choose frames whose expressions lie far apart: the most neutral, then always the farthest from those chosen."""
    expr = params.expr
    chosen = [int(expr.square().sum(1).argmin())]
    while len(chosen) < min(count, len(expr)):
        apart = torch.cdist(expr, expr[chosen]).amin(1)
        chosen.append(int(apart.argmax()))
    return sorted(chosen)
