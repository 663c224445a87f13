"""U-Net with an optional strided stem."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelabel.configs.schema import UNetConfig

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_INSTANCE = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BATCH = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}
_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


class UNet(nn.Module):
    """U-Net (Ronneberger 2015) whose stem may step over voxels, so that features live on a coarser grid.

    forward : image (B, 1, *size) -> logits (B, classes, *size); each axis a multiple of its one of `config.divisors`. A
    2D network takes volumes too, slice by slice along the axis `config.across`, by default the last.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, (patch, *self.strides) = config.channels, config.factors
        self.dims, self.pool = config.dims, _POOL[config.dims]
        self.across = 2 if config.across is None else config.across
        convs = config.convs * len(channels) if len(config.convs) == 1 else config.convs
        plain = max(patch) == 1
        self.stem = _CONV[config.dims](1, channels[0], 3 if plain else patch, stride=patch, padding=int(plain))
        self.down = nn.ModuleList(
            _block(config, channels[max(i - 1, 0)], width, convs[i], drop=i >= len(channels) - 2)
            for i, width in enumerate(channels)
        )
        self.up = nn.ModuleList(
            _block(config, channels[i + 1] + channels[i], channels[i], convs[i])
            for i in reversed(range(len(channels) - 1))
        )
        self.head = _TRANSPOSED[config.dims](channels[0], config.classes, patch, stride=patch)
        self.heads = nn.ModuleList(
            _CONV[config.dims](width, config.classes, 1) for width in channels[1:][: config.heads]
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits of an image."""
        if self.dims == 2 and image.ndim == 5:
            return self._volumes(self(self._slices(image)), image)
        logits: Tensor = self.head(self._levels(image)[0])
        return logits

    def scales(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """All that several scales say of an image (B, 1, *size).

        Returns
        -------
        logits : of the finest level (B, classes, *size), then of those that have a head, each coarser than the last
        features : (B, channels, *grid) of the finest level
        """
        if self.dims == 2 and image.ndim == 5:
            logits, features = self.scales(self._slices(image))
            return [self._volumes(each, image) for each in logits], self._volumes(features, image)
        finest, *coarser = self._levels(image)
        return [self.head(finest), *(head(each) for head, each in zip(self.heads, coarser, strict=False))], finest

    def _levels(self, image: Tensor) -> list[Tensor]:
        """Features of every level of the way up, the finest first."""
        features, skips = self.stem(image), []
        for level, block in enumerate(self.down):
            features = block(self.pool(features, self.strides[level - 1]) if level else features)
            skips.append(features)
        levels = [skips.pop()]
        for block, stride in zip(self.up, reversed(self.strides), strict=True):
            features = F.interpolate(levels[0], scale_factor=tuple(map(float, stride)), mode="nearest")
            levels.insert(0, block(torch.cat([features, skips.pop()], dim=1)))
        return levels

    def _slices(self, volume: Tensor) -> Tensor:
        return volume.movedim(2 + self.across, 1).flatten(0, 1)

    def _volumes(self, slices: Tensor, like: Tensor) -> Tensor:
        return slices.unflatten(0, (like.shape[0], like.shape[2 + self.across])).movedim(1, 2 + self.across)


def set_dropout(network: nn.Module, on: bool, /) -> None:
    """Drop features as in training, or none, whatever mode the rest of the network is in."""
    for module in network.modules():
        if isinstance(module, nn.Dropout2d | nn.Dropout3d):
            module.train(on)


def _block(config: UNetConfig, before: int, after: int, convs: int, *, drop: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convs):
        layers.append(_CONV[config.dims](after if i else before, after, 3, padding=1))
        if config.norm == "instance":
            layers.append(_INSTANCE[config.dims](after, affine=True))
        elif config.norm == "batch":
            layers.append(_BATCH[config.dims](after))
        elif config.norm == "group":
            layers.append(nn.GroupNorm(8 if after % 8 == 0 else 1, after))
        layers.append(nn.LeakyReLU(0.01, inplace=True))
    if drop and config.dropout:
        layers.append(_DROPOUT[config.dims](config.dropout))
    return nn.Sequential(*layers)
