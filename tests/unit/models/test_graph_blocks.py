from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nestling.models.building import build_shapes
from nestling.models.families import family
from nestling.models.graph import Graph, trace
from nestling.models.graph_blocks import blocks
from nestling.space import Arch, load_space

SPACES = Path(__file__).parents[3] / "search_spaces"
CHANGES = {"resolution": 16, "classes": 10}


def smallest(name: str) -> tuple[str, Arch]:
    space = load_space(SPACES / f"{name}.toml").with_constants(CHANGES)
    return space.family, space.smallest


@pytest.fixture(scope="module", params=["mobilenet_cifar_small", "resnet_cifar", "vit_cifar"])
def graph(request: pytest.FixtureRequest) -> Graph:
    kind, arch = smallest(request.param)
    torch.manual_seed(0)
    return trace(family(kind).build(arch).eval(), resolution=16)


def test_blocks_one_after_another_compute_what_the_network_computes(graph: Graph) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    parts = blocks(graph)
    assert sum(len(part.graph.operators) for part in parts) == len(graph.operators)
    assert len(parts) > 3
    tensor = images
    for part in parts:
        tensor = part.graph.run(tensor)
    assert torch.equal(tensor, graph.run(images))


def test_a_block_has_the_layers_of_its_name() -> None:
    kind, arch = smallest("mobilenet_cifar_small")
    parts = blocks(trace(family(kind).build(arch).eval(), resolution=16))
    assert [part.name for part in parts] == ["", "blocks.0.0", "blocks.1.0", "blocks.2.0", "blocks.3.0", ""]
    for part in parts[1:-1]:
        assert all(operator.layer.startswith(part.name) for operator in part.graph.operators)


def test_a_part_refuses_what_it_does_not_read(graph: Graph) -> None:
    with pytest.raises(ValueError, match="takes images"):
        blocks(graph)[1].graph.run(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("name", ["mobilenet_cifar_small", "resnet_cifar", "vit_cifar"])
def test_a_graph_without_numbers_has_the_same_operators_and_shapes(name: str) -> None:
    kind, arch = smallest(name)
    real = trace(family(kind).build(arch).eval(), resolution=16)
    with torch.device("meta"):
        bare = trace(
            build_shapes(family(kind).build, arch).eval(), resolution=16, image=torch.empty(1, 3, 16, 16)
        )
    assert bare.shapes == real.shapes
    assert [(o.kind, o.name, o.inputs, o.layer, dict(o.attributes)) for o in bare.operators] == [
        (o.kind, o.name, o.inputs, o.layer, dict(o.attributes)) for o in real.operators
    ]
    assert all(o.weight is None or o.weight.is_meta for o in bare.operators)
