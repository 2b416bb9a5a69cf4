"""The embedded perception network: it finds heads in an image, and points, foreground and normals in a crop of one.

Two convolutional networks share a file. `Finder` takes a whole small image and returns the place, size and roll of
heads. `Looker` takes a square crop of one head and returns points with their uncertainty (as Wood et al. 2022, dense
landmarks with Gaussian likelihoods, but from heat maps), foreground, camera-space normals, whether there is a face, and
a guess of the head's rotation and shape.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle
from torch.nn.utils.fusion import fuse_conv_bn_eval

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import load_model, save_model
from geodiff4d.core.weights import weights_folder
from geodiff4d.tracking.points import SurfacePoints

SHIPPED = weights_folder("perception")
FINDER_STRIDE = 16
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class PerceptionConfig:
    """Sizes of the network."""

    points: int = 192
    size: int = 128
    """Side of the crop that `Looker` takes [px]; a multiple of 32."""
    widths: tuple[int, int, int, int] = (40, 80, 120, 128)
    """Channels at strides 4, 8, 16 and 32."""
    blocks: tuple[int, int, int, int] = (2, 2, 2, 1)
    dense: int = 56
    """Channels of the decoder at stride 4."""
    shapes: int = 24
    """Number of identity coefficients that are guessed."""
    finder: tuple[int, int, int, int] = (16, 24, 40, 48)
    """Channels of the finder at strides 2, 4, 8 and 16."""


@dataclass(frozen=True)
class Look:
    """Output of `Looker` for a batch of crops, whose upper left corner is (0, 0) and lower right corner (1, 1)."""

    points: Float[Tensor, "b points 2"]
    log_sigma: Float[Tensor, "b points"]
    """Logarithm of each point's standard deviation per axis."""
    heat: Float[Tensor, "b points h w"]
    """Log-probability of each point's being in a cell; `points` are its means."""
    score: Float[Tensor, " b"]
    """Logit of there being a face."""
    dense: Float[Tensor, "b 4 s s"]
    """Foreground logit and normals (not unit), at half the crop's resolution."""
    rotation: Float[Tensor, "b 3 3"]
    """Head to viewer, x right, y up, z to the viewer; seen along the ray through the crop's centre."""
    shape: Float[Tensor, "b shapes"]


class ConvNorm(nn.Sequential):
    def __init__(self, cin: int, cout: int, stride: int = 1, kernel: int = 3):
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
        )


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return torch.relu(x + self.second(self.first(x)))


class Looker(nn.Module):
    """Network from a crop of one head to a `Look`."""

    def __init__(self, config: PerceptionConfig):
        super().__init__()
        self.config = config
        w, d = config.widths, config.dense
        self.stem = nn.ModuleList([ConvNorm(3, 24, 2), ConvNorm(24, w[0], 2)])
        self.stages, self.downs = nn.ModuleList(), nn.ModuleList()
        for i, (width, blocks) in enumerate(zip(w, config.blocks, strict=True)):
            self.stages.append(nn.Sequential(*(Residual(width) for _ in range(blocks))))
            if i < 3:
                self.downs.append(ConvNorm(width, w[i + 1], 2))
        self.across = nn.ModuleList(
            [nn.Conv2d(w[3], w[2], 1), nn.Conv2d(w[2], w[1], 1), nn.Conv2d(w[1], d, 1), nn.Conv2d(w[0], d, 1)]
        )
        self.merge = nn.ModuleList([ConvNorm(w[2], w[2], kernel=1), ConvNorm(w[1], w[1]), Residual(d)])
        self.heat = nn.Conv2d(d, config.points, 1)
        self.fine = nn.Conv2d(d, 64, 1)
        self.dense = nn.Sequential(ConvNorm(16 + 24, 24), nn.Conv2d(24, 4, 1))
        self.pool = nn.Sequential(nn.Linear(w[3], 160), nn.ReLU())
        self.guess = nn.Linear(160, config.points + 1 + 6 + config.shapes)

    def forward(self, images: Float[Tensor, "b 3 size size"]) -> Look:
        early = self.stem[0](images - 0.5)
        x, skips = self.stem[1](early), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            skips.append(x)
            if i < 3:
                x = self.downs[i](x)
        n = self.config.points
        guess = self.guess(self.pool(x.mean((2, 3)))).float()
        y = self.merge[0](_up(self.across[0](x)) + skips[2])
        y = self.merge[1](_up(self.across[1](y)) + skips[1])
        y = self.merge[2](_up(self.across[2](y)) + self.across[3](skips[0]))
        heat = self.heat(y)
        heat = heat.float().flatten(2).log_softmax(-1).view(heat.shape)
        dense = self.dense(torch.cat([pixel_shuffle(self.fine(y), 2), early], 1)).float()
        points = expected(heat)
        return Look(
            points, guess[:, :n].clamp(-9, 2) - 3, heat, guess[:, n], dense, gram_schmidt(guess[:, n + 1 : n + 7]),
            guess[:, n + 7 :],
        )  # fmt: skip


class Finder(nn.Module):
    """Network from a whole image to a face logit, centre, size and roll for every cell of 16 px."""

    def __init__(self, config: PerceptionConfig):
        super().__init__()
        a, b, c, d = config.finder
        self.body = nn.Sequential(
            ConvNorm(3, a, 2), ConvNorm(a, b, 2), ConvNorm(b, c, 2), Residual(c), ConvNorm(c, d, 2),
            *(Residual(d) for _ in range(3)), nn.Conv2d(d, 6, 1),
        )  # fmt: skip

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b 6 rows columns"]:
        """Return per cell: logit; offset of the centre [cells]; log of side / 64 px; cosine and sine of the roll."""
        return self.body(images - 0.5).float()


class Perception(nn.Module):
    """Both networks, and the places of their points on the head."""

    def __init__(self, config: PerceptionConfig, points: SurfacePoints):
        super().__init__()
        self.config, self.points = config, points
        self.look, self.find = Looker(config), Finder(config)

    def save(self, folder: Path) -> None:
        """Write a model folder in half precision."""
        state: dict[str, Tensor] = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        # Running variances can be smaller than half precision holds.
        state |= {k: v.float() for k, v in self.state_dict().items() if "running" in k}
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        state |= {"points.index": self.points.index, "points.position": self.points.position}
        save_model(folder, asdict(self.config), state)


def folded(model: Net) -> Net:
    """Return a copy of a network with its batch norms in the convolutions before them: the same in fewer steps.

    It computes what evaluation computes, to rounding, and cannot be trained.
    """
    out = deepcopy(model)
    for part in [m for m in out.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(part) - 1):
            conv, norm = part[i], part[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                part[i], part[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return out


@cache
def shipped_perception() -> Perception:
    """Load the network that ships with the package, as fast as it can be evaluated."""
    return folded(load_perception())


@cache
def load_perception(folder: Path = SHIPPED) -> Perception:
    """Load the network, by default the one that ships with the package.

    Raises:
        UserError: it is missing, damaged or something else.
    """
    config, state = load_model(folder)
    try:
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        known = PerceptionConfig(**sizes)
        points = SurfacePoints(state.pop("points.index"), state.pop("points.position"))
        model = Perception(known, points)
        missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    except (TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{folder} is not a perception network ({error}): train one with `geodiff4d train perception`"
        ) from None
    lacking = [k for k in missing if not k.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise UserError(
            f"{folder} is not a perception network: {(lacking or unexpected)[0]} does not fit; copy it again"
        )
    return quick(model).eval()


def quick(model: Net) -> Net:
    """Return the model with its convolution weights in channels-last layout, which is faster on CPUs; in place."""
    for p in model.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def expected(heat: Float[Tensor, "b points h w"]) -> Float[Tensor, "b points 2"]:
    """Return the mean position of each map of log-probabilities, 0 to 1 (integral regression)."""
    h, w = heat.shape[-2:]
    y, x = ((torch.arange(k, device=heat.device) + 0.5) / k for k in (h, w))
    places = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1)
    return heat.exp().flatten(2) @ places


def gram_schmidt(six: Float[Tensor, "b 6"]) -> Float[Tensor, "b 3 3"]:
    """Return the rotation of six numbers, two columns less those of the identity (Zhou et al. 2019)."""
    first = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).to(six)
    a, b = (six + first).split(3, -1)
    a = torch.nn.functional.normalize(a, dim=-1)
    b = torch.nn.functional.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def _up(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="nearest")
