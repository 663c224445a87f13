"""Ordered, prefetched, seeded streams of training samples, made by Ray actors.

Sample i of a stream is a pure function of the stream and i, so any actor may make it, again after a fault, and the
bytes are the same.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from onelabel.configs.augmentation import DeformConfig, SynthesisConfig
from onelabel.configs.schema import RunConfig, StreamConfig
from onelabel.errors import DataError
from onelabel.imaging import deform, random, synthesis
from onelabel.imaging.labels import BinnedScan
from onelabel.imaging.prepare import scan_on_grid
from onelabel.imaging.volume import Grid
from onelabel.models.learners import Samples
from onelabel.tasks.cohort import Cohort

Sample = tuple[np.ndarray, np.ndarray, float]


@dataclass(frozen=True)
class Ingredient:
    """Scans (references to BinnedScan) of equal treatment, with a weight each."""

    type: str
    share: float
    scans: tuple[Any, ...]
    weights: tuple[float, ...]
    deform: DeformConfig | None


@dataclass(frozen=True)
class Stream:
    """What a learner reads under one name."""

    ingredients: tuple[Ingredient, ...]
    synthesis: SynthesisConfig
    spacing_mm: tuple[float, float, float]
    seed: int


def draw(stream: Stream, index: int, /, *, device: str = "cpu") -> Sample:
    """Sample `index` of a stream.

    Returns
    -------
    image : (*size) float16; label : (*size) int8; weight
    """
    generator = random.generator(stream.seed, index)
    shares = torch.tensor([ingredient.share for ingredient in stream.ingredients])
    ingredient = stream.ingredients[int(torch.multinomial(shares, 1, generator=generator))]
    place = random.integer(0, len(ingredient.scans) - 1, generator)
    scan: BinnedScan = ray.get(ingredient.scans[place])
    if ingredient.type == "mask":
        image, label = _mask_alone(scan, stream, ingredient, generator)
    else:
        params = synthesis.sample_params(
            scan,
            stream.synthesis,
            spacing_mm=stream.spacing_mm,
            real=ingredient.type == "real",
            deform_config=ingredient.deform,
            generator=generator,
        )
        image, label = synthesis.synthesise(scan, params, spacing_mm=stream.spacing_mm, device=device)
    return image.half().cpu().numpy(), label.cpu().numpy(), ingredient.weights[place]


def _mask_alone(
    scan: BinnedScan, stream: Stream, ingredient: Ingredient, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    size = scan.target.shape
    config = ingredient.deform or stream.synthesis.deform
    moved = deform.sample_deformation(config, size=size, spacing_mm=stream.spacing_mm, generator=generator)
    place = deform.coordinates(moved, size=size, spacing_mm=stream.spacing_mm, device=torch.device("cpu"))
    index, inside = deform.nearest(place, size=size)
    label = (torch.tensor(scan.target).flatten().index_select(0, index) * inside).reshape(size)
    return torch.zeros(0), label


@ray.remote
class SynthActor:
    """Makes samples, one at a time."""

    def __init__(self, device: str) -> None:
        torch.set_num_threads(1)
        self.device = device

    def draw(self, stream: Stream, index: int) -> Sample:
        """Sample `index` of a stream."""
        return draw(stream, index, device=self.device)


class SynthPool:
    """Synthesis actors, owned by the driver; a lost one is started again and repeats only its calls in flight."""

    def __init__(self, actors: int, /, *, cpus: float = 1, gpus: float = 0) -> None:
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": -1}
        device = "cuda" if gpus else "cpu"
        self.actors = [SynthActor.options(**options).remote(device) for _ in range(actors)]  # type: ignore[attr-defined]

    def close(self) -> None:
        """Free the actors' resources."""
        for actor in self.actors:
            ray.kill(actor)


def read(
    stream: Any, actors: list[Any], /, *, first: int, every: int, batch: int, ahead: int, device: torch.device
) -> Iterator[tuple[Samples, float]]:
    """Batches in order, with the seconds spent waiting for each.

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
        samples = ray.get([flying.popleft() for _ in range(batch)])
        waited = time.perf_counter() - start
        yield collate(samples, device), waited


def collate(samples: list[Sample], device: torch.device, /) -> Samples:
    """Stack samples to a batch on a device."""
    images, labels, weights = zip(*samples, strict=True)
    return Samples(
        torch.from_numpy(np.stack(images)).to(device, non_blocking=True).float().unsqueeze(1),
        torch.from_numpy(np.stack(labels)).to(device, non_blocking=True),
        torch.tensor(weights, dtype=torch.float32, device=device),
    )


def prepare(cohort: Cohort, config: RunConfig, /) -> list[Any]:
    """Load, conform and bin all scans of a cohort in parallel; references to BinnedScan, in the cohort's order."""
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    rows = cohort.rows()
    refs = [_prepare.remote(row["image"], row["label"], grid, config.synthesis.bins, config.seed) for row in rows]
    for row, ref in zip(rows, refs, strict=True):
        try:
            ray.wait([ref], fetch_local=False)
            ray.get(_touch.remote(ref))
        except ray.exceptions.RayTaskError as error:
            raise DataError(f"scan '{row['key']}': {error.cause}") from None
    return refs


@ray.remote(num_cpus=1)
def _prepare(image: str, label: str, grid: Grid, bins: Any, seed: int) -> BinnedScan:
    torch.set_num_threads(1)
    return scan_on_grid(image, label, grid, bins=bins, seed=seed)


@ray.remote(num_cpus=0)
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
    ingredients = [Ingredient(s.type, s.share, tuple(scans[s.of][0]), tuple(scans[s.of][1]), s.deform) for s in streams]
    return Stream(tuple(ingredients), config.synthesis, config.grid.spacing_mm, seed)
