"""Weights as they ship: large matrices in eight bits, one scale per row, so that a package stays small.

Rounding costs at most half a step, 1/254 of a row's largest weight: about what bf16, in which the networks compute,
rounds off a weight of that size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SMALLEST = 4096
"""Tensors with fewer numbers (norms, biases, embeddings) stay as they are."""
SCALE = ".int8_scale"
"""What a tensor's scales are called, after its own name."""


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round weights `[rows, …]` to int8, with scales `[rows]` in float32 beside them; the others become fp16.

    What is packed already stays as it is.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or name.endswith(SCALE):
            out[name] = tensor
        elif tensor.dim() < 2 or tensor.numel() < SMALLEST:
            out[name] = tensor.half()
        else:
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            out[name] = (rows / scale[:, None]).round().to(torch.int8).view_as(tensor)
            out[name + SCALE] = scale
    return out


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `packed` but for the rounding: int8 with scales becomes float32; anything else passes."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        scale = state.get(name + SCALE)
        if scale is not None:
            shape = (-1, *[1] * (tensor.dim() - 1))
            out[name] = tensor.float() * scale.view(shape)
        elif not name.endswith(SCALE):
            out[name] = tensor
    return out
