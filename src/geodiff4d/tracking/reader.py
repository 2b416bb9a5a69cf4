"""The face reader: from a close crop of a face to what it does, at the source's own resolution.

The perception network sees a head at 128 px and the fit pulls its points toward rest, so lids, brows and irises lose
most of their motion. This network sees the face alone at 192 px and says directly how far each of OpenHead's actions
goes, how the jaw and the eyes are turned, and how sure it is of each. Both eyes are looked at again from the crop's own
pixels by one small network, the right one mirrored: gaze is a matter of single pixels.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from geodiff4d.core.errors import UserError
from geodiff4d.core.face_trunk import face_trunk
from geodiff4d.core.files import load_model, save_model
from geodiff4d.core.packing import packed
from geodiff4d.core.weights import weights_folder
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.face_square import face_square
from geodiff4d.tracking.network import ConvNorm, Residual, folded, gram_schmidt
from geodiff4d.tracking.reading import Reading
from geodiff4d.tracking.squares import cut_square
from geodiff4d.world.expressions import ACTIONS

SHIPPED = weights_folder("reader")
EXPRS, JAW, EYES = len(ACTIONS), 3, 6
TARGETS = EXPRS + JAW + EYES
"""52 coefficients, the jaw's rotation vector, the eyes' (left, then right)."""
STILL = (*(i for i, name in enumerate(ACTIONS) if name.startswith("eyeLook")), EXPRS + JAW + 2, EXPRS + JAW + 5)
"""Targets that never move: the eye joints turn the eyes, and eyes do not roll."""
TRUNK_SHARE = 0.92
"""Share of the square's side that the face's trunk sees: about the expression encoder's driving crop."""
EYE_LEFT, EYE_TOP, EYE_WIDTH, EYE_HEIGHT = 20 / 192, 4 / 192, 80 / 192, 64 / 192
"""Where the person's right eye is in the square, with its brow; the left one mirrors it."""


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of the network."""

    size: int = 192
    """Side of the crop [px], a multiple of 64."""
    trunk_size: int = 96
    """Side of the face as its trunk sees it [px]."""
    widths: tuple[int, ...] = (32, 64, 96, 128)
    """Channels of the face's trunk, those of the expression encoder, so that its weights can be taken over."""
    squeeze: int = 32
    """Channels that leave the trunk, from each of its cells."""
    latent: int = 512
    features: int = 256
    eye_widths: tuple[int, int, int] = (16, 32, 64)
    """Channels of an eye at strides 2, 4 and 8."""
    eye_squeeze: int = 24
    eye_features: int = 96
    points: int = 192
    """Points whose places are learnt on the side: what teaches a network where things are."""
    dropout: float = 0.1


@dataclass(frozen=True)
class Raw:
    """What the network gives, in units of each target's spread."""

    value: Float[Tensor, "b targets"]
    log_sigma: Float[Tensor, "b targets"]
    rotation: Float[Tensor, "b 3 3"]
    """Head to viewer, as `network.Look.rotation`."""
    points: Float[Tensor, "b points 2"]
    """In crops: (0, 0) is the left upper corner, (1, 1) the right lower one."""

    def split(self, count: int) -> "tuple[Raw, Raw]":
        """Return the first `count` rows and the others."""
        values = [getattr(self, name) for name in Raw.__dataclass_fields__]
        return Raw(*(v[:count] for v in values)), Raw(*(v[count:] for v in values))


class FaceReader(nn.Module):
    """A crop of a face in, its expression out.

    Example:
        >>> config = ReaderConfig(size=64, trunk_size=32, widths=(8, 8), eye_widths=(8, 8, 8), points=4)
        >>> reader = FaceReader(config).eval()
        >>> reader.read(torch.rand(2, 3, 64, 64)).expr.shape
        torch.Size([2, 52])
    """

    spread: Tensor
    """Standard deviation of each target in training; 0 for those that never move."""
    centre: Tensor
    gain: Tensor
    """Calibration, target = gain × value + offset: least squares of the truth on other people."""
    offset: Tensor
    blend: Tensor
    """How its answers are brought together with a fit's (`blend.py`)."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.config = c = config
        e, cells = c.eye_widths, (c.trunk_size // 2 ** len(c.widths)) ** 2
        self.face = face_trunk(c.trunk_size, c.widths, c.squeeze, attention=True)
        self.to_latent = nn.Linear(c.squeeze * cells, c.latent)
        self.eye = nn.Sequential(
            ConvNorm(3, e[0], 2), ConvNorm(e[0], e[1], 2), Residual(e[1]), ConvNorm(e[1], e[2], 2), Residual(e[2]),
            ConvNorm(e[2], c.eye_squeeze, kernel=1),
        )  # fmt: skip
        self.face_features = nn.Sequential(
            nn.LayerNorm(c.latent, elementwise_affine=False), nn.Linear(c.latent, c.features), nn.ReLU(inplace=True)
        )  # fmt: skip
        self.eye_features = nn.Sequential(nn.Linear(80 * c.eye_squeeze, c.eye_features), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(c.dropout)
        self.out = nn.Linear(c.features + 2 * c.eye_features, 2 * TARGETS + 6 + 2 * c.points)
        moves = torch.ones(TARGETS)
        moves[list(STILL)] = 0
        for name, value in (("spread", 0.2 * moves), ("centre", 0 * moves), ("gain", moves), ("offset", 0 * moves)):
            self.register_buffer(name, value.clone())
        self.register_buffer("blend", torch.tensor([0.5, 0.5, 0.0])[:, None].repeat(2, 1, TARGETS))

    def forward(self, crops: Float[Tensor, "b 3 size size"]) -> Raw:
        eyes = torch.cat(eye_windows((crops - 0.5) * 4))
        margin = round(crops.shape[-1] * (1 - TRUNK_SHARE) / 2)
        inner = crops[..., margin : crops.shape[-1] - margin, margin : crops.shape[-1] - margin]
        size = (self.config.trunk_size, self.config.trunk_size)
        x = interpolate(inner, size, mode="bilinear", antialias=True, align_corners=False) * 2 - 1
        if x.device.type == "cpu":
            x, eyes = (v.contiguous(memory_format=torch.channels_last) for v in (x, eyes))
        whole = self.face_features(self.to_latent(self.face(x).flatten(1)))
        right, left = self.eye_features(adaptive_avg_pool2d(self.eye(eyes), (8, 10)).flatten(1)).chunk(2)
        out = self.out(self.drop(torch.cat([whole, right, left], 1))).float()
        value, log_sigma, six, points = out.split([TARGETS, TARGETS, 6, 2 * self.config.points], 1)
        places = points.unflatten(1, (-1, 2)) * 0.25 + 0.5
        return Raw(value, log_sigma.clamp(-4, 1.5), gram_schmidt(six), places)

    @torch.no_grad()
    def read(self, crops: Float[Tensor, "b 3 size size"]) -> Reading:
        """Read crops in [0, 1] of `config.size`, cut by `face_crop`."""
        raw = self(crops)
        value = (raw.value * self.spread + self.centre) * self.gain + self.offset
        sigma = raw.log_sigma.exp() * self.spread * self.gain
        expr, jaw, eyes = value.split([EXPRS, JAW, EYES], 1)
        expr_sigma, jaw_sigma, eyes_sigma = sigma.split([EXPRS, JAW, EYES], 1)
        blend = self.blend.expand(len(crops), -1, -1, -1)
        return Reading(expr.clamp(min=0), jaw, eyes, expr_sigma, jaw_sigma, eyes_sigma, blend)

    def take_trunk(self, encoder: dict[str, Tensor]) -> None:
        """Start from the trunk of an expression encoder, given its weights by name.

        Raises:
            UserError: it has other sizes.
        """
        names = {"features.": self.face, "to_latent.": self.to_latent}
        try:
            for prefix, part in names.items():
                part.load_state_dict(
                    {k.removeprefix(prefix): v.float() for k, v in encoder.items() if k.startswith(prefix)}
                )
        except RuntimeError as error:
            raise UserError(f"the expression encoder does not fit the reader: {str(error).splitlines()[-1]}") from None

    def save(self, folder: Path) -> None:
        """Write a model folder with weights in eight bits (`core.packing`)."""
        state = {k: v for k, v in self.state_dict().items() if not k.endswith("num_batches_tracked")}
        small = packed(state)
        # Running variances can be smaller than half precision holds.
        exact = ("spread", "centre", "gain", "offset", "blend")
        small |= {k: v.float() for k, v in state.items() if "running" in k or k in exact}
        save_model(folder, asdict(self.config), small)


def eye_windows(crops: Float[Tensor, "b c size size"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Return the parts of crops with the right eye, mirrored, and with the left one."""
    size = crops.shape[-1]
    x, y, w, h = (round(v * size) for v in (EYE_LEFT, EYE_TOP, EYE_WIDTH, EYE_HEIGHT))
    rows = crops[:, :, y : y + h]
    return rows[..., x : x + w].flip(-1), rows[..., size - x - w : size - x]


def face_crop(image: Float[Tensor, "3 height width"], detection: Detection, size: int) -> Float[Tensor, "3 size size"]:
    """Cut what the reader looks at out of an uncut image, by a detection in its pixels."""
    return cut_square(image, face_square(detection.points, detection.index), size)


@cache
def shipped_reader() -> FaceReader | None:
    """Load the reader that ships with the package, or return None where an installation has none."""
    return folded(load_reader()) if SHIPPED.exists() else None


@cache
def load_reader(folder: Path = SHIPPED) -> FaceReader:
    """Load a reader, by default the one that ships with the package.

    Raises:
        UserError: it is missing, damaged or something else.
    """
    config, state = load_model(folder)
    try:
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        reader = FaceReader(ReaderConfig(**sizes))
        missing, unexpected = reader.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    except (TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} is not a face reader ({error}): train one with `geodiff4d train reader`") from None
    lacking = [k for k in missing if not k.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise UserError(f"{folder} is not a face reader: {(lacking or unexpected)[0]} does not fit; copy it again")
    return reader.eval()
