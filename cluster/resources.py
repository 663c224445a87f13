"""A run's demand against the cluster: an actor that cannot be placed would wait in silence."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray import ActorID, PlacementGroupID
from ray.autoscaler.sdk import request_resources
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from onelabel.configs.schema import ComputeConfig
from onelabel.errors import ClusterError

log = logging.getLogger(__name__)

Bundle = Mapping[str, float]
_LOOK_S = 2
_TELL_S = 30
_TURN = {"node:__internal_head__": 0.6}  # of 1, which a cluster has once: one at a time can hold it
_UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory", "object_store_memory": "GiB of object store"}


@dataclass(frozen=True)
class Demand:
    """What runs at the same time.

    bundles : resources of each process; change : settings by which the demand is made smaller
    """

    name: str
    bundles: tuple[Bundle, ...]
    change: str

    def total(self, resource: str, /) -> float:
        """All bundles' share of a resource, such as `CPU`."""
        return math.fsum(bundle.get(resource, 0) for bundle in self.bundles)


def of_stage(compute: ComputeConfig, /, *, actor_bytes: float = 0, store_bytes: float = 0) -> list[Demand]:
    """What training and scoring take at least, which follow each other.

    An elastic train worker and its synthesis actors share a node, others may be anywhere.

    Parameters
    ----------
    actor_bytes : memory of a synthesis actor
    store_bytes : samples in flight and scans of a train worker, in the object store
    """
    worker = {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker, "object_store_memory": store_bytes}
    synthesis = {"CPU": compute.synth_cpus, "GPU": compute.synth_gpus, "memory": actor_bytes}
    scorer = {"CPU": 1.0, "GPU": compute.score_gpus}
    workers, actors = compute.min_train_workers or compute.train_workers, compute.synth_actors
    if compute.min_train_workers:
        training: tuple[Bundle, ...] = (together(worker, *(synthesis,) * actors),) * workers
    else:
        training = (worker,) * workers + (synthesis,) * (actors * workers)
    return [
        Demand(
            "training",
            training,
            f"compute.{'min_' if compute.min_train_workers else ''}train_workers, compute.cpus_per_worker,"
            " compute.gpus_per_worker, compute.synth_actors,"
            " compute.ahead or grid.size",
        ),
        Demand("scoring", (scorer,) * compute.score_actors, "compute.score_actors or compute.score_gpus"),
    ]


def check(demands: Sequence[Demand], /, *, wait_s: float) -> None:
    """Return once the nodes, were they idle, could hold each demand.

    Parameters
    ----------
    demands : each by itself
    wait_s : how long nodes may still be added; an autoscaler is asked for them. 0: it is now or never.

    Raises
    ------
    ClusterError : what is asked for, what is there and what to change.
    """
    begin = told = time.monotonic()
    asked = False
    try:
        while unmet := [demand for demand in demands if not fits(demand.bundles, _nodes())]:
            now = time.monotonic()
            if now - begin >= wait_s:
                more = "" if wait_s else ", or set compute.wait_s where an autoscaler adds them"
                raise ClusterError(f"{_sentence(unmet[0], _nodes())}; lower {unmet[0].change}, or add nodes{more}")
            if not asked:
                request_resources(bundles=[asked_for(bundle) for bundle in unmet[0].bundles])
            if not asked or now - told >= _TELL_S:
                log.warning("%s; waiting %.0f s for more nodes", _sentence(unmet[0], _nodes()), begin + wait_s - now)
                told = now
            asked = True
            time.sleep(min(_LOOK_S, max(0.0, begin + wait_s - now)))
    finally:
        if asked:
            request_resources(bundles=[])


@contextmanager
def watch(demands: Sequence[Demand], /, *, every_s: float = _TELL_S) -> Iterator[None]:
    """Say what is missing, again and again, while nodes that were lost after `check` are waited for."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            nodes = _nodes()
            for demand in [each for each in demands if not fits(each.bundles, nodes)][:1]:
                log.warning("%s; waiting for nodes to come back", _sentence(demand, nodes))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def turn(*, tell_s: float = _TELL_S) -> Iterator[Callable[[], None]]:
    """Begin one after the other: runs that each hold a part of what both still need would wait for ever.

    Yields
    ------
    What to call when all processes of this run are there, for the next to begin; the end of the block does it too.
    """
    group = placement_group([_TURN])
    try:
        while not group.wait(tell_s):
            log.info("another run's training is about to begin, and may wait for resources; this one is next")
        yield lambda: remove_placement_group(group)
    finally:
        remove_placement_group(group)


def release_orphans() -> int:
    """Give back what this job's dead actors had reserved; how many placement groups it was.

    Ray frees a group when its creator and the whole job have ended. What Ray Train has to do so earlier asks the
    dashboard, which a local cluster lacks, and gives up.
    """
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    state = ray._private.state.state  # the public table does not say who made a group
    raw = state._connect_and_get_accessor().get_placement_group_table()
    kind = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]
    ours = [group for group in map(kind.FromString, raw) if group.creator_job_id == job]
    made = [group for group in ours if not ActorID(group.creator_actor_id).is_nil()]  # by an actor, not by this process
    orphans = [group for group in made if group.creator_actor_dead and group.state != kind.REMOVED]
    for group in orphans:
        remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
    return len(orphans)


def asked_for(bundle: Bundle, /) -> dict[str, float]:
    """What an autoscaler may be asked for: no kind of node declares an object store, and none would be added."""
    return {name: amount for name, amount in bundle.items() if amount and name != "object_store_memory"}


def together(*bundles: Bundle) -> Bundle:
    """One bundle that holds all of these."""
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    return {name: math.fsum(bundle.get(name, 0) for bundle in bundles) for name in names}


def fits(bundles: Sequence[Bundle], nodes: Sequence[Bundle], /) -> bool:
    """Whether nodes with these resources hold all bundles at once: the largest first, each where there is room."""
    room = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0), b.get("CPU", 0)), reverse=True):
        for node in room:
            if all(node.get(name, 0) >= amount - 1e-6 for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] = node.get(name, 0) - amount
                break
        else:
            return False
    return True


def copies(demands: Sequence[Demand], /, *, most: int) -> int:
    """How many times the nodes, were they idle, could hold each of the demands at once: from 1 to `most`."""
    nodes = _nodes()
    count = 1
    while count < most and all(fits(demand.bundles * (count + 1), nodes) for demand in demands):
        count += 1
    return count


def capacity(bundle: Bundle, /) -> int:
    """How many processes of such resources the nodes hold, were they idle."""
    return sum(int(min(node.get(name, 0) / amount for name, amount in bundle.items() if amount)) for node in _nodes())


def _nodes() -> list[Bundle]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sentence(demand: Demand, nodes: Sequence[Bundle]) -> str:
    wanted = [name for name in _UNITS if demand.total(name)]
    needs = " and ".join(
        f"{_amount(name, demand.total(name))} (up to {_size(name, max(b.get(name, 0) for b in demand.bundles))} in one"
        " process)"
        for name in wanted
    )
    there = {name: [node.get(name, 0) for node in nodes] for name in wanted}
    has = " and ".join(
        f"{_amount(name, sum(each))} (up to {_size(name, max(each, default=0))} on one node)"
        for name, each in there.items()
    )
    return f"{demand.name} needs {needs}, the cluster has {has}"


def _amount(resource: str, value: float) -> str:
    return f"{_size(resource, value)} {_UNITS[resource]}"


def _size(resource: str, value: float) -> str:
    return f"{value / 2**30:.1f}" if resource in ("memory", "object_store_memory") else f"{value:g}"
