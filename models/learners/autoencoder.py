"""Learn what masks look like (SingleStrip, arXiv 2508.10464, step 2)."""

from collections.abc import Mapping

import torch

from onelabel.configs.learners import AutoencoderConfig
from onelabel.models import losses
from onelabel.models.learners.base import Learner, Progress, Samples
from onelabel.models.networks.autoencoder import Autoencoder, views


class AutoencoderLearner(Learner):
    """Reconstruct augmented masks: input and target are the same."""

    segments = False
    base: AutoencoderConfig
    network: Autoencoder

    def step(self, batch: Mapping[str, Samples], progress: Progress) -> dict[str, float]:
        """Learn from slices (or the whole) of the masks in the stream `train`."""
        shape = self.network.config
        target = torch.cat([views(mask, shape) for mask in batch["train"].label])
        if shape.dims == 2:
            target = target[torch.randperm(len(target))[: self.base.slices].to(target.device)]
        early = progress.step < self.base.foreground_share * progress.steps
        return self.descend(losses.reconstruction(self.logits(target), target, foreground=early), progress)
