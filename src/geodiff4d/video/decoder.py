"""A decoder that knows the portrait (ours, beyond the paper): decoded frames and warped portrait to finished frames.

A codec for a 16² grid paints faces soft, in patches, and the portrait's own pixels are known at any size. One network
sees both and gives colours, normals and mask at the size of the warped portrait: of its pixels it says how much to
take, and paints the rest. The same weights serve every size that is a multiple of `GuidedDecoder.stride`.
"""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pixel_shuffle, pixel_unshuffle, silu

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import load_model, save_model
from geodiff4d.video.frames import SampledFrames, WarpedFrames
from geodiff4d.video.outline import settle

PLANES = 15
"""Decoded colours and normals, warped colours, where they are seen, the head's mesh, the opened mouth, pose normals."""
OUTPUTS = 8
"""How much of the warped portrait to take, colours, normals, mask."""
TAKEN = 6.0
"""Before training, the warped portrait is taken by the sigmoid of this times how well it is seen, less a half."""
SOLID, SHARP = 0.45, 10.0
"""Before training, the mask is the sigmoid of `SHARP` times the decoded normal's length, less `SOLID`."""


@dataclass(frozen=True)
class DecoderConfig:
    """What a guided decoder is made of."""

    widths: tuple[int, ...] = (40, 64, 96, 128)
    """Channels at half the image's size, at a quarter, and so on."""
    blocks: tuple[int, ...] = (1, 1, 2, 3)
    """Residual blocks of each, on the way down and on the way up."""


class Block(nn.Module):
    """Two convolutions beside a skip; the second starts at zero, so that the block does nothing at first.

    Nothing is normalised: statistics of a cut are not those of a whole frame, nor those of 256 pixels those of 512.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.conv2(silu(self.conv1(silu(x))))


class GuidedDecoder(nn.Module):
    """A U-Net on images whose pixels are folded two by two."""

    def __init__(self, config: DecoderConfig = DecoderConfig()):
        super().__init__()
        self.config = config
        w, blocks = config.widths, config.blocks
        self.enter = nn.Conv2d(4 * PLANES, w[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(*(Block(c) for _ in range(n))) for c, n in zip(w, blocks, strict=True))
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(w))
        self.widen = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(w))
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 1) for a in w[:-1])
        self.up = nn.ModuleList(
            nn.Sequential(*(Block(c) for _ in range(n))) for c, n in zip(w[:-1], blocks[:-1], strict=True)
        )
        self.leave = nn.Conv2d(w[0], 4 * OUTPUTS, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # pyright: ignore[reportArgumentType]

    @property
    def stride(self) -> int:
        """Images' sides are multiples of this [px]."""
        return 2 ** len(self.config.widths)

    def planes(
        self, rgb: Float[Tensor, "n 3 height width"], normals: Float[Tensor, "n 3 height width"], warped: WarpedFrames
    ) -> Float[Tensor, "n 15 target_height target_width"]:
        """Bring everything to the warped portrait's size."""
        size = warped.rgb.shape[-2:]
        low = _enlarged(torch.cat([rgb, normals], 1), size)
        pose = _enlarged(warped.pose, size)
        return torch.cat([low, warped.rgb, warped.seen, warped.inside, warped.opened, pose], 1)

    def forward(
        self, planes: Float[Tensor, "n 15 height width"]
    ) -> tuple[Float[Tensor, "n 3 height width"], Float[Tensor, "n 3 height width"], Float[Tensor, "n 1 height width"]]:
        """Return colours and normals as images, not clamped, and the mask's logit."""
        rgb, normals, warp, seen = planes[:, :3], planes[:, 3:6], planes[:, 6:9], planes[:, 9:10]
        h = self.enter(pixel_unshuffle(planes * 2 - 1, 2))
        kept: list[Tensor] = []
        for k, down in enumerate(self.down):
            h = down(h)
            if k < len(self.narrow):
                kept.append(h)
                h = self.narrow[k](h)
        for k in reversed(range(len(self.up))):
            h = interpolate(self.widen[k](h), scale_factor=2.0)
            h = self.up[k](self.join[k](torch.cat([h, kept[k]], 1)))
        out = pixel_shuffle(self.leave(h), 2)
        share = torch.sigmoid(out[:, :1] + TAKEN * (seen - 0.5))
        length = (normals * 2 - 1).square().sum(1, keepdim=True).clamp(min=1e-8).sqrt()
        mask = out[:, 7:8] + SHARP * (length - SOLID)
        return rgb + share * (warp - rgb) + out[:, 1:4], normals + out[:, 4:7], mask

    def decode(
        self, rgb: Float[Tensor, "t 3 height width"], normals: Float[Tensor, "t 3 height width"], warped: WarpedFrames
    ) -> SampledFrames:
        """Finish frames that the codec decoded, each alone; an opened mouth's inside is the warped portrait's.

        Args:
            rgb: in [0, 1], at the model's size.
            normals: as images (`encode_normals`).
            warped: the warped portrait at the size that is wanted.
        """
        made = [self(self.planes(rgb[i : i + 1], normals[i : i + 1], warped[i])) for i in range(len(rgb))]
        colours, normal, logit = (torch.cat(x) for x in zip(*made, strict=True))
        # One step of sampling gives the mean of what may be, and between two lips that is a closed mouth.
        # Its edge is the mesh's, in steps of a pixel, and is softened by one.
        colours = torch.lerp(colours, warped.rgb, avg_pool2d(warped.opened, 3, 1, 1))
        settled, mask = settle(colours.clamp(0, 1), logit, warped)
        return SampledFrames(settled, normal.clamp(0, 1), mask)

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write the weights (fp16) and the configuration."""
        state = {k: v.half() for k, v in self.state_dict().items()}
        save_model(folder, {"kind": "decoder", **asdict(self.config), **(extra or {})}, state)


def load_decoder(folder: Path) -> GuidedDecoder:
    """Load what `GuidedDecoder.save` wrote.

    Raises:
        UserError: missing, damaged, or another version's.
    """
    config, state = load_model(folder)
    try:
        model = GuidedDecoder(DecoderConfig(tuple(config["widths"]), tuple(config["blocks"])))
        model.load_state_dict({k: v.float() for k, v in state.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} holds no guided decoder of this version: copy the folder again") from error
    return model.eval()


def _enlarged(x: Float[Tensor, "n c h w"], size: torch.Size) -> Tensor:
    return x if x.shape[-2:] == size else interpolate(x, size=size, mode="bilinear", align_corners=False)
