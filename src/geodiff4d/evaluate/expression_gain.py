"""How much of a driver's change of expression arrives, and whether it is the right change.

Take the driver's coefficients (blendshape weights, or displacements of vertices) as a matrix x of frames by
coefficients and what was made of them as y, both as changes from the same kind of rest:

    gain = <x, y> / <x, x>            1: all of it arrives; 0: nothing does
    cos  = <x, y> / (|x| |y|)         1: the right change, however large

<·, ·> sums over frames and coefficients. In a video the rest is each one's own mean over the frames, so that whose face
it is cancels, and cos is called corr; of two photographs of one person, the change is from the portrait. Scaling what
was made by k scales the gain by k. A face that stands still scores 0 in both, which a mean distance such as AED hides:
it nearly reaches the distance of a face that moves a little wrongly.

Over several people or videos the three sums are added up before they are divided: those who hardly move weigh little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from geodiff4d.evaluate.metrics import BOOTSTRAP_DRAWS, Estimate

REGIONS: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "mouth": ("mouth", "jaw"),
    "jaw": ("jaw",),
    "lids": ("eyeBlink", "eyeSquint", "eyeWide"),
    "brows": ("brow",),
    "gaze": ("eyeLook",),
}
"""Prefixes of ARKit's names whose coefficients belong to a region; the jaw is part of the mouth."""
SMALLEST = 1e-12
"""A sum of squares below this is no change at all."""


@dataclass(frozen=True)
class Products:
    """The three sums that gain and cos are made of; those of several people or videos add up."""

    driver: float
    """<x, x>."""
    made: float
    """<y, y>."""
    both: float
    """<x, y>."""

    def __add__(self, other: "Products") -> "Products":
        return Products(self.driver + other.driver, self.made + other.made, self.both + other.both)

    @property
    def gain(self) -> float:
        """Return the share of the driver's change that arrives; NaN where the driver does not change."""
        return self.both / self.driver if self.driver > SMALLEST else math.nan

    @property
    def cos(self) -> float:
        """Return how alike the two directions are, -1 to 1: 0 where nothing was made, NaN where the driver is still."""
        if not self.driver > SMALLEST:
            return math.nan
        return self.both / math.sqrt(self.driver * self.made) if self.made > SMALLEST else 0.0


def change_products(driver: Float[np.ndarray, "*shape"], made: Float[np.ndarray, "*shape"]) -> Products:
    """Sum the products of two changes from rest; both are finite."""
    x, y = driver.ravel().astype(np.float64), made.ravel().astype(np.float64)
    return Products(float(x @ x), float(y @ y), float(x @ y))


def video_products(
    driver: Float[np.ndarray, "frames coefficients"], made: Float[np.ndarray, "frames coefficients"]
) -> Products:
    """Sum the products of two videos' changes from their own means, over the frames in which both show a face.

    A frame without a face is a row of NaN. Fewer than three common frames give zeros, and so a gain of NaN.
    """
    both = np.isfinite(driver).all(1) & np.isfinite(made).all(1)
    if both.sum() < 3:
        return Products(0.0, 0.0, 0.0)
    x, y = driver[both].astype(np.float64), made[both].astype(np.float64)
    return change_products(x - x.mean(0), y - y.mean(0))


def in_region(names: Sequence[str], region: str) -> Bool[np.ndarray, " coefficients"]:
    """Mark the coefficients of a region of `REGIONS` by their names."""
    return np.array([name.startswith(REGIONS[region]) for name in names], dtype=bool)


def pooled(products: Sequence[Products], seed: int = 0) -> dict[str, dict[str, Any] | None]:
    """Return gain and cos over people or videos: `{"gain": {"mean", "interval"}, "cos": …}`.

    Intervals (95 %) come from a bootstrap that draws people or videos with replacement. None is "not measured": nobody
    changes, or there is nobody.
    """
    sums = np.array([[p.driver, p.made, p.both] for p in products], dtype=np.float64).reshape(-1, 3)
    total = Products(*(float(v) for v in sums.sum(0)))
    if not len(sums) or not math.isfinite(total.gain):
        return {"gain": None, "cos": None}
    draws = np.random.default_rng(seed).integers(0, len(sums), (BOOTSTRAP_DRAWS, len(sums)))
    again = [Products(*row) for row in sums[draws].sum(1).tolist()]
    out: dict[str, dict[str, Any] | None] = {}
    for key in ("gain", "cos"):
        values = np.array([getattr(p, key) for p in again])
        low, high = np.nanpercentile(values, [2.5, 97.5])
        out[key] = {"mean": getattr(total, key), "interval": [float(low), float(high)]}
    return out


def averaged(estimate: Estimate) -> dict[str, Any] | None:
    """Write an estimate as `pooled` writes a gain; None for NaN."""
    if math.isnan(estimate.mean):
        return None
    return {"mean": estimate.mean, "interval": [estimate.low, estimate.high]}


def cell(found: dict[str, Any] | None, digits: int = 2) -> str:
    """Print one figure with its interval for a Markdown table; "n/a" where it was not measured."""
    if found is None:
        return "n/a"
    low, high = found["interval"]
    return f"{found['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def gain_cells(row: dict[str, Any] | None, regions: Sequence[str]) -> list[str]:
    """Print gain and cos of every region as `gain / cos`, each with its interval."""
    if row is None:
        return ["n/a"] * len(regions)
    return [f"{cell(row[r]['gain'])} / {cell(row[r]['cos'])}" if row[r]["gain"] else "n/a" for r in regions]
