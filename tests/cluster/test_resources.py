import logging
import threading
import time
from itertools import product

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from onelabel.cluster import resources
from onelabel.cluster.resources import Demand, check, fits, of_stage, together, watch
from onelabel.configs.schema import ComputeConfig
from onelabel.errors import ClusterError

MEMORY = 2**30


@pytest.mark.parametrize(
    ("bundles", "nodes", "expected"),
    [
        ([], [], True),
        ([{"CPU": 1}], [], False),
        ([{"CPU": 1}, {"CPU": 1}], [{"CPU": 2}], True),
        ([{"CPU": 4}], [{"CPU": 2}, {"CPU": 2}], False),
        ([{"CPU": 2}] * 3, [{"CPU": 3}, {"CPU": 3}], False),
        ([{"CPU": 1}, {"CPU": 1}, {"CPU": 4}], [{"CPU": 2}, {"CPU": 4}], True),
        ([{"CPU": 1, "GPU": 1}], [{"CPU": 8}], False),
        ([{"CPU": 1, "GPU": 0}], [{"CPU": 1}], True),
        ([{"CPU": 1, "GPU": 0.5}, {"CPU": 1, "GPU": 0.5}], [{"CPU": 1}, {"CPU": 2, "GPU": 1}], True),
        ([{"CPU": 0.1}] * 10, [{"CPU": 1}], True),
    ],
)
def test_what_fits(bundles: list[dict[str, float]], nodes: list[dict[str, float]], expected: bool) -> None:
    assert fits(bundles, nodes) is expected


def test_a_stage_trains_and_synthesises_at_once() -> None:
    compute = ComputeConfig(
        train_workers=3, cpus_per_worker=4, gpus_per_worker=1, synth_actors=2, synth_gpus=0.25, score_actors=5
    )
    training, scoring = of_stage(compute)
    assert (training.total("CPU"), training.total("GPU")) == (3 * 4 + 3 * 2, 3 + 6 * 0.25)
    assert (scoring.total("CPU"), scoring.total("GPU")) == (5, 0)


def test_as_many_runs_are_had_at_once_as_fit_or_are_wanted(ray_cluster: None) -> None:
    assert resources.copies(of_stage(ComputeConfig()), most=9) == 1
    small = of_stage(ComputeConfig(synth_cpus=0.1, cpus_per_worker=0.3, score_actors=1))
    assert [resources.copies(small, most=most) for most in (1, 2, 9)] == [1, 2, 2]


def test_the_defaults_fit_on_two_cores(ray_cluster: None) -> None:
    check(of_stage(ComputeConfig()), wait_s=0)


def test_what_can_never_be_met_is_refused_at_once(ray_cluster: None) -> None:
    with pytest.raises(ClusterError, match=r"training needs 5 CPUs \(up to 4 in one process\), the cluster has 2 CPUs"):
        check(of_stage(ComputeConfig(cpus_per_worker=4)), wait_s=0)


@pytest.mark.parametrize("setting", ["gpus_per_worker", "score_gpus"])
def test_gpus_that_are_not_there_are_refused(ray_cluster: None, setting: str) -> None:
    there = rf"needs .*GPUs .*the cluster has .*0 GPUs \(up to 0 on one node\); lower .*compute\.{setting}"
    with pytest.raises(ClusterError, match=there):
        check(of_stage(ComputeConfig.model_validate({setting: 1})), wait_s=0)


def test_more_memory_than_there_is_is_refused_at_once(ray_cluster: None) -> None:
    there = r"needs .* 10000.0 GiB of memory \(up to 10000.0 in one process\).*, the cluster has .* GiB of memory"
    with pytest.raises(ClusterError, match=there):
        check(of_stage(ComputeConfig(), actor_bytes=10000 * 2**30), wait_s=0)
    with pytest.raises(ClusterError, match="10000.0 GiB of object store.*compute.ahead"):
        check(of_stage(ComputeConfig(), store_bytes=10000 * 2**30), wait_s=0)


def test_the_setting_to_change_is_named(ray_cluster: None) -> None:
    with pytest.raises(ClusterError, match="lower a.setting"):
        check([Demand("this", ({"GPU": 9.0},), "a.setting")], wait_s=0)


def test_nodes_that_come_late_are_waited_for(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([[{"CPU": 2.0}], [{"CPU": 2.0}], [{"CPU": 2.0}, {"CPU": 8.0}]])
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(resources, "_nodes", lambda: next(seen))
    monkeypatch.setattr(resources, "request_resources", lambda bundles: asked.append(bundles))
    check([Demand("this", ({"CPU": 8.0},), "a.setting")], wait_s=60)
    assert asked == [[{"CPU": 8.0}], []]


def test_who_expects_no_nodes_is_told_how_to_wait(ray_cluster: None) -> None:
    with pytest.raises(ClusterError, match="lower a.setting, or add nodes, or set compute.wait_s where"):
        check([Demand("this", ({"GPU": 9.0},), "a.setting")], wait_s=ComputeConfig().wait_s)


@pytest.mark.parametrize(("least", "actors", "gpus"), [*product([1, 2, 4], [1, 3], [0, 1, 0.5])])
def test_elastic_training_needs_its_least_workers_each_with_its_actors(least: int, actors: int, gpus: float) -> None:
    settings = {"train_workers": 4, "synth_actors": actors, "gpus_per_worker": gpus, "synth_cpus": 0.5}
    whole, elastic = (
        of_stage(ComputeConfig.model_validate(settings | more), actor_bytes=MEMORY)[0]
        for more in ({}, {"min_train_workers": least})
    )
    assert len(elastic.bundles) == least
    for resource in ("CPU", "GPU", "memory"):
        assert elastic.total(resource) == pytest.approx(whole.total(resource) * least / 4)
    assert "compute.min_train_workers" in elastic.change
    one = elastic.bundles[0]
    assert fits(elastic.bundles, [one] * least) and not fits(elastic.bundles, [one] * (least - 1))
    # Apart, they would fit between nodes on which no worker has its actors beside it.
    assert not fits(elastic.bundles, [{name: amount / 2 for name, amount in one.items()}] * 2 * least)


def test_what_stays_together_adds_up() -> None:
    assert together({"CPU": 1}, {"CPU": 2, "GPU": 1}) == {"CPU": 3, "GPU": 1}


def test_nodes_that_are_lost_are_missed_again_and_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = iter([[{"CPU": 4.0}], [{"CPU": 1.0}], [{"CPU": 1.0}], [{"CPU": 4.0}]])
    over = threading.Event()

    def nodes() -> list[dict[str, float]]:
        if (found := next(looks, None)) is None:
            over.set()
        return found or [{"CPU": 4.0}]

    monkeypatch.setattr(resources, "_nodes", nodes)
    with caplog.at_level(logging.WARNING), watch([Demand("this", ({"CPU": 4.0},), "a.setting")], every_s=0):
        assert over.wait(60)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("this needs 4 CPUs" in each and "the cluster has 1 CPUs" in each for each in said)


def test_what_a_dead_actor_reserved_is_given_back(ray_cluster: None) -> None:
    def hold() -> PlacementGroup:
        group = placement_group([{"CPU": 0.5}])
        ray.get(group.ready())
        return group

    @ray.remote(num_cpus=0)
    class Holder:
        def hold(self) -> str:
            return str(hold().id.hex())

    def held(name: str) -> bool:
        return bool(placement_group_table()[name]["state"] == "CREATED")

    dead, alive, ours = Holder.remote(), Holder.remote(), hold()
    lost, kept = ray.get([dead.hold.remote(), alive.hold.remote()])
    assert resources.release_orphans() == 0 and held(lost) and held(kept)
    ray.kill(dead)
    deadline = time.monotonic() + 60
    while not resources.release_orphans():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not held(lost) and held(kept) and held(ours.id.hex())
    remove_placement_group(ours)
    ray.kill(alive)
    while not resources.release_orphans():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_trainings_begin_one_after_the_other(ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    order: list[str] = []

    def second() -> None:
        with resources.turn(tell_s=1) as begun:
            order.append("second")
            begun()

    other = threading.Thread(target=second)
    with resources.turn() as begun:
        other.start()
        time.sleep(2)
        order.append("first")
        begun()
        other.join(60)  # it need not wait for the end of the block
        assert order == ["first", "second"]
    assert "another run's training is about to begin" in caplog.text


def test_who_fails_to_begin_leaves_the_turn_to_others(ray_cluster: None) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), resources.turn():
            raise RuntimeError
