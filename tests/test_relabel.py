"""Training stores as tracked: what the conditions show must lie on the pictures, in every view."""

from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.data.footage.render import build_store
from geodiff4d.data.footage.rendered import RenderedFootage, Store, StoreConfig
from geodiff4d.data.footage.take import FrameKey
from geodiff4d.data.rowstore import take
from geodiff4d.evaluate.metrics import psnr
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.relabel import relabel, render_tracked

CONFIG = StoreConfig(
    subjects=1, instants=2, views=3, size=192, reference_views=2, supersample=1, crop=32, texels=128, grid=12,
    parameters="tracked",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return build_store(tmp_path_factory.mktemp("store"), CONFIG, workers=1, render=render_tracked)


def carried(store: Store, portrait: tuple[int, int], view: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    warp, seen = RenderedFootage(store).warped(FrameKey(0, *portrait), [FrameKey(0, 0, view)], 192, surroundings=True)
    return warp[0], seen[0, :1], take(store.rgb, (0, 0, view), 255.0)


def test_portraits_lie_on_themselves_and_on_other_views(store):
    own, seen, truth = carried(store, (0, 0), 0)
    assert psnr(own[None], truth[None], seen[None]) > 30
    for view in (1, 2):
        moved, seen, truth = carried(store, (0, 0), view)
        unmoved = take(store.rgb, (0, 0, 0), 255.0)
        assert seen.mean() > 0.05
        assert psnr(moved[None], truth[None], seen[None]) > psnr(unmoved[None], truth[None], seen[None]) + 3


def test_mesh_covers_the_face(store):
    normal, pose = (take(x, (0,), 255.0).flatten(0, 1) * 2 - 1 for x in (store.normal, store.pose))
    foreground, mesh = (x.square().sum(1) > 0.25 for x in (normal, pose))
    assert (foreground & mesh).sum() > 0.95 * mesh.sum()


def test_a_picture_without_a_face_keeps_the_others_going(store, tmp_path):
    class Blind(EmbeddedDetector):
        def detect(self, images, video=False):
            found = super().detect(images, video)
            found[2] = found[3] = None
            return found

    before = store.pose[0].copy(), store.T_cam_world[0].copy()
    writable = Store(copytree(store.folder, tmp_path / "copy"), writable=True)
    assert relabel(writable, 0, Blind()) == 2
    # The second instant's first view is lost, and with it the instant: nothing of it changes.
    assert (writable.pose[0, 1] == before[0][1]).all() and (writable.T_cam_world[0, 1] == before[1][1]).all()
    assert np.isfinite(writable.T_cam_world[0]).all()
    moved, seen, truth = carried(writable, (0, 0), 2)
    unmoved = take(writable.rgb, (0, 0, 0), 255.0)
    assert psnr(moved[None], truth[None], seen[None]) > psnr(unmoved[None], truth[None], seen[None]) + 2


def test_other_parameters_are_another_store(tmp_path):
    small = replace(CONFIG, instants=1, views=2, size=64, grid=4, texels=32, parameters="disturbed")
    build_store(tmp_path, small, workers=1)
    with pytest.raises(UserError, match="another configuration"):
        build_store(tmp_path, replace(small, parameters="tracked"), workers=1, render=render_tracked)
