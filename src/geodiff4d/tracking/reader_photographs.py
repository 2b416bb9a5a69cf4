"""Photographs without labels for the face reader: they must be read alike however they are cut, spoiled or mirrored.

Rendered people teach what expressions mean; photographs teach that real skin, light and cameras do not matter. The
averaged weights read the clean photograph and its mirror image, the network in training has to say the same of a
spoiled one. Of two named `ID_neutral` and `ID_smiling`, the second smiles no less.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import softplus

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import read_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.tracking.detect import Detector
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.face_square import face_square
from geodiff4d.tracking.portraits import SUFFIXES, photographs_below
from geodiff4d.tracking.reader import FaceReader, Raw
from geodiff4d.tracking.reader_data import MARGIN
from geodiff4d.tracking.reader_scenes import cut, drawn_cut, mirrored_targets, spoiled
from geodiff4d.tracking.squares import cut_square
from geodiff4d.world.expressions import INDEX

NEUTRAL, SMILING = "_neutral", "_smiling"
SMILE_SCALE = 0.1
"""How sharply it is asked that the second's smile coefficients are together no lower than the first's. No margin: one
of 0.6 made real smiles half as large again as they are."""


@dataclass(frozen=True)
class Photographs:
    """Faces cut out of photographs as `reader_data` stores rendered ones."""

    crops: UInt8[Tensor, "n 3 size size"]
    pairs: Int[Tensor, "pairs 2"]
    """Numbers of a person's neutral and smiling photograph."""


def gather_photographs(
    folder: Path, size: int = 256, detector: Detector | None = None, progress: Progress = silent
) -> Photographs:
    """Find the face in every image below a folder and cut it out; images without one are left out.

    Raises:
        UserError: no image below the folder shows a face, or one cannot be read.
    """
    found = detector or EmbeddedDetector()
    crops: list[Tensor] = []
    rows: dict[str, int] = {}
    for path in progress(photographs_below(folder), "looking at photographs"):
        image = read_image(path)
        [detection] = found.detect([image])
        if detection is None:
            continue
        square = face_square(detection.points, detection.index).grown(MARGIN)
        rows[str(path.with_suffix(""))] = len(crops)
        crops.append((cut_square(image, square, size).clamp(0, 1) * 255).round().byte())
    if not crops:
        raise UserError(f"{folder} has no image with a face: expected photographs ({', '.join(SUFFIXES)})")
    pairs = [
        (row, rows[smiling])
        for name, row in rows.items()
        if name.endswith(NEUTRAL) and (smiling := name.removesuffix(NEUTRAL) + SMILING) in rows
    ]
    return Photographs(torch.stack(crops), torch.tensor(pairs, dtype=torch.int64).view(-1, 2))


@dataclass(frozen=True)
class Looks:
    """A batch of photographs: as they are, as the network in training sees them, and who is whose twin."""

    clean: Float[Tensor, "b 3 size size"]
    images: Float[Tensor, "b 3 size size"]
    mirrored: Tensor
    """[b], whether `images` are."""
    pairs: Int[Tensor, "pairs 2"]
    """Rows of this batch: neutral, smiling."""


def draw_looks(photographs: Photographs, step: int, count: int, size: int) -> Looks:
    """Draw `count` photographs, half of them neutral and smiling pairs where there are any; a function of the step."""
    g = torch.Generator().manual_seed(step + 700_000_000)
    paired = count // 4 if len(photographs.pairs) else 0
    pairs = photographs.pairs[torch.randint(max(len(photographs.pairs), 1), (paired,), generator=g)]
    others = torch.randint(len(photographs.crops), (count - 2 * paired,), generator=g)
    rows = torch.cat([pairs.flatten(), others])
    x = photographs.crops[rows].float() / 255
    mirrored = torch.rand(count, generator=g) < 0.5
    still = torch.zeros(count, 2, 3)
    still[:, 0, 0] = still[:, 1, 1] = 1 / MARGIN
    images = spoiled(cut(x, drawn_cut(count, mirrored, g), size), g)
    return Looks(cut(x, still, size), images, mirrored, torch.arange(2 * paired).view(-1, 2))


@torch.no_grad()
def agreed(teacher: FaceReader, clean: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b targets"]:
    """Return what a reader says of photographs and of their mirror images, brought together and averaged."""
    order, sign = mirrored_targets()
    straight, turned = teacher(torch.cat([clean, clean.flip(-1)])).value.chunk(2)
    return (straight + turned[:, order] * sign) / 2


def photograph_loss(
    raw: Raw, looks: Looks, wanted: Float[Tensor, "b targets"], spread: Float[Tensor, " targets"]
) -> dict[str, Float[Tensor, ""]]:
    """Sum up where photographs are read otherwise than `wanted` (`agreed`), and smiles that are none."""
    order, sign = mirrored_targets()
    wanted = torch.where(looks.mirrored[:, None], wanted[:, order] * sign, wanted)
    moves = (spread > 0).float()
    off = (raw.value - wanted) * moves
    terms = {"alike": off.square().sum(1).mean() / moves.sum()}
    if len(looks.pairs):
        both = [INDEX["mouthSmileLeft"], INDEX["mouthSmileRight"]]
        smile = (raw.value * spread)[:, both].sum(1)
        more = smile[looks.pairs[:, 1]] - smile[looks.pairs[:, 0]]
        terms["smile"] = SMILE_SCALE * softplus(-more / SMILE_SCALE).mean()
    return terms
