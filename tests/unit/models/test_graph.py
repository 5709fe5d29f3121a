from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.graph import Graph, Untraceable, trace


class Network(nn.Module):
    """A network out of a function and the modules that it calls."""

    def __init__(self, forward: Callable[[Network, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, images: Tensor) -> Tensor:
        return self._forward(self, images)

    def call(self, name: str, tensor: Tensor) -> Tensor:
        result = self.get_submodule(name)(tensor)
        assert isinstance(result, Tensor)
        return result


def with_random_statistics(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return network.eval()


def relative_error(graph: Graph, network: nn.Module, *, images: int = 3) -> float:
    batch = torch.randn(
        images, 3, graph.resolution, graph.resolution, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        expected = network(batch)
    return float((graph.run(batch) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        ("mobilenetv3_small_100", 32),
        ("efficientnet_b0", 32),
        ("resnet18", 32),
        ("mobilenetv2_100", 48),
        ("tf_efficientnet_lite0", 33),  # pads more on one side
        ("regnety_002", 32),
        ("resnetv2_50", 32),  # normalizes before convolutions
    ],
)
def test_a_graph_computes_what_a_timm_network_computes(name: str, resolution: int) -> None:
    torch.manual_seed(0)
    network = with_random_statistics(timm.create_model(name, num_classes=10))
    assert relative_error(trace(network, resolution=resolution), network) < 1e-5


def test_a_graph_computes_what_a_vision_transformer_computes() -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()
    assert relative_error(trace(network, resolution=32), network) < 1e-5


def test_no_batch_normalization_is_left_after_convolutions() -> None:
    network = with_random_statistics(timm.create_model("resnet18", num_classes=10))
    kinds = {operator.kind for operator in trace(network, resolution=32).operators}
    assert kinds == {"Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


def test_batch_normalization_without_a_convolution_before_it_becomes_a_scale_and_a_shift() -> None:
    network = with_random_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten()))
    graph = trace(network, resolution=4)
    assert [operator.kind for operator in graph.operators] == ["Mul", "Add", "Conv", "Flatten"]
    assert relative_error(graph, network) < 1e-5


def test_a_convolution_that_others_read_keeps_its_own_output() -> None:
    def forward(network: Network, images: Tensor) -> Tensor:
        before = network.call("conv", images)
        return (before + network.call("norm", before)).flatten(1)

    network = with_random_statistics(Network(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    assert relative_error(trace(network, resolution=6), network) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("resolution", [1, 2, 3, 4, 6])
def test_a_kernel_larger_than_its_map_is_cropped_without_a_difference(resolution: int, stride: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 7, stride=stride, padding=3, groups=3), nn.Flatten()).eval()
    graph = trace(network, resolution=resolution)
    assert max(graph.operators[0].constant().shape[2:]) <= min(7, 2 * resolution - 1)
    assert relative_error(graph, network) < 1e-6


def test_in_place_operations_are_followed() -> None:
    def forward(network: Network, images: Tensor) -> Tensor:
        images.mul_(2)
        tensor = network.call("conv", images)
        torch.relu_(tensor)
        tensor += 1
        tensor.mul_(tensor)
        return tensor.flatten(1)

    network = Network(forward, conv=nn.Conv2d(3, 4, 3)).eval()
    graph = trace(network, resolution=5)
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(graph.run(images), network(images.clone()))


def test_a_graph_that_would_compute_something_else_is_refused() -> None:
    def forward(network: Network, images: Tensor) -> Tensor:
        tensor = network.call("conv", images)
        tensor.view(1, -1).mul_(3)  # changes `tensor` behind its name
        return tensor.flatten(1)

    with pytest.raises(Untraceable, match="computes something else"):
        trace(Network(forward, conv=nn.Conv2d(3, 4, 3)).eval(), resolution=5)


def test_an_unknown_operation_is_named_with_its_layer() -> None:
    inner = Network(lambda _, images: torch.fft.fft(images).abs())
    with pytest.raises(Untraceable, match=r"'odd'.*fft"):
        trace(
            Network(lambda network, images: network.call("odd", images), odd=inner).eval(),
            resolution=4,
        )


def test_an_unknown_argument_is_named_with_its_operation() -> None:
    network = Network(lambda _, images: images.add(images, alpha=2).flatten(1))
    with pytest.raises(Untraceable, match=r"torch\.Tensor\.add.*alpha"):
        trace(network.eval(), resolution=4)


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), resolution=4)


def test_batch_normalization_by_batch_statistics_is_refused() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()).eval()
    with pytest.raises(Untraceable, match="statistics of the batch"):
        trace(network, resolution=4)


@pytest.mark.parametrize("forward", [lambda _, images: images, lambda _, __: torch.ones(1, 2)])
def test_a_network_that_computes_nothing_from_its_images_is_refused(
    forward: Callable[[Network, Tensor], Tensor],
) -> None:
    with pytest.raises(Untraceable, match="must return"):
        trace(Network(forward).eval(), resolution=4)


def test_tracing_leaves_the_network_and_the_random_state_as_they_were() -> None:
    network = with_random_statistics(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    graph = trace(network, resolution=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    images = torch.ones(1, 3, 4, 4)
    logits = graph.run(images)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(graph.run(images), logits)


def test_operators_carry_the_name_of_the_layer_that_called_them() -> None:
    network = with_random_statistics(timm.create_model("resnet18", num_classes=10))
    layers = [operator.layer for operator in trace(network, resolution=32).operators]
    assert layers[:5] == ["conv1", "act1", "maxpool", "layer1.0.conv1", "layer1.0.act1"]
    assert layers[-1] == "fc"


def test_a_layer_that_is_called_twice_writes_two_tensors() -> None:
    def forward(network: Network, images: Tensor) -> Tensor:
        once = F.relu(network.call("conv", images))
        return F.relu(network.call("conv", once)).flatten(1)

    network = Network(forward, conv=nn.Conv2d(3, 3, 3)).eval()
    graph = trace(network, resolution=6)
    assert len({operator.name for operator in graph.operators}) == len(graph.operators)
    assert relative_error(graph, network) < 1e-6


def test_after_sees_every_tensor_and_may_replace_it() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval(), resolution=4)
    seen: list[str] = []

    def after(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        return torch.full_like(tensor, 7.0) if name == "1/Relu" else tensor

    logits = graph.run(torch.randn(2, 3, 4, 4), after=after)
    assert seen == ["images", "0/Conv", "1/Relu", "logits"] == list(graph.shapes)
    assert torch.equal(logits, torch.full((2, 16), 7.0))


def test_a_tensor_is_let_go_once_its_last_reader_has_run() -> None:
    graph = trace(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(6)), nn.Flatten()).eval(), resolution=4)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def after(_: str, tensor: Tensor) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    graph.run(torch.randn(1, 3, 4, 4), after=after)
    assert most <= 3  # of eight: the images, which the caller holds, the logits, and what they are a view of


def test_shapes_are_those_of_one_image() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Flatten()).eval(), resolution=7)
    assert graph.shapes == {"images": (1, 3, 7, 7), "0/Conv": (1, 5, 3, 3), "logits": (1, 45)}


def test_images_of_another_resolution_are_refused() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()).eval(), resolution=7)
    with pytest.raises(ValueError, match=r"\(N, 3, 7, 7\), not \(1, 3, 8, 8\)"):
        graph.run(torch.zeros(1, 3, 8, 8))


def test_readers_are_listed_for_every_tensor() -> None:
    network = Network(lambda _, images: (images * images + images).flatten(1)).eval()
    readers = trace(network, resolution=2).readers()
    assert {name: [operator.kind for operator in found] for name, found in readers.items()} == {
        "images": ["Mul", "Add"],
        "Mul": ["Add"],
        "Add": ["Flatten"],
        "logits": [],
    }


def test_peak_bytes_of_a_chain_are_those_of_its_widest_neighbours() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 2, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    graph = trace(network, resolution=4)
    pixels = 4 * 4
    # the first convolution reads 3 channels and writes 8; the activation takes their place
    assert graph.peak_bytes() == (3 + 8) * pixels * 4
    assert graph.peak_bytes(bytes_per_number=dict.fromkeys(graph.shapes, 1)) == (3 + 8) * pixels


def test_peak_bytes_hold_a_shortcut_until_it_is_added() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 6, 1)
            self.back = nn.Conv2d(6, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            shortcut: Tensor = images + self.back(self.wide(images))
            return shortcut.flatten(1)

    graph = trace(Residual().eval(), resolution=4)
    assert graph.peak_bytes() == (3 + 6 + 3) * 4 * 4 * 4


def test_a_graph_can_be_checked_on_an_image_of_the_networks_own() -> None:
    network = timm.create_model("test_resnet", num_classes=3).eval()
    image = torch.randn(1, 3, 32, 32)
    graph = trace(network, resolution=32, image=image)
    with torch.no_grad():
        assert torch.allclose(graph.run(image), network(image), atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 32\); it must be \(1, 3, 64, 64\)"):
        trace(network, resolution=64, image=image)
