"""Images per second of one core, beside the generators that pip installs.

python benchmarks/synthesis.py [--size N ...] [--against torchio,monai,batchgeneratorsv2] [--json FILE] [--seconds S]

Each makes images from the same label map of nested blobs with everything on: affine, smooth warp, an intensity for
every label, bias field, blur, low resolution, noise and gamma; in turns, in one process, on one thread, judged by CPU
time. MONAI and batchgeneratorsv2 paint no labels: theirs are painted by one NumPy lookup first, and batchgeneratorsv2
has no bias field. Prints Markdown; the JSON maps `onelabel` and each peer to volumes per CPU second at the last size.
Peak memory is measured in a process of its own.
"""

import argparse
import ctypes
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from onelabel.configs.augmentation import AugmentConfig, BinsConfig, DeformConfig, SynthesisConfig
from onelabel.imaging import synthesis
from onelabel.imaging.labels import BinnedScan, bin_scan, label_map

Make = Callable[[int], object]
LABELS = (5, 7)  # bins inside and outside
EXTENT_MM = 192.0


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--against", default="", help="peers, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each, at the least")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers = [name for name in options.against.split(",") if name]
    for name in peers:
        if name not in PEERS or importlib.util.find_spec(name) is None:
            parser.error(f"--against {name}: must be one of {', '.join(PEERS)}, and installed: pip install {name}")
    rates: dict[str, float] = {}
    columns = ["generator", "size", "volumes per CPU second", "ns a voxel", "times onelabel's"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for size in options.size:
        scan = head(size)
        makers = {"onelabel": onelabel(scan)} | {name: PEERS[name](scan) for name in peers}
        rates = in_turns(makers, options.seconds)
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            share = rates["onelabel"] / rate
            lines.append(f"| {name} | {size} | {rate:.2f} | {1e9 / rate / size**3:.1f} | {share:.1f} |")
    sys.stdout.write("\n".join(lines) + "\n\n")
    for size in options.size:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            peak = alone.apply(peak_bytes, (size,)) / size**3
        sys.stdout.write(f"{size}: {peak:.1f} bytes a voxel at the peak, scan included; {floor(size)}\n")
    if options.json:
        options.json.write_text(json.dumps(rates, indent=1))


def in_turns(makers: dict[str, Make], seconds: float) -> dict[str, float]:
    """Volumes per CPU second of each: a few volumes of one, then of the next, until all have run long enough."""
    spent, made = dict.fromkeys(makers, 0.0), dict.fromkeys(makers, 0)
    for make in makers.values():
        for seed in range(3):
            make(seed)  # compiles, warms up
    while min(spent.values()) < seconds:
        for name, make in makers.items():
            begin = time.process_time()
            while time.process_time() - begin < seconds / 5:
                make(made[name])
                made[name] += 1
            spent[name] += time.process_time() - begin
    return {name: made[name] / spent[name] for name in makers}


def head(size: int) -> BinnedScan:
    """A scan of smooth random structures with a ball for a brain."""
    rng = np.random.default_rng(0)
    image = gaussian_filter(rng.random((size, size, size), np.float32), size / 24)
    image = (image - image.min()) / np.ptp(image)
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"))
    radius = np.sqrt((place**2).sum(0))
    image[radius > 0.9] = 0
    bins = BinsConfig(foreground=LABELS[0], background=LABELS[1])
    return bin_scan(image, (radius < 0.6).astype(np.int32), spacing_mm=(EXTENT_MM / size,) * 3, config=bins)


def onelabel(scan: BinnedScan) -> Make:
    """Ours, everything on."""
    every = {name: {"probability": 1} for name in ("bias", "blur", "low_resolution", "noise", "gamma")}
    augment = AugmentConfig.model_validate(every | {"crop": {"probability": 0}})
    bins = BinsConfig(foreground=LABELS[0], background=LABELS[1])
    config = SynthesisConfig(augment=augment, bins=bins, deform=DeformConfig())
    spacing_mm = (EXTENT_MM / scan.levels.shape[0],) * 3

    def make(seed: int) -> object:
        generator = torch.Generator().manual_seed(seed)
        params = synthesis.sample_params(scan, config, spacing_mm=spacing_mm, generator=generator)
        return synthesis.synthesise(scan, params, spacing_mm=spacing_mm)

    return make


def torchio(scan: BinnedScan) -> Make:
    """TorchIO, labels to image."""
    import torchio as tio

    size = scan.levels.shape[0]
    label = tio.LabelMap(tensor=torch.from_numpy(label_map(scan, LABELS))[None], affine=affine(size))
    pipeline = tio.Compose(
        [
            tio.RandomAffine(scales=0.15, degrees=20, translation=16, image_interpolation="nearest"),
            tio.RandomElasticDeformation(num_control_points=7, max_displacement=8, image_interpolation="nearest"),
            tio.RandomLabelsToImage(label_key="label", default_mean=(0.0, 1.0), default_std=(0.0, 0.08)),
            tio.RandomBiasField(),
            tio.RandomBlur(std=(0, 4 / 2.355)),
            tio.RandomAnisotropy(axes=(0, 1, 2), downsampling=(1, 4)),
            tio.RandomNoise(std=(0, 0.08)),
            tio.RandomGamma(log_gamma=(-0.6, 0.6)),
        ]
    )

    def make(seed: int) -> object:
        torch.manual_seed(seed)
        return pipeline(tio.Subject(label=label))

    return make


def monai(scan: BinnedScan) -> Make:
    """MONAI, painted by NumPy first."""
    from monai import transforms as mt

    size = scan.levels.shape[0]
    labels, voxel = label_map(scan, LABELS), EXTENT_MM / size
    both = ["image", "label"]
    pipeline = mt.Compose(
        [
            mt.Rand3DElasticd(
                both,
                sigma_range=(6, 8),
                magnitude_range=(50, 150),
                prob=1,
                rotate_range=(0.35,) * 3,
                shear_range=(0.08,) * 6,
                translate_range=(16 / voxel,) * 3,
                scale_range=(0.15,) * 3,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            mt.RandBiasFieldd("image", degree=3, coeff_range=(0.0, 0.3), prob=1),
            mt.RandGaussianSmoothd("image", *[(0.25, 4 / 2.355 / voxel)] * 3, prob=1),
            mt.RandSimulateLowResolutiond("image", prob=1, zoom_range=(0.25, 1.0)),
            mt.RandGaussianNoised("image", prob=1, std=0.08),
            mt.RandAdjustContrastd("image", prob=1, gamma=(0.55, 1.8)),
        ]
    )

    def make(seed: int) -> object:
        pipeline.set_random_state(seed)
        image = paint(labels, seed)
        return pipeline({"image": torch.from_numpy(image)[None], "label": torch.from_numpy(labels)[None]})

    return make


def batchgeneratorsv2(scan: BinnedScan) -> Make:
    """batchgeneratorsv2 (nnU-Net), painted by NumPy first."""
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

    size = scan.levels.shape[0]
    labels, voxel = label_map(scan, LABELS), EXTENT_MM / size
    pipeline = ComposeTransforms(
        [
            SpatialTransform(
                (size,) * 3,
                patch_center_dist_from_border=0,
                random_crop=False,
                p_elastic_deform=1,
                p_rotation=1,
                rotation=(-0.35, 0.35),
                p_scaling=1,
                scaling=(0.85, 1.15),
                p_synchronize_scaling_across_axes=0,
            ),
            GaussianNoiseTransform(noise_variance=(0, 0.0064), p_per_channel=1, synchronize_channels=True),
            GaussianBlurTransform(blur_sigma=(0.25, 4 / 2.355 / voxel), p_per_channel=1),
            SimulateLowResolutionTransform(
                scale=(0.25, 1), synchronize_channels=True, synchronize_axes=False, ignore_axes=None, p_per_channel=1
            ),
            GammaTransform(
                gamma=(0.55, 1.8), p_invert_image=0, synchronize_channels=True, p_per_channel=1, p_retain_stats=0
            ),
        ]
    )

    def make(seed: int) -> object:
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        image = torch.from_numpy(paint(labels, seed))[None]
        return pipeline(image=image, segmentation=torch.from_numpy(labels.astype(np.int16))[None])

    return make


PEERS = {"torchio": torchio, "monai": monai, "batchgeneratorsv2": batchgeneratorsv2}


def paint(labels: np.ndarray, seed: int) -> np.ndarray:
    """An intensity and a texture for every label."""
    rng = np.random.default_rng(seed)
    mean, spread = rng.random(256, np.float32), rng.random(256, np.float32) * np.float32(0.08)
    return np.asarray(mean[labels] + spread[labels] * rng.standard_normal(labels.shape, np.float32))


def affine(size: int) -> np.ndarray:
    """Voxel to mm."""
    return np.diag([EXTENT_MM / size] * 3 + [1.0])


def peak_bytes(size: int) -> int:
    """Memory that a process needs more at its peak, scan included, than one that has made a tiny volume."""
    torch.set_num_threads(1)
    onelabel(head(16))(0)
    scan = head(size)
    parts = (scan.levels, scan.target, scan.distance_mm)
    make = onelabel(scan)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed would be used again unseen
    reset_peak()
    before = status("VmRSS")
    for seed in range(4):
        make(seed)
    return status("VmHWM") - before + sum(part.nbytes for part in parts)


def reset_peak() -> None:
    """Forget the peak of resident memory so far."""
    Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> int:
    """A figure of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def floor(size: int) -> str:
    """What memory alone would allow: three bytes of a voxel read, two written."""
    source = np.ones(max(size**3 * 4, 1 << 27), np.uint8)
    target = np.empty_like(source)
    best = np.inf
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - begin)
    per_byte = best / (2 * source.nbytes)
    return f"a copy at {1e-9 / per_byte:.1f} GB/s would take {5e9 * per_byte:.2f} ns a voxel"


if __name__ == "__main__":
    main()
