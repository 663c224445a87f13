import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onelabel.imaging.labels import IGNORE
from onelabel.models import losses

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SIZE = (4, 5, 6)
LOSSES: dict[str, Loss] = {"cross_entropy": losses.cross_entropy, "soft_dice": losses.soft_dice}
# What has a label with unknown voxels, though not all of it wants to be near the label.
LABELLED: dict[str, Loss] = LOSSES | {"negative": losses.negative}


def problem(classes: int = 3, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with unknown voxels, weights."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, *SIZE, generator=generator)
    label = torch.randint(0, classes, (batch, *SIZE), generator=generator).to(torch.int8)
    label[:, 1] = IGNORE
    return logits, label, torch.ones(batch)


def sure(label: Tensor, classes: int = 3) -> Tensor:
    """Logits that say the label, and class 0 where it is unknown."""
    return 40.0 * torch.nn.functional.one_hot(label.clamp(min=0).long(), classes).movedim(-1, 1).float()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_perfect_prediction_costs_nothing_and_a_worse_one_more(loss: Loss) -> None:
    logits, label, weight = problem()
    perfect = sure(label)
    wrong = sure((label + 1).clamp(max=2))
    assert loss(perfect, label, weight) < 1e-4
    assert 0.05 < loss(logits, label, weight) < loss(wrong, label, weight)


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_unknown_voxels_count_nowhere(loss: Loss) -> None:
    logits, label, weight = problem()
    logits.requires_grad_()
    loss(logits, label, weight).backward()
    assert logits.grad is not None
    unknown = (label == IGNORE).unsqueeze(1).expand_as(logits)
    assert not logits.grad[unknown].any()
    assert (logits.grad[~unknown] != 0).float().mean() > 0.99
    # Nor does what is predicted there change the value.
    changed = torch.where(unknown, torch.randn_like(logits) * 9, logits)
    assert torch.allclose(loss(changed, label, weight), loss(logits, label, weight))


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_nothing_known_is_no_gradient_and_no_fault(loss: Loss) -> None:
    logits, label, weight = problem()
    logits.requires_grad_()
    value = loss(logits, torch.full_like(label, IGNORE), weight)
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_a_sample_counts_by_its_weight(loss: Loss) -> None:
    logits, label, _ = problem()
    one, two = (loss(logits[i : i + 1], label[i : i + 1], torch.ones(1)) for i in range(2))
    assert not torch.isclose(one, two, atol=1e-4)
    for first, second in ((1.0, 1.0), (1.0, 0.0), (0.0, 2.0), (0.5, 3.0)):
        expected = (first * one + second * two) / 2
        assert torch.allclose(loss(logits, label, torch.tensor([first, second])), expected)
    # Alone in its batch too.
    assert torch.allclose(loss(logits[:1], label[:1], torch.tensor([0.25])), one / 4)


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_the_gradient_is_right(loss: Loss) -> None:
    logits, label, weight = problem()
    doubles = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(partial(_of_logits, loss, label, weight.double()), (doubles[:, :, :2, :2, :1],))


def _of_logits(loss: Loss, label: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, label[:, :2, :2, :1], weight)


def test_cross_entropy_by_hand() -> None:
    # Three known voxels with probability 3/4, 3/4 and 1/4 of what is true.
    logits = torch.tensor([[[0.0, math.log(3), 0.0, 5.0], [math.log(3), 0.0, math.log(3), -5.0]]])
    label = torch.tensor([[1, 0, 0, IGNORE]])
    expected = -(2 * math.log(3 / 4) + math.log(1 / 4)) / 3
    assert losses.cross_entropy(logits, label, torch.ones(1)).item() == pytest.approx(expected, rel=1e-5)


def test_soft_dice_by_hand() -> None:
    # Foreground probabilities 3/4, 1/4, 3/4; the truth is 1, 0, 0.
    logits = torch.tensor([[[0.0, math.log(3), 0.0, 5.0], [math.log(3), 0.0, math.log(3), -5.0]]])
    label = torch.tensor([[1, 0, 0, IGNORE]])
    size = 9 / 16 + 1 / 16 + 9 / 16 + 1
    expected = 1 - (2 * 0.75 + 1) / (size + 1)
    assert losses.soft_dice(logits, label, torch.ones(1)).item() == pytest.approx(expected, rel=1e-5)
    none = losses.soft_dice(logits, label, torch.ones(1), smooth=0)
    assert none.item() == pytest.approx(1 - 1.5 / size, rel=1e-5)


def test_soft_dice_is_the_mean_over_the_foreground_classes() -> None:
    label = torch.zeros(1, 30, dtype=torch.int8)
    label[0, :10], label[0, 10:20] = 1, 2
    right_on_one = torch.where(label == 1, label, 0)
    expected = (0 + (1 - 1 / (10 + 1))) / 2
    assert losses.soft_dice(sure(right_on_one), label, torch.ones(1)).item() == pytest.approx(expected, abs=1e-4)


def test_reconstruction_by_hand() -> None:
    target = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
    # Probability 3/4 of what is true, everywhere.
    logits = target * math.log(3)
    overlap, total = 4 * 0.75, 8.0
    everything = (1 - (2 * overlap + 1) / (total + 1)) + 0.25**2
    foreground = 1 - (2 * 1.5 + 1) / (4 + 1)
    value = losses.reconstruction(logits, target, foreground=False).item()
    assert value == pytest.approx(everything, rel=1e-5)
    value = losses.reconstruction(logits, target, foreground=True).item()
    assert value == pytest.approx(everything + foreground, rel=1e-5)


@pytest.mark.parametrize("foreground", [False, True])
def test_a_perfect_reconstruction_costs_nothing(foreground: bool) -> None:
    label = problem(classes=2)[1].clamp(min=0)
    target = torch.stack([label == 0, label == 1], dim=1).float()
    assert losses.reconstruction(40 * target, target, foreground=foreground) < 1e-4
    assert losses.reconstruction(40 * (1 - target), target, foreground=foreground) > 1


def test_negative_learning_by_hand() -> None:
    # Probability 3/4, 1/4 and 3/4 of class 1, which the first two are not, while the third is not class 0.
    logits = torch.tensor([[[0.0, math.log(3), 0.0, 5.0], [math.log(3), 0.0, math.log(3), -5.0]]])
    label = torch.tensor([[1, 1, 0, IGNORE]])
    expected = -(math.log(1 / 4) + math.log(3 / 4) + math.log(3 / 4)) / 3
    assert losses.negative(logits, label, torch.ones(1)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 5])
def test_unlearning_is_bounded_however_sure_the_network_is(classes: int) -> None:
    label = torch.randint(0, classes, (1, *SIZE))
    logits = (3 * sure(label, classes)).requires_grad_()
    value = losses.negative(logits, label, torch.ones(1))
    value.backward()
    assert value.isfinite() and value > 100
    assert logits.grad is not None
    assert logits.grad.abs().max() <= 1.001 / label.numel()
    # Down it goes, and stays above nothing.
    assert 0 <= losses.negative(sure((label + 1) % classes, classes), label, torch.ones(1)) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_distillation_by_hand(temperature: float) -> None:
    student, teacher = torch.randn(2, 2, 3, *SIZE)
    p, q = (logits.div(temperature).softmax(1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).flatten(1).mean(1)
    weight = torch.tensor([1.0, 0.5])
    found = losses.distillation(student, teacher, weight, temperature=temperature)
    assert torch.allclose(found, (weight * expected).mean(), rtol=1e-4)
    assert losses.distillation(teacher, teacher + 3, weight, temperature=temperature) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [(6, 7), (4, 5, 6)])
def test_a_prototype_is_the_direction_of_its_voxels(size: tuple[int, ...]) -> None:
    axes = torch.eye(4)[:3]
    label = torch.randint(0, 2, (2, *size))
    features = axes[label].movedim(-1, 1) * (1 + torch.rand(2, 1, *size))
    membership = torch.stack([label == index for index in range(3)], dim=1).float()
    found, present = losses.prototypes(features, membership)
    assert present.tolist() == [[True, True, False]] * 2
    torch.testing.assert_close(found[:, :2], axes[:2].expand(2, 2, 4))
    assert not found[:, 2].any()


def test_contrast_wants_classes_alike_with_the_teacher_and_apart_from_each_other() -> None:
    apart, weight = torch.eye(4)[:3].expand(2, 3, 4), torch.ones(2)
    present = torch.ones(2, 3, dtype=torch.bool)
    same = torch.eye(4)[:1].expand(2, 3, 4)
    assert losses.contrast(apart, apart, present, weight) < 1e-3
    assert losses.contrast(same, same, present, weight).item() == pytest.approx(math.log(3))
    assert losses.contrast(apart.roll(1, 1), apart, present, weight) > 5


def test_classes_that_are_absent_have_no_part_in_contrast() -> None:
    student, teacher = (F.normalize(torch.randn(2, 4, 6), dim=2) for _ in range(2))
    present = torch.tensor([[True, True, False, False], [True, False, False, False]])
    student.requires_grad_()
    whole = losses.contrast(student, teacher, present, torch.tensor([1.0, 3.0]), temperature=0.2)
    whole.backward()
    # As if they were not there; one class alone has nothing to be told from.
    alone = losses.contrast(student[:1, :2], teacher[:1, :2], present[:1, :2], torch.ones(1), temperature=0.2)
    assert torch.allclose(whole, alone / 2)
    assert student.grad is not None and student.grad.isfinite().all()
    assert student.grad[0, :2].any() and not student.grad[0, 2:].any() and not student.grad[1].any()
    assert losses.contrast(student, teacher, torch.zeros_like(present), torch.ones(2)) == 0
