"""Alignment of a film's pixels: landmarks that shrink what a face does are set right by its texture."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import interpolate as interpolate_image
from torch.testing import assert_close

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import rigid
from geodiff4d.heads import Head, HeadParams, load_head
from geodiff4d.render.meshes import interpolate, rasterize
from geodiff4d.tracking.appearance import AppearanceConfig, eye_points, face_points, relative_brightness
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.fit import fit
from geodiff4d.tracking.layout import Layout, landmark_head
from geodiff4d.tracking.problem import HeadFitConfig, limits
from geodiff4d.tracking.projection import FRONT, Projection

SIZE, FOCAL, FRAMES = 192, 700.0, 10
QUICK = HeadFitConfig(steps=8, appearance=AppearanceConfig(points=500))
MOVED = {"jawOpen": 0.5, "browInnerUp": 0.8, "mouthSmileLeft": 0.6, "mouthSmileRight": 0.6}


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head("openhead")


def performance(head: Head) -> HeadParams:
    """A face that rests and then opens its jaw, raises its brows and smiles, each by itself."""
    expr = torch.zeros(FRAMES, len(head.expression_names))
    for k, names in enumerate((("jawOpen",), ("browInnerUp",), ("mouthSmileLeft", "mouthSmileRight"))):
        for name in names:
            column = head.expression_names.index(name)
            expr[4 + 2 * k : 6 + 2 * k, column] = MOVED[name] * torch.tensor([0.5, 1.0])
    return replace(head.neutral(FRAMES), expr=expr)


def painted(head: Head, params: HeadParams) -> list[torch.Tensor]:
    """Return images of a head with freckles all over, before a plain background."""
    mesh = head.pose(params)
    paint = torch.rand(len(head.template), 3, generator=torch.Generator().manual_seed(0))
    camera = Camera(rigid(FRONT, torch.tensor([0.0, 0.0, 1.0])), pinhole(FOCAL, SIZE, SIZE), SIZE, SIZE)
    out = []
    for vertices in mesh.vertices:
        fragments = rasterize(vertices, head.faces, camera)
        out.append(interpolate(fragments, head.faces, paint) + 0.5 * (~fragments.mask).float())
    return out


def shrunk(head: Head, params: HeadParams) -> list[Detection | None]:
    """Return landmarks as a network sees them that is in doubt: half of every motion."""
    mesh = head.pose(replace(params, expr=0.5 * params.expr))
    camera = Camera(rigid(FRONT, torch.tensor([0.0, 0.0, 1.0])), pinhole(FOCAL, SIZE, SIZE), SIZE, SIZE)
    points, _ = camera.expand(len(mesh.vertices)).project(head.mediapipe.on(mesh.vertices, head.faces))
    return [Detection(p, head.mediapipe_index, 1.0, torch.cat([p.amin(0), p.amax(0)])) for p in points]


def test_pixels_restore_what_landmarks_shrink(head):
    truth = performance(head)
    seen, images = shrunk(head, truth), painted(head, truth)

    def moved(params: HeadParams) -> torch.Tensor:
        still = replace(head.neutral(FRAMES), shape=params.shape)
        moves = head.pose(replace(still, expr=params.expr)).vertices - head.pose(still).vertices
        return moves[4:, head.regions["skin"]]

    def gain(params: HeadParams) -> float:
        wanted = moved(truth)
        return float((moved(params) * wanted).sum() / wanted.square().sum())

    alone = fit(head, seen, SIZE, SIZE, FOCAL, QUICK)
    both = fit(head, seen, SIZE, SIZE, FOCAL, QUICK, lambda: images)
    assert gain(alone.params) < 0.5 and 0.65 < gain(both.params) < 1.05
    assert_close(both.params.shape, alone.params.shape, msg="identity is held")
    assert_close(both.error_px, alone.error_px, msg="the error is that of the landmarks")


def test_a_short_film_is_left_to_landmarks(head):
    truth = performance(head)[:3]
    seen, images = shrunk(head, truth), painted(head, truth)
    config = replace(QUICK, steps=1)
    alone = fit(head, seen, SIZE, SIZE, FOCAL, config)
    both = fit(head, seen, SIZE, SIZE, FOCAL, config, lambda: images)
    assert_close(both.params.expr, alone.params.expr, rtol=0, atol=0)


def test_the_derivative_along_a_slope_is_that_of_the_points(head):
    points = face_points(head, AppearanceConfig(points=200))
    small = landmark_head(head, points)
    layout, count = Layout(small), len(points.face_index)
    projection = Projection(
        small, layout, count, pinhole(FOCAL, SIZE, SIZE).double(), limits(layout, HeadFitConfig(), read=True)
    )
    g = torch.Generator().manual_seed(0)
    frame = 0.1 * torch.randn(3, layout.size, generator=g, dtype=torch.float64)
    shared = torch.zeros(layout.shapes + 1, dtype=torch.float64)
    slope = torch.randn(3, count, 2, generator=g)
    _, J = projection.jacobian(frame, shared)
    wanted = torch.einsum("fpa,fpak->fpk", slope, J[..., : layout.size])
    assert_close(projection.along(frame, shared, lambda xy: slope), wanted, rtol=1e-4, atol=1e-2)


def test_points_lie_on_the_face_alone_and_on_the_front_of_the_eyes(head):
    points, eyes = face_points(head, AppearanceConfig(points=10_000)), eye_points(head)
    vertices = head.faces[points.face_index, points.bary.argmax(1)]
    assert_close(points.bary.sum(1), torch.ones(len(points.bary)))
    assert len(vertices.unique()) == len(vertices) > 800
    for name in ("eyes", "teeth", "tongue", "neck", "lips"):
        assert not head.regions[name][vertices].any(), name
    middle = head.template[head.regions["eyes"]].mean(0)
    assert (eyes.on(head.template, head.faces)[:, 2] > middle[2]).all()


def test_light_that_changes_leaves_the_relative_brightness():
    coarse = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    image = interpolate_image(coarse, (64, 64), mode="bilinear")
    once, dimmed = (relative_brightness(x, 1.0, 8.0) for x in (image, 0.5 * image + 0.2))
    assert float((once - dimmed).abs().mean()) < 0.15 * float(once.abs().mean())
