"""The compiled engine and its twin in torch make the same images."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onelabel.configs.augmentation import AugmentConfig, BinsConfig, DeformConfig, SynthesisConfig
from onelabel.imaging import augment, deform, synthesis
from onelabel.imaging.augment import Spread
from onelabel.imaging.labels import IGNORE, BinnedScan, bin_scan, read_probability

SPACING_MM = (3.0, 2.5, 4.0)
CPU = torch.device("cpu")
ALONE: dict[str, dict[str, Any]] = {
    name: {other: {"probability": float(other == name)} for other in AugmentConfig.model_fields}
    for name in AugmentConfig.model_fields
}


def with_unknown(scan: BinnedScan) -> BinnedScan:
    target = scan.target.copy()
    target[:, 10:14] = IGNORE
    return replace(scan, target=target)


def assert_twins(scan: BinnedScan, seeds: range, *, real: bool = False, **settings: Any) -> None:
    config = SynthesisConfig.model_validate(settings)
    same, close, voxels = 0, 0, 0
    for seed in seeds:
        source = torch.Generator().manual_seed(seed)
        params = synthesis.sample_params(scan, config, spacing_mm=SPACING_MM, real=real, generator=source)
        image, label = synthesis.synthesise(scan, params, spacing_mm=SPACING_MM)
        twin, twin_label = synthesis.in_torch(scan, params, spacing_mm=SPACING_MM, device=CPU)
        same += int((label == twin_label).sum())
        close += int(((image / 255 - twin).abs() <= 0.01).sum())
        voxels += label.numel()
    assert same / voxels >= 0.9999
    assert close / voxels >= 0.999


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("stripped", [0, 1])
@pytest.mark.parametrize("unknown", [False, True])
def test_both_engines_make_the_same_images(scan: BinnedScan, real: bool, stripped: int, unknown: bool) -> None:
    often = {name: {"probability": 0.6} for name in AugmentConfig.model_fields}
    source = with_unknown(scan) if unknown else scan
    assert_twins(source, range(50), real=real, strip={"probability": stripped}, augment=often)


@pytest.mark.parametrize("effect", sorted(ALONE))
@pytest.mark.parametrize("real", [False, True])
def test_both_engines_have_the_same_effects(scan: BinnedScan, real: bool, effect: str) -> None:
    assert_twins(scan, range(100, 110), real=real, augment=ALONE[effect])


def test_both_engines_make_the_same_images_at_default_settings(scan: BinnedScan) -> None:
    assert_twins(scan, range(60))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("deform_far", [{"translate_mm": 200}, {"scale": (3, 5)}, {"warp_mm": (60, 60)}])
def test_both_engines_look_far_outside_alike(scan: BinnedScan, real: bool, deform_far: dict[str, Any]) -> None:
    assert_twins(scan, range(12), real=real, deform=deform_far)


@pytest.mark.parametrize("size", [(2, 3, 2), (8, 8, 8), (5, 70, 9), (33, 17, 130), (66, 65, 3)])
@pytest.mark.parametrize("real", [False, True])
def test_both_engines_make_the_same_images_of_any_size(size: tuple[int, int, int], real: bool) -> None:
    rng = np.random.default_rng(3)
    mask = np.zeros(size, np.int32)
    mask[size[0] // 4 : -1, size[1] // 3 : -1, : size[2] // 2] = 1
    scan = bin_scan(rng.random(size, np.float32), mask, spacing_mm=SPACING_MM, config=BinsConfig())
    assert_twins(scan, range(12), real=real)


def test_both_engines_know_several_structures(head: tuple[np.ndarray, np.ndarray]) -> None:
    image, mask = head
    mask = np.where(mask & (np.arange(mask.shape[0]) > 9)[:, None, None], 2, mask)
    scan = bin_scan(image, mask, spacing_mm=SPACING_MM, config=BinsConfig(), classes=3)
    assert set(np.unique(scan.target)) == {0, 1, 2}
    assert_twins(with_unknown(scan), range(20), strip={"probability": 0.5})


def test_a_device_other_than_the_cpu_gets_rounded_bytes(scan: BinnedScan) -> None:
    source = torch.Generator().manual_seed(8)
    params = synthesis.sample_params(scan, SynthesisConfig(), spacing_mm=SPACING_MM, generator=source)
    twin, twin_label = synthesis.in_torch(scan, params, spacing_mm=SPACING_MM, device=CPU)
    # Only the plain name chooses the compiled engine.
    image, label = synthesis.synthesise(scan, params, spacing_mm=SPACING_MM, device="cpu:0")
    assert (image.dtype, label.dtype) == (torch.uint8, torch.int8)
    assert torch.equal(label, twin_label)
    assert ((image / 255 - twin).abs() <= 0.5 / 255 + 1e-5).all()


# Filters


def assert_spread_alike(image: np.ndarray, along: tuple[Spread | None, ...]) -> None:
    before = image.copy()
    expected = augment.spread(torch.from_numpy(before), along)
    augment.spread_in_place(image, along)
    assert np.abs(image - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("size", range(2, 41))
def test_filters_in_place_are_filters(axis: int, size: int) -> None:
    rng = np.random.default_rng(size)
    # 63 to 130 columns: less than a block, one, and more than two.
    others = [(7, 9), (8, 8), (10, 13)][size % 3]
    shape = (*others[:axis], size, *others[axis:])
    widths = [(0.3, 0), (1, 0), (3.3, 0), (2 * size, 0), (0, 1.01), (0, 1.7), (0, 4), (0, size), (0, 2 * size)]
    for fwhm, factor in [*widths, (2.5, 3.1), (2 * size, 2), (rng.uniform(0, size), rng.uniform(0, size))]:
        one = augment.spread_of(size, fwhm=fwhm, factor=factor)
        assert one is not None
        along = tuple(one if i == axis else None for i in range(3))
        assert_spread_alike(rng.random(shape, np.float32), along)


def test_filters_of_all_axes_in_place_are_filters() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = tuple(rng.integers(2, 41, 3).tolist())
        along = tuple(
            augment.spread_of(n, fwhm=rng.choice([0, rng.uniform(0, 9)]), factor=rng.choice([0, rng.uniform(0, 9)]))
            for n in size
        )
        assert_spread_alike(rng.random(size, np.float32), along)


def test_no_filter_leaves_an_image_as_it_is() -> None:
    image = np.random.default_rng(0).random((4, 5, 6), np.float32)
    before = image.copy()
    augment.spread_in_place(image, (None, None, None))
    assert np.array_equal(image, before)


# Labels alone


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("unknown", [False, True])
def test_moved_labels_are_looked_up(scan: BinnedScan, frozen: bool, unknown: bool) -> None:
    target = (with_unknown(scan) if unknown else scan).target.copy()
    target.setflags(write=not frozen)
    same, seen = [], set()
    for seed, far in itertools.product(range(30), (16, 100)):
        deformation = deform.sample_deformation(
            DeformConfig(translate_mm=far),
            size=target.shape,
            spacing_mm=SPACING_MM,
            generator=torch.Generator().manual_seed(seed),
        )
        moved = synthesis.move(target, deformation, spacing_mm=SPACING_MM)
        place = deform.coordinates(deformation, size=target.shape, spacing_mm=SPACING_MM, device=CPU)
        index, inside = deform.nearest(place, size=target.shape)
        expected = (target.reshape(-1)[index.numpy()] * inside.numpy()).reshape(target.shape)
        assert (moved.shape, moved.dtype) == (target.shape, np.int8)
        same.append((moved == expected).mean())
        seen |= set(np.unique(moved))
    assert np.mean(same) >= 0.9999
    assert seen == ({IGNORE, 0, 1} if unknown else {0, 1})


def test_labels_move_alone_as_with_their_image(scan: BinnedScan) -> None:
    still = {name: {"probability": 0} for name in AugmentConfig.model_fields}
    config = SynthesisConfig.model_validate({"augment": still})
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        params = synthesis.sample_params(scan, config, spacing_mm=SPACING_MM, generator=source)
        _, label = synthesis.synthesise(scan, params, spacing_mm=SPACING_MM)
        assert np.array_equal(synthesis.move(scan.target, params.deformation, spacing_mm=SPACING_MM), label.numpy())


class _Waits(TorchDispatchMode):
    """Notes the calls for which a GPU's host would have to wait."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in function.__name__ for name in self.NAMES):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("real", [False, True])
def test_the_torch_engine_never_waits_for_its_device(scan: BinnedScan, real: bool) -> None:
    often = {name: {"probability": 1} for name in AugmentConfig.model_fields}
    config = SynthesisConfig.model_validate({"strip": {"probability": 1}, "augment": often})
    source = torch.Generator().manual_seed(0)
    params = synthesis.sample_params(scan, config, spacing_mm=SPACING_MM, real=real, generator=source)
    with _Waits() as waits:
        synthesis.in_torch(scan, params, spacing_mm=SPACING_MM, device=CPU)
    assert not waits.found
    with _Waits() as waits:
        torch.ones(3).sum().item()
    assert waits.found


# Probabilities


def read(scan: BinnedScan, how: dict[str, Any] | None, seed: int, engine: str, *, real: bool) -> tuple[Any, Any]:
    """One pair, and all else drawn alike."""
    config = SynthesisConfig.model_validate({"strip": {"probability": 0.5}})
    source = torch.Generator().manual_seed(seed)
    params = synthesis.sample_params(scan, config, spacing_mm=SPACING_MM, real=real, generator=source)
    if how is not None and scan.probability is not None:
        params = replace(params, target=read_probability(scan.probability, **how))
    if engine == "torch":
        return synthesis.in_torch(scan, params, spacing_mm=SPACING_MM, device=CPU)
    return synthesis.synthesise(scan, params, spacing_mm=SPACING_MM)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("how", [{"threshold": 0.1}, {"threshold": 0.9}, {"ignore": (0.1, 0.8)}], ids=str)
def test_both_engines_read_probabilities_alike(graded: BinnedScan, how: dict[str, Any], real: bool) -> None:
    same, close, seen = [], [], set()
    for seed in range(30):
        image, label = read(graded, how, seed, "compiled", real=real)
        twin, twin_label = read(graded, how, seed, "torch", real=real)
        same.append((label == twin_label).float().mean())
        close.append(((image / 255 - twin).abs() <= 0.01).float().mean())
        seen |= set(label.unique().tolist()) | set(twin_label.unique().tolist())
    assert np.mean(same) >= 0.9999
    assert np.mean(close) >= 0.999
    assert graded.probability is not None
    assert seen == set(np.maximum(read_probability(graded.probability, **how), IGNORE).flatten().tolist())


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("engine", ["compiled", "torch"])
def test_a_threshold_makes_the_mask_that_it_leaves(graded: BinnedScan, engine: str, real: bool) -> None:
    assert graded.probability is not None
    for seed, threshold in enumerate((0.05, 0.5, 0.95)):
        hard = replace(graded, target=(graded.probability[0] > 255 * threshold).astype(np.int8), probability=None)
        one = read(graded, {"threshold": threshold}, seed, engine, real=real)
        other = read(hard, None, seed, engine, real=real)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("engine", ["compiled", "torch"])
def test_what_is_ignored_keeps_its_look(graded: BinnedScan, engine: str, real: bool) -> None:
    unknown = 0
    for seed in range(8):
        image, label = read(graded, {"ignore": (0.2, 0.8)}, seed, engine, real=real)
        plain, hard = read(graded, None, seed, engine, real=real)
        assert torch.equal(image, plain)
        assert torch.equal(label[label != IGNORE], hard[label != IGNORE])
        unknown += int((label == IGNORE).sum())
    assert unknown
