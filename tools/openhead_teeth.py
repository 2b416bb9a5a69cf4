"""Teeth, gums and the tongue's place: two modelled rows that are rigid to skull and jaw.

MakeHuman's bands of teeth say where teeth are and how they change with identity: an affine map per person, fitted to
the band, carries the modelled row, so every new vertex stays a fixed linear combination of base vertices. The bands
themselves become the gums (17 columns of 4), the rows are appended. Sizes are the textbook's means for adults [mm].
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

COLUMNS = 17
NEW_BOXES = {"teeth_row_upper": (0.535, 0.715, 0.036, 0.215), "teeth_row_lower": (0.575, 0.715, 0.036, 0.215)}
"""Places in the atlas: left, top, width, height; the rows stand upright."""
TONGUE_SCALE, TONGUE_MOVE = np.array([0.86, 0.95, 0.97]), np.array([0.0, -0.0025, -0.002])
"""The tongue lies within the lower row."""


@dataclass(frozen=True)
class Row:
    """One dental arch on the mean head, in millimetres; index 0 is the central incisor."""

    band: str
    up: float
    """+1 where crowns hang down from gums above them, -1 for the lower row."""
    front: float
    """z of the incisors' front."""
    half_width: float
    depth: float
    edge: tuple[float, ...]
    """y of each tooth's edge at the front of the arch."""
    rise: float
    """How much higher the arch's ends are than its front."""
    widths: tuple[float, ...]
    heights: tuple[float, ...]
    ridge: tuple[float, float]
    """How far the gums reach beyond the crowns on the lips' side and on the tongue's."""


UPPER = Row(
    "teeth_upper", 1.0, 102.2, 30.0, 42.0, (-52.0, -51.3, -52.2, -51.4, -51.0, -50.6, -50.6), 4.0,
    (8.5, 6.6, 7.6, 7.0, 6.8, 10.2, 9.6), (10.3, 9.0, 10.0, 8.6, 8.2, 7.6, 7.2), (13.0, 12.0),
)  # fmt: skip
LOWER = Row(
    "teeth_lower", -1.0, 98.4, 26.8, 40.0, (-50.6, -50.6, -50.2, -50.8, -51.0, -51.2, -51.2), 4.0,
    (5.4, 5.9, 6.9, 7.0, 7.1, 11.0, 10.5), (8.8, 9.2, 9.8, 8.4, 8.0, 7.4, 7.0), (8.0, 7.5),
)  # fmt: skip
POWER = 3.2
"""The arch is z = front - depth · (|x| / half_width)^POWER."""


class Arch:
    """A point of the arch by arc length, and the direction toward the lips there."""

    def __init__(self, row: Row):
        x = np.linspace(0, row.half_width, 400)
        z = row.front - row.depth * (x / row.half_width) ** POWER
        self.x, self.z = x, z
        self.s = np.r_[0, np.cumsum(np.hypot(np.diff(x), np.diff(z)))]
        self.length, self.row = self.s[-1], row

    def at(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (points [n, 2] as x and z, outward unit vectors [n, 2], rise [n]) at signed arc lengths."""
        side, a = np.sign(s), np.abs(s)
        x, z = np.interp(a, self.s, self.x), np.interp(a, self.s, self.z)
        h = 0.5
        dx = np.interp(a + h, self.s, self.x) - np.interp(a - h, self.s, self.x)
        dz = np.interp(a + h, self.s, self.z) - np.interp(a - h, self.s, self.z)
        length = np.hypot(dx, dz)
        out = np.stack([-dz / length * side, dx / length], 1)
        out[a == 0] = [0, 1]
        return np.stack([x * side, z], 1), out, self.row.rise * (self.row.front - z) / self.row.depth


def crowns(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Model the crowns → vertices [n, 3] [mm], uv [n, 2] in the unit square (v along the arch), triangles [m, 3]."""
    arch = Arch(row)
    widths = np.array(row.widths) * 0.985 * arch.length / sum(row.widths)
    starts = np.r_[0, np.cumsum(widths)]
    columns = []  # (arc length, tooth, fraction of its width)
    for tooth in range(7):
        for f in (0.05, 0.32, 0.68, 0.95) if tooth < 4 else (0.06, 0.5, 0.94):
            columns.append((starts[tooth] + f * widths[tooth], tooth, f))
    columns = [(-s, t, f) for s, t, f in columns[::-1]] + columns
    s, tooth, f = (np.array(c) for c in zip(*columns, strict=True))
    at, out, rise = arch.at(s)
    h = np.array(row.heights)[tooth]
    side = np.abs(2 * f - 1)  # 0 in a tooth's middle, 1 between teeth
    groove = 0.9 * side**4
    short = np.select([tooth < 2, tooth == 2], [0.7 * side**5, 1.6 * side**1.3], 0.8 * side**2)
    edge = np.array(row.edge)[tooth] + rise + row.up * short
    back = np.interp(tooth, [0, 2, 3, 4, 5], [1.6, 2.4, 5.0, 6.0, 8.0])  # thickness at the edge
    root = np.interp(tooth, [0, 2, 3, 5], [5.5, 6.5, 7.5, 9.0])
    # How far from the labial surface (inward) and how high above the edge each row of vertices lies.
    rows = [
        (0.5 + groove, h + 1.2), (0.1 + groove, 0.72 * h), (0.0 + groove, 0.42 * h), (0.35 + groove, 0.10 * h),
        (0.9 + 0.6 * groove, 0 * h), (back - 0.4 * groove, 0.02 * h), (root - groove, 0.62 * h), (root, h + 1.2),
    ]  # fmt: skip
    points = []
    for depth, height in rows:
        p = at - out * depth[:, None]
        points.append(np.stack([p[:, 0], edge + row.up * height, p[:, 1]], 1))
    n, m = len(rows), len(s)
    along = np.cumsum(np.r_[0, np.maximum(np.linalg.norm(np.diff(points[2], axis=0), axis=1), 1e-3)])
    across = np.array([0, 0.2, 0.36, 0.52, 0.58, 0.66, 0.84, 1.0])
    uv = np.stack(np.broadcast_arrays(across[:, None], along[None] / along[-1]), -1).reshape(-1, 2)
    i, k = np.meshgrid(np.arange(m - 1), np.arange(n - 1), indexing="ij")
    a, b, c, d = k * m + i, k * m + i + 1, (k + 1) * m + i + 1, (k + 1) * m + i
    first, second = np.stack([a, c, b], -1).reshape(-1, 3), np.stack([a, d, c], -1).reshape(-1, 3)
    faces = np.concatenate([first, second])
    if row.up < 0:  # mirrored, and so is its chart: all charts turn one way
        return np.concatenate(points), uv * [-1, 1] + [1, 0], faces[:, [0, 2, 1]]
    return np.concatenate(points), uv, faces


def gums(row: Row) -> np.ndarray:
    """Return the ridge's vertices [COLUMNS, 4, 3] [mm]: lips' side far and near, crest, tongue's side."""
    arch = Arch(row)
    s = np.linspace(-1, 1, COLUMNS) * arch.length
    at, out, rise = arch.at(s)
    tooth = np.clip(np.searchsorted(np.cumsum(row.widths) / sum(row.widths), np.abs(s) / arch.length), 0, 6)
    line = np.array(row.edge)[tooth] + rise + row.up * np.array(row.heights)[tooth]
    line = np.convolve(np.pad(line, 1, mode="edge"), [0.25, 0.5, 0.25], "valid")
    thick = np.interp(tooth, [0, 2, 3, 5], [6.5, 7.5, 8.5, 10.0])
    far, tongue = row.ridge
    profile = [
        (0.6 if row.up > 0 else 3.5, far),
        (-0.7, 2.2),
        (1.6, -0.9),
        (thick + 1.0, tongue),
    ]  # (inward, beyond the gum line)
    return np.stack([_lift(at - out * np.reshape(inward, (-1, 1)), line + row.up * up) for inward, up in profile], 1)


def _lift(at: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([at[:, 0], y, at[:, 1]], 1)


def band_grid(band: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Order a band's 68 vertices [68, 3] → indices [COLUMNS, 4]: the lips' side by height, last the tongue's edge."""
    directed = {(int(f[k]), int(f[(k + 1) % 3])) for f in faces for k in range(3)}
    follow = {a: b for a, b in directed if (b, a) not in directed}
    loop = [next(iter(follow))]
    while follow[loop[-1]] != loop[0]:
        loop.append(follow[loop[-1]])
    # The boundary crosses the middle twice; the tongue's side is the one further back.
    middle = min((i for i in loop if abs(band[i, 0]) < 1e-3), key=lambda i: band[i, 2])
    at, half = loop.index(middle), COLUMNS // 2
    inner = np.array([loop[(at + k) % len(loop)] for k in range(-half, half + 1)])
    inner = inner if band[inner[0], 0] < band[inner[-1], 0] else inner[::-1]
    outer = np.setdiff1d(np.arange(len(band)), inner)
    angle = np.arctan2(band[outer, 0], band[outer, 2] - band[:, 2].min() + 0.004)
    outer = outer[np.argsort(angle, kind="stable")].reshape(COLUMNS, 3)
    outer = np.take_along_axis(outer, np.argsort(-band[outer, 1], 1), 1)
    return np.c_[outer, inner]


def extend(cut) -> None:
    """Append the crowns' topology to the cut; their places follow in `place`, until then they copy a band vertex."""
    for name, row in (("teeth_row_upper", UPPER), ("teeth_row_lower", LOWER)):
        points, uv, faces = crowns(row)
        n = cut.matrix.shape[0]
        stand_in = int(cut.faces[cut.group == row.band].min())
        cut.matrix = sp.vstack([cut.matrix, cut.matrix[[stand_in] * len(points)]]).tocsr()
        cut.faces = np.concatenate([cut.faces, faces + n])
        cut.uv_faces = np.concatenate([cut.uv_faces, faces + len(cut.uv)])
        cut.uv = np.concatenate([cut.uv, uv * [1, -1]])
        cut.group = np.concatenate([cut.group, np.full(len(faces), name)])


def place(cut, samples: np.ndarray, actions: np.ndarray, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Put crowns and gums into the aligned samples and give them rigid actions; fit the tongue between them."""
    samples, actions = samples.copy(), actions.copy()
    rest, raw = samples.mean(0), actions.copy()
    for name, row in (("teeth_row_upper", UPPER), ("teeth_row_lower", LOWER)):
        band = np.unique(cut.faces[cut.group == row.band])
        mine = np.unique(cut.faces[cut.group == name])
        local = np.searchsorted(band, cut.faces[cut.group == row.band])
        grid = band_grid(rest[band], local)
        if row.up < 0:  # the gums' far vertex is the lowest of the three, the crest the highest
            grid[:, :3] = grid[:, 2::-1]
        target = np.empty((len(band), 3))
        target[grid] = 1e-3 * gums(row)
        target = np.concatenate([target, 1e-3 * crowns(row)[0]])
        known = np.c_[rest[band], np.ones(len(band))]
        # An affine map of the band: target = [target, 1] @ pinv([band, 1]) @ band of the person.
        carry = np.c_[target, np.ones(len(target))] @ np.linalg.pinv(known)
        moved = np.einsum("tb,sbx->stx", carry, samples[:, band])
        motion = [rigid_motion(rest[band], a[band], target) if row.up < 0 else 0 * target for a in actions]
        both = np.r_[band, mine]
        samples[:, both], actions[:, both] = moved, np.stack(motion)
    tongue = np.unique(cut.faces[cut.group == "tongue"])
    middle = samples[:, tongue].mean(1, keepdims=True)
    samples[:, tongue] = middle + TONGUE_SCALE * (samples[:, tongue] - middle) + TONGUE_MOVE
    for i, name in enumerate(names):
        if name.startswith("jaw"):
            actions[i, tongue] = rigid_motion(rest[band], raw[i, band], samples[:, tongue].mean(0))
    out = actions[names.index("tongueOut")]
    # It lies lower than MakeHuman's: on the way out it climbs over the teeth.
    share = np.clip(out[tongue, 2] / out[tongue, 2].max(), 0, 1)
    out[tongue, 1] += 0.004 * share
    return samples, actions


def rigid_motion(points: np.ndarray, displacement: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return how the rigid motion nearest to `displacement` moves `target`; small ones are none."""
    if np.abs(displacement.mean(0)).max() < 5e-4:
        return 0 * target
    a, b = points - points.mean(0), points + displacement
    u, _, vt = np.linalg.svd(a.T @ (b - b.mean(0)))
    R = (u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt).T
    return (target - points.mean(0)) @ R.T + b.mean(0) - target
