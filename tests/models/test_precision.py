import pytest
import torch

from onelabel.models.precision import use_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_asked_for_is_what_is_used(device: str) -> None:
    assert use_bf16("bf16", torch.device(device)) is True
    assert use_bf16("float32", torch.device(device)) is False


def test_auto_follows_the_processor() -> None:
    expected = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert use_bf16("auto", CPU) is bool(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its precision is not asked for")
def test_auto_follows_the_gpu() -> None:
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert use_bf16("auto", torch.device("cuda")) is native
