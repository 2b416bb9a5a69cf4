"""VHAP's teeth: two rows of 60 vertices behind the lips, as its exports and GaussianAvatars' avatars expect them.

They take FLAME from 5023 to 5143 vertices and from 9976 to 10144 faces, in VHAP's order of vertices, faces and corners,
because `static_offset` is per vertex and a Gaussian is bound to a face by its number. Ours / theirs: the texture rows
do not overlap; and where the model has no jaw joint to follow (2023-no-jaw), the lower row follows the chin's
expressions.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

FLAME_VERTS = 5023
COLUMNS = 15
ROWS = 8
UPPER_LIP = (1713, 1715, 1716, 1735, 1696, 1694, 1657, 3543, 2774, 2811, 2813, 2850, 2833, 2832, 2830)
LOWER_LIP = (1576, 1577, 1773, 1774, 1795, 1802, 1865, 3503, 2948, 2905, 2898, 2881, 2880, 2713, 2712)
"""Vertices from corner to corner along the outer rim of each lip; each is a column of teeth."""

# Rows of 15 vertices, in VHAP's order.
UPPER_ROOT, LOWER_ROOT, UPPER_EDGE, LOWER_EDGE = 0, 1, 2, 3
UPPER_ROOT_BACK, UPPER_EDGE_BACK, LOWER_ROOT_BACK, LOWER_EDGE_BACK = 4, 5, 6, 7
UPPER = (UPPER_ROOT, UPPER_EDGE, UPPER_ROOT_BACK, UPPER_EDGE_BACK)
LOWER = (LOWER_ROOT, LOWER_EDGE, LOWER_ROOT_BACK, LOWER_EDGE_BACK)

STRIPS = (
    # row a, row b, diagonals fall first, wound the other way: front, back and biting edge
    (UPPER_ROOT, UPPER_EDGE, True, False), (UPPER_ROOT_BACK, UPPER_EDGE_BACK, True, True),
    (UPPER_EDGE_BACK, UPPER_EDGE, False, True), (LOWER_EDGE, LOWER_ROOT, False, False),
    (LOWER_ROOT_BACK, LOWER_EDGE_BACK, True, False), (LOWER_EDGE_BACK, LOWER_EDGE, False, False),
)  # fmt: skip
TEXTURE_ROWS = (UPPER_ROOT, UPPER_EDGE, UPPER_EDGE_BACK, UPPER_ROOT_BACK, LOWER_ROOT, LOWER_EDGE, LOWER_EDGE_BACK,
                LOWER_ROOT_BACK)  # fmt: skip
"""Rows from top to bottom in the strip that FLAME's atlas leaves free above the forehead."""


def positions(template: Float[np.ndarray, "verts 3"]) -> Float[np.ndarray, "teeth 3"]:
    """Return the teeth's vertices [m], placed by the lips; `d` is the mean distance between their rims."""
    upper, lower = template[list(UPPER_LIP)], template[list(LOWER_LIP)]
    d = np.linalg.norm(upper - lower, axis=1).mean()
    middle = (upper + lower) / 2
    middle[:, 1] = middle[:, 1].mean()
    middle[:, 2] -= 1.5 * d
    rows = np.tile(middle, (ROWS, 1, 1))
    for row in UPPER:
        rows[row, :, 1] += 0.1 * d + (2 * d if row in (UPPER_ROOT, UPPER_ROOT_BACK) else 0)
    for row in LOWER:
        rows[row, :, 1] -= 0.1 * d + (2 * d if row in (LOWER_ROOT, LOWER_ROOT_BACK) else 0)
        rows[row, :, 2] -= 0.4 * d
    for row in (UPPER_ROOT_BACK, UPPER_EDGE_BACK, LOWER_ROOT_BACK, LOWER_EDGE_BACK):
        rows[row, :, 2] -= d
    return rows.reshape(-1, 3)


def faces() -> Int[np.ndarray, "faces 3"]:
    """Return the 168 triangles over the teeth's own vertices, 0 to 119."""
    return np.array([corner for strip in STRIPS for corner in _strip(*strip)], np.int64)


def _strip(row_a: int, row_b: int, falling: bool, reverse: bool) -> Iterator[tuple[int, int, int]]:
    """Return two rows joined by two triangles a column, whose diagonals are mirrored at the middle."""
    for i in range(COLUMNS - 1):
        a, b = row_a * COLUMNS + i, row_b * COLUMNS + i
        if falling == (i < COLUMNS // 2):
            pair = ((a, b + 1, b), (a, a + 1, b + 1))
        else:
            pair = ((a, a + 1, b), (a + 1, b + 1, b))
        for x, y, z in pair:
            yield (x, z, y) if reverse else (x, y, z)


def weights() -> Float[np.ndarray, "teeth 5"]:
    """Return the skinning weights: the upper row follows the neck joint (the skull), the lower row the jaw."""
    out = np.zeros((ROWS, COLUMNS, 5))
    out[list(UPPER), :, 1] = 1
    out[list(LOWER), :, 2] = 1
    return out.reshape(-1, 5)


def identity_basis(shape_basis: Float[np.ndarray, "verts 3 shapes"]) -> Float[np.ndarray, "teeth 3 shapes"]:
    """Return the identity basis of the teeth: each column moves as the mean of its two lip vertices."""
    mean = (shape_basis[list(UPPER_LIP)] + shape_basis[list(LOWER_LIP)]) / 2
    return np.tile(mean, (ROWS, 1, 1))


def expression_basis(
    expr_basis: Float[np.ndarray, "verts 3 exprs"], skin_weights: Float[np.ndarray, "verts joints"], no_jaw: bool
) -> Float[np.ndarray, "teeth 3 exprs"]:
    """Return the expression basis of the teeth: zero, but without a jaw joint the lower row moves as the chin."""
    out = np.zeros((ROWS, COLUMNS, 3, expr_basis.shape[-1]))
    if no_jaw:
        chin = skin_weights[:, 2] > 0.95
        moved = expr_basis[chin] if chin.any() else expr_basis[list(LOWER_LIP)]
        out[list(LOWER)] = moved.mean(0)
    return out.reshape(-1, 3, expr_basis.shape[-1])


def texture_coordinates() -> Float[np.ndarray, "teeth 2"]:
    """Return the teeth's place in FLAME's atlas, v down: a band of 0.24 × 0.034 at its upper edge."""
    out = np.zeros((ROWS, COLUMNS, 2))
    out[..., 0] = np.linspace(0.62, 0.38, COLUMNS)
    out[list(TEXTURE_ROWS), :, 1] = np.linspace(0.0083, 0.0425, ROWS)[:, None]
    return out.reshape(-1, 2)
