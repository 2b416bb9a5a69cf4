"""Which pixels of a canonical crop are the person's: a small network that knows where the head is.

The looker (`network.py`) sees a crop of the head in 128 px and has seen rendered people alone: before a real room it
takes a wooden door for hair. This network is trained on real and rendered people before real and made-up backgrounds
(`person_training.py`), and is shown the tracked head's silhouette, so that what it has left to tell is hair, clothes
and room.
"""

from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import load_model, save_model
from geodiff4d.core.weights import weights_folder
from geodiff4d.tracking.network import ConvNorm, Residual, folded, quick

SHIPPED = weights_folder("person")


@dataclass(frozen=True)
class PersonConfig:
    """Sizes of the network."""

    size: int = 256
    """Side of the crop that it takes [px]; a multiple of 64."""
    widths: tuple[int, int, int, int, int, int] = (16, 24, 48, 80, 112, 128)
    """Channels at strides 2, 4, 8, 16, 32 and 64."""
    fine: int = 8
    """Channels at full resolution."""


class PersonNet(nn.Module):
    """U-Net from a crop and the head's silhouettes to logits of foreground."""

    def __init__(self, config: PersonConfig):
        super().__init__()
        self.config = config
        w = config.widths
        self.first = ConvNorm(3, config.fine)
        self.downs = nn.ModuleList([ConvNorm(5, w[0], 2), *(ConvNorm(a, b, 2) for a, b in pairwise(w))])
        self.stages = nn.ModuleList([nn.Identity(), *(Residual(width) for width in w[1:])])
        self.across = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in pairwise(w)])
        self.merge = nn.ModuleList([ConvNorm(width, width) for width in w[:-1]])
        self.up = nn.Conv2d(w[0], 4 * config.fine, 1)
        self.last = nn.Sequential(ConvNorm(2 * config.fine, 2 * config.fine), nn.Conv2d(2 * config.fine, 1, 1))

    def forward(
        self, images: Float[Tensor, "b 3 size size"], heads: Float[Tensor, "b 2 size size"]
    ) -> Float[Tensor, "b 1 size size"]:
        """Return logits; `heads` are the silhouettes of the whole tracked mesh and of the head alone, 0 to 1."""
        x, skips = torch.cat([images - 0.5, heads - 0.5], 1), []
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = stage(down(x))
            skips.append(x)
        for i in reversed(range(len(skips) - 1)):
            x = self.merge[i](interpolate(self.across[i](x), scale_factor=2.0, mode="nearest") + skips[i])
        fine = torch.cat([pixel_shuffle(self.up(x), 2), self.first(images - 0.5)], 1)
        return self.last(fine).float()

    def save(self, folder: Path) -> None:
        """Write a model folder in half precision."""
        state: dict[str, Tensor] = {k: v.half() for k, v in self.state_dict().items() if v.is_floating_point()}
        # Running variances can be smaller than half precision holds.
        state |= {k: v.float() for k, v in self.state_dict().items() if "running" in k}
        save_model(folder, asdict(self.config), state)


@cache
def shipped_person_net() -> PersonNet | None:
    """Load the network that ships with the package, as fast as it can be evaluated; None where it is not there."""
    return folded(load_person_net()) if SHIPPED.exists() else None


@cache
def load_person_net(folder: Path = SHIPPED) -> PersonNet:
    """Load the network, by default the one that ships with the package.

    Raises:
        UserError: it is missing, damaged or something else.
    """
    config, state = load_model(folder)
    try:
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        model = PersonNet(PersonConfig(**sizes))
        missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not tell people from backgrounds ({' '.join(str(error).split())[:200]}): train such a "
            "network with `geodiff4d train person`"
        ) from None
    lacking = [k for k in missing if not k.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise UserError(
            f"{folder} does not tell people from backgrounds: {(lacking or unexpected)[0]} does not fit; copy it again"
        )
    return quick(model).eval()


@torch.no_grad()
def person_in(
    crop: Float[Tensor, "3 side side"], mesh: Bool[Tensor, "side side"], head: Bool[Tensor, "side side"],
    model: PersonNet, twice: bool = False,
) -> Float[Tensor, "1 side side"]:  # fmt: skip
    """Return how surely each pixel of a canonical crop is the person's, 0 to 1.

    `mesh` is the silhouette of the whole tracked head and bust, `head` of the part above the chin. `twice` looks at the
    mirrored crop as well, and takes the mean of the logits.
    """
    size, side = model.config.size, crop.shape[-1]
    both = torch.cat([crop, torch.stack([mesh, head]).float()])[None]
    small = both if side == size else interpolate(both, (size, size), mode="area" if side > size else "bilinear")
    small = small.contiguous(memory_format=torch.channels_last)
    logits = model(small[:, :3], small[:, 3:])
    if twice:
        mirrored = small.flip(-1)
        logits = (logits + model(mirrored[:, :3], mirrored[:, 3:]).flip(-1)) / 2
    told = logits.sigmoid()
    return interpolate(told, (side, side), mode="bilinear")[0] if side != size else told[0]
