"""Expression gain and identity of methods as figures and tables, for image pairs and driven videos alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from geodiff4d.evaluate.expression_gain import (
    REGIONS,
    Products,
    averaged,
    cell,
    change_products,
    gain_cells,
    in_region,
    pooled,
    video_products,
)
from geodiff4d.evaluate.methods import TITLES
from geodiff4d.evaluate.metrics import bootstrap
from geodiff4d.evaluate.readers import IDENTITIES

READERS = {
    "blendshapes": "MediaPipe's blendshapes, which the project has never seen",
    "tracker": "our own tracker's coefficients",
}
"""Keys of readers that read expressions, in the order of the tables."""
IDENTITY_TITLES = {"sface": "SFace, cosine ↑", "dlib": "dlib, distance ↓"}

Rows = Float[np.ndarray, "rows coefficients"]


@dataclass
class Scores:
    """What methods were worth, item by item; an item is a person, or a portrait driven by one video."""

    products: dict[str, dict[str, dict[str, list[Products]]]] = field(default_factory=dict)
    """By method, reader and region."""
    identity: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By method and measure; NaN where a picture shows no face."""

    def add_video(self, method: str, reader: str, names: Sequence[str], driver: Rows, made: Rows) -> None:
        """Add a video, frame by frame beside its driver."""
        for region in REGIONS:
            chosen = in_region(names, region)
            self._add(method, reader, region, video_products(driver[:, chosen], made[:, chosen]))

    def add_change(self, method: str, reader: str, names: Sequence[str], rest: Rows, truth: Rows, made: Rows) -> None:
        """Add photographs: each row's change from the portrait (rest), true and made; rows with NaN are left out."""
        seen = np.isfinite(np.concatenate([rest, truth, made], 1)).all(1)
        for region in REGIONS:
            chosen = in_region(names, region)
            for r, t, m in zip(rest[seen][:, chosen], truth[seen][:, chosen], made[seen][:, chosen], strict=True):
                self._add(method, reader, region, change_products(t - r, m - r))

    def _add(self, method: str, reader: str, region: str, products: Products) -> None:
        of_reader = self.products.setdefault(method, {}).setdefault(reader, {})
        of_reader.setdefault(region, []).append(products)

    def add_identity(self, method: str, key: str, values: Sequence[float]) -> None:
        """Add an item's identity measure, one value an item."""
        self.identity.setdefault(method, {}).setdefault(key, []).extend(float(v) for v in values)

    def summary(self, methods: Sequence[str]) -> dict[str, Any]:
        """Return `{method: {reader: {region: {"gain", "cos"}}, "sface", "dlib"}}`; null is "not measured"."""
        out: dict[str, Any] = {}
        for method in methods:
            row: dict[str, Any] = {}
            for reader in READERS:
                regions = self.products.get(method, {}).get(reader)
                row[reader] = None if regions is None else {r: pooled(p) for r, p in regions.items()}
            for key in IDENTITIES:
                row[key] = averaged(bootstrap(self.identity.get(method, {}).get(key, [])))
            out[method] = row
        return out


def tables(summary: Mapping[str, Any], cos: str, missing: Mapping[str, str]) -> list[str]:
    """Write a Markdown table for every reader and one for identity; `cos` is what to call the agreement."""
    lines: list[str] = []
    for reader, said in READERS.items():
        lines += [f"## Gain / {cos}, by {said}", ""]
        if reader in missing:
            lines += [f"n/a: {missing[reader]}.", ""]
            continue
        lines += ["| | " + " | ".join(REGIONS) + " |", "|---" * (len(REGIONS) + 1) + "|"]
        for method, row in summary.items():
            lines.append(f"| {TITLES[method]} | " + " | ".join(gain_cells(row[reader], tuple(REGIONS))) + " |")
        lines.append("")
    absent = sorted({missing[k] for k in IDENTITIES if k in missing})
    lines += ["## Identity", "", *(f"n/a: {why}." for why in absent)]
    if len([k for k in IDENTITIES if k in missing]) < len(IDENTITIES):
        lines += ["| | " + " | ".join(IDENTITY_TITLES.values()) + " |", "|---" * (len(IDENTITIES) + 1) + "|"]
        for method, row in summary.items():
            lines.append(f"| {TITLES[method]} | " + " | ".join(cell(row[k], 3) for k in IDENTITIES) + " |")
    return [*lines, ""]
