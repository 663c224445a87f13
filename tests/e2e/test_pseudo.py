"""Self-training on probabilities: several networks and views, projected, read softly or with an ignored rim."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import torch

from onelabel.configs.load import load
from onelabel.orchestrator import driver

Command = Callable[..., list[str]]
PSEUDO = "{views: {passes: 2}, rounds: 2, project: true}"
SETTINGS = [
    *("stages.*.steps=10", "stages.*.ranker.network.dropout=0", "stages.*.ranker.learner.learning_rate=5.0e-3"),
    *(f"stages.0.pseudo={PSEUDO}", f"stages.1.pseudo={PSEUDO}", "stages.*.expect.images=0"),
    *("stages.1.streams.train.1.soft=true", "stages.1.streams.train.2.ignore=[0.2, 0.8]"),
]


def test_a_run_learns_from_probabilities_and_resumes(ray_cluster: None, asked: Command, tmp_path: Path) -> None:
    config = load(asked(tmp_path, *SETTINGS))
    run = driver.run(config).folder
    tables = [pq.read_table(run / f"round-0{number}" / "scores.parquet") for number in range(2)]
    for row in [row for table in tables for row in table.to_pylist()]:
        assert (row["probability"] is None) == (row["key"] == "broken")
        if row["probability"]:
            written, image = nib.load(row["probability"]), nib.load(row["image"])
            assert written.shape == image.shape and np.allclose(written.affine, image.affine)
            assert written.get_data_dtype() == np.uint8
    # What is lost is made again from the networks of all rounds, which are kept.
    last = run / "round-01"
    before = {path.name: nib.load(path).get_fdata() for path in (last / "probabilities").iterdir()}
    weights = torch.load(last / "checkpoint/weights.pt", weights_only=True)
    for name in ("done", "scores.parquet", "selection.parquet", *(f"probabilities/{name}" for name in before)):
        (last / name).unlink()
    assert driver.run(config).failures == 1  # one scan is broken
    assert (last / "done").is_file()
    timed = ("predict_cpu_s", "rank_cpu_s")
    assert pq.read_table(last / "scores.parquet").drop_columns(timed).equals(tables[1].drop_columns(timed))
    assert all(
        np.array_equal(nib.load(last / "probabilities" / name).get_fdata(), data) for name, data in before.items()
    )
    kept = torch.load(last / "checkpoint/weights.pt", weights_only=True)
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
