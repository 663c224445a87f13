"""Learn from two label sets whose voxels weigh what they do for clean labels (MLB-Seg, arXiv 2307.11604)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from onelabel.configs.learners import MetaWeightedConfig
from onelabel.imaging import random
from onelabel.imaging.labels import IGNORE
from onelabel.models import losses
from onelabel.models.learners.base import Learner, Progress, Samples
from onelabel.models.predictor import likeliest


class MetaWeightedLearner(Learner):
    """The stream `pseudo` has initial labels y0, the network makes enhanced ones y1, `labelled` says their worth.

    The teacher is the mean of the network's weights, buffers included, and is never reset within a round.
    """

    streams: ClassVar[tuple[str, ...]] = ("labelled", "pseudo")
    base: MetaWeightedConfig

    def step(self, batch: Mapping[str, Samples], progress: Progress) -> dict[str, float]:
        """One step on weighted pseudo-labels, one on labels, each with consistency terms, at the last part of a batch.

        L = sum(w C) + L_c + L_ema with the costs C = [CE(f, y0), CE(f, y1)], then L = CE(f, y) + L_c + L_ema.
        """
        parts = self.parts(batch, progress)
        if not parts:
            return {}
        warps = sample_warps(self.base, random.generator("views", int(torch.randint(1 << 48, ()))))
        clean = self._clean_gradient([each["labelled"] for _, each in parts], warps)
        for part, each in parts:
            logged = self.descend(self._pseudo_loss(each["pseudo"], warps, clean), part)
        for part, each in parts:
            told = self.descend(self._clean_loss(each["labelled"], warps), part)
        return told | {"pseudo_loss": logged["loss"]}

    def _clean_gradient(self, labelled: Sequence[Samples], warps: Sequence["Warp"]) -> dict[str, Tensor]:
        """Gradient of the meta loss G, the cross-entropy of clean labels, by the name of the parameter."""
        self.optimiser.zero_grad()
        for samples in labelled:
            logits = self.logits(look(samples.image, warps))
            (_clean_cost(logits, samples, warps) / len(labelled)).backward()
        self.average(list(self.network.parameters()))
        named = self.network.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}

    def _pseudo_loss(self, samples: Samples, warps: Sequence["Warp"], clean: Mapping[str, Tensor]) -> Tensor:
        image = look(samples.image, warps)
        logits = self.logits(image)
        label = torch.stack([look_at_label(samples.label, warps), enhanced(logits.detach(), warps)])
        weight = meta_weights(self.network, image, label, clean, views=len(warps))
        cost = (weight * costs(logits, label)).sum(0).unflatten(0, (len(warps), -1)).sum(0).flatten(1).sum(1)
        return (samples.weight * cost).mean() + self._agreement(image, logits, warps)

    def _clean_loss(self, samples: Samples, warps: Sequence["Warp"]) -> Tensor:
        image = look(samples.image, warps)
        logits = self.logits(image)
        return _clean_cost(logits, samples, warps) + self._agreement(image, logits, warps)

    def _agreement(self, image: Tensor, logits: Tensor, warps: Sequence["Warp"]) -> Tensor:
        """L_c + L_ema: the differences between views, and from the teacher on noisy views."""
        noisy = image + self.base.noise * torch.randn_like(image)
        with torch.no_grad(), self.autocast():
            taught = self.predictor().eval()(noisy).float().softmax(1)
        differences = (logits.softmax(1) - taught).square().mean()
        return self.base.consistency_weight * consistency(logits, warps) + self.base.teacher_weight * differences


def costs(logits: Tensor, label: Tensor, /) -> Tensor:
    """The costs C of each label set: logits (B, C, *size), label (2, B, *size) with IGNORE -> (2, B, *size)."""
    return torch.stack([F.cross_entropy(logits, one.long(), ignore_index=IGNORE, reduction="none") for one in label])


def meta_weights(
    network: nn.Module, image: Tensor, label: Tensor, clean: Mapping[str, Tensor], /, *, views: int
) -> Tensor:
    """What each voxel of each label set is worth: w = max(0, -dG/de), scaled to a sum of 1 for each image.

    After a virtual step down sum(e C), -dG/de_i at e = 0 is lr <grad G, grad C_i>: the derivative of the cost map along
    the clean gradient, which one pass of forward differentiation, in the network's own precision, gives for all voxels.

    Parameters
    ----------
    image : (views * B, 1, *size), view by view; label : (2, views * B, *size) with IGNORE
    clean : grad G by the name of the parameter

    Returns
    -------
    (2, views * B, *size) float32
    """
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def cost(parameters: dict[str, Tensor]) -> Tensor:
        # Batch norm writes into its buffers; it may write into what was made here alone.
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        return costs(functional_call(network, parameters | buffers, (image,)), label)

    with torch.no_grad():
        slope: Tensor = jvp(cost, (parameters,), (dict(clean),))[1]
    worth = slope.clamp(min=0).unflatten(1, (views, -1))
    total = worth.sum((0, 1, *range(3, worth.ndim)), keepdim=True)
    return (worth / total.clamp(min=torch.finfo(total.dtype).tiny)).flatten(1, 2)


@dataclass(frozen=True)
class Warp:
    """A view of an image: zoom, above 1 for a part of it that is larger; flip : axes that are mirrored."""

    zoom: float = 1.0
    flip: tuple[int, ...] = ()


def sample_warps(config: MetaWeightedConfig, generator: torch.Generator) -> list[Warp]:
    """Draw views: the image itself, larger and smaller ones, a mirrored one."""
    larger = [Warp(random.uniform(*config.zoom, generator)) for _ in range(config.zoomed_in)]
    smaller = [Warp(1 / random.uniform(*config.zoom, generator)) for _ in range(config.zoomed_out)]
    mirrored = []
    if axes := config.flip_axes:
        some = random.integer(1, 2 ** len(axes) - 1, generator)
        mirrored = [Warp(flip=tuple(axis for place, axis in enumerate(axes) if some >> place & 1))]
    return [Warp(), *larger, *smaller, *mirrored]


def warp(volume: Tensor, view: Warp, /, *, mode: str = "bilinear") -> Tensor:
    """A volume (B, C, *size) float32 as a view shows it; 0 beyond its edge."""
    seen = volume.flip([axis + 2 for axis in view.flip])
    return _zoomed(seen, view.zoom, mode)


def unwarp(volume: Tensor, view: Warp, /, *, mode: str = "bilinear") -> Tensor:
    """What a view shows, back in its place; 0 where it shows nothing."""
    return _zoomed(volume, 1 / view.zoom, mode).flip([axis + 2 for axis in view.flip])


def look(image: Tensor, warps: Sequence[Warp], /) -> Tensor:
    """All views of images (B, 1, *size) -> (views * B, 1, *size)."""
    return torch.cat([warp(image, view) for view in warps])


def look_at_label(label: Tensor, warps: Sequence[Warp], /) -> Tensor:
    """All views of labels (B, *size) int -> (views * B, *size) int8, IGNORE beyond the edge."""
    above = label.unsqueeze(1).float() - IGNORE
    return (torch.cat([warp(above, view, mode="nearest") for view in warps]) + IGNORE).squeeze(1).to(torch.int8)


def enhanced(logits: Tensor, warps: Sequence[Warp], /) -> Tensor:
    """The enhanced labels y1 in every view: the likeliest class of the mean over un-warped views.

    Parameters
    ----------
    logits : (views * B, C, *size)

    Returns
    -------
    (views * B, *size) int8, IGNORE beyond the image's edge
    """
    back, seen = _unwarped(logits, warps)
    mean = (back * seen).sum(0) / seen.sum(0).clamp(min=1)
    return look_at_label(likeliest(mean), warps)


def consistency(logits: Tensor, warps: Sequence[Warp], /) -> Tensor:
    """L_c: mean squared difference of the probabilities of two un-warped views, where both see, over all pairs.

    Gradients reach both views of a pair. logits : (views * B, C, *size)
    """
    back, seen = _unwarped(logits, warps)
    differences = [
        ((back[i] - back[j]).square().mean((0, 1)) * both).sum() / both.sum().clamp(min=1)
        for i, j in combinations(range(len(warps)), 2)
        for both in [(seen[i] * seen[j])[0, 0]]
    ]
    return torch.stack(differences).mean() if differences else logits.new_zeros(())


def _unwarped(logits: Tensor, warps: Sequence[Warp]) -> tuple[Tensor, Tensor]:
    """Probabilities (views, B, C, *size) in the images' own place, and what is seen (views, 1, 1, *size), 0 or 1."""
    probability = logits.softmax(1).chunk(len(warps))
    back = torch.stack([unwarp(each, view) for each, view in zip(probability, warps, strict=True)])
    whole = logits.new_ones(1, 1, *logits.shape[2:])
    return back, torch.stack([(unwarp(whole, view) > 0.999).float() for view in warps])


def _zoomed(volume: Tensor, zoom: float, mode: str) -> Tensor:
    if zoom == 1:
        return volume
    dims = volume.ndim - 2
    matrix = torch.cat([torch.eye(dims) / zoom, torch.zeros(dims, 1)], dim=1).to(volume.device)
    grid = F.affine_grid(matrix.expand(len(volume), dims, dims + 1), list(volume.shape), align_corners=False)
    return F.grid_sample(volume, grid, mode=mode, align_corners=False)


def _clean_cost(logits: Tensor, samples: Samples, warps: Sequence[Warp]) -> Tensor:
    """G: cross-entropy of clean labels over all views, each sample times its weight."""
    return losses.cross_entropy(logits, look_at_label(samples.label, warps), samples.weight.repeat(len(warps)))
