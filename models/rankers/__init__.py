"""Rankers: which masks to trust, without a truth."""

from collections.abc import Sequence

import torch
from torch import nn

from onelabel.configs.schema import (
    ConfidenceRankerConfig,
    ConsistencyRankerConfig,
    PosteriorRankerConfig,
    RankerConfig,
    SingleRankerConfig,
    single_rankers,
)
from onelabel.imaging.storage import AnyPath
from onelabel.models import checkpoint
from onelabel.models.rankers.autoencoder import AutoencoderRanker
from onelabel.models.rankers.base import Ranker
from onelabel.models.rankers.confidence import ConfidenceRanker
from onelabel.models.rankers.consistency import ConsistencyRanker
from onelabel.models.rankers.fused import fuse
from onelabel.models.rankers.posterior import PosteriorRanker

__all__ = [
    "AutoencoderRanker",
    "ConfidenceRanker",
    "ConsistencyRanker",
    "PosteriorRanker",
    "Ranker",
    "build",
    "fuse",
    "load",
]


def build(config: SingleRankerConfig, network: nn.Module | None = None, /, *, bf16: bool = False) -> Ranker:
    """The ranker of a config, on the network that was fitted for it if it needs one, which may run in bfloat16."""
    if isinstance(config, ConsistencyRankerConfig):
        return ConsistencyRanker(config)
    if isinstance(config, ConfidenceRankerConfig):
        return ConfidenceRanker(config)
    if isinstance(config, PosteriorRankerConfig):
        return PosteriorRanker(config)
    return AutoencoderRanker(network, bf16=bf16)


def load(
    config: RankerConfig | None, fitted: Sequence[AnyPath | None], /, *, device: torch.device, bf16: bool
) -> list[Ranker]:
    """The single rankers of a config on a device.

    Parameters
    ----------
    fitted : checkpoint of the network of each, or None where it needs none
    """
    return [
        build(part, checkpoint.load(path)[0].to(device) if path else None, bf16=bf16)
        for part, path in zip(single_rankers(config), fitted, strict=True)
    ]
