"""Settings of machines and of the log."""

from typing import Literal, Self

from pydantic import Field, model_validator

from onelabel.configs.augmentation import Base


class ComputeConfig(Base):
    """Machines, and what each kind of work takes of them."""

    address: str | None = Field(None, description="a Ray cluster to join; null: the one around, else a local one")
    train_workers: int = Field(1, ge=1, description="data-parallel train workers")
    min_train_workers: int | None = Field(
        None, ge=1, description="train workers that suffice while nodes are lost or yet to come; null: all of them"
    )
    max_failures: int = Field(
        3, ge=0, description="how often a fit goes on after it lost a train worker; preempted nodes do not count"
    )
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
    wait_s: float = Field(
        0, ge=0, description="how long, before anything is done, nodes may be added to a cluster that is too small"
    )

    @model_validator(mode="after")
    def _elastic(self) -> Self:
        if (self.min_train_workers or 1) > self.train_workers:
            raise ValueError(f"min_train_workers {self.min_train_workers} must be at most train_workers")
        if self.min_train_workers and self.synth_gpus:
            raise ValueError("min_train_workers needs synth_gpus 0: elastic workers paint on the CPUs of their node")
        return self


class TrackingConfig(Base):
    """MLflow."""

    uri: str | None = Field(
        None,
        description="tracking URI; null: sqlite in the folder of the run, or for one in an object store below ./mlruns",
    )
    experiment: str = Field("onelabel", description="MLflow experiment")
    parent: str | None = Field(None, description="id of an MLflow run under which this one stands")
    every: int = Field(20, ge=1, description="steps between logged losses")
