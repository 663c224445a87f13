from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onelabel.configs.schema import (
    AutoencoderNetworkConfig,
    AutoencoderRankerConfig,
    ConfidenceRankerConfig,
    FusedRankerConfig,
    RankerConfig,
    UNetConfig,
)
from onelabel.errors import CheckpointError
from onelabel.imaging.volume import Volume
from onelabel.models import checkpoint, networks, quality
from onelabel.models.checkpoint import Meta
from onelabel.models.predictor import Predictor
from onelabel.models.rankers import AutoencoderRanker, ConfidenceRanker
from onelabel.models.rankers.expectation import Expectation, fit

GRID = {"spacing_mm": (4.0, 4.0, 4.0), "size": (16, 16, 16)}


def written(folder: Path, network: UNetConfig | AutoencoderNetworkConfig) -> Path:
    torch.manual_seed(0)
    checkpoint.save(folder, networks.build(network), Meta(network.model_dump(mode="json"), "", GRID, 0, 0, ""))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a network that was never trained, and an autoencoder of that kind beside it."""
    written(tmp_path / "run" / "round-00" / "checkpoint", UNetConfig(channels=(4, 4), patch=1))
    written(tmp_path / "autoencoder", AutoencoderNetworkConfig(size=64, width=8, latent=16))
    return tmp_path / "run"


def expectation(rankers: int) -> Expectation:
    """Scores from 0 to 1 speak for a Dice of half as much."""
    scores = np.linspace(0, 1, 101)
    return fit(np.stack([scores] * rankers), scores / 2)


def saved(run: Path, ranker: RankerConfig, fitted: tuple[Path | None, ...], *, bad: float = 0.9) -> Predictor:
    folder = run / "round-00" / "checkpoint"
    quality.save(folder, ranker, fitted, expectation(len(fitted)), bad=bad)
    return Predictor(folder)


@pytest.fixture
def scan() -> Volume:
    data = np.random.default_rng(0).random((16, 16, 16), dtype=np.float32)
    return Volume(data, np.diag([4.0, 4.0, 4.0, 1.0]))


def test_it_says_of_a_mask_what_the_ranker_would(run: Path, scan: Volume) -> None:
    predictor = saved(run, ConfidenceRankerConfig(), (None,))
    judge = quality.load(run, predictor)
    assert judge
    prediction = predictor(scan)
    seen = prediction.image, prediction.probability, predictor.probability
    (score,) = ConfidenceRanker(ConfidenceRankerConfig()).score(*seen).tolist()
    found = judge(prediction)
    assert found.expected_dice == pytest.approx(score / 2, abs=0.01)
    assert found.expected_low <= found.expected_dice <= found.expected_high
    assert found.flag


def test_it_holds_all_networks_that_it_needs(run: Path, scan: Volume, tmp_path: Path) -> None:
    ranker = FusedRankerConfig(rankers=(ConfidenceRankerConfig(), AutoencoderRankerConfig()))
    predictor = saved(run, ranker, (None, tmp_path / "autoencoder"), bad=0)
    (tmp_path / "autoencoder").rename(tmp_path / "gone")
    judge = quality.load(run, predictor)
    assert judge
    prediction = predictor(scan)
    seen = prediction.image, prediction.probability, predictor.probability
    scores = [
        ConfidenceRanker(ConfidenceRankerConfig()).score(*seen),
        AutoencoderRanker(checkpoint.load(tmp_path / "gone")[0]).score(*seen),
    ]
    assert judge(prediction).expected_dice == pytest.approx(float(sum(scores)) / 4, abs=0.01)


def test_an_empty_mask_is_flagged_whatever_is_expected(run: Path, scan: Volume) -> None:
    predictor = saved(run, ConfidenceRankerConfig(), (None,), bad=0)
    judge = quality.load(run, predictor)
    assert judge
    prediction = predictor(scan)
    empty = replace(prediction, mask=Volume(prediction.mask.data * 0, scan.affine))
    assert judge(empty).flag
    if prediction.mask.data.any():
        assert not judge(prediction).flag


def test_a_checkpoint_without_one_has_none(run: Path) -> None:
    assert quality.load(run, Predictor(run)) is None


def test_it_replaces_an_earlier_one_and_leaves_nothing_else(run: Path) -> None:
    saved(run, ConfidenceRankerConfig(), (None,))
    saved(run, ConfidenceRankerConfig(dilate=4), (None,))
    folder = run / "round-00" / "checkpoint"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert '"dilate": 4' in (folder / "quality" / "ranker.json").read_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [("ranker.json", "{"), ("expectation.json", "{"), ("ranker.json", '{"ranker": {"type": "confidence"}}')],
)
def test_a_damaged_one_is_an_error(run: Path, name: str, text: str) -> None:
    predictor = saved(run, ConfidenceRankerConfig(), (None,))
    (run / "round-00" / "checkpoint" / "quality" / name).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        quality.load(run, predictor)
