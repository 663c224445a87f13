"""Rank masks that any tool made: quality control from one labelled scan."""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from onelabel.cluster import resources, runtime
from onelabel.configs.load import load
from onelabel.configs.schema import (
    AutoencoderRankerConfig,
    FusedRankerConfig,
    PosteriorRankerConfig,
    RankerConfig,
    RunConfig,
    single_rankers,
)
from onelabel.errors import ConfigError, DataError
from onelabel.imaging.storage import AnyPath
from onelabel.imaging.volume import Grid
from onelabel.models import checkpoint
from onelabel.orchestrator.evaluate import check_target, masks, scans
from onelabel.orchestrator.setup import Cohorts, needs, open_cohorts, open_folder
from onelabel.orchestrator.tracking import Tracker, preload
from onelabel.orchestrator.work import Work
from onelabel.tasks import rank as judging
from onelabel.tasks.cohort import SCHEMA, Cohort
from onelabel.tasks.strip import write_table
from onelabel.tasks.train import row_queue

log = logging.getLogger(__name__)

_WEIGHTS = (3.0, 1.0)  # of what the network says and of what the mask looks like


def rank(
    source: str,
    /,
    *,
    image: Path,
    mask: Path,
    out: Path,
    images: str | None = None,
    segmenter: AnyPath | None = None,
    settings: Sequence[str] = (),
) -> pa.Table:
    """Fit the ranker on the one true mask, judge all masks and write the table.

    Parameters
    ----------
    source : masks: a folder, a glob, a manifest or one file
    image, mask : the labelled scan
    out : .parquet or .csv; what was fitted stays in a folder beside it, and the same command uses it again
    images : scans of the masks, matched by key
    segmenter : checkpoint, or folder of a run, against whose probabilities masks are held where scans are given
    settings : YAML files, presets or key=value that change the preset `rank`

    Returns
    -------
    One row a mask, the best first, as in `tasks.rank.SCHEMA`.

    Raises
    ------
    OnelabelError : before anything is fitted, when the files, the settings or the cluster cannot do it.
    """
    check_target(out)
    if (images is None) != (segmenter is None):
        raise ConfigError("--images and --checkpoint belong together: a network looks at the scans of the masks")
    judged = _cohort(masks(source), scans(images) if images else {})
    config = _config(image, mask, out, segmenter, settings)
    if config.data.classes:
        raise ConfigError(
            "masks are ranked as one structure, as are the damaged ones learned from: leave out data.classes"
        )
    ranker = _ranker(config, segmenter)
    cohorts, folder = Cohorts(open_cohorts(config).labelled, judged, None), open_folder(config)
    preload()
    with runtime.connect(config.compute) as joined, Tracker(config, folder) as tracker:
        demands = resources.of_stage(config.compute, **needs(config, cohorts))
        resources.check(demands, wait_s=config.compute.wait_s if joined else 0)
        work = Work(config, cohorts, folder, tracker, row_queue(), joined)
        grid = Grid(config.grid.spacing_mm, config.grid.size)
        probes = work.probes(config.stages[0].expect)
        task = judging.RankTask(segmenter, ranker, work.fit_ranker(ranker), grid, probes, config.seed)
        log.info("judging %d masks", len(judged))
        table = judging.rank(judged, task, compute=config.compute)
    write_table(table, out)
    return table


def _cohort(found: Mapping[str, AnyPath], images: Mapping[str, AnyPath]) -> Cohort:
    """The masks as labels of their scans, or of themselves where no scan is known."""
    missing = sorted(found.keys() - images.keys()) if images else []
    if missing:
        raise DataError(f"{len(missing)} masks have no scan, for example '{missing[0]}': name scans like their masks")
    rows = [
        {"key": key, "image": str(images.get(key, path).absolute()), "label": str(path.absolute()), "kind": "given"}
        | {"weight": 1.0}
        for key, path in found.items()
    ]
    return Cohort(pa.Table.from_pylist(rows, schema=SCHEMA))


def _config(image: Path, mask: Path, out: Path, segmenter: AnyPath | None, settings: Sequence[str]) -> RunConfig:
    """The settings, on the grid of the network if there is one."""
    # Another name, by which other settings do not meet, may be given.
    named = load(["rank", f"name={out.stem}.rank", *settings, "data.labelled=.", "data.unlabelled=."])
    folder = out.parent / named.name
    manifest = folder / "labelled.csv"
    own = [f"data.labelled={manifest}", f"data.unlabelled={image}", f"storage={out.parent}", f"name={folder.name}"]
    own += ["stages.0.select={type: top_k, k: 1}"]  # nothing is selected
    if segmenter:
        grid = checkpoint.load_segmenter(segmenter)[1].grid
        own += [f"grid.spacing_mm={grid['spacing_mm']}", f"grid.size={grid['size']}"]
    config = load(["rank", *settings, *own])
    folder.mkdir(parents=True, exist_ok=True)
    with manifest.open("w", newline="") as text:
        csv.writer(text).writerows([("key", "image", "label"), ("labelled", image.absolute(), mask.absolute())])
    return config


def _ranker(config: RunConfig, segmenter: AnyPath | None) -> RankerConfig:
    """The preset's ranker; with a network a single one is joined by the agreement with its probabilities."""
    ranker = config.stages[0].ranker
    parts = single_rankers(ranker)
    if ranker is None or not parts:
        raise ConfigError("masks are ranked by looking at them: leave stages.0.ranker as it is in the preset 'rank'")
    if segmenter and len(parts) == 1:
        return FusedRankerConfig(rankers=(PosteriorRankerConfig(), parts[0]), weights=_WEIGHTS)
    if not segmenter and any(not isinstance(part, AutoencoderRankerConfig) for part in parts):
        raise ConfigError(f"the ranker '{ranker.type}' looks at scans with a network: give --images and --checkpoint")
    return ranker
