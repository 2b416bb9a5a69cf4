"""What a machine computes in natively."""

import torch


def bf16_is_native(device: torch.device) -> bool:
    """Whether the machine computes in bf16 rather than emulating it, which takes several times as long as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
