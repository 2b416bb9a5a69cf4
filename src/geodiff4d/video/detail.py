"""Give frames the fine detail that the conditions know (ours, beyond the paper; embedded preset only).

A denoiser that saw little says well how light falls and where hair ends, and paints faces soft. The conditions are
known at full size: the portrait's own pixels carried to the target, and for normals the head's surface. Where both
agree once their detail is blurred away, the frame keeps its coarse picture and takes the condition's detail. Where they
do not (an open mouth, hair the head does not have), or the portrait hides the place, the frame stays as it is.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

COARSE, WINDOW = 64, 9
"""Side at which pictures are compared, and the window's, applied three times: a Gaussian of 4.5 px, 18 at 256 px."""


def restore_detail(
    decoded: Float[Tensor, "n 3 height width"],
    condition: Float[Tensor, "n 3 height width"],
    seen: Float[Tensor, "n 1 height width"],
    tolerance: float,
) -> Float[Tensor, "n 3 height width"]:
    """Exchange the fine band of frames in [0, 1] for their condition's.

    Args:
        condition: the frame as the conditions alone show it.
        seen: where the condition may be believed, 0 to 1.
        tolerance: mean absolute difference [0, 1] of the coarse pictures at which nothing of the detail is taken.
    """
    frame, known = _coarse(decoded, seen), _coarse(condition, seen)
    apart = _blur((frame - known).abs().mean(1, keepdim=True), 1)
    trust = _enlarged((1 - apart / tolerance).clamp(min=0), decoded) * _softened(seen)
    return (decoded + trust * (condition - decoded - _enlarged(known - frame, decoded))).clamp(0, 1)


def _coarse(x: Float[Tensor, "n c height width"], seen: Float[Tensor, "n 1 height width"]) -> Float[Tensor, "n c h w"]:
    """Blur over what is seen alone: the background beside a cheek is no part of the cheek's colour."""
    seen = seen.clamp(min=0.02)
    factor = max(1, x.shape[-1] // COARSE)
    total, weight = (_blur(avg_pool2d(v, factor), 3) for v in (x * seen, seen))
    return total / weight


def _blur(x: Float[Tensor, "n c h w"], times: int) -> Float[Tensor, "n c h w"]:
    for _ in range(times):
        x = avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    return x


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _softened(seen: Float[Tensor, "n 1 height width"]) -> Float[Tensor, "n 1 height width"]:
    """Ease the border inward: nothing is taken from beyond it."""
    side = max(1, seen.shape[-1] // 64 * 2 + 1)
    return seen * avg_pool2d(seen, side, 1, side // 2, count_include_pad=False)
