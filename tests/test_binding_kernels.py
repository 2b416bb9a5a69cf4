"""The fused binding against torch's: values and gradients, in double precision, degenerate faces among them."""

from dataclasses import replace

import torch

from geodiff4d.avatar.binding import LocalGaussians, bind, face_frames, place
from geodiff4d.core.geometry import quat_to_matrix
from geodiff4d.render.binding_kernels import shortest_axes


def scene(degenerate: bool = False) -> tuple[torch.Tensor, torch.Tensor, LocalGaussians]:
    g = torch.Generator().manual_seed(0)
    vertices = torch.randn(60, 3, generator=g, dtype=torch.float64)
    if degenerate:
        vertices[1], vertices[5] = vertices[0], 0.5 * (vertices[3] + vertices[4])
    face = torch.randint(20, (200,), generator=g)
    r = torch.randn(200, 14, generator=g, dtype=torch.float64)
    return vertices, torch.arange(60).view(20, 3), LocalGaussians(
        face, r[:, :3], r[:, 3:7], r[:, 7:10], r[:, 10], r[:, 11:]
    )  # fmt: skip


def gradients(vertices, faces, local, fused: bool) -> list[torch.Tensor]:
    leaves = [vertices.clone().requires_grad_(), *(v.clone().requires_grad_() for v in local.parameters.values())]
    moving = replace(local, **dict(zip(local.parameters, leaves[1:], strict=True)))
    out = place(moving, leaves[0], faces) if fused else bind(moving, face_frames(leaves[0], faces))
    # Quaternions by their matrices: signs are free.
    seen = [out.means, quat_to_matrix(out.quats), out.scales, out.opacities]
    g = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in seen).backward()  # pyright: ignore
    return [*(x.detach() for x in seen), *(x.grad for x in leaves[:-1] if x.grad is not None)]


def test_fused_binding_is_torchs():
    for ours, theirs in zip(gradients(*scene(), True), gradients(*scene(), False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_degenerate_faces_stay_finite():
    for value in gradients(*scene(degenerate=True), True):
        assert value.isfinite().all()


def test_shortest_axes_are_torchs():
    g = torch.Generator().manual_seed(0)
    quats, scales, means = (torch.randn(50, n, generator=g, dtype=torch.float64) for n in (4, 3, 3))
    scales, eye = scales.exp(), torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    R = quat_to_matrix(torch.randn(4, generator=g, dtype=torch.float64))

    def plain(q):
        axis = quat_to_matrix(q).gather(-1, scales.argmin(-1)[:, None, None].expand(-1, 3, 1)).squeeze(-1)
        return torch.where(((eye - means) * axis).sum(-1, keepdim=True) < 0, -axis, axis) @ R.mT

    torch.testing.assert_close(shortest_axes(quats, scales, means, eye, R), plain(quats))
    weight = torch.randn(50, 3, generator=g, dtype=torch.float64)
    ours, theirs = quats.clone().requires_grad_(), quats.clone().requires_grad_()
    (shortest_axes(ours, scales, means, eye, R) * weight).sum().backward()
    (plain(theirs) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
