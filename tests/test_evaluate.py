"""Metrics on cases with a known answer; a report that is whole, harmless and complete."""

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import decode_normals, encode_normals, read_image, write_image
from geodiff4d.core.video import write_video
from geodiff4d.evaluate import metrics
from geodiff4d.evaluate.demo import DEBUG, run_demo
from geodiff4d.evaluate.metrics import Estimate, PairScores, Truth
from geodiff4d.evaluate.report import (
    Grid,
    Note,
    Picture,
    Plot,
    Report,
    Section,
    Table,
    Video,
    build_report,
    interval_plot,
)


@pytest.fixture
def noise():
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2


@pytest.fixture
def box():
    """A foreground of 12×12 pixels in the middle of 24×24."""
    mask = torch.zeros(2, 1, 24, 24)
    mask[..., 6:18, 6:18] = 1
    return mask


def facing(count, size):
    return torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).repeat(count, 1, size, size)


# Metrics


def test_psnr_of_a_known_error(noise, box):
    torch.testing.assert_close(metrics.psnr(noise + 0.1, noise), torch.full((2,), 20.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(metrics.psnr(noise, noise, box), torch.full((2,), metrics.PSNR_CEILING_DB))


def test_psnr_is_blind_outside_its_mask(noise, box):
    """The warning this package is built around: a right background must not buy anything, nor a wrong one cost."""
    wrong_head = noise + 0.1 * box
    wrong_background = wrong_head + 0.1 * (1 - box)
    inside = metrics.psnr(wrong_head, noise, box)
    torch.testing.assert_close(inside, metrics.psnr(wrong_background, noise, box))
    torch.testing.assert_close(
        metrics.psnr(wrong_head, noise) - inside, torch.full((2,), 10 * math.log10(4)), atol=1e-3, rtol=0
    )


def test_an_empty_mask_measures_nothing(noise, box):
    empty = torch.zeros_like(box)
    for value in (
        metrics.psnr(noise, noise, empty),
        metrics.normal_deg(noise, noise, empty),
        metrics.sharpness(noise, noise, empty),
        metrics.silhouette_iou(empty, empty),
        metrics.ssim(noise, noise, empty),
    ):
        assert value.isnan().all()


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 179.0))
def test_normal_error_is_the_angle(angle):
    truth = facing(1, 8)
    tilted = torch.zeros_like(truth)
    tilted[:, 0], tilted[:, 2] = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    found = metrics.normal_deg(tilted, truth, torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(found, torch.tensor([angle]), atol=2e-4, rtol=1e-4)


def test_missing_normals_face_the_camera(box):
    truth = facing(2, 24) * box
    nothing = torch.zeros_like(truth)
    assert metrics.normal_deg(nothing, truth, box).abs().max() == 0
    sideways = torch.zeros_like(truth)
    sideways[:, 0] = 1
    torch.testing.assert_close(metrics.normal_deg(nothing, sideways, box), torch.full((2,), 90.0))
    # Where the truth has no normal, none can be wrong.
    torch.testing.assert_close(metrics.normal_deg(sideways, truth, torch.ones_like(box)), torch.full((2,), 90.0))


def test_the_grey_of_an_8_bit_image_is_no_normal(tmp_path, box):
    """Bytes cannot hold 0.5: what is read back must still be background, and not a direction."""
    truth = facing(2, 24) * box
    write_image(tmp_path / "n.png", encode_normals(truth, box)[0])
    read = decode_normals(read_image(tmp_path / "n.png"))
    assert read[:, 0, 0].norm() == 0
    assert metrics.normal_deg(read, truth[0], box[0]) < 0.5


def test_sharpness_falls_with_blur_and_rises_with_noise(noise, box):
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert torch.allclose(metrics.sharpness(noise, noise, box), torch.ones(2))
    assert (metrics.sharpness(blurred, noise, box) < 0.5).all()
    assert (metrics.sharpness(noise + 0.1 * torch.randn(noise.shape), noise, box) > 1).all()


def test_sharpness_ignores_the_silhouette(noise, box):
    cut = noise * box  # the step at the mask's edge dwarfs everything inside
    torch.testing.assert_close(metrics.sharpness(noise, cut, box), torch.ones(2))


def test_silhouettes(box):
    moved = box.roll(6, -1)
    torch.testing.assert_close(metrics.silhouette_iou(moved, box), torch.full((2,), 1 / 3))
    assert (metrics.silhouette_iou(box, box) == 1).all()


def test_ssim_looks_at_the_mask_only(noise, box):
    assert torch.allclose(metrics.ssim(noise * box, noise, box), torch.ones(2))
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert (metrics.ssim(blurred, noise, box) < 0.9).all()
    corner = torch.zeros_like(box)
    corner[..., :2, :3] = 1  # smaller than the window: widened within the image
    assert metrics.ssim(blurred, noise, corner).isfinite().all()


def test_score_gives_what_the_domains_allow(noise, box):
    face = torch.zeros_like(box)
    face[0, :, 8:12, 8:12] = 1  # not visible in the second frame, which then does not count
    truth = Truth(noise, facing(2, 24) * box, box, face)
    both = metrics.score(truth, noise + 0.1 * face, truth.normal)
    assert set(both) == {"psnr_fg", "psnr_face", "ssim", "sharpness", "normal_deg"}
    assert both["psnr_face"] == pytest.approx(20, abs=1e-3)
    assert set(metrics.score(truth, normal=truth.normal)) == {"normal_deg"}


# Intervals


def test_bootstrap_is_repeatable_and_brackets_the_mean():
    values = np.array([20.0, 21, 22, 23, 24, 25, 26, 27])
    estimate = metrics.bootstrap(values)
    assert estimate == metrics.bootstrap([*values, math.nan])
    assert estimate.mean == 23.5
    assert 21 < estimate.low < 23.5 < estimate.high < 26
    assert metrics.bootstrap([3.0]) == (3, 3, 3)
    assert all(map(math.isnan, metrics.bootstrap([])))


def test_pairing_removes_what_pairs_share():
    hard = np.array([10.0, 14, 18, 22, 26, 30])
    better = hard + np.array([0.9, 1.1, 1.0, 0.8, 1.2, 1.0])
    difference = metrics.paired_difference(better, hard)
    assert difference.mean == pytest.approx(1)
    assert difference.excludes_zero
    assert metrics.bootstrap(better).low < metrics.bootstrap(hard).high  # unpaired, nothing would show
    with pytest.raises(ValueError, match="equal length"):
        metrics.paired_difference(hard, hard[1:])


def test_summary_has_the_keys_of_metrics_json():
    scores = PairScores(3)
    for pair, value in enumerate([20.0, 21.0, 25.0]):
        scores.add(pair, "generated", {"psnr_fg": value})
        scores.add(pair, "copy_reference", {"psnr_fg": value - 4, "psnr_face": math.nan})
    scores.add(1, "generated", {"normal_deg": 12.0})
    summary = json.loads(json.dumps(scores.summary(), allow_nan=False))
    assert summary["generated"]["psnr_fg"] == 22
    assert summary["generated"]["interval"]["psnr_fg"] == [20, 25]
    assert summary["generated"]["normal_deg"] == 12  # the pairs that have it
    assert summary["copy_reference"]["psnr_face"] is None
    assert summary["copy_reference"]["interval"]["psnr_face"] is None
    assert scores.difference("psnr_fg", "generated", "copy_reference") == (4, 4, 4)
    assert math.isnan(scores.difference("psnr_fg", "generated", "nobody").mean)


# Report


class Page(HTMLParser):
    """Collects tags and text, and insists that tags close in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "link", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(SimpleNamespace(name=tag, attrs=dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(SimpleNamespace(name=tag, attrs=dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def named(self, name):
        return [tag for tag in self.tags if tag.name == name]


HOSTILE = '<script>alert("1 & 2")</script>'


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    picture = torch.rand(3, 16, 16)
    write_image(folder / "portrait.png", torch.rand(3, 40, 1200))
    write_video(folder / "avatar.mp4", [picture] * 2)
    estimates = {"generated": Estimate(24.31, 23.5, 25.2), HOSTILE: Estimate(18.0, 17.0, 19.0)}
    blocks = (
        Grid(
            [("truth", [picture, None]), (HOSTILE, [Picture(folder / "portrait.png", HOSTILE), picture[:1]])],
            ["a", HOSTILE],
        ),
        Table(
            ["method", "PSNR", "normals", "n"],
            [["generated", estimates["generated"], -0.126, 8], [HOSTILE, 18.0, 15.0, 1234], ["ceiling", 31.2, None, 8]],
            better=["", "high", "low", ""],
            aside=["ceiling"],
        ),
        Video(folder / "avatar.mp4", HOSTILE),
        Plot(interval_plot(estimates, "PSNR [dB]", accent=["generated"]), HOSTILE),
        Plot(interval_plot(estimates, "PSNR [dB]"), "the same again"),
        Note("Disturbed truth.\n\nSee `track`.", "warn"),
    )
    build_report(
        folder / "report.html", Report(HOSTILE, "Lead.", [Section("Frames", HOSTILE, blocks)], "`geodiff4d demo`")
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(report_path):
    return Page(report_path.read_text(encoding="utf-8"))


def test_report_is_self_contained(report_path, page):
    text = report_path.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert not page.named("script")
    assert not page.named("link")
    for tag in page.tags:
        for key in ("src", "href"):
            assert tag.attrs.get(key, "data:").startswith(("data:", "#"))
    assert not list(report_path.parent.glob(".*.part"))


def test_report_contains_its_figures(page):
    assert len(page.named("img")) == 3
    assert all(img.attrs["src"].startswith("data:image/jpeg;base64,/9j/") for img in page.named("img"))
    assert [img.attrs["alt"] for img in page.named("img")] == ["truth · a", f"{HOSTILE} · a", f"{HOSTILE} · {HOSTILE}"]
    wide = page.named("img")[1].attrs
    assert (wide["width"], wide["height"]) == ("1024", "34")
    (video,) = page.named("video")
    assert video.attrs["src"].startswith("data:video/mp4;base64,")
    assert {"controls", "loop", "muted", "playsinline"} <= set(video.attrs)
    assert len(page.named("svg")) == 2
    assert len(page.named("code")) == 2


def test_report_escapes_everything(page):
    assert page.words.count("alert(") >= 7
    assert HOSTILE in page.words


def test_plots_do_not_share_names(page):
    ids = [tag.attrs["id"] for tag in page.tags if "id" in tag.attrs]
    assert len(ids) == len(set(ids))
    used = [tag.attrs["href"] for tag in page.named("use")]
    assert used
    assert {name[1:] for name in used} <= set(ids)


def test_tables_mark_the_better_and_leave_ceilings_aside(report_path):
    text = report_path.read_text(encoding="utf-8")
    assert "<td class=best>24.31<small>23.50 to 25.20</small></td>" in text
    assert "<td class=best>\u22120.13</td>" in text
    assert '<tr class="aside"><th scope="row">ceiling</th><td>31.20</td><td><span class="none">–</span></td>' in text


def test_a_report_with_a_missing_part_is_not_written(tmp_path):
    for block, message in [
        (Video(tmp_path / "none.mp4"), "expected a video file"),
        (Video(tmp_path / "none.gif"), "ending in .mp4"),
        (Grid([("", [tmp_path / "none.png"])]), "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            build_report(tmp_path / "report.html", Report("t", "l", [Section("s", "", [block])]))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_demo_scores_alike_by_one_process_and_by_two(tmp_path):
    one, two = (run_demo(tmp_path / str(n), DEBUG, workers=n) for n in (1, 2))
    for found in (one, two):
        del found["seconds"], found["avatar"]["iterations_per_second"]
    assert one == two
