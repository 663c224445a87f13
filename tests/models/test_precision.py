from pathlib import Path

import pytest
import torch

from onelabel.models.precision import use_bf16

CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_asked_for_is_what_is_used(device: str) -> None:
    assert use_bf16("bf16", torch.device(device)) is True
    assert use_bf16("float32", torch.device(device)) is False


@pytest.mark.skipif(not CPUINFO.is_file(), reason="no /proc/cpuinfo: what the processor can do is not known")
def test_auto_follows_the_processor_and_not_what_it_can_emulate() -> None:
    flags = set(CPUINFO.read_text().split())
    assert use_bf16("auto", CPU) is bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its precision is not asked for")
def test_auto_follows_the_gpu() -> None:
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert use_bf16("auto", torch.device("cuda")) is native
