"""Who a subject is: wide identity, a surface and actions of its own, and what a perfect tracker would make of it."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.topology import edges
from geodiff4d.heads.openhead import load_wide
from geodiff4d.heads.rig import Head
from geodiff4d.render.viewpoints import openhead
from geodiff4d.world.canvas import noise, smooth_on_mesh, smoothstep
from geodiff4d.world.seeds import generator


@lru_cache
def _wide() -> Head:
    return load_wide()


@lru_cache
def _fit_matrix() -> tuple[Float[Tensor, "shapes coordinates"], Float[Tensor, " coordinates"]]:
    """Least squares of the exposed basis, as one matrix; the weight follows the surface that a tracker sees.

    In double precision, so that the rounded result does not depend on the number of threads.
    """
    head = openhead()
    weight = torch.ones(len(head.template))
    for name in ("mouth", "teeth", "tongue", "eyes", "sockets", "neck"):
        weight[head.regions.get(name, torch.zeros_like(weight, dtype=torch.bool))] = 0.15
    w = weight.repeat_interleave(3).sqrt().double()
    A = head.shape_basis.reshape(-1, head.shape_basis.shape[-1]).double() * w[:, None]
    # A little of the prior (unit variance, in the basis's own units) keeps weak components tame.
    inverse = torch.linalg.solve(A.T @ A + 1e-5 * torch.eye(A.shape[1], dtype=A.dtype), A.T)
    return inverse * w, w


def fit_shape(vertices: Float[Tensor, "verts 3"]) -> Float[Tensor, " shapes"]:
    """Return the exposed shape coefficients that come nearest to a neutral mesh."""
    inverse, _ = _fit_matrix()
    return (inverse @ (vertices - openhead().template).flatten().double()).to(vertices.dtype)


@lru_cache
def head_edges() -> Int[Tensor, "edges 2"]:
    """Return the edges of OpenHead's mesh."""
    return edges(openhead().faces)


@lru_cache
def _fixed() -> Float[Tensor, " verts"]:
    """1 where a subject may deviate from the basis freely, 0 on parts that must keep fitting together."""
    head = openhead()
    free = torch.ones(len(head.template))
    for name in ("eyes", "sockets", "lids"):
        free[head.regions.get(name, torch.zeros_like(free, dtype=torch.bool))] = 0
    return smooth_on_mesh(free[:, None], head_edges(), 6)[:, 0]


def personal_rig(key: tuple[object, ...]) -> Head:
    """Return the subject's own head: wide identity, smooth offsets, personal actions; it has no shape basis left."""
    head, wide = openhead(), _wide()
    rng = generator(*key, "identity")
    # Shrunk a little: full variance of the phenotype space holds faces that nobody has.
    weights = torch.from_numpy(np.clip(rng.normal(0, 0.85, wide.shape_basis.shape[-1]), -2.2, 2.2).astype(np.float32))
    # Double, for the same reason as `_fit_matrix`.
    template = wide.template + (wide.shape_basis.double() @ weights.double()).float()
    offset = 0.0017 * noise(head.template, rng, 0.10, 3) + 0.0004 * noise(head.template, rng, 0.04, 3)
    template = template + offset * _fixed()[:, None]
    return replace(
        head,
        template=template,
        shape_basis=template.new_zeros(len(template), 3, 0),
        expr_basis=_actions(head, generator(*key, "actions")),
    )


def _actions(head: Head, rng: np.random.Generator) -> Float[Tensor, "verts 3 exprs"]:
    """Personalise the expression basis: log-normal strength per action and side, and a smooth change of direction."""
    names = head.expression_names
    gain = np.exp(rng.normal(0, 0.15, (2, len(names))))
    for i, name in enumerate(names):
        if name.startswith(("eyeBlink", "tongueOut", "mouthClose")):
            gain[:, i] = 1 + 0.2 * np.clip(gain[:, i] - 1, -0.2, 0.2)  # lids still meet
    left = smoothstep(-0.02, 0.02, head.template[:, 0])[:, None]
    gains = torch.from_numpy(gain.astype(np.float32))
    basis = head.expr_basis * (left * gains[0] + (1 - left) * gains[1])[:, None]
    field = noise(head.template, rng, 0.07, 12).view(-1, 3, 4)
    mixing = torch.from_numpy(rng.normal(0, 0.5, (4, len(names))).astype(np.float32))
    size = head.expr_basis.norm(dim=1, keepdim=True) * _fixed()[:, None, None]
    return basis + 0.13 * size * (field @ mixing)
