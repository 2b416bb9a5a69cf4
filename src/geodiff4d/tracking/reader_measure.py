"""How well readings agree with the truth: correlation and gain by region, and the calibration that undoes shrinkage."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from geodiff4d.world.expressions import ACTIONS

REGIONS: dict[str, tuple[str, ...]] = {
    "blink": ("eyeBlink",), "jaw": ("jawOpen",), "smile": ("mouthSmile",), "pucker": ("mouthPucker", "mouthFunnel"),
    "brows_up": ("browInnerUp", "browOuterUp"), "brows_down": ("browDown",), "squint": ("eyeSquint",),
    "wide": ("eyeWide",), "tongue": ("tongueOut",),
}  # fmt: skip
"""Actions whose sum, left and right, is one signal."""
LEAST = 0.02
"""A signal that varies less in the truth is not measured."""


@dataclass(frozen=True)
class Agreement:
    """Correlation and gain (the reading regressed on the truth, 1 is all) of every region's signal."""

    corr: dict[str, float]
    gain: dict[str, float]
    inverse: dict[str, float]
    """The truth regressed on the reading: 1 where it is calibrated."""
    doubt: float
    """Root mean square of error over doubt: 1 where the reader knows how wrong it is."""

    def rounded(self) -> dict[str, float | str]:
        """Return one line for a log."""
        mean = sum(self.corr.values()) / max(len(self.corr), 1)
        signals = {k: f"{self.corr[k]:.2f}/{self.gain[k]:.2f}" for k in self.corr}
        return {"val_corr": round(mean, 3), "val_doubt": round(self.doubt, 2), **signals}


def signals(targets: Float[Tensor, "n targets"]) -> dict[str, Float[Tensor, " n"]]:
    """Return one number per reading and region: sums of coefficients, and both eyes' mean angles [rad]."""
    out = {}
    for region, names in REGIONS.items():
        chosen = [i for i, a in enumerate(ACTIONS) if a.removesuffix("Left").removesuffix("Right") in names]
        out[region] = targets[:, chosen].sum(1)
    eyes = targets[:, -6:]
    return out | {"gaze_across": eyes[:, [1, 4]].mean(1), "gaze_up": -eyes[:, [0, 3]].mean(1)}


def agreement(
    value: Float[Tensor, "n targets"],
    truth: Float[Tensor, "n targets"],
    sigma: Float[Tensor, "n targets"] | None = None,
) -> Agreement:
    """Compare readings with the truth, `n` instants of any number of people."""
    corr, gain, inverse = {}, {}, {}
    theirs = signals(truth)
    for name, x in signals(value).items():
        y = theirs[name] - theirs[name].mean()
        x = x - x.mean()
        xx, yy, xy = x.square().mean(), y.square().mean(), (x * y).mean()
        if yy.sqrt() > LEAST:
            corr[name] = float(xy / (xx * yy).sqrt().clamp(min=1e-12))
            gain[name] = float(xy / yy)
            inverse[name] = float(xy / xx.clamp(min=1e-12))
    doubt = float("nan")
    if sigma is not None:
        moves = sigma.amax(0) > 0
        doubt = float(((value - truth) / sigma.clamp(min=1e-6))[:, moves].square().mean().sqrt())
    return Agreement(corr, gain, inverse, doubt)


def fitted_calibration(
    value: Float[Tensor, "n targets"], truth: Float[Tensor, "n targets"], least: float = 0.2, most: float = 3.0
) -> tuple[Float[Tensor, " targets"], Float[Tensor, " targets"]]:
    """Return gain and offset per target by which the truth regressed on the calibrated reading has slope 1."""
    x, y = value - value.mean(0), truth - truth.mean(0)
    gain = ((x * y).mean(0) / x.square().mean(0).clamp(min=1e-9)).clamp(least, most)
    return gain, truth.mean(0) - gain * value.mean(0)
