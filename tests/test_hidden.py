"""Colours of what a portrait hides: the inside of a closed mouth, lids, and irises under them."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.heads import Head, load_head
from geodiff4d.render.hidden import complete_eyes, eyes_and_lids, face_light, inner_light, met_lids, paint_hidden
from geodiff4d.render.meshes import interpolate, rasterize, rasterize_uv
from geodiff4d.render.viewpoints import orbit
from geodiff4d.render.warp import complete, sample_completed

TEXELS, SIZE = 128, 128


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head("openhead")


@pytest.fixture(scope="module")
def atlas(head):
    return rasterize_uv(head.uv, head.uv_faces, TEXELS)


def front():
    return orbit(torch.tensor([0.0]), torch.tensor([0.0]), SIZE)[0]


def iris(head: Head, side: str) -> torch.Tensor:
    """Colours of vertices: a dark disc of 0.5 rad on white, around +z of the eye's middle."""
    ball = head.template[head.regions[side]]
    ray = torch.nn.functional.normalize(head.template - (ball.amin(0) + ball.amax(0)) / 2, dim=-1)
    dark = (ray[:, 2] > torch.cos(torch.tensor(0.5))).float()[:, None]
    return 0.8 - dark * torch.tensor([0.6, 0.5, 0.4])


def test_an_iris_goes_on_under_the_lids(head, atlas):
    side = head.regions["left_eye"]
    truth = interpolate(atlas, head.faces, iris(head, "left_eye"))
    inside = interpolate(atlas, head.faces, side.float()[:, None])[0] > 0.99
    height = interpolate(atlas, head.faces, head.template)[1]
    below = (height < height[inside].median()).float()[None]
    completed = complete_eyes(head, truth * below, below, atlas)
    hidden = inside & (below[0] == 0)
    before = ((truth * below - truth).abs().mean(0) * hidden).sum() / hidden.sum()
    after = ((completed - truth).abs().mean(0) * hidden).sum() / hidden.sum()
    assert after < 0.15 * before
    assert_close(completed[:, below[0] == 1], truth[:, below[0] == 1])


def test_an_eye_that_nobody_sees_is_white(head, atlas):
    nothing = torch.zeros(3, TEXELS, TEXELS)
    eye = interpolate(atlas, head.faces, head.regions["right_eye"].float()[:, None])[0] > 0.99
    assert (complete_eyes(head, nothing, nothing[:1], atlas)[:, eye] > 0.6).all()


def test_a_mouth_is_dark_inside_and_its_front_teeth_are_not(head):
    light = inner_light(head)
    assert light.min() >= 0 and light.max() <= 1
    teeth, mouth = light[head.regions["teeth"]], light[head.regions["mouth"]]
    assert teeth.quantile(0.9) > 2 * mouth.median()
    order = head.template[head.regions["teeth"]][:, 2].argsort()
    assert teeth[order[-100:]].mean() > 2 * teeth[order[:100]].mean()


@pytest.mark.parametrize("dim", [0.25, 0.5])
def test_teeth_stand_in_the_portraits_light(head, atlas, dim):
    """A darker photograph has darker teeth, and what the portrait shows stays."""
    teeth = interpolate(atlas, head.faces, head.regions["teeth"].float()[:, None])[0] > 0.99
    grey = torch.full((3, TEXELS, TEXELS), 0.7)
    nowhere, everywhere = torch.zeros(1, TEXELS, TEXELS), torch.ones(1, TEXELS, TEXELS)
    bright = paint_hidden(head, grey, nowhere, everywhere, atlas)[:, teeth].mean()
    dark = paint_hidden(head, grey * dim, nowhere, everywhere, atlas)[:, teeth].mean()
    assert dark < bright
    assert_close(paint_hidden(head, grey, everywhere, everywhere, atlas)[:, teeth], grey[:, teeth])


def test_light_is_that_of_the_brightest_skin():
    image = torch.full((3, 20, 20), 0.2)
    image[:, :4] = 0.7
    everywhere = torch.ones(20, 20, dtype=torch.bool)
    assert face_light(image, everywhere) > face_light(image * 0.5, everywhere)
    assert face_light(image, ~everywhere) == 1.0


def test_a_blink_shows_skin_and_not_drawn_out_lashes(head):
    """Skin is light and everything near the eye's edge dark: closed, the lid has the colour of the skin."""
    still = head.neutral(1)
    skin, dark = torch.tensor([0.8, 0.6, 0.5]), torch.tensor([0.1, 0.08, 0.07])
    near = (head.regions["lids"] | head.regions["eyes"])[:, None].float()
    colours = skin + near * (dark - skin)
    camera = front()
    fragments = rasterize(head.template, head.faces, camera)
    image = interpolate(fragments, head.faces, colours) + 0.5 * (~fragments.mask)
    portrait = complete(head, image, head.template, camera, texels=TEXELS)
    blink = torch.zeros(1, len(head.expression_names))
    blink[:, [head.expression_names.index(f"eyeBlink{side}") for side in ("Left", "Right")]] = 1.0
    closed = head.pose(replace(still, expr=blink))
    rgb, _, _ = sample_completed(portrait, rasterize(closed.vertices[0], closed.faces, camera), SIZE, SIZE)
    middle = head.template[head.regions["left_eye"]].mean(0)
    x, y = camera.project(middle[None] + torch.tensor([[0.0, 0.002, 0.012]]))[0][0].round().long().tolist()
    assert_close(rgb[:, y, x], skin, atol=0.15, rtol=0)


def test_lids_that_have_met_are_parted_by_a_dark_line(head):
    """The lower lid's wet rim is light: open, it is seen; closed, nothing lighter than skin is left of it."""
    skin, rim = torch.tensor([0.6, 0.45, 0.4]), torch.tensor([0.9, 0.8, 0.8])
    colours = torch.where(head.regions["lids"][:, None], rim, skin)
    colours = torch.where(head.regions["eyes"][:, None], torch.tensor([0.2, 0.2, 0.2]), colours)
    camera = front()
    opened = rasterize(head.template, head.faces, camera)
    image = interpolate(opened, head.faces, colours) + 0.5 * (~opened.mask)
    portrait = complete(head, image, head.template, camera, texels=TEXELS)
    blink = torch.zeros(1, len(head.expression_names))
    blink[:, [head.expression_names.index(f"eyeBlink{side}") for side in ("Left", "Right")]] = 1.0
    closed = head.pose(replace(head.neutral(1), expr=blink))
    shut = rasterize(closed.vertices[0], closed.faces, camera)
    views = {"open": opened, "shut": shut}
    edges = {k: interpolate(f, head.faces, eyes_and_lids(head)[:, 1:].float()) > 0.9 for k, f in views.items()}
    rgb = {k: sample_completed(portrait, f, SIZE, SIZE)[0].mean(0, keepdim=True) for k, f in views.items()}
    assert edges["shut"].sum() > 8 and edges["open"].sum() > 8
    assert (rgb["open"][edges["open"]] > skin.mean() + 0.1).float().mean() > 0.5
    assert (rgb["shut"][edges["shut"]] < skin.mean() + 0.02).float().mean() > 0.95


def test_lids_have_met_where_no_eye_is_beside_them():
    edge = torch.zeros(1, 1, 100, 100)
    edge[..., 40:42, 20:80] = 1
    eye = torch.zeros_like(edge)
    eye[..., 42:52, 60:80] = 1
    met = met_lids(edge, eye)
    assert (met[..., 40:42, 20:55] == 1).all() and (met[..., 41, 64:76] == 0).all()
    assert (met * (1 - edge) == 0).all()
    assert (met_lids(edge, torch.zeros_like(edge)) == edge).all()


def test_the_own_view_is_the_portraits(head):
    """Nothing is stretched where the head stands as it was seen."""
    camera = front()
    fragments = rasterize(head.template, head.faces, camera)
    waves = 0.5 + 0.4 * torch.sin(head.template * 120)
    image = interpolate(fragments, head.faces, waves) + 0.5 * (~fragments.mask)
    portrait = complete(head, image, head.template, camera, texels=TEXELS)
    rgb, visible, _ = sample_completed(portrait, fragments, SIZE, SIZE)
    sure = visible[0] > 0.99
    assert sure.float().mean() > 0.2
    assert_close(rgb[:, sure], image[:, sure], atol=0.02, rtol=0)
