"""Whose face a picture shows: ArcFace on a file of the user's (CSIM), and an open measure that needs none.

**The open measure** (`csim_open`): the cosine between two pictures' identity vectors. A vector is what the embedded
perception network sees of a head on plain grey, averaged over the foreground of a crop (the colours and the channels of
each stage, 395 numbers), projected to 32 by a linear discriminant analysis of training people (Fisher 1936), under
which views and expressions of one person lie together and people apart. It knows made-up people, and what a real
person's hair and skin look like; it is no face recogniser. `geodiff4d train identity` fits it and measures how well it
separates people it has not seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import load_model
from geodiff4d.core.onnx_file import open_onnx
from geodiff4d.core.weights import weights_folder
from geodiff4d.tracking.network import Perception, load_perception
from geodiff4d.tracking.squares import HeadSquare, cut_square

SHIPPED = weights_folder("identity")
SCALE = 1.6
"""Side of the crop over the head's square."""
ARCFACE_SIZE = 112
ARCFACE_POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where insightface puts eyes, nose and the mouth's corners, right eye of the person first [px of 112]."""


@dataclass(frozen=True)
class OpenIdentity:
    """A linear projection of pooled features."""

    mean: Float[Tensor, " features"]
    scale: Float[Tensor, " features"]
    projection: Float[Tensor, "features dimensions"]

    def __call__(self, features: Float[Tensor, "n features"]) -> Float[Tensor, "n dimensions"]:
        """Return unit vectors; a row of NaN, where no head was seen, stays NaN."""
        return normalize((features - self.mean) / self.scale @ self.projection, dim=-1)


@cache
def load_identity(folder: Path = SHIPPED) -> OpenIdentity:
    """Load the projection that ships.

    Raises:
        UserError: it is missing or damaged.
    """
    _, state = load_model(folder)
    try:
        return OpenIdentity(**{k: v.float() for k, v in state.items()})
    except TypeError as error:
        raise UserError(f"{folder} is not an identity projection ({error}): install the package again") from None


@torch.no_grad()
def identity_features(
    images: Float[Tensor, "n 3 height width"], squares: Sequence[HeadSquare | None], model: Perception | None = None
) -> Float[Tensor, "n features"]:
    """Pool what the perception network sees of heads on plain grey; NaN where no square says where the head is."""
    net = (model or load_perception()).look
    rows = [_pooled(net, images[i], square) for i, square in enumerate(squares) if square is not None]
    width = 3 + net.stem[0][0].out_channels + sum(net.config.widths)  # type: ignore[index]
    out = images.new_full((len(images), width), torch.nan)
    where = [i for i, square in enumerate(squares) if square is not None]
    if rows:
        out[where] = torch.stack(rows)
    return out


def _pooled(net: Any, image: Tensor, square: HeadSquare) -> Float[Tensor, " features"]:
    seen = seen_layers(net, image, square, net.config.size)
    return torch.cat([(layer * weight).sum((2, 3))[0] for layer, weight in seen])


def seen_layers(
    net: Any, image: Float[Tensor, "3 height width"], square: HeadSquare, side: int
) -> list[tuple[Float[Tensor, "1 channels rows columns"], Float[Tensor, "1 1 rows columns"]]]:
    """Return the colours and the layers of the perception network on a head on plain grey, cut to `side` pixels.

    Each comes with weights that sum to 1 over the foreground.
    """
    grown = square.grown(SCALE)
    crop = cut_square(image, grown, side)[None].contiguous(memory_format=torch.channels_last)
    shown = ((image - 0.5).abs().amax(0, keepdim=True) > 0.02).float().expand(3, -1, -1)
    mask = cut_square(shown, grown, side)[None, :1]
    early = net.stem[0](crop - 0.5)
    layers, y = [crop - 0.5, early], net.stem[1](early)
    for i, stage in enumerate(net.stages):
        y = stage(y)
        layers.append(y)
        if i < len(net.downs):
            y = net.downs[i](y)
    weights = [interpolate(mask, size=layer.shape[-2:], mode="area") for layer in layers]
    return [(layer, weight / weight.sum().clamp(min=1e-3)) for layer, weight in zip(layers, weights, strict=True)]


def separation(vectors: Float[Tensor, "n dimensions"], people: Sequence[int]) -> dict[str, float]:
    """Say how well vectors tell people apart: area under the ROC curve over all pairs, and of nearest neighbours."""
    who = torch.tensor(people)
    cosines = vectors @ vectors.mT
    i, j = torch.triu_indices(len(who), len(who), 1)
    values, same = cosines[i, j].double(), who[i] == who[j]
    order = torch.empty(len(values), dtype=torch.float64)
    order[values.argsort()] = torch.arange(1, len(values) + 1, dtype=torch.float64)
    inside, outside = int(same.sum()), int((~same).sum())
    area = (order[same].sum() - inside * (inside + 1) / 2) / (inside * outside)
    nearest = (cosines - 4 * torch.eye(len(who))).argmax(1)
    return {"auc": float(area), "nearest": float((who[nearest] == who).float().mean()),
            "same": float(values[same].mean()), "other": float(values[~same].mean())}  # fmt: skip


# ArcFace


class ArcFace:
    """Identity vectors of an ArcFace network of the user's, an ONNX file with input 1×3×112×112."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: onnxruntime is not installed, or the file is missing or something else.
        """
        expected = "for --arcface an ONNX file (insightface's w600k_r50.onnx, say)"
        self.session = open_onnx(path, expected, threads=torch.get_num_threads())
        first = self.session.get_inputs()[0]
        if len(first.shape) != 4 or list(first.shape[1:]) != [3, ARCFACE_SIZE, ARCFACE_SIZE]:
            raise UserError(f"--arcface {path} takes {first.shape}: expected N×3×112×112, as ArcFace does")
        self.input = first.name

    def __call__(
        self, images: Float[Tensor, "n 3 height width"], points: Float[Tensor, "n 5 2"]
    ) -> Float[Tensor, "n dimensions"]:
        """Return unit vectors; `points` are eyes, nose and the mouth's corners [px], NaN where there is no face."""
        rows: list[Tensor | None] = []
        for image, five in zip(images, points, strict=True):
            if not five.isfinite().all():
                rows.append(None)
                continue
            x = (aligned(image, five) * 255 - 127.5) / 127.5
            [out] = self.session.run(None, {self.input: x[None].numpy().astype(np.float32)})
            rows.append(normalize(torch.from_numpy(np.asarray(out)).float().flatten(), dim=0))
        width = next((len(r) for r in rows if r is not None), 1)
        return torch.stack([torch.full((width,), torch.nan) if r is None else r for r in rows])


def aligned(image: Float[Tensor, "3 height width"], points: Float[Tensor, "5 2"]) -> Float[Tensor, "3 112 112"]:
    """Cut a face as ArcFace was trained: the best similarity of five points to `ARCFACE_POINTS`."""
    target = torch.tensor(ARCFACE_POINTS, dtype=torch.float64)
    a, b = target - target.mean(0), points.double() - points.double().mean(0)
    # The similarity from template to picture: complex least squares.
    za, zb = torch.view_as_complex(a.contiguous()), torch.view_as_complex(b.contiguous())
    turn = (za.conj() * zb).sum() / (za.abs() ** 2).sum()
    middle, size = points.double().mean(0), float(turn.abs())
    offset = torch.view_as_complex(torch.tensor([ARCFACE_SIZE / 2] * 2, dtype=torch.float64) - target.mean(0)) * turn
    centre = middle + torch.view_as_real(offset)
    square = HeadSquare(float(centre[0]), float(centre[1]), ARCFACE_SIZE * size, float(turn.angle()), 0.0)
    return cut_square(image, square, ARCFACE_SIZE)
