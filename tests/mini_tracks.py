"""A small head in FLAME's file format, and pictures of it: what the readers of FLAME tracks are tested on.

The head is a lump of random triangles; what counts is that its joints, bases and correctives are not trivial.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import flame_files
from geodiff4d.core.camera import Camera
from geodiff4d.core.images import to_uint8
from geodiff4d.heads import Head, HeadParams, flame
from geodiff4d.render.meshes import rasterize

VERTS = 300


def make_head(folder: Path, name: str) -> tuple[Head, dict[str, np.ndarray]]:
    """Write and load a model of FLAME's format; `name` (flame2020.pkl, …) says its year."""
    a = flame_files.arrays(VERTS, 2 * VERTS)
    a["posedirs"] *= 0.5
    path = flame_files.write_model(folder / name, a)
    for lid in ("l_eyelid.npy", "r_eyelid.npy"):
        np.save(folder / lid, 3e-3 * np.random.default_rng(ord(lid[0])).standard_normal((VERTS, 3)))
    return flame.load(path), a


def silhouette(vertices: Tensor, faces: Tensor, camera: Camera) -> Tensor:
    """1 where the mesh is, either side of its triangles."""
    return rasterize(vertices[None], faces, camera.expand(1), cull_backfaces=False).mask.float()


def share_inside(xy: Tensor, mask: Tensor) -> float:
    """Return how many points fall on a mask or beside it: tips of triangles may miss all pixel centres."""
    h, w = mask.shape[-2:]
    mask = torch.nn.functional.max_pool2d(mask, 3, 1, 1)
    x, y = xy[:, 0].floor().long(), xy[:, 1].floor().long()
    seen = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    on = mask[0, y.clamp(0, h - 1), x.clamp(0, w - 1)] > 0.5
    return float((on & seen).float().mean())


def save_png(path: Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(image)).save(path)


def motion(head: Head, seed: int = 0, scale: float = 0.3) -> HeadParams:
    """One random pose and expression."""
    g = torch.Generator().manual_seed(seed)
    zero = head.neutral()
    return HeadParams(
        **{k: None if v is None else scale * torch.randn(v.shape, generator=g) for k, v in vars(zero).items()}
    )
