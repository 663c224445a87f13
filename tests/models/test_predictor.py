from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import cc3d
import fill_voids
import numpy as np
import pytest
import torch
from torch import nn

from onelabel.configs.schema import UNetConfig
from onelabel.errors import CheckpointError
from onelabel.imaging.classes import Classes
from onelabel.imaging.metrics import dice
from onelabel.imaging.volume import Volume
from onelabel.models import checkpoint
from onelabel.models.checkpoint import Meta
from onelabel.models.networks.unet import UNet
from onelabel.models.predictor import Predictor, classes_of, clean, likeliest

ORIENTATIONS = [
    np.array([[sign * (axis == column) for axis in range(3)] for sign, column in zip(signs, order, strict=True)])
    for order in permutations(range(3))
    for signs in product((1, -1), repeat=3)
]
SPACING_MM = (4.0, 4.0, 4.0)
SHAPE = (18, 22, 16)


def thresholder(folder: Path) -> Predictor:
    """A predictor whose network calls foreground what is brighter than one half."""
    config = UNetConfig(channels=(1,), patch=1, norm="none")
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for convolution in [network.stem, *(m for m in network.down.modules() if isinstance(m, nn.Conv3d))]:
            convolution.weight[:, :, 1, 1, 1] = 1
        network.head.weight[:, 1] = 60
        assert network.head.bias is not None
        network.head.bias[1] = -30
    grid = {"spacing_mm": [4.0, 4.0, 4.0], "size": [24, 28, 24]}
    checkpoint.save(folder, network, Meta(config.model_dump(mode="json"), "supervised", grid, 0, 0, ""))
    return Predictor(folder, precision="float32")


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return thresholder(tmp_path_factory.mktemp("bright") / "checkpoint")


def scan_of(matrix: np.ndarray, shape: tuple[int, ...] = SHAPE, spacing: tuple[float, ...] = SPACING_MM) -> Volume:
    """A bright ellipsoid off the centre, no axis like another."""
    affine = np.eye(4)
    affine[:3, :3] = matrix * spacing
    affine[:3, 3] = [20, -30, 11]
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    middle = (np.array(shape) - 1) / 2
    world = (index - middle) @ affine[:3, :3].T
    inside = (((world - [4, -3, 2]) / [24, 32, 18]) ** 2).sum(-1) < 1
    return Volume(np.where(inside, 900, 30).astype(np.float32), affine)


@pytest.mark.parametrize("matrix", ORIENTATIONS, ids=lambda m: "".join(f"{v:+d}" for v in (m * [1, 2, 3]).sum(1)))
def test_masks_lie_where_the_structure_is_in_every_orientation(bright: Predictor, matrix: np.ndarray) -> None:
    scan = scan_of(matrix)
    before = scan.data.copy()
    prediction = bright(scan)
    assert prediction.mask.data.dtype == np.uint8
    assert np.array_equal(prediction.mask.affine, scan.affine)
    assert np.array_equal(prediction.mask.data, scan.data > 500)
    assert np.array_equal(scan.data, before)


@pytest.mark.parametrize("shape", [(60, 60, 12), (12, 40, 50), (30, 31, 32)])
def test_masks_have_the_scans_own_voxels(bright: Predictor, shape: tuple[int, ...]) -> None:
    spacing = tuple(88 / n for n in shape)
    turn = np.deg2rad(15)
    matrix = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    scan = scan_of(matrix, shape, spacing)
    prediction = bright(scan)
    assert prediction.mask.shape == shape
    assert np.array_equal(prediction.mask.affine, scan.affine)
    assert dice(prediction.mask.data, scan.data > 500) > 0.9


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("matrix", ORIENTATIONS[::7])
def test_a_mask_that_the_grid_cuts_off_is_called_so(bright: Predictor, matrix: np.ndarray, axis: int) -> None:
    """A rod that leaves the network's grid, one that ends with the scan, and one that ends in the grid."""
    shape = np.array([18, 18, 18])
    shape[axis] = 40
    affine = np.eye(4)
    affine[:3, :3] = matrix * SPACING_MM
    data = np.full(shape, 30, np.float32)
    middle = tuple(slice(None) if a == axis else slice(6, 12) for a in range(3))
    data[middle] = 900
    assert bright(Volume(data, affine)).cut
    short = tuple(slice(11, 29) if a == axis else slice(None) for a in range(3))
    assert not bright(Volume(data[short], affine)).cut
    ended = data.copy()
    for end in (slice(0, 15), slice(-15, None)):
        ended[tuple(end if a == axis else slice(None) for a in range(3))] = 30
    assert not bright(Volume(ended, affine)).cut


def test_predictions_keep_what_rankers_need(bright: Predictor) -> None:
    prediction = bright(scan_of(np.eye(3, dtype=int)))
    assert prediction.image.shape == (1, 1, 24, 28, 24)
    assert prediction.probability.shape == (1, 2, 24, 28, 24)
    assert prediction.probability.dtype == torch.float32
    assert torch.allclose(prediction.probability.sum(1), torch.ones(1, 24, 28, 24))
    assert 0 <= prediction.image.min() and prediction.image.max() <= 1
    assert not prediction.probability.requires_grad
    assert torch.equal(bright.probability(prediction.image), prediction.probability)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_random_weights_give_a_clean_mask_all_the_same(
    saved: Callable[..., tuple[Path, nn.Module, Meta]], precision: str
) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        folder, _, _ = saved(f"checkpoint-{seed}")
        scan = scan_of(np.eye(3, dtype=int))
        mask = Predictor(folder, precision=precision)(scan).mask.data
        assert mask.shape == scan.shape
        assert set(np.unique(mask)) <= {0, 1}
        assert cc3d.connected_components(mask, connectivity=6).max() <= 1
        assert np.array_equal(fill_voids.fill(mask), mask)


def test_prediction_repeats(saved: Callable[..., tuple[Path, nn.Module, Meta]]) -> None:
    folder, _, _ = saved()
    scan = scan_of(np.eye(3, dtype=int))
    one, two = Predictor(folder)(scan), Predictor(folder)(scan)
    assert torch.equal(one.probability, two.probability)
    assert np.array_equal(one.mask.data, two.mask.data)


def test_a_predictor_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Predictor(tmp_path)


def test_cleaning_keeps_the_largest_part_and_fills_it() -> None:
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[2:9, 2:9, 2:9] = 1
    mask[5, 5, 5] = 0
    mask[10, 10, 10] = 1
    mask[9, 9, 9] = 1  # touches at a corner alone
    before = mask.copy()
    cleaned = clean(mask)
    assert np.array_equal(mask, before)
    assert cleaned.dtype == np.uint8
    assert cleaned[5, 5, 5] == 1
    assert cleaned.sum() == 7**3
    assert np.array_equal(clean(cleaned), cleaned)


def test_cleaning_keeps_classes() -> None:
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[2:9, 2:9, 2:9] = 1
    mask[2:9, 2:9, 5:9] = 2
    mask[11, 11, 11] = 2
    cleaned = clean(mask)
    assert np.array_equal(cleaned[:10], mask[:10])
    assert not cleaned[11].any()


def test_each_class_is_one_piece() -> None:
    several = Classes(("background", "a", "b"), ((0,), (5,), (9,)))
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[1:5, 1:5, 1:5] = 1
    mask[8:15, 8:15, 8:15] = 2
    mask[11, 11, 11] = 1  # in the midst of the other
    mask[10, 10, 10] = 0  # a hole
    mask[1:3, 12:14, 1:3] = 2
    cleaned = clean(mask, several)
    expected = np.zeros_like(mask)
    expected[1:5, 1:5, 1:5], expected[8:15, 8:15, 8:15] = 1, 2
    assert np.array_equal(cleaned, expected)
    together = clean(mask, replace(several, largest="all"))
    expected[1:5, 1:5, 1:5], expected[11, 11, 11] = 0, 1
    assert np.array_equal(together, expected)


def test_the_likeliest_class_is_taken() -> None:
    share = np.array([[0.3, 0.4, 0.2, 0.6], [0.3, 0.35, 0.1, 0.0]], np.float32)
    assert classes_of(share).tolist() == [0, 1, 0, 1]
    one = np.random.default_rng(0).random((1, 1000), np.float32)
    assert np.array_equal(classes_of(one), np.vstack([1 - one, one]).argmax(0))


def test_masks_hold_the_values_of_the_labelled_scans(tmp_path: Path) -> None:
    config = UNetConfig(channels=(4,), patch=1, classes=4)
    grid = {"spacing_mm": [4.0, 4.0, 4.0], "size": [8, 8, 8]}
    values = {"values": [[0], [40], [7, 8], [300]], "ignore": 255, "largest": "all"}
    meta = Meta(config.model_dump(mode="json"), "", grid, 0, 0, "", ("background", "a", "b", "c"), labels=values)
    checkpoint.save(tmp_path / "c", UNet(config), meta)
    predictor = Predictor(tmp_path / "c", precision="float32")
    assert predictor.classes == Classes(("background", "a", "b", "c"), ((0,), (40,), (7, 8), (300,)), 255, "all")
    image = np.random.default_rng(0).random((8, 8, 8), np.float32)
    found = predictor(Volume(image, np.diag([4.0, 4.0, 4.0, 1.0]))).mask.data
    assert found.dtype == np.uint16
    assert set(np.unique(found)) <= {0, 40, 7, 300}


def test_windows_find_what_the_whole_shows(bright: Predictor, tmp_path: Path) -> None:
    scan = scan_of(np.eye(3))
    meta = replace(bright.meta, grid=bright.meta.grid | {"patch": [16, 12, 8], "balance": 0.5})
    checkpoint.save(tmp_path / "c", bright.network, meta)
    sliding = Predictor(tmp_path / "c", precision="float32")
    assert sliding.window == (16, 12, 8) and bright.window is None
    one, other = bright(scan), sliding(scan)
    assert torch.allclose(one.probability, other.probability, atol=1e-5)
    assert np.array_equal(one.mask.data, other.mask.data)


def test_a_network_over_slices_sees_them_all(tmp_path: Path) -> None:
    config = UNetConfig(dims=2, channels=(4, 4), patch=1, across=0)
    grid = {"spacing_mm": [9.0, 2.0, 2.0], "size": [11, 16, 16], "patch": [4, 16, 16]}
    checkpoint.save(tmp_path / "c", UNet(config), Meta(config.model_dump(mode="json"), "supervised", grid, 0, 0, ""))
    predictor = Predictor(tmp_path / "c", precision="float32")
    assert predictor.window == (11, 16, 16)
    image = torch.rand(1, 1, 11, 16, 16)
    assert torch.allclose(predictor.probability(image)[:, :, 3:4], predictor.probability(image[:, :, 3:4]), atol=1e-5)
    assert torch.equal(predictor.probability(image), predictor.network(image).softmax(1))


@pytest.mark.parametrize("value", [0, 1])
def test_cleaning_nothing_or_everything(value: int) -> None:
    mask = np.full((6, 7, 8), value, np.uint8)
    assert np.array_equal(clean(mask), mask)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_likeliest_class_is_the_first_of_the_highest(classes: int) -> None:
    probability = torch.rand(2, classes, 5, 6, 7).mul(4).round()  # many are equal
    values, found = probability.numpy(), likeliest(probability).numpy()
    assert np.array_equal(found, values.argmax(1))


def test_dropout_is_on_only_when_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = UNetConfig(channels=(4, 4), patch=1, dropout=0.5)
    grid = {"spacing_mm": [4.0, 4.0, 4.0], "size": [8, 8, 8]}
    checkpoint.save(tmp_path / "c", UNet(config), Meta(config.model_dump(mode="json"), "supervised", grid, 0, 0, ""))
    predictor = Predictor(tmp_path / "c", precision="float32")
    image = torch.rand(1, 1, 8, 8, 8)
    plain = predictor.probability(image)
    one, two = (predictor.probability(image, dropout=True) for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(plain, predictor.probability(image))
