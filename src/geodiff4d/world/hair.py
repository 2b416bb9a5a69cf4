"""Hair with volume: a mesh of strands that leave the crown, follow the skull to the hairline, and hang where long.

Strands are indexed by their azimuth φ around the crown (0 = forehead, π/2 = the person's left) and follow the polar
angle θ; the skull is read from the subject's own vertices as a radius per direction, so hair fits whoever wears it.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import KDTree

from geodiff4d.render.viewpoints import openhead
from geodiff4d.world import atlas
from geodiff4d.world.deferred import STRAND
from geodiff4d.world.mesh import Piece

SHELL_DEPTH = (0.72, 0.88, 1.0)
"""Of the hair's thickness, per shell from the inside out."""
HANG_SHARE = (0.94, 1.0, 0.97)
HAIR_SHELL = 1
"""Number of the innermost shell in `Scene.shell`."""
KINDS = ["bald", "buzz", "short", "short", "crop", "bob", "long", "long", "wavy", "curly", "afro", "back"]
"""About equally often; some twice."""
COLUMNS, ROWS, HANGING_ROWS = 96, 22, 14
CENTRE = np.array([0.0, 0.035, -0.005])
"""Middle of the skull on the template [m]; directions and radii are taken from here."""
TILT = np.radians(20.0)
"""The crown lies this far behind the top of the head."""
HAIRLINE = np.array(
    [
        [0.000, 0.100, 0.088], [0.030, 0.100, 0.080], [0.055, 0.086, 0.060], [0.066, 0.058, 0.047],
        [0.074, 0.028, 0.030], [0.078, 0.004, 0.022], [0.080, 0.034, 0.004], [0.080, 0.036, -0.010],
        [0.078, 0.004, -0.034], [0.066, -0.046, -0.064], [0.030, -0.060, -0.086], [0.000, -0.062, -0.092],
    ]
)  # fmt: skip
"""Forehead, temple, sideburn, over and behind the ear, nape: points of the person's left side on the template."""


@dataclass(frozen=True)
class HairStyle:
    """What a hairdresser would ask."""

    kind: str
    """One of `KINDS`."""
    top_m: float = 0.0
    """Thickness over the top."""
    side_m: float = 0.0
    hang_m: float = 0.0
    """Length that hangs below the widest place of the head."""
    fringe: float = 0.0
    """How far hair comes down the forehead, as a share of the way to the brows."""
    part: float = 0.0
    """Lateral place of the parting [m]; 0 is none."""
    lumps_m: float = 0.0015
    curls_m: float = 0.0
    recession: float = 0.0
    """How far the temples' hairline has retreated, 0 to 1."""


def draw_style(rng: np.random.Generator) -> HairStyle:
    """Draw a style; every kind about as often."""
    kind = str(rng.choice(KINDS))
    u = rng.uniform
    base = HairStyle(
        kind,
        lumps_m=u(0.001, 0.0025),
        recession=max(0.0, rng.normal(0.1, 0.35)) if kind in ("buzz", "short", "bald") else 0.0,
    )
    part = float(rng.choice([-1, 1]) * u(0.015, 0.035)) if rng.random() < 0.6 else 0.0
    some = rng.random()
    sizes = {
        "bald": {},
        "buzz": {"top_m": u(0.004, 0.008), "side_m": u(0.002, 0.005), "lumps_m": 0.0004},
        "short": {"top_m": u(0.014, 0.03), "side_m": u(0.006, 0.014), "part": part, "fringe": u(0, 0.2)},
        "crop": {"top_m": u(0.016, 0.028), "side_m": u(0.01, 0.018), "fringe": u(0.35, 0.8)},
        "bob": {"top_m": u(0.014, 0.024), "side_m": u(0.016, 0.028), "hang_m": u(0.05, 0.1), "part": part},
        "long": {"top_m": u(0.012, 0.022), "side_m": u(0.014, 0.026), "hang_m": u(0.12, 0.22), "part": part},
        "wavy": {
            "top_m": u(0.014, 0.026),
            "side_m": u(0.018, 0.03),
            "hang_m": u(0.08, 0.2),
            "part": part,
            "curls_m": u(0.0008, 0.0018),
            "lumps_m": u(0.002, 0.004),
        },
        "curly": {"top_m": u(0.022, 0.04), "side_m": u(0.016, 0.03), "curls_m": u(0.003, 0.006)},
        "afro": {"top_m": u(0.03, 0.07), "side_m": u(0.025, 0.055), "curls_m": u(0.0015, 0.003)},
        "back": {"top_m": u(0.006, 0.014), "side_m": u(0.005, 0.01), "lumps_m": u(0.0005, 0.0015)},
    }
    share = {"bob": 0.5, "long": 0.35, "wavy": 0.25}.get(kind, 0.0)
    if some < share:
        base = replace(base, fringe=u(0.4, 0.85))
    if kind == "curly" and some < 0.4:
        base = replace(base, hang_m=u(0, 0.05))
    return replace(base, **sizes[kind])


def direction(phi: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Unit vectors from the skull's centre, [..., 3]."""
    up, forward = np.array([0, np.cos(TILT), -np.sin(TILT)]), np.array([0, np.sin(TILT), np.cos(TILT)])
    ring = np.cos(phi)[..., None] * forward + np.sin(phi)[..., None] * np.array([1.0, 0, 0])
    return np.cos(theta)[..., None] * up + np.sin(theta)[..., None] * ring


def angles(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (φ, θ) of points around the skull's centre."""
    p = points - CENTRE
    up, forward = np.array([0, np.cos(TILT), -np.sin(TILT)]), np.array([0, np.sin(TILT), np.cos(TILT)])
    return np.arctan2(p[..., 0], p @ forward), np.arccos(np.clip(p @ up / np.linalg.norm(p, axis=-1), -1, 1))


@lru_cache
def _hairline() -> tuple[np.ndarray, np.ndarray]:
    phi, theta = angles(HAIRLINE)
    phi[-1] = np.pi
    order = np.argsort(phi)
    return phi[order], theta[order]


def hairline(style: HairStyle, rng: np.random.Generator) -> PchipInterpolator:
    """Return θ of the hairline over φ in [-π, π]: a little uneven, and different on both sides."""
    phi, theta = _hairline()
    theta = (
        theta
        - 0.16 * style.recession * np.exp(-(((phi - 0.55) / 0.3) ** 2))
        - 0.05 * min(style.recession, 1) * np.exp(-((phi / 0.8) ** 2))
    )
    both = np.r_[-phi[::-1][:-1], phi], np.r_[theta[::-1][:-1], theta]
    smooth = PchipInterpolator(*both)
    grid = np.linspace(-np.pi, np.pi, 241)
    uneven = (
        gaussian_filter1d(rng.normal(size=240), 3, mode="wrap") * 0.035
        + gaussian_filter1d(rng.normal(size=240), 14, mode="wrap") * 0.08
    )
    return PchipInterpolator(grid, smooth(grid) + rng.normal(0, 0.03) + np.r_[uneven, uneven[:1]])


@lru_cache
def _skull_neighbours() -> tuple[np.ndarray, np.ndarray, KDTree]:
    """Vertices whose radius makes the skull (ears, eyes and mouth left out), and a tree over their directions."""
    head = openhead()
    inside = torch.zeros(len(head.template), dtype=torch.bool)
    for name in ("ears", "eyes", "teeth", "tongue", "mouth", "sockets"):
        inside |= head.regions.get(name, torch.zeros_like(inside))
    keep = np.nonzero(~inside.numpy() & (head.template[:, 1] > -0.12).numpy())[0]
    d = head.template[keep].numpy() - CENTRE
    return keep, d, KDTree(d / np.linalg.norm(d, axis=1, keepdims=True))


def skull_radius(vertices: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Distance from the skull's centre to the surface along directions [..., 3], from a subject's rest vertices."""
    keep, _, tree = _skull_neighbours()
    radius = np.linalg.norm(vertices[keep] - CENTRE, axis=1)
    distance, index = tree.query(directions.reshape(-1, 3), k=6)
    weight = 1 / (distance**2 + 1e-4)
    return ((radius[index] * weight).sum(1) / weight.sum(1)).reshape(directions.shape[:-1])


def _waves(phi: np.ndarray, theta: np.ndarray, rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """Periodic noise over φ that hardly changes along a strand; about unit standard deviation."""
    k, turn, start = rng.integers(low, high, count), rng.normal(0, 2.0, count), rng.uniform(0, 2 * np.pi, count)
    return np.cos(phi[..., None] * k + theta[..., None] * turn + start).sum(-1) * np.sqrt(2 / count)


def build(style: HairStyle, vertices: Float[torch.Tensor, "verts 3"], rng: np.random.Generator) -> list[Piece]:
    """Grow hair on a subject's rest vertices, as shells from the inside out; nothing for bald heads.

    The hairline comes first from the generator: the scalp is painted with a generator of the same key.
    """
    line = hairline(style, rng)
    if style.kind == "bald":
        return []
    phi = -np.pi + 2 * np.pi * (np.arange(COLUMNS) + 0.5) / COLUMNS
    end = line(phi)
    # A fringe comes down from the forehead's hairline; at the temples it joins it again.
    brow = angles(np.array([[0.0, 0.056, 0.107]]))[1][0]
    end = end + style.fringe * (brow - end) * np.exp(-((phi / 0.75) ** 6))
    # Locks end unevenly.
    end = end + rng.normal(0, 0.012 + 0.03 * style.fringe, COLUMNS)
    hanging = np.zeros(COLUMNS)
    if style.hang_m > 0:
        behind = np.clip((np.abs(phi) - 0.95) / 0.35, 0, 1)
        hanging = style.hang_m * behind * (1 + 0.08 * _waves(phi, phi * 0, rng, 2, 18, 8))
        widest = np.arccos(np.clip(-0.12, -1, 1)) + 0.1
        end = np.where(behind > 0, np.minimum(np.maximum(end, 1.5), widest), end)
    t = np.linspace(0.03, 1, ROWS)
    theta = end[:, None] * t
    P = np.repeat(phi[:, None], ROWS, 1)
    d = direction(P, theta)
    base = skull_radius(vertices.numpy(), d)
    thick = _thickness(style, P, theta, end[:, None], hanging[:, None] > 0, d, rng)
    if style.curls_m > 0:
        curls = gaussian_filter1d(rng.normal(size=P.shape), 1.1, axis=0, mode="wrap")
        thick = thick + 3 * style.curls_m * gaussian_filter1d(curls, 0.7, axis=1, mode="nearest")
    sway = int(rng.integers(1 << 62))
    out = []
    for shell, depth in enumerate(SHELL_DEPTH):
        points = CENTRE + d * (base + np.maximum(depth * thick, 0.0008 * (shell + 1)))[..., None]
        if style.hang_m > 0:
            # The same sway for every shell: each continues its own strands.
            falling = _hang(points, hanging * HANG_SHARE[shell], np.random.default_rng(sway))
            points = np.concatenate([points, falling], 1)
        out.append(_mesh(points, hanging > 0, shell))
    return out


def _thickness(
    style: HairStyle, phi: np.ndarray, theta: np.ndarray, end: np.ndarray, hangs: np.ndarray, d: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    side = np.clip((theta - 0.5) / 0.9, 0, 1)
    thick = style.top_m + (style.side_m - style.top_m) * side * side * (3 - 2 * side)
    # Toward the hairline hair lies down: slowly where it is combed back, at once where it is a fringe.
    reach, power = {
        "short": (0.75, 0.9),
        "curly": (0.5, 0.6),
        "afro": (0.35, 0.55),
        "buzz": (0.25, 0.8),
        "back": (0.6, 0.8),
    }.get(style.kind, (0.3, 0.6))
    left = np.clip((end - theta) / reach, 0, 1) ** power
    thick = thick * np.where(hangs, 1.0, 0.06 + 0.94 * left)
    if style.part:
        x = d[..., 0] * 0.1
        front = np.clip(np.cos(phi) + 0.3, 0, 1) * np.clip((end - theta) / 0.2, 0, 1)
        thick = thick - 0.55 * style.top_m * front * np.exp(-(((x - style.part) / 0.006) ** 2))
        thick = thick * (1 - 0.3 * front * np.clip((x - style.part) * np.sign(style.part) / 0.03, 0, 1))
    # Beside the face, hanging hair lies close to the temples.
    if style.hang_m > 0:
        thick = thick * (1 - 0.6 * np.exp(-(((np.abs(phi) - 1.1) / 0.3) ** 2)) * np.clip((theta - 0.6) / 0.6, 0, 1))
    lumps = 0.7 * _waves(phi, theta, rng, 6, 34, 14) + 0.7 * _waves(phi, theta, rng, 2, 7, 5)
    return np.maximum(thick + style.lumps_m * lumps * np.clip(thick / 0.01, 0.1, 1), 0.001)


def _hang(points: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Continue strands downward by `length` [m] each: first along the head, then falling, with a soft wave."""
    direction_now = points[:, -1] - points[:, -2]
    direction_now /= np.linalg.norm(direction_now, axis=1, keepdims=True)
    outward = points[:, -1] - CENTRE
    outward[:, 1] = 0
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    flare, wave, phase = rng.uniform(-0.12, 0.22), rng.uniform(0, 0.25), rng.uniform(0, 6)
    phase = phase + 1.5 * gaussian_filter1d(rng.normal(size=len(points)), 4, mode="wrap")
    step, at, rows = length / HANGING_ROWS, points[:, -1].copy(), []
    for i in range(HANGING_ROWS):
        fallen = np.clip(i * step / 0.03, 0, 1)[:, None]
        sway = (flare + wave * np.sin(phase + i * step * 70))[:, None]
        fall = np.array([0, -1.0, 0]) + sway * outward
        now = direction_now * (1 - fallen) + fall * fallen
        at = at + now / np.linalg.norm(now, axis=1, keepdims=True) * step[:, None]
        rows.append(at)
    return np.stack(rows, 1)


def _mesh(points: np.ndarray, hanging: np.ndarray, shell: int) -> Piece:
    """Turn strands [columns, rows, 3] into a closed-looking mesh: hanging parts get an inner side, 6 mm further in."""
    columns, rows = points.shape[:2]
    i, j = np.meshgrid(np.arange(columns), np.arange(rows - 1), indexing="ij")
    i, j = i.ravel(), j.ravel()
    # Strands that do not hang have all their hanging points in one place.
    real = (j < ROWS - 1) | hanging[i] & hanging[(i + 1) % columns]
    i, j = i[real], j[real]

    def quads(width: int, wrap: bool) -> np.ndarray:
        k = (i + 1) % columns if wrap else i + 1
        a, b, c, d = i * width + j, k * width + j, k * width + j + 1, i * width + j + 1
        return np.concatenate([np.stack([a, c, b], 1), np.stack([a, d, c], 1)])

    faces, uv_faces = quads(rows, True), quads(rows, False)
    u, v = np.meshgrid(np.linspace(0, 1, columns + 1), np.linspace(0, 1, rows), indexing="ij")
    tangent = np.gradient(points, axis=1)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=-1, keepdims=True), 1e-9)
    vertices, tangent, uv = points.reshape(-1, 3), tangent.reshape(-1, 3), np.stack([u, v], -1).reshape(-1, 2)
    if hanging.any() and shell == 0:
        inward = vertices - CENTRE
        inward[:, 1] = 0
        inner = vertices - 0.006 * inward / np.maximum(np.linalg.norm(inward, axis=1, keepdims=True), 1e-9)
        low = faces.min(1) % rows >= ROWS - 6
        faces, uv_faces = (
            np.concatenate([faces, faces[low][:, ::-1] + len(vertices)]),
            np.concatenate([uv_faces, uv_faces[low][:, ::-1] + len(uv)]),
        )
        vertices, tangent, uv = (
            np.concatenate([vertices, inner]),
            np.concatenate([tangent, tangent]),
            np.concatenate([uv, uv]),
        )
    as_float = lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))  # noqa: E731
    as_int = lambda x: torch.from_numpy(np.ascontiguousarray(x)).long()  # noqa: E731
    placed = atlas.place_uv(as_float(uv), atlas.HAIR_TOP + shell * atlas.SHELL_ROWS, atlas.SHELL_ROWS)
    return Piece(
        as_float(vertices), as_int(faces), placed, as_int(uv_faces), as_float(tangent), STRAND, HAIR_SHELL + shell
    )
