"""Fit the open identity measure on training people, and say how well it tells people apart whom it has not seen.

Usage: `.venv/bin/python tools/fit_identity.py STORE/train [--people 400] [--pictures 6]`, where STORE is a training
store of the video model's (`geodiff4d train image --data STORE`). Writes src/geodiff4d/assets/identity (25 kB); what is
printed at the end belongs in docs/EVALUATION.md.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.cli.progress import bar
from geodiff4d.core.files import save_model
from geodiff4d.core.images import composite
from geodiff4d.evaluate.identity import SHIPPED, OpenIdentity, identity_features, separation
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.world.cameras import random_cameras
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.subject import SyntheticSubject, plain_seed

DIMENSIONS, REGULARISATION = 32, 0.02


def features_of(images: Tensor) -> Float[Tensor, "n features"]:
    found = EmbeddedDetector().detect(images)
    return identity_features(images, [None if d is None else d.square for d in found])


def discriminants(X: Float[Tensor, "n features"], people: Int[Tensor, " n"]) -> OpenIdentity:
    """Directions in which people differ most beside how much one person's pictures do."""
    X = X.double()
    mean, scale = X.mean(0), X.std(0) + 1e-3
    Z = (X - mean) / scale
    ids, row = people.unique(return_inverse=True)
    means = torch.zeros(len(ids), Z.shape[1], dtype=Z.dtype).index_add(0, row, Z)
    means /= row.bincount()[:, None]
    within = (Z - means[row]).mT.cov()
    within = (1 - REGULARISATION) * within + REGULARISATION * within.trace() / len(within) * torch.eye(len(within))
    L = torch.linalg.inv(torch.linalg.cholesky(within))
    _, V = torch.linalg.eigh(L @ means.mT.cov() @ L.mT)
    # Centred on the mean person: cosines are about what is special.
    return OpenIdentity((mean + scale * means.mean(0)).float(), scale.float(), (L.mT @ V[:, -DIMENSIONS:]).float())


def unseen(people: int, pictures: int, size: int = 192) -> tuple[Tensor, list[int]]:
    rows, who = [], []
    for i in bar(range(people), "unseen people"):
        subject = SyntheticSubject(plain_seed(i, "test"), "test")
        expr, jaw, eyes = random_expression(100 + i, pictures)
        params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)
        out = subject.render(params, random_cameras(pictures, 500 + i, size))
        rows.append(features_of(composite(out.rgb, out.mask)))
        who += [i] * pictures
    return torch.cat(rows), who


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--people", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    # Not as a `Store`: a store that is still being rendered has people enough.
    rgb, done = (np.load(args.store / f"{name}.npy", mmap_mode="r") for name in ("rgb", "done"))
    rows, people = [], []
    for s in bar(np.flatnonzero(done)[: args.people].tolist(), "people"):
        picks = [(int(rng.integers(n)), int(rng.integers(m))) for n, m in [rgb.shape[1:3]] * args.pictures]
        images = torch.stack([torch.from_numpy(np.array(rgb[s, i, v])).float() / 255 for i, v in picks])
        rows.append(features_of(images))
        people += [s] * args.pictures
    X, who = torch.cat(rows), torch.tensor(people)
    seen = ~X.isnan().any(1)
    identity = discriminants(X[seen], who[seen])
    about = {"pictures": int(seen.sum()), "people": len(set(people)), "world": "train split",
             "dimensions": DIMENSIONS, "regularisation": REGULARISATION}  # fmt: skip
    save_model(args.out, about, {k: v.half() if k == "projection" else v for k, v in vars(identity).items()})
    T, owners = unseen(20, 6)
    seen = ~T.isnan().any(1)
    found = separation(identity(T[seen]), [o for o, s in zip(owners, seen, strict=True) if s])
    print("  ".join(f"{k} {v:.4f}" for k, v in found.items()), f"of {int(seen.sum())} pictures of 20 unseen people")


if __name__ == "__main__":
    main()
