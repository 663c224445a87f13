"""Predict and rank a cohort by Ray Data. A scan that fails is a row with an error."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
import torch.nn.functional as F

from onelabel.configs.schema import (
    ComputeConfig,
    FusedRankerConfig,
    OracleRankerConfig,
    RandomRankerConfig,
    RankerConfig,
    single_rankers,
)
from onelabel.errors import SCAN_FAULTS, sentence
from onelabel.imaging import metrics, volume
from onelabel.imaging.random import derive
from onelabel.models import checkpoint, rankers
from onelabel.models.predictor import Predictor
from onelabel.models.rankers import fuse
from onelabel.tasks.cohort import Cohort

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.string()),
        ("mask", pa.string()),
        ("score", pa.float64()),
        ("volume_mm3", pa.float64()),
        ("dice", pa.float64()),
        ("hd95_mm", pa.float64()),
        ("asd_mm", pa.float64()),
        ("miss", pa.bool_()),
        ("predict_cpu_s", pa.float64()),
        ("rank_cpu_s", pa.float64()),
        ("thumbnail", pa.binary()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class ScoreTask:
    """What to score with.

    checkpoint : of the segmenter; out : folder of the masks
    fitted : checkpoint of the network of each of the ranker's `single_rankers`, or None
    """

    checkpoint: Path
    out: Path
    ranker: RankerConfig | None = None
    fitted: tuple[Path | None, ...] = ()
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """Where each single ranker's score stands."""
        parts = single_rankers(self.ranker)
        if not isinstance(self.ranker, FusedRankerConfig):
            return ["score"] * len(parts)
        before = [sum(other.type == part.type for other in parts[:place]) for place, part in enumerate(parts)]
        return [
            f"score_{part.type}" + (f"_{count + 1}" if count else "") for part, count in zip(parts, before, strict=True)
        ]


def score(cohort: Cohort, task: ScoreTask, /, *, compute: ComputeConfig) -> pa.Table:
    """Segment all scans, write their masks in native space, and rank them.

    Returns
    -------
    One row a scan, by key: `SCHEMA` (the thumbnail is of (8, 8, 8) uint8), and `score_TYPE` of each part of a fused ranker. Metrics where the cohort names a
    truth; null where there is none.
    """
    task.out.mkdir(parents=True, exist_ok=True)
    rows = [{"key": row["key"], "image": row["image"], "label": row["label"] or ""} for row in cohort.rows()]
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off
    ray.data.DataContext.get_current().enable_progress_bars = False
    actors = min(compute.score_actors, len(rows))
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4 * actors)).map_batches(
        Scorer,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=compute.score_gpus or None,
        fn_constructor_kwargs={"task": task, "device": "cuda" if compute.score_gpus else "cpu", "compute": compute},
    )
    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.float64()) for name in task.columns if name not in SCHEMA.names)])
    table = _ranked(pa.Table.from_pylist(dataset.take_all(), schema=schema).sort_by("key"), task)
    failed = [error for error in table["error"].to_pylist() if error]
    if failed:
        log.warning("%d of %d scans failed, for example: %s", len(failed), len(table), failed[0])
    return table


def _ranked(table: pa.Table, task: ScoreTask) -> pa.Table:
    """The score, where it takes the whole cohort or no look at a scan."""
    if isinstance(task.ranker, FusedRankerConfig):
        scores = fuse(np.array([table[name].to_numpy() for name in task.columns]), task.ranker.weights)
    elif isinstance(task.ranker, RandomRankerConfig):
        scores = np.array([derive(task.seed, "random", key) / 2**56 for key in table["key"].to_pylist()])
    elif isinstance(task.ranker, OracleRankerConfig):
        scores = table["dice"].to_numpy()
    else:
        return table
    known = pa.array(scores, from_pandas=True, mask=table["error"].is_valid().to_numpy(zero_copy_only=False))
    return table.set_column(table.column_names.index("score"), "score", known)


class Scorer:
    """Predicts and ranks, one scan a call; lives in an actor that loads the networks once."""

    def __init__(self, task: ScoreTask, device: str, compute: ComputeConfig) -> None:
        torch.set_num_threads(1)
        self.task = task
        self.predictor = Predictor(task.checkpoint, device=device, precision=compute.precision)
        networks = [checkpoint.load(path)[0].to(self.predictor.device) if path else None for path in task.fitted]
        self.rankers = list(map(rankers.build, single_rankers(task.ranker), networks))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score a batch of one row."""
        key, image, label = (str(batch[name][0]) for name in ("key", "image", "label"))
        row: dict[str, Any] = dict.fromkeys([*SCHEMA.names, *self.task.columns]) | {"key": key, "image": image}
        try:
            row |= self._score(key, image, label)
        except SCAN_FAULTS as error:
            row["error"] = sentence(error)
        return {name: [value] for name, value in row.items()}

    def _score(self, key: str, image: str, label: str) -> dict[str, Any]:
        scan = volume.load(image)
        begin = time.process_time()
        prediction = self.predictor(scan)
        row: dict[str, Any] = {"predict_cpu_s": time.process_time() - begin}
        path = self.task.out / f"{key}.nii.gz"
        volume.save(prediction.mask, path, like=image, dtype=np.uint8)
        mask = prediction.mask.data > 0
        row |= {"mask": str(path), "volume_mm3": metrics.volume_mm3(mask, scan.spacing_mm)}
        row["thumbnail"] = _thumbnail(prediction.image)
        begin = time.process_time()
        for column, ranker in zip(self.task.columns, self.rankers, strict=True):
            scores = ranker.score(prediction.image, prediction.probability, self.predictor.probability)
            row |= {column: float(scores[0]), "rank_cpu_s": time.process_time() - begin}
        if label:
            _, truth = volume.load_labelled(image, label)
            found = metrics.evaluate(mask, truth.data > 0, scan.spacing_mm)
            row |= {name: found[name] for name in ("dice", "hd95_mm", "asd_mm", "miss")}
        return row


def _thumbnail(image: torch.Tensor) -> bytes:
    """An image (1, 1, *size) in [0, 1] as (8, 8, 8) bytes, to tell scans that are alike."""
    small = F.adaptive_avg_pool3d(image, 8)
    return small.mul(255).round().to(torch.uint8).cpu().numpy().tobytes()
