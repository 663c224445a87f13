import io
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import CONFIGS, STEPS, batch, learner, part, samples, step, weights

from onelabel.configs.learners import OptimiserConfig
from onelabel.configs.load import PRESETS, load
from onelabel.imaging.labels import IGNORE
from onelabel.models.learners import LEARNERS, Learner, Progress
from onelabel.models.learners.base import learning_rate, ramp

# Those whose weights at rest are those of an average: their teacher.
MEANS = [name for name in LEARNERS if CONFIGS[name].model_fields["ema"].default]
# Batch normalisation of the autoencoder joins the samples of a batch.
SEGMENTERS = [name for name, each in LEARNERS.items() if each.segments]
# The same views in every part and worker.
FIXED: dict[str, dict[str, Any]] = {"meta_weighted": {"noise": 0.0, "zoom": (1.2, 1.2)}}
OVERLAYS = {"smoke", "default_brain"}
UNREAD = {"reciprocal": "unlabelled", "curriculum": "unlabelled"}
TEACHERS: dict[str, Callable[[Learner], nn.Module]] = {
    **dict.fromkeys(MEANS, Learner.predictor),
    "reciprocal": lambda subject: subject.teacher,  # type: ignore[attr-defined, dict-item]
}


class Meeting:
    """Averages the gradients of two threads that stand for workers; only one of them computes at a time."""

    def __init__(self) -> None:
        self.barrier, self.turn = threading.Barrier(2, timeout=60), threading.Lock()
        self.given: dict[int, list[Tensor]] = {}

    def average(self, rank: int, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.given[rank] = [g.clone() for g in gradients]
        self.wait()
        for gradient, one, two in zip(gradients, self.given[0], self.given[1], strict=True):
            gradient.copy_((one + two) / 2)
        self.wait()

    def wait(self) -> None:
        self.turn.release()
        self.barrier.wait()
        self.turn.acquire()


def assert_alike(one: Learner, two: Learner) -> None:
    """Biases before a norm have no effect, and move by rounding alone: what counts is what is said of an image."""
    image = samples(99).image
    with torch.no_grad():
        for first, second in ((one.network, two.network), (one.predictor(), two.predictor())):
            torch.testing.assert_close(first.eval()(image), second.eval()(image), rtol=1e-3, atol=2e-3)


def test_every_learner_has_a_config() -> None:
    assert set(LEARNERS) == set(CONFIGS)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem not in OVERLAYS))
def test_a_preset_has_the_streams_that_its_learners_read(preset: str) -> None:
    for stage in load([preset, "data={labelled: one.nii.gz, unlabelled: many}"]).stages:
        assert set(stage.streams) == set(LEARNERS[stage.learner.type].streams)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_it_lowers_its_loss_on_a_toy_problem(name: str, bf16: bool) -> None:
    # One kind of loss throughout: without the autoencoder's extra term at first.
    extra = {"foreground_share": 0} if name == "autoencoder" else {}
    subject = learner(name, bf16=bf16, **extra)
    logged = [step(subject, index) for index in range(STEPS)]
    losses = [row["loss"] for row in logged]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all({"loss", "learning_rate", "gradient_norm"} <= set(row) for row in logged)
    assert all(isinstance(value, float) for row in logged for value in row.values())
    assert {p.dtype for p in subject.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    one, two, other = learner(name, 1), learner(name, 1), learner(name, 2)
    for index in range(3):
        assert step(one, index) == step(two, index)
        step(other, index)
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


@pytest.mark.parametrize(
    ("name", "ema"), [(name, ema) for name in LEARNERS for ema in (0, 0.9) if ema or name not in MEANS]
)
def test_after_a_restart_the_next_step_is_the_same_bit_for_bit(name: str, ema: float) -> None:
    before = learner(name, 1, ema=ema)
    for index in range(3):
        step(before, index)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = learner(name, 2, ema=ema)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(weights(before), weights(after))
    assert before.state_dict().keys() == after.state_dict().keys()
    for index in range(3, 5):
        assert step(before, index) == step(after, index)
    for key, value in before.predictor().state_dict().items():
        assert torch.equal(value, after.predictor().state_dict()[key]), key


def test_the_deployed_weights_are_the_moving_average() -> None:
    subject = learner("supervised", 1, ema=0.75)
    expected = None
    for index in range(4):
        step(subject, index)
        expected = weights(subject) if expected is None else 0.75 * expected + 0.25 * weights(subject)
    deployed = torch.cat([p.detach().flatten() for p in subject.predictor().parameters()])
    assert expected is not None
    torch.testing.assert_close(deployed, expected)
    assert not torch.allclose(deployed, weights(subject))


@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_go_through_the_hook(name: str) -> None:
    seen: list[list[nn.Parameter]] = []

    def double(parameters: list[nn.Parameter]) -> None:
        seen.append(parameters)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad *= 2

    plain, doubled = learner(name, 1, clip=1e9), learner(name, 1, clip=1e9, average=double)
    once, twice = step(plain), step(doubled)
    # A second step within the first feels the doubling through Adam's epsilon alone.
    assert twice["gradient_norm"] == pytest.approx(2 * once["gradient_norm"], rel=1e-2)
    assert twice["loss"] == pytest.approx(once["loss"], rel=1e-3)
    own = {id(p) for p in doubled.network.parameters()}
    assert own in [{id(p) for p in parameters} for parameters in seen]


@pytest.mark.parametrize("name", LEARNERS)
def test_what_the_hook_leaves_is_what_is_used(name: str) -> None:
    def erase(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()

    subject = learner(name, average=erase, weight_decay=0)
    before = weights(subject)
    step(subject, 5)
    assert torch.equal(weights(subject), before)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_gradient_that_is_not_finite_is_skipped(name: str) -> None:
    broken = True

    def spoil(parameters: list[nn.Parameter]) -> None:
        if broken:
            assert parameters[0].grad is not None
            parameters[0].grad[0] = float("nan")

    subject = learner(name, average=spoil)
    before = weights(subject)
    step(subject, 5)
    assert torch.equal(weights(subject), before)
    broken = False
    step(subject, 6)
    assert not torch.equal(weights(subject), before)
    assert weights(subject).isfinite().all()


@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_are_clipped(name: str) -> None:
    norms: list[float] = []
    subject = learner(name, clip=1e-3)
    handle = subject.optimiser.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in subject.network.parameters()]).norm().item())  # type: ignore[union-attr]
    )
    logged = step(subject, 5)
    handle.remove()
    assert logged["gradient_norm"] > 1e-2
    assert norms and norms == [pytest.approx(1e-3, rel=0.01)] * len(norms)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_batch_is_left_alone(name: str) -> None:
    subject = learner(name)
    same = {stream: samples(1) for stream in subject.streams}
    subject.step(same, Progress(0, STEPS))
    for given in same.values():
        assert torch.equal(given.image, samples(1).image)
        assert torch.equal(given.label, samples(1).label)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_batch_in_parts_is_a_step_as_the_whole(name: str) -> None:
    whole, parts = learner(name, 1, **FIXED.get(name, {})), learner(name, 1, **FIXED.get(name, {}))
    for index in range(2):
        given = batch(whole, index)
        whole.step(given, Progress(index, STEPS))
        before = weights(parts)
        for half in range(2):
            assert torch.equal(weights(parts), before)
            pieces = {stream: part(one, half) for stream, one in given.items()}
            parts.step(pieces, Progress(index, STEPS, part=half, parts=2))
    assert_alike(whole, parts)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_two_workers_step_as_one_with_twice_the_batch(name: str) -> None:
    one = learner(name, 1, **FIXED.get(name, {}))
    meeting = Meeting()
    workers = [learner(name, 1, average=partial(meeting.average, rank), **FIXED.get(name, {})) for rank in range(2)]

    def work(rank: int) -> None:
        for index in range(2):
            pieces = {stream: part(given, rank) for stream, given in batch(one, index).items()}
            with meeting.turn:
                workers[rank].step(pieces, Progress(index, STEPS))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for index in range(2):
        one.step(batch(one, index), Progress(index, STEPS))
    assert torch.equal(weights(workers[0]), weights(workers[1]))
    assert_alike(workers[0], one)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_learns_by_its_own_rule_alone(name: str) -> None:
    subject = learner(name, 1)
    teacher, before = TEACHERS[name](subject), weights(TEACHERS[name](subject))
    own = {id(p) for p in teacher.parameters()}
    assert not own & {id(p) for p in subject.network.parameters()}
    held = {id(p) for group in subject.optimiser.param_groups for p in group["params"]}
    assert held == {id(p) for p in subject.network.parameters()}
    step(subject, 5)
    assert not torch.equal(weights(teacher), before)
    # A mean has no gradient; the reciprocal teacher has one, and an optimiser of its own.
    assert all(p.grad is None for p in teacher.parameters()) == (name in MEANS)


@pytest.mark.parametrize(("name", "stream"), UNREAD.items())
def test_no_label_is_read_where_there_should_be_none(name: str, stream: str) -> None:
    subjects = [
        learner(name, 1, **({"ramp": (0, 0), "learn": 0.0, "unlearn": 0.0} if name == "curriculum" else {}))
        for _ in range(2)
    ]
    for index in range(3):
        for noisy, subject in enumerate(subjects):
            given = batch(subject, index)
            if noisy:
                label = torch.randint_like(given[stream].label, -1, 2)
                given[stream] = replace(given[stream], label=label)
            torch.manual_seed(index)
            subject.step(given, Progress(index, STEPS))
    assert torch.equal(weights(subjects[0]), weights(subjects[1]))


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("changes", [{"dims": 2}, {"norm": "batch", "dropout": 0.5}], ids=["slices", "batch norm"])
def test_it_learns_several_classes_with_any_network(name: str, changes: Mapping[str, Any]) -> None:
    subject = learner(name, network={"classes": 3, **changes})
    before = weights(subject)
    for index in range(2):
        torch.manual_seed(index)
        logged = subject.step(batch(subject, index, classes=3), Progress(index, 2))
        assert all(math.isfinite(value) for value in logged.values())
    assert weights(subject).isfinite().all()
    assert not torch.equal(weights(subject), before)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_nothing_known_is_no_fault(name: str) -> None:
    subject = learner(name)
    given = {stream: replace(one, label=torch.full_like(one.label, IGNORE)) for stream, one in batch(subject).items()}
    logged = subject.step(given, Progress(0, STEPS))
    assert all(math.isfinite(value) for value in logged.values())
    assert weights(subject).isfinite().all()


def test_loss_weights_choose_between_dice_and_cross_entropy() -> None:
    both, dice, entropy = (
        step(learner("supervised", 1, dice_weight=d, ce_weight=c)) for d, c in ((2, 3), (1, 0), (0, 1))
    )
    assert dice["loss"] == pytest.approx(dice["dice_loss"])
    assert entropy["loss"] == pytest.approx(entropy["cross_entropy"])
    assert both["loss"] == pytest.approx(2 * dice["loss"] + 3 * entropy["loss"], rel=1e-5)


def test_the_autoencoder_weighs_the_foreground_at_first() -> None:
    early = learner("autoencoder", 1, foreground_share=0.5)
    late = learner("autoencoder", 1, foreground_share=0)
    assert step(early, 0)["loss"] > step(late, 0)["loss"] + 0.1
    early, late = learner("autoencoder", 1, foreground_share=0.5), learner("autoencoder", 1, foreground_share=0)
    assert step(early, STEPS // 2)["loss"] == step(late, STEPS // 2)["loss"]


@pytest.mark.parametrize("steps", [10, 500])
def test_the_learning_rate_rises_then_falls(steps: int) -> None:
    config = OptimiserConfig(learning_rate=0.1, warmup=0.2, final=0.05)
    rates = [learning_rate(config, Progress(step, steps)) for step in range(steps)]
    top = rates.index(max(rates))
    assert top == steps // 5
    assert max(rates) == pytest.approx(0.1)
    assert rates[: top + 1] == sorted(set(rates[: top + 1]))
    assert rates[top:] == sorted(set(rates[top:]), reverse=True)
    assert rates[0] > 0
    assert 0.005 <= rates[-1]
    assert rates[-1] < 0.02 or steps == 10
    assert learning_rate(config, Progress(steps, steps)) == pytest.approx(0.005)


def test_the_learning_rate_reaches_the_optimiser() -> None:
    subject = learner("supervised", warmup=0.5)
    for index in range(3):
        logged = step(subject, index)
        assert [group["lr"] for group in subject.optimiser.param_groups] == [logged["learning_rate"]]
        assert logged["learning_rate"] == learning_rate(subject.base, Progress(index, STEPS))


def test_one_step_is_no_division_by_zero() -> None:
    assert learning_rate(OptimiserConfig(warmup=1), Progress(0, 1)) > 0
    assert learning_rate(OptimiserConfig(warmup=0), Progress(0, 1)) == OptimiserConfig().learning_rate


def test_a_ramp_rises_between_two_shares_of_the_steps() -> None:
    values = [ramp((0.2, 0.6), Progress(step, 50)) for step in range(50)]
    assert values[:10] == [0] * 10
    assert values[10] == pytest.approx(math.exp(-5))
    assert values[10:31] == sorted(set(values[10:31]))
    assert values[30:] == [1] * 20
    assert [ramp((0, 0), Progress(step, 50)) for step in range(50)] == [1] * 50
