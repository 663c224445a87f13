"""What the teacher hears of the student must have the right sign."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import batch, learner, samples, step, weights

from onelabel.imaging.labels import IGNORE
from onelabel.models import losses
from onelabel.models.learners import Progress
from onelabel.models.learners.reciprocal import ReciprocalLearner, adam_step

NONE = {"norm": "none"}


def subject(**changes: float) -> ReciprocalLearner:
    made = learner("reciprocal", 1, warmup=0, clip=1e9, network=NONE, **changes)
    assert isinstance(made, ReciprocalLearner)
    return made


def labelled_loss(of: ReciprocalLearner) -> float:
    given = samples(0)
    with torch.no_grad():
        return losses.cross_entropy(of.network(given.image), given.label, given.weight).item()


def told(of: ReciprocalLearner, label: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A step in which the teacher says this of the unlabelled images, which are the labelled ones."""
    monkeypatch.setattr(of, "_pseudo_label", lambda image: label)
    return of.step(dict.fromkeys(of.streams, samples(0)), Progress(0, 1))


@pytest.mark.parametrize("helps", [True, False])
def test_the_gain_is_how_far_the_loss_on_labels_fell(helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A small step, of which the first order is all, by fresh moments: there Adam moves as the gain says.
    of = subject(learning_rate=1e-5)
    truth = samples(0).label
    label = truth if helps else torch.where(truth == IGNORE, truth, 1 - truth)
    before = labelled_loss(of)
    gain = told(of, label, monkeypatch)["gain"]
    drop = before - labelled_loss(of)
    assert (gain > 0) == helps
    assert gain == pytest.approx(drop, rel=0.2)


@pytest.mark.parametrize("helps", [True, False])
def test_the_teacher_repeats_what_helped_and_takes_back_what_harmed(
    helps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without labels of its own the teacher hears nothing but the feedback.
    of = subject(feedback=1e3)
    truth = samples(0).label
    said = truth if helps else torch.where(truth == IGNORE, truth, 1 - truth)
    cost = of._cost

    def deaf(network: torch.nn.Module, given: object, label: Tensor) -> Tensor:
        mine = network is of.teacher and label is truth_of_batch
        return cost(network, given, label) * (0 if mine else 1)  # type: ignore[arg-type]

    given = dict.fromkeys(of.streams, samples(0))
    truth_of_batch = given["labelled"].label
    monkeypatch.setattr(of, "_pseudo_label", lambda image: said)
    monkeypatch.setattr(of, "_cost", deaf)
    before = of_teacher(of, said)
    of.step(given, Progress(0, 1))
    assert (of_teacher(of, said) < before) == helps


def of_teacher(of: ReciprocalLearner, label: Tensor) -> float:
    given = samples(0)
    with torch.no_grad():
        return losses.cross_entropy(of.teacher(given.image), label, given.weight).item()


def test_the_student_learns_nothing_from_labels() -> None:
    # Whatever the labels say, the student's first step is the same.
    one, two = subject(), subject()
    given = batch(one)
    other = replace(given["labelled"], label=torch.randint_like(given["labelled"].label, -1, 2))
    one.step(given, Progress(0, 5))
    two.step(given | {"labelled": other}, Progress(0, 5))
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one.teacher), weights(two.teacher))


def test_without_feedback_the_teacher_learns_from_labels_alone() -> None:
    of, plain = subject(feedback=0), learner("supervised", 1, warmup=0, clip=1e9, network=NONE, dice_weight=0)
    for index in range(3):
        given = batch(of, index)
        of.step(given, Progress(index, 5))
        plain.step({"train": given["labelled"]}, Progress(index, 5))
    torch.testing.assert_close(weights(of.teacher), weights(plain))
    assert of.predictor() is of.network


def test_adam_moves_by_what_the_last_gradient_says() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimiser = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0)
    assert adam_step(optimiser) == [None]
    parameter.grad = torch.tensor([0.5, -4.0, 1e-3])
    before = parameter.detach().clone()
    optimiser.step()
    (move,) = adam_step(optimiser)
    assert move is not None
    torch.testing.assert_close(move, before - parameter.detach())
    # Later, momentum of another direction is no part of it.
    parameter.grad = torch.tensor([-0.1, -4.0, 1e-3])
    optimiser.step()
    (move,) = adam_step(optimiser)
    assert move is not None and move[0] < 0


def test_a_student_that_cannot_step_says_nothing() -> None:
    def spoil(parameters: list[torch.nn.Parameter]) -> None:
        if parameters[0] is of.network.stem.weight:  # type: ignore[union-attr]
            parameters[0].grad[0] = float("nan")  # type: ignore[index]

    of = learner("reciprocal", 1, average=spoil)
    assert step(of, 5)["gain"] == 0
