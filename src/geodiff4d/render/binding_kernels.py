"""Gaussians bound to triangles, carried to the world, and their normals: autograd around `kernels/binding.py`.

CPU only: `avatar.binding` has the same arithmetic in torch, which is the oracle and runs on a GPU.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW = 19
"""Numbers that `kernels.binding.face_rows` writes for each face."""


def fused_bind(
    vertices: Float[Tensor, "verts 3"], faces: Int[Tensor, "faces 3"], face_index: Int[Tensor, " n"],
    means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], log_scales: Float[Tensor, "n 3"],
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 4"], Float[Tensor, "n 3"]]:  # fmt: skip
    """Carry Gaussians from the frames of their faces to the world (GaussianAvatars, Sec. 3.1).

    `means` and `log_scales` are in units of each face's size. Returns means [m], unit quaternions wxyz and scales [m];
    differentiable in all arguments but the indices.
    """
    return _FusedBind.apply(vertices, faces, face_index, means, quats, log_scales)


def shortest_axes(
    quats: Float[Tensor, "n 4"], scales: Float[Tensor, "n 3"], means: Float[Tensor, "n 3"], eye: Float[Tensor, "3"],
    R: Float[Tensor, "3 3"],
) -> Float[Tensor, "n 3"]:  # fmt: skip
    """Return each splat's shortest axis, flipped toward `eye` and turned by R: its unit normal.

    `quats` need not be unit; `means` and `eye` are in one frame [m]. Differentiable in the quaternions.
    """
    return _ShortestAxes.apply(quats, scales, means, eye, R)


class _FusedBind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vertices, faces, face_index, means, quats, log_scales):
        from geodiff4d.render.kernels import binding

        arrays = [x.detach().contiguous().numpy() for x in (vertices, faces, face_index, means, quats, log_scales)]
        v, f, index, m, q, s = arrays
        rows = np.empty((len(f), ROW), v.dtype)
        binding.face_rows(v, f, rows)
        out = [torch.empty(len(m), n, dtype=means.dtype) for n in (3, 4, 3)]
        binding.bind(rows, index, m, q, s, *(x.numpy() for x in out))
        ctx.kept = (v, f, rows, index, m, q, out[2].numpy().copy())
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_means, g_quats, g_scales):
        from geodiff4d.render.kernels import binding

        v, f, rows, index, m, q, scales = ctx.kept
        into = [torch.empty(x.shape, dtype=g_means.dtype) for x in (m, q, m)] + [
            torch.zeros(v.shape, dtype=g_means.dtype)
        ]
        grads = (g.contiguous().numpy() for g in (g_means, g_quats, g_scales))
        binding.bind_backward(v, f, rows, index, m, q, scales, *grads, *(x.numpy() for x in into))
        return into[3], None, None, into[0], into[1], into[2]


class _ShortestAxes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, quats, scales, means, eye, R):
        from geodiff4d.render.kernels import binding

        q, s, m, e, turn = (x.detach().contiguous().numpy() for x in (quats, scales, means, eye, R))
        out, axis = torch.empty(len(q), 3, dtype=quats.dtype), np.empty((len(q), 3), q.dtype)
        binding.shortest_axes(q, s, m, e, turn, out.numpy(), axis)
        ctx.kept = (q, axis, turn)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from geodiff4d.render.kernels import binding

        q, axis, turn = ctx.kept
        into = torch.empty(q.shape, dtype=grad.dtype)
        binding.shortest_axes_backward(q, axis, turn, grad.contiguous().numpy(), into.numpy())
        return into, None, None, None, None
