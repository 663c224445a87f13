"""The trials of a search: what each one sets, what it shares with others, and how it is brought to its end."""

import fcntl
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Domain

from onelabel.configs.load import change
from onelabel.configs.schema import ExpectConfig, RunConfig, StageConfig, single_rankers
from onelabel.configs.searching import ChoicesConfig, Dimension, IntegersConfig, LogUniformConfig
from onelabel.configs.selection import TopKConfig
from onelabel.errors import ConfigError, OnelabelError, sentence
from onelabel.imaging.random import derive
from onelabel.orchestrator import driver
from onelabel.orchestrator.page import NAME
from onelabel.orchestrator.rounds import MARKER, plan

Point = dict[str, Any]  # by searched key, its value
OBJECTIVES = {"expected_dice": ("unlabelled", "expected_dice_mean"), "test_dice": ("test", "dice_mean")}
BASES, TRIALS = "bases", "trials"  # folders of runs, in that of the search

_POINT, _ERROR = "point.json", "error.txt"
_NAME_LENGTH = 80
_DRAWS = 10  # for each random point: where choices are few, the same one comes again
# What a run makes of its own; masks are not copied, as the tables name them where they are.
_OWN = shutil.ignore_patterns(MARKER, "metrics.json", "selection.parquet", "*masks", "probabilities", "*.png")


@dataclass(frozen=True)
class Trial:
    """Some values of the searched keys, and the run that has them."""

    point: Point
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Of the run."""
        return folder_of(self.config)

    @property
    def done(self) -> bool:
        """Whether all rounds are."""
        return done(self.config)

    @property
    def error(self) -> str | None:
        """Why there is no more of it, if it failed."""
        path = self.folder / _ERROR
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def values(self, objective: str, /) -> list[float | None]:
        """The objective after each round that is done; None where it is not known."""
        return [value_of(now.metrics(), objective) for now in plan(self.config, self.folder) if now.done]

    def keep(self) -> None:
        """Leave its values in its folder, so that `known` finds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _POINT).is_file():
            _write(self.folder / _POINT, json.dumps(self.point))

    def fail(self, error: BaseException) -> None:
        """Leave in its folder what went wrong."""
        self.keep()
        _write(self.folder / _ERROR, sentence(error))

    def complete(self, on_round: Callable[[dict[str, Any]], None]) -> None:
        """Do what is left of the run, and before it what it shares with others unless one of them has; or tell again.

        Two that need the same at a time wait for each other: one does it, the other finds it.

        Parameters
        ----------
        on_round : called with the metrics of every round of the trial, in order

        Raises
        ------
        OnelabelError : it cannot be done; `error` says so too.
        """
        self.keep()
        (self.folder / _ERROR).unlink(missing_ok=True)
        if _settled(self.config):
            for now in plan(self.config, self.folder):
                on_round(now.metrics())
            return
        try:
            before = None
            for base in bases(self.config):
                _go(base, before)
                before = base
            _go(self.config, before, on_round)
        except OnelabelError as error:
            self.fail(error)
            raise


def trial(common: RunConfig, point: Mapping[str, Any], /) -> Trial:
    """The trial of a point.

    Parameters
    ----------
    common : settings of all trials; its storage is the folder of the search

    Raises
    ------
    ConfigError : an unknown key, or a value that cannot be.
    """
    config = change(common, point)
    words = [f"{key.rpartition('.')[2]}-{json.dumps(value)}" for key, value in point.items()]
    readable = "_".join(re.sub(r"[^\w.]+", "-", word).strip("-") for word in words)[:_NAME_LENGTH].strip("-._")
    name = f"{readable}-{derive(json.dumps(dict(point), sort_keys=True)):014x}"
    return Trial(dict(point), config.model_copy(update={"name": name, "storage": f"{common.storage}/{TRIALS}"}))


def points(config: RunConfig, /) -> list[Point]:
    """What a grid or a random search tries, or examples of what Optuna may."""
    search = config.search
    assert search
    if search.sampler == "grid":
        values = (one.values for one in search.space.values() if isinstance(one, ChoicesConfig))
        return [dict(zip(search.space, point, strict=True)) for point in product(*values)]
    generator = np.random.default_rng(derive(config.seed, "search"))
    domains = {key: domain(dimension) for key, dimension in search.space.items()}
    drawn = [
        decoded({key: one.sample(random_state=generator) for key, one in domains.items()})
        for _ in range(_DRAWS * search.trials)
    ]
    different = {json.dumps(point): point for point in drawn}
    return list(different.values())[: search.trials]


def domain(dimension: Dimension, /) -> Domain:
    """Ray Tune's word for it. Values to choose from become text, as not every sampler takes lists."""
    if isinstance(dimension, ChoicesConfig):
        return tune.choice([json.dumps(value) for value in dimension.values])
    if isinstance(dimension, IntegersConfig):
        return tune.randint(dimension.low, dimension.high + 1)
    if isinstance(dimension, LogUniformConfig):
        return tune.loguniform(dimension.low, dimension.high)
    return tune.uniform(dimension.low, dimension.high)


def encoded(config: RunConfig, point: Point, /) -> Point:
    """A point as samplers see it; inverse of `decoded`."""
    assert config.search
    choices = {key for key, one in config.search.space.items() if isinstance(one, ChoicesConfig)}
    return {key: json.dumps(value) if key in choices else value for key, value in point.items()}


def within(config: RunConfig, point: Point, /) -> bool:
    """Whether the space of a search holds a point, which may be of an earlier space."""
    assert config.search
    space = config.search.space
    return point.keys() == space.keys() and all(
        point[key] in one.values if isinstance(one, ChoicesConfig) else one.low <= point[key] <= one.high
        for key, one in space.items()
    )


def decoded(point: Mapping[str, Any], /) -> Point:
    """A point that a sampler gave."""
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in point.items()}


def objective(config: RunConfig, /) -> str:
    """What the search maximises, as the settings say or as there is a truth or none.

    Raises
    ------
    ConfigError : the last round would not know it.
    """
    assert config.search
    name = config.search.objective or ("test_dice" if config.data.test else "expected_dice")
    last = config.stages[-1]
    if name == "test_dice" and not config.data.test:
        raise ConfigError("search.objective 'test_dice' needs scans with masks: set data.test")
    if name == "expected_dice" and not (config.data.unlabelled and single_rankers(last.ranker) and last.expect.images):
        raise ConfigError(
            "search.objective 'expected_dice' needs data.unlabelled, and in the last stage a ranker that looks at masks"
            f" and expect.images above 0, which '{last.name}' lacks; or give data.test"
        )
    return name


def value_of(metrics: Mapping[str, Any], name: str, /) -> float | None:
    """An objective among a round's metrics."""
    cohort, figure = OBJECTIVES[name]
    value = metrics.get(cohort, {}).get(figure)
    return None if value is None else float(value)


def bases(config: RunConfig, /) -> list[RunConfig]:
    """The runs that a run goes on from, each from the one before it: its first stage trained, then scored as well.

    The first stage learns from no selection, and of all other settings only those that it depends on are left here:
    runs whose first stages are the same have the same bases, in the same folders.
    """
    first = config.stages[0].model_copy(update={"select": TopKConfig(k=(1,))})
    trained = first.model_copy(update={"ranker": None, "expect": ExpectConfig(), "pseudo": None})
    return [_base(config, stage) for stage in (trained, *([first] if first != trained else []))]


def _base(config: RunConfig, stage: StageConfig) -> RunConfig:
    base = config.model_copy(update={"name": "base", "stages": (stage,)})
    name = f"base-{derive(base.model_dump_json(exclude={'storage', 'tracking'})):014x}"
    return base.model_copy(update={"name": name, "storage": str(Path(config.storage).parent / BASES)})


def bases_first(trials: list[Trial], /) -> list[Trial]:
    """Trials in such an order that those of different bases alternate, so that few wait for each other."""
    seen: Counter[str] = Counter()
    turns = []
    for one in trials:
        name = bases(one.config)[0].name
        turns.append(seen[name])
        seen[name] += 1
    return [one for _, one in sorted(zip(turns, trials, strict=True), key=lambda pair: pair[0])]


def known(common: RunConfig, /) -> list[Trial]:
    """All trials that were ever begun, the oldest first."""
    paths = sorted(Path(common.storage, TRIALS).glob(f"*/{_POINT}"), key=lambda path: path.stat().st_mtime_ns)
    found = [(path.parent, trial(common, json.loads(path.read_text(encoding="utf-8")))) for path in paths]
    return [one for folder, one in found if one.folder == folder]


def folder_of(config: RunConfig, /) -> Path:
    """Of a run."""
    return Path(config.storage) / config.name


def done(config: RunConfig, /) -> bool:
    """Whether all rounds of a run are."""
    return all(now.done for now in plan(config, folder_of(config)))


def _settled(config: RunConfig) -> bool:
    """Whether a run is done and came to its report, which is the last thing that it writes."""
    return done(config) and (folder_of(config) / NAME).is_file()


def _go(config: RunConfig, before: RunConfig | None, on_round: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Do what is left of a run, after what an earlier run has done for it; one process at a time."""
    with _locked(folder_of(config)):
        if not _settled(config) or on_round:
            if before:
                _go_on_from(before, config)
            driver.run(config, on_round)


def _go_on_from(before: RunConfig, config: RunConfig) -> None:
    """Let a run find the rounds of another one, but not what it selected."""
    source, target = folder_of(before), folder_of(config)
    target.mkdir(parents=True, exist_ok=True)
    for part in [*source.glob("round-*"), *source.glob("rankers")]:
        if not (target / part.name).exists():
            unfinished = target / f".{part.name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(part, unfinished, ignore=_OWN)
            os.replace(unfinished, target / part.name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process has the folder; a process that ends, however it does, has it no more."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
