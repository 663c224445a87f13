"""MLflow, in the driver only: a run with a nested run for each round, gone on with when the run is resumed.

MLflow takes seconds to import, so it is imported when a `Tracker` is made and not before.
"""

import importlib
import json
import logging
import math
import os
import re
import shlex
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onelabel.configs.passwords import without_password
from onelabel.configs.schema import RunConfig
from onelabel.errors import ClusterError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

# MLflow would report to its makers what it is used for.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# MLflow's limits
MAX_PARAMS = 100  # a batch
MAX_TAGS = 100  # a batch
MAX_VALUE = 6000  # characters of a parameter

_DATABASE = "mlflow.db"
_RECORD = "mlflow.json"
_SQLITE = "sqlite:///"

# Usually MLflow tries for four minutes; before anything is computed the user had better know at once.
IMPATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def preload() -> None:
    """Import MLflow in a thread, while there is other waiting to do."""
    threading.Thread(target=importlib.import_module, args=("mlflow",), daemon=True).start()


class _Recorder:
    """What is written to one MLflow run. A record that fails costs a warning, never the training."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics; those that are not finite are left out."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        finite = [Metric(key, float(v), now_ms, step) for key, v in values.items() if math.isfinite(v)]
        with _forgiven():
            self._client.log_batch(self.run_id, metrics=finite)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder to the artifacts."""
        with _forgiven():
            self._client.log_artifact(self.run_id, str(path), folder)

    def close(self, status: str = "FINISHED") -> None:
        """Mark the run as finished, failed or killed."""
        with _forgiven():
            self._client.set_terminated(self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A search that stops a trial, and Ctrl-C, raise what is no Exception.
        self.close("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")


class RoundTracker(_Recorder):
    """The record of one round. Its methods may be called from any thread."""

    def losses(self, row: Mapping[str, float]) -> None:
        """Log a row of losses at its `step`."""
        self.metrics({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))


class Tracker(_Recorder):
    """The record of a run.

    Parameters
    ----------
    config : RunConfig
        Without `tracking.uri` the record is a SQLite database in the run's folder.
    folder : Path
        Of the run; ``mlflow.json`` in it remembers the MLflow runs, so that a resumed run goes on with them.

    Raises
    ------
    ClusterError
        MLflow cannot be reached, or its database cannot be used; known within seconds.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        folder = folder.resolve()
        self.uri = _uri(config, folder)
        self._record = folder / _RECORD
        self._ids: dict[str, Any] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        artifacts = None if config.tracking.uri else (folder / "mlartifacts").as_uri()
        with _reachable(self.uri), _environment(IMPATIENCE):
            if not config.tracking.uri:
                _make_database(folder / _DATABASE)
            client = open_client(self.uri)
            self._experiment = _experiment(client, config.tracking.experiment, artifacts)
            run = _go_on(client, self._ids["run"]) if "run" in self._ids else None
            if run is None:
                run = client.create_run(self._experiment, run_name=config.name, tags=_under(config.tracking.parent))
                self._remember({"run": run.info.run_id, "rounds": {}})
            _log_parameters(client, run, flatten(config.model_dump(mode="json")))
        super().__init__(client, run.info.run_id)

    def round(self, name: str) -> RoundTracker:
        """Begin the nested run of a round, or go on with the one of an earlier attempt."""
        with _reachable(self.uri):
            known = self._ids["rounds"]
            run = _go_on(self._client, known[name]) if name in known else None
            if run is None:
                run = self._client.create_run(self._experiment, run_name=name, tags=_under(self.run_id))
                self._remember(self._ids | {"rounds": known | {name: run.info.run_id}})
        return RoundTracker(self._client, run.info.run_id)

    def command(self) -> str:
        """The shell command that opens the record."""
        if self.uri.startswith(("http://", "https://")):
            return shlex.join(["python", "-m", "webbrowser", self.uri])
        return shlex.join(["mlflow", "ui", "--backend-store-uri", self.uri])

    def _remember(self, ids: dict[str, Any]) -> None:
        self._ids = ids
        unfinished = self._record.with_suffix(".new")
        unfinished.write_text(json.dumps(ids, indent=2))
        os.replace(unfinished, self._record)


class PastRun(_Recorder):
    """The record of a run that began earlier, to be read and to get more artifacts; its status stays what it is.

    copied : whether the folder is a copy, so that artifacts would go to the original

    Raises
    ------
    ClusterError
        There is no record, or MLflow cannot be reached; nothing is made in its place.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        folder = folder.resolve()
        self.uri, record = _uri(config, folder), folder / _RECORD
        database = [Path(self.uri.removeprefix(_SQLITE).partition("?")[0])] if self.uri.startswith(_SQLITE) else []
        for path in (record, *database):
            if not path.is_file():
                raise ClusterError(f"the run has no record in MLflow: '{path}' does not exist")
        ids = json.loads(record.read_text())
        self._rounds: dict[str, str] = ids["rounds"]
        with _reachable(self.uri), _environment(IMPATIENCE):
            super().__init__(open_client(self.uri), ids["run"])
            place = self._client.get_run(self.run_id).info.artifact_uri
        # The database holds the place of its artifacts, which is another one in a copy of the folder.
        self.copied = not config.tracking.uri and not place.startswith(f"{folder.as_uri()}/")

    def histories(self, names: Sequence[str], /) -> dict[str, dict[str, dict[int, float]]]:
        """Metrics by round (or ranker), name and step; of a step that a resumed run repeated, the later value."""
        with _reachable(self.uri), _environment(IMPATIENCE):
            return {
                name: {metric: self._history(run_id, metric) for metric in names}
                for name, run_id in self._rounds.items()
            }

    def _history(self, run_id: str, metric: str) -> dict[int, float]:
        found = sorted(self._client.get_metric_history(run_id, metric), key=lambda row: (row.step, row.timestamp))
        return {row.step: row.value for row in found}


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Dotted keys to values as text; a list of plain values, such as a size, stays one value.

    Examples
    --------
    >>> flatten({"size": [96, 128], "stages": [{"steps": 3}]})
    {'size': '[96, 128]', 'stages.0.steps': '3'}
    """
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {key: str(value)}
    return {
        dotted: text
        for name, part in value.items()
        for dotted, text in flatten(part, f"{key}.{name}" if key else str(name)).items()
    }


def open_client(uri: str) -> "MlflowClient":
    """MLflow's client for reading a record, such as that of `Tracker.uri`."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _under(parent: str | None) -> dict[str, str]:
    """Tags that make a run a nested one."""
    return {"mlflow.parentRunId": parent} if parent else {}


def _uri(config: RunConfig, folder: Path) -> str:
    return config.tracking.uri or f"{_SQLITE}{folder / _DATABASE}"


def _make_database(path: Path) -> None:
    """Make an empty MLflow database: it appears under its name only when it is complete.

    MLflow builds it by its whole history of migrations, which would wait for the disk hundreds of times; a database
    that counts for nothing until it is whole need not wait.
    """
    if path.is_file():
        return
    from sqlalchemy import Engine, event

    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    event.listen(Engine, "connect", _do_not_wait)
    try:
        open_client(f"{_SQLITE}{unfinished}")
    finally:
        event.remove(Engine, "connect", _do_not_wait)
    os.replace(unfinished, path)


def _do_not_wait(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """The id of the experiment, made if need be; runs that begin at the same time may race for it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error
    return str(found.experiment_id)


def _go_on(client: "MlflowClient", run_id: str) -> "Run | None":
    """Set a run of an earlier attempt to running again; None if this MLflow does not hold it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("MLflow holds no run %s any more: a new one begins", run_id)
        return None
    return run


def _log_parameters(client: "MlflowClient", run: "Run", parameters: Mapping[str, str]) -> None:
    """Log parameters; MLflow's are written once, so what a resumed run changed becomes a tag."""
    from mlflow.entities import Param, RunTag

    known = run.data.params
    values = {re.sub(r"[^\w\-. :/]", "_", key): text[:MAX_VALUE] for key, text in parameters.items()}
    new = [Param(key, text) for key, text in values.items() if key not in known]
    changed = [RunTag(f"changed.{key}", text) for key, text in values.items() if known.get(key, text) != text]
    for start in range(0, len(new), MAX_PARAMS):
        client.log_batch(run.info.run_id, params=new[start : start + MAX_PARAMS])
    for start in range(0, len(changed), MAX_TAGS):
        client.log_batch(run.info.run_id, tags=changed[start : start + MAX_TAGS])


@contextmanager
def _reachable(uri: str) -> Iterator[None]:
    """Say in one sentence what is wrong with MLflow."""
    importlib.import_module("mlflow")  # waits for `preload`; to import a part of it meanwhile would lock both threads
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = without_password(str(_cause(error)).strip().partition("\n")[0])
        raise ClusterError(
            f"MLflow at '{without_password(uri)}' cannot be used ({reason}); start its server, mend tracking.uri, or"
            " set tracking.uri=null to record in the folder of the run"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The system's own word, such as `Connection refused`, if that is where the error began."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    return first if isinstance(first, OSError) else error


@contextmanager
def _forgiven() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        log.warning("MLflow did not take a record: %s", without_password(str(error)))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
