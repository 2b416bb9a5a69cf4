"""Training data as tracked: what the tracker sees in a store's pictures, in place of the truth with an error.

The disturbed truth (`world/tracker_error.py`) keeps a person's exact shape, which no tracker finds, and errs anew in
every picture. A tracker finds nearly the mean head, and errs alike where pictures are alike: pitch is confounded with
identity. A model learns how far to trust its conditions from those that it is trained on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.data.footage.render import render_subject, write_conditions
from geodiff4d.data.footage.rendered import Store, foreground
from geodiff4d.data.rowstore import take
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.viewpoints import openhead
from geodiff4d.tracking.detect import Detection, Detector
from geodiff4d.tracking.fit import fit
from geodiff4d.tracking.placed import placed
from geodiff4d.world.tracker_error import moved_as_tracked


def render_tracked(folder: Path, s: int) -> None:
    """Render a person into the rows of a store, with what the embedded tracker sees; for `build_store`."""
    from geodiff4d.tracking.embedded import EmbeddedDetector

    render_subject(folder, s)
    relabel(Store(folder, writable=True), s, EmbeddedDetector())


@torch.no_grad()
def relabel(store: Store, s: int, detector: Detector) -> int:
    """Track a rendered person's pictures, and write the conditions anew; returns how many pictures show no face.

    Targets take the shape that one portrait shows, and stand where each picture's tracked head is, as when driving.
    An instant in whose first view no face is found keeps its conditions.
    """
    head, c = openhead(), store.config
    rgb = take(store.rgb, (s,), 255.0)
    detections = detector.detect(list(rgb.flatten(0, 1)), video=True)
    rows = [detections[i : i + c.views] for i in range(0, len(detections), c.views)]
    first = next((d for row in rows for d in row[:1] if d is not None), None)
    if first is None:
        return len(detections)
    shape = fit(head, [first], c.size, c.size).params.shape
    motion, lost = store.motion(np.full(c.instants, s), np.arange(c.instants)), 0
    for i, row in enumerate(rows):
        seen = [_found(head, d, shape, c.size) for d in row]
        lost += sum(x is None for x in seen)
        if seen[0] is not None:
            _write(store, s, i, rgb[i], seen, motion[i : i + 1])
    return lost


def _found(
    head: Head, detection: Detection | None, shape: Float[Tensor, "1 shapes"], size: int
) -> tuple[HeadParams, Camera] | None:
    """Fit a picture's head, in the person's shape."""
    if detection is None:
        return None
    try:
        found = fit(head, [detection], size, size)
    except UserError:
        return None
    return placed(head, replace(found.params, shape=shape), found.params, found.camera), found.camera


def _write(
    store: Store, s: int, i: int, rgb: Float[Tensor, "views 3 size size"],
    seen: Sequence[tuple[HeadParams, Camera] | None], motion: HeadParams,
) -> None:  # fmt: skip
    head, c = openhead(), store.config
    assert seen[0] is not None
    common = seen[0][0]
    standing = head.pose(common.without_expression())
    root = standing.T_world_joint[0, 0]
    # Without expression all views see one rigid head: let it stand still, and the cameras take up the difference.
    cameras, posed = [], []
    before = Camera(take(store.T_cam_world, (s, i)), take(store.K, (s, i)), c.size, c.size)
    was = take(store.T_world_joint, (s, i))[0]
    for k, found in enumerate(seen):
        if found is None:
            cameras.append(replace(before[k], T_cam_world=before[k].T_cam_world @ was @ root.inverse()))
        else:
            own = head.pose(found[0].without_expression()).T_world_joint[0, 0]
            cameras.append(replace(found[1], T_cam_world=found[1].T_cam_world @ own @ root.inverse()))
        if k < c.reference_views:
            params = common if found is None else found[0]
            here = replace(params, rotation=common.rotation, translation=common.translation)
            posed.append(head.pose(here)[0])
    moved = head.pose(moved_as_tracked(common, motion, c.seed * 100_000 + s * 1000 + i)).vertices[0]
    mask = foreground(take(store.normal, (s, i), 255.0))
    write_conditions(store, s, i, rgb, mask, posed, standing[0], moved, Camera.stack(cameras))
