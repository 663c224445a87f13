"""Learners, by the `type` of their config."""

from onelabel.models.learners.autoencoder import AutoencoderLearner
from onelabel.models.learners.base import Learner, Progress, Samples
from onelabel.models.learners.curriculum import CurriculumLearner
from onelabel.models.learners.meta_weighted import MetaWeightedLearner
from onelabel.models.learners.reciprocal import ReciprocalLearner
from onelabel.models.learners.scribble import ScribbleLearner
from onelabel.models.learners.supervised import SupervisedLearner

LEARNERS: dict[str, type[Learner]] = {
    "supervised": SupervisedLearner,
    "autoencoder": AutoencoderLearner,
    "reciprocal": ReciprocalLearner,
    "curriculum": CurriculumLearner,
    "meta_weighted": MetaWeightedLearner,
    "scribble": ScribbleLearner,
}

__all__ = ["LEARNERS", "Learner", "Progress", "Samples"]
