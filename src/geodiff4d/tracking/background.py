"""A segmentation of a person, corrected by the image's colours (ours).

A network that saw few real rooms takes a wooden door beside a face for hair, and leaves out long hair. The same image
tells otherwise: the tracked head says which colours the person has, and what is surely background which ones that has.
A colour that only the background has is none of the person, wherever it is not on the head itself; what was told apart
joins the background, and its colours are counted again (as GrabCut does, Rother et al. 2004, with histograms). What
colours alone do not tell belongs to what it is connected with: a random walk from there ends sooner on the person or
on the background (Grady 2006).
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt, gaussian_filter, uniform_filter
from scipy.sparse import dia_matrix
from scipy.sparse.linalg import cg
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
UNKNOWN = 0.003
"""A colour that is rarer than this on both, over the frequency of the person's mean colour, tells nothing."""
AGREED = (0.4, 0.6)
"""Share of a window's colours that must be the background's."""
ALIKE = 0.05
"""Neighbours whose colours differ by this belong together with a weight of exp(-1/2)."""
TRUSTED, COUNTED = 0.002, 0.05
"""Weights of the segmentation, and of colours that the background has, against neighbours."""
JOINS, LEAVES = (0.4, 0.8), (0.2, 0.6)
"""Chances to end on the person from which a place becomes the person's, and below which it is none of it."""
OWN, UNLIKE, OTHERS = (0.5, 0.8), (0.5, 0.9), (0.6, 0.9)
"""Shares of the background in a colour up to which a place may join, from which it counts against joining, and from
which it may leave."""
WRONG = (0.02, 0.05)
"""Where so much of a segmentation beside the head was told apart, it may leave whatever its colour."""


def corrected(
    image: Float[np.ndarray, "3 height width"], person: Float[np.ndarray, "height width"],
    silhouette: Bool[np.ndarray, "height width"], size_px: float,
) -> Float[np.ndarray, "height width"]:  # fmt: skip
    """Return a segmentation, 0 to 1, less what is the background's by its colours, and with what belongs to it.

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
    left, foreign, share = part, np.zeros_like(part), np.zeros_like(part)
    for _ in range(ROUNDS):
        outside = (left < SURELY_OUTSIDE) & (away > BESIDE[1] * size)
        if outside.mean() < LEAST:
            return person
        other = _frequency(colours, outside)
        share = other[colours] / (other[colours] + own[colours] + UNKNOWN * np.square(own).sum())
        usual = own[colours] / np.square(own).sum()
        odd = _ramp(share, MOSTLY) * np.clip(1 - usual / RARE, 0, 1)
        agreed = uniform_filter(odd, 2 * max(1, round(WINDOW * size)) + 1)
        foreign = np.maximum(foreign, _ramp(agreed, AGREED) * _ramp(away / size, BESIDE))
        left = part * (1 - foreign)
    # What the segmentation is unsure of is hardly trusted.
    trust = (
        1e-5
        + TRUSTED * np.square(2 * left - 1)
        + COUNTED * _ramp(share, UNLIKE) * (part < 0.5)
        + 0.2 * COUNTED * (part < 0.02)
        + foreign
    )
    even = uniform_filter(image, (1, step, step))[:, ::step, ::step]  # pyright: ignore[reportArgumentType]
    ends = _walked(even, np.where(core, 1, left), np.where(core, 1, trust))
    beside = ((part > 0.5) & ~inside).sum()
    wrong = ((part > 0.5) & (foreign > 0.5)).sum() / max(beside, 1)
    told = np.maximum(left, _ramp(ends, JOINS) * (1 - _ramp(share, OWN)))
    leaving = np.maximum(_ramp(share, OTHERS), _ramp(np.full_like(share, wrong), WRONG))
    told = told - leaving * (told - _ramp(ends, LEAVES)).clip(0)
    told = np.where(inside, np.maximum(told, part), told)
    whole = torch.from_numpy(told.astype(np.float32))[None, None]
    return interpolate(whole, person.shape, mode="bilinear", align_corners=False)[0, 0].numpy().astype(person.dtype)


def _walked(
    image: Float[np.ndarray, "3 h w"], told: Float[np.ndarray, "h w"], trust: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """Return what is told of each pixel, by how much that is trusted, and carried on between pixels alike."""
    h, w = told.shape
    c = image.astype(np.float64)
    # A band holds the bonds with the pixel that is so many further on, and one with the pixel so many before.
    bands, offsets, total = [], [], np.zeros(h * w)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        bond = np.zeros((h, w))
        here = (slice(0, h - dy), slice(max(0, -dx), w - max(0, dx)))
        there = (slice(dy, h), slice(max(0, dx), w + min(0, dx)))
        apart = np.square(c[:, *here] - c[:, *there]).sum(0)
        bond[here] = np.exp(-apart / (2 * ALIKE**2)) / np.hypot(dy, dx) + 1e-4
        before, step = bond.ravel(), dy * w + dx
        after = np.concatenate([np.zeros(step), before[: h * w - step]])
        bands += [-before, -after]
        offsets += [-step, step]
        total += before + after
    diagonal = total + trust.ravel()
    system = dia_matrix((np.stack([diagonal, *bands]), [0, *offsets]), shape=(h * w, h * w))
    inverse = dia_matrix((1 / diagonal[None], [0]), shape=(h * w, h * w))
    found, _ = cg(system, (trust * told).ravel(), told.ravel(), rtol=1e-3, maxiter=300, M=inverse)
    return found.reshape(h, w)


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
