"""The page in a real browser: the same pixels as our renderer, the same pose, no request, refusals, and its speed.

Needs Chromium; `GEODIFF4D_AVATAR` names an avatar to look at instead of a painted one.
"""

import base64
import json
import os
from pathlib import Path

import pytest
import torch

from avatars import painted_avatar, talking
from browser import CHROMIUM, Browser
from geodiff4d.avatar.compact import open_avatar
from geodiff4d.avatar.drive import held, own_performance
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.images import decode_image, write_image
from geodiff4d.heads import load_head
from geodiff4d.viewer.page import write_page
from geodiff4d.viewer.scene import pose_rows
from geodiff4d.viewer.studio import Studio, View

READY = "document.body !== null && /ready|failed/.test(document.body.className)"
EXPRESSIONS = (
    {}, {"jawOpen": 0.7}, {"mouthSmileLeft": 1, "mouthSmileRight": 1}, {"eyeBlinkLeft": 1, "eyeBlinkRight": 1},
    {"browInnerUp": 1}, {"browDownLeft": 1, "browDownRight": 1}, {"mouthPucker": 1},
    {"eyeLookOutLeft": 1, "eyeLookInRight": 1},
    {"eyeLookUpLeft": 0.8, "eyeLookUpRight": 0.8}, {"mouthFunnel": 0.8, "jawOpen": 0.3}, {"cheekPuff": 1},
    {"jawOpen": 0.4, "mouthSmileLeft": 0.8, "eyeBlinkRight": 1, "noseSneerLeft": 0.5},
)  # fmt: skip
VIEWS = (View(), View(yaw_deg=35, pitch_deg=10), View(yaw_deg=-30, zoom=0.8))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    if "GEODIFF4D_AVATAR" in os.environ:
        return open_avatar(Path(os.environ["GEODIFF4D_AVATAR"]))
    head = load_head()
    return painted_avatar(head, talking(head), gaussians=25_000, size=256)


@pytest.fixture(scope="module")
def file(avatar, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "me.html"
    assert write_page(avatar, own_performance(avatar), path) < 3_000_000
    return path


@pytest.fixture(scope="module")
def browser(file, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(file.as_uri(), READY)
        yield browser


def shot(browser: Browser, row, view: View, size: int, normals: bool = False) -> torch.Tensor:
    asked = {
        "width": size, "height": size, "normals": normals,
        "look": {"yaw": view.yaw_deg, "pitch": view.pitch_deg, "zoom": view.zoom},
    }  # fmt: skip
    call = f"geodiff4d.stage.shot({{...{json.dumps(asked)}, row: Float32Array.from({json.dumps(row.tolist())})}})"
    return decode_image(base64.b64decode(browser.run(call).partition(",")[2]), "the page's image")[:3]


def test_the_same_pixels_as_our_renderer(browser, avatar, tmp_path):
    """12 expressions by 3 views: at least 38 dB in the foreground."""
    names, size = avatar.head.expression_names, avatar.camera.height
    studio = Studio(avatar, own_performance(avatar), size)
    worst, rows = 99.0, []
    for asked in EXPRESSIONS:
        weights = torch.zeros(1, len(names))
        for name, value in asked.items():
            weights[0, names.index(name)] = value
        params = held(avatar, weights).params
        line = []
        for view in VIEWS:
            with torch.no_grad():
                ours = avatar.render(params[0], studio.turned(view), 0.5)
            theirs = shot(browser, pose_rows(params)[0], view, size)
            inside = ours.alpha[0] > 0.5
            error = (ours.rgb.clamp(0, 1) - theirs)[:, inside].square().mean()
            worst = min(worst, float(-10 * error.log10()))
            line += [ours.rgb.clamp(0, 1), theirs]
        rows.append(torch.cat(line, -1))
    write_image(tmp_path / "all.png", torch.cat(rows, 1))
    print(f"worst {worst:.1f} dB, {tmp_path / 'all.png'}")
    assert worst > 38


def test_normals_and_the_fitted_sequence(browser, avatar):
    studio = Studio(avatar, own_performance(avatar), avatar.camera.height)
    row = pose_rows(avatar.sequence)[1]
    ours = studio.render(View(normals=True, play=True, yaw_deg=20), 1)
    theirs = shot(browser, row, View(yaw_deg=20), avatar.camera.height, normals=True)
    error = (ours - theirs).square().mean()
    assert float(-10 * error.log10()) > 38
    kept = browser.run("Array.from(geodiff4d.stage.fitted.frame(1))")
    assert (torch.tensor(kept) - torch.from_numpy(row)).abs().max() < 1e-3


def test_nothing_leaves_the_page(browser, file):
    local = [r for r in browser.requests if not r.startswith(("blob:", "data:"))]
    assert local == [file.as_uri()] and browser.messages == []
