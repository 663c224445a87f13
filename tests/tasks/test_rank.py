from pathlib import Path

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
    ExpectConfig,
    FusedRankerConfig,
    PosteriorRankerConfig,
    RunConfig,
)
from onelabel.imaging.prepare import scan_on_grid
from onelabel.imaging.volume import Grid
from onelabel.models import checkpoint, networks
from onelabel.models.checkpoint import Meta
from onelabel.tasks.cohort import SCHEMA, Cohort
from onelabel.tasks.rank import RankTask, rank
from onelabel.tasks.score import Probes

GRID = Grid((7.0, 7.0, 7.0), (32, 32, 32))


def variants(heads: Cohort, folder: Path) -> Cohort:
    """The first head's mask as it is, spoiled in ways that need no network to be seen, and unreadable."""
    head = heads.rows()[0]
    true = nib.load(head["label"])
    data = np.asarray(true.dataobj)
    apart, edge, classes = data.copy(), data.copy(), data.copy()
    apart[1:3, 1:3, 1:3] = 1
    edge[:, 15:17, 15:17] = 1
    classes[:14][data[:14] > 0] = 2
    made = {"true": data, "apart": apart, "edge": edge, "classes": classes, "empty": 0 * data, "full": 0 * data + 1}
    made["small"] = np.where(np.indices(data.shape)[2] > 18, data, 0)
    rows = []
    for name, each in made.items():
        nib.save(nib.Nifti1Image(each, true.affine), folder / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(data[2:], true.affine), folder / "elsewhere.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"no mask")
    for path in sorted(folder.glob("*.nii.gz")):
        key = path.name.removesuffix(".nii.gz")
        rows.append({"key": key, "image": head["image"], "label": str(path), "kind": "given", "weight": 1.0})
    return Cohort(pa.Table.from_pylist(rows, schema=SCHEMA))


@pytest.fixture
def task(ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path) -> RankTask:
    for name, network in (("unet", config.network), ("autoencoder", AutoencoderNetworkConfig(size=64, width=8))):
        torch.manual_seed(0)
        meta = Meta(network.model_dump(mode="json"), name, config.grid.model_dump(mode="json"), 0, 0, "")
        checkpoint.save(tmp_path / "networks" / name, networks.build(network), meta)
    head = heads.rows()[0]
    scan = scan_on_grid(head["image"], head["label"], GRID, bins=BinsConfig(), seed=0)
    ranker = FusedRankerConfig(rankers=(PosteriorRankerConfig(passes=1), AutoencoderRankerConfig()))
    probes = Probes((ray.put(scan),), SynthesisConfig(), ExpectConfig(images=24))
    fitted = (None, tmp_path / "networks" / "autoencoder")
    return RankTask(tmp_path / "networks" / "unet", ranker, fitted, GRID, probes)


def test_what_is_plain_to_see_is_said(heads: Cohort, config: RunConfig, task: RankTask, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    table = rank(variants(heads, folder), task, compute=config.compute)
    rows = {row["key"]: row for row in table.to_pylist()}
    assert rows["true"]["flags"] == ""
    assert rows["apart"]["flags"] == "2 components"
    assert rows["edge"]["flags"] == "touches the edge of the field of view"
    assert rows["classes"]["flags"] == "2 classes taken together"
    assert rows["small"]["flags"].startswith("volume unlike the others'")
    assert rows["empty"]["flags"] == "empty" and rows["empty"]["flag"] and rows["empty"]["score"] is not None
    assert rows["classes"]["score_posterior"] == rows["true"]["score_posterior"]
    assert "broken.nii.gz" in rows["broken"]["error"] and rows["broken"]["score"] is None
    assert "elsewhere.nii.gz has shape" in rows["elsewhere"]["error"]
    scored = [row for row in table.to_pylist() if row["score"] is not None]
    assert [row["score"] for row in scored] == sorted((row["score"] for row in scored), reverse=True)
    assert all(row["expected_low"] <= row["expected_dice"] <= row["expected_high"] for row in scored)


def test_a_mask_needs_no_scan(heads: Cohort, config: RunConfig, task: RankTask, tmp_path: Path) -> None:
    ranker = AutoencoderRankerConfig()
    alone = RankTask(None, ranker, task.fitted[1:], GRID, task.probes)
    rows = [row | {"image": row["label"]} for row in heads.rows()]
    table = rank(
        Cohort(pa.Table.from_pylist([{name: row[name] for name in SCHEMA.names} for row in rows], schema=SCHEMA)),
        alone,
        compute=config.compute,
    )
    assert table["image"].to_pylist() == [None] * 3
    assert table["error"].to_pylist() == [None] * 3
    assert not table["score"].is_null().to_numpy().any()
