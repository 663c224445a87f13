"""Networks, by the `type` of their config."""

from torch import nn

from onelabel.configs.schema import AutoencoderNetworkConfig, UNetConfig
from onelabel.models.networks.autoencoder import Autoencoder
from onelabel.models.networks.unet import UNet


def build(config: UNetConfig | AutoencoderNetworkConfig, /) -> nn.Module:
    """The network that a config describes, with fresh weights from torch's global generator."""
    return UNet(config) if isinstance(config, UNetConfig) else Autoencoder(config)
