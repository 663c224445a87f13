"""Search: Ray Tune over runs."""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from onelabel.cluster import resources, runtime
from onelabel.configs.load import absolute, dump
from onelabel.configs.schema import RunConfig
from onelabel.errors import ClusterError, ConfigError, OnelabelError
from onelabel.imaging.places import is_uri
from onelabel.imaging.random import derive
from onelabel.orchestrator import surface, trials
from onelabel.orchestrator.driver import mendable
from onelabel.orchestrator.page import NAME
from onelabel.orchestrator.setup import Cohorts, check, needs, open_cohorts, open_folder, outlive_job
from onelabel.orchestrator.tracking import Tracker, preload
from onelabel.orchestrator.trials import Point, Trial

log = logging.getLogger(__name__)

RECORD = "search.yaml"
BEST = "best.yaml"

_MANY = 1_000_000  # rounds, more than any run has
_RETRIES = 3  # of a trial whose process was lost
_SCRATCH = "tune"
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # which would draw a table in spite of verbose=0
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they are
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a search, not only its trials
}
# Ray Tune's share of a trial must not be empty. What a run computes with, its own processes ask for.
_SHARE = tune.PlacementGroupFactory([{"memory": 1.0}])


@dataclass(frozen=True)
class Found:
    """What a search came to.

    folder : of the search; trials : best first; best : their first; mlflow_command : opens what was logged
    """

    folder: Path
    objective: str
    trials: list[Trial]
    mlflow_command: str

    @property
    def best(self) -> Trial:
        """The trial with the highest objective after its last round."""
        return self.trials[0]

    def places(self) -> dict[str, Path | str]:
        """What lies where."""
        places = {"best settings": self.folder / BEST, "report": self.folder / NAME, "best run": self.best.folder}
        return {**places, "losses and measures": self.mlflow_command}

    @property
    def failed(self) -> list[Trial]:
        """Those that ended with an error."""
        return [one for one in self.trials if one.error]


def search(config: RunConfig, /) -> Found:
    """Try settings, each as a run of its own, or what is left to try of the same search.

    Raises
    ------
    OnelabelError : before any trial, where one cannot be or the cluster cannot do it; at the end, if all failed.
    """
    settings = config.search
    if settings is None:
        raise ConfigError("there is nothing to search: set search.space, or stack the preset `search`")
    if settings.sampler == "optuna" and not find_spec("optuna"):
        raise ConfigError("search.sampler 'optuna' needs a package: pip install 'onelabel[search]'")
    if is_uri(config.storage):
        raise ConfigError(f"storage '{config.storage}' cannot hold a search, which locks files: give a folder")
    objective = trials.objective(config)
    outlive_job(config)
    config = absolute(config)
    common = config.model_copy(update={"search": None, "storage": str(Path(config.storage) / config.name)})
    tried = trials.bases_first([_possible(common, point) for point in trials.points(config)])
    cohorts = _checked(tried)
    open_folder(config, record=RECORD)
    folder = trials.folder_of(config).resolve()
    preload()
    with runtime.connect(config.compute) as joined, Tracker(config, folder) as tracker, mendable(folder):
        demands = [
            resources.of_stage(one.config.compute, **needs(one.config, each))
            for one, each in zip(tried, cohorts, strict=True)
        ]
        for demand in demands:
            resources.check(demand, wait_s=config.compute.wait_s if joined else 0)
        if joined:
            runtime.check_shared(folder)
        # Trials that write to one SQLite file at a time wait for each other.
        uri = tracker.uri if config.tracking.uri else f"{tracker.uri}?timeout=60"
        nested = config.tracking.model_copy(update={"uri": uri, "parent": tracker.run_id})
        common = common.model_copy(update={"tracking": nested})
        most = settings.concurrent or len(tried)
        if joined and settings.concurrent and config.compute.wait_s:
            at_once = most  # what does not fit yet waits for nodes that an autoscaler adds
        else:
            at_once = min(resources.copies(demand, most=most) for demand in demands)
        log.info("%d trials, %d at a time, for the highest %s", len(tried), at_once, objective)
        _tune(config, common, [one.point for one in tried], objective, at_once)
        found = Found(folder, objective, _ranked(trials.known(common), objective), tracker.command())
        _record(config, found, tracker)
    return found


def _possible(common: RunConfig, point: Point) -> Trial:
    try:
        return trials.trial(common, point)
    except ConfigError as error:
        raise ConfigError(f"search.space gives {_words(point)}: {error}") from None


def _checked(tried: Sequence[Trial]) -> list[Cohorts]:
    """The cohorts of all trials, which were checked against them; each is opened once.

    Raises
    ------
    OnelabelError : a trial that cannot be, or two that are the same.
    """
    opened: dict[str, Cohorts] = {}
    same: dict[str, Trial] = {}
    found = []
    for one in tried:
        twin = same.setdefault(one.config.model_dump_json(exclude={"name"}), one)
        if twin is not one:
            raise ConfigError(
                f"search.space gives {_words(one.point)} and {_words(twin.point)}, which are one and the same run: some"
                " key changes nothing here, so take it out"
            )
        data = one.config.data.model_dump_json()
        try:
            if data not in opened:
                opened[data] = open_cohorts(one.config)
            check(one.config, opened[data])
        except ConfigError as error:
            raise ConfigError(f"search.space gives {_words(one.point)}: {error}") from None
        found.append(opened[data])
    return found


def _tune(config: RunConfig, common: RunConfig, tried: list[Point], objective: str, at_once: int) -> None:
    """Have Ray Tune do the trials. What is known of each in the end is in its folder."""
    assert config.search
    os.environ.update(_ENVIRONMENT)
    settings, halving = config.search, config.search.halving
    optuna = settings.sampler == "optuna"
    space: dict[str, Any] = {"point": tune.grid_search([trials.encoded(config, point) for point in tried])}
    if optuna:
        space = {"point": {key: trials.domain(dimension) for key, dimension in settings.space.items()}}
    # It would warn that there are no files of results, which nobody reads.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    folder = Path(common.storage)
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(partial(_try, common=common, objective=objective), _SHARE),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            num_samples=settings.trials if optuna else 1,
            search_alg=_optuna(config, trials.known(common)) if optuna else None,
            scheduler=ASHAScheduler("round", max_t=_MANY, grace_period=halving.grace, reduction_factor=halving.keep)
            if halving
            else None,
            max_concurrent_trials=at_once,
            reuse_actors=True,  # to start a process takes long
        ),
        run_config=tune.RunConfig(
            name=_SCRATCH,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            callbacks=[_Watching(common, objective)],
            verbose=0,
        ),
    )
    tuner.fit()
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)


def _try(settings: Mapping[str, Any], /, *, common: RunConfig, objective: str) -> None:
    """One trial, in a process that Ray Tune keeps."""
    rounds = 0

    def tell(metrics: Mapping[str, Any]) -> None:
        nonlocal rounds
        rounds += 1
        value = trials.value_of(metrics, objective)
        tune.report({"objective": math.nan if value is None else value, "round": rounds})

    try:
        trials.trial(common, trials.decoded(settings["point"])).complete(tell)
    except OnelabelError:
        tell({})  # its folder says why; if this were a failure to Ray Tune, it would try again


def _optuna(config: RunConfig, before: Sequence[Trial]) -> Searcher:
    """Optuna, which first gets to know what was tried before."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    begun = [trials.encoded(config, one.point) for one in before if trials.within(config, one.point)]
    # From the same seed it would begin by proposing the same once more.
    return OptunaSearch(
        points_to_evaluate=[{f"point/{key}": value for key, value in point.items()} for point in begun] or None,
        seed=derive(config.seed, "optuna", len(begun)) % 2**32,
    )


class _Watching(tune.Callback):
    """A line for every round of every trial; and a trial that is lost holds no resources."""

    def __init__(self, common: RunConfig, objective: str) -> None:
        self.common, self.objective = common, objective

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        resources.release_orphans()

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        one = self._trial(trial)
        if one.error:
            return
        log.info("%s: round %d, %s %.4f", _words(one.point), result["round"], self.objective, result["objective"])

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        one = self._trial(trial)
        if one.error:
            log.warning("%s failed: %s", _words(one.point), one.error)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        one, error = self._trial(trial), trial.get_error()
        log.warning("%s was lost: %s", _words(one.point), error)
        one.fail(ClusterError(f"lost {_RETRIES + 1} times: {error}"))

    def _trial(self, trial: TuneTrial) -> Trial:
        return trials.trial(self.common, trials.decoded(trial.config["point"]))


def _ranked(all_of_them: list[Trial], objective: str) -> list[Trial]:
    """Those that are done by their objective, then those that were stopped, then those that failed."""

    def rank(one: Trial) -> tuple[int, float]:
        values = [value for value in one.values(objective) if value is not None]
        return 2 if one.error or not values else int(not one.done), -values[-1] if values else 0.0

    return sorted(all_of_them, key=rank)


def _record(config: RunConfig, found: Found, tracker: Tracker) -> None:
    """The best settings as a file, and a page, in the folder and in MLflow."""
    if not found.trials:
        raise ClusterError(f"no trial left anything in '{found.folder}'; it must be a folder that all nodes mount")
    best = found.best
    values = best.values(found.objective)
    if best.error or not best.done or values[-1] is None:
        reason = next((one.error for one in found.trials if one.error), f"they have no {found.objective}")
        raise ClusterError(f"none of {len(found.trials)} trials came to its end; {_words(best.point)}: {reason}")
    ready = {"name": f"{config.name}-best", "storage": config.storage, "tracking": config.tracking}
    dump(best.config.model_copy(update=ready), found.folder / BEST)
    page = surface.write(config, found.objective, found.trials, found.folder)
    tracker.metrics({found.objective: values[-1]})
    for path in (found.folder / BEST, page):
        tracker.artifact(path)


def _words(point: Point) -> str:
    return ", ".join(f"{key} = {value}" for key, value in point.items())
