"""The blocks of a graph: the parts that hand over one tensor each, as graphs of their own."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.models.graph import Graph, Operator


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a network that one tensor enters and one leaves.

    Attributes:
        name: what its layers' names begin with, such as `blocks.2.0`; "" of a stem or a head.
        graph: its operators. It reads what the block reads, and gives what the block gives.
    """

    name: str
    graph: Graph


def blocks(graph: Graph) -> tuple[Block, ...]:
    """`graph` cut into blocks, in order; run one after another they compute what it computes.

    The cut is wherever the name of the block changes, a layer's name up to its last number, and one tensor
    alone is still to be read.
    """
    last_read = {name: index for index, operator in enumerate(graph.operators) for name in operator.inputs}
    last_read[graph.output] = len(graph.operators)
    live = {graph.input}
    found: list[Block] = []
    begun, reads = 0, graph.input
    for index, operator in enumerate(graph.operators):
        live.add(operator.name)
        live = {name for name in live if last_read.get(name, -1) > index}
        following = graph.operators[index + 1 : index + 2]
        if following and (live != {operator.name} or _block(following[0]) == _block(operator)):
            continue
        found.append(_part(graph, begun, index + 1, reads=reads))
        begun, reads = index + 1, operator.name
    return tuple(found)


def _part(graph: Graph, begin: int, end: int, *, reads: str) -> Block:
    operators = graph.operators[begin:end]
    names = (reads, *(operator.name for operator in operators))
    shapes = {name: graph.shapes[name] for name in names}
    part = Graph(operators, reads, operators[-1].name, shapes, graph.resolution)
    return Block(_block(operators[0]), part)


def _block(operator: Operator) -> str:
    """What a layer's name has in common with its block: `blocks.2.0` of `blocks.2.0.se.conv_reduce`."""
    steps = operator.layer.split(".")
    numbers = [place for place, step in enumerate(steps) if step.isdecimal()]
    return ".".join(steps[: numbers[-1] + 1]) if numbers else ""
