import itertools
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onelabel.configs.augmentation import AugmentConfig
from onelabel.imaging import augment, volume
from onelabel.imaging.augment import Appearance

SIZE = (20, 24, 16)
SPACING_MM = (3.0, 2.5, 4.0)
OFF: dict[str, dict[str, Any]] = {name: {"probability": 0} for name in AugmentConfig.model_fields}
# Each effect at full strength, and at none.
STRONG: dict[str, dict[str, Any]] = {
    "bias": {"probability": 1, "strength": (0.6, 0.6)},
    "gamma": {"probability": 1, "log_exponent": (0.6, 0.6)},
    "blur": {"probability": 1, "fwhm_mm": (8, 8)},
    "low_resolution": {"probability": 1, "spacing_mm": (9, 9)},
    "motion": {"probability": 1, "shift_mm": 15, "rotate_deg": 15},
    "lines": {"probability": 1, "count": (3, 3)},
    "noise": {"probability": 1, "sd": (0.1, 0.1)},
    "crop": {"probability": 1, "share": (0.3, 0.3)},
}
WEAK: dict[str, dict[str, Any]] = {
    "bias": {"probability": 1, "strength": (0, 0)},
    "gamma": {"probability": 1, "log_exponent": (0, 0)},
    "blur": {"probability": 1, "fwhm_mm": (0, 0)},
    "low_resolution": {"probability": 1, "spacing_mm": (0, 2)},
    "motion": {"probability": 1, "shift_mm": 0, "rotate_deg": 0},
    "lines": {"probability": 0},  # a slice is lost or not
    "noise": {"probability": 1, "sd": (0, 0)},
    "crop": {"probability": 1, "share": (0, 0)},
}
EFFECTS = sorted(AugmentConfig.model_fields)


def sampled(seed: int = 0, *, size: Any = SIZE, spacing_mm: Any = SPACING_MM, **effects: dict[str, Any]) -> Appearance:
    """The parameters of some effects, all others off."""
    config = AugmentConfig.model_validate(OFF | effects)
    return augment.sample(config, size=size, spacing_mm=spacing_mm, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def image() -> Tensor:
    """(20, 24, 16): random in [0, 1], with a dark margin."""
    image = torch.rand(SIZE, generator=torch.Generator().manual_seed(9))
    image[:3] = 0
    return image


def test_every_effect_is_tested() -> None:
    assert set(EFFECTS) == set(STRONG) == set(WEAK)


@pytest.mark.parametrize("effect", EFFECTS)
def test_an_effect_changes_the_image_but_not_its_input(image: Tensor, effect: str) -> None:
    before = image.clone()
    done = augment.apply(image, sampled(**{effect: STRONG[effect]}))
    assert torch.equal(image, before)
    assert done.dtype == torch.float32
    assert done.shape == image.shape
    assert 0 <= done.min() and done.max() <= 1
    assert not torch.allclose(done, augment.rescale(image), atol=1e-3)


@pytest.mark.parametrize("settings", [OFF, WEAK], ids=["never", "at no strength"])
@pytest.mark.parametrize("effect", EFFECTS)
def test_an_effect_without_strength_is_the_identity(image: Tensor, effect: str, settings: dict[str, Any]) -> None:
    before = image.clone()
    done = augment.apply(image, sampled(**{effect: settings[effect]}))
    assert torch.allclose(done, augment.rescale(image), atol=1e-5)
    assert torch.equal(image, before)


@pytest.mark.parametrize("effect", EFFECTS)
def test_the_same_parameters_give_the_same_bytes(image: Tensor, effect: str) -> None:
    one, two = (augment.apply(image, sampled(4, **{effect: STRONG[effect]})) for _ in range(2))
    assert torch.equal(one, two)


def test_all_effects_together_repeat_and_differ_between_seeds(image: Tensor) -> None:
    one, two, other = (augment.apply(image, sampled(seed, **STRONG)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.allclose(one, other, atol=0.05)


def test_global_state_is_neither_read_nor_changed(image: Tensor) -> None:
    state = torch.get_rng_state()
    one = augment.apply(image, sampled(3, **STRONG))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    assert torch.equal(one, augment.apply(image, sampled(3, **STRONG)))


@pytest.mark.parametrize("effect", EFFECTS)
def test_probability_is_how_often(effect: str) -> None:
    def happens(seed: int) -> bool:
        drawn = sampled(seed, **{effect: STRONG[effect] | {"probability": 0.3}})
        idle = sampled(seed)
        # noise_seed is drawn in any case.
        return any(
            not _same(getattr(drawn, field.name), getattr(idle, field.name))
            for field in fields(Appearance)
            if field.name != "noise_seed"
        )

    assert 35 <= sum(happens(seed) for seed in range(200)) <= 85


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)
    return bool(one == two)


def matrix_of(size: int, *, fwhm: float, factor: float) -> Tensor:
    """What a spread does to an axis, (size, size)."""
    spread = augment.spread_of(size, fwhm=fwhm, factor=factor)
    assert spread is not None
    return spread.matrix()


@pytest.mark.parametrize("fwhm", [0.0, 0.5, 2.0, 6.0, 90.0])
@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5, 3.0, 7.0, 50.0])
@pytest.mark.parametrize("size", [2, 3, 24])
def test_a_spread_keeps_constants(size: int, fwhm: float, factor: float) -> None:
    if fwhm == 0 and factor <= 1:
        assert augment.spread_of(size, fwhm=fwhm, factor=factor) is None
        return
    matrix = matrix_of(size, fwhm=fwhm, factor=factor)
    assert matrix.shape == (size, size)
    assert matrix.dtype == torch.float32
    assert (matrix >= 0).all()
    assert torch.allclose(matrix.sum(1), torch.ones(size), atol=1e-5)


@pytest.mark.parametrize("fwhm", [0.3, 1.0, 4.0, 11.0])
def test_blur_is_a_gaussian_but_for_its_tails(fwhm: float) -> None:
    distance = torch.arange(40)[:, None] - torch.arange(40)[None]
    whole = torch.exp2(-((2 * distance / fwhm) ** 2))
    assert torch.allclose(matrix_of(40, fwhm=fwhm, factor=0), whole / whole.sum(1, keepdim=True), atol=2e-3)


def width_at_half_maximum(line: Tensor) -> float:
    """Full width of a peak in samples, interpolated."""
    values, half = line.tolist(), line.max().item() / 2
    left = next(i for i, value in enumerate(values) if value >= half)
    right = len(values) - 1 - next(i for i, value in enumerate(reversed(values)) if value >= half)
    before = (half - values[left - 1]) / (values[left] - values[left - 1])
    after = (half - values[right + 1]) / (values[right] - values[right + 1])
    return (right + 1 - after) - (left - 1 + before)


@pytest.mark.parametrize("fwhm", [2.0, 4.0, 7.5])
def test_blur_has_its_width_at_half_maximum(fwhm: float) -> None:
    matrix = matrix_of(61, fwhm=fwhm, factor=0)
    assert width_at_half_maximum(matrix[30]) == pytest.approx(fwhm, rel=0.03)


def test_blur_is_in_mm() -> None:
    size, spacing = (61, 61, 61), (1.0, 2.0, 4.0)
    drawn = sampled(size=size, spacing_mm=spacing, blur={"probability": 1, "fwhm_mm": (12, 12)})
    for one, step in zip(drawn.spread, spacing, strict=True):
        assert one is not None
        assert width_at_half_maximum(one.matrix()[30]) * step == pytest.approx(12, rel=0.03)


def test_blur_spreads_an_impulse_alike_along_each_axis(image: Tensor) -> None:
    impulse = torch.zeros(SIZE)
    impulse[10, 12, 8] = 1
    drawn = sampled(blur={"probability": 1, "fwhm_mm": (9, 9)})
    done = augment.spread(impulse, drawn.spread)
    assert done.sum() == pytest.approx(1, abs=0.05)
    lines = (done[:, 12, 8], done[10, :, 8], done[10, 12, :])
    for line, step in zip(lines, SPACING_MM, strict=True):
        assert width_at_half_maximum(line) * step == pytest.approx(9, rel=0.1)
    # Axis by axis or all at once is the same.
    x, y, z = drawn.spread
    parts = augment.spread(augment.spread(augment.spread(impulse, (x, None, None)), (None, None, z)), (None, y, None))
    assert torch.allclose(parts, done, atol=1e-6)


def test_low_resolution_loses_what_is_fine_and_keeps_what_is_coarse() -> None:
    matrix = matrix_of(64, fwhm=0, factor=4)
    assert int(torch.linalg.matrix_rank(matrix)) == 17, "one value for each coarse voxel, from end to end"
    place = torch.arange(64)
    fine, coarse = torch.cos(math.pi * place), torch.cos(2 * math.pi * place / 64)
    assert (matrix @ fine)[8:-8].abs().max() < 0.05
    assert torch.allclose((matrix @ coarse)[8:-8], coarse[8:-8], atol=0.1)


def test_low_resolution_is_in_mm_and_on_one_axis_or_all() -> None:
    axes = []
    for seed in range(60):
        low = {"probability": 1, "spacing_mm": (10, 10), "one_axis": 0.5}
        spread = sampled(seed, spacing_mm=(1, 2, 20), low_resolution=low).spread
        # The third axis is coarser as it is.
        assert spread[2] is None
        ranks = [None if one is None else int(torch.linalg.matrix_rank(one.matrix())) for one in spread[:2]]
        axes.append((ranks[0] is not None, ranks[1] is not None))
        assert ranks[0] in (None, round((SIZE[0] - 1) / 10) + 1)
        assert ranks[1] in (None, round((SIZE[1] - 1) * 2 / 10) + 1)
    assert {(True, True), (True, False), (False, True), (False, False)} == set(axes)
    assert 15 <= axes.count((True, True)) <= 45


def test_noise_has_its_standard_deviation() -> None:
    size = (32, 32, 32)
    flat = torch.full(size, 0.5)
    flat[:16] = 0.0
    flat[0] = 1.0
    clean = augment.apply(flat, sampled(size=size))
    noisy = augment.apply(flat, sampled(size=size, noise={"probability": 1, "sd": (0.05, 0.05)}))
    assert clean[20:].std() < 1e-6
    # Rescaling makes of the noise's darkest and brightest values about 0 and 1.
    assert 0.04 < noisy[20:].std() < 0.06
    assert noisy[2:15].std() < 0.05, "air is folded to positive values"
    one, two = (sampled(seed, noise=STRONG["noise"]).noise_seed for seed in (0, 1))
    assert one != two


def test_bias_is_smooth_and_darkens_at_most_as_said() -> None:
    for seed in range(8):
        drawn = sampled(seed, bias={"probability": 1, "strength": (0.4, 0.4)})
        assert drawn.bias is not None
        field = augment.splines.evaluate(drawn.bias, SIZE)[0]
        assert field.min() == pytest.approx(0.6, abs=0.01) and field.max() == pytest.approx(1, abs=0.01)
        assert field.max() - field.min() > 0.03
        assert max(field.diff(dim=axis).abs().max().item() for axis in range(3)) < 0.1


def test_gamma_bends_but_keeps_the_order(image: Tensor) -> None:
    for sign in (-1, 1):
        done = augment.apply(image, sampled(gamma={"probability": 1, "log_exponent": (0.5 * sign, 0.5 * sign)}))
        plain = augment.rescale(image)
        order = image.flatten().argsort()
        assert (done.flatten()[order].diff() >= -1e-5).all()
        middle = (plain > 0.2) & (plain < 0.8)
        assert ((done[middle] - plain[middle]).mean() * sign) < -0.03, "an exponent above one darkens"


def test_crop_empties_one_side(image: Tensor) -> None:
    sides = set()
    for seed in range(40):
        box = sampled(seed, crop={"probability": 1, "share": (0.1, 0.4)}).crop
        assert box is not None
        axis, first, last = box
        lost = SIZE[axis] - (last - first)
        assert round(0.1 * SIZE[axis]) <= lost <= round(0.4 * SIZE[axis])
        assert first == 0 or last == SIZE[axis]
        sides.add((axis, first == 0))
        full = torch.ones(SIZE, dtype=torch.int8)
        seen = augment.crop(full, box)
        assert seen.dtype == torch.int8
        assert full.all()
        assert seen.sum(dim=[i for i in range(3) if i != axis]).bool().sum() == last - first
        assert not augment.crop(image, box)[seen == 0].any()
        assert torch.equal(augment.crop(image, box)[seen == 1], image[seen == 1])
    assert len(sides) == 6


def test_no_crop_is_the_image_itself(image: Tensor) -> None:
    assert augment.crop(image, None) is image


def test_a_crop_of_everything_is_black(image: Tensor) -> None:
    done = augment.apply(image, sampled(crop={"probability": 1, "share": (1, 1)}))
    assert not done.any()


@pytest.mark.parametrize(("factor", "offset"), [(1, 0), (7, 0), (0.01, 0), (300, -50), (1, 1000)])
def test_rescale_undoes_any_scale_and_offset(image: Tensor, factor: float, offset: float) -> None:
    done = augment.rescale(image * factor + offset)
    assert done.min() == 0 and done.max() == 1
    assert torch.allclose(done, augment.rescale(image), atol=2e-3)


def test_rescale_is_what_prediction_does(image: Tensor) -> None:
    for bent in (image, image**3, 1 - image**2):
        assert np.allclose(augment.rescale(bent * 7 - 2).numpy(), volume.scale(bent.numpy() * 7 - 2), atol=1e-4)


def test_rescale_is_blind_to_few_outliers() -> None:
    image = torch.rand(32, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = augment.rescale(image)
    image[0, 0, :10] = 50
    assert augment.rescale(image).max() == 1
    assert (augment.rescale(image) - expected)[1:].abs().max() < 0.05


def test_rescale_of_a_constant_is_finite() -> None:
    done = augment.rescale(torch.full(SIZE, 3.0))
    assert torch.isfinite(done).all()
    assert 0 <= done.min() and done.max() <= 1


def test_bounds_are_quantiles_of_all_and_of_the_lit() -> None:
    for seed in range(5):
        sample = torch.rand(3001, generator=torch.Generator().manual_seed(seed)) ** (seed + 1)
        low, scale = augment.bounds(sample)
        expected = sample.quantile(0.001), sample[sample > sample.mean()].quantile(0.995)
        assert low == pytest.approx(expected[0].item(), abs=1e-3)
        assert low + 1 / scale == pytest.approx(expected[1].item(), abs=1e-3)


@pytest.mark.parametrize("size", [(20, 24, 16), (64, 64, 64), (80, 96, 96), (96, 112, 96), (120, 120, 120)])
def test_every_slice_has_a_part_in_the_range(size: tuple[int, int, int]) -> None:
    voxels = math.prod(size)
    taken = np.unravel_index(np.arange(0, voxels, augment.stride(voxels)), size)
    assert min(voxels, 8000) <= len(taken[0]) <= 33000
    assert [len(np.unique(axis)) for axis in taken] == list(size)


def test_a_box_is_what_a_crop_leaves() -> None:
    assert augment.box(SIZE, None).tolist() == [[0, 20], [0, 24], [0, 16]]
    for axis, first in itertools.product(range(3), (0, 5)):
        view = (axis, first, SIZE[axis] - 5 + first)
        seen = augment.crop(torch.ones(SIZE), view).nonzero()
        low, high = augment.box(SIZE, view).T.tolist()
        assert (low, high) == (seen.amin(0).tolist(), (seen.amax(0) + 1).tolist())
