"""Give frames the fine detail that the warped portrait knows (ours, beyond the paper; embedded preset only).

A denoiser that saw little says well how light falls and where hair ends, and paints faces soft. The portrait's own
pixels, carried to the target, are known at full size. Where both agree once their detail is blurred away, the frame
keeps its coarse image and takes the carried one's detail, band by band: down to 2 px where the portrait itself shows
the place (that lowers the error), and what is finer also where the carried image only continues it (texture that lies
anywhere; it costs decibels and looks right). Where the two do not agree (an open mouth, hair that was not carried), or
nothing is known, the frame stays as it is.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from geodiff4d.core.errors import UserError
from geodiff4d.video.finish import FinishContext
from geodiff4d.video.frames import SampledFrames

COARSE, WINDOW = 64, 9
"""Side at which images are compared, and the window's, applied three times: a Gaussian of 4.5 px, 18 at 256 px."""
FINE = 128
"""Side that shows all but the finest band: with a window of 3 a blur of 2 px at 256 px."""
HOLE = 2
"""Half the width, at `COARSE`, of what counts as a hole in what the portrait shows: a mouth or an eye, made up."""


@dataclass(frozen=True)
class RestoreDetail:
    """Exchange the frames' fine detail for the warped portrait's, where both agree (`restore_detail`).

    Normals stay as they are: the tracked head's own detail brings them no nearer to the truth (docs/LOG.md). So do
    frames of a model that is not conditioned on the warped portrait.
    """

    tolerance: float = 0.08
    """How far a frame may be from the warped portrait and still take its detail, as a mean absolute difference in
    [0, 1] of both once blurred."""

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise UserError(f"the tolerance of RestoreDetail is {self.tolerance}: expected more than 0")

    def __call__(self, frames: SampledFrames, context: FinishContext) -> SampledFrames:
        """Return the frames with their detail restored."""
        known = context.warped
        if known is None:
            return frames
        shown = torch.maximum(known.seen, known.inside)
        rgb = restore_detail(frames.rgb, known.rgb, known.seen, shown, self.tolerance)
        return replace(frames, rgb=rgb)


def restore_detail(
    decoded: Float[Tensor, "n 3 height width"],
    carried: Float[Tensor, "n 3 height width"],
    seen: Float[Tensor, "n 1 height width"],
    shown: Float[Tensor, "n 1 height width"],
    tolerance: float,
) -> Float[Tensor, "n 3 height width"]:
    """Exchange the detail of frames in [0, 1] for the carried portrait's.

    Args:
        carried: the portrait warped to the frame.
        seen: where the portrait itself shows the place, 0 to 1.
        shown: where the warp shows anything, 0 to 1; at least `seen`.
        tolerance: mean absolute difference [0, 1] of the coarse images at which nothing of the detail is taken; up
            to half of it all is.
    """
    apart = _mean(carried - decoded, seen, COARSE, WINDOW, 3)
    taken = _enlarged(_trust(apart, tolerance, WINDOW), decoded) * _softened(seen)
    band = _enlarged(_mean(carried - decoded, seen, FINE), decoded) - _enlarged(apart, decoded)
    theirs, ours = _fine(carried, shown), _fine(decoded, torch.ones_like(shown))
    guessed = _enlarged(_guess(carried - decoded, theirs, ours, seen, shown, tolerance), decoded)
    finest = (taken + guessed * (_softened(shown) - seen).clamp(min=0)).clamp(max=1)
    return (decoded + taken * band + finest * (theirs - ours)).clamp(0, 1)


def _guess(
    difference: Float[Tensor, "n 3 height width"], theirs: Float[Tensor, "n 3 height width"],
    ours: Float[Tensor, "n 3 height width"], seen: Float[Tensor, "n 1 height width"],
    shown: Float[Tensor, "n 1 height width"], tolerance: float,
) -> Float[Tensor, "n 1 h w"]:  # fmt: skip
    """Say how much of a texture to take that the portrait does not show: where it fits and is the richer of the two.

    Smooth filling, of which a completed texture has much, has no energy, and leaves the frame its own.
    """
    fits = _trust(_mean(difference, shown, COARSE), tolerance, 3)
    a, b = (_mean(x.square().mean(1, keepdim=True), shown, COARSE, 5) for x in (theirs, ours))
    known = _pooled(seen, COARSE)
    for sign in (1, -1):  # holes are closed
        known = sign * max_pool2d(sign * known, 2 * HOLE + 1, 1, HOLE)
    return fits * a / (a + b + 1e-8) * (1 - known)


def _trust(apart: Float[Tensor, "n 3 h w"], tolerance: float, window: int) -> Float[Tensor, "n 1 h w"]:
    return (2 - 2 * _blur(apart.abs().mean(1, keepdim=True), window) / tolerance).clamp(0, 1)


def _fine(x: Float[Tensor, "n 3 height width"], where: Float[Tensor, "n 1 height width"]) -> Tensor:
    """Return the finest band of an image that is known in places."""
    return x - _enlarged(_mean(x, where, FINE), x)


def _mean(
    x: Float[Tensor, "n c height width"], where: Float[Tensor, "n 1 height width"], side: int, window: int = 3,
    times: int = 1,
) -> Float[Tensor, "n c h w"]:  # fmt: skip
    """Blur over `where` alone, at a smaller size: the background beside a cheek is no part of the cheek's colour."""
    where = where.clamp(min=0.02)
    total, weight = (_blur(_pooled(v, side), window, times) for v in (x * where, where))
    return total / weight


def _pooled(x: Float[Tensor, "n c height width"], side: int) -> Float[Tensor, "n c h w"]:
    return avg_pool2d(x, max(1, x.shape[-1] // side))


def _blur(x: Float[Tensor, "n c h w"], window: int, times: int = 1) -> Float[Tensor, "n c h w"]:
    for _ in range(times):
        for one in ((window, 1), (1, window)):
            x = avg_pool2d(x, one, 1, (one[0] // 2, one[1] // 2), count_include_pad=False)
    return x


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _softened(seen: Float[Tensor, "n 1 height width"]) -> Float[Tensor, "n 1 height width"]:
    """Ease the border inward: nothing is taken from beyond it."""
    return seen * _blur(seen, 2 * max(1, round(seen.shape[-1] / 128)) + 1)
