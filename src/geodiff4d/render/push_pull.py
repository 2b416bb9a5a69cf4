"""Filling of holes in images, smooth at every scale."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.nn.functional import interpolate as resize


def push_pull(
    premultiplied: Float[Tensor, "channels height width"], weight: Float[Tensor, "1 height width"], levels: int = 99
) -> Float[Tensor, "channels height width"]:
    """Fill holes smoothly: average down until nothing is empty, then let each level cover the coarser where it knows.

    With fewer levels than that takes, what is further away fades to zero.
    """
    pyramid = [(premultiplied[None], weight[None])]
    while max(pyramid[-1][0].shape[-2:]) > 1 and len(pyramid) <= levels:
        p, w = (avg_pool2d(x, 2, ceil_mode=True) for x in pyramid[-1])
        # A quarter of known texels is as good as all: small islands must not fade on the way down.
        gain = (4 * w).clamp(max=1) / w.clamp(min=1e-6)
        pyramid.append((p * gain, w * gain))
    p, w = pyramid.pop()
    out = p / w.clamp(min=1e-6) if p.shape[-2:] == (1, 1) else p
    for p, w in reversed(pyramid):
        out = p + (1 - w) * resize(out, p.shape[-2:], mode="bilinear", align_corners=False)
    return out[0]
