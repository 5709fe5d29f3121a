from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.models.graph import Graph
from nestling.quant import QuantPolicy
from nestling.quant.observing import needed
from nestling.quant.statistics import (
    HALF,
    Histogram,
    Statistics,
    collect,
    histogram,
    same_network,
    statistics,
)

ALL = QuantPolicy((("", "w8a8"),))


def counts_of(found: Histogram) -> Tensor:
    assert found.counts is not None
    return found.counts


def heavy(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


def test_counts_are_those_of_numpy_with_zeros_apart() -> None:
    tensor = heavy(40, 1000)
    tensor[:, ::3] = 0
    found = histogram(tensor)
    edges = (np.arange(2 * HALF + 1) - HALF) * found.width
    expected, _ = np.histogram(tensor[tensor != 0].double().numpy(), edges)
    assert np.array_equal(counts_of(found).numpy(), expected)
    assert found.zeros == 40 * 334
    assert found.bounds == (float(tensor.min()), float(tensor.max()))


def test_bins_are_as_narrow_as_holds_every_number() -> None:
    for largest in (1.0, 0.999, -3.0, 1e-30, 3e38):
        found = histogram(torch.tensor([0.0, largest]))
        assert HALF / 2 <= abs(largest) / found.width <= HALF
        assert int(counts_of(found).sum()) == 1


@pytest.mark.parametrize("sizes", [(1,) * 8, (3, 5), (7, 1)])
def test_a_histogram_does_not_depend_on_the_batches(sizes: tuple[int, ...]) -> None:
    images = heavy(8, 500) * torch.logspace(-9, 4, 8)[:, None]
    images[0] = 0  # a batch that sets no width
    whole = histogram(images)
    parts = [histogram(part) for part in torch.split(images, list(sizes))]
    summed = parts[0]
    for part in parts[1:]:
        summed = summed + part
    assert torch.equal(counts_of(summed), counts_of(whole))
    assert (summed.exponent, summed.zeros, summed.bounds) == (whole.exponent, whole.zeros, whole.bounds)
    assert len(summed.extremes) == len(sizes)


def test_zeros_of_either_sign_are_zeros() -> None:
    found = histogram(torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.0]))
    assert found.zeros == 2
    assert counts_of(found)[HALF - 1 : HALF + 1].tolist() == [1, 1]


def test_nothing_but_zeros_has_a_histogram() -> None:
    found = histogram(torch.zeros(3, 4)) + histogram(torch.zeros(2))
    assert (found.zeros, found.exponent, int(counts_of(found).sum())) == (14, None, 0)


def test_one_pass_gives_every_tensor(graph: Graph, images: Tensor) -> None:
    batches = 0

    def passed() -> object:
        nonlocal batches
        for batch in images.tensor_split(4):
            batches += 1
            yield batch

    found = collect(graph, passed(), ["images", "wide/Conv"])  # type: ignore[arg-type]
    seen: dict[str, Tensor] = {}
    graph.run(images, after=lambda name, tensor: seen.setdefault(name, tensor))
    assert batches == 4
    assert found.keys() == {"images", "wide/Conv"}
    for name, each in found.items():
        assert int(counts_of(each).sum()) + each.zeros == seen[name].numel()
        assert each.bounds == pytest.approx((float(seen[name].min()), float(seen[name].max())))


def test_extremes_alone_are_the_same_as_with_counts(graph: Graph, images: Tensor) -> None:
    counted, bare = (
        collect(graph, images.tensor_split(4), ["images"], counts=c)["images"] for c in (True, False)
    )
    assert bare.counts is None
    assert bare.extremes == counted.extremes


def test_a_tensor_that_the_graph_does_not_have_is_refused(graph: Graph, images: Tensor) -> None:
    with pytest.raises(ValueError, match="no tensor 'nowhere'"):
        collect(graph, [images], ["nowhere"])


def test_counts_and_extremes_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="only one of the two"):
        histogram(torch.ones(1)) + histogram(torch.ones(1), counts=False)


def test_kept_statistics_spare_the_pass_for_another_policy(graph: Graph, images: Tensor) -> None:
    kept = statistics(graph, [images], needed(graph, ALL))
    other = QuantPolicy((("b", "w8a8"),))
    assert statistics(graph, never(), needed(graph, other), kept=kept) is kept


def never() -> list[Tensor]:
    class Unread(list[Tensor]):
        def __iter__(self) -> object:  # type: ignore[override]
            raise AssertionError("no image is needed")

    return Unread()


def test_kept_statistics_are_completed_where_they_lack_a_tensor(graph: Graph, images: Tensor) -> None:
    kept = statistics(graph, [images], ["images"])
    more = statistics(graph, [images], ["images", "wide/Conv"], kept=kept)
    assert more.histograms.keys() == {"images", "wide/Conv"}
    assert more.histograms["images"] is kept.histograms["images"]


def test_extremes_do_not_suffice_where_counts_are_read(graph: Graph, images: Tensor) -> None:
    kept = statistics(graph, [images], ["images"], counts=False)
    assert kept.lacking(graph, ["images"]) == {"images"}
    assert not kept.lacking(graph, ["images"], counts=False)


def test_statistics_of_another_network_do_not_suffice(graph: Graph, images: Tensor) -> None:
    kept = statistics(graph, [images], ["images"])
    first = graph.operators[0]
    changed = replace(first, weight=first.constant() + 1e-6)
    other = replace(graph, operators=(changed, *graph.operators[1:]))
    assert kept.lacking(other, ["images"]) == {"images"}
    assert statistics(other, [images], ["images"], kept=kept).graph is other


def test_a_network_is_the_same_by_its_numbers_not_its_tensors(graph: Graph) -> None:
    first = graph.operators[0]
    copied = replace(graph, operators=(replace(first, weight=first.constant().clone()), *graph.operators[1:]))
    renamed = replace(graph, operators=(replace(first, name="other"), *graph.operators[1:]))
    assert same_network(graph, copied)
    assert not same_network(graph, renamed)
    assert not same_network(graph, replace(graph, resolution=graph.resolution + 1))


def test_statistics_without_a_tensor_need_no_images(graph: Graph) -> None:
    assert statistics(graph, never(), []).histograms == {}
    assert isinstance(statistics(graph, never(), []), Statistics)
