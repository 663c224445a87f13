"""What scribbles, the teacher and the contrast of classes do."""

from dataclasses import replace

import pytest
import torch
from toys import batch, learner, samples

from onelabel.imaging.labels import IGNORE
from onelabel.models.learners import Progress
from onelabel.models.learners.scribble import membership

UNTIL_END = {"ramp": (1.0, 1.0)}


def test_the_partial_cross_entropy_is_that_of_the_scribbles_by_hand() -> None:
    subject = learner("scribble", 1, network={"heads": 0}, **UNTIL_END)
    given = samples()
    few = torch.full_like(given.label, IGNORE)
    few[:, 8, 8], few[:, 2, 2] = given.label[:, 8, 8], given.label[:, 2, 2]
    said = subject.logits(given.image).detach().log_softmax(1)
    cost = [-said[i, few[i, x, y].long(), x, y, range(16)] for i in (0, 1) for x, y in ((8, 8), (2, 2))]
    expected = sum(w * torch.cat(cost[2 * i : 2 * i + 2]).mean() for i, w in enumerate(given.weight)) / 2
    row = subject.step({"train": replace(given, label=few)}, Progress(0, 10))
    assert row["partial"] == pytest.approx(float(expected), rel=1e-5)
    assert row["loss"] == pytest.approx(row["partial"])  # the teacher says nothing yet


def test_before_the_first_step_teacher_and_student_say_the_same() -> None:
    subject = learner("scribble", 1)
    row = subject.step(batch(subject), Progress(0, 10))
    assert row["distillation"] == pytest.approx(0, abs=1e-5)
    row = subject.step(batch(subject, 1), Progress(1, 10))
    assert row["distillation"] == pytest.approx(0, abs=1e-5)  # the first mean is of one
    row = subject.step(batch(subject, 2), Progress(2, 10))
    assert row["distillation"] > 1e-5


def test_every_scale_learns() -> None:
    subject = learner("scribble", 1, network={"heads": 2, "channels": (8, 8, 8)})
    before = {name: p.detach().clone() for name, p in subject.network.named_parameters()}
    subject.step(batch(subject), Progress(9, 10))
    still = [name for name, p in subject.network.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    assert sum(name.startswith("heads") for name in before) == 4


def test_a_voxel_counts_for_its_scribble_or_for_what_is_sure() -> None:
    probability = torch.tensor([[0.1, 0.8, 0.1], [0.95, 0.03, 0.02], [0.2, 0.2, 0.6], [0.05, 0.92, 0.03]]).T[None]
    label = torch.tensor([[2, IGNORE, IGNORE, 0]])
    found = membership(probability, label, sure=0.9)[0].T
    assert found.tolist() == [[0, 0, 1], [pytest.approx(0.95), 0, 0], [0, 0, 0], [1, 0, 0]]


def test_the_contrast_of_one_class_is_nothing() -> None:
    subject = learner("scribble", 1, ramp=(0, 0))
    given = samples()
    alone = replace(given, label=torch.zeros_like(given.label))
    assert subject.step({"train": alone}, Progress(0, 10))["contrast"] == 0
    both = learner("scribble", 1, ramp=(0, 0)).step({"train": given}, Progress(0, 10))
    assert both["contrast"] > 0
