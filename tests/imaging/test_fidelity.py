"""What images show covers every range of the settings, and never leaves it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onelabel.configs.augmentation import AugmentConfig, BinsConfig, DeformConfig, SynthesisConfig
from onelabel.imaging import augment, deform, splines, synthesis
from onelabel.imaging.augment import Appearance
from onelabel.imaging.labels import AIR, LEVELS, BinnedScan, bin_scan

CPU = torch.device("cpu")
SHAPE, LOOK, ALL = DeformConfig(), AugmentConfig(), SynthesisConfig()
STILL: dict[str, Any] = {
    "translate_mm": 0,
    "rotate_deg": 0,
    "scale": (1, 1),
    "shear": 0,
    "warp_mm": (0, 0),
    "flip": 0,
}


def assert_covered(values: Any, low: float, high: float, *, slack: float = 1e-4) -> None:
    """Values lie in a range, but for the slack of their measurement, and span nine tenths of it."""
    values = np.asarray(values)
    assert low - slack <= values.min() and values.max() <= high + slack
    assert np.ptp(values) >= 0.9 * (high - low)


# Shape


def deformations(count: int, *, size: Any, spacing_mm: Any, **changes: Any) -> list[deform.Deformation]:
    config = SHAPE.model_copy(update=changes)
    sources = (torch.Generator().manual_seed(seed) for seed in range(count))
    return [deform.sample_deformation(config, size=size, spacing_mm=spacing_mm, generator=source) for source in sources]


def displaced_mm(one: deform.Deformation, *, size: Any, spacing_mm: Any) -> tuple[Tensor, Tensor]:
    """Where each voxel is, and where it looks, in mm from the centre: (voxels, 3) both."""
    axes = [torch.arange(n, dtype=torch.float32) for n in size]
    step, centre = torch.tensor(spacing_mm), (torch.tensor(size) - 1) / 2
    place = deform.coordinates(one, size=size, spacing_mm=spacing_mm, device=CPU).flatten(1).T
    return (torch.cartesian_prod(*axes) - centre) * step, (place - centre) * step


def affine(one: deform.Deformation, *, size: Any, spacing_mm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and shift in mm that fit what is done to the voxels; there is nothing else."""
    here, there = displaced_mm(one, size=size, spacing_mm=spacing_mm)
    design = torch.cat([here, torch.ones(len(here), 1)], dim=1).double()
    fitted = torch.linalg.lstsq(design, there.double()).solution
    assert torch.allclose(design @ fitted, there.double(), atol=1e-3)
    return fitted[:3].T.numpy(), fitted[3].numpy()


def degrees(turn: np.ndarray) -> np.ndarray:
    """Angles about the axes, one after another."""
    first, last = math.atan2(turn[2, 1], turn[2, 2]), math.atan2(turn[1, 0], turn[0, 0])
    return np.degrees([first, -math.asin(turn[2, 0]), last])


def test_affine_maps_cover_their_ranges() -> None:
    where: dict[str, Any] = {"size": (11, 12, 10), "spacing_mm": (18.0, 16.0, 22.0)}
    parts = []
    for one in deformations(300, warp_mm=(0, 0), **where):
        matrix, shift = affine(one, **where)
        turn, rest = np.linalg.qr(matrix)
        signs = np.sign(np.diag(rest)) * [np.sign(np.linalg.det(matrix)), 1, 1]
        turn, rest = turn * signs, rest * signs[:, None]
        scales = np.diag(rest)
        shear = (rest / scales)[[0, 0, 1], [1, 2, 2]]
        parts.append((degrees(turn), np.abs(scales), shear, shift, scales < 0))
    angles, scales, shears, shifts, flips = (np.array(part) for part in zip(*parts, strict=True))
    for axis in range(3):
        assert_covered(angles[:, axis], -SHAPE.rotate_deg, SHAPE.rotate_deg, slack=0.01)
        assert_covered(scales[:, axis], *SHAPE.scale)
        assert_covered(shears[:, axis], -SHAPE.shear, SHAPE.shear)
        assert_covered(shifts[:, axis], -SHAPE.translate_mm, SHAPE.translate_mm, slack=0.01)
    assert flips.mean(0) == pytest.approx([SHAPE.flip, 0, 0], abs=0.1)


def test_warps_cover_their_range() -> None:
    where: dict[str, Any] = {"size": (24, 28, 28), "spacing_mm": (8.0, 8.0, 8.0)}
    largest = []
    for one in deformations(150, **STILL | {"warp_mm": SHAPE.warp_mm}, **where):
        here, there = displaced_mm(one, **where)
        largest.append((there - here).norm(dim=1).max().item())
    assert_covered(largest, *SHAPE.warp_mm, slack=0.03 * SHAPE.warp_mm[1])


# Labels to intensities


def painted(scan: BinnedScan, seed: int, **changes: Any) -> tuple[synthesis.Paint, Tensor, Tensor]:
    """What was drawn, and the intensity and label of many voxels of every level, in the first class and the second."""
    config = SynthesisConfig(intensity=ALL.intensity.model_copy(update=changes))
    params = synthesis.sample_params(
        scan, config, spacing_mm=(3.0, 2.5, 4.0), generator=torch.Generator().manual_seed(seed)
    )
    assert params.paint is not None
    levels = torch.arange(LEVELS, dtype=torch.uint8).repeat(200)
    target = torch.arange(2, dtype=torch.int8).repeat_interleave(100 * LEVELS)
    label = params.paint.table[target.long() * LEVELS + levels.long()]
    return params.paint, synthesis.paint(levels, target, params.paint), label


def test_intensities_cover_their_ranges(scan: BinnedScan) -> None:
    means, spreads, airs, air_shares = [], [], [], []
    for seed in range(200):
        paint, image, label = painted(scan, seed)
        for index in label.unique().tolist():
            values = image[label == index].double().numpy()
            low, middle, high = np.quantile(values, [0.1587, 0.5, 0.8413])
            if index == AIR:
                airs.append(middle)
                air_shares.append((high - low) / 2 / middle)
            elif len(values) > 500:
                means.append(middle)
                if 0.15 < middle < 0.85:
                    spreads.append((high - low) / 2)
    assert_covered(means, *ALL.intensity.mean)
    assert_covered(spreads, *ALL.intensity.spread, slack=0.01)
    assert_covered(airs, *ALL.intensity.air, slack=0.002)
    # What is dark is smooth: the spread of air is a share of its mean.
    assert_covered(air_shares, *ALL.intensity.spread, slack=0.01)


def test_numbers_of_bins_cover_their_ranges(scan: BinnedScan) -> None:
    counts = []
    for seed in range(150):
        _, image, label = painted(scan, seed, spread=(0, 0))
        outside = image[: len(image) // 2][label[: len(image) // 2] != AIR]
        counts.append((len(outside.unique()), len(image[len(image) // 2 :].unique())))
    background, foreground = (set(part) for part in zip(*counts, strict=True))
    assert background == set(range(ALL.bins.background[0], ALL.bins.background[1] + 1))
    assert foreground == set(range(ALL.bins.foreground[0], ALL.bins.foreground[1] + 1))


def test_strips_cover_their_range() -> None:
    size, step = (61, 12, 12), (1.0, 1.0, 1.0)
    mask = np.zeros(size, np.int32)
    mask[:20] = 1
    image = np.random.default_rng(0).uniform(0.5, 1, size).astype(np.float32)
    scan = bin_scan(image, mask, spacing_mm=step, config=BinsConfig())
    clear = AugmentConfig.model_validate({name: {"probability": 0} for name in AugmentConfig.model_fields})
    strip = ALL.strip.model_copy(update={"probability": 1})
    config = SynthesisConfig(augment=clear, deform=DeformConfig(**STILL), strip=strip)
    borders = []
    for seed in range(150):
        source = torch.Generator().manual_seed(seed)
        params = synthesis.sample_params(scan, config, spacing_mm=step, real=True, generator=source)
        lit = synthesis.synthesise(scan, params, spacing_mm=step)[0].numpy() > 0
        border = scan.distance_mm[lit].max()
        assert lit[scan.distance_mm < border].mean() > 0.99
        borders.append(border)
    assert_covered(borders, *ALL.strip.border_mm)


# Scanner


def looks(count: int, effect: str, *, size: Any, spacing_mm: Any) -> list[Appearance]:
    """Parameters of one effect, which always happens, in its default ranges."""
    config = AugmentConfig.model_validate(
        {name: {"probability": float(name == effect)} for name in AugmentConfig.model_fields}
    )
    sources = (torch.Generator().manual_seed(seed) for seed in range(count))
    return [augment.sample(config, size=size, spacing_mm=spacing_mm, generator=source) for source in sources]


def test_bias_covers_its_range() -> None:
    size = (24, 28, 28)
    darkest, points = [], set()
    for look in looks(300, "bias", size=size, spacing_mm=(8.0, 8.0, 8.0)):
        assert look.bias is not None
        points |= {n - 2 for n in look.bias.shape[1:]}
        field = splines.evaluate(look.bias, size)[0]
        assert field.max() <= 1.01
        darkest.append(1 - field.min().item())
    assert points == set(range(LOOK.bias.points[0], LOOK.bias.points[1] + 1))
    assert_covered(darkest, *LOOK.bias.strength, slack=0.01)


def test_blur_covers_its_range() -> None:
    size, step = (81, 73, 77), (0.25, 0.25, 0.25)
    impulse = torch.zeros(size)
    impulse[40, 36, 38] = 1
    widths = []
    for look in looks(60, "blur", size=size, spacing_mm=step):
        done = augment.spread(impulse, look.spread)
        for axis in range(3):
            line = done.sum([other for other in range(3) if other != axis])
            place = torch.arange(size[axis]) - size[axis] // 2
            sd = ((line * place**2).sum() / line.sum()).sqrt()
            widths.append(math.sqrt(8 * math.log(2)) * sd.item() * 0.25)
    assert_covered(widths, *LOOK.blur.fwhm_mm)


def test_low_resolution_covers_its_range() -> None:
    # A length that both ends of the range divide, so that a whole number of voxels stays within it.
    size, step = (120, 120, 120), (1.0, 1.0, 1.0)
    spacings, axes = [], []
    for look in looks(200, "low_resolution", size=size, spacing_mm=step):
        voxels = [int(torch.linalg.matrix_rank(one.matrix())) for one in look.spread if one is not None]
        spacings += [120 / count for count in voxels]
        axes.append(len(voxels))
    assert_covered(spacings, *LOOK.low_resolution.spacing_mm)
    assert set(axes) == {1, 3}
    assert axes.count(1) / 200 == pytest.approx(LOOK.low_resolution.one_axis, abs=0.12)


def flat(*levels: float) -> Tensor:
    """(len(levels) * 8, 32, 32): slabs of one intensity each."""
    return torch.tensor(levels).repeat_interleave(8)[:, None, None].expand(-1, 32, 32).contiguous()


def test_noise_covers_its_range() -> None:
    image = flat(0, 0, 0.4, 0.6, 1, 1)
    sds = []
    for look in looks(200, "noise", size=image.shape, spacing_mm=(2.0, 2.0, 2.0)):
        _, _, dark, light, _, _ = augment.apply(image, look).chunk(6)
        scale = (light.mean() - dark.mean()) / 0.2
        sds.append((torch.stack([dark - dark.mean(), light - light.mean()]).std() / scale).item())
    assert_covered(sds, *LOOK.noise.sd, slack=0.002)


def test_gamma_covers_its_range() -> None:
    image = flat(0, 0, 0.3, 0.6, 1, 1)
    exponents = []
    for look in looks(200, "gamma", size=image.shape, spacing_mm=(2.0, 2.0, 2.0)):
        _, _, dark, light, _, _ = augment.apply(image, look).chunk(6)
        one, two = (math.log(math.log(part.mean()) / math.log(base)) for part, base in ((dark, 0.3), (light, 0.6)))
        assert one == pytest.approx(two, abs=0.01)
        exponents.append(one)
    assert_covered(exponents, *LOOK.gamma.log_exponent, slack=0.005)


def test_crops_cover_their_range() -> None:
    size = (60, 70, 80)
    lost = [
        1 - augment.crop(torch.ones(size), look.crop).mean().item()
        for look in looks(200, "crop", size=size, spacing_mm=(2.0, 2.0, 2.0))
    ]
    assert_covered(lost, *LOOK.crop.share)


def test_motion_covers_its_ranges() -> None:
    where: dict[str, Any] = {"size": (22, 24, 26), "spacing_mm": (9.0, 8.0, 8.0)}
    shifts, angles, moves = [], [], set()
    for look in looks(150, "motion", **where):
        assert look.motion is not None
        moves.add(len(look.motion.moves))
        for _, _, one in look.motion.moves:
            matrix, shift = affine(one, **where)
            assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-4), "it is rigid"
            shifts.append(shift)
            angles.append(degrees(matrix))
    for axis in range(3):
        assert_covered(np.array(shifts)[:, axis], -LOOK.motion.shift_mm, LOOK.motion.shift_mm, slack=0.01)
        assert_covered(np.array(angles)[:, axis], -LOOK.motion.rotate_deg, LOOK.motion.rotate_deg, slack=0.01)
    assert moves == set(range(LOOK.motion.moves[0], LOOK.motion.moves[1] + 1))


def test_numbers_of_motion_blocks_cover_their_range() -> None:
    blocks = []
    for look in looks(150, "motion", size=(1000, 1000, 1000), spacing_mm=(0.2, 0.2, 0.2)):
        assert look.motion is not None
        blocks += [round(1000 / (last - first)) for first, last, _ in look.motion.moves]
    assert_covered(blocks, *LOOK.motion.blocks)


def test_numbers_of_lost_slices_cover_their_range() -> None:
    lost, values = set(), []
    image = torch.full((20, 24, 16), 2.0)
    for look in looks(150, "lines", size=image.shape, spacing_mm=(2.0, 2.0, 2.0)):
        done = augment.acquire(image.clone(), look)
        slices = [int((done < 2).movedim(axis, 0).flatten(1).all(1).sum()) for axis in range(3)]
        assert sorted(slices)[:2] == [0, 0]
        lost.add(max(slices))
        values += done[done < 2].unique().tolist()
    assert lost == set(range(LOOK.lines.count[0], LOOK.lines.count[1] + 1))
    assert_covered(values, 0, 1)
