"""Which arithmetic the hardware does well."""

import torch


def use_bf16(precision: str, device: torch.device, /) -> bool:
    """Whether to autocast to bfloat16: `bf16`, `float32`, or `auto` for what the hardware has."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
