"""Losses as pure functions. Voxels labelled IGNORE count nowhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onelabel.imaging.labels import IGNORE


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, /) -> Tensor:
    """Mean cross-entropy of the known voxels, each sample times its weight.

    Parameters
    ----------
    logits : (B, C, *size); label : (B, *size) int with IGNORE; weight : (B,)
    """
    losses = F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="none").flatten(1).sum(1)
    known = (label != IGNORE).flatten(1).sum(1).clamp(min=1)
    return (weight * losses / known).mean()


def soft_dice(logits: Tensor, label: Tensor, weight: Tensor, /, *, smooth: float = 1.0) -> Tensor:
    """One minus the soft Dice of the foreground classes, denominators squared (Milletari 2016, section 3).

    Each sample counts by its weight.

    Parameters
    ----------
    logits : (B, C, *size); label : (B, *size) int with IGNORE; weight : (B,)
    """
    known = (label != IGNORE).unsqueeze(1)
    probability = logits.softmax(1)[:, 1:] * known
    classes = torch.arange(1, logits.shape[1], device=label.device).view(1, -1, *[1] * (label.ndim - 1))
    truth = (label.unsqueeze(1) == classes).to(probability.dtype)
    overlap = (probability * truth).flatten(2).sum(2)
    size = (probability.square() + truth).flatten(2).sum(2)
    dice = (2 * overlap + smooth) / (size + smooth)
    return (weight * (1 - dice.mean(1))).mean()


def reconstruction(logits: Tensor, target: Tensor, /, *, foreground: bool) -> Tensor:
    """Dice over all channels, mean squared error, and at first the foreground's Dice, as the mask autoencoder's.

    Parameters
    ----------
    logits, target : (B, C, *size)
    """
    probability = logits.softmax(1)
    loss = _batch_dice(probability, target) + (probability - target).square().mean()
    return loss + _batch_dice(probability[:, 1:], target[:, 1:]) if foreground else loss


def _batch_dice(probability: Tensor, target: Tensor) -> Tensor:
    overlap = (probability * target).flatten(1).sum(1)
    total = (probability + target).flatten(1).sum(1)
    return (1 - (2 * overlap + 1) / (total + 1)).mean()
