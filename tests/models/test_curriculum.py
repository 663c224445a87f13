"""What is learned, unlearned and left alone."""

import math

import pytest
import torch
from torch import Tensor
from toys import batch, learner

from onelabel.configs.load import load
from onelabel.errors import ConfigError
from onelabel.imaging.labels import IGNORE
from onelabel.models.learners import Progress
from onelabel.models.learners.curriculum import CurriculumLearner, agreed, decided
from onelabel.models.rankers.confidence import certainty


def voxels(*rows: tuple[float, ...]) -> Tensor:
    """Probabilities (1, C, n) of n voxels."""
    return torch.tensor(rows).T.unsqueeze(0)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_confidence_goes_from_0_to_1(classes: int) -> None:
    equal, sure = torch.full((1, classes, 4), 1 / classes), torch.eye(classes)[:1].unsqueeze(2)
    assert certainty(equal) == pytest.approx(0, abs=1e-6)
    assert certainty(sure).item() == 1
    between = torch.randn(2, classes, 30).softmax(1)
    assert ((certainty(between) > 0) & (certainty(between) < 1)).all()


def test_teacher_and_student_agree_by_hand() -> None:
    sure, fair, doubt = (0.99, 0.005, 0.005), (0.7, 0.2, 0.1), (0.4, 0.35, 0.25)
    other_sure, other_fair = (0.005, 0.99, 0.005), (0.2, 0.7, 0.1)
    taught = voxels(sure, sure, doubt, fair, doubt)
    said = voxels(doubt, other_fair, other_sure, other_fair, sure)
    label, confidence = agreed(taught, said, margin=0.2)
    # Alike; the teacher is surer; the student is surer; neither; alike, and the teacher's doubt stands.
    assert label.tolist() == [[0, 0, 1, IGNORE, 0]]
    entropy = [-sum(p * math.log2(p) for p in each) for each in (sure, sure, other_sure, fair, doubt)]
    assert confidence[0].tolist() == pytest.approx([1 - each for each in entropy], abs=1e-5)


def test_a_voxel_between_two_classes_is_in_doubt_however_many_there_are() -> None:
    taught = voxels((0.5, 0.5, 0, 0, 0), (0.7, 0.3, 0, 0, 0), (0.99, 0.01, 0, 0, 0))
    two = voxels((0.5, 0.5), (0.7, 0.3), (0.99, 0.01))
    assert torch.allclose(decided(taught), decided(two), atol=1e-6)
    assert torch.allclose(decided(two), certainty(two), atol=1e-6)
    assert decided(taught)[0, 0].item() == pytest.approx(0, abs=1e-6)


def test_without_a_margin_all_voxels_but_ties_have_a_label() -> None:
    taught, said = torch.randn(2, 2, 4, 500).softmax(2)
    label, _ = agreed(taught, said, margin=0.0)
    assert (label != IGNORE).all()
    assert (agreed(taught, said, margin=2.0)[0] == torch.where(taught.argmax(1) == said.argmax(1), label, IGNORE)).all()


def test_thresholds_part_what_is_learned_from_what_is_unlearned() -> None:
    shares = []
    for learn, unlearn in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0)):
        subject = learner("curriculum", 1, ramp=(0, 0), learn=learn, unlearn=unlearn, margin=0)
        row = subject.step(batch(subject), Progress(0, 5))
        shares.append((row["sure_share"], row["doubtful_share"]))
        assert row["unlearn_loss"] >= 0
    assert shares == [(1, 0), (0, 1), (0, 0)]


def test_passes_with_dropout_differ_and_views_do_not() -> None:
    image = batch(learner("curriculum"))["unlabelled"].image
    for of, random in (("dropout", True), ("views", False)):
        subject = learner("curriculum", 1, of=of, views={"passes": 2}, network={"dropout": 0.5})
        assert isinstance(subject, CurriculumLearner)
        one, two = subject._taught(image), subject._taught(image)
        assert one.sum(1) == pytest.approx(1, abs=1e-5)
        assert torch.equal(one, two) != random


def test_dropout_must_be_there_to_be_used() -> None:
    items = ["supervised", "data.labelled=a.nii.gz", "stages.0.learner={type: curriculum, of: dropout}"]
    with pytest.raises(ConfigError, match="set network.dropout above 0"):
        load(items)
    assert load([*items, "network.dropout=0.1"]).stages[0].learner.type == "curriculum"
    with pytest.raises(ConfigError, match="unlearn 0.95 must not exceed learn 0.9"):
        load([*items, "network.dropout=0.1", "stages.0.learner.unlearn=0.95"])
