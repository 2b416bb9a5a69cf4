"""How far landmarks and a face reader are to be believed, measured on performances of people whom neither has seen."""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.video import read_video
from geodiff4d.evaluate.tracking_videos import REST_FRAMES, performances, render_video
from geodiff4d.render.viewpoints import openhead
from geodiff4d.tracking.blend import FIT_ALONE, fitted_blend
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.fit import fit
from geodiff4d.tracking.observe import readings_of
from geodiff4d.tracking.problem import HeadFitConfig
from geodiff4d.tracking.reader import FaceReader
from geodiff4d.tracking.reader_data import visible_coefficients
from geodiff4d.tracking.reader_scenes import mirrored_targets
from geodiff4d.tracking.track import TrackingConfig, locate
from geodiff4d.world.subject import SyntheticSubject

FIRST = 10
"""The first ten people of val are what is chosen on (`evaluate tracking`); those after them are taken here."""


def measured_blend(
    folder: Path, reader: FaceReader, people: int, frames: int, progress: Progress = silent
) -> Float[Tensor, "2 3 targets"]:
    """Track performances of `people` of the val split and return what brings fit and reading nearest to the truth,
    for fits to landmarks and for those whose pixels were aligned.

    Videos in FOLDER are kept, so that another reader is measured on the same.

    Raises:
        UserError: no video could be tracked.
    """
    head, order_sign = openhead(), mirrored_targets()
    blend = reader.blend.clone()
    reader.blend.copy_(FIT_ALONE.expand_as(blend))
    rows: list[Tensor] = []
    detector, config = EmbeddedDetector(reader=reader), TrackingConfig(fit=HeadFitConfig(blinks=False))
    try:
        for video in progress(performances(FIRST + people, "val", frames, 256)[2 * FIRST :], "measuring the reader"):
            path = folder / f"{video.name}.mp4"
            truth = render_video(path, video)
            try:
                located = locate(lambda path=path: read_video(path), head, detector, config, True)
            except UserError:
                continue
            reading, whole = readings_of(located.detections), located.fit.camera
            assert reading is not None
            alone = fit(head, located.detections, whole.width, whole.height, float(whole.K[0, 0]), config.fit)
            expr = visible_coefficients(SyntheticSubject(video.seed, "val").rig, truth.expr)
            said = (alone.params, located.fit.params, reading, replace(truth, expr=expr))
            row = torch.stack([torch.cat([p.expr, p.jaw_pose, p.eyes_pose], 1) for p in said])
            rows += [row, row[..., order_sign[0]] * order_sign[1]]
    finally:
        reader.blend.copy_(blend)
    if not rows:
        raise UserError("the reader cannot be measured: no performance could be tracked; train it further")
    alone, aligned, read, true = torch.stack(rows, 1)
    return torch.stack([fitted_blend(fitted, read, true, REST_FRAMES) for fitted in (alone, aligned)])
