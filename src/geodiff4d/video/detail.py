"""Give back what the codec lost (ours, beyond the paper; embedded preset only).

A 16 × 16 patch code cannot hold a portrait's pores. But the conditions are known at full size: where the model's frame
agrees with the warped portrait (or, for normals, with the pose map), the difference between the condition and its own
decoded code is exactly the detail that is missing, and it is added. Where they disagree, an open mouth or hair the head
does not have, nothing is.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from geodiff4d.video.vae import Codec

WINDOW = 9
"""Side of the neighbourhood that must agree [px at 256]."""


def restore_detail(
    decoded: Float[Tensor, "n 3 height width"],
    condition: Float[Tensor, "n 3 height width"],
    seen: Float[Tensor, "n 1 height width"],
    codec: Codec,
    tolerance: float,
) -> Float[Tensor, "n 3 height width"]:
    """Add the condition's lost detail to decoded frames in [0, 1].

    Args:
        condition: the frame as the conditions alone show it.
        seen: where the condition may be believed, 0 to 1.
        tolerance: mean absolute difference [0, 1] at which nothing of the detail is left.
    """
    coded = codec.decode(codec.encode(condition))
    apart = (decoded - coded).abs().mean(1, keepdim=True)
    side = max(3, WINDOW * decoded.shape[-1] // 256 // 2 * 2 + 1)
    apart = avg_pool2d(apart, side, 1, side // 2, count_include_pad=False)
    trust = seen * (1 - apart / tolerance).clamp(min=0)
    trust = avg_pool2d(trust, 3, 1, 1, count_include_pad=False)
    return (decoded + trust * (condition - coded)).clamp(0, 1)
