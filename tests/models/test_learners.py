import io
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from onelabel.configs.schema import AutoencoderNetworkConfig, LearnerConfig, OptimiserConfig, UNetConfig
from onelabel.imaging.labels import IGNORE
from onelabel.models import networks
from onelabel.models.learners import LEARNERS, Learner, Progress, Samples
from onelabel.models.learners.base import keep, learning_rate

CONFIGS: dict[str, type[OptimiserConfig]] = {
    config.model_fields["type"].default: config for config in get_args(get_args(LearnerConfig)[0])
}
CPU = torch.device("cpu")
SIZE = (16, 16, 16)
STEPS = 30


def learner(
    name: str,
    seed: int = 0,
    *,
    bf16: bool = False,
    average: Callable[[list[nn.Parameter]], None] = keep,
    **changes: Any,
) -> Learner:
    torch.manual_seed(seed)
    autoencoder = AutoencoderNetworkConfig(size=64, width=8, latent=8, dropout=0.1)
    network = networks.build(autoencoder if name == "autoencoder" else UNetConfig(channels=(8, 16), patch=2))
    # The autoencoder sees few slices, for speed.
    settings = {"learning_rate": 1e-2, "weight_decay": 0} | ({"slices": 4} if name == "autoencoder" else {})
    config = CONFIGS[name].model_validate(settings | changes)
    return LEARNERS[name](config, network, device=CPU, bf16=bf16, average=average)


def samples(seed: int = 0) -> Samples:
    """Bright balls in noise, with their masks and some voxels unknown."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    centres = 6 + 4 * torch.rand(2, 3, generator=generator)
    label = torch.stack([(place - c[:, None, None, None]).norm(dim=0) < 5 for c in centres]).to(torch.int8)
    image = label.float() * 0.5 + 0.4 * torch.rand(label.shape, generator=generator)
    label[:, 0] = IGNORE
    return Samples(image.unsqueeze(1), label, torch.tensor([1.0, 0.5]))


def step(subject: Learner, index: int = 0, steps: int = STEPS) -> dict[str, float]:
    """One step, whose randomness follows from its index as in training."""
    torch.manual_seed(1000 + index)
    return subject.step({name: samples(index) for name in subject.streams}, Progress(index, steps))


def weights(subject: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in subject.network.parameters()])


def test_every_learner_has_a_config() -> None:
    assert set(LEARNERS) == set(CONFIGS)


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


@pytest.mark.parametrize("ema", [0, 0.9])
@pytest.mark.parametrize("name", LEARNERS)
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

    def halve(parameters: list[nn.Parameter]) -> None:
        seen.append(parameters)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= 2

    plain, halved = learner(name, 1), learner(name, 1, average=halve)
    full, half = step(plain), step(halved)
    assert half["gradient_norm"] == pytest.approx(full["gradient_norm"] / 2, rel=1e-4)
    assert half["loss"] == full["loss"]
    assert len(seen) == 1
    assert {id(p) for p in seen[0]} == {id(p) for p in halved.network.parameters()}


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
    assert norms == [pytest.approx(1e-3, rel=0.01)]


@pytest.mark.parametrize("name", LEARNERS)
def test_the_batch_is_left_alone(name: str) -> None:
    subject = learner(name)
    batch = {stream: samples(1) for stream in subject.streams}
    subject.step(batch, Progress(0, STEPS))
    for given in batch.values():
        assert torch.equal(given.image, samples(1).image)
        assert torch.equal(given.label, samples(1).label)


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
