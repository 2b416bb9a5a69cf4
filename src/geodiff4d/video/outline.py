"""Outlines of what a portrait hides (ours, beyond the paper): one edge, in the colours of what lies beside it.

A model that is sampled in one step is unsure where hidden hair ends and paints the mean of all outlines: a wide, grey,
half transparent rim, with a line where the head's mesh ends beneath the hair. Where the portrait shows nothing, the
likeliest outline is taken, colours near it are continued from further in, and tints vary slowly beyond the mesh. What
the portrait shows keeps its own soft edges.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

from geodiff4d.render.push_pull import push_pull
from geodiff4d.video.frames import WarpedFrames

SHOWN = (0.2, 0.5)
"""Masks that count as nothing, and as all, where the portrait shows the place."""
HIDDEN = (0.25, 0.45)
"""The same where it shows nothing."""
SURE = 1.7
"""Where the mask's logit is more, and near by too, a place has a colour of its own."""
WORK = 256
"""Side at which this is decided [px], in which lengths are given below; the frames' own details stay."""

Plane = Float[Tensor, "n 1 height width"]


def settle(
    rgb: Float[Tensor, "n 3 height width"], logit: Plane, warped: WarpedFrames
) -> tuple[Float[Tensor, "n 3 height width"], Plane]:
    """Return colours and mask of frames, each settled alone.

    Args:
        rgb: in [0, 1].
        logit: the mask's logit.
        warped: the warped portrait at the same size.
    """
    size = rgb.shape[-2:]
    seen, inside, low, clipped = (
        _resized(x, torch.Size(min(n, WORK) for n in size), "area")
        for x in (warped.seen, warped.inside, rgb, logit.clamp(-6, 6))
    )
    hidden = 1 - _blurred(_grown(seen, 2), 2)
    # Averaged where it still says how far away the outline is: a ragged rim becomes a line.
    line = _blurred(clipped, 1)
    deep = 1 - _grown((clipped <= SURE).float(), 3)
    rim = _grown(inside, 2) - (1 - _grown(1 - inside, 3))
    known = deep * (1 - hidden * rim)
    continued = torch.stack([push_pull(c * k, k, levels=6) for c, k in zip(low, known, strict=True)])
    beyond = _blurred(_grown(1 - inside, 4), 2) * hidden
    tints = _tints(continued, hidden * deep * _grown(1 - inside, 8))
    planes = [hidden, line, hidden * (1 - known), beyond, continued, tints]
    hidden, line, unknown, beyond, continued, tints = _resized(torch.cat(planes, 1), size).split((1, 1, 1, 1, 3, 3), 1)
    mask = _ramp(torch.sigmoid(logit), SHOWN).lerp(_ramp(torch.sigmoid(line), HIDDEN), hidden)
    rgb = rgb.lerp(continued, unknown)
    rgb = rgb.lerp(rgb.mean(1, keepdim=True) + tints, beyond)
    return rgb.clamp(0, 1), mask


def _tints(rgb: Float[Tensor, "n 3 height width"], weight: Plane) -> Float[Tensor, "n 3 height width"]:
    """Return what colours are beside their brightness, averaged over some 30 px."""
    tint = rgb - rgb.mean(1, keepdim=True)
    small = _blurred(avg_pool2d(torch.cat([tint * weight, weight + 1e-4], 1), 4, ceil_mode=True), 3)
    return _resized(small[:, :3] / small[:, 3:], rgb.shape[-2:])


def _resized(x: Float[Tensor, "n c h w"], size: torch.Size, mode: str = "bilinear") -> Tensor:
    return x if x.shape[-2:] == size else interpolate(x, size, mode=mode)


def _ramp(x: Plane, ends: tuple[float, float]) -> Plane:
    return ((x - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)


def _grown(x: Plane, radius: int) -> Plane:
    """Return the largest value within a square, one axis after the other."""
    across = max_pool2d(x, (1, 2 * radius + 1), 1, (0, radius))
    return max_pool2d(across, (2 * radius + 1, 1), 1, (radius, 0))


def _blurred(x: Float[Tensor, "n c height width"], radius: int) -> Float[Tensor, "n c height width"]:
    """Average over a square twice, one axis after the other; beyond the edges everything goes on as it ends."""
    for _ in range(2):
        x = avg_pool2d(pad(x, [radius, radius, 0, 0], mode="replicate"), (1, 2 * radius + 1), 1)
        x = avg_pool2d(pad(x, [0, 0, radius, radius], mode="replicate"), (2 * radius + 1, 1), 1)
    return x
