from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from onelabel.configs.schema import AutoencoderNetworkConfig, UNetConfig
from onelabel.models import networks
from onelabel.models.networks.autoencoder import Autoencoder, fit_to, one_hot, views
from onelabel.models.networks.unet import UNet

NORMS = get_args(UNetConfig.model_fields["norm"].annotation)


def small(**changes: Any) -> AutoencoderNetworkConfig:
    return AutoencoderNetworkConfig.model_validate({"size": 64, "width": 4, "latent": 6, "dropout": 0} | changes)


def without_gradient(network: nn.Module, logits: Tensor) -> list[str]:
    """Parameters that a loss over all logits does not reach."""
    (logits * torch.randn_like(logits)).sum().backward()
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def unused(network: nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.grad is not None and not p.grad.any()]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_unet_gives_logits_of_the_images_size(dims: Any, norm: Any, patch: int) -> None:
    config = UNetConfig(dims=dims, channels=(4, 8, 8), norm=norm, patch=patch, classes=3)
    network = networks.build(config)
    assert isinstance(network, UNet)
    size = [2 * config.divisor, 3 * config.divisor, 2 * config.divisor][:dims]
    logits = network(torch.rand(2, 1, *size))
    assert logits.shape == (2, 3, *size)
    assert logits.dtype == torch.float32
    assert without_gradient(network, logits) == []
    # A norm takes away what a bias before it adds; weights must all count.
    assert [name for name in unused(network) if name.endswith("weight")] == []


@pytest.mark.parametrize(
    ("spacing", "dims", "divisors"),
    [
        ((2.0, 2.0, 2.0), 3, (8, 8, 8)),
        ((1.0, 1.5, 1.9), 3, (8, 8, 8)),
        ((1.5, 1.5, 10.0), 3, (8, 8, 2)),
        ((0.8, 3.0, 0.8), 3, (8, 4, 8)),
        ((1.5, 1.5, 10.0), 2, (8, 8, 1)),
        ((6.0, 1.0, 1.0), 2, (1, 8, 8)),
        ((2.0, 2.0, 2.0), 2, (8, 8, 1)),
    ],
)
def test_short_axes_are_pooled_first(spacing: Any, dims: Any, divisors: tuple[int, ...]) -> None:
    config = UNetConfig(dims=dims, channels=(4, 8, 8), norm="none").on(spacing, classes=3)
    assert config.divisors == divisors and config.classes == 3
    network = networks.build(config)
    size = [2 * divisor for divisor in divisors]
    logits = network(torch.rand(1, 1, *size))
    assert logits.shape == (1, 3, *size)
    assert without_gradient(network, logits) == [] and unused(network) == []


def test_equal_axes_leave_the_network_as_it_is() -> None:
    config = UNetConfig(channels=(4, 8, 8))
    assert config.on((2.0, 2.0, 2.5), classes=2) == config
    own = UNetConfig(channels=(4, 8), pools=((2, 2, 1), (1, 2, 2)))
    assert own.on((1.0, 1.0, 9.0), classes=2) == own and own.divisors == (2, 4, 2)
    with pytest.raises(ValueError, match="pools .* must be 3"):
        UNetConfig(channels=(4, 8, 12), pools=((1, 2, 2),))


@pytest.mark.parametrize("across", [0, 1, 2])
def test_slices_are_seen_one_by_one(across: Any) -> None:
    network = networks.build(UNetConfig(dims=2, channels=(4, 8), across=across)).eval()
    image = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        logits = network(image)
        for place in range(8):
            one = network(image.select(2 + across, place))
            assert torch.allclose(logits.select(2 + across, place), one, atol=1e-5)


@pytest.mark.parametrize("convs", [1, 2])
@pytest.mark.parametrize("channels", [(8,), (4, 8), (4, 8, 12, 16)])
def test_any_depth(convs: int, channels: tuple[int, ...]) -> None:
    config = UNetConfig(channels=channels, convs=(convs,), patch=1)
    network = networks.build(config)
    size = [2 * config.divisor] * 3
    assert network(torch.rand(1, 1, *size)).shape == (1, 2, *size)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert len(convolutions) == 1 + convs * (2 * len(channels) - 1)


def test_depth_can_differ_by_level() -> None:
    network = networks.build(UNetConfig(channels=(4, 8, 12), convs=(1, 2, 3)))
    assert network(torch.rand(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
    convolutions = [sum(isinstance(m, nn.Conv3d) for m in block) for block in (*network.down, *network.up)]  # type: ignore[misc]
    assert convolutions == [1, 2, 3, 2, 1]


def test_depth_is_one_number_or_one_a_level() -> None:
    assert UNetConfig(convs=2) == UNetConfig(convs=(2,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"convs \(1, 2\) must be one number, or 3"):
        UNetConfig(channels=(4, 8, 12), convs=(1, 2))


def test_a_unet_sees_the_image() -> None:
    network = networks.build(UNetConfig(channels=(4, 8), norm="none")).eval()
    image = torch.rand(1, 1, 16, 16, 16, requires_grad=True)
    network(image)[0, 1, 8, 8, 8].backward()
    assert image.grad is not None
    seen = image.grad[0, 0].nonzero()
    assert (seen.amin(0) < 8).all() and (seen.amax(0) > 8).all()


def test_a_shifted_image_has_shifted_logits() -> None:
    # Skips that joined features of other places would break this.
    network = networks.build(UNetConfig(channels=(4, 8), norm="none", patch=2)).eval()
    image = torch.rand(1, 1, 48, 48, 48)
    with torch.no_grad():
        moved, still = network(image.roll((4, 4, 4), (2, 3, 4))), network(image)
    inner = (..., slice(20, 32), slice(20, 32), slice(20, 32))
    assert torch.allclose(moved[inner], still.roll((4, 4, 4), (2, 3, 4))[inner], atol=1e-5)
    assert not torch.allclose(moved[inner], still[inner], atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_random_in_training_alone(dropout: float) -> None:
    network = networks.build(UNetConfig(channels=(4, 8), dropout=dropout))
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(image), network(image)) == (dropout == 0)
        network.eval()
        assert torch.equal(network(image), network(image))


def test_weights_come_from_the_global_generator() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in networks.build(UNetConfig(channels=(4, 8))).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("heads", [0, 1, 2, 9])
def test_every_scale_has_logits_half_as_fine(dims: Any, patch: int, heads: int) -> None:
    config = UNetConfig(dims=dims, channels=(4, 8, 12), patch=patch, classes=3, heads=heads)
    network = networks.build(config)
    assert isinstance(network, UNet)
    image = torch.rand(2, 1, *[2 * config.divisor] * dims)
    logits, features = network.scales(image)
    assert len(logits) == 1 + min(heads, 2)
    torch.testing.assert_close(logits[0], network(image))
    grid = 2 * config.divisor // patch
    assert features.shape == (2, 4, *[grid] * dims)
    assert [each.shape for each in logits[1:]] == [(2, 3, *[grid >> i] * dims) for i in range(1, len(logits))]
    assert without_gradient(network, torch.cat([each.flatten() for each in logits])) == []


def test_a_network_of_slices_sees_scales_of_volumes() -> None:
    network = networks.build(UNetConfig(dims=2, channels=(4, 8), patch=1, heads=1)).eval()
    assert isinstance(network, UNet)
    volume = torch.rand(2, 1, 8, 12, 5)
    (fine, coarse), features = network.scales(volume)
    assert (fine.shape, coarse.shape, features.shape) == ((2, 2, 8, 12, 5), (2, 2, 4, 6, 5), (2, 4, 8, 12, 5))
    torch.testing.assert_close(coarse[1, ..., 3], network.scales(volume[1:, ..., 3])[0][1][0])


def test_heads_change_nothing_else() -> None:
    states = []
    for heads in (0, 2):
        torch.manual_seed(0)
        states.append(networks.build(UNetConfig(channels=(4, 8, 12), heads=heads)).state_dict())
    plain, headed = states
    more = [f"heads.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")]
    assert [name for name in headed if name not in plain] == more
    assert all(torch.equal(headed[name], value) for name, value in plain.items())


@pytest.mark.parametrize(("dims", "size"), [(2, 64), (2, 128), (2, 256), (3, 64)])
def test_an_autoencoder_has_a_latent_of_four_voxels_an_axis(dims: Any, size: int) -> None:
    network = networks.build(small(dims=dims, size=size, classes=3))
    assert isinstance(network, Autoencoder)
    mask = one_hot(torch.randint(3, (2, *[size] * dims)), 3)
    latent = network.encoder(mask)
    assert latent.shape == (2, 6, *[4] * dims)
    assert network(mask).shape == mask.shape
    assert without_gradient(network, network(mask)) == []
    assert [name for name in unused(network) if name.endswith("weight")] == []


def test_a_larger_autoencoder_halves_more_often() -> None:
    def halvings(size: int) -> int:
        encoder = networks.build(small(size=size)).encoder
        assert isinstance(encoder, nn.Sequential)
        return sum(m.stride == (2, 2) for m in encoder.modules() if isinstance(m, nn.Conv2d))

    assert [halvings(size) for size in (64, 128, 256)] == [4, 5, 6]


def test_the_full_autoencoder_is_the_published_one() -> None:
    # 2-32-32-32-32-64-64-128-64-32-100, strided at six places.
    encoder = networks.build(AutoencoderNetworkConfig(size=256)).encoder
    assert isinstance(encoder, nn.Sequential)
    layers = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [layer.in_channels for layer in layers] == [2, 32, 32, 32, 32, 64, 64, 128, 64, 32]
    assert [layer.out_channels for layer in layers] == [32, 32, 32, 32, 64, 64, 128, 64, 32, 100]
    assert [layer.stride[0] for layer in layers] == [2, 2, 2, 1, 2, 1, 2, 1, 1, 2]


@pytest.mark.parametrize("shape", [(3, 10, 7), (2, 9, 9, 4)])
@pytest.mark.parametrize("edges", [(16, 16, 16), (17, 16, 23)])
def test_padding_and_cropping_back_is_the_identity(shape: tuple[int, ...], edges: tuple[int, ...]) -> None:
    mask = torch.randint(1, 5, shape)
    edges = edges[: mask.ndim - 1]
    padded = fit_to(mask, edges)
    assert padded.shape == (shape[0], *edges)
    assert padded.sum() == mask.sum()
    for axis, (length, edge) in enumerate(zip(shape[1:], edges, strict=True), 1):
        padded = padded.narrow(axis, (edge - length) // 2, length)
    assert torch.equal(padded, mask)


def test_cropping_keeps_the_centre() -> None:
    mask = torch.zeros(1, 20, 6)
    mask[0, 8:12, 2:4] = 1
    cropped = fit_to(mask, (8, 8))
    assert cropped.shape == (1, 8, 8)
    assert cropped.sum() == mask.sum()
    assert cropped[0, 2:6, 3:5].all()


@pytest.mark.parametrize(("size", "shortest"), [((9, 20, 30), 0), ((20, 9, 30), 1), ((30, 20, 9), 2), ((8, 8, 8), 0)])
def test_slices_run_along_the_shortest_axis(size: tuple[int, ...], shortest: int) -> None:
    mask = torch.randint(0, 2, size)
    seen = views(mask, small(pool=1))
    first, second = [length for axis, length in enumerate(size) if axis != shortest]
    edges = [16 if length <= 16 else 32 for length in (first, second)]
    assert seen.shape == (size[shortest], 2, *edges)
    back = seen[:, 1, (edges[0] - first) // 2 :, (edges[1] - second) // 2 :][:, :first, :second]
    assert torch.equal(back.movedim(0, shortest), mask.float())


def test_a_volume_is_one_view() -> None:
    mask = torch.randint(0, 2, (9, 20, 30))
    seen = views(mask, small(pool=1, dims=3))
    assert seen.shape == (1, 2, 16, 32, 32)
    assert seen[:, 1].sum() == mask.sum()


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_network_halves_all_that_it_sees(size: int) -> None:
    network = networks.build(small(pool=1, size=size)).eval()
    seen = views(torch.ones(3, 40, 300, dtype=torch.int64), small(pool=1, size=size))
    stride = size // 4
    assert seen.shape == (3, 2, -(-40 // stride) * stride, size)
    with torch.no_grad():
        assert network(seen).shape == seen.shape


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", [(8, 20, 30), (9, 21, 31)])
def test_a_block_is_seen_as_its_shares(dims: Any, size: tuple[int, ...]) -> None:
    mask = torch.randint(0, 3, size)
    seen = views(mask, small(pool=2, dims=dims, classes=3))
    assert seen.shape == ((4 + size[0] % 2, 3, 16, 16) if dims == 2 else (1, 3, 16, 16, 16))
    assert seen.sum(1) == pytest.approx(1)
    whole = mask[:8, :20, :30]
    shares = seen.movedim(1, 0).reshape(3, -1, 16, 16)
    assert shares[1:].max() <= 1
    block = whole[2:4, 4:6, 6:8]
    place = (1 if dims == 2 else (16 - (size[0] + 1) // 2) // 2 + 1, *((16 - (n + 1) // 2) // 2 for n in size[1:]))
    x, y, z = place[0], place[1] + 2, place[2] + 3
    assert shares[:, x, y, z].tolist() == [(block == index).float().mean().item() for index in range(3)]


def test_one_hot_is_one_at_the_class() -> None:
    mask = torch.tensor([[0, 1, 2, -1]])
    assert one_hot(mask, 3)[0].T.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
