"""Rankers: which masks to trust, without a truth."""

from onelabel.models.rankers.autoencoder import AutoencoderRanker
from onelabel.models.rankers.base import Ranker

__all__ = ["AutoencoderRanker", "Ranker"]
