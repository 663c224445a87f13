import os
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from onelabel.configs.augmentation import BinsConfig, SynthesisConfig
from onelabel.configs.schema import (
    AutoencoderNetworkConfig,
    AutoencoderRankerConfig,
    ComputeConfig,
    ConfidenceRankerConfig,
    ConsistencyRankerConfig,
    ExpectConfig,
    FusedRankerConfig,
    OracleRankerConfig,
    RandomRankerConfig,
    RunConfig,
)
from onelabel.configs.streams import PseudoLabelConfig, ViewsConfig
from onelabel.errors import DataError, StorageError
from onelabel.imaging import volume
from onelabel.imaging.classes import Classes
from onelabel.imaging.labels import HALF
from onelabel.imaging.prepare import scan_on_grid
from onelabel.imaging.volume import Grid
from onelabel.models import checkpoint, networks
from onelabel.models.checkpoint import Meta
from onelabel.models.predictor import Predictor
from onelabel.models.pseudo import PseudoLabeller
from onelabel.models.rankers import AutoencoderRanker, fuse
from onelabel.tasks.cohort import SCHEMA, Cohort
from onelabel.tasks.score import EXPECTED, Probes, Pseudo, ScoreTask, score
from onelabel.tasks.score_pool import Rows


def test_each_scan_is_a_row_and_a_broken_one_has_an_error(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    extra = pa.table([["broken"], [str(broken)], [None], ["none"], [1.0]], schema=SCHEMA)
    cohort = Cohort(pa.concat_tables([heads.table.select(SCHEMA.names), extra]))
    torch.manual_seed(0)
    for name, network in (("unet", config.network), ("autoencoder", AutoencoderNetworkConfig(size=64, width=8))):
        meta = Meta(network.model_dump(mode="json"), name, config.grid.model_dump(mode="json"), 0, 0, "")
        checkpoint.save(tmp_path / name, networks.build(network), meta)
    ranker = AutoencoderRankerConfig()
    task = ScoreTask(tmp_path / "unet", tmp_path / "masks", ranker, (tmp_path / "autoencoder",))
    compute = config.compute.model_copy(update={"score_actors": 2})
    rows = {row["key"]: row for row in score(cohort, task, compute=compute)[0].to_pylist()}
    assert list(rows) == ["broken", "head0", "head1", "head2"]
    assert "broken.nii.gz" in rows["broken"]["error"]
    assert rows["broken"]["score"] is rows["broken"]["mask"] is None
    for source in heads.rows():
        row = rows[source["key"]]
        mask = nib.load(row["mask"])
        data = np.asarray(mask.dataobj)
        assert row["error"] is None
        assert 0 <= row["score"] <= 1
        assert row["volume_mm3"] == np.count_nonzero(data) * 7.0**3
        assert np.allclose(mask.affine, nib.load(source["image"]).affine)
        truth = np.asarray(nib.load(source["label"]).dataobj) > 0
        assert row["dice"] == 2 * np.sum(truth & (data > 0)) / (truth.sum() + np.count_nonzero(data))
        assert row["miss"] == (not data.any())
        assert row["predict_cpu_s"] > 0 and row["rank_cpu_s"] > 0
    parts = (ranker, ConsistencyRankerConfig(passes=2), ranker)
    fused = replace(task, ranker=FusedRankerConfig(rankers=parts), fitted=(*task.fitted, None, *task.fitted))
    assert fused.columns == ["score_autoencoder", "score_consistency", "score_autoencoder_2"]
    again = {row["key"]: row for row in score(cohort, fused, compute=compute)[0].to_pylist()}
    assert [again["broken"][name] for name in ("score", *fused.columns)] == [None] * 4
    sound = ("head0", "head1", "head2")
    assert all(
        again[key]["score_autoencoder"] == again[key]["score_autoencoder_2"] == rows[key]["score"] for key in sound
    )
    expected = fuse(np.array([[again[key][name] for key in sound] for name in fused.columns]))
    assert [again[key]["score"] for key in sound] == pytest.approx(expected.tolist())


def test_scans_that_stand_aside_are_measured_alone(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    meta = Meta(config.network.model_dump(mode="json"), "supervised", config.grid.model_dump(mode="json"), 0, 0, "")
    checkpoint.save(tmp_path / "unet", networks.build(config.network), meta)
    first, last = Cohort(heads.table.slice(0, 2)), Cohort(heads.table.slice(1, 2))  # they share a key
    parts = (ConfidenceRankerConfig(), ConfidenceRankerConfig())
    pseudo = Pseudo(PseudoLabelConfig(views=ViewsConfig(passes=2)), tmp_path / "shares")
    task = ScoreTask(tmp_path / "unet", tmp_path / "masks", FusedRankerConfig(rankers=parts), (None, None))
    task = replace(task, pseudo=pseudo, aside=tmp_path / "aside")
    scored = score(first, task, aside=last, compute=config.compute)
    assert scored.aside
    table, aside = scored.table.to_pylist(), scored.aside.to_pylist()
    assert [[row["key"] for row in rows] for rows in (table, aside)] == [["head0", "head1"], ["head1", "head2"]]
    assert {tuple(row) for row in table} == {(*task.schema.names, "score_confidence", "score_confidence_2")}
    assert {tuple(row) for row in aside} == {tuple(task.schema.names)}
    assert all(row["score"] is not None and Path(row["mask"]).parent == task.out for row in table)
    assert all(row["score"] is None and Path(row["mask"]).parent == task.aside for row in aside)
    assert all(row["rank_cpu_s"] is None and row["probability"] is None for row in aside)
    measures = ("dice", "hd95_mm", "asd_mm", "miss", "volume_mm3", "thumbnail")
    assert [table[1][name] for name in measures] == [aside[0][name] for name in measures]
    assert not (tmp_path / "shares" / "head2.nii.gz").exists()
    (alone,) = [score(last, replace(task, ranker=None, fitted=(), pseudo=None), compute=config.compute)]
    timed = ("predict_cpu_s", "mask")
    assert alone.aside is None
    assert alone.table.drop_columns(timed).equals(scored.aside.drop_columns(timed))


def test_what_cannot_be_written_is_no_scans_fault(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    meta = Meta(config.network.model_dump(mode="json"), "supervised", config.grid.model_dump(mode="json"), 0, 0, "")
    checkpoint.save(tmp_path / "unet", networks.build(config.network), meta)
    (tmp_path / "masks/head1.nii.gz").mkdir(parents=True)  # in the way
    task = ScoreTask(tmp_path / "unet", tmp_path / "masks")
    with pytest.raises(
        StorageError, match=r"head1.nii.gz' cannot be written \(.*\); make room or mend it, and the same"
    ):
        score(heads, task, compute=config.compute)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("damaged"), ("damaged", None)),
        (ValueError("odd"), ("ValueError: odd", None)),
        (StorageError("'x' cannot be written"), (None, "'x' cannot be written")),
    ],
)
def test_a_row_says_whose_fault_it_is(error: Exception, expected: tuple[str | None, str | None]) -> None:
    class Failing:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            raise error

    names = ("key", "image", "error", "unwritten")
    made = Rows(Failing, pa.schema([(name, pa.string()) for name in names]))(pa.table({"key": ["a"], "label": ["l"]}))
    row = made.to_pylist()[0]
    assert (row["error"], row["unwritten"]) == expected
    assert (row["key"], row["image"]) == ("a", None)


class Deadly:
    """Ends its process over one of the scans, or has a bug."""

    def __init__(self, **_: object) -> None:
        pass

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["key"] == "key03":
            os._exit(1)
        if row["key"] == "bug":
            raise LookupError("no such thing")
        return {"score": float(row["key"][3:])}


def cohort_of(*keys: str) -> Cohort:
    rows = [dict.fromkeys(("key", "image", "label"), key) | {"kind": "dense", "weight": 1.0} for key in keys]
    return Cohort(pa.Table.from_pylist(rows, SCHEMA))


def test_a_scan_that_kills_its_worker_is_a_row_with_an_error(ray_cluster: None, tmp_path: Path) -> None:
    keys = [f"key{number:02d}" for number in range(20)]
    task, compute = ScoreTask(tmp_path, tmp_path), ComputeConfig(score_actors=1)
    table, *_ = score(cohort_of(*keys), task, compute=compute, worker=Deadly)
    rows = {row["key"]: row for row in table.to_pylist()}
    assert list(rows) == keys
    lost = {key for key, row in rows.items() if row["error"]}
    assert lost == {"key03"}
    assert all("died twice over this scan" in rows[key]["error"] and rows[key]["score"] is None for key in lost)
    assert all(rows[key]["score"] == float(key[3:]) for key in set(keys) - lost)


class Filling:
    """Says which scans it saw, and finds no room for the later ones until there is some."""

    def __init__(self, *, task: ScoreTask, **_: object) -> None:
        self.folder = Path(task.out)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        (self.folder / f"{row['key']}-{time.time_ns()}").touch()
        if row["key"] == "key05":
            raise DataError("damaged")
        if row["key"] > "key10" and not (self.folder / "room").exists():
            raise StorageError("no space left")
        return {"score": float(row["key"][3:])}


def test_what_was_scored_before_a_fault_is_not_scored_again(ray_cluster: None, tmp_path: Path) -> None:
    keys = [f"key{number:02d}" for number in range(20)]
    task, compute, keep = ScoreTask(tmp_path, tmp_path / "seen"), ComputeConfig(score_actors=1), tmp_path / "rows"
    with pytest.raises(StorageError, match="no space left"):
        score(cohort_of(*keys), task, compute=compute, worker=Filling, keep=keep)
    assert {path.name[:5] for path in task.out.iterdir()} >= set(keys[:11])
    (task.out / "room").touch()
    table, *_ = score(cohort_of(*keys), task, compute=compute, worker=Filling, keep=keep)
    assert table["key"].to_pylist() == keys
    assert [row["score"] for row in table.to_pylist() if row["key"] != "key05"] == [*range(5), *range(6, 20)]
    seen = Counter(path.name[:5] for path in task.out.iterdir())
    assert {key: seen[key] for key in keys[:11]} == {key: 2 if key == "key05" else 1 for key in keys[:11]}
    other, *_ = score(cohort_of(*keys[:3]), task, compute=compute, worker=Filling, keep=keep)
    assert (
        other["score"].to_pylist() == [0, 1, 2] and Counter(path.name[:5] for path in task.out.iterdir())["key00"] == 2
    )


def test_a_mistake_of_ours_is_not_the_scans(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="LookupError: no such thing"):
        score(cohort_of("bug"), ScoreTask(tmp_path, tmp_path), compute=ComputeConfig(score_actors=1), worker=Deadly)


def test_chance_and_the_oracle_rank_without_a_look(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    meta = Meta(config.network.model_dump(mode="json"), "supervised", config.grid.model_dump(mode="json"), 0, 0, "")
    checkpoint.save(tmp_path / "unet", networks.build(config.network), meta)
    task = ScoreTask(tmp_path / "unet", tmp_path / "masks", OracleRankerConfig())
    compute = config.compute
    assert all(row["score"] == row["dice"] for row in score(heads, task, compute=compute)[0].to_pylist())
    drawn = [
        [
            row["score"]
            for row in score(heads, replace(task, ranker=RandomRankerConfig(), seed=seed), compute=compute)[
                0
            ].to_pylist()
        ]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(0 <= value < 1 for value in drawn[0]) and len(set(drawn[0])) == len(heads)


def test_probes_tell_what_dice_a_score_speaks_for(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    meta = Meta(config.network.model_dump(mode="json"), "supervised", config.grid.model_dump(mode="json"), 0, 0, "")
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "unet", networks.build(config.network), meta)
    head = heads.rows()[0]
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    scan = scan_on_grid(head["image"], head["label"], grid, bins=BinsConfig(), seed=0)
    probes = Probes((ray.put(scan),), SynthesisConfig(), ExpectConfig(images=30, bad=1))
    ranker = FusedRankerConfig(rankers=(ConsistencyRankerConfig(passes=1), ConfidenceRankerConfig()))
    task = ScoreTask(tmp_path / "unet", tmp_path / "masks", ranker, (None, None), probes=probes)
    found, expectation, _ = score(heads, task, compute=config.compute)
    assert expectation and len(expectation.parts) == 2 and expectation.whole
    assert found["key"].to_pylist() == ["head0", "head1", "head2"]
    for row in found.to_pylist():
        assert 0 <= row["expected_low"] <= row["expected_dice"] <= row["expected_high"] <= 1
        assert row["flag"]
        assert len(row["thumbnail"]) == 8**3
    again, *_ = score(heads, task, compute=config.compute)
    assert again.select(EXPECTED).equals(found.select(EXPECTED))
    # What is expected does not depend on who is judged.
    fewer, *_ = score(Cohort(heads.table.slice(0, 1)), task, compute=config.compute)
    assert fewer.select(EXPECTED).equals(found.select(EXPECTED).slice(0, 1))
    chance = replace(task, ranker=RandomRankerConfig(), fitted=())
    assert score(heads, chance, compute=config.compute)[1] is None


def test_pseudo_labels_are_written_beside_the_masks(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    autoencoder = AutoencoderNetworkConfig(size=64, width=8)
    torch.manual_seed(0)
    for name, network in (("now", config.network), ("before", config.network), ("autoencoder", autoencoder)):
        built = networks.build(network)
        for parameter in built.parameters():  # far enough from one half for a structure
            parameter.data *= 1 if name == "autoencoder" else 3
        meta = Meta(network.model_dump(mode="json"), name, config.grid.model_dump(mode="json"), 0, 0, "")
        checkpoint.save(tmp_path / name, built, meta)
    task = ScoreTask(tmp_path / "now", tmp_path / "masks", AutoencoderRankerConfig(), (tmp_path / "autoencoder",))
    plain = score(heads, task, compute=config.compute)[0]
    assert plain["probability"].to_pylist() == [None] * 3 and not (tmp_path / "probabilities").exists()
    views = ViewsConfig(passes=2)
    for project in (False, True):
        settings = PseudoLabelConfig(views=views, rounds=2, project=project)
        pseudo = Pseudo(settings, tmp_path / "probabilities", (tmp_path / "before",))
        table = score(heads, replace(task, pseudo=pseudo), compute=config.compute)[0]
        same = [name for name in table.column_names if name != "probability" and not name.endswith("_cpu_s")]
        assert table.select(same).equals(plain.select(same))
        now, before = (Predictor(tmp_path / name, precision="float32") for name in ("now", "before"))
        ranker = AutoencoderRanker(checkpoint.load(tmp_path / "autoencoder")[0]) if project else None
        labeller = PseudoLabeller(settings, now.probability, earlier=[before.probability], autoencoder=ranker)
        for row in table.to_pylist():
            expected = labeller(now(volume.load(row["image"]))).data
            learnable = (expected > HALF).any() and not (expected > HALF).all()
            assert (row["probability"] is not None) == learnable
            if learnable:
                written = nib.load(row["probability"])
                assert row["probability"] == str(tmp_path / "probabilities" / f"{row['key']}.nii.gz")
                assert np.asarray(written.dataobj).dtype == np.uint8
                assert np.abs(np.asarray(written.dataobj, int) - expected).max() <= 1
                assert np.allclose(written.affine, nib.load(row["image"]).affine)
        assert project or any(table["probability"].to_pylist())


def test_several_structures_are_measured_one_by_one(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    rows = heads.rows()[:2]
    for row in rows:
        mask = nib.load(row["label"])
        label = np.asarray(mask.dataobj).astype(np.uint8)
        label[:14] *= 40  # one half
        row["label"] = str(tmp_path / f"{row['key']}_label.nii.gz")
        nib.save(nib.Nifti1Image(label, mask.affine), row["label"])
    cohort = Cohort(pa.Table.from_pylist(rows, heads.table.schema))
    torch.manual_seed(4)
    network = config.network.model_copy(update={"classes": 3})
    built = networks.build(network)
    for parameter in built.parameters():
        parameter.data *= 3
    labels: Any = {"values": [[0], [40], [1]], "ignore": None, "largest": "class"}
    names = ("background", "left half", "right half")
    grid = config.grid.model_dump(mode="json")
    meta = Meta(network.model_dump(mode="json"), "supervised", grid, 0, 0, "", names, labels=labels)
    checkpoint.save(tmp_path / "unet", built, meta)
    on_grid = partial(scan_on_grid, bins=BinsConfig(), seed=0, classes=Classes(names, **labels))
    where = Grid(config.grid.spacing_mm, config.grid.size)
    scan = on_grid(rows[0]["image"], rows[0]["label"], where)
    task = ScoreTask(
        tmp_path / "unet",
        tmp_path / "masks",
        ConfidenceRankerConfig(),
        (None,),
        probes=Probes((ray.put(scan),), SynthesisConfig(), ExpectConfig(images=4)),
        pseudo=Pseudo(PseudoLabelConfig(), tmp_path / "probabilities"),
        structures=names[1:],
    )
    for row in score(cohort, task, compute=config.compute)[0].to_pylist():
        assert row["error"] is None
        found = np.asarray(nib.load(row["mask"]).dataobj)
        truth = np.asarray(nib.load(tmp_path / f"{row['key']}_label.nii.gz").dataobj)
        assert set(np.unique(found)) <= {0, 1, 40}
        each = [2 * np.sum((found == v) & (truth == v)) / (np.sum(found == v) + np.sum(truth == v)) for v in (40, 1)]
        assert [row["dice_left_half"], row["dice_right_half"]] == pytest.approx(each)
        assert row["dice"] == pytest.approx(np.mean(each))
        assert 0 <= row["expected_dice"] <= 1
        share = nib.load(row["probability"])
        assert share.shape == (*found.shape, 2)
        likeliest = np.asarray(share.dataobj).argmax(-1)[found > 0]
        assert np.mean(likeliest == (found == 1)[found > 0]) > 0.99  # but for bytes that are equal
        again = on_grid(row["image"], row["probability"], where, probability=True)
        assert again.probability is not None and again.probability.shape == (2, *config.grid.size)
        assert set(np.unique(again.target)) <= {0, 1, 2}
