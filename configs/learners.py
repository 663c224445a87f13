"""Settings of the methods that networks learn by."""

from typing import Literal

from pydantic import Field

from onelabel.configs.augmentation import Base, Probability


class OptimiserConfig(Base):
    """Adam with warm-up and cosine decay; what all learners share."""

    learning_rate: float = Field(1e-3, gt=0, description="the peak of the schedule")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW)")
    warmup: Probability = Field(0.02, description="share of the steps spent warming up")
    final: Probability = Field(0.01, description="learning rate at the end, as a share of the peak")
    clip: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    batch: int = Field(1, ge=1, description="samples a step and train worker")
    accumulate: int = Field(1, ge=1, description="batches a step whose gradients are averaged, where memory is short")
    ema: float = Field(0.0, ge=0, lt=1, description="decay a step of the mean of weights that is deployed; 0: no mean")


class SupervisedConfig(OptimiserConfig):
    """Soft Dice and cross-entropy against given labels."""

    type: Literal["supervised"] = "supervised"
    dice_weight: float = Field(1.0, ge=0, description="weight of the soft Dice loss")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")


class AutoencoderConfig(OptimiserConfig):
    """Reconstruct augmented masks: Dice plus mean squared error, foreground Dice at first."""

    type: Literal["autoencoder"] = "autoencoder"
    weight_decay: float = Field(1e-5, ge=0, description="decoupled weight decay (AdamW)")
    final: Probability = Field(0.1, description="learning rate at the end, as a share of the peak")
    slices: int = Field(16, ge=1, description="slices a step, drawn from the sample's mask (2D)")
    foreground_share: Probability = Field(0.1, description="share of the steps with the foreground Dice added")


class ReciprocalConfig(OptimiserConfig):
    """A student that learns from a teacher's pseudo-labels, a teacher that learns from labels and their effect."""

    type: Literal["reciprocal"] = "reciprocal"
    feedback: float = Field(
        1.0, ge=0, description="weight of the teacher's loss on its own pseudo-labels; 0: labels alone"
    )
