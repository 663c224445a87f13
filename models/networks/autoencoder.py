"""The convolutional autoencoder of masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelabel.configs.schema import AutoencoderNetworkConfig

_LATENT_EDGE = 4


class Autoencoder(nn.Module):
    """Masks to a latent of 4 voxels an axis and back (the quality-control autoencoder behind SingleStrip).

    Blocks are convolution, batch normalisation, leaky ReLU 0.2 and dropout. At 256 voxels there are six halvings; a
    smaller size drops the outermost, so that the latent keeps its edge.

    forward : shares of the classes (B, classes, *(size,) * dims) -> logits of the same shape
    """

    def __init__(self, config: AutoencoderNetworkConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        halvings = (config.size // _LATENT_EDGE).bit_length() - 1
        # (before, after, stride) from the outside in; the innermost five blocks are the same at every size.
        outer = [(w if i else config.classes, w, 2) for i in range(halvings - 3)]
        inner = [(w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 2 * w, 1), (2 * w, w, 1)]
        blocks = outer + inner
        self.encoder = nn.Sequential(
            *[_block(config, before, after, stride) for before, after, stride in blocks],
            _conv(config, w, config.latent, 2),
        )
        first, *rest = blocks
        self.decoder = nn.Sequential(
            _block(config, config.latent, w, 2, up=True),
            *(_block(config, after, before, stride, up=True) for before, after, stride in reversed(rest)),
            _conv(config, first[1], config.classes, 2, up=True),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                nn.init.kaiming_uniform_(module.weight, a=0.2)
        self.format = torch.channels_last if config.dims == 2 else torch.channels_last_3d  # twice as fast on a CPU
        for parameter in self.parameters():
            if parameter.ndim == config.dims + 2:
                parameter.data = parameter.data.contiguous(memory_format=self.format)

    def forward(self, mask: Tensor) -> Tensor:
        """Logits of the reconstruction."""
        logits: Tensor = self.decoder(self.encoder(mask.contiguous(memory_format=self.format)))
        return logits


def fit_to(mask: Tensor, edge: int, /, *, dims: int) -> Tensor:
    """Pad with zeros or crop, centred, to length `edge` on the last axes: (..., *any) -> (..., *edge)."""
    pads: list[int] = []
    for length in reversed(mask.shape[-dims:]):
        before = (edge - length) // 2
        pads += [before, edge - length - before]
    return F.pad(mask, pads)


def views(mask: Tensor, config: AutoencoderNetworkConfig, /) -> Tensor:
    """What the network sees of a mask: the share of each class in blocks of `pool` voxels an axis.

    Parameters
    ----------
    mask : (*size) int

    Returns
    -------
    (n, classes, edge, edge) float32, slices along the shortest axis; in 3D (1, classes, edge, edge, edge)
    """
    share = F.avg_pool3d(one_hot(mask[None], config.classes), config.pool, ceil_mode=True, count_include_pad=False)
    if config.dims == 2:
        shortest = min(range(mask.ndim), key=lambda axis: mask.shape[axis])
        share = share[0].movedim(shortest + 1, 0)
    structure = fit_to(share[:, 1:], config.size, dims=config.dims)
    return torch.cat([1 - structure.sum(1, keepdim=True), structure], dim=1)


def one_hot(mask: Tensor, classes: int, /) -> Tensor:
    """(B, *size) int -> (B, classes, *size) float32."""
    return torch.stack([mask == index for index in range(classes)], dim=1).float()


def _conv(config: AutoencoderNetworkConfig, before: int, after: int, stride: int, *, up: bool = False) -> nn.Module:
    kinds = {(2, False): nn.Conv2d, (3, False): nn.Conv3d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d}
    return kinds[config.dims, up](before, after, 4 if stride == 2 else 3, stride=stride, padding=1)


def _block(
    config: AutoencoderNetworkConfig, before: int, after: int, stride: int, *, up: bool = False
) -> nn.Sequential:
    norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[config.dims](after)
    return nn.Sequential(
        _conv(config, before, after, stride, up=up), norm, nn.LeakyReLU(0.2), nn.Dropout(config.dropout)
    )
