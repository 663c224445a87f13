"""Learn from labels: given ones, synthetic ones, pseudo-labels."""

from collections.abc import Mapping

from onelabel.configs.learners import SupervisedConfig
from onelabel.models import losses
from onelabel.models.learners.base import Learner, Progress, Samples


class SupervisedLearner(Learner):
    """Soft Dice plus cross-entropy."""

    base: SupervisedConfig

    def step(self, batch: Mapping[str, Samples], progress: Progress) -> dict[str, float]:
        """Learn from the stream `train`."""
        samples = batch["train"]
        logits = self.logits(samples.image)
        dice = losses.soft_dice(logits, samples.label, samples.weight)
        entropy = losses.cross_entropy(logits, samples.label, samples.weight)
        logged = self.descend(self.base.dice_weight * dice + self.base.ce_weight * entropy, progress)
        return logged | {"dice_loss": dice.item(), "cross_entropy": entropy.item()}
