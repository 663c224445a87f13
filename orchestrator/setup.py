"""All that can fail before a run begins, fails here."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from onelabel.cluster import runtime
from onelabel.configs.data import Source
from onelabel.configs.load import text_of
from onelabel.configs.schema import (
    AutoencoderRankerConfig,
    OracleRankerConfig,
    RunConfig,
    StageConfig,
    single_rankers,
)
from onelabel.configs.selection import TopKConfig
from onelabel.errors import ClusterError, ConfigError, DataError, OnelabelError
from onelabel.imaging import storage
from onelabel.imaging.classes import Classes, load_target
from onelabel.imaging.labels import IGNORE
from onelabel.imaging.storage import AnyPath, path_of
from onelabel.models.learners import LEARNERS
from onelabel.tasks import streams
from onelabel.tasks.cohort import Cohort, open_cohort

_RECORD = "config.yaml"
_FREE_TO_CHANGE = ("compute", "tracking", "storage", "search")


@dataclass(frozen=True)
class Cohorts:
    """The scans of a run."""

    labelled: Cohort
    unlabelled: Cohort | None
    test: Cohort | None

    @property
    def digest(self) -> str:
        """Changes when any scan or label is another one."""
        rows = [
            (row["key"], row["image"], row["label"]) for c in (self.labelled, self.unlabelled) if c for row in c.rows()
        ]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def open_cohorts(config: RunConfig, /) -> Cohorts:
    """Find all scans and check what training rests on.

    Raises
    ------
    ConfigError : as `check` does, or images painted from scans of which little is annotated.
    DataError : a source that names nothing, a labelled scan that cannot be used, or a class that none of them holds.
    """
    labelled = _open(config.data.labelled, labels=True)
    _check_labels(labelled, config)
    unlabelled = _open(config.data.unlabelled, labels=False) if config.data.unlabelled else None
    test = _open(config.data.test, labels=True) if config.data.test else None
    cohorts = Cohorts(labelled, unlabelled, test)
    check(config, cohorts)
    return cohorts


def check(config: RunConfig, cohorts: Cohorts, /) -> None:
    """Check stages against learners and scans.

    Raises
    ------
    ConfigError : k larger than the cohort, or a learner or streams that make no segmenter.
    """
    unlabelled = cohorts.unlabelled
    for stage in config.stages:
        _check_stage(stage)
        if not (stage.ranker and unlabelled):
            continue
        if isinstance(stage.select, TopKConfig) and (most := max(stage.select.k)) > len(unlabelled):
            raise ConfigError(
                f"stage '{stage.name}' selects k = {most} scans, but data.unlabelled holds {len(unlabelled)};"
                " lower select.k or give more scans"
            )
        if isinstance(stage.ranker, OracleRankerConfig) and not any(row["label"] for row in unlabelled.rows()):
            raise ConfigError(f"stage '{stage.name}' ranks by the oracle, but no scan of data.unlabelled has a mask")


def _check_stage(stage: StageConfig) -> None:
    """What a learner reads and makes is known to the learners, not to the schema."""
    learner = LEARNERS[stage.learner.type]
    if not learner.segments:
        raise ConfigError(
            f"stage '{stage.name}' has the learner '{stage.learner.type}', which does not segment images;"
            f" take {' or '.join(name for name, each in LEARNERS.items() if each.segments)}"
        )
    if set(stage.streams) != set(learner.streams):
        raise ConfigError(
            f"stage '{stage.name}' has streams named {', '.join(stage.streams) or 'nothing'}, but its learner"
            f" '{stage.learner.type}' reads {', '.join(learner.streams)}; rename them"
        )
    if any(part.type == "mask" for parts in stage.streams.values() for part in parts):
        raise ConfigError(f"stage '{stage.name}' reads a 'mask' stream, which has no images; take synthetic or real")


def _check_labels(labelled: Cohort, config: RunConfig) -> None:
    """Read all labelled scans; what the classes are is known to the settings, what is there to the files."""
    classes = Classes.of(config.data)
    voxels = np.zeros(len(classes), np.int64)
    for row in labelled.rows():
        try:
            _, target = load_target(row["image"], row["label"], classes)
        except (OnelabelError, ConnectionError) as error:
            raise DataError(f"labelled scan '{row['key']}': {error}") from None
        unknown, *known = np.bincount(target.data.ravel() - IGNORE, minlength=len(classes) + 1).tolist()
        voxels += known
        if unknown > sum(known) or row["kind"] == "scribble":
            _check_scribbles(row["key"], config)
    absent = [name for name, count in zip(classes.names, voxels, strict=True) if not count]
    if absent:
        raise DataError(
            f"no labelled scan holds '{absent[0]}' of data.classes: give one that does, or leave the class out"
        )


def _check_scribbles(key: str, config: RunConfig) -> None:
    """Images are painted from whole label maps, and only from such masks' shape can be learned."""
    for stage in config.stages:
        parts = [part for streams in stage.streams.values() for part in streams]
        rankers = single_rankers(stage.ranker)
        if any(part.of == "labelled" and part.type != "real" for part in parts):
            use = "reads it in a stream that is not real: set the stream's type to real"
        elif any(isinstance(ranker, AutoencoderRankerConfig) for ranker in rankers):
            use = "fits an autoencoder to its mask: choose another ranker"
        elif rankers and stage.expect.images:
            use = "paints images of it to learn what Dice to expect: set expect.images=0"
        else:
            continue
        raise ConfigError(f"of labelled scan '{key}' most voxels are not annotated, but stage '{stage.name}' {use}")


def needs(config: RunConfig, cohorts: Cohorts, /) -> dict[str, float]:
    """Bytes of a synthesis actor, and of a train worker's samples in flight and scans in the object store."""
    voxels = math.prod(config.grid.size)
    structures = len(config.data.names) - 1
    pool = len(cohorts.unlabelled) if cohorts.unlabelled else 0
    selected = (
        stage.select.most(pool, number) * streams.scan_bytes(voxels, probabilities=structures if stage.pseudo else 0)
        for stage in config.stages
        if stage.ranker
        for number in range(stage.rounds)
    )
    scans = len(cohorts.labelled) * streams.scan_bytes(voxels) + max(selected, default=0)
    seen = math.prod(config.grid.window)
    flying = max(max(config.compute.ahead, stage.learner.batch) for stage in config.stages)
    store = flying * streams.sample_bytes(seen) + scans
    return {"actor_bytes": streams.actor_bytes(seen), "store_bytes": store}


def outlive_job(config: RunConfig, /) -> None:
    """Refuse storage that would end with a submitted job.

    Raises
    ------
    ClusterError : what to set.
    """
    if runtime.in_job() and not (path_of(config.storage) / config.name).is_absolute():
        raise ClusterError(
            f"storage '{config.storage}' lies in the folder of a submitted job, which Ray removes after it; set"
            " storage=/FOLDER to one that all nodes mount"
        )


def open_folder(config: RunConfig, /, *, record: str = _RECORD) -> AnyPath:
    """The run's folder, made or, for the same settings, gone on with.

    Parameters
    ----------
    record : file in it that holds the settings

    Raises
    ------
    ClusterError : storage that cannot be written to, or would end with the job.
    DataError : storage of an unknown kind, or with a password.
    ConfigError : the folder holds a run of other settings, or a record that cannot be read.
    """
    folder = path_of(config.storage) / config.name
    outlive_job(config)
    recorded = folder / record
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        storage.write_text(probe, "")
        probe.unlink()
    except OSError as error:
        raise ClusterError(f"storage '{folder}' is not writable ({error.strerror}); set storage=FOLDER") from None
    if recorded.is_file():
        before, now = _recorded(recorded), config.model_dump(mode="json")
        changed = [key for key in now if key not in _FREE_TO_CHANGE and before.get(key) != now[key]]
        if changed:
            raise ConfigError(
                f"'{folder}' holds a run with another {' and '.join(changed)}; choose another name=NAME, or remove it"
            )
    storage.write_text(recorded, text_of(config))
    return folder.resolve()


def _recorded(record: AnyPath) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(record.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"'{record}' does not hold a run's settings; choose another name=NAME, or remove its folder")
    return settings


def _open(source: Source, *, labels: bool) -> Cohort:
    return open_cohort(source.path, where=source.where, label_column=source.label_column, require_labels=labels)
