"""Measures beside known values and other people's implementations; what is missing is said, and is never a zero."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.evaluate import jod, metrics
from geodiff4d.evaluate.identity import (
    ARCFACE_POINTS,
    ARCFACE_SIZE,
    ArcFace,
    OpenIdentity,
    aligned,
    load_identity,
    separation,
)
from geodiff4d.evaluate.judges import MEASURES, Judges, quantised
from geodiff4d.evaluate.lpips import Lpips
from geodiff4d.evaluate.observe import Observed, expression_distance, keypoint_distance
from geodiff4d.heads import HeadParams, load_head
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import orbit, world_region
from geodiff4d.tracking.detect import Detection
from geodiff4d.video.generate import GenerationRequest, WarpGenerator
from geodiff4d.video.inputs import Driving, Portrait
from geodiff4d.world.subject import SyntheticSubject, plain_seed
from geodiff4d.world.tracker_error import disturbed


@pytest.fixture
def pictures():
    g = torch.Generator().manual_seed(0)
    a = torch.nn.functional.avg_pool2d(torch.rand(2, 3, 72, 72, generator=g), 3, 1, 1)
    return a, (a + 0.1 * torch.randn(a.shape, generator=g)).clamp(0, 1)


def test_ssim_and_psnr_agree_with_scikit_image(pictures):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = pictures
    ours = metrics.ssim(b, a, torch.ones(2, 1, 72, 72))
    for k in range(2):
        x, y = (v[k].numpy().astype(np.float64) for v in (a, b))
        theirs = structural_similarity(
            x, y, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ours[k]) == pytest.approx(theirs, abs=2e-4)
        assert float(metrics.psnr(b, a)[k]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-3)


# LPIPS


def alexnet() -> nn.Sequential:
    """Layers of AlexNet's `features`, with a few channels; the numbers are those of torchvision's state dict."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(6, 8, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 7, 3, 1, 1), nn.ReLU(), nn.Conv2d(7, 5, 3, 1, 1), nn.ReLU(),
    )  # fmt: skip


@pytest.mark.parametrize("names", ["torchvision", "lpips"])
def test_lpips_is_the_formula(tmp_path, pictures, names):
    """Unit features of every ReLU, squared differences weighted per channel, mean over places, sum over layers."""
    net, a, b = alexnet(), *pictures
    linear = [torch.rand(1, c, 1, 1) for c in (6, 8, 8, 7, 5)]
    prefix = "features." if names == "torchvision" else "net.slice1."
    torch.save({prefix + k: v for k, v in net.state_dict().items()}, tmp_path / "net.pth")
    key = "lin{}.model.1.weight" if names == "torchvision" else "lins.{}.model.1.weight"
    save_file({key.format(k): w for k, w in enumerate(linear)}, tmp_path / "lin.safetensors")
    distance = Lpips([tmp_path / "net.pth", tmp_path / "lin.safetensors"])

    def taps(image):
        x = (image * 2 - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        for layer in net:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                yield x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-10)

    with torch.no_grad():
        wanted = sum(
            ((x - y) ** 2 * w.double()).sum(1).mean((1, 2))
            for x, y, w in zip(taps(a), taps(b), linear, strict=True)
        )  # fmt: skip
    torch.testing.assert_close(distance(a, b).double(), wanted, rtol=1e-4, atol=1e-6)
    assert distance(a, a).abs().max() == 0


def test_lpips_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Lpips([tmp_path / "none.pth"])
    torch.save({"features.0.weight": torch.zeros(6, 3, 11, 11), "features.0.bias": torch.zeros(6)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"has no features\.3\.weight"):
        Lpips([tmp_path / "a.pth"])
    torch.save(Dangerous(), tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b\.pth"):
        Lpips([tmp_path / "b.pth"])


class Dangerous:
    """What a pickle must not bring back."""


# Identity


def test_a_face_is_cut_where_arcface_expects_it():
    """Points that are a turned, scaled copy of the template come to lie on the template."""
    turn, scale = math.radians(20), 1.7
    R = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    points = torch.tensor(ARCFACE_POINTS) @ R.T * scale + torch.tensor([90.0, 20.0])
    y, x = torch.meshgrid(torch.arange(300) + 0.5, torch.arange(300) + 0.5, indexing="ij")
    grid = torch.stack([x, y], -1)
    bumps = torch.stack([(-(grid - p).square().sum(-1) / 18).exp() for p in points[:3]])
    cut = aligned(bumps, points)
    assert cut.shape == (3, ARCFACE_SIZE, ARCFACE_SIZE)
    for k in range(3):
        at = divmod(int(cut[k].argmax()), ARCFACE_SIZE)
        assert abs(at[1] + 0.5 - ARCFACE_POINTS[k][0]) < 1.01
        assert abs(at[0] + 0.5 - ARCFACE_POINTS[k][1]) < 1.01


def test_arcface_says_what_it_needs(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ArcFace(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="not an ONNX file"):
        ArcFace(tmp_path / "bad.onnx")


def test_separation_of_known_vectors():
    apart = torch.eye(3).repeat_interleave(2, 0)
    assert separation(apart, [0, 0, 1, 1, 2, 2])["auc"] == 1
    mixed = separation(torch.nn.functional.normalize(torch.randn(200, 8), dim=1), list(range(100)) * 2)
    assert abs(mixed["auc"] - 0.5) < 0.15


def test_the_projection_that_ships_fits_the_network_that_ships():
    identity = load_identity()
    assert isinstance(identity, OpenIdentity)
    assert identity.projection.shape == (395, 32)
    out = identity(torch.stack([identity.mean + 1, torch.full((395,), torch.nan)]))
    assert float(out[0].norm()) == pytest.approx(1, abs=1e-5)
    assert out[1].isnan().all()


# Key points and expressions


@pytest.fixture(scope="module")
def head():
    return load_head()


def seen(head, opened: float, shift: float = 0.0) -> Observed:
    params = head.neutral(2)
    params.expr[:, head.expression_names.index("jawOpen")] = opened
    points = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([shift, 0.0])
    there = Detection(points[0], torch.arange(5), 1.0, torch.zeros(4))
    return Observed([there, there], points, torch.zeros(2, 5, 2), params)


def test_key_points_off_by_three_pixels_are(head):
    torch.testing.assert_close(keypoint_distance(seen(head, 0), seen(head, 0, 3.0)), torch.full((2,), 3.0))


def test_expression_distance_grows_with_the_mouth_and_ignores_pose_and_shape(head):
    shut, half, open_ = (seen(head, v) for v in (0.0, 0.5, 1.0))
    assert expression_distance(head, shut, shut).abs().max() == 0
    near, far = expression_distance(head, shut, half), expression_distance(head, shut, open_)
    torch.testing.assert_close(far, 2 * near)  # a blend shape is linear
    assert 0.5 < float(far[0]) < 10  # millimetres
    assert open_.params is not None
    turned = replace(open_.params, rotation=open_.params.rotation + 0.3, shape=open_.params.shape + 1)
    torch.testing.assert_close(expression_distance(head, replace(open_, params=turned), open_), torch.zeros(2))


def test_a_frame_without_a_face_is_nan_and_not_zero(head):
    a, b = seen(head, 0), seen(head, 1)
    lost = replace(a, detections=[None, a.detections[1]], points=a.points.index_fill(0, torch.tensor([0]), torch.nan))
    assert expression_distance(head, lost, b).isnan().tolist() == [True, False]
    assert keypoint_distance(lost, b).isnan().tolist() == [True, False]
    assert expression_distance(head, replace(a, params=None), b).isnan().all()


# What is missing


def test_missing_models_are_named_and_nothing_crashes(head, monkeypatch):
    for module in ("pyfvvdp", "pycvvdp"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    judges = Judges(head)
    assert judges.lpips is None and judges.arcface is None and not judges.films and not judges.names
    for key in ("lpips", "jod", "jod_color", "csim"):
        assert any(word in MEASURES[key].missing for word in ("install", "give"))
    with pytest.raises(UserError, match="pip install pyfvvdp"):
        jod.fov_video_vdp()
    with pytest.raises(UserError, match="pip install cvvdp"):
        jod.color_video_vdp()


def test_frames_are_scored_as_pngs_keep_them():
    image = torch.linspace(-0.1, 1.1, 300).view(3, 10, 10)
    eight = quantised(image)
    assert torch.equal(eight, quantised(eight))
    assert (eight - image.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6


# The baseline


def test_mesh_warp_shows_the_reference_again(head):
    """A straw man would lose hair and shoulders: from its own view, the warped portrait is the portrait (≥ 30 dB)."""
    subject = SyntheticSubject(plain_seed(0, "test"), "test")
    true = subject.params(torch.zeros(1, 52))
    view = orbit(torch.tensor([12.0]), torch.tensor([4.0]), 160)
    view = canonical_crop(view, subject.vertices(true)[0][world_region()], 160)
    out = subject.render(true, view, supersample=1)
    params = disturbed(true, 3)
    portrait = Portrait(out.rgb[0], out.mask[0], view[0], params[0])
    own = Driving(HeadParams.stack([portrait.params]), portrait.on_grey[None])
    again = WarpGenerator().generate(GenerationRequest(portrait, own, head), Camera.stack([portrait.camera]))
    assert float(metrics.psnr(again.rgb, portrait.on_grey[None], portrait.mask[None])) >= 30
