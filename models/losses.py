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


def negative(logits: Tensor, label: Tensor, weight: Tensor, /) -> Tensor:
    """Mean of -log(1 - p) of the known voxels, p of what they are not (negative learning, Kim 2019, equation 2).

    At least 0, and no logit has a gradient above 1: the voxel unlearns its label, whatever else it may be.

    Parameters
    ----------
    logits : (B, C, *size); label : (B, *size) int with IGNORE; weight : (B,)
    """
    known = label != IGNORE
    said = label.long().clamp(min=0).unsqueeze(1)
    others = torch.zeros_like(logits, dtype=torch.bool).scatter(1, said, True)
    losses = (logits.logsumexp(1) - logits.masked_fill(others, -torch.inf).logsumexp(1)) * known
    return (weight * losses.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)).mean()


def distillation(student: Tensor, teacher: Tensor, weight: Tensor, /, *, temperature: float) -> Tensor:
    """Divergence of the student's softened classes from the teacher's, times temperature squared (Hinton 2015).

    Parameters
    ----------
    student, teacher : logits (B, C, *size); weight : (B,)
    """
    log_said, log_taught = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    divergence = F.kl_div(log_said, log_taught, reduction="none", log_target=True).sum(1)
    return temperature**2 * (weight * divergence.flatten(1).mean(1)).mean()


def prototypes(features: Tensor, membership: Tensor, /) -> tuple[Tensor, Tensor]:
    """The direction of the mean feature of each class.

    Parameters
    ----------
    features : (B, D, *size); membership : (B, C, *size), how much a voxel counts for a class

    Returns
    -------
    (B, C, D) of length 1, and (B, C) bool: whether the class is there at all
    """
    sums = torch.einsum("bdn,bcn->bcd", F.normalize(features, dim=1).flatten(2), membership.flatten(2))
    return F.normalize(sums, dim=2), membership.flatten(2).sum(2) > 0


def contrast(
    student: Tensor, teacher: Tensor, present: Tensor, weight: Tensor, /, *, temperature: float = 0.1
) -> Tensor:
    """InfoNCE over the classes of a sample: a prototype is like the teacher's of its class, unlike those of others.

    Parameters
    ----------
    student, teacher : (B, C, D) of length 1; present : (B, C) bool, others count nowhere; weight : (B,)
    """
    likeness = torch.einsum("bcd,bkd->bck", student, teacher) / temperature
    likeness = likeness.masked_fill(~present.unsqueeze(1), torch.finfo(likeness.dtype).min)
    losses = (likeness.logsumexp(2) - likeness.diagonal(dim1=1, dim2=2)).where(present, 0)
    return (weight * losses.sum(1) / present.sum(1).clamp(min=1)).mean()


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
