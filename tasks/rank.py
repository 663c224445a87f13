"""Judge masks that any tool made, by what one labelled scan teaches."""

from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from onelabel.configs.schema import ComputeConfig, RankerConfig
from onelabel.errors import DataError
from onelabel.imaging import damage, metrics, random, synthesis, volume
from onelabel.imaging.labels import LEVELS
from onelabel.imaging.prepare import image_on_grid
from onelabel.imaging.storage import AnyPath
from onelabel.imaging.volume import Grid, Volume
from onelabel.models import rankers
from onelabel.models.networks.autoencoder import one_hot
from onelabel.models.precision import use_bf16
from onelabel.models.predictor import Predictor
from onelabel.tasks.cohort import Cohort
from onelabel.tasks.score import EXPECTED, Probes, columns_of, expectation_of, ranked, with_expected
from onelabel.tasks.score_pool import over

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("mask", pa.string()),
        ("image", pa.string()),
        ("score", pa.float64()),
        *((name, pa.float64()) for name in EXPECTED),
        ("flag", pa.bool_()),
        ("volume_mm3", pa.float64()),
        ("components", pa.int64()),
        ("flags", pa.string()),
        ("dice", pa.float64()),
        ("error", pa.string()),
    ]
)
_SMALL = 0.001  # components smaller than this share of the mask are not counted


@dataclass(frozen=True)
class RankTask:
    """What to judge by.

    segmenter : checkpoint whose probabilities masks are held against, where scans have images; or None
    fitted : checkpoint of the network of each of the ranker's `single_rankers`, or None
    grid : on which masks are judged
    probes : damaged masks of synthetic images, to learn what Dice a score speaks for
    """

    segmenter: AnyPath | None
    ranker: RankerConfig
    fitted: tuple[AnyPath | None, ...]
    grid: Grid
    probes: Probes
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """Where each single ranker's score stands."""
        return columns_of(self.ranker)


def rank(cohort: Cohort, task: RankTask, /, *, compute: ComputeConfig) -> pa.Table:
    """Score masks, the best first.

    Parameters
    ----------
    cohort : `label` is the mask to judge; `image` its scan, or the mask again where there is no scan

    Returns
    -------
    One row a mask as in `SCHEMA`, without `dice`; those that failed, or are empty, come last.
    """
    mask, image = cohort.table["label"], cohort.table["image"]
    scans = pa.table(
        {
            "key": cohort.table["key"],
            "mask": mask,
            "image": pc.if_else(pc.equal(image, mask), pa.scalar(None, pa.string()), image),
        }
    )
    table, probed = over(scans, task.probes.config.images, Judge, task, compute=compute, schema=SCHEMA)
    table = ranked(table, task)
    if task.probes.config.images:
        expectation = expectation_of(probed, task.ranker)
        table = with_expected(table, expectation, task.columns, bad=task.probes.config.bad)
    table = table.set_column(
        table.column_names.index("flags"), "flags", pa.array(_with_outliers(table.to_pylist()), pa.string())
    )
    return table.drop_columns("dice").sort_by([("score", "descending"), ("key", "ascending")])


def _with_outliers(rows: list[dict[str, Any]]) -> list[str | None]:
    """Each row's flags, and that its volume is far from the others'."""
    middle, far = metrics.usual_volume([row["volume_mm3"] for row in rows if row["volume_mm3"]])
    unlike = f"volume unlike the others' {middle / 1e3:.0f} ml"
    return [
        "; ".join(filter(None, [row["flags"], unlike]))
        if row["volume_mm3"] and abs(row["volume_mm3"] - middle) > far
        else row["flags"]
        for row in rows
    ]


class Judge:
    """Judges one mask a call; loads the networks once."""

    def __init__(self, task: RankTask, device: str, compute: ComputeConfig) -> None:
        torch.set_num_threads(1)
        self.task, self.device = task, torch.device(device)
        known = task.segmenter
        self.predictor = Predictor(known, device=device, precision=compute.precision) if known else None
        bf16 = use_bf16(compute.precision, self.device)
        self.rankers = rankers.load(task.ranker, task.fitted, device=self.device, bf16=bf16)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score of a mask, and of its image if there is one, or of a probe."""
        return self._judge(row["image"], row["mask"]) if row["probe"] < 0 else self._probe(row["probe"])

    def _judge(self, image: str | None, path: str) -> dict[str, Any]:
        mask = volume.load(path, labels=True)
        found: dict[str, Any] = {"volume_mm3": metrics.volume_mm3(mask.data > 0, mask.spacing_mm)}
        found |= _look(mask.data)
        grid = self.task.grid
        on_grid = volume.conform_mask(Volume((mask.data > 0).astype(np.int32), mask.affine), grid).data > 0
        seen = np.zeros(grid.size, np.float32)
        if image:
            scan, _ = volume.load_labelled(image, path) if mask.data.any() else (volume.load(image), None)
            seen = image_on_grid(scan, grid).data
        return found | self._rank(seen, on_grid)

    def _probe(self, number: int) -> dict[str, float]:
        """Scores and Dice of the damaged mask of a synthetic image."""
        scans, config = self.task.probes.scans, self.task.probes.synthesis
        scan, spacing_mm = ray.get(scans[number % len(scans)]), self.task.grid.spacing_mm
        generator = random.generator(self.task.seed, "probe", number)
        params = synthesis.sample_params(scan, config, spacing_mm=spacing_mm, generator=generator)
        image, label = synthesis.synthesise(scan, params, spacing_mm=spacing_mm)
        seen, truth = np.divide(image.numpy(), LEVELS - 1, dtype=np.float32), label.numpy() > 0
        if not truth.any():
            return {}  # all of the structure is out of view
        true = damage.subject(truth, seen, spacing_mm)
        mask = damage.apply_damage(true, damage.sample_damage(generator))
        return {"dice": metrics.dice(mask, truth)} | self._rank(seen, mask)

    def _rank(self, image: np.ndarray, mask: np.ndarray) -> dict[str, float]:
        seen = torch.from_numpy(image).to(self.device)[None, None]
        given = one_hot(torch.from_numpy(mask).to(self.device, torch.int64)[None], 2)
        return {
            column: float(ranker.score(seen, given, self._predict)[0])
            for column, ranker in zip(self.task.columns, self.rankers, strict=True)
        }

    def _predict(self, image: torch.Tensor, /, *, dropout: bool = False) -> torch.Tensor:
        if self.predictor is None:
            raise DataError("this ranker looks at images with a network: give --checkpoint")
        probability = self.predictor.probability(image, dropout=dropout)
        return torch.cat([probability[:, :1], probability[:, 1:].sum(1, keepdim=True)], dim=1)


def _look(labels: np.ndarray) -> dict[str, Any]:
    """What can be said of labels (*size) int without any network."""
    mask = labels > 0
    share = mask.mean()
    if share in (0, 1):
        return {"components": int(share), "flags": "empty" if share == 0 else "full"}
    sizes = cc3d.statistics(cc3d.connected_components(mask, connectivity=26))["voxel_counts"][1:]
    count, classes = int((sizes >= _SMALL * mask.sum()).sum()), len(np.unique(labels[mask]))
    flags = {
        f"{count} components": count > 1,
        f"{classes} classes taken together": classes > 1,
        "touches the edge of the field of view": any(
            mask.take(place, axis).any() for axis in range(3) for place in (0, -1)
        ),
    }
    return {"components": count, "flags": "; ".join(flag for flag, so in flags.items() if so)}
