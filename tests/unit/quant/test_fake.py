from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Range, observe, simulate

ALL = QuantPolicy((("", "w8a8"),))


def test_a_convolution_is_simulated_as_integers_compute_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()).eval()
    graph = trace(network, resolution=5)
    images = torch.randn(8, 3, 5, 5)
    ranges = observe(graph, ALL, [images])
    simulated: dict[str, Tensor] = {}
    simulation = simulate(graph, ranges)

    def keep(name: str, tensor: Tensor) -> Tensor:
        simulated[name] = ranges[name].nearest(tensor) if name in ranges else tensor
        return simulated[name]

    simulation.graph.run(images, after=keep)

    def stored(name: str, tensor: Tensor | None) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        assert tensor is not None
        found = ranges[name]
        return found.integers(tensor).numpy().astype(np.int64)

    convolution = graph.operators[0]
    read, written = ranges["images"], ranges["1/Relu"]
    pixels = stored("images", images) - int(read.zero_point)
    kernel = stored("0/Conv.weight", convolution.weight)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, kernel)
    sums += stored("0/Conv.bias", convolution.bias)[None, :, None, None]
    factor = (ranges["0/Conv.weight"].scale * read.scale / written.scale).numpy()[None, :, None, None]
    expected = np.clip(np.rint(sums * factor), 0, 255)
    got = written.integers(simulated["1/Relu"]).numpy()
    assert np.abs(expected - got).max() <= 1
    assert (expected != got).mean() < 0.002


def test_a_simulation_is_near_the_floats_it_stands_for(graph: Graph, images: Tensor) -> None:
    exact = graph.run(images)
    simulated = simulate(graph, observe(graph, ALL, [images])).run(images)
    error = float((simulated - exact).abs().max() / exact.abs().max())
    assert 0 < error < 0.05


def test_fewer_layers_in_eight_bits_err_less(graph: Graph, images: Tensor) -> None:
    def error(policy: QuantPolicy) -> float:
        simulated = simulate(graph, observe(graph, policy, [images])).run(images)
        return float((simulated - graph.run(images)).abs().mean())

    assert error(QuantPolicy((("head", "w8a8"),))) < error(ALL)


def test_without_ranges_a_simulation_is_the_graph(graph: Graph, images: Tensor) -> None:
    assert torch.equal(simulate(graph, {}).run(images), graph.run(images))


def test_simulating_leaves_the_graph_as_it_was(graph: Graph, images: Tensor) -> None:
    before = graph.run(images)
    simulate(graph, observe(graph, ALL, [images])).run(images)
    assert torch.equal(graph.run(images), before)


def test_a_range_of_another_graph_is_refused(graph: Graph) -> None:
    stray = {"elsewhere/Conv": Range(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), "uint8", None)}
    with pytest.raises(ValueError, match="elsewhere/Conv"):
        simulate(graph, stray)
