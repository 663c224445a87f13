"""Learners, by the `type` of their config."""

from onelabel.models.learners.autoencoder import AutoencoderLearner
from onelabel.models.learners.base import Learner, Progress, Samples
from onelabel.models.learners.supervised import SupervisedLearner

LEARNERS: dict[str, type[Learner]] = {"supervised": SupervisedLearner, "autoencoder": AutoencoderLearner}

__all__ = ["LEARNERS", "Learner", "Progress", "Samples"]
