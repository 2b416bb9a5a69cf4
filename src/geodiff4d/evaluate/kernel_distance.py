"""How much a set of pictures looks like photographs: a kernel distance on features of our own perception network.

KID (Bińkowski et al. 2018) is the squared maximum mean discrepancy under a cubic kernel. Ours differs twice: features
are the means and deviations of the perception network's layers over a head's foreground, since it ships with the
package and has seen photographs; and a person's own picture is never compared with that person's photograph, so that
the photographs themselves score zero and a copy gains nothing by being one. A value has no unit: it orders methods that
show the same people from the same side. Turned heads are compared with photographs that are mostly frontal, which is
far for every method.
"""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.evaluate.identity import seen_layers
from geodiff4d.evaluate.metrics import BOOTSTRAP_DRAWS, Estimate
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.network import load_perception
from geodiff4d.tracking.squares import HeadSquare

FEWEST = 8
"""Fewer people say nothing."""
SIDE = 256
"""Side of the crop [px]: larger than the network was trained on, so that detail counts."""


@torch.no_grad()
def head_features(images: Iterable[Float[Tensor, "3 _height _width"]]) -> Float[np.ndarray, "n features"]:
    """Return what the perception network sees of each head on plain grey; NaN where it sees none."""
    detector, rows = EmbeddedDetector(reader=None, dense=False), []
    for image in images:
        found = detector.photo(image)
        rows.append(None if found is None or found.square is None else _statistics(image, found.square).numpy())
    width = next((len(row) for row in rows if row is not None), 1)
    return np.stack([np.full(width, np.nan) if row is None else row for row in rows]).astype(np.float64)


def _statistics(image: Float[Tensor, "3 height width"], square: HeadSquare) -> Float[Tensor, " features"]:
    out = []
    for layer, weight in seen_layers(load_perception().look, image, square, SIDE):
        mean = (layer * weight).sum((2, 3), keepdim=True)
        out += [mean[0, :, 0, 0], ((layer - mean).square() * weight).sum((2, 3))[0].sqrt()]
    return torch.cat(out)


def kernel_distance(
    made: Float[np.ndarray, "n features"], real: Float[np.ndarray, "n features"], draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> Estimate:  # fmt: skip
    """Return the distance of pictures from photographs of the same people, in the same order: 0 is alike.

    Who is not seen in both is left out. The interval (95 %) is a bootstrap over people. NaN of fewer than `FEWEST`.
    """
    both = np.isfinite(made).all(1) & np.isfinite(real).all(1)
    if both.sum() < FEWEST:
        return Estimate(np.nan, np.nan, np.nan)
    centre, spread = real[both].mean(0), real[both].std(0) + 1e-6
    x, y = ((v[both] - centre) / spread for v in (made, real))
    kernels = [(a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    balance = kernels[0] + kernels[1] - kernels[2] - kernels[2].T
    n = len(x)

    def distance(who: np.ndarray) -> float:
        # The same person drawn twice is still the same person.
        apart = who[:, None] != who[None]
        return float(balance[np.ix_(who, who)][apart].mean())

    random = np.random.default_rng(seed)
    drawn = [distance(random.integers(0, n, n)) for _ in range(draws)]
    return Estimate(distance(np.arange(n)), *map(float, np.percentile(drawn, (2.5, 97.5))))
