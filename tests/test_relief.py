"""What surrounds a head in a portrait: lifted, carried, and drawn under the mesh."""

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import composite
from geodiff4d.evaluate.metrics import psnr
from geodiff4d.heads import load_head
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.relief import Relief, carry_relief, lift, lift_portrait, render_lifted
from geodiff4d.render.viewpoints import orbit, world_region

SIZE = 64


@pytest.fixture(scope="module")
def head():
    return load_head()


def views(head, *azimuth: float) -> Camera:
    a = torch.tensor(azimuth)
    cameras = canonical_crop(orbit(a[:1], torch.zeros(1), SIZE), head.template[world_region()])
    others = orbit(a, torch.zeros_like(a), SIZE)
    return Camera(others.T_cam_world, cameras.K.expand(len(a), 3, 3), SIZE, SIZE)


@pytest.fixture(scope="module")
def portrait(head):
    """A head with a smooth halo of hair and shoulders: image and mask."""
    camera = views(head, 0.0)[0]
    y, x = torch.meshgrid(*[(torch.arange(SIZE) + 0.5) / SIZE] * 2, indexing="ij")
    mask = (((x - 0.5) / 0.36) ** 2 + ((y - 0.45) / 0.42) ** 2 < 1) | (y > 0.85)
    mask = mask[None].float()
    image = torch.stack([0.5 + 0.4 * torch.sin(9 * x), 0.5 + 0.4 * torch.cos(8 * y), 0.3 + 0.4 * x])
    return composite(image, mask), mask, camera


def test_the_portraits_own_view_comes_back(head, portrait):
    image, mask, camera = portrait
    mesh = head.pose(head.neutral())
    lifted = lift_portrait(head, image, mask, mesh, camera, 64)
    rgb, _, shown = render_lifted(lifted, head.pose(head.neutral(1)), Camera.stack([camera]))
    # The mesh alone leaves hair and shoulders out.
    bare = lift_portrait(head, image, mask, mesh, camera, 64, surroundings=False)
    alone, _, inside = render_lifted(bare, head.pose(head.neutral(1)), Camera.stack([camera]))
    assert psnr(rgb, image[None], mask[None]).item() > 30 > psnr(alone, image[None], mask[None]).item() + 8
    assert (shown.round() - mask).abs().mean() < 0.02 < (inside - mask).abs().mean()


def test_the_sheet_follows_the_head_and_reads_nothing_else(head, portrait):
    _, mask, camera = portrait
    sheet = lift(head, head.pose(head.neutral()), camera, mask)
    turn = head.neutral()
    turn.rotation[1], turn.translation[0], turn.jaw_pose[0] = 0.4, 0.03, 0.3
    still, turned = (sheet.pose(head.pose(p).T_world_joint) for p in (head.neutral(), turn))
    seen = sheet.follows >= 0
    assert still[seen].isfinite().all() and still[~seen].isnan().all()
    # A global turn is rigid whatever a point follows; an open jaw moves no hair.
    d = (still[seen][:, None] - still[seen]).norm(dim=-1)
    assert_close((turned[seen][:, None] - turned[seen]).norm(dim=-1), d, atol=1e-5, rtol=0)
    neck = head.neutral()
    neck.neck_pose[1] = 0.4
    bent = (sheet.pose(head.pose(neck).T_world_joint) - still)[seen].norm(dim=-1)
    height = still[seen][:, 1]
    low = height < height.amin() + 0.02
    assert bent[low].max() < 0.2 * bent.max(), "shoulders stay when the neck turns"


def test_where_the_portrait_shows_nothing_nothing_is_shown(head, portrait):
    image, mask, camera = portrait
    mesh = head.pose(head.neutral())
    nothing = lift(head, mesh, camera, torch.zeros_like(mask))
    assert (nothing.follows == -1).all()
    batch = Relief(nothing.points[None], nothing.follows[None])
    image = torch.cat([image, torch.zeros_like(mask)])[None]
    rgb, alpha = carry_relief(batch, image, head.pose(head.neutral(1)).T_world_joint, Camera.stack([camera]))
    assert rgb.isfinite().all() and alpha.max() == 0
    # A head that is not in the image at all leaves no outline to continue.
    away = head.neutral()
    away.translation[0] = 5.0
    assert (lift(head, head.pose(away), camera, mask).follows == -1).all()


def test_hair_comes_along_into_another_view(head, portrait):
    image, mask, camera = portrait
    lifted = lift_portrait(head, image, mask, head.pose(head.neutral()), camera, 64)
    side = views(head, 20.0)
    _, normals, shown = render_lifted(lifted, head.pose(head.neutral(1)), side)
    bare = lift_portrait(head, image, mask, head.pose(head.neutral()), camera, 64, surroundings=False)
    _, _, inside = render_lifted(bare, head.pose(head.neutral(1)), side)
    around = (shown > 0.5) & (inside == 0)
    assert around.float().mean() > 0.05
    length = normals.square().sum(1, keepdim=True).sqrt()
    assert_close(length[shown > 0.5], torch.ones_like(length[shown > 0.5]), atol=1e-4, rtol=0)
