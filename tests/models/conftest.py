from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onelabel.configs.schema import AutoencoderNetworkConfig, UNetConfig
from onelabel.models import checkpoint, networks
from onelabel.models.checkpoint import Meta

UNET = UNetConfig(channels=(8, 16), patch=2)
AUTOENCODER = AutoencoderNetworkConfig(size=64, width=8, latent=16, dropout=0)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, torch.nn.Module, Meta]]:
    """Saves a small network with random weights; returns the folder, the network and its facts."""

    def save(
        name: str = "checkpoint", config: UNetConfig | AutoencoderNetworkConfig = UNET
    ) -> tuple[Path, torch.nn.Module, Meta]:
        network = networks.build(config)
        grid = {"spacing_mm": [4.0, 4.0, 4.0], "size": [24, 28, 20]}
        meta = Meta(config.model_dump(mode="json"), "supervised", grid, 7, 3, "digest", **checkpoint.provenance())
        folder = tmp_path / name
        checkpoint.save(folder, network, meta)
        return folder, network.eval(), meta

    return save
