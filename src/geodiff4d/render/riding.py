"""Fused posing on a CPU: Gaussians that ride on triangles, and their normals (see `_riding.py` for the kernels)."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW = 19


def ride(
    vertices: Float[Tensor, "verts 3"], faces: Int[Tensor, "faces 3"], face_index: Int[Tensor, " n"],
    means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], log_scales: Float[Tensor, "n 3"],
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 4"], Float[Tensor, "n 3"]]:  # fmt: skip
    """Return means, unit quaternions and scales in the world; differentiable in all but the indices. CPU only."""
    return _Ride.apply(vertices, faces, face_index, means, quats, log_scales)


def shortest_axes(
    quats: Float[Tensor, "n 4"], scales: Float[Tensor, "n 3"], means: Float[Tensor, "n 3"], eye: Float[Tensor, "3"],
    R: Float[Tensor, "3 3"],
) -> Float[Tensor, "n 3"]:  # fmt: skip
    """Return each splat's shortest axis, flipped toward `eye`, turned by R; differentiable in the quaternions."""
    return _ShortestAxes.apply(quats, scales, means, eye, R)


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vertices, faces, face_index, means, quats, log_scales):
        from geodiff4d.render import _riding

        arrays = [x.detach().contiguous().numpy() for x in (vertices, faces, face_index, means, quats, log_scales)]
        v, f, index, m, q, s = arrays
        rows = np.empty((len(f), ROW), v.dtype)
        _riding.face_rows(v, f, rows)
        out = [torch.empty(len(m), n, dtype=means.dtype) for n in (3, 4, 3)]
        _riding.ride(rows, index, m, q, s, *(x.numpy() for x in out))
        ctx.kept = (v, f, rows, index, m, q, out[2].numpy().copy())
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_means, g_quats, g_scales):
        from geodiff4d.render import _riding

        v, f, rows, index, m, q, scales = ctx.kept
        into = [torch.empty(x.shape, dtype=g_means.dtype) for x in (m, q, m)] + [
            torch.zeros(v.shape, dtype=g_means.dtype)
        ]
        grads = (g.contiguous().numpy() for g in (g_means, g_quats, g_scales))
        _riding.ride_backward(v, f, rows, index, m, q, scales, *grads, *(x.numpy() for x in into))
        return into[3], None, None, into[0], into[1], into[2]


class _ShortestAxes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, quats, scales, means, eye, R):
        from geodiff4d.render import _riding

        q, s, m, e, turn = (x.detach().contiguous().numpy() for x in (quats, scales, means, eye, R))
        out, axis = torch.empty(len(q), 3, dtype=quats.dtype), np.empty((len(q), 3), q.dtype)
        _riding.shortest_axes(q, s, m, e, turn, out.numpy(), axis)
        ctx.kept = (q, axis, turn)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from geodiff4d.render import _riding

        q, axis, turn = ctx.kept
        into = torch.empty(q.shape, dtype=grad.dtype)
        _riding.shortest_axes_backward(q, axis, turn, grad.contiguous().numpy(), into.numpy())
        return into, None, None, None, None
