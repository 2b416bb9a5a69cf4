"""A posed head as .sog, PlayCanvas' splats as images: about a twentieth of a .ply, read by most splat viewers.

Version 2 of the format: a zip of `meta.json` and lossless WebP images in which the same pixel of each belongs to the
same splat. Positions have 16 bits of a logarithm, rotations 26, opacity 8; scales, colours and harmonics are numbers of
entries in books of 256. Splats lie along a Morton curve, so that neighbours in space are neighbours in the images.

The numbers are those of our .ply (x right, y down, z away): the tools that make .sog files copy them from .ply files,
and viewers turn both alike.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from PIL import Image

from geodiff4d.avatar.drive import Performance
from geodiff4d.avatar.export_ply import posed_columns
from geodiff4d.avatar.model import Avatar
from geodiff4d.avatar.ply import REST, Columns, gather
from geodiff4d.core.files import fresh_file
from geodiff4d.render.harmonics import degree_of

BOOK = 256
"""Entries of a book."""
ROUNDS = 12
"""Rounds of k-means that make a book; later ones move no entry by as much as a step of 8 bits."""
PALETTE = 65536
"""Largest number of different sets of harmonics."""
PALETTE_WIDTH = 64
"""Sets of harmonics in a row of their image."""
LARGEST = 252
"""Alpha of a rotation whose largest component is w; x, y and z follow."""
MADE = (1980, 1, 1, 0, 0, 0)
"""Date of the files in the zip: the same avatar gives the same file."""


def packed(columns: Columns, degree: int = 0) -> bytes:
    """Return splats, as columns of a .ply, as a .sog file with harmonics up to a degree (0 to 3)."""
    where = Path("splats")
    means = gather(columns, "", 3, where).astype(np.float64)
    order = morton_order(means)
    images: dict[str, UInt8[np.ndarray, "h w c"]] = {}
    count = len(means)
    meta: dict[str, object] = {
        "version": 2, "asset": {"generator": "geodiff4d"}, "count": count, "antialias": False,
        "means": _means(images, means[order]),
        "scales": _book(images, "scales", gather(columns, "scale", 3, where)[order]),
        "quats": _quats(images, gather(columns, "rot", 4, where)[order]),
    }  # fmt: skip
    opacities = 1 / (1 + np.exp(-columns["opacity"][order].astype(np.float64)))
    meta["sh0"] = _book(images, "sh0", gather(columns, "f_dc", 3, where)[order], np.rint(255 * opacities))
    if degree:
        rest = gather(columns, "f_rest", REST, where)[order].reshape(count, 3, REST // 3)
        meta["shN"] = _harmonics(images, rest[..., : (degree + 1) ** 2 - 1], degree)
    return _zipped(meta, images)


@torch.no_grad()
def export_sog(avatar: Avatar, performance: Performance, path: Path, frame: int = 0) -> int:
    """Write the avatar at one frame of a performance, whole or not at all; returns the number of splats.

    Raises:
        UserError: the performance has no such frame.
    """
    posed = avatar.posed(*performance.frame(frame))
    degree = 0 if posed.shading is None else degree_of(posed.shading.coefficients)
    data = packed(posed_columns(posed.gaussians, posed.colors, posed.shading), degree)
    with fresh_file(path) as temporary:
        temporary.write_bytes(data)
    return len(posed.gaussians)


def morton_order(means: Float[np.ndarray, "n 3"]) -> Integer[np.ndarray, " n"]:
    """Return the order of points along a Morton curve of 10 bits an axis."""
    low = means.min(0, initial=np.inf)
    span = np.maximum(means.max(0, initial=-np.inf) - low, 1e-12)
    cells = np.floor((means - low) / span * 1023).astype(np.int64)
    code = np.zeros(len(means), np.int64)
    for bit in range(10):
        for axis in range(3):
            code |= ((cells[:, axis] >> bit) & 1) << (3 * bit + axis)
    return np.argsort(code, kind="stable")


def book(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " entries"]:
    """Return 256 numbers, in order, that are close to the values: k-means on a line, begun at their quantiles."""
    line = np.sort(values.astype(np.float64))
    sums = np.concatenate([[0.0], line.cumsum()])
    entries = np.quantile(line, (np.arange(BOOK) + 0.5) / BOOK)
    for _ in range(ROUNDS):
        edges = np.searchsorted(line, (entries[1:] + entries[:-1]) / 2)
        ends = np.concatenate([[0], edges, [len(line)]])
        counts = np.diff(ends)
        # An entry that is nearest to nothing stays where it is.
        entries = np.where(counts > 0, np.diff(sums[ends]) / np.maximum(counts, 1), entries)
    return entries


def _means(images: dict[str, UInt8[np.ndarray, "h w c"]], means: Float[np.ndarray, "n 3"]) -> dict[str, object]:
    logs = np.sign(means) * np.log1p(np.abs(means))
    low, high = logs.min(0), logs.max(0)
    codes = np.rint((logs - low) / np.maximum(high - low, 1e-12) * 65535).astype(np.uint16)
    images["means_l"], images["means_u"] = _square(codes & 255), _square(codes >> 8)
    return {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]}


def _quats(images: dict[str, UInt8[np.ndarray, "h w c"]], quats: Float[np.ndarray, "n 4"]) -> dict[str, object]:
    """Add rotations (wxyz) without their largest component, which is made positive."""
    rows = np.arange(len(quats))
    unit = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    largest = np.abs(unit).argmax(1)
    unit *= np.where(unit[rows, largest] < 0, -1, 1)[:, None]
    three = unit[np.arange(4) != largest[:, None]].reshape(-1, 3)
    codes = np.rint((three * np.sqrt(2) / 2 + 0.5) * 255)
    images["quats"] = _square(np.concatenate([codes, LARGEST + largest[:, None]], 1))
    return {"files": ["quats.webp"]}


def _book(
    images: dict[str, UInt8[np.ndarray, "h w c"]], name: str, values: Float[np.ndarray, "n 3"],
    alpha: Float[np.ndarray, " n"] | None = None,
) -> dict[str, object]:  # fmt: skip
    """Add three values of each splat as entries of one book."""
    entries = book(values.reshape(-1))
    codes = _nearest(entries, values)
    images[name] = _square(codes if alpha is None else np.concatenate([codes, alpha[:, None]], 1))
    return {"codebook": entries.tolist(), "files": [f"{name}.webp"]}


def _harmonics(
    images: dict[str, UInt8[np.ndarray, "h w c"]], rest: Float[np.ndarray, "n 3 k"], degree: int
) -> dict[str, object]:
    """Add harmonics as entries of a palette: each splat has its own as long as there is room."""
    n, _, k = rest.shape
    labels, palette = np.arange(n), rest
    if n > PALETTE:
        labels = alike(rest.reshape(n, -1))
        counts = np.bincount(labels, minlength=PALETTE)[:, None, None]
        palette = np.zeros((PALETTE, 3, k))
        np.add.at(palette, labels, rest)
        palette /= counts
    entries = book(palette.reshape(-1))
    rows = -(-len(palette) // PALETTE_WIDTH)
    image = np.zeros((rows * PALETTE_WIDTH, k, 3), np.uint8)
    image[: len(palette)] = _nearest(entries, palette).transpose(0, 2, 1)
    images["shN_centroids"] = image.reshape(rows, PALETTE_WIDTH * k, 3)
    images["shN_labels"] = _square(np.stack([labels & 255, labels >> 8, 0 * labels], 1))
    files = ["shN_centroids.webp", "shN_labels.webp"]
    return {"count": len(palette), "bands": degree, "codebook": entries.tolist(), "files": files}


def alike(rows: Shaped[np.ndarray, "n k"], groups: int = PALETTE) -> Integer[np.ndarray, " n"]:
    """Return a group for each row, from 0: halves of halves, each split at the median of what differs most.

    `groups` is a power of two, and at most the number of rows.
    """
    labels = np.zeros(len(rows), np.int64)
    parts = [np.arange(len(rows))]
    while len(parts) < groups:
        halves = []
        for part in parts:
            values = rows[part]
            ordered = part[values[:, np.ptp(values, 0).argmax()].argsort(kind="stable")]
            halves += [ordered[: len(part) // 2], ordered[len(part) // 2 :]]
        parts = halves
    for label, part in enumerate(parts):
        labels[part] = label
    return labels


def _nearest(entries: Float[np.ndarray, " entries"], values: Float[np.ndarray, "..."]) -> Integer[np.ndarray, "..."]:
    return np.searchsorted((entries[1:] + entries[:-1]) / 2, values)


def _square(rows: Shaped[np.ndarray, "n c"]) -> UInt8[np.ndarray, "h w c"]:
    """Return rows of bytes as the pixels of an image that is about as high as wide."""
    side = max(1, int(np.ceil(np.sqrt(len(rows)))))
    image = np.zeros((-(-len(rows) // side) * side, rows.shape[1]), np.uint8)
    image[: len(rows)] = rows
    return image.reshape(-1, side, rows.shape[1])


def _zipped(meta: Mapping[str, object], images: Mapping[str, UInt8[np.ndarray, "h w c"]]) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("meta.json", MADE), json.dumps(meta, separators=(",", ":")))
        for name, image in images.items():
            file = io.BytesIO()
            # `exact` keeps colours below an opacity of 0.
            Image.fromarray(image).save(file, "WEBP", lossless=True, exact=True, quality=100, method=4)
            archive.writestr(zipfile.ZipInfo(f"{name}.webp", MADE), file.getvalue())
    return whole.getvalue()
