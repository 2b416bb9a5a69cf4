"""What a segmentation took for a person and has the background's colours (ours).

A network that saw few real rooms takes a wooden door beside a face for hair. The same image tells otherwise: the
tracked head says which colours the person has, and what is surely background which ones that has. A colour that only
the background has is none of the person, wherever it is not on the head itself; what was told apart joins the
background, and its colours are counted again (as GrabCut does, Rother et al. 2004, with histograms and no cut: the
matte's filter finds the edge).
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt, gaussian_filter, uniform_filter
from torch.nn.functional import interpolate

SIDE = 160
"""Colours are counted on an image of about this side [px]."""
BINS = 16
"""Of a colour channel."""
SMOOTH_BINS = 1.2
ROUNDS = 4
SURELY_OUTSIDE = 0.2
"""A segmentation below this says background."""
LEAST = 0.01
"""Share of the image that must be background before its colours are told."""
INSIDE, BESIDE = 0.03, (0.02, 0.05)
"""Depth below the silhouette's edge from which colours are the person's, and distances from the silhouette between
which the background begins to be looked for; over the head's size, as the next."""
WINDOW = 0.03
"""Radius within which colours must agree."""
MOSTLY = (0.75, 0.95)
"""Share of the background in a colour from which it counts as the background's, and from which it counts wholly."""
RARE = 0.5
"""A colour that is as frequent on the person as this share of the person's mean colour is the person's."""
AGREED = (0.4, 0.6)
"""Share of a window's colours that must be the background's."""


def without_background(
    image: Float[np.ndarray, "3 height width"], person: Float[np.ndarray, "height width"],
    silhouette: Bool[np.ndarray, "height width"], size_px: float,
) -> Float[np.ndarray, "height width"]:  # fmt: skip
    """Return a segmentation, 0 to 1, without what has the background's colours and none of the person's.

    Args:
        silhouette: of the tracked head and bust.
        size_px: the head's size in the image [px].
    """
    step = max(1, round(max(person.shape) / SIDE))
    small, part, inside = image[:, ::step, ::step], person[::step, ::step], silhouette[::step, ::step]
    size = size_px / step
    deep, away = (np.asarray(distance_transform_edt(x, return_indices=False)) for x in (inside, ~inside))
    colours, core = _colours(small), deep > INSIDE * size
    if not core.any():
        return person
    own = _frequency(colours, core)
    left, foreign = part, np.zeros_like(part)
    for _ in range(ROUNDS):
        outside = (left < SURELY_OUTSIDE) & (away > BESIDE[1] * size)
        if outside.mean() < LEAST:
            return person
        other = _frequency(colours, outside)
        share = other[colours] / (other[colours] + own[colours] + 1e-12)
        usual = own[colours] / np.square(own).sum()
        odd = _ramp(share, MOSTLY) * np.clip(1 - usual / RARE, 0, 1)
        agreed = uniform_filter(odd, 2 * max(1, round(WINDOW * size)) + 1)
        foreign = np.maximum(foreign, _ramp(agreed, AGREED) * _ramp(away / size, BESIDE))
        left = part * (1 - foreign)
    whole = interpolate(torch.from_numpy(foreign)[None, None], person.shape, mode="bilinear", align_corners=False)
    return (person * (1 - whole[0, 0].numpy())).astype(person.dtype)


def _colours(image: np.ndarray) -> np.ndarray:
    """Number the colours [h, w]."""
    r, g, b = np.clip((image * BINS).astype(np.int64), 0, BINS - 1)
    return (r * BINS + g) * BINS + b


def _frequency(colours: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return how frequent each colour is among some pixels, summing to 1 over all colours."""
    count = np.bincount(colours[where], minlength=BINS**3).reshape(BINS, BINS, BINS).astype(np.float64)
    smooth = gaussian_filter(count, SMOOTH_BINS)
    return (smooth / smooth.sum()).ravel()


def _ramp(x: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    return np.clip((x - ends[0]) / (ends[1] - ends[0]), 0, 1)
