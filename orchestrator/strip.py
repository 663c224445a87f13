"""Strip scans in this process, or where there are many, over a Ray cluster."""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs

from onelabel.errors import sentence
from onelabel.imaging import places
from onelabel.imaging.places import Folder
from onelabel.imaging.storage import AnyPath
from onelabel.tasks import strip as stripping
from onelabel.tasks.strip_plan import Job
from onelabel.tasks.strip_record import TABLE, Outcome
from onelabel.tasks.strip_worker import FAULTS, Row, Settings

log = logging.getLogger(__name__)

FEW = 8  # scans for which a cluster is not worth its start
WORKER_BYTES = 2**30
_WAIT_S = 60  # for nodes that an autoscaler adds

Values = Sequence[str] | None


def strip(inputs: Sequence[str], /, *, workers: int | None = None, **options: Any) -> Outcome:
    """Strip scans as `tasks.strip.strip` does, with several workers, and write a quality page of more than one.

    Parameters
    ----------
    workers : processes at a time. One, or a single scan: this process does it, and no cluster is started or joined.
        None: as many as the cluster holds (RAY_ADDRESS, else this machine), and this process alone for a few scans.

    Raises
    ------
    ClusterError : the cluster cannot be reached, or cannot hold the workers.
    """
    outcome = stripping.strip(inputs, spread=partial(_spread, workers=workers), **options)
    if outcome.scans > 1:
        try:
            _write_page(outcome.folder)
        except FAULTS as error:
            log.warning("there is no quality page (%s)", sentence(error))
    return outcome


def _write_page(out: Folder) -> None:
    from onelabel.orchestrator import qc  # which plots, and is slow to import

    if not places.is_uri(out.place):
        qc.write(Path(out.place) / TABLE, Path(out.place) / qc.NAME)
        return
    with tempfile.TemporaryDirectory() as folder:
        page = qc.write(TABLE, Path(folder) / qc.NAME, store=out.store, place=out.place)
        fs.copy_files(str(page), qc.NAME, fs.LocalFileSystem(), out.store)


def entities(subjects: Values, sessions: Values, suffixes: Values, /) -> dict[str, list[str]]:
    """What to keep of a BIDS dataset; subjects and sessions with or without `sub-` and `ses-`."""
    wanted = {"sub": subjects, "ses": sessions, "suffix": suffixes}
    return {name: [value.removeprefix(f"{name}-") for value in values] for name, values in wanted.items() if values}


def _spread(
    jobs: Sequence[Job], checkpoint: AnyPath | None, settings: Settings, out: Folder, /, *, workers: int | None
) -> Iterator[Row]:
    alone = len(jobs) < FEW or (os.cpu_count() == 1 and "RAY_ADDRESS" not in os.environ)
    if len(jobs) == 1 or workers == 1 or (workers is None and alone):
        yield from stripping.in_process(jobs, checkpoint, settings, out)
        return
    # Slow to import, and not needed before.
    from onelabel.cluster import resources, runtime
    from onelabel.configs.schema import ComputeConfig
    from onelabel.tasks.strip_pool import over_ray

    compute = ComputeConfig()
    gpus = {"GPU": 1.0} if settings.device == "cuda" else {}
    bundle = {"CPU": float(settings.threads or 1), "memory": float(WORKER_BYTES), **gpus}
    with runtime.connect(compute) as shared:
        asked = min(workers or 1, len(jobs))
        demand = resources.Demand("stripping", (bundle,) * asked, "--workers or --threads, or change --device")
        resources.check([demand], wait_s=_WAIT_S if shared else 0)
        count = asked if workers else min(resources.capacity(bundle), len(jobs))
        yield from over_ray(jobs, checkpoint, settings, out, workers=count, memory=WORKER_BYTES)
