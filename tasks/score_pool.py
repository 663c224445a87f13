"""Rows of a cohort through a pool of actors by Ray Data. What an actor cannot do, or dies of, is a row in error."""

import gc
import logging
import math
import re
import secrets
import time
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.read_api import from_blocks

from onelabel.configs.schema import ComputeConfig
from onelabel.errors import SCAN_FAULTS, ClusterError, OnelabelError, StorageError, last_line, sentence
from onelabel.imaging import storage
from onelabel.imaging.random import derive
from onelabel.imaging.storage import AnyPath

log = logging.getLogger(__name__)

_TASK_SCANS = 64  # at most: what an actor that dies costs
_FATAL = pa.schema([("unwritten", pa.string()), ("mistake", pa.string())])  # what ends the run
_KEEP_S = 30.0  # what an attempt that is cut off has to make again
_PAUSE_S = 1.0  # before a result is written again
_LOST = "the worker died twice over this scan, perhaps for want of memory"


def over(
    scans: pa.Table,
    probes: int,
    worker: type,
    task: Any,
    /,
    *,
    compute: ComputeConfig,
    schema: pa.Schema,
    keep: AnyPath | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Call workers with each scan, and with each number of a probe.

    Those that were with an actor when it died are tried once more with it, and then one by one.

    Parameters
    ----------
    scans : a row each, with a `key`
    worker : made of task, device and compute; called with a row, whose `probe` is -1 for a scan, it returns values by
        column, or raises one of `SCAN_FAULTS`, and StorageError where no scan can have a result
    schema : of what comes back, beside a score for each of the task's `columns`; what it shares with `scans` is kept
    keep : a folder for rows until the caller has them all, so that an attempt that is cut off is gone on with

    Returns
    -------
    The rows of scans, by key, and those of probes, by number.

    Raises
    ------
    StorageError : results cannot be written.
    ClusterError : the cluster fails.
    """
    scans = scans.sort_by("key")
    numbers = [pa.repeat(pa.scalar(-1, pa.int64()), len(scans)), pa.array(range(probes), pa.int64())]
    rows = pa.concat_tables(
        [scans.append_column("probe", numbers[0]), pa.table({"probe": numbers[1]})], promote_options="default"
    ).append_column("place", pa.array(range(len(scans) + probes), pa.int64()))
    scores = [pa.field(name, pa.float64()) for name in task.columns if name not in schema.names]
    whole = pa.schema([*schema, *scores, ("place", pa.int64())])
    actors = min(compute.score_actors, len(rows))
    given = {"worker": worker, "schema": whole, "task": task, "compute": compute}
    kept = _Kept(keep / _fingerprint(rows, whole) if keep else None, whole)
    found, lost = kept.rows, _without(rows, kept.rows)
    for size in (min(_TASK_SCANS, math.ceil(len(rows) / (4 * actors))), 1):
        if not len(lost):
            break
        with kept:
            found = pa.concat_tables([found, _passed(lost, given, min(actors, len(lost)), size, kept)])
        lost = _without(rows, found)
        gc.collect()  # a task's error and its actor hold each other, and the actor its CPU
    lost = lost.append_column("error", pa.repeat(pa.scalar(_LOST), len(lost)))
    found = pa.concat_tables([found, lost], promote_options="default").select(whole.names)
    found = found.sort_by("place").drop_columns("place")
    table, probed = found.slice(0, len(scans)), found.slice(len(scans))
    failed = table["error"].drop_null()
    if len(failed):
        log.warning("%d of %d scans failed, for example: %s", len(failed), len(table), failed[0])
    return table, probed


class _Kept:
    """Rows on their way, of which all but those in error are in a folder of Parquet files, `_KEEP_S` later at most."""

    def __init__(self, folder: AnyPath | None, schema: pa.Schema) -> None:
        paths: Iterable[AnyPath] = folder.glob("[!.]*.parquet") if folder and folder.is_dir() else []
        parts = [pq.read_table(pa.BufferReader(path.read_bytes()), schema=schema) for path in paths]
        self.rows = pa.concat_tables([schema.empty_table(), *parts])
        if len(self.rows):
            log.info("%d rows are there from before", len(self.rows))
        self._folder, self._waiting, self._since = folder, schema.empty_table(), time.monotonic()

    def add(self, rows: pa.Table) -> None:
        self._waiting = pa.concat_tables([self._waiting, rows.filter(pc.is_null(rows["error"]))])
        if time.monotonic() - self._since > _KEEP_S:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            with suppress(OnelabelError, OSError):  # one fault is told of already
                self._write()

    def _write(self) -> None:
        if self._folder and len(self._waiting):
            with storage.writing(self._folder / f"{secrets.token_hex(8)}.parquet") as unfinished:
                pq.write_table(self._waiting, unfinished)
        self._waiting, self._since = self._waiting.slice(0, 0), time.monotonic()


def _fingerprint(rows: pa.Table, schema: pa.Schema) -> str:
    """Of what is to be made: rows of other scans, in another order or with other columns are of no use."""
    return f"{derive(schema.to_string(), *rows['image'].to_pylist(), *rows['probe'].to_pylist()):014x}"


def _passed(rows: pa.Table, given: dict[str, Any], actors: int, size: int, kept: _Kept) -> pa.Table:
    """What becomes of rows, so many a task; those that their actor died of twice are left out."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # we say ourselves what failed
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a scan that kills its actor stops no other
    compute: ComputeConfig = given["compute"]
    with warnings.catch_warnings():
        # There is no other way yet to say how often a task is tried again.
        warnings.simplefilter("ignore", DeprecationWarning)
        # `from_arrow` starts processes to look at what we hold
        dataset = from_blocks([rows.slice(begin, size) for begin in range(0, len(rows), size)]).map_batches(
            Rows,
            batch_size=None,
            batch_format="pyarrow",
            # a scan that waits in the queue of an actor that dies would count as tried
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1 if size == 1 else None),
            num_cpus=1,
            num_gpus=compute.score_gpus or None,
            max_restarts=-1,
            max_task_retries=1,
            fn_constructor_kwargs=given | {"device": "cuda" if compute.score_gpus else "cpu"},
        )
    return _gathered(dataset, given["schema"], kept)


def _gathered(dataset: ray.data.Dataset, schema: pa.Schema, kept: _Kept) -> pa.Table:
    """All rows, unless there is no use in going on."""
    batches = [schema.empty_table()]
    try:
        batch: pa.Table
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            kept.add(batch.filter(pc.is_null(pc.coalesce(batch["unwritten"], batch["mistake"]))).select(schema.names))
            if len(unwritten := batch["unwritten"].drop_null()):
                raise StorageError(f"{unwritten[0]}; make room or mend it, and the same command goes on from here")
            if len(mistakes := batch["mistake"].drop_null()):
                raise RuntimeError(mistakes[0].as_py())
            batches.append(batch.select(schema.names))
    except ray.exceptions.RayError as error:
        if said := re.search(r"StorageError: (.+)", str(error)):
            raise StorageError(said[1]) from error
        if isinstance(error, ray.exceptions.RayTaskError):  # a mistake of ours
            raise
        raise ClusterError(f"scoring failed ({last_line(error)}): the same command goes on from here") from error
    return pa.concat_tables(batches)


def _without(rows: pa.Table, found: pa.Table) -> pa.Table:
    """Those rows that are not among the found."""
    return rows.filter(pc.invert(pc.is_in(rows["place"], value_set=found["place"])))


class Rows:
    """A worker's values as a table; lives in an actor."""

    def __init__(self, worker: type, schema: pa.Schema, **given: Any) -> None:
        self.worker, self.schema = worker(**given), pa.schema([*schema, *_FATAL])

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows for rows."""
        return pa.Table.from_pylist([row | self._made(row) for row in batch.to_pylist()], self.schema)

    def _made(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            made = self._written(row)
        except StorageError as error:
            return {"unwritten": sentence(error)}
        except SCAN_FAULTS as error:
            return {"error": sentence(error)}
        except Exception:  # noqa: BLE001  a mistake of ours, which the driver raises
            return {"mistake": traceback.format_exc()}
        return made

    def _written(self, row: dict[str, Any]) -> dict[str, Any]:
        """Stores fail at times: a result that cannot be written is made once more."""
        try:
            made: dict[str, Any] = self.worker(row)
        except StorageError:
            time.sleep(_PAUSE_S)
            made = self.worker(row)
        return made
