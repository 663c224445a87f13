"""Settings of machines and of the log."""

from typing import Literal

from pydantic import Field

from onelabel.configs.augmentation import Base


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

    uri: str | None = Field(
        None,
        description="tracking URI; null: sqlite in the folder of the run, or for one in an object store below ./mlruns",
    )
    experiment: str = Field("onelabel", description="MLflow experiment")
    parent: str | None = Field(None, description="id of an MLflow run under which this one stands")
    every: int = Field(20, ge=1, description="steps between logged losses")
