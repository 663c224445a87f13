"""Which arithmetic the hardware does well."""

import torch


def use_bf16(precision: str, device: torch.device, /) -> bool:
    """Whether to autocast to bfloat16: `bf16`, `float32`, or `auto` for what the hardware has.

    A CPU that can emulate it (AVX-512 without the instructions) takes two to three times as long as in float32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    native = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return bool(native and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
