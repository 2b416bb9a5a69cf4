"""Fitting of the open identity measure to rendered people, and how well it tells apart people it has not seen."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.core.files import save_model
from geodiff4d.core.images import composite
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.rundir import RunFolder
from geodiff4d.evaluate.identity import OpenIdentity, identity_features, separation
from geodiff4d.presets import IdentityStage
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.world.cameras import random_cameras
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.seeds import Split
from geodiff4d.world.subject import SyntheticSubject, plain_seed

DIMENSIONS, REGULARISATION = 32, 0.02
SIZE = 192
"""Side of the rendered images [px]."""


def train_identity(out: Path, config: IdentityStage, progress: Progress = silent) -> dict[str, float]:
    """Fit the projection, write it to `out/identity`, and return how well it separates people of the test split.

    That are `auc`, the area under the ROC curve over all pairs of images, `nearest`, the share of images whose nearest
    is of the same person, and the mean cosines of one person's images (`same`) and of two people's (`other`).
    """
    run = RunFolder(out, config)
    features, people = seen_features("train", config.people, config.images, config.seed, progress)
    identity = discriminants(features, people)
    about = {"pictures": len(people), "people": len(people.unique()), "world": "train split",
             "dimensions": DIMENSIONS, "regularisation": REGULARISATION}  # fmt: skip
    save_model(out / "identity", about, {k: v.half() if k == "projection" else v for k, v in vars(identity).items()})
    features, people = seen_features("test", config.unseen, config.images, config.seed, progress)
    found = separation(identity(features), people.tolist())
    run.log({"step": 0, **{k: round(v, 4) for k, v in found.items()}})
    return found


def seen_features(
    split: Split, people: int, images: int, seed: int = 0, progress: Progress = silent
) -> tuple[Float[Tensor, "n features"], Int[Tensor, " n"]]:
    """Render people of a split and return what the perception network sees of each image in which it finds a head, and
    of whom it is."""
    detector, rows, who = EmbeddedDetector(), [], []
    for i in progress(range(people), f"{split} people", people):
        subject = SyntheticSubject(plain_seed(i, split), split)
        expr, jaw, eyes = random_expression(100 + i + 1_000_000 * seed, images)
        params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)
        shown = subject.render(params, random_cameras(images, 500 + i + 1_000_000 * seed, SIZE))
        whole = composite(shown.rgb, shown.mask)
        found = detector.detect(whole)
        rows.append(identity_features(whole, [None if d is None else d.square for d in found]))
        who += [i] * images
    features, owners = torch.cat(rows), torch.tensor(who)
    seen = ~features.isnan().any(1)
    return features[seen], owners[seen]


def discriminants(features: Float[Tensor, "n features"], people: Int[Tensor, " n"]) -> OpenIdentity:
    """Return the directions in which people differ most beside how much one person's images do (Fisher 1936)."""
    X = features.double()
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
