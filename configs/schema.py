"""Every setting, its default and its rule. This page is the one home of defaults."""

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from onelabel.configs.augmentation import Base, DeformConfig, SynthesisConfig
from onelabel.configs.compute import ComputeConfig as ComputeConfig
from onelabel.configs.compute import TrackingConfig as TrackingConfig
from onelabel.configs.data import DataConfig
from onelabel.configs.learners import (
    AutoencoderConfig,
    CurriculumConfig,
    LearnerConfig,
    MetaWeightedConfig,
    ScribbleConfig,
    SupervisedConfig,
)
from onelabel.configs.searching import SearchConfig
from onelabel.configs.selection import SelectConfig, ThresholdConfig, TopKConfig
from onelabel.configs.streams import Ingredients, PseudoLabelConfig, StreamConfig, ViewsConfig


def _per_axis(value: object) -> object:
    return (value,) * 3 if isinstance(value, int | float) else value


def _as_levels(value: object) -> object:
    return (value,) if isinstance(value, int) else value


MOST_LABELS = 255

Spacing = Annotated[tuple[float, float, float], BeforeValidator(_per_axis)]
Size = Annotated[tuple[int, int, int], BeforeValidator(_per_axis)]
Levels = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(_as_levels)]
Factors = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(_per_axis)]
Channels = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class GridConfig(Base):
    """The grid on which the network works; masks are restored to each scan's own grid."""

    spacing_mm: Spacing = Field((2.0, 2.0, 2.0), description="voxel size in mm, one number or one an axis")
    size: Size = Field((96, 128, 128), description="voxels along left-right, back-front, down-up")
    patch: Size | None = Field(
        None, description="voxels that a training sample shows, and a window in prediction; null: the whole grid"
    )
    balance: Probability = Field(
        0.5, description="share of the patches around a voxel of a structure, each as often as the others"
    )

    @property
    def window(self) -> tuple[int, int, int]:
        """Voxels that the network sees at once."""
        return self.patch or self.size

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.spacing_mm) <= 0 or min(self.size) < 8:
            raise ValueError(f"spacing {self.spacing_mm} must be positive and size {self.size} at least 8 an axis")
        if min(self.window) < 4 or any(part > whole for part, whole in zip(self.window, self.size, strict=True)):
            raise ValueError(f"patch {self.patch} must be at least 4 an axis, and at most the size {self.size}")
        return self


class UNetConfig(Base):
    """A U-Net with nearest upsampling, skip connections and an optional strided stem.

    Where a run leaves `pools` and `across` open, they follow from the spacing of its grid: an axis is pooled while its
    voxels are less than twice as long as the shortest, and a 2D network works on the slices across the longest.
    """

    type: Literal["unet"] = "unet"
    dims: Literal[2, 3] = Field(3, description="2 for networks over slices, 3 for volumes")
    channels: Channels = Field((16, 32, 64, 64), description="feature channels, finest level first")
    convs: Levels = Field((1,), description="convolutions a level and direction: one number, or one a level")
    patch: int = Field(2, ge=1, description="stride of the stem: features live on a grid this much coarser")
    pools: Annotated[tuple[Factors, ...], Field(min_length=1)] | None = Field(
        None, description="strides of the stem, then of each coarser level, by axis; null: of the stem `patch`, then 2"
    )
    across: Literal[0, 1, 2] | None = Field(None, description="2D: the axis that runs from slice to slice; null: 2")
    norm: Literal["batch", "instance", "group", "none"] = Field("instance", description="normalisation of features")
    dropout: Probability = Field(0.0, description="channel dropout at the two coarsest levels")
    classes: int = Field(2, ge=2, description="output classes, background included; of a run those of `data.classes`")
    heads: int = Field(
        0,
        ge=0,
        description="coarser levels that have logits of their own, for learners of several scales; all if fewer",
    )

    @model_validator(mode="after")
    def _one_a_level(self) -> Self:
        if len(self.convs) not in (1, len(self.channels)):
            raise ValueError(f"convs {self.convs} must be one number, or {len(self.channels)}, as channels are")
        if self.pools and len(self.pools) != len(self.channels):
            raise ValueError(f"pools {self.pools} must be {len(self.channels)}, as channels are")
        return self

    @property
    def axes(self) -> tuple[int, ...]:
        """Those along which it convolves."""
        across = 2 if self.across is None else self.across
        return tuple(axis for axis in range(3) if self.dims == 3 or axis != across)

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """By how much the stem, and then each coarser level, makes voxels longer along each of `axes`."""
        if self.pools:
            return tuple(tuple(pool[axis] for axis in self.axes) for pool in self.pools)
        return tuple((factor,) * self.dims for factor in (self.patch, *[2] * (len(self.channels) - 1)))

    @property
    def divisors(self) -> tuple[int, int, int]:
        """What each axis of the grid must be a multiple of."""
        along = dict(zip(self.axes, (math.prod(each) for each in zip(*self.factors, strict=True)), strict=True))
        return along.get(0, 1), along.get(1, 1), along.get(2, 1)

    @property
    def divisor(self) -> int:
        """What suits every axis."""
        return max(self.divisors)

    def on(self, spacing_mm: tuple[float, float, float], /, *, classes: int) -> Self:
        """The network for a grid, with an output for each class."""
        across = max(range(3), key=lambda axis: (spacing_mm[axis], axis)) if self.across is None else self.across
        fitted = self.model_copy(update={"classes": classes} | ({"across": across} if self.dims == 2 else {}))
        if self.pools:
            return fitted
        pools, step = [], list(spacing_mm)
        for factor in (self.patch, *[2] * (len(self.channels) - 1)):
            finest = min(step[axis] for axis in fitted.axes)
            pools.append(tuple(factor if length < 2 * finest else 1 for length in step))
            step = [length * by for length, by in zip(step, pools[-1], strict=True)]
        wanted = fitted.model_copy(update={"pools": tuple(pools)})
        return fitted if wanted.factors == fitted.factors else wanted


class AutoencoderNetworkConfig(Base):
    """The mask autoencoder: strided convolutions to a small latent and back."""

    type: Literal["autoencoder"] = "autoencoder"
    dims: Literal[2, 3] = Field(2, description="2: slice by slice along the shortest axis; 3: the whole mask")
    pool: int = Field(
        2, ge=1, description="voxels an axis of the blocks whose mean it sees; 1: every voxel, at 8 times the cost"
    )
    size: int = Field(
        64, ge=64, description="most blocks an axis of a slice (or volume), a power of two, at which the latent has 4"
    )
    width: int = Field(32, ge=1, description="feature channels of the outer blocks")
    latent: int = Field(100, ge=1, description="channels of the latent")
    dropout: Probability = Field(0.5, description="dropout after every block")
    classes: int = Field(2, ge=2, description="mask classes, background included; of a run those of `data.classes`")

    @property
    def edge(self) -> int:
        """Voxels of the largest grid that it sees as a whole."""
        return self.size * self.pool

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.size & (self.size - 1):
            raise ValueError(f"size {self.size} must be a power of two, such as 128 or 256")
        return self


NetworkConfig = Annotated[UNetConfig | AutoencoderNetworkConfig, Field(discriminator="type")]


class AutoencoderRankerConfig(Base):
    """Dice between a mask and its reconstruction by an autoencoder fitted on the labelled masks."""

    type: Literal["autoencoder"] = "autoencoder"
    network: AutoencoderNetworkConfig = Field(AutoencoderNetworkConfig(), description="the autoencoder")
    learner: AutoencoderConfig = Field(AutoencoderConfig(), description="how it is fitted")
    steps: int = Field(1500, ge=1, description="optimiser steps")
    deform: DeformConfig = Field(
        DeformConfig(rotate_deg=30, scale=(0.7, 1.4), shear=0, translate_mm=8, warp_mm=(0, 0), flip=0.5),
        description="augmentation of the masks",
    )


class ConsistencyRankerConfig(ViewsConfig):
    """Dice between the masks of several views of a scan and their majority (arXiv 2308.10727)."""

    type: Literal["consistency"] = "consistency"


class ConfidenceRankerConfig(Base):
    """One less the mean entropy of the predicted probabilities, in and around the structure."""

    type: Literal["confidence"] = "confidence"
    of: Literal["prediction", "views", "dropout"] = Field(
        "prediction", description="the prediction alone, or the mean over views, or over passes with dropout"
    )
    dilate: int = Field(2, ge=0, description="voxels by which the structure is widened")
    views: ViewsConfig = Field(ViewsConfig(), description="views, and the number of passes with dropout too")


class PosteriorRankerConfig(ViewsConfig):
    """Soft Dice between a mask and the network's mean probability over views."""

    type: Literal["posterior"] = "posterior"


SingleRankerConfig = Annotated[
    AutoencoderRankerConfig | ConsistencyRankerConfig | ConfidenceRankerConfig | PosteriorRankerConfig,
    Field(discriminator="type"),
]


class FusedRankerConfig(Base):
    """Mean of the ranks that several rankers give: 1 for the best of the cohort, 0 for the worst."""

    type: Literal["fused"] = "fused"
    rankers: tuple[SingleRankerConfig, ...] = Field(min_length=2, description="the rankers")
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, description="one each; null: equal")

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.rankers):
            raise ValueError(f"{len(self.weights)} weights for {len(self.rankers)} rankers: give one each")
        return self


class RandomRankerConfig(Base):
    """Chance, as a study's lower bound."""

    type: Literal["random"] = "random"


class OracleRankerConfig(Base):
    """The Dice with the true mask, as a study's upper bound; scans without a mask get no score."""

    type: Literal["oracle"] = "oracle"


RankerConfig = Annotated[
    AutoencoderRankerConfig
    | ConsistencyRankerConfig
    | ConfidenceRankerConfig
    | PosteriorRankerConfig
    | FusedRankerConfig
    | RandomRankerConfig
    | OracleRankerConfig,
    Field(discriminator="type"),
]


def single_rankers(config: RankerConfig | None, /) -> tuple[SingleRankerConfig, ...]:
    """The rankers that look at each scan by itself."""
    if config is None or isinstance(config, RandomRankerConfig | OracleRankerConfig):
        return ()
    return config.rankers if isinstance(config, FusedRankerConfig) else (config,)


class ExpectConfig(Base):
    """The Dice to expect of a mask, learned from the network's masks of synthetic images, whose truth is known."""

    images: int = Field(48, ge=0, description="synthetic images, made as for training; 0: no expected Dice")
    bad: Probability = Field(0.9, description="a mask whose expected Dice is lower is flagged")


class StageConfig(Base):
    """Some rounds of one recipe."""

    name: str = Field(pattern=r"^[\w-]+$", description="shown in logs, MLflow and `status`")
    rounds: int = Field(1, ge=1, description="how often the recipe is repeated")
    steps: int = Field(ge=1, description="optimiser steps a round")
    start: Literal["scratch", "previous"] = Field("previous", description="initial weights")
    learner: LearnerConfig = Field(SupervisedConfig(), description="the method")
    streams: dict[str, Ingredients] = Field(description="what the learner reads, by its stream names")
    ranker: RankerConfig | None = Field(None, description="scores the cohort's masks; null: no scoring")
    expect: ExpectConfig = Field(ExpectConfig(), description="from scores to the Dice to expect")
    select: SelectConfig = Field(TopKConfig(), description="which scored masks the next round learns from")
    pseudo: PseudoLabelConfig | None = Field(
        None, description="what the next round's labels are made from; null: the masks as they are"
    )

    @model_validator(mode="after")
    def _expected(self) -> Self:
        if isinstance(self.select, ThresholdConfig) and not (single_rankers(self.ranker) and self.expect.images):
            raise ValueError(
                f"stage '{self.name}' selects by expected Dice: it needs a ranker that looks at masks and expect.images"
                " above 0"
            )
        return self

    @model_validator(mode="after")
    def _labels(self) -> Self:
        if self.pseudo and not self.ranker:
            raise ValueError(f"stage '{self.name}' sets pseudo, but has no ranker: nothing is learned from its masks")
        single = single_rankers(self.ranker)
        if self.pseudo and self.pseudo.project and not any(isinstance(one, AutoencoderRankerConfig) for one in single):
            raise ValueError(f"stage '{self.name}' sets pseudo.project: it needs a ranker of type autoencoder")
        if any(s.of != "selected" for s in self.graded):
            raise ValueError(f"stage '{self.name}' sets soft or ignore: only streams of selected scans may")
        return self

    @property
    def graded(self) -> list[StreamConfig]:
        """The streams that read probabilities."""
        return [s for streams in self.streams.values() for s in streams if s.soft or s.ignore]


class RunConfig(Base):
    """One run."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="folder of the run under `storage`")
    seed: int = Field(0, ge=0, description="seed of everything random")
    storage: str = Field("runs", description="folder of all runs: a path, or a URI such as s3://bucket/runs")
    data: DataConfig = Field(description="the scans")
    grid: GridConfig = Field(GridConfig(), description="the network's grid")
    synthesis: SynthesisConfig = Field(SynthesisConfig(), description="how label maps become images")
    network: UNetConfig = Field(UNetConfig(), description="the segmentation network")
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="the strategy")
    compute: ComputeConfig = Field(ComputeConfig(), description="machines")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    search: SearchConfig | None = Field(None, description="what `onelabel search` varies")

    @property
    def segmenter(self) -> UNetConfig:
        """The segmentation network for the grid, with an output for each class."""
        return self.network.on(self.grid.spacing_mm, classes=len(self.data.names))

    @model_validator(mode="after")
    def _seen(self) -> Self:
        for one in (one for stage in self.stages for one in single_rankers(stage.ranker)):
            if isinstance(one, AutoencoderRankerConfig) and max(self.grid.size) > one.network.edge:
                raise ValueError(
                    f"grid.size {self.grid.size} exceeds the {one.network.edge} voxels that the ranker's autoencoder"
                    " sees: double ranker.network.size or ranker.network.pool"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        network, size = self.segmenter, self.grid.window
        named = "grid.patch" if self.grid.patch else "grid.size"
        divisors = network.divisors
        words = str(divisors[0] if len(set(divisors)) == 1 else divisors)
        if any(n % divisor for n, divisor in zip(size, divisors, strict=True)):
            raise ValueError(f"{named} {size} must be multiples of {words} for this network")
        if all(size[axis] == divisors[axis] for axis in network.axes) and network.norm in ("batch", "instance"):
            raise ValueError(f"{named} {size} leaves one voxel to normalise: some axis must exceed {words}")
        if self.network.classes not in (UNetConfig().classes, network.classes):
            raise ValueError(
                f"network.classes {self.network.classes} are not the {network.classes} of data.classes: leave them out"
            )
        bins = self.synthesis.bins
        labels = 1 + bins.background[1] + bins.foreground[1] * (len(self.data.names) - 1)
        if labels > MOST_LABELS:
            raise ValueError(f"synthesis.bins make up to {labels} labels, more than {MOST_LABELS}; ask for fewer bins")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages must have different names, not {names}")
        return self

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        for stage in self.stages:
            if isinstance(stage.learner, MetaWeightedConfig) and self.compute.compile:
                raise ValueError(
                    f"stage '{stage.name}' differentiates forwards, which compute.compile cannot: turn it off"
                )
            if isinstance(stage.learner, ScribbleConfig) and self.compute.compile:
                raise ValueError(
                    f"stage '{stage.name}' looks into the network, which compute.compile cannot speed up: turn it off"
                )
            if (
                isinstance(stage.learner, CurriculumConfig)
                and stage.learner.of == "dropout"
                and not self.network.dropout
            ):
                raise ValueError(f"stage '{stage.name}' learns by passes with dropout: set network.dropout above 0")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        selected: StageConfig | None = None
        dropout = self.network.dropout
        for i, stage in enumerate(self.stages):
            if i == 0 and stage.start == "previous":
                raise ValueError(f"stage '{stage.name}' is the first and must start from scratch")
            reads = any(s.of == "selected" for streams in stage.streams.values() for s in streams)
            if reads and not selected:
                raise ValueError(f"stage '{stage.name}' reads 'selected' scans, but no stage before it has a ranker")
            if stage.ranker and self.data.unlabelled is None:
                raise ValueError(f"stage '{stage.name}' ranks, so data.unlabelled must name a cohort")
            confident = [one for one in single_rankers(stage.ranker) if isinstance(one, ConfidenceRankerConfig)]
            if not dropout and any(one.of == "dropout" for one in confident):
                raise ValueError(f"stage '{stage.name}' ranks by passes with dropout: set network.dropout above 0")
            before, selected = selected, stage if stage.ranker else selected
            hard = [one.name for one in (before, selected if stage.rounds > 1 else None) if one and not one.pseudo]
            if stage.graded and hard:
                raise ValueError(f"stage '{stage.name}' sets soft or ignore: stage '{hard[0]}' must set pseudo for it")
        return self
