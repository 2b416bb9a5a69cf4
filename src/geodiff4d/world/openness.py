"""How much of the sky and of the key light reaches each vertex, baked once per subject from depth maps."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.core.topology import vertex_normals
from geodiff4d.world import deferred
from geodiff4d.world.canvas import smooth_on_mesh, smooth_regions
from geodiff4d.world.identity import head_edges

SKY = 24
MAP_SIZE = 96
FAR_M = 6.0


@lru_cache
def _sky() -> Float[Tensor, "dirs 3"]:
    """Directions spread evenly over the sphere, those from below left out (Fibonacci)."""
    i = torch.arange(SKY) + 0.5
    y = 1 - 1.55 * i / SKY
    turn = i * 2.399963
    r = (1 - y * y).sqrt()
    return torch.stack([r * turn.cos(), y, r * turn.sin()], -1)


def openness(
    vertices: Float[Tensor, "verts 3"], faces: Int[Tensor, "faces 3"], toward: Float[Tensor, "3"], head_verts: int
) -> Float[Tensor, "verts 2"]:
    """Bake per vertex how much of the sky and of the (soft) key light is open, in the rest pose.

    The first `head_verts` vertices are the head's: theirs are smoothed, and its mouth is dark inside.
    """
    normals = vertex_normals(vertices, faces)
    jitter = torch.tensor([[0, 0, 0], [0.16, 0, 0], [-0.16, 0, 0], [0, 0.16, 0], [0, -0.16, 0]])
    directions = torch.cat([_sky(), normalize(toward + jitter, dim=-1)])
    seen = visibility(vertices, normals, faces, directions)
    weight = (directions[:SKY] @ normals.T).clamp(min=0)
    sky = (weight * seen[:SKY]).sum(0) / weight.sum(0).clamp(min=1e-3)
    out = torch.stack([sky, seen[SKY:].mean(0)], 1)
    out[:, 0] = 0.25 + 0.75 * out[:, 0]  # light bounces: only the mouth is dark
    head = smooth_on_mesh(out[:head_verts], head_edges(), 2)
    regions = smooth_regions()
    inside = (regions["mouth"] + regions["tongue"] + regions["teeth"]).clamp(0, 1)
    head = head * (1 - inside[:, None])
    floor = torch.zeros(head_verts)
    for name, low in (("mouth", 0.10), ("tongue", 0.35), ("teeth", 0.35), ("eyes", 0.55)):
        floor = torch.maximum(floor, low * regions[name])
    return torch.cat([torch.maximum(head, floor[:, None]), out[head_verts:]])


def visibility(
    vertices: Float[Tensor, "verts 3"],
    normals: Float[Tensor, "verts 3"],
    faces: Int[Tensor, "faces 3"],
    directions: Float[Tensor, "dirs 3"],
) -> Float[Tensor, "dirs verts"]:
    """Say which vertices see each direction: 1 where nothing lies before them in a depth map taken from there."""
    size = MAP_SIZE
    centre = (vertices.amin(0) + vertices.amax(0)) / 2
    radius = float((vertices - centre).norm(dim=-1).max())
    up = torch.where(directions[:, 1:2].abs() > 0.95, torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0]))
    T = look_at(centre + FAR_M * directions, centre.expand_as(directions), up)
    K = pinhole(0.5 * size * FAR_M / radius * 0.98, size, size).expand(len(directions), 3, 3)
    # Look from above the surface, about as far as a pixel of the depth map is wide, or slopes shade themselves.
    bias = radius / size
    xy, z = Camera(T, K, size, size).project((vertices + bias * normals).expand(len(directions), -1, 3))
    place = xy.long().clamp(0, size - 1)
    depth = torch.stack([_depth(vertices, faces, T[k], K[k], size) for k in range(len(T))])
    seen = depth.flatten(1).gather(1, place[..., 1] * size + place[..., 0])
    return (z < seen + bias).float()


def _depth(vertices: Tensor, faces: Tensor, T: Tensor, K: Tensor, size: int) -> Float[Tensor, "size size"]:
    screen = np.empty((len(vertices), 3), np.float32)
    deferred.project(vertices.numpy(), T.numpy(), K.numpy(), np.float32(1), screen)
    near, face = np.empty((size, size), np.float32), np.empty((size, size), np.int32)
    none, index = np.zeros((len(faces),), np.uint8), faces.numpy()
    deferred.zbuffer(screen, index, none, screen[:, :2], index, np.ones((1, 8), np.float32), 1, near, face)
    return 1 / torch.from_numpy(near)
