"""Ordered, prefetched, seeded streams of training samples, made by Ray actors.

Sample i of a stream is a pure function of the stream and i, so any actor may make it, again after a fault, and the
bytes are the same.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from onelabel.configs.augmentation import BinsConfig, DeformConfig, SynthesisConfig
from onelabel.configs.schema import RunConfig
from onelabel.configs.streams import StreamConfig
from onelabel.errors import DataError
from onelabel.imaging import random
from onelabel.imaging.classes import Classes
from onelabel.imaging.labels import BinnedScan, read_probability
from onelabel.imaging.prepare import scan_on_grid
from onelabel.imaging.volume import Grid
from onelabel.models.learners import Samples
from onelabel.tasks.cohort import PROBABILITY, Cohort

log = logging.getLogger(__name__)

Sample = tuple[np.ndarray, np.ndarray, float]

# A run may be a trial of Ray Tune, whose own placement group must not hold what the run starts.
ANYWHERE: Literal["DEFAULT"] = "DEFAULT"

_PROCESS_BYTES = 700 << 20  # of an actor that has made nothing yet
_VOXEL_BYTES = 24  # at most, of an actor that makes a sample


def this_node() -> NodeAffinitySchedulingStrategy:
    """Where a process must run to be lost with this one, and with no other node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@dataclass(frozen=True)
class Times:
    """Seconds that a batch was waited for, and that actors took to make it."""

    waited: float
    made: float


def actor_bytes(voxels: int, /) -> int:
    """Memory that a synthesis actor declares for a grid."""
    return _PROCESS_BYTES + _VOXEL_BYTES * voxels


def sample_bytes(voxels: int, /) -> int:
    """What a sample takes in the object store: image and label."""
    return 2 * voxels


def scan_bytes(voxels: int, /, *, probabilities: int = 0) -> int:
    """What a prepared scan takes there: intensity, class and distance, and the probabilities of a pseudo-label."""
    return (3 + probabilities) * voxels


@dataclass(frozen=True)
class Ingredient:
    """Scans (BinnedScan, or references to such) of equal treatment, with a weight each.

    soft, ignore : how their probability is read, if they have one, as in StreamConfig
    """

    type: str
    share: float
    scans: tuple[Any, ...]
    weights: tuple[float, ...]
    deform: DeformConfig | None
    soft: bool = False
    ignore: tuple[float, float] | None = None


@dataclass(frozen=True)
class Stream:
    """What a learner reads under one name.

    voxels : of a sample; patch, balance : as in GridConfig
    """

    ingredients: tuple[Ingredient, ...]
    synthesis: SynthesisConfig
    spacing_mm: tuple[float, float, float]
    voxels: int
    seed: int
    patch: tuple[int, int, int] | None = None
    balance: float = 0.0


def fetch(scan: Any, /) -> BinnedScan:
    """A scan, or what a reference to one refers to."""
    fetched: BinnedScan = ray.get(scan) if isinstance(scan, ray.ObjectRef) else scan
    return fetched


def draw(stream: Stream, index: int, /, *, device: str = "cpu", fetch: Callable[[Any], BinnedScan] = fetch) -> Sample:
    """Sample `index` of a stream.

    Returns
    -------
    image : (*size) uint8, empty where there is a mask alone; label : (*size) int8; weight
    """
    from onelabel.imaging import synthesis  # numba takes half a second to import, and only actors draw

    generator = random.generator(stream.seed, index)
    shares = torch.tensor([ingredient.share for ingredient in stream.ingredients])
    ingredient = stream.ingredients[int(torch.multinomial(shares, 1, generator=generator))]
    place = random.integer(0, len(ingredient.scans) - 1, generator)
    scan = fetch(ingredient.scans[place])
    if ingredient.type == "mask":
        return np.empty(0, np.uint8), _mask_alone(scan, stream, ingredient, generator), ingredient.weights[place]
    params = synthesis.sample_params(
        scan,
        stream.synthesis,
        spacing_mm=stream.spacing_mm,
        real=ingredient.type == "real",
        patch=_patch(scan, stream, generator) if stream.patch else None,
        deform_config=ingredient.deform,
        generator=generator,
    )
    params = replace(params, target=_target(scan, ingredient, generator))
    image, label = synthesis.synthesise(scan, params, spacing_mm=stream.spacing_mm, device=device)
    return image.cpu().numpy(), label.cpu().numpy(), ingredient.weights[place]


def _patch(scan: BinnedScan, stream: Stream, generator: torch.Generator) -> Any:
    """A part of a scan: around a voxel of some structure, or anywhere."""
    from onelabel.imaging.synthesis import Patch

    size, whole = stream.patch, scan.target.shape
    assert size
    if random.uniform(0, 1, generator) < stream.balance:
        wanted = random.integer(1, len(scan.tables) - 1, generator)
        places = np.flatnonzero(scan.target == wanted)
        places = places if places.size else np.flatnonzero(scan.target > 0)
        voxel = np.unravel_index(places[random.integer(0, len(places) - 1, generator)], whole)
        first = [min(max(int(v) - n // 2, 0), m - n) for v, n, m in zip(voxel, size, whole, strict=True)]
    else:
        first = [random.integer(0, m - n, generator) for n, m in zip(size, whole, strict=True)]
    x, y, z = (start + (n - 1) / 2 for start, n in zip(first, size, strict=True))
    return Patch(size, (x, y, z))


def _target(scan: BinnedScan, ingredient: Ingredient, generator: torch.Generator) -> np.ndarray | None:
    """How a sample reads its scan's probability; None: the label is hard."""
    threshold = random.uniform(0, 1, generator) if ingredient.soft else None
    if scan.probability is None or not (ingredient.soft or ingredient.ignore):
        return None
    return read_probability(scan.probability, threshold=threshold, ignore=ingredient.ignore)


def _mask_alone(scan: BinnedScan, stream: Stream, ingredient: Ingredient, generator: torch.Generator) -> np.ndarray:
    from onelabel.imaging import deform, synthesis

    config = ingredient.deform or stream.synthesis.deform
    moved = deform.sample_deformation(config, size=scan.target.shape, spacing_mm=stream.spacing_mm, generator=generator)
    return synthesis.move(scan.target, moved, spacing_mm=stream.spacing_mm)


@ray.remote
class SynthActor:
    """Makes samples, one at a time."""

    def __init__(self, device: str) -> None:
        torch.set_num_threads(1)
        import_module("onelabel.imaging.synthesis")  # now, and not when the first sample is waited for
        self.device, self.fetch = device, lru_cache(maxsize=64)(fetch)

    def draw(self, stream: Stream, index: int) -> tuple[Sample, float]:
        """Sample `index` of a stream, and the seconds that it took."""
        begin = time.perf_counter()
        return draw(stream, index, device=self.device, fetch=self.fetch), time.perf_counter() - begin


class SynthPool:
    """Synthesis actors, which end with their maker; a lost one is started again and repeats only its calls in flight.

    memory : bytes that each declares
    here : on this node, from resources that their maker holds
    """

    def __init__(
        self, actors: int, /, *, cpus: float = 1, gpus: float = 0, memory: int = 0, here: bool = False
    ) -> None:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": ANYWHERE}
        if here:
            options["scheduling_strategy"] = this_node()
        options |= {"max_restarts": -1, "max_task_retries": -1}
        if memory:
            options["memory"] = memory
        device = "cuda" if gpus else "cpu"
        self.actors = [SynthActor.options(**options).remote(device) for _ in range(actors)]  # type: ignore[attr-defined]

    def close(self) -> None:
        """Free the actors' resources."""
        for actor in self.actors:
            ray.kill(actor)


def read(
    stream: Any, actors: list[Any], /, *, first: int, every: int, batch: int, ahead: int, device: torch.device
) -> Iterator[tuple[Samples, Times]]:
    """Batches in order, with the times that each took.

    Parameters
    ----------
    stream : reference to a Stream
    first, every : a worker reads samples first, first + every, ...: its rank and the number of workers, when new
    ahead : samples in flight
    """
    flying: deque[Any] = deque()
    index = first
    while True:
        while len(flying) < max(ahead, batch):
            flying.append(actors[(index // every) % len(actors)].draw.remote(stream, index))
            index += every
        start = time.perf_counter()
        samples, seconds = zip(*ray.get([flying.popleft() for _ in range(batch)]), strict=True)
        waited = time.perf_counter() - start
        yield collate(samples, device), Times(waited, sum(seconds))


def collate(samples: Sequence[Sample], device: torch.device, /) -> Samples:
    """Stack samples to a batch on a device."""
    images, labels, weights = zip(*samples, strict=True)
    image, label = (torch.from_numpy(np.stack(arrays)).to(device, non_blocking=True) for arrays in (images, labels))
    return Samples(image.unsqueeze(1) * (1 / 255), label, torch.tensor(weights, dtype=torch.float32, device=device))


def prepare(cohort: Cohort, config: RunConfig, /, *, spare: bool = False) -> list[Any]:
    """Load, conform and bin all scans of a cohort in parallel; references to BinnedScan, in the cohort's order.

    One that cannot be used, such as a mask too small for the grid, is a DataError; with `spare` a warning, and None.
    """
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    rows = cohort.rows()
    bins, classes, seed = config.synthesis.bins, Classes.of(config.data), config.seed
    refs: list[Any] = [
        _prepare.remote(row["image"], row["label"], row["kind"], grid, bins, classes, seed) for row in rows
    ]
    for place, (row, ref) in enumerate(zip(rows, refs, strict=True)):
        try:
            ray.wait([ref], fetch_local=False)
            ray.get(_touch.remote(ref))
        except ray.exceptions.RayTaskError as error:
            if not (spare and isinstance(error.cause, DataError)):
                raise DataError(f"scan '{row['key']}': {error.cause}") from None
            log.warning("scan '%s' is left out: %s", row["key"], error.cause)
            refs[place] = None
    return refs


@ray.remote(num_cpus=1, scheduling_strategy=ANYWHERE)
def _prepare(
    image: str, label: str, kind: str, grid: Grid, bins: BinsConfig, classes: Classes, seed: int
) -> BinnedScan:
    torch.set_num_threads(1)
    return scan_on_grid(image, label, grid, bins=bins, classes=classes, seed=seed, probability=kind == PROBABILITY)


@ray.remote(num_cpus=0, scheduling_strategy=ANYWHERE)
def _touch(scan: BinnedScan) -> None:
    """Fail if making the scan failed, without moving it to the driver."""


def build(
    streams: tuple[StreamConfig, ...],
    config: RunConfig,
    /,
    *,
    scans: Mapping[str, tuple[list[Any], list[float]]],
    seed: int,
) -> Stream:
    """Resolve a stream's ingredients to prepared scans.

    Parameters
    ----------
    scans : references and weights by `labelled` and `selected`
    """
    ingredients = [
        Ingredient(s.type, s.share, tuple(scans[s.of][0]), tuple(scans[s.of][1]), s.deform, s.soft, s.ignore)
        for s in streams
    ]
    grid, masks = config.grid, any(s.type == "mask" for s in streams)
    voxels = math.prod(grid.size if masks else grid.window)
    return Stream(
        tuple(ingredients), config.synthesis, grid.spacing_mm, voxels, seed, patch=grid.patch, balance=grid.balance
    )
