"""The convolutional autoencoder of masks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelabel.configs.schema import AutoencoderNetworkConfig

_LATENT_EDGE = 4


class Autoencoder(nn.Module):
    """Masks to a latent of 4 voxels an axis and back (the quality-control autoencoder behind SingleStrip).

    Blocks are convolution, batch normalisation, leaky ReLU 0.2 and dropout. At 256 voxels there are six halvings; a
    smaller size drops the outermost, so that the latent keeps its edge. What does not fill the size is not padded to it
    in vain: the latent is as much smaller.

    forward : shares of the classes (B, classes, *edges) -> logits of the same shape; edges as of `views`
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


def fit_to(mask: Tensor, edges: Sequence[int], /) -> Tensor:
    """Pad with zeros or crop, centred, to lengths `edges` of the last axes: (..., *any) -> (..., *edges)."""
    return F.pad(mask, _pads(mask.shape[-len(edges) :], edges))


def views(mask: Tensor, config: AutoencoderNetworkConfig, /) -> Tensor:
    """What the network sees of a mask: the share of each class in blocks of `pool` voxels an axis.

    Parameters
    ----------
    mask : (*size) int

    Returns
    -------
    (n, classes, *edges) float32, slices along the shortest axis; in 3D (1, classes, *edges). Edges are the least that
    hold the blocks and that the network can halve, at most `size`.
    """
    share = F.avg_pool3d(one_hot(mask[None], config.classes), config.pool, ceil_mode=True, count_include_pad=False)
    if config.dims == 2:
        share = share[0].movedim(_shortest(mask.shape) + 1, 0)
    structure = fit_to(share[:, 1:], _edges(share.shape[2:], config))
    return torch.cat([1 - structure.sum(1, keepdim=True), structure], dim=1)


def unview(seen: Tensor, size: Sequence[int], config: AutoencoderNetworkConfig, /) -> Tensor:
    """Put a class of the views of a mask back on its grid, linear between the centres of blocks.

    Parameters
    ----------
    seen : (n, *edges) float32; in 3D (1, *edges)

    Returns
    -------
    (*size) float32
    """
    blocks = [-(-length // config.pool) for length in size]
    along = _shortest(size)
    fitted = blocks if config.dims == 3 else [*blocks[:along], *blocks[along + 1 :]]
    share = F.pad(seen, [-pad for pad in _pads(fitted, _edges(fitted, config))])
    share = share[0] if config.dims == 3 else share.movedim(0, along)
    fine = F.interpolate(share[None, None], scale_factor=config.pool, mode="trilinear")
    return fine[0, 0, : size[0], : size[1], : size[2]]


def _edges(blocks: Sequence[int], config: AutoencoderNetworkConfig) -> list[int]:
    """Lengths of the views of so many blocks an axis."""
    stride = config.size // _LATENT_EDGE
    return [min(config.size, -(-length // stride) * stride) for length in blocks]


def _pads(size: Sequence[int], edges: Sequence[int]) -> list[int]:
    """What to add before and after each axis to lengths `edges`, the last axis first; negative: to cut."""
    pads: list[int] = []
    for length, edge in zip(reversed(size), reversed(edges), strict=True):
        before = (edge - length) // 2
        pads += [before, edge - length - before]
    return pads


def _shortest(size: Sequence[int]) -> int:
    return min(range(len(size)), key=lambda axis: size[axis])


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
