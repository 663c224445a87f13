import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from scipy.ndimage import gaussian_filter

from onelabel.configs.augmentation import DeformConfig, SynthesisConfig
from onelabel.configs.schema import GridConfig, RunConfig
from onelabel.configs.streams import StreamConfig
from onelabel.errors import DataError
from onelabel.imaging.labels import IGNORE, bin_scan
from onelabel.tasks import streams
from onelabel.tasks.cohort import PROBABILITY, Cohort
from onelabel.tasks.streams import Stream, SynthPool

CPU = torch.device("cpu")
STILL = DeformConfig(translate_mm=0, rotate_deg=0, scale=(1, 1), shear=0, warp_mm=(0, 0), flip=0)


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, heads: Cohort, config: RunConfig) -> list[Any]:
    return streams.prepare(heads, config)


@pytest.fixture
def stream(prepared: list[Any], config: RunConfig) -> Stream:
    parts = (StreamConfig(type="synthetic", share=0.5), StreamConfig(type="real", of="selected", share=0.5))
    scans = {"labelled": (prepared[:1], [1.0]), "selected": (prepared[1:], [0.25, 0.5])}
    return streams.build(parts, config, scans=scans, seed=3)


def first(stream: Stream, actors: int, count: int, *, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """Images of the first batches that a worker reads."""
    pool = SynthPool(actors, cpus=0.2)
    try:
        reader = streams.read(ray.put(stream), pool.actors, first=rank, every=world, batch=1, ahead=3, device=CPU)
        return [samples.image.numpy() for samples, _ in islice(reader, count)]
    finally:
        pool.close()


def test_a_sample_depends_on_stream_and_index_alone(stream: Stream) -> None:
    once, again, other = streams.draw(stream, 5), streams.draw(stream, 5), streams.draw(stream, 6)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not np.array_equal(once[0], other[0])
    assert (once[0].dtype, once[1].dtype) == (np.uint8, np.int8)


def test_order_does_not_depend_on_the_number_of_actors(stream: Stream) -> None:
    one, three = first(stream, 1, 7), first(stream, 3, 7)
    assert all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))
    expected = [(streams.draw(stream, i)[0].astype(np.float32) / 255)[None, None] for i in range(7)]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(one, expected, strict=True))


def test_batches_tell_what_they_took(stream: Stream) -> None:
    pool = SynthPool(1, cpus=0.2)
    reader = streams.read(ray.put(stream), pool.actors, first=0, every=1, batch=3, ahead=3, device=CPU)
    times = [each for _, each in islice(reader, 3)]
    pool.close()
    assert all(each.waited >= 0 and each.made > 0 for each in times)


def test_an_actor_stays_within_the_memory_it_declares(ray_cluster: None, config: RunConfig, heads: Cohort) -> None:
    large = config.model_copy(update={"grid": GridConfig(spacing_mm=2, size=128)})  # type: ignore[arg-type]
    scans = {"labelled": (streams.prepare(heads, large)[:1], [1.0])}
    parts = (StreamConfig(type="synthetic", share=0.5), StreamConfig(type="real", share=0.5))
    reference = ray.put(streams.build(parts, large, scans=scans, seed=0))

    @ray.remote(num_cpus=0.2)
    def peak(stream: Stream) -> int:
        import resource

        for index in range(8):
            streams.draw(stream, index)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert ray.get(peak.remote(reference)) < streams.actor_bytes(128**3)


def test_workers_share_a_stream_without_overlap(stream: Stream) -> None:
    both = [first(stream, 1, 2, rank=rank, world=2) for rank in (0, 1)]
    alone = first(stream, 1, 4)
    assert all(np.array_equal(alone[i], both[i % 2][i // 2]) for i in range(4))


def test_ingredients_come_by_their_shares_and_weights(stream: Stream) -> None:
    weights = [streams.draw(stream, i)[2] for i in range(80)]
    assert {1.0, 0.25, 0.5} == set(weights)
    assert 0.3 < weights.count(1.0) / len(weights) < 0.7


def test_a_mask_too_small_for_the_grid_ends_nothing_where_it_may_be_spared(
    ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path
) -> None:
    rows = heads.rows()
    mask = nib.load(rows[1]["label"])
    speck = np.zeros(mask.shape, np.uint8)
    speck[tuple(n // 2 for n in mask.shape)] = 1
    nib.save(nib.Nifti1Image(speck, mask.affine), tmp_path / "speck.nii.gz")
    rows[1]["label"] = str(tmp_path / "speck.nii.gz")
    cohort = Cohort(pa.Table.from_pylist(rows, heads.table.schema))
    coarse = config.model_copy(update={"grid": config.grid.model_copy(update={"spacing_mm": (12.0, 12.0, 12.0)})})
    refs = streams.prepare(cohort, coarse, spare=True)
    assert [ref is None for ref in refs] == [place == 1 for place in range(len(rows))]
    with pytest.raises(DataError, match=f"scan '{rows[1]['key']}': "):
        streams.prepare(cohort, coarse)


def test_mask_stream_deforms_the_mask_alone(prepared: list[Any], config: RunConfig) -> None:
    parts = (StreamConfig(type="mask", deform=STILL),)
    built = streams.build(parts, config, scans={"labelled": (prepared[:1], [1.0])}, seed=0)
    image, label, _ = streams.draw(built, 0)
    assert image.size == 0
    assert np.array_equal(label, ray.get(prepared[0]).target)


@pytest.fixture
def graded(ray_cluster: None, heads: Cohort, config: RunConfig, tmp_path: Path) -> list[Any]:
    """One prepared scan whose label is a probability."""
    row = heads.rows()[0]
    mask = nib.load(row["label"])
    share = gaussian_filter(np.asarray(mask.dataobj, np.float64), 2)
    nib.save(nib.Nifti1Image(np.rint(255 * share).astype(np.uint8), mask.affine), tmp_path / "p.nii.gz")
    changed = row | {"label": str(tmp_path / "p.nii.gz"), "kind": PROBABILITY}
    return streams.prepare(Cohort(pa.Table.from_pylist([changed], heads.table.schema)), config)


def labels(graded: list[Any], config: RunConfig, count: int, **how: Any) -> np.ndarray:
    """Labels of the first samples, as they lie: (count, *size)."""
    settings = config.synthesis.model_dump()
    settings["augment"] = {name: effect | {"probability": 0} for name, effect in settings["augment"].items()}
    still = config.model_copy(update={"synthesis": SynthesisConfig.model_validate(settings)})
    parts = (StreamConfig(of="selected", deform=STILL, **how),)
    built = streams.build(parts, still, scans={"selected": (graded, [1.0])}, seed=0)
    return np.stack([streams.draw(built, index)[1] for index in range(count)])


@pytest.mark.parametrize("kind", ["real", "synthetic"])
def test_soft_labels_are_the_probability_in_the_mean(graded: list[Any], config: RunConfig, kind: str) -> None:
    share = ray.get(graded[0]).probability[0] / 255
    drawn = labels(graded, config, 400, type=kind, soft=True)
    assert set(np.unique(drawn)) == {0, 1}
    # Five standard errors; all voxels of a sample share its threshold.
    assert np.abs(drawn.mean(0) - share).max() < 5 * 0.5 / np.sqrt(400)
    assert np.array_equal(drawn.all(0) | ~drawn.any(0), (drawn.mean(0) == 0) | (drawn.mean(0) == 1))
    assert drawn[:, share == 1].all() and not drawn[:, share == 0].any()
    assert np.array_equal(drawn[:3], labels(graded, config, 3, type=kind, soft=True))


@pytest.mark.parametrize("kind", ["real", "synthetic"])
def test_ignored_voxels_and_they_alone_are_unknown(graded: list[Any], config: RunConfig, kind: str) -> None:
    scan = ray.get(graded[0])
    share = scan.probability[0] / 255
    drawn = labels(graded, config, 3, type=kind, ignore=(0.2, 0.8))
    between = (share > 0.2) & (share < 0.8)
    assert between.any()
    for label in drawn:
        assert np.array_equal(label == IGNORE, between)
        assert np.array_equal(label[~between], scan.target[~between])
    assert all(np.array_equal(label, scan.target) for label in labels(graded, config, 3, type=kind))


def test_a_scan_takes_the_memory_that_is_declared(graded: list[Any], prepared: list[Any], config: RunConfig) -> None:
    voxels = config.grid.size[0] ** 3
    for scan, probabilities in ((graded[0], 1), (prepared[0], 0)):
        held = len(pickle.dumps(ray.get(scan), protocol=5))
        assert 0 <= held - streams.scan_bytes(voxels, probabilities=probabilities) < 10_000


def test_a_scan_that_cannot_be_prepared_is_named(ray_cluster: None, heads: Cohort, config: RunConfig) -> None:
    table = heads.table.set_column(1, "image", [["/nowhere.nii.gz"] * len(heads)])
    with pytest.raises(DataError, match="head0.*nowhere"):
        streams.prepare(Cohort(table), config)


@pytest.mark.parametrize("kind", ["real", "synthetic"])
def test_samples_hold_every_class(config: RunConfig, kind: str) -> None:
    place = np.indices((32, 32, 32)) - 15.5
    target = np.where(np.sqrt((place**2).sum(0)) < 11, 1 + (place[0] > 0) + (place[1] > 0), 0)
    noise = np.random.default_rng(0).random(target.shape, np.float32)
    image = (0.2 * target + 0.2 * noise).astype(np.float32)
    scan = bin_scan(image, target, spacing_mm=config.grid.spacing_mm, config=config.synthesis.bins, classes=4)
    parts = (StreamConfig.model_validate({"type": kind, "deform": STILL}),)
    built = streams.build(parts, config, scans={"labelled": ([scan], [1.0])}, seed=0)
    for index in range(4):
        image, label, _ = streams.draw(built, index)
        seen = label == target  # but for what is out of view
        assert np.array_equal(label[~seen], np.zeros_like(label[~seen]))
        assert set(np.unique(label)) == {0, 1, 2, 3}
        assert len(np.unique(image)) > 4


def test_scribbles_stay_unknown_around_and_are_never_cut_away(config: RunConfig) -> None:
    target = np.full((32, 32, 32), IGNORE)
    target[4], target[16, 10:20, 16], target[16, 10:20, 20] = 0, 1, 2
    image = np.random.default_rng(0).random(target.shape, np.float32) / 2 + 0.5
    scan = bin_scan(image, target, spacing_mm=config.grid.spacing_mm, config=config.synthesis.bins, classes=3)
    settings = config.synthesis.model_dump() | {"strip": {"probability": 1, "border_mm": (0, 0)}}
    settings["augment"] = {name: effect | {"probability": 0} for name, effect in settings["augment"].items()}
    still = config.model_copy(update={"synthesis": SynthesisConfig.model_validate(settings)})
    built = streams.build(
        (StreamConfig(type="real", deform=STILL),), still, scans={"labelled": ([scan], [1.0])}, seed=0
    )
    found, label, _ = streams.draw(built, 0)
    assert np.array_equal(label, target)
    assert found[target != 0].min() > 0 and not found[target == 0].any()


def test_patches_show_structures_as_often_as_is_asked(config: RunConfig) -> None:
    target = np.zeros((32, 32, 32), np.int64)
    target[2:5, 2:5, 2:5], target[20:30, 20:30, 20:30] = 1, 2
    image = np.random.default_rng(0).random(target.shape, np.float32)
    scan = bin_scan(image, target, spacing_mm=config.grid.spacing_mm, config=config.synthesis.bins, classes=3)
    parts = (StreamConfig(type="real", deform=STILL),)
    shares = {}
    for balance in (0.0, 1.0):
        grid = config.grid.model_copy(update={"patch": (8, 12, 8), "balance": balance})
        small = config.model_copy(update={"grid": grid})
        built = streams.build(parts, small, scans={"labelled": ([scan], [1.0])}, seed=0)
        assert built.voxels == 8 * 12 * 8
        drawn = [streams.draw(built, index) for index in range(100)]
        assert all(image.shape == label.shape == (8, 12, 8) for image, label, _ in drawn)
        shares[balance] = [np.mean([(label == index).any() for _, label, _ in drawn]) for index in (1, 2)]
        masks = streams.build(
            (StreamConfig(type="mask", deform=STILL),), small, scans={"labelled": ([scan], [1.0])}, seed=0
        )
        assert np.array_equal(streams.draw(masks, 0)[1], target) and masks.voxels == 32**3
    assert shares[0.0][0] < 0.2  # a small structure in a corner
    assert min(shares[1.0]) > 0.3
