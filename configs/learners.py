"""Settings of the methods that networks learn by."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onelabel.configs.augmentation import Base, Probability, Range, Shares
from onelabel.configs.streams import ViewsConfig


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


class CurriculumConfig(OptimiserConfig):
    """A student that learns what its mean of weights, the teacher, is sure of, and unlearns what that doubts."""

    type: Literal["curriculum"] = "curriculum"
    ema: float = Field(0.99, gt=0, lt=1, description="decay a step of the teacher, the mean of weights; it is deployed")
    of: Literal["views", "dropout"] = Field(
        "views", description="the teacher's uncertainty: over views of the image, or over passes with dropout"
    )
    views: ViewsConfig = Field(ViewsConfig(passes=4), description="views, and the number of passes with dropout too")
    learn: Probability = Field(
        0.9, description="least confidence, one less the entropy, of voxels that are learned from"
    )
    unlearn: Probability = Field(0.1, description="confidence below which the pseudo-label is unlearned")
    margin: Probability = Field(
        0.2, description="where student and teacher disagree, the surer one is right if it is so by this much"
    )
    unlabelled_weight: float = Field(1.0, ge=0, description="weight of the losses on unlabelled scans, once ramped up")
    unlearn_weight: float = Field(0.1, ge=0, description="weight of unlearning, relative to learning")
    ramp: Shares = Field((0.0, 0.3), description="shares of the steps between which unlabelled scans gain their weight")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.unlearn > self.learn:
            raise ValueError(f"unlearn {self.unlearn} must not exceed learn {self.learn}: no voxel is in both")
        return self


class MetaWeightedConfig(OptimiserConfig):
    """Two label sets, every voxel of which weighs what learning from it does for labelled scans."""

    type: Literal["meta_weighted"] = "meta_weighted"
    clip: float = Field(0.2, gt=0, description="gradients are clipped to this norm")
    ema: float = Field(0.99, gt=0, lt=1, description="decay a step of the teacher, the mean of weights; it is deployed")
    zoom: Range = Field((1.05, 1.4), description="range of the factors by which views are larger, or smaller")
    zoomed_in: int = Field(1, ge=0, description="views that are larger than the image")
    zoomed_out: int = Field(2, ge=0, description="views that are smaller than the image")
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = Field(
        (0,), description="axes of which one more view mirrors some; 0: left-right; none: no such view"
    )
    noise: float = Field(0.02, ge=0, description="standard deviation of the noise on what the teacher sees")
    consistency_weight: float = Field(1.0, ge=0, description="weight of the difference between views")
    teacher_weight: float = Field(1.0, ge=0, description="weight of the difference from the teacher")

    @model_validator(mode="after")
    def _larger(self) -> Self:
        if self.zoom[0] < 1:
            raise ValueError(f"zoom {self.zoom} must start at 1 or above: smaller views zoom by one over it")
        return self


class ScribbleConfig(OptimiserConfig):
    """Scribbles, a mean teacher at several scales, and features that tell classes apart."""

    type: Literal["scribble"] = "scribble"
    ema: float = Field(0.99, gt=0, lt=1, description="decay a step of the teacher, the mean of weights; it is deployed")
    temperature: float = Field(10.0, gt=0, description="of the classes that the teacher hands on; sweep 2, 5, 10")
    distil_weight: float = Field(0.1, ge=0, description="weight of distillation, once ramped up")
    contrast_weight: float = Field(0.1, ge=0, description="weight of the contrast between classes, once ramped up")
    contrast_temperature: float = Field(0.1, gt=0, description="of the likeness of features")
    sure: Probability = Field(
        0.9, description="teacher's probability from which an unlabelled voxel counts for its class's mean feature"
    )
    ramp: Shares = Field((0.1, 0.75), description="shares of the steps between which the teacher gains its weight")


LearnerConfig = Annotated[
    SupervisedConfig | AutoencoderConfig | ReciprocalConfig | CurriculumConfig | MetaWeightedConfig | ScribbleConfig,
    Field(discriminator="type"),
]
