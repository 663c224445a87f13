"""Rankers: which masks to trust, without a truth."""

from torch import nn

from onelabel.configs.schema import (
    ConfidenceRankerConfig,
    ConsistencyRankerConfig,
    PosteriorRankerConfig,
    SingleRankerConfig,
)
from onelabel.models.rankers.autoencoder import AutoencoderRanker
from onelabel.models.rankers.base import Ranker
from onelabel.models.rankers.confidence import ConfidenceRanker
from onelabel.models.rankers.consistency import ConsistencyRanker
from onelabel.models.rankers.fused import fuse
from onelabel.models.rankers.posterior import PosteriorRanker

__all__ = ["AutoencoderRanker", "ConfidenceRanker", "ConsistencyRanker", "PosteriorRanker", "Ranker", "build", "fuse"]


def build(config: SingleRankerConfig, network: nn.Module | None = None, /) -> Ranker:
    """The ranker of a config, on the network that was fitted for it if it needs one."""
    if isinstance(config, ConsistencyRankerConfig):
        return ConsistencyRanker(config)
    if isinstance(config, ConfidenceRankerConfig):
        return ConfidenceRanker(config)
    if isinstance(config, PosteriorRankerConfig):
        return PosteriorRanker(config)
    return AutoencoderRanker(network)
