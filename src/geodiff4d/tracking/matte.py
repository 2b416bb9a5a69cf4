"""The foreground of a tracked portrait: head, hair, neck and shoulders.

A segmentation of the person (or, without one, the tracked head grown by a hair's breadth), without what has the
background's colours (`background.py`), is joined with the head's own silhouette, its edge drawn to the image's by a
guided filter (He et al. 2010). Shoulders stay, as in the video model's training images; only what is far from the
tracked head is no foreground. All lengths are shares of the head's size, so that they mean the same at any resolution.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter, label, uniform_filter
from torch import Tensor

from geodiff4d.tracking.background import corrected

REACH = 0.55
"""Largest distance of hair from the skull, and of shoulders from the bust, over the head's size."""
FADE = 0.04
"""Width of the cut's soft edge, over the head's size."""
BARE_GROWTH = 0.03
"""Growth of the head's silhouette where there is no segmentation, over the head's size."""
HAZE = 0.06
"""What is less than one half foreground fades from this far beyond what is more, over the head's size: strands do not
reach further, doubt does."""
FILTER_RADIUS, FILTER_EPSILON = 0.02, 1e-3


def matte(
    image: Float[Tensor, "3 size size"],
    person: Float[Tensor, "1 size size"] | None,
    mesh: Bool[Tensor, "size size"],
    head: Bool[Tensor, "size size"],
    exact: bool = False,
) -> Float[Tensor, "1 size size"]:
    """Return the foreground, 0 to 1, of one image.

    `person` is a segmentation, if there is one; `mesh` the silhouette of the whole tracked head and bust, `head` of the
    part above the chin (`render.crops.head_region`). An `exact` segmentation is a matte already: it is neither
    corrected by colours nor drawn to the image's edges.
    """
    whole, skull = mesh.numpy(), head.numpy()
    if not whole.any():
        return torch.zeros_like(image[:1]) if person is None else person
    size_px = _extent(skull if skull.any() else whole)
    if person is None:
        foreground = np.clip(1 - (_distance_to(whole) - BARE_GROWTH * size_px) / (0.02 * size_px), 0, 1)
    else:
        # The mesh is wrong at its rim (ears, chin), never inside.
        core = binary_erosion(skull, iterations=max(int(0.05 * size_px), 1))
        told = person[0].numpy() if exact else corrected(image.numpy(), person[0].numpy(), whole, size_px)
        foreground = np.maximum(told, gaussian_filter(core.astype(np.float32), 0.01 * size_px))
        if not exact:
            foreground = _guided(image.numpy(), foreground, max(int(FILTER_RADIUS * size_px), 1))
    foreground = foreground * allowed(whole, size_px)
    whole_parts = _without_islands(foreground)
    near = np.clip(2 - _distance_to(whole_parts > 0.5) / (HAZE * size_px), 0, 1)
    return torch.from_numpy(whole_parts * near).float().clamp(0, 1)[None]


def allowed(whole: np.ndarray, size_px: float) -> np.ndarray:
    """Return the weight [h, w], 0 to 1, of foreground around the tracked head and bust."""
    return np.clip(1 - (_distance_to(whole) - REACH * size_px) / (FADE * size_px), 0, 1)


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to a mask [px], zero inside it."""
    return np.asarray(distance_transform_edt(~mask, return_indices=False), dtype=np.float64)


def _extent(mask: np.ndarray) -> float:
    """Return the longer side of a mask's box [px]."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return float(max(np.ptp(rows), np.ptp(columns)) + 1)


def _guided(image: np.ndarray, mask: np.ndarray, radius: int) -> np.ndarray:
    """Return a mask whose soft edge follows the image's: a local linear model of the mask in the three colours.

    The model is found at half the resolution, where it is smooth enough (fast guided filter, He and Sun 2015).
    """
    half = image.shape[-1] % 2 == 0 and image.shape[-2] % 2 == 0 and radius > 1
    small, part = (_halved(image), _halved(mask[None])[0]) if half else (image, mask)
    width = 2 * (radius // 2 if half else radius) + 1

    def mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, width, mode="nearest", axes=(-2, -1))

    m, I = mean(part), mean(small)  # noqa: E741
    covariance = mean(small * part) - I * m
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    products = mean(np.stack([small[i] * small[j] for i, j in pairs]))
    variance = [p - I[i] * I[j] + (FILTER_EPSILON if i == j else 0) for p, (i, j) in zip(products, pairs, strict=True)]
    a = _solve_symmetric(variance, covariance)
    model = mean(np.concatenate([a, (m - (a * I).sum(0))[None]]))
    if half:
        wide = torch.from_numpy(model)[None]
        model = torch.nn.functional.interpolate(wide, scale_factor=2.0, mode="bilinear")[0].numpy()
    out = (model[:3] * image).sum(0) + model[3]
    # Only the edge is in question; a little contrast takes the filter's haze away.
    edge = uniform_filter(((mask > 0.02) & (mask < 0.98)).astype(np.float32), 2 * radius + 1) > 0
    return np.where(edge, np.clip((out - 0.1) / 0.8, 0, 1), mask)


def _halved(x: np.ndarray) -> np.ndarray:
    """Return the means of 2 × 2 pixels [channels, h/2, w/2]."""
    c, h, w = x.shape
    return x.reshape(c, h // 2, 2, w // 2, 2).mean((2, 4))


def _solve_symmetric(A: list[np.ndarray], b: np.ndarray) -> np.ndarray:
    """Solve symmetric 3 × 3 systems per pixel by cofactors; A holds xx, xy, xz, yy, yz, zz."""
    xx, xy, xz, yy, yz, zz = A
    c = [
        yy * zz - yz * yz,
        xz * yz - xy * zz,
        xy * yz - xz * yy,
        xx * zz - xz * xz,
        xy * xz - xx * yz,
        xx * yy - xy * xy,
    ]
    det = np.maximum(xx * c[0] + xy * c[1] + xz * c[2], 1e-12)
    rows = ((c[0], c[1], c[2]), (c[1], c[3], c[4]), (c[2], c[4], c[5]))
    return np.stack([(r[0] * b[0] + r[1] * b[1] + r[2] * b[2]) / det for r in rows])


def _without_islands(mask: np.ndarray) -> np.ndarray:
    """Return the mask without holes, and without parts that are not connected with the largest one.

    Haze connects nothing: what a portrait shows beside its head is taken where the mask is over one half
    (`render/relief.py`), and a part that hung on by less would float there.
    """
    parts = np.empty(mask.shape, np.int32)
    label(mask > 0.5, output=parts)
    if parts.max() > 1:
        largest = np.bincount(parts.ravel())[1:].argmax() + 1
        others = (parts > 0) & (parts != largest)
        near: np.ndarray = np.less(_distance_to(others), 3)
        mask = np.where(near & (parts != largest), 0.0, mask)
    # Holes are what of the background does not reach the image's border.
    around = np.empty(mask.shape, np.int32)
    label(mask <= 0.5, output=around)
    hole = np.ones(around.max() + 1, bool)
    hole[0] = False
    for border in (around[0], around[-1], around[:, 0], around[:, -1]):
        hole[border] = False
    return np.where(hole[around], 1.0, mask)


def smooth_over_time(masks: Float[Tensor, "frames 1 size size"]) -> Float[Tensor, "frames 1 size size"]:
    """Return a video's masks smoothed over time with the weights ¼, ½, ¼."""
    if len(masks) < 3:
        return masks
    before, after = torch.cat([masks[:1], masks[:-1]]), torch.cat([masks[1:], masks[-1:]])
    return before / 4 + masks / 2 + after / 4
