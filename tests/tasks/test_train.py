import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from onelabel.configs.learners import SupervisedConfig
from onelabel.configs.schema import ComputeConfig, RunConfig
from onelabel.models import checkpoint
from onelabel.models.checkpoint import Meta
from onelabel.models.learners import Samples
from onelabel.tasks import streams
from onelabel.tasks.cohort import Cohort
from onelabel.tasks.streams import Times
from onelabel.tasks.train import Job, fit, forget_torn, row_queue
from onelabel.tasks.worker import FitTask, Row, loop, make_learner

CPU = torch.device("cpu")
FLOAT = ComputeConfig(precision="float32")


@pytest.fixture
def task(config: RunConfig) -> FitTask:
    network = config.network
    meta = Meta(network.model_dump(mode="json"), "supervised", config.grid.model_dump(mode="json"), 0, 0, "")
    return FitTask("segmenter", SupervisedConfig(), network, 6, 1, meta, every=2)


def noise(first: int) -> Iterator[tuple[Samples, Times]]:
    """Endless samples; each depends on its number alone."""
    for i in count(first):
        generator = torch.Generator().manual_seed(i)
        image = torch.rand(1, 1, 16, 16, 16, generator=generator)
        yield Samples(image, (image[:, 0] > 0.5).to(torch.int8), torch.ones(1)), Times(0.0, 0.0)


def test_a_resumed_loop_equals_an_undisturbed_one(task: FitTask) -> None:
    whole = make_learner(task, FLOAT, device=CPU)
    loop(whole, {"train": noise(0)}, task, first=0, rank=0, on_step=lambda *_: None)
    half = make_learner(task, FLOAT, device=CPU)
    states: dict[int, Any] = {}
    loop(half, {"train": noise(0)}, replace(task, steps=6), first=0, rank=0, on_step=_keep(half, states))
    again = make_learner(task, FLOAT, device=CPU)
    again.load_state_dict(states[2])
    torch.rand(7)  # what else the process drew does not matter
    loop(again, {"train": noise(3)}, task, first=3, rank=0, on_step=lambda *_: None)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name]), name
        assert not torch.equal(weight, states[2]["network"][name]) or weight.numel() == 0, name


def test_accumulated_batches_equal_one_large_batch(task: FitTask) -> None:
    network = task.network.model_copy(update={"norm": "none", "dropout": 0.0})
    whole = replace(task, network=network, steps=3, learner=SupervisedConfig(batch=2))
    parts = replace(whole, learner=SupervisedConfig(accumulate=2))

    def pairs() -> Iterator[tuple[Samples, Times]]:
        single = noise(0)
        while True:
            (one, took), (two, _) = next(single), next(single)
            yield Samples(*(torch.cat([getattr(s, n) for s in (one, two)]) for n in ("image", "label", "weight"))), took

    at_once, by_parts = (make_learner(each, FLOAT, device=CPU) for each in (whole, parts))
    logged: dict[str, list[dict[str, float]]] = {"whole": [], "parts": []}
    loop(at_once, {"train": pairs()}, whole, first=0, rank=0, on_step=lambda _, row, __: logged["whole"].append(row))
    loop(by_parts, {"train": noise(0)}, parts, first=0, rank=0, on_step=lambda _, row, __: logged["parts"].append(row))
    assert len(logged["whole"]) == len(logged["parts"]) == 3
    for key in ("loss", "gradient_norm"):
        assert logged["parts"][0][key] == pytest.approx(logged["whole"][0][key], rel=1e-4)


@pytest.mark.parametrize(("content", "kept"), [('{"ray_version": "2"}', True), ("", False), ('{"ray_ver', False)])
def test_what_ray_train_left_half_written_is_forgotten(tmp_path: Path, content: str, kept: bool) -> None:
    known = tmp_path / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    forget_torn(tmp_path)
    known.write_text(content)
    (tmp_path / "checkpoint_1").mkdir()
    forget_torn(tmp_path)
    assert known.exists() is kept


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: torch.compile is not tried")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_channels_last_and_compiling_change_no_result(task: FitTask) -> None:
    plain = make_learner(task, FLOAT, device=CPU)
    fast = make_learner(task, FLOAT.model_copy(update={"channels_last": True, "compile": True}), device=CPU)
    for subject in (plain, fast):
        loop(subject, {"train": noise(0)}, replace(task, steps=2), first=0, rank=0, on_step=lambda *_: None)
    state = fast.network.state_dict()
    for name, weight in plain.network.state_dict().items():
        torch.testing.assert_close(state[name], weight, rtol=1e-3, atol=1e-3)


@contextmanager
def shown(rows: list[Row]) -> Iterator[Callable[[Row], None]]:
    """Keep the rows of a task."""
    yield rows.append


def _keep(learner: Any, states: dict[int, Any]) -> Any:
    def on_step(step: int, *_: object) -> None:
        copied = {name: value.clone() for name, value in learner.network.state_dict().items()}
        optimiser = learner.optimiser.state_dict()
        moments = {i: {k: v.clone() for k, v in s.items()} for i, s in optimiser["state"].items()}
        states[step] = {"network": copied, "optimiser": optimiser | {"state": moments}}

    return on_step


def test_two_workers_step_as_one_with_twice_the_batch(
    ray_cluster: None, heads: Cohort, config: RunConfig, task: FitTask, tmp_path: Path
) -> None:
    network = config.network.model_copy(update={"dropout": 0.0, "norm": "none"})
    scans = {"labelled": (streams.prepare(heads, config), [1.0] * len(heads))}
    source = {"train": streams.build(config.stages[0].streams["train"], config, scans=scans, seed=0)}
    queue = row_queue()
    weights = []
    for workers, least in ((1, None), (2, None), (2, 1)):
        counts = {"train_workers": workers, "min_train_workers": least}
        compute = config.compute.model_copy(
            update={**counts, "cpus_per_worker": 0.25, "synth_cpus": 0.25, "threads": 1}
        )
        learner = SupervisedConfig(batch=2 // workers, weight_decay=0.1)
        meta = replace(task.meta, network=network.model_dump(mode="json"))
        now = replace(task, learner=learner, network=network, meta=meta)
        rows: dict[str, list[Row]] = {"segmenter": [], "shorter": []}
        jobs = [
            Job(each, source, tmp_path / f"{workers}-{least}-{each.name}", partial(shown, rows[each.name]))
            for each in (now, replace(now, name="shorter", steps=2, seed=5))
        ]
        out = jobs[0].out
        figures = fit(jobs, compute=compute, folder=tmp_path / "training", queue=queue)
        assert {name: [row["step"] for row in each] for name, each in rows.items()} == {
            "segmenter": [2, 4, 6],
            "shorter": [2],
        }
        for row in figures.values():
            assert 0 <= row["wait_share"] < 1 and 0 <= row["idle_share"] <= 1
        assert checkpoint.load(jobs[1].out)[1].step == 2
        found, meta = checkpoint.load(out)
        assert meta.step == 6
        assert not (tmp_path / "training").exists()
        weights.append(found.state_dict())
    queue.shutdown(force=True)
    start = make_learner(replace(task, network=network), FLOAT, device=CPU).network.state_dict()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weights[2][name], weights[1][name], rtol=0, atol=0)
    assert any(not torch.allclose(start[name].cpu(), weights[0][name], atol=1e-3) for name in start)
    assert ray.is_initialized()
