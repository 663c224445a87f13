"""Predict and rank a cohort by Ray Data. A scan that fails is a row with an error."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
import torch.nn.functional as F

from onelabel.configs.augmentation import SynthesisConfig
from onelabel.configs.schema import (
    ComputeConfig,
    ExpectConfig,
    FusedRankerConfig,
    OracleRankerConfig,
    RandomRankerConfig,
    RankerConfig,
    single_rankers,
)
from onelabel.configs.streams import PseudoLabelConfig
from onelabel.errors import SCAN_FAULTS, StorageError
from onelabel.imaging import metrics, outputs, places, random, synthesis, volume
from onelabel.imaging.classes import load_target
from onelabel.imaging.labels import read_probability
from onelabel.imaging.random import derive
from onelabel.imaging.storage import AnyPath
from onelabel.imaging.volume import Volume
from onelabel.models import rankers
from onelabel.models.predictor import Prediction, Predictor, clean, likeliest
from onelabel.models.pseudo import PseudoLabeller
from onelabel.models.rankers import AutoencoderRanker, fuse
from onelabel.models.rankers.expectation import Expectation, fit
from onelabel.tasks.cohort import Cohort
from onelabel.tasks.score_pool import over

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.string()),
        ("mask", pa.string()),
        ("probability", pa.string()),
        ("score", pa.float64()),
        ("expected_dice", pa.float64()),
        ("expected_low", pa.float64()),
        ("expected_high", pa.float64()),
        ("flag", pa.bool_()),
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


EXPECTED = ("expected_dice", "expected_low", "expected_high")


@dataclass(frozen=True)
class Probes:
    """Synthetic images of scans (references to BinnedScan), to learn what Dice a score speaks for."""

    scans: tuple[Any, ...]
    synthesis: SynthesisConfig
    config: ExpectConfig


@dataclass(frozen=True)
class Pseudo:
    """How masks become pseudo-labels.

    out : folder of the probabilities; earlier : checkpoints of the networks that the mean is over, less the present one
    """

    config: PseudoLabelConfig
    out: AnyPath
    earlier: tuple[AnyPath, ...] = ()


@dataclass(frozen=True)
class ScoreTask:
    """What to score with.

    checkpoint : of the segmenter; out : folder of the masks
    fitted : checkpoint of the network of each of the ranker's `single_rankers`, or None
    probes : scored with the cohort, if a Dice is to be expected
    pseudo : if probabilities are to be written too
    structures : their names, if they are several: each has a column of Dice
    aside : folder of the masks of scans that are only measured
    """

    checkpoint: AnyPath
    out: AnyPath
    ranker: RankerConfig | None = None
    fitted: tuple[AnyPath | None, ...] = ()
    seed: int = 0
    probes: Probes | None = None
    pseudo: Pseudo | None = None
    structures: tuple[str, ...] = ()
    aside: AnyPath | None = None

    @property
    def schema(self) -> pa.Schema:
        """Of the table of scans, less the scores of a fused ranker's parts."""
        return pa.schema([*SCHEMA, *(pa.field(metrics.column(name), pa.float64()) for name in self.structures)])

    @property
    def columns(self) -> list[str]:
        """Where each single ranker's score stands."""
        return columns_of(self.ranker)


def columns_of(ranker: RankerConfig | None, /) -> list[str]:
    """Where the score of each of a ranker's single ones stands in a table."""
    parts = single_rankers(ranker)
    if not isinstance(ranker, FusedRankerConfig):
        return ["score"] * len(parts)
    before = [sum(other.type == part.type for other in parts[:place]) for place, part in enumerate(parts)]
    return [
        f"score_{part.type}" + (f"_{count + 1}" if count else "") for part, count in zip(parts, before, strict=True)
    ]


class Scored(NamedTuple):
    """What is known of scans, what their scores speak for, and what is known of the scans that were only measured."""

    table: pa.Table
    expectation: Expectation | None = None
    aside: pa.Table | None = None


def score(
    cohort: Cohort,
    task: ScoreTask,
    /,
    *,
    compute: ComputeConfig,
    aside: Cohort | None = None,
    keep: AnyPath | None = None,
    worker: type | None = None,
) -> Scored:
    """Segment all scans, write their masks in native space, and rank them.

    Parameters
    ----------
    aside : scans that are measured by the same actors, and neither ranked nor learned from
    keep : folder of rows that are done, which another attempt does not make again; remove it when all are written
    worker : what makes a row of a scan; `Scorer` by default

    Returns
    -------
    One row a scan, by key: `SCHEMA` (the thumbnail is of (8, 8, 8) uint8), the Dice of each of several structures, and
    `score_TYPE` of each part of a fused ranker; metrics where the cohort names a truth, null where there is none. And
    from the probes, what the scores speak for.
    """
    for folder in (task.out, task.aside or task.out):
        folder.mkdir(parents=True, exist_ok=True)
    probes = task.probes.config.images if task.probes and task.columns else 0
    parts = [one.table.select(["key", "image", "label"]) for one in (cohort, aside) if one]
    parts = [part.append_column("aside", pa.repeat(bool(place), len(part))) for place, part in enumerate(parts)]
    schema = task.schema.append(pa.field("aside", pa.bool_()))
    table, probed = over(
        pa.concat_tables(parts), probes, worker or Scorer, task, compute=compute, schema=schema, keep=keep
    )
    measured = table.filter(table["aside"]).select(task.schema.names) if aside else None
    table = (table.filter(pc.invert(table["aside"])) if aside else table).drop_columns("aside")
    hard = len(table.filter(pc.and_(pc.is_valid(table["mask"]), pc.is_null(table["probability"]))))
    if task.pseudo and hard:
        log.warning("the probabilities of %d of %d scans hold no structure: their masks stay labels", hard, len(table))
    table, expectation = ranked(table, task), None
    if task.probes and probes:
        expectation = expectation_of(probed, task.ranker)
        table = with_expected(table, expectation, task.columns, bad=task.probes.config.bad)
    return Scored(table, expectation, measured)


def expectation_of(probed: pa.Table, ranker: RankerConfig | None, /) -> Expectation:
    """What the scores of probes, whose Dice is known, speak for."""
    weights = ranker.weights if isinstance(ranker, FusedRankerConfig) else None
    known = probed.filter(pc.is_finite(pc.fill_null(probed["dice"], float("nan"))))
    return fit(np.array([known[name].to_numpy() for name in columns_of(ranker)]), known["dice"].to_numpy(), weights)


def with_expected(table: pa.Table, expectation: Expectation, columns: Sequence[str], /, *, bad: float) -> pa.Table:
    """The table with the Dice to expect, and a flag where it is lower than `bad` or the mask empty."""
    expected = expectation(np.array([table[name].to_numpy() for name in columns]))
    low = pc.less(pa.array(expected[0], from_pandas=True), bad)
    for name, values in zip(EXPECTED, expected, strict=True):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, from_pandas=True))
    return table.set_column(
        table.column_names.index("flag"), "flag", pc.or_kleene(low, pc.equal(table["volume_mm3"], 0))
    )


def ranked(table: pa.Table, task: Any, /) -> pa.Table:
    """The score, where it takes the whole cohort or no look at a scan, by the ranker and seed of a task."""
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
    """Predicts and ranks, one scan a call; loads the networks once."""

    def __init__(self, task: ScoreTask, device: str, compute: ComputeConfig) -> None:
        torch.set_num_threads(1)
        self.task = task
        self.predictor = Predictor(task.checkpoint, device=device, precision=compute.precision)
        self.rankers = rankers.load(task.ranker, task.fitted, device=self.predictor.device, bf16=self.predictor.bf16)
        self.labeller = self._labeller(task.pseudo, device, compute) if task.pseudo else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Mask, score and measures of a scan (key, image, label), or score and Dice of a probe."""
        if row["probe"] >= 0:
            return self._probe(row["probe"])
        try:
            with places.fetched(row["image"]) as image:
                return self._score(row["key"], str(image), row["label"], aside=row["aside"])
        except SCAN_FAULTS:
            self.task.out.exists()  # raises if it is the storage that does not answer, and not one scan
            raise

    def _score(self, key: str, image: str, label: str | None, *, aside: bool) -> dict[str, Any]:
        scan = volume.load(image)
        begin = time.process_time()
        prediction = self.predictor(scan)
        row: dict[str, Any] = {"predict_cpu_s": time.process_time() - begin}
        path = ((self.task.aside if aside else None) or self.task.out) / f"{key}.nii.gz"
        _save(prediction.mask, path, like=image)
        row |= {
            "mask": str(path),
            "probability": None if aside else self._pseudo(key, image, prediction),
            "volume_mm3": metrics.volume_mm3(prediction.mask.data, scan.spacing_mm),
        }
        row["thumbnail"] = _thumbnail(prediction.image)
        if self.rankers and not aside:
            begin = time.process_time()
            row |= self._rank(prediction.image, prediction.probability)
            row["rank_cpu_s"] = time.process_time() - begin
        if label:
            classes = self.predictor.classes
            _, truth = load_target(image, label, classes)
            found = classes.read(prediction.mask.data, path)
            row |= metrics.evaluate_classes(found, truth.data, scan.spacing_mm, classes.names)
        return row

    def _labeller(self, pseudo: Pseudo, device: str, compute: ComputeConfig) -> PseudoLabeller:
        earlier = [Predictor(path, device=device, precision=compute.precision) for path in pseudo.earlier]
        autoencoders = [one for one in self.rankers if isinstance(one, AutoencoderRanker)]
        return PseudoLabeller(
            pseudo.config,
            self.predictor.probability,
            earlier=[one.probability for one in earlier],
            autoencoder=autoencoders[0] if pseudo.config.project else None,
            classes=self.predictor.classes,
        )

    def _pseudo(self, key: str, image: str, prediction: Prediction) -> str | None:
        """Path of what is learned from instead of the mask; None where there is no structure in it, or nothing else."""
        if not (self.labeller and self.task.pseudo):
            return None
        found, path = self.labeller(prediction), self.task.pseudo.out / f"{key}.nii.gz"
        shares = found.data[None] if found.data.ndim == 3 else np.moveaxis(found.data, -1, 0)
        structure = read_probability(shares) > 0
        if structure.all() or not structure.any():
            return None
        _save(found, path, like=image)
        return str(path)

    def _rank(self, image: torch.Tensor, probability: torch.Tensor) -> dict[str, float]:
        return {
            column: float(ranker.score(image, probability, self.predictor.probability)[0])
            for column, ranker in zip(self.task.columns, self.rankers, strict=True)
        }

    def _probe(self, number: int) -> dict[str, float]:
        """Scores and Dice of the mask of a synthetic image."""
        assert self.task.probes
        scans, config = self.task.probes.scans, self.task.probes.synthesis
        scan = ray.get(scans[number % len(scans)])
        spacing_mm = self.predictor.grid.spacing_mm
        generator = random.generator(self.task.seed, "probe", number)
        params = synthesis.sample_params(scan, config, spacing_mm=spacing_mm, generator=generator)
        image, label = synthesis.synthesise(scan, params, spacing_mm=spacing_mm)
        truth = label.numpy()
        if not truth.any():
            return {}  # all of the structure is out of view
        seen = (image.to(self.predictor.device).float() / 255)[None, None]
        probability = self.predictor.probability(seen)
        mask = clean(likeliest(probability)[0].to(torch.uint8).cpu().numpy(), self.predictor.classes)
        return {"dice": metrics.mean_dice(mask, truth)} | self._rank(seen, probability)


def _save(found: Volume, path: AnyPath, /, *, like: str) -> None:
    """Write a mask or a probability; that it fails is not the scan's fault."""
    try:
        outputs.save(found, path, like=like)
    except OSError as error:
        raise StorageError(f"'{path}' cannot be written ({error.strerror or error})") from error


def _thumbnail(image: torch.Tensor) -> bytes:
    """An image (1, 1, *size) in [0, 1] as (8, 8, 8) bytes, to tell scans that are alike."""
    small = F.adaptive_avg_pool3d(image, 8)
    return small.mul(255).round().to(torch.uint8).cpu().numpy().tobytes()
