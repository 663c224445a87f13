"""Every setting, its default and its rule. This page is the one home of defaults."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from onelabel.configs.augmentation import Base, DeformConfig, SynthesisConfig
from onelabel.configs.searching import SearchConfig
from onelabel.configs.selection import SelectConfig, ThresholdConfig, TopKConfig
from onelabel.configs.streams import Ingredients, PseudoLabelConfig, StreamConfig, ViewsConfig


def _per_axis(value: object) -> object:
    return (value,) * 3 if isinstance(value, int | float) else value


def _as_source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _as_levels(value: object) -> object:
    return (value,) if isinstance(value, int) else value


MOST_LABELS = 255

Spacing = Annotated[tuple[float, float, float], BeforeValidator(_per_axis)]
Size = Annotated[tuple[int, int, int], BeforeValidator(_per_axis)]
Levels = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(_as_levels)]
Channels = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class SourceConfig(Base):
    """Where scans come from; a plain string is short for `path`."""

    path: str = Field(description="a manifest (CSV, TSV, Parquet), a folder, a glob, one file or a BIDS dataset")
    where: dict[str, str] = Field({}, description="keep the manifest's rows whose columns equal these values")
    label_column: str | None = Field(None, description="the manifest's column with label files, if not `label`")


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]


class DataConfig(Base):
    """The scans."""

    labelled: Source = Field(description="the scan (or scans) with a mask; all that is learned starts here")
    unlabelled: Source | None = Field(None, description="the cohort to label; masks in it only judge, never train")
    test: Source | None = Field(None, description="scans with masks on which every round is judged")


class GridConfig(Base):
    """The grid on which the network works; masks are restored to each scan's own grid."""

    spacing_mm: Spacing = Field((2.0, 2.0, 2.0), description="voxel size in mm, one number or one an axis")
    size: Size = Field((96, 128, 128), description="voxels along left-right, back-front, down-up")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.spacing_mm) <= 0 or min(self.size) < 8:
            raise ValueError(f"spacing {self.spacing_mm} must be positive and size {self.size} at least 8 an axis")
        return self


class UNetConfig(Base):
    """A U-Net with nearest upsampling, skip connections and an optional strided stem."""

    type: Literal["unet"] = "unet"
    dims: Literal[2, 3] = Field(3, description="2 for networks over slices, 3 for volumes")
    channels: Channels = Field((16, 32, 64, 64), description="feature channels, finest level first")
    convs: Levels = Field((1,), description="convolutions a level and direction: one number, or one a level")
    patch: int = Field(2, ge=1, description="stride of the stem: features live on a grid this much coarser")
    norm: Literal["batch", "instance", "group", "none"] = Field("instance", description="normalisation of features")
    dropout: Probability = Field(0.0, description="channel dropout at the two coarsest levels")
    classes: int = Field(2, ge=2, description="output classes, background included")

    @model_validator(mode="after")
    def _one_a_level(self) -> Self:
        if len(self.convs) not in (1, len(self.channels)):
            raise ValueError(f"convs {self.convs} must be one number, or {len(self.channels)}, as channels are")
        return self

    @property
    def divisor(self) -> int:
        """What every axis of the grid must be a multiple of."""
        return int(self.patch * 2 ** (len(self.channels) - 1))


class AutoencoderNetworkConfig(Base):
    """The mask autoencoder: strided convolutions to a small latent and back."""

    type: Literal["autoencoder"] = "autoencoder"
    dims: Literal[2, 3] = Field(2, description="2: slice by slice along the shortest axis; 3: the whole mask")
    pool: int = Field(
        2, ge=1, description="voxels an axis of the blocks whose mean it sees; 1: every voxel, at 8 times the cost"
    )
    size: int = Field(
        64, ge=64, description="edge to which slices (or volumes) of blocks are padded or cropped, a power of two"
    )
    width: int = Field(32, ge=1, description="feature channels of the outer blocks")
    latent: int = Field(100, ge=1, description="channels of the latent")
    dropout: Probability = Field(0.5, description="dropout after every block")
    classes: int = Field(2, ge=2, description="mask classes, background included")

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


LearnerConfig = Annotated[SupervisedConfig | AutoencoderConfig, Field(discriminator="type")]


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


class ComputeConfig(Base):
    """Machines, and what each kind of work takes of them."""

    address: str | None = Field(None, description="a Ray cluster to join; null: the one around, else a local one")
    train_workers: int = Field(1, ge=1, description="data-parallel train workers")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs a train worker; 0: CPU")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs a train worker")
    threads: int | None = Field(None, ge=1, description="threads a train worker; null: as many as its CPUs")
    synth_actors: int = Field(1, ge=1, description="synthesis actors a train worker")
    synth_cpus: float = Field(1, gt=0, description="CPUs a synthesis actor; a share where cores are few")
    synth_gpus: float = Field(0, ge=0, description="share of a GPU a synthesis actor")
    ahead: int = Field(6, ge=1, description="samples in flight a train worker")
    score_actors: int = Field(2, ge=1, description="scoring actors")
    score_gpus: float = Field(0, ge=0, description="share of a GPU a scoring actor")
    precision: Literal["auto", "bf16", "float32"] = Field("auto", description="auto: bf16 where the hardware has it")
    compile: bool = Field(False, description="torch.compile the network; takes a minute, and a C++ compiler on a CPU")
    channels_last: bool = Field(False, description="channels-last memory format in training")
    checkpoint_every_s: float = Field(120, ge=0, description="seconds between checkpoints in training")
    wait_s: float = Field(60, ge=0, description="how long to wait for resources that an autoscaler may still add")


class TrackingConfig(Base):
    """MLflow."""

    uri: str | None = Field(None, description="tracking URI; null: sqlite in the folder of the run")
    experiment: str = Field("onelabel", description="MLflow experiment")
    parent: str | None = Field(None, description="id of an MLflow run under which this one stands")
    every: int = Field(20, ge=1, description="steps between logged losses")


class RunConfig(Base):
    """One run."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="folder of the run under `storage`")
    seed: int = Field(0, ge=0, description="seed of everything random")
    storage: str = Field("runs", description="folder of all runs")
    data: DataConfig = Field(description="the scans")
    grid: GridConfig = Field(GridConfig(), description="the network's grid")
    synthesis: SynthesisConfig = Field(SynthesisConfig(), description="how label maps become images")
    network: UNetConfig = Field(UNetConfig(), description="the segmentation network")
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="the strategy")
    compute: ComputeConfig = Field(ComputeConfig(), description="machines")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    search: SearchConfig | None = Field(None, description="what `onelabel search` varies")

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
        divisor = self.network.divisor
        if any(n % divisor for n in self.grid.size):
            raise ValueError(f"grid.size {self.grid.size} must be multiples of {divisor} for this network")
        if all(n == divisor for n in self.grid.size) and self.network.norm in ("batch", "instance"):
            raise ValueError(
                f"grid.size {self.grid.size} leaves one voxel to normalise: some axis must exceed {divisor}"
            )
        bins = self.synthesis.bins
        labels = 1 + bins.background[1] + bins.foreground[1] * (self.network.classes - 1)
        if labels > MOST_LABELS:
            raise ValueError(f"synthesis.bins make up to {labels} labels, more than {MOST_LABELS}; ask for fewer bins")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages must have different names, not {names}")
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
