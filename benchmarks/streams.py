"""What streams cost beside the synthesis itself.

python benchmarks/streams.py [--size 128] [--actors 64]

Three measurements on a local Ray, Markdown to stdout: what it takes to bring a sample from an actor to a tensor of the
trainer; how much faster two actors are than one when nobody trains; and what a sample costs its reader when many actors
feed it, played by actors that sleep.
"""

import argparse
import sys
import time
from itertools import islice
from typing import Any

import numpy as np
import ray
import torch
from synthesis import EXTENT_MM, LABELS, head

from onelabel.configs.load import load
from onelabel.configs.streams import StreamConfig
from onelabel.tasks import streams
from onelabel.tasks.streams import SynthPool

CPU = torch.device("cpu")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--actors", type=int, default=64, help="that sleep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    reference = ray.put(stream(options.size))
    rates, made = {}, 0.0
    for actors in (1, 2, 1, 2):
        rate, made = read(reference, actors)
        rates[actors] = max(rate, rates.get(actors, 0.0))
    size, seconds = carry(options.size)
    lines = ["| measurement | value |", "|---|---|"]
    lines.append(f"| synthesis of a sample of {options.size}^3, in an actor | {1e3 * made:.1f} ms |")
    lines.append(f"| bytes of a sample | {size / 1e6:.2f} MB |")
    lines.append(f"| from actor to tensor | {1e3 * seconds:.1f} ms, {seconds / made:.0%} of its synthesis |")
    lines.append(
        f"| samples per second, one actor and two | {rates[1]:.1f}, {rates[2]:.1f}: x {rates[2] / rates[1]:.2f} |"
    )
    cost = crowd(options.actors)
    lines.append(f"| CPU time of the reader a sample, {options.actors} sleeping actors | {1e3 * cost:.2f} ms |")
    sys.stdout.write("\n".join(lines) + "\n")


def stream(size: int) -> streams.Stream:
    """Synthetic samples of a phantom."""
    bins = [
        f"synthesis.bins.{where}={count}" for where, count in zip(("foreground", "background"), LABELS, strict=True)
    ]
    config = load(["supervised", "name=streams", "data.labelled=none", f"grid.size={size}", *bins])
    config = config.model_copy(update={"grid": config.grid.model_copy(update={"spacing_mm": (EXTENT_MM / size,) * 3})})
    scans = {"labelled": ([head(size)], [1.0])}
    return streams.build((StreamConfig(type="synthetic"),), config, scans=scans, seed=0)


def read(reference: Any, actors: int, *, seconds: float = 10.0) -> tuple[float, float]:
    """Samples per second without a trainer, and the seconds that a sample takes its actor."""
    pool = SynthPool(actors)
    reader = streams.read(reference, pool.actors, first=0, every=1, batch=1, ahead=4 * actors, device=CPU)
    for _ in islice(reader, 8 * actors):
        pass  # compiles, warms up
    begin, made = time.perf_counter(), []
    while time.perf_counter() - begin < seconds:
        made.append(next(reader)[1].made)
    rate = len(made) / (time.perf_counter() - begin)
    pool.close()
    return rate, float(np.mean(made))


@ray.remote(num_cpus=0)
class Porter:
    """Hands over the same sample again and again."""

    def __init__(self, size: int, sleep_s: float) -> None:
        rng = np.random.default_rng(0)
        image = rng.integers(0, 255, (size,) * 3, np.uint8)
        self.sample, self.sleep_s = (image, (image > 99).astype(np.int8), 1.0), sleep_s

    def draw(self, _stream: Any, _index: int) -> Any:
        """A sample, and no seconds for it."""
        time.sleep(self.sleep_s)
        return self.sample, 0.0


def carry(size: int, *, count: int = 200) -> tuple[int, float]:
    """Bytes of a sample, and the seconds that each takes to the trainer's tensors when its actor has them ready."""
    porter = Porter.remote(size, 0.0)
    image, label, _ = ray.get(porter.draw.remote(None, 0))[0]
    reader = streams.read(ray.put(None), [porter], first=0, every=1, batch=1, ahead=6, device=CPU)
    for _ in islice(reader, 20):
        pass
    begin = time.perf_counter()
    for _ in islice(reader, count):
        pass
    seconds = (time.perf_counter() - begin) / count
    ray.kill(porter)
    return image.nbytes + label.nbytes, seconds


def crowd(actors: int, *, count: int = 1000, sleep_s: float = 1.0) -> float:
    """CPU seconds that a sample costs the process that reads it."""
    porters = [Porter.remote(8, sleep_s) for _ in range(actors)]
    reader = streams.read(ray.put(None), porters, first=0, every=1, batch=1, ahead=2 * actors, device=CPU)
    for _ in islice(reader, 2 * actors):
        pass  # all have started
    begin = time.process_time()
    for _ in islice(reader, count):
        pass
    return (time.process_time() - begin) / count


if __name__ == "__main__":
    main()
