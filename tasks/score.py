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

from onelabel.configs.schema import ComputeConfig, RankerConfig
from onelabel.errors import SCAN_FAULTS, sentence
from onelabel.imaging import metrics, volume
from onelabel.models import checkpoint, rankers
from onelabel.models.predictor import Predictor
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
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class ScoreTask:
    """checkpoint : of the segmenter; out : folder of the masks; fitted : checkpoint of the ranker's network, if any."""

    checkpoint: Path
    out: Path
    ranker: RankerConfig | None = None
    fitted: Path | None = None


def score(cohort: Cohort, task: ScoreTask, /, *, compute: ComputeConfig) -> pa.Table:
    """Segment all scans, write their masks in native space, and rank them.

    Returns
    -------
    One row a scan, by key: `SCHEMA`. Metrics where the cohort names a truth; null where there is none.
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
    table = pa.Table.from_pylist(dataset.take_all(), schema=SCHEMA).sort_by("key")
    failed = [error for error in table["error"].to_pylist() if error]
    if failed:
        log.warning("%d of %d scans failed, for example: %s", len(failed), len(table), failed[0])
    return table


class Scorer:
    """Predicts and ranks, one scan a call; lives in an actor that loads the networks once."""

    def __init__(self, task: ScoreTask, device: str, compute: ComputeConfig) -> None:
        torch.set_num_threads(1)
        self.task = task
        self.predictor = Predictor(task.checkpoint, device=device, precision=compute.precision)
        self.ranker = None
        if task.ranker is not None:
            network = checkpoint.load(task.fitted)[0].to(self.predictor.device) if task.fitted else None
            self.ranker = rankers.build(task.ranker, network)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score a batch of one row."""
        key, image, label = (str(batch[name][0]) for name in ("key", "image", "label"))
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {"key": key, "image": image}
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
        if self.ranker is not None:
            begin = time.process_time()
            scores = self.ranker.score(prediction.image, prediction.probability, self.predictor.probability)
            row |= {"score": float(scores[0]), "rank_cpu_s": time.process_time() - begin}
        if label:
            _, truth = volume.load_labelled(image, label)
            found = metrics.evaluate(mask, truth.data > 0, scan.spacing_mm)
            row |= {name: found[name] for name in ("dice", "hd95_mm", "asd_mm", "miss")}
        return row
