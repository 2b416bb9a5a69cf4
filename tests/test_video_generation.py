"""From a portrait and driving crops to frames, at toy size."""

from dataclasses import replace

import pytest
import torch

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.core.images import encode_normals
from geodiff4d.heads import load_head
from geodiff4d.video.conditions import condition_images, lifted
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import Driving, Portrait
from geodiff4d.video.sample import sample
from geodiff4d.video.tone import KeepTone
from geodiff4d.video.vae import PatchCodec
from tiny import EMBEDDED, FAST, PAPER, SIZE, VARIANTS, build, tiny_codec


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return tiny_codec()


def cameras(head, *yaw: float) -> Camera:
    a = torch.tensor(yaw)
    middle = head.landmarks68.on(head.template, head.faces).mean(0).expand(len(yaw), -1)
    eye = middle + torch.stack([a.sin(), torch.zeros_like(a), a.cos()], -1)
    T = look_at(eye, middle, torch.tensor([0.0, 1, 0]).expand_as(eye))
    return Camera(T, pinhole(SIZE * 3.0, SIZE, SIZE).expand(len(yaw), 3, 3), SIZE, SIZE)


@pytest.mark.parametrize("name", ["embedded", "paper", "without normals"])
def test_a_portrait_is_driven(codec, name):
    head, model = load_head("openhead"), build(VARIANTS[name], codec)
    view, g = cameras(head, 0.0)[0], torch.Generator().manual_seed(0)
    portrait = Portrait(torch.rand(3, SIZE, SIZE, generator=g), torch.ones(1, SIZE, SIZE), view, head.neutral())
    request = GenerationRequest(portrait, Driving(head.neutral(2), torch.rand(2, 3, 16, 16, generator=g)), head)
    generator, views = DiffusionGenerator(model, FAST), cameras(head, -0.3, 0.4)
    made = generator.generate(request, views)
    assert made.rgb.shape == made.normal.shape == (2, 3, SIZE, SIZE) and made.mask.shape == (2, 1, SIZE, SIZE)
    assert made.rgb.min() >= 0 and made.rgb.max() <= 1 and made.tokens.shape == (2, 4, 4)
    length = made.normal.norm(dim=1)
    assert ((length < 1e-3) | ((length - 1).abs() < 1e-2)).all()
    if name == "embedded":
        normal = torch.nn.functional.normalize(torch.randn(3, SIZE, SIZE, generator=g), dim=0)
        own = generator.generate(replace(request, portrait=replace(portrait, normal=normal)), views)
        assert not torch.equal(own.rgb, made.rgb)


@pytest.mark.parametrize("name", ["embedded", "without normals"])
def test_a_black_and_white_portrait_stays_so(codec, name):
    head, model = load_head("openhead"), build(VARIANTS[name], codec)
    picture = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    portrait = Portrait(picture, torch.ones(1, SIZE, SIZE), cameras(head, 0.0)[0], head.neutral())
    request = GenerationRequest(portrait, Driving(head.neutral(1), torch.rand(1, 3, 16, 16)), head)
    made = DiffusionGenerator(model, replace(FAST, finish=(KeepTone(),))).generate(request, cameras(head, 0.4))
    assert (made.rgb.amax(1) - made.rgb.amin(1)).max() < 1e-5


@torch.no_grad()
def test_sampling_starts_from_the_portrait_and_its_normals(codec, monkeypatch):
    head, model, g = load_head("openhead"), build(PAPER, codec), torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize(torch.randn(3, SIZE, SIZE, generator=g), dim=0)
    picture, mask = torch.rand(3, SIZE, SIZE, generator=g), torch.ones(1, SIZE, SIZE)
    portrait = Portrait(picture, mask, cameras(head, 0.0)[0], head.neutral(), normal)
    starts = []

    def spy(model, given, *rest):
        starts.append(given.start)
        return sample(model, given, *rest)

    monkeypatch.setattr("geodiff4d.video.generate.sample", spy)
    crops = torch.rand(2, 3, 16, 16, generator=g)
    request = GenerationRequest(portrait, Driving(head.neutral(2), crops), head)
    generator, views = DiffusionGenerator(model, FAST), cameras(head, -0.3, 0.4)
    generator.generate(request, views)
    own = [codec.encode(x[None])[0] for x in (portrait.on_grey, encode_normals(normal, mask))]
    torch.testing.assert_close(starts.pop(), torch.stack(own)[None])
    # Without an estimator's, the normals are the model's own: sampled from noise.
    generator.generate(replace(request, portrait=replace(portrait, normal=None)), views)
    assert starts[0] is None and torch.equal(starts[1][:, 0], codec.encode(picture[None]))
    DiffusionGenerator(model, replace(FAST, start="noise")).generate(request, views)
    assert starts[2] is None


@torch.no_grad()
def test_the_warped_portrait_moves_as_the_driver(codec, monkeypatch):
    """Expression, jaw and gaze are the driver's; without a driver, or for a model that never saw one move, it rests."""
    head = load_head("openhead")
    n, views = len(head.expression_names), cameras(head, -0.3, 0.4)
    moving = build(replace(EMBEDDED, moves=True), codec)
    expr = torch.zeros(2, n)
    expr[:, head.expression_names.index("jawOpen")] = 1.0
    talking = replace(head.neutral(2), expr=expr, eyes_pose=torch.full((2, 6), 0.3))
    g = torch.Generator().manual_seed(0)
    portrait = Portrait(torch.rand(3, SIZE, SIZE, generator=g), torch.ones(1, SIZE, SIZE), views[0], head.neutral())
    request = GenerationRequest(portrait, Driving(talking, torch.rand(2, 3, 16, 16, generator=g)), head)
    texture = lifted(head, portrait, surroundings=False)
    still, open_mouth = (condition_images(head, texture, talking, views, m) for m in (None, talking))
    assert torch.equal(still.pose, open_mouth.pose)
    assert (still.warp - open_mouth.warp).abs().max() > 0.05
    assert open_mouth.opened.sum() > 10 > 5 * still.opened.sum(), "a mouth opens, whose inside the portrait hides"
    seen = []

    def spy(*given):
        seen.append(given[4] if len(given) > 4 else None)
        return condition_images(*given)

    monkeypatch.setattr("geodiff4d.video.conditions.condition_images", spy)
    generator = DiffusionGenerator(moving, FAST)
    generator.generate(request, views)
    assert seen and all(torch.equal(m.expr, expr) and torch.equal(m.eyes_pose, talking.eyes_pose) for m in seen)
    seen.clear()
    generator.without_expression().generate(request, views)
    DiffusionGenerator(build(EMBEDDED, codec), FAST).generate(request, views)
    assert seen and all(m is None for m in seen)
