from itertools import islice
from typing import Any

import numpy as np
import pytest
import ray
import torch

from onelabel.configs.augmentation import DeformConfig
from onelabel.configs.schema import GridConfig, RunConfig
from onelabel.configs.streams import StreamConfig
from onelabel.errors import DataError
from onelabel.tasks import streams
from onelabel.tasks.cohort import Cohort
from onelabel.tasks.streams import Stream, SynthPool

CPU = torch.device("cpu")


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


def test_mask_stream_deforms_the_mask_alone(prepared: list[Any], config: RunConfig) -> None:
    still = DeformConfig(translate_mm=0, rotate_deg=0, scale=(1, 1), shear=0, warp_mm=(0, 0), flip=0)
    parts = (StreamConfig(type="mask", deform=still),)
    built = streams.build(parts, config, scans={"labelled": (prepared[:1], [1.0])}, seed=0)
    image, label, _ = streams.draw(built, 0)
    assert image.size == 0
    assert np.array_equal(label, ray.get(prepared[0]).target)


def test_a_scan_that_cannot_be_prepared_is_named(ray_cluster: None, heads: Cohort, config: RunConfig) -> None:
    table = heads.table.set_column(1, "image", [["/nowhere.nii.gz"] * len(heads)])
    with pytest.raises(DataError, match="head0.*nowhere"):
        streams.prepare(Cohort(table), config)
