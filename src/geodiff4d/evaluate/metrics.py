"""What a generated or rendered frame is worth beside the truth, and how sure a mean over few pairs is.

Everything is measured inside a mask. Over the whole image a plain background, which anyone can copy, buys decibels and
hides what the head looks like: only `psnr` works without a mask, for tests and codecs.

Images may come as decoded 8-bit PNGs or as floats; each measure gives one number per image, a pair's is their mean.
PSNR likes blur, so `sharpness` is reported beside it. The paper reports PSNR, SSIM and others (Sec. 5.1) without saying
where; ours are inside the foreground.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from geodiff4d.core.images import composite

PSNR_CEILING_DB = 100.0
"""Given to identical pictures, so that means stay finite."""
BOOTSTRAP_DRAWS = 2000

Images = Float[Tensor, "*batch 3 height width"]
Masks = Float[Tensor, "*batch 1 height width"]
PerImage = Float[Tensor, "*batch"]


def masked_mean(values: Float[Tensor, "*batch channels height width"], mask: Masks) -> PerImage:
    """Mean over the mask's pixels and all channels; a soft mask weighs. NaN where the mask is empty."""
    total = (values * mask).sum((-3, -2, -1))
    weight = mask.sum((-3, -2, -1)) * values.shape[-3]
    return torch.where(weight > 0, total / weight.clamp(min=1e-12), torch.nan)


def psnr(pred: Images, truth: Images, mask: Masks | None = None) -> PerImage:
    """Peak signal-to-noise ratio [dB] of the mean squared error over the mask's pixels (peak 1).

    With the foreground mask this is `psnr_fg`, with a mask of mouth and eyes `psnr_face`. An empty mask gives NaN.
    """
    mask = torch.ones_like(truth[..., :1, :, :]) if mask is None else mask
    mse = masked_mean((pred.clamp(0, 1) - truth).square(), mask)
    return (-10 * torch.log10(mse.clamp(min=1e-20))).clamp(max=PSNR_CEILING_DB)


def normal_deg(pred: Images, truth: Images, mask: Masks) -> PerImage:
    """Mean angle [degrees] between camera-space normals over the mask.

    Where a prediction has no normal (shorter than 0.5: off the mesh, or the grey of an 8-bit image) it counts as
    (0, 0, 1), facing the camera. Pixels where the truth has none do not count.
    """
    known = truth.norm(dim=-3, keepdim=True) > 0.5
    facing = torch.tensor([0.0, 0.0, 1.0]).to(pred).view(3, 1, 1)
    pred = torch.where(pred.norm(dim=-3, keepdim=True) > 0.5, pred, facing)
    a = pred / pred.norm(dim=-3, keepdim=True)
    b = truth / truth.norm(dim=-3, keepdim=True).clamp(min=1e-6)
    # Kahan's form keeps its precision at small angles, where acos of a dot product in float32 loses it.
    angle = 2 * torch.atan2((a - b).norm(dim=-3, keepdim=True), (a + b).norm(dim=-3, keepdim=True))
    return masked_mean(torch.rad2deg(angle), mask * known)


def erode(mask: Masks, radius: int) -> Masks:
    """Shrink a mask by `radius` pixels in both axes; outside the image counts as background."""
    outside = torch.nn.functional.pad(1 - mask.flatten(0, -4), [radius] * 4, value=1.0)
    return 1 - max_pool2d(outside, 2 * radius + 1, 1).view(mask.shape)


def sharpness(pred: Images, truth: Images, mask: Masks, margin: int = 2) -> PerImage:
    """Gradient energy of the prediction over the truth's, inside the mask shrunk by `margin` pixels.

    1 is the truth's own; blur is below, noise above. Silhouettes are left out: against a plain background their step
    would be all there is. NaN where the truth is flat or the mask is gone.
    """
    inside = erode((mask > 0.5).to(mask.dtype), margin)

    def energy(image: Images) -> PerImage:
        dx = (image[..., :, 1:] - image[..., :, :-1]).square() * inside[..., :, 1:]
        dy = (image[..., 1:, :] - image[..., :-1, :]).square() * inside[..., 1:, :]
        return dx.sum((-3, -2, -1)) + dy.sum((-3, -2, -1))

    reference = energy(truth)
    return torch.where(reference > 1e-8, energy(pred.clamp(0, 1)) / reference.clamp(min=1e-8), torch.nan)


def silhouette_iou(pred_mask: Masks, truth_mask: Masks) -> PerImage:
    """Intersection over union of two foregrounds (alpha above one half); NaN if both are empty."""
    a, b = pred_mask > 0.5, truth_mask > 0.5
    union = (a | b).sum((-3, -2, -1))
    return torch.where(union > 0, (a & b).sum((-3, -2, -1)) / union.clamp(min=1), torch.nan)


def ssim(pred: Float[Tensor, "n 3 height width"], truth: Float[Tensor, "n 3 height width"],
         mask: Float[Tensor, "n 1 height width"]) -> Float[Tensor, " n"]:  # fmt: skip
    """Structural similarity (11×11 Gaussian windows) of both pictures on grey, in the mask's bounding box."""
    from pytorch_msssim import ssim as structural_similarity

    values = []
    for a, b, m in zip(composite(pred.clamp(0, 1), mask), composite(truth, mask), mask[:, 0] > 0.5, strict=True):
        if not m.any():
            values.append(pred.new_tensor(torch.nan))
            continue
        box = (slice(None), _at_least(m.any(1), 11), _at_least(m.any(0), 11))
        a, b = a[box], b[box]
        window = min(11, min(a.shape[1:]) - 1 + min(a.shape[1:]) % 2)
        values.append(structural_similarity(a[None], b[None], data_range=1.0, win_size=window))
    return torch.stack(values)


@dataclass(frozen=True, eq=False)
class Truth:
    """The frames a pair is scored against."""

    rgb: Float[Tensor, "t 3 height width"]
    normal: Float[Tensor, "t 3 height width"]
    """Camera-space unit normals, zero where there are none."""
    mask: Float[Tensor, "t 1 height width"]
    """Foreground."""
    face: Float[Tensor, "t 1 height width"]
    """Mouth and eyes, visible; may be empty in a frame."""


def score(
    truth: Truth,
    rgb: Float[Tensor, "t 3 height width"] | None = None,
    normal: Float[Tensor, "t 3 height width"] | None = None,
) -> dict[str, float]:
    """Score one pair's frames: means over them of every measure that the given domains allow."""
    scores = {}
    if rgb is not None:
        scores["psnr_fg"] = psnr(rgb, truth.rgb, truth.mask)
        scores["psnr_face"] = psnr(rgb, truth.rgb, truth.face)
        scores["ssim"] = ssim(rgb, truth.rgb, truth.mask)
        scores["sharpness"] = sharpness(rgb, truth.rgb, truth.mask)
    if normal is not None:
        scores["normal_deg"] = normal_deg(normal, truth.normal, truth.mask)
    return {key: float(values.nanmean()) for key, values in scores.items()}


class Estimate(NamedTuple):
    """A mean over pairs and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(values: Sequence[float] | np.ndarray, n: int = BOOTSTRAP_DRAWS, seed: int = 0) -> Estimate:
    """Mean over pairs with a 95 % percentile-bootstrap interval: pairs, not frames, are drawn with replacement.

    NaN pairs are left out; without any the estimate is NaN. With 8 pairs such an interval covers the truth about nine
    times in ten (normal data): read a bound near zero with care.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(0, len(known), (n, len(known)))
    low, high = np.percentile(known[draws].mean(1), [2.5, 97.5])
    return Estimate(float(known.mean()), float(low), float(high))


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, n: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> Estimate:
    """Estimate the mean of a - b over pairs: what the pairs have in common, which is most of it, cancels.

    Raises:
        ValueError: the two do not hold the same pairs.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a paired difference needs two lists of equal length, got shapes {a.shape} and {b.shape}")
    return bootstrap(a - b, n, seed)


class PairScores:
    """Scores by method, measure and pair; a hole is NaN.

    Example:
        >>> scores = PairScores(8)
        >>> scores.add(0, "generated", score(truth, rgb, normal))
        >>> write_json(path, scores.summary())
        >>> scores.difference("psnr_fg", "generated", "copy_reference").excludes_zero
    """

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self._values: dict[str, dict[str, np.ndarray]] = {}

    def add(self, pair: int, method: str, metrics: Mapping[str, float]) -> None:
        """Note one pair's measures; those already there stay unless named again."""
        rows = self._values.setdefault(method, {})
        for key, value in metrics.items():
            rows.setdefault(key, np.full(self.pairs, np.nan))[pair] = value

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order they were first added."""
        return tuple(self._values)

    def values(self, method: str, key: str) -> np.ndarray:
        """One number per pair; all NaN for what was never measured."""
        return self._values.get(method, {}).get(key, np.full(self.pairs, np.nan))

    def estimate(self, method: str, key: str) -> Estimate:
        return bootstrap(self.values(method, key))

    def difference(self, key: str, method: str, other: str) -> Estimate:
        """Estimate `method` minus `other` over the pairs."""
        return paired_difference(self.values(method, key), self.values(other, key))

    def summary(self) -> dict[str, dict]:
        """Return `{method: {measure: mean, …, "interval": {measure: [low, high]}}}`; null is "not measured"."""
        out: dict[str, dict] = {}
        for method, rows in self._values.items():
            found = {key: bootstrap(values) for key, values in rows.items()}
            out[method] = {key: _finite(e.mean) for key, e in found.items()}
            out[method]["interval"] = {k: None if math.isnan(e.mean) else [e.low, e.high] for k, e in found.items()}
        return out


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _at_least(hits: Tensor, size: int) -> slice:
    """Bounds of the true entries, widened to `size` where the axis allows it."""
    where = hits.nonzero()
    low, high = int(where.min()), int(where.max()) + 1
    missing = max(0, size - (high - low))
    low = max(0, low - missing // 2)
    high = min(len(hits), max(high, low + size))
    return slice(max(0, min(low, high - size)), high)
