from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onelabel.configs.augmentation import AugmentConfig, BinsConfig, DeformConfig, SynthesisConfig
from onelabel.imaging import augment, synthesis
from onelabel.imaging.labels import AIR, IGNORE, LEVELS, BinnedScan, bin_scan
from onelabel.imaging.synthesis import Params

SPACING_MM = (3.0, 2.5, 4.0)
STILL = DeformConfig(translate_mm=0, rotate_deg=0, scale=(1, 1), shear=0, warp_mm=(0, 0), flip=0)
ENGINES = pytest.mark.parametrize("engine", ["compiled", "torch"])
CLEAR = AugmentConfig.model_validate({name: {"probability": 0} for name in AugmentConfig.model_fields})


def plain(**changes: Any) -> SynthesisConfig:
    """No deformation, no scanner effects, never stripped."""
    settings = {"deform": STILL, "augment": CLEAR, "strip": {"probability": 0}}
    return SynthesisConfig.model_validate(settings | changes)


def params(scan: BinnedScan, config: SynthesisConfig, seed: int = 0, **options: Any) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return synthesis.sample_params(scan, config, spacing_mm=SPACING_MM, generator=generator, **options)


def drawn(scan: BinnedScan, chosen: Params, engine: str = "compiled") -> tuple[Tensor, Tensor]:
    """Image float32 in [0, 1], and label."""
    if engine == "torch":
        return synthesis.in_torch(scan, chosen, spacing_mm=SPACING_MM, device=torch.device("cpu"))
    image, label = synthesis.synthesise(scan, chosen, spacing_mm=SPACING_MM)
    return image / 255, label


def made(
    scan: BinnedScan, config: SynthesisConfig, seed: int = 0, engine: str = "compiled", **options: Any
) -> tuple[Tensor, Tensor]:
    return drawn(scan, params(scan, config, seed, **options), engine)


def with_unknown(scan: BinnedScan) -> BinnedScan:
    target = scan.target.copy()
    target[:, 10:14] = IGNORE
    return replace(scan, target=target)


@ENGINES
@pytest.mark.parametrize("real", [False, True])
def test_the_same_seed_gives_the_same_bytes(scan: BinnedScan, real: bool, engine: str) -> None:
    for seed in range(4):
        one, two = (made(scan, SynthesisConfig(), seed, engine, real=real) for _ in range(2))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


@ENGINES
@pytest.mark.parametrize("real", [False, True])
def test_different_seeds_differ(scan: BinnedScan, real: bool, engine: str) -> None:
    images = [made(scan, SynthesisConfig(), seed, engine, real=real) for seed in range(5)]
    for i, (image, label) in enumerate(images):
        for other, other_label in images[:i]:
            assert (image - other).abs().mean() > 0.02
            assert not torch.equal(label, other_label)


@ENGINES
def test_global_state_is_neither_read_nor_changed(scan: BinnedScan, engine: str) -> None:
    state = torch.get_rng_state()
    one = made(scan, SynthesisConfig(), 3, engine)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    np.random.seed(77)  # noqa: NPY002
    assert torch.equal(one[0], made(scan, SynthesisConfig(), 3, engine)[0])


@ENGINES
def test_the_scan_is_left_alone(scan: BinnedScan, engine: str) -> None:
    before = [scan.levels.copy(), scan.target.copy(), scan.distance_mm.copy(), scan.tables.copy()]
    config = SynthesisConfig.model_validate({"strip": {"probability": 1}})
    for seed in range(4):
        made(scan, config, seed, engine, real=bool(seed % 2))
    after = [scan.levels, scan.target, scan.distance_mm, scan.tables]
    assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))


@ENGINES
def test_the_parameters_are_left_alone(scan: BinnedScan, engine: str) -> None:
    config = SynthesisConfig.model_validate(
        {"augment": {name: {"probability": 1} for name in AugmentConfig.model_fields}}
    )
    for seed in range(4):
        chosen = params(scan, config, seed)
        one, two = (drawn(scan, chosen, engine) for _ in range(2))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


@ENGINES
def test_read_only_scans_are_fine(scan: BinnedScan, engine: str) -> None:
    frozen = BinnedScan(*(array.copy() for array in (scan.levels, scan.target, scan.distance_mm, scan.tables)))
    for array in (frozen.levels, frozen.target, frozen.distance_mm, frozen.tables):
        array.setflags(write=False)
    for real in (False, True):
        one, two = (made(each, SynthesisConfig(), 1, engine, real=real) for each in (frozen, scan))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("real", [False, True])
def test_images_and_labels_are_what_networks_read(scan: BinnedScan, real: bool) -> None:
    labels, unknown = set(), with_unknown(scan)
    for seed in range(12):
        chosen = params(unknown, SynthesisConfig(), seed, real=real)
        image, label = synthesis.synthesise(unknown, chosen, spacing_mm=SPACING_MM)
        assert image.shape == label.shape == scan.levels.shape
        assert (image.dtype, label.dtype) == (torch.uint8, torch.int8)
        assert (image.min(), image.max()) == (0, 255)
        labels |= set(label.unique().tolist())
        image, label = drawn(unknown, chosen, "torch")
        assert image.shape == label.shape == scan.levels.shape
        assert (image.dtype, label.dtype) == (torch.float32, torch.int8)
        assert torch.isfinite(image).all()
        assert 0 <= image.min() and image.max() <= 1
        labels |= set(label.unique().tolist())
    assert labels == {IGNORE, 0, 1}


@ENGINES
@pytest.mark.parametrize("size", [(8, 8, 8), (16, 20, 24), (9, 17, 33)])
def test_any_size(size: tuple[int, int, int], engine: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.random(size, np.float32)
    mask = np.zeros(size, np.int32)
    mask[2:-2, 2:-2, 2:-2] = 1
    scan = bin_scan(image, mask, spacing_mm=SPACING_MM, config=BinsConfig())
    image_made, label = made(scan, SynthesisConfig(), 5, engine)
    assert tuple(image_made.shape) == tuple(label.shape) == size


@ENGINES
def test_without_deformation_the_label_is_the_target(scan: BinnedScan, engine: str) -> None:
    for target in (scan, with_unknown(scan)):
        _, label = made(target, plain(), engine=engine)
        assert np.array_equal(label.numpy(), target.target)


def test_every_label_has_one_intensity_within_its_range(scan: BinnedScan) -> None:
    config = plain(intensity={"mean": (0.3, 0.7), "spread": (0, 0), "air": (0.1, 0.2)})
    levels = torch.from_numpy(scan.levels).flatten()
    target = torch.from_numpy(scan.target).flatten()
    counts = set()
    for seed in range(10):
        paint = params(scan, config, seed).paint
        assert paint is not None
        counts.add(len(paint.mean))
        image = synthesis.paint(levels, target, paint)
        label = paint.table[target.long() * LEVELS + levels.long()]
        assert 0.1 <= paint.mean[AIR] <= 0.2
        for index in label.unique():
            assert torch.equal(image[label == index], paint.mean[index].expand(int((label == index).sum())))
            assert index == AIR or 0.3 <= paint.mean[index] <= 0.7
    assert len(counts) > 3, "the number of bins is drawn too"


def test_texture_has_its_spread(scan: BinnedScan) -> None:
    config = plain(intensity={"mean": (0.5, 0.5), "spread": (0.05, 0.05), "air": (0, 0)})
    paint = params(scan, config).paint
    assert paint is not None
    levels, target = torch.from_numpy(scan.levels).flatten(), torch.from_numpy(scan.target).flatten()
    image = synthesis.paint(levels, target, paint)
    brain = image[target == 1]
    assert brain.mean() == pytest.approx(0.5, abs=0.01)
    assert brain.std() == pytest.approx(0.05, abs=0.01)
    air = paint.table[target.long() * LEVELS + levels.long()] == AIR
    assert not image[air].any(), "black air is without texture"


@ENGINES
def test_the_brain_stands_out_from_its_surroundings(scan: BinnedScan, engine: str) -> None:
    config = plain(bins={"foreground": 1, "background": 1}, intensity={"spread": (0, 0), "air": (0, 0)})
    target = scan.target.astype(bool)
    for seed in range(5):
        image = made(scan, config, seed, engine)[0].numpy()
        assert np.ptp(image[target]) == 0
        assert not np.isin(image[~target], image[target]).any()


@ENGINES
def test_stripped_heads_are_black_beyond_the_border(scan: BinnedScan, engine: str) -> None:
    bright = {"mean": (0.4, 0.9), "spread": (0, 0), "air": (0.3, 0.3)}
    for seed, border in enumerate((-4.0, 0.0, 6.0, 20.0)):
        config = plain(strip={"probability": 1, "border_mm": (border, border)}, intensity=bright)
        image, label = made(scan, config, seed, engine)
        beyond = torch.from_numpy(scan.distance_mm > border)
        assert beyond.any() and not beyond.all()
        assert not image[beyond].any()
        assert (image[~beyond] > 0).all()
        assert np.array_equal(label.numpy(), scan.target), "the truth stays"


@ENGINES
def test_stripping_follows_the_deformed_head(scan: BinnedScan, engine: str) -> None:
    shape = DeformConfig(translate_mm=8, flip=0)
    config = plain(deform=shape, strip={"probability": 1, "border_mm": (0, 0)}, intensity={"mean": (0.5, 1)})
    for seed in range(4):
        image, label = made(scan, config, seed, engine)
        # Painted air beyond the scan's own edge is cut away as well.
        lit = image > 0
        assert (label[lit] == 1).float().mean() > 0.9
        assert lit[label == 1].float().mean() > 0.9


@pytest.mark.parametrize(("chance", "low", "high"), [(0, 0, 0), (0.4, 50, 110), (1, 200, 200)])
def test_stripping_and_real_intensities_are_as_frequent_as_asked(
    scan: BinnedScan, chance: float, low: int, high: int
) -> None:
    config = plain(strip={"probability": chance}, intensity={"real": chance})
    chosen = [params(scan, config, seed) for seed in range(200)]
    assert low <= sum(one.cut_mm is not None for one in chosen) <= high
    assert low <= sum(one.paint is None for one in chosen) <= high


@pytest.mark.parametrize(("engine", "tolerance"), [("compiled", 0.5 / 255 + 1e-4), ("torch", 1e-4)])
def test_a_real_scan_keeps_its_intensities(
    scan: BinnedScan, head: tuple[np.ndarray, np.ndarray], engine: str, tolerance: float
) -> None:
    image, label = made(scan, plain(), engine=engine, real=True)
    expected = augment.rescale(torch.from_numpy(scan.levels) / 255)
    assert torch.allclose(image, expected, atol=tolerance)
    assert np.corrcoef(image.flatten(), head[0].flatten())[0, 1] > 0.99
    assert np.array_equal(label.numpy(), scan.target)


def test_a_painted_scan_does_not_keep_its_intensities(scan: BinnedScan, head: tuple[np.ndarray, np.ndarray]) -> None:
    brain = head[1] == 1
    correlations = [
        np.corrcoef(made(scan, plain(intensity={"spread": (0, 0)}), seed)[0].numpy()[brain], head[0][brain])[0, 1]
        for seed in range(10)
    ]
    assert min(correlations) < 0 < max(correlations), "contrast goes either way"


def test_a_stream_may_have_its_own_deformation(scan: BinnedScan) -> None:
    _, label = made(scan, plain(deform=DeformConfig()), deform_config=STILL)
    assert np.array_equal(label.numpy(), scan.target)
    _, label = made(scan, plain(), deform_config=DeformConfig())
    assert not np.array_equal(label.numpy(), scan.target)


@ENGINES
def test_image_and_label_move_together(scan: BinnedScan, engine: str) -> None:
    config = plain(
        deform=DeformConfig(), bins={"foreground": 1, "background": 3}, intensity={"spread": (0, 0), "mean": (0.2, 0.9)}
    )
    for seed in range(5):
        image, label = made(scan, config, seed, engine)
        inside = image[label == 1]
        assert inside.numel() > 50
        assert inside.max() - inside.min() < 1e-6


@ENGINES
def test_a_cropped_view_crops_the_label(scan: BinnedScan, engine: str) -> None:
    crop = {"crop": {"probability": 1, "share": (0.4, 0.4)}}
    effects = CLEAR.model_dump() | crop
    for seed in range(6):
        chosen = params(scan, plain(augment=effects, intensity={"air": (0.1, 0.1)}), seed)
        image, label = drawn(scan, chosen, engine)
        unseen = augment.crop(torch.ones(scan.levels.shape), chosen.appearance.crop) == 0
        assert unseen.float().mean() == pytest.approx(0.4, abs=0.05)
        assert not image[unseen].any()
        assert not label[unseen].any()
        assert np.array_equal(label[~unseen].numpy(), scan.target[~unseen.numpy()])


@ENGINES
def test_out_of_view_nothing_is_known_of_a_partly_annotated_scan(
    head: tuple[np.ndarray, np.ndarray], engine: str
) -> None:
    image, mask = head
    target = np.full(mask.shape, IGNORE)
    middle = tuple(slice(n // 3, 2 * n // 3) for n in mask.shape)
    target[middle] = mask[middle]
    target[middle][:2] = 0
    partly = bin_scan(image, target, spacing_mm=SPACING_MM, config=BinsConfig())
    annotated = np.count_nonzero(target != IGNORE)
    far = DeformConfig(translate_mm=20, scale=(0.8, 1))
    effects = CLEAR.model_dump() | {"crop": {"probability": 1, "share": (0.3, 0.3)}}
    found = [made(partly, plain(augment=effects, deform=far), seed, engine)[1] for seed in range(8)]
    assert all((label != IGNORE).sum() < 2 * annotated for label in found)
    assert any((label == 1).any() for label in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: CPU and GPU synthesis are not compared")
@pytest.mark.parametrize("real", [False, True])
def test_the_gpu_makes_the_same_images(scan: BinnedScan, real: bool) -> None:
    same, close, voxels = 0, 0, 0
    for seed in range(12):
        chosen = params(scan, SynthesisConfig(), seed, real=real)
        image, label = synthesis.synthesise(scan, chosen, spacing_mm=SPACING_MM)
        image_gpu, label_gpu = synthesis.synthesise(scan, chosen, spacing_mm=SPACING_MM, device="cuda")
        assert image_gpu.is_cuda and label_gpu.is_cuda
        assert (image_gpu.dtype, label_gpu.dtype) == (image.dtype, label.dtype)
        same += int((label == label_gpu.cpu()).sum())
        close += int(((image.float() - image_gpu.cpu().float()).abs() <= 0.01 * 255).sum())
        voxels += label.numel()
        again, _ = synthesis.synthesise(scan, chosen, spacing_mm=SPACING_MM, device="cuda")
        assert torch.equal(image_gpu, again)
    # A voxel between two others may fall to either side.
    assert same / voxels > 0.9995
    assert close / voxels > 0.998


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing waits for one")
def test_synthesis_does_not_wait_for_the_gpu(scan: BinnedScan) -> None:
    device = torch.device("cuda")
    drawn = [params(scan, SynthesisConfig(), seed, real=bool(seed % 2)) for seed in range(8)]
    synthesis.in_torch(scan, drawn[0], spacing_mm=SPACING_MM, device=device)  # the scan is there now
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one in drawn:
            synthesis.in_torch(scan, one, spacing_mm=SPACING_MM, device=device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Patches


def patch_of(size: tuple[int, int, int], first: tuple[int, int, int]) -> synthesis.Patch:
    x, y, z = (start + (n - 1) / 2 for start, n in zip(first, size, strict=True))
    return synthesis.Patch(size, (x, y, z))


@pytest.mark.parametrize(
    ("size", "first"), [((8, 10, 6), (3, 9, 5)), ((20, 5, 16), (0, 2, 0)), ((9, 7, 5), (0, 17, 11))]
)
@ENGINES
def test_a_patch_is_what_the_scan_shows_there(
    scan: BinnedScan, size: tuple[int, int, int], first: tuple[int, int, int], engine: str
) -> None:
    image, label = drawn(scan, params(scan, plain(), real=True, patch=patch_of(size, first)), engine)
    place = tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))
    assert image.shape == label.shape == size
    assert np.array_equal(label.numpy(), scan.target[place])
    assert np.abs(image.numpy() - scan.levels[place] / 255).max() <= 1.01 / 255


def test_both_engines_make_the_same_patch(scan: BinnedScan) -> None:
    same, close = [], []
    for seed in range(10):
        chosen = params(scan, SynthesisConfig(), seed, patch=patch_of((12, 10, 8), (4, 8, 3)))
        (image, label), (twin, twin_label) = (drawn(scan, chosen, engine) for engine in ("compiled", "torch"))
        same.append((label == twin_label).float().mean())
        close.append(((image - twin).abs() <= 0.01).float().mean())
    assert np.mean(same) >= 0.999 and np.mean(close) >= 0.999
