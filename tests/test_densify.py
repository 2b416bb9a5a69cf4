"""Densification, deformation and dynamics: faces inherited and never emptied, Adam's memory, zero at the start."""

import math
from dataclasses import replace

import pytest
import torch

from geodiff4d.avatar.binding import LocalGaussians, face_frames
from geodiff4d.avatar.deformable import DeformableSurface
from geodiff4d.avatar.deformation import Deformation, DeformationConfig, PositionMap
from geodiff4d.avatar.densify import DensifyConfig, Grad2d, densify, reset_opacity
from geodiff4d.avatar.dynamics import SIZES, Dynamics, DynamicsConfig
from geodiff4d.avatar.expression import ExpressionCode, fit_expression_code
from geodiff4d.avatar.surface import own_surface
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import Head
from geodiff4d.render.gaussians import rasterize


def gaussians(count: int = 40, faces: int = 10) -> LocalGaussians:
    g = torch.Generator().manual_seed(0)
    return LocalGaussians(
        torch.arange(count) % faces, torch.randn(count, 3, generator=g), torch.randn(count, 4, generator=g),
        torch.randn(count, 3, generator=g) - 1, torch.randn(count, generator=g), torch.randn(count, 3, generator=g),
        torch.randn(count, 4, generator=g),
    )  # fmt: skip


def round_of(local: LocalGaussians, grad2d: torch.Tensor, **config):
    scale = torch.full((10,), 0.01)
    return densify(local, grad2d, scale, DensifyConfig(**config), torch.Generator().manual_seed(1))


def test_children_inherit_and_survivors_stay():
    local, grad2d = gaussians(), torch.zeros(40)
    grad2d[[3, 7, 11]] = 1.0
    local.log_scales[[3, 7]], local.log_scales[11] = 0.0, -4.0
    local = replace(local, opacity_logits=local.opacity_logits.abs())
    done = round_of(local, grad2d)
    # Two are split in two, one is cloned: 40 - 2 + 4 + 1.
    assert len(done.local) == 43 and done.fresh.sum() == 5
    assert torch.equal(done.local.face_index, local.face_index[done.parent])
    kept = ~done.fresh
    for name, value in local.parameters.items():
        assert torch.equal(done.local.parameters[name][kept], value[done.parent[kept]])
    assert set(done.parent[done.fresh].tolist()) == {3, 7, 11} and 3 not in done.parent[kept]
    torch.testing.assert_close(done.local.log_scales[-1], local.log_scales[done.parent[-1]] - math.log(1.6))
    again = round_of(local, grad2d)
    assert all(torch.equal(v, again.local.tensors[n]) for n, v in done.local.tensors.items())


def test_no_face_is_emptied():
    local = gaussians()
    faint = torch.full((40,), -9.0)
    faint[0] = 3.0
    done = round_of(replace(local, opacity_logits=faint), torch.zeros(40))
    # Face 0 has one that is seen and loses three; all others would lose everyone, and keep everyone.
    assert len(done.local) == 37 and done.local.face_index.unique().numel() == 10


def test_the_largest_gradients_go_first():
    local = replace(gaussians(), opacity_logits=torch.ones(40), log_scales=torch.full((40, 3), -5.0))
    done = round_of(local, torch.arange(40.0), limit=44)
    assert sorted(done.parent[done.fresh].tolist()) == [36, 37, 38, 39]


def test_grad2d_is_the_gradient_in_the_image():
    """Moving a splat by half an image changes the loss by its grad2d."""
    camera = Camera(torch.eye(4), pinhole(80.0, 64, 64), 64, 64)
    local = replace(gaussians(1, 1), means=torch.zeros(1, 3), opacity_logits=torch.ones(1))
    triangle = torch.tensor([[-0.1, -0.1, 2.0], [0.1, -0.1, 2.0], [0.0, 0.1, 2.0]])
    frames = face_frames(triangle, torch.tensor([[0, 1, 2]]))
    from geodiff4d.avatar.binding import bind

    splats = bind(local, frames)
    target = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(3))

    def loss(means):
        image, _ = rasterize(replace(splats, means=means), camera, torch.ones(1, 1))
        return (image - target).square().mean()

    means = splats.means.detach().requires_grad_()
    loss(means).backward()
    assert means.grad is not None
    grad2d = Grad2d.zeros(1).plus(means.detach(), means.grad, camera)
    pixel = 2.0 / 80.0
    eps = 0.05
    steps = [torch.tensor([[eps * pixel, 0.0, 0.0]]), torch.tensor([[0.0, eps * pixel, 0.0]])]
    slope = torch.stack([(loss(means.detach() + d) - loss(means.detach() - d)) / (2 * eps) for d in steps])
    torch.testing.assert_close(grad2d.mean[0], slope.norm() * 32, rtol=0.05, atol=1e-6)


def test_resets_fire():
    config = DensifyConfig(every=100, reset_every=300)
    assert [i + 1 for i in range(1000) if config.reset_due(i, 1000)] == [300, 600]
    assert [i + 1 for i in range(1000) if config.due(i, 1000)] == [200, 300, 400, 500, 600, 700]
    assert reset_opacity(torch.tensor([3.0, -9.0]), config).sigmoid().tolist() == pytest.approx(
        [0.01, 1.234e-4], rel=1e-3
    )


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head("openhead")


def expressive(head: Head) -> tuple[DeformableSurface, ExpressionCode]:
    g = torch.Generator().manual_seed(0)
    sequence = replace(
        head.neutral(12), expr=torch.rand(12, 52, generator=g), jaw_pose=0.2 * torch.rand(12, 3, generator=g)
    )
    code, explained = fit_expression_code(sequence, torch.randn(12, 8, 4, generator=g))
    assert explained is not None and explained["timesteps"] == 12
    torch.manual_seed(0)
    surface, config = own_surface(head), DeformationConfig(size=16, channels=4, levels=2)
    deformation = Deformation(config, code.size)
    dynamics = Dynamics(DynamicsConfig(features=4, hidden=8), code.basis.shape[1])
    return DeformableSurface(head, surface, code, deformation, dynamics, PositionMap.of(head, surface, 16)), code


def test_networks_start_at_the_head_and_turn_with_it(head):
    deformable, _ = expressive(head)
    g = torch.Generator().manual_seed(2)
    local = replace(gaussians(50, 50), features=torch.randn(50, 4, generator=g))
    params = replace(head.neutral(), expr=torch.rand(52, generator=g))
    plain = DeformableSurface.plain(head).pose(local, params)
    posed = deformable.pose(local, params)
    assert torch.equal(plain.gaussians.means, posed.gaussians.means) and torch.equal(plain.colors, posed.colors)
    assert deformable.deformation is not None and deformable.dynamics is not None
    with torch.no_grad():
        deformable.deformation.last.weight.normal_(generator=g)
        deformable.dynamics.out.weight.normal_(generator=g)
    moved = deformable.pose(local, params)
    assert moved.displacement is not None and moved.residuals is not None
    assert (
        moved.residuals.shape == (50, sum(SIZES.values()))
        and (moved.gaussians.means - plain.gaussians.means).abs().max() > 1e-4
    )
    # Turning the head changes nothing but where things are: the map is canonical, the displacement turns along.
    turn = torch.tensor([0.2, -0.4, 0.1])
    turned = deformable.pose(local, replace(params, rotation=turn, translation=torch.tensor([0.0, 0.1, 0.2])))
    assert turned.displacement is not None
    torch.testing.assert_close(turned.displacement, moved.displacement)
    root = head.shape(params).joints[0]
    there = (moved.gaussians.means - root) @ axis_angle_to_matrix(turn).mT + root + torch.tensor([0.0, 0.1, 0.2])
    torch.testing.assert_close(turned.gaussians.means, there, atol=1e-5, rtol=1e-4)


def test_surfaces_survive_a_round_trip(head):
    deformable, code = expressive(head)
    described, tensors = deformable.described(), deformable.tensors()
    again = DeformableSurface.restored(head, described, {k: v.clone() for k, v in tensors.items()})
    params = replace(head.neutral(), expr=torch.full((52,), 0.3))
    ours, theirs = code(params), again.expression(params)
    assert theirs is not None and torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.summary, theirs.summary)
    with pytest.raises((KeyError, RuntimeError)):
        DeformableSurface.restored(head, described, {k: v for k, v in tensors.items() if "last" not in k})


def test_without_tokens_the_parameters_are_the_code(head):
    g = torch.Generator().manual_seed(0)
    sequence = replace(head.neutral(5), expr=torch.rand(5, 52, generator=g))
    code, explained = fit_expression_code(sequence, None)
    assert explained is None and code.size[0] == 1
    rows = torch.stack([code(sequence[i]).summary for i in range(5)])
    assert rows.mean(0).abs().max() < 1e-4 and len(rows.unique(dim=0)) == 5
    still, _ = fit_expression_code(head.neutral(1), None)
    assert still(head.neutral()).summary.abs().max() == 0
