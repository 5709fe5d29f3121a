"""Which layers of a network compute in which precision: its arch's choices, and what is kept in any case."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from nestling.config import ConfigError
from nestling.models.families import Family
from nestling.models.graph import Graph
from nestling.quant import PRECISIONS, QuantPolicy, covers, most_exact
from nestling.quant.regions import is_layer
from nestling.space import Value

FIRST, LAST = "first", "last"
"""The layers with weights that read the images, and those that give the logits, in `[quant] keep`."""


def governing(family: Family, choices: Iterable[str]) -> dict[str, str]:
    """Layer-name prefix -> the one of the `choices`, names that end in `.precision`, that decides about it.

    Where a prefix is of two choices, as `classifier` is of `head.precision` and `head.classifier.precision`,
    the one of the longer name decides; of names as long, the one whose first prefix it is.

    Raises:
        ValueError: a choice of a place that the family's networks do not have.
    """
    ranked: dict[str, tuple[tuple[int, int], str]] = {}
    for choice in choices:
        place = choice.removesuffix(".precision")
        for position, prefix in enumerate(family.layers(place)):
            rank = (place.count("."), -position)
            if prefix not in ranked or ranked[prefix][0] < rank:
                ranked[prefix] = (rank, choice)
    return {prefix: choice for prefix, (_, choice) in ranked.items()}


def chosen_policy(family: Family, decisions: Mapping[str, Value]) -> QuantPolicy:
    """The rules of all `*.precision` choices, also those of layers that the arch's network does not have.

    Raises:
        ValueError: an unknown precision.
    """
    choices = governing(family, [name for name in decisions if is_precision(name)])
    return QuantPolicy(tuple((prefix, str(decisions[choice])) for prefix, choice in choices.items()))


def is_precision(choice: str) -> bool:
    """Whether the choice of this name is the precision of some layers."""
    return choice.endswith(".precision")


def quant_policy(
    family: Family, decisions: Mapping[str, Value], graph: Graph, *, keep: Mapping[str, str] | None = None
) -> QuantPolicy:
    """The policy of `graph`, the network of `decisions`; every rule of it decides about some operator.

    Args:
        family: of the network.
        decisions: an arch's; its `*.precision` choices count.
        graph: the network's.
        keep: `first`, `last` or a layer-name prefix -> the precision of those layers whatever is chosen; of
            several that name a layer the last one counts.

    Raises:
        ValueError: an unknown precision.
    """
    chosen = chosen_policy(family, decisions)
    layers = sorted(
        {operator.layer for operator in graph.operators}, key=lambda name: (name.count("."), name)
    )
    wanted = {layer: chosen.precision(layer).name for layer in layers} | kept_layers(graph, keep or {})
    rules = dict(chosen.rules)
    policy = chosen
    for layer in layers:  # outer ones first: a rule for a layer covers those within it
        if policy.precision(layer).name != wanted[layer]:
            rules[layer] = wanted[layer]
            policy = QuantPolicy(tuple(rules.items()))
    used = {most_exact(rules, layer) for layer in layers}
    return QuantPolicy(tuple((prefix, name) for prefix, name in rules.items() if prefix in used))


def kept_layers(graph: Graph, keep: Mapping[str, str]) -> dict[str, str]:
    """Layer -> precision, of all the layers of `graph` that `keep` names; see `quant_policy`."""
    kept = {}
    ends = end_layers(graph) if FIRST in keep or LAST in keep else {}
    for named, precision in keep.items():
        for operator in graph.operators:
            if operator.layer in ends[named] if named in ends else covers(named, operator.layer):
                kept[operator.layer] = precision
    return kept


def end_layers(graph: Graph) -> dict[str, frozenset[str]]:
    """`first` -> the layers with weights that no other such one feeds, `last` -> those that feed no other."""
    fed: dict[str, bool] = {graph.input: False}  # whether a layer with weights came before
    first = set()
    for operator in graph.operators:
        before = any(fed[name] for name in operator.inputs)
        if is_layer(operator) and not before:
            first.add(operator.layer)
        fed[operator.name] = before or is_layer(operator)
    feeds: set[str] = set()  # tensors from which a layer with weights follows
    last = set()
    for operator in reversed(graph.operators):
        if is_layer(operator) and operator.name not in feeds:
            last.add(operator.layer)
        if is_layer(operator) or operator.name in feeds:
            feeds.update(operator.inputs)
    return {FIRST: frozenset(first), LAST: frozenset(last)}


def kept_choices(
    family: Family, choices: Iterable[str], graph: Graph, *, keep: Mapping[str, str]
) -> dict[str, str]:
    """Those of `choices` that decide about kept layers only -> the precision that these are kept in.

    A choice whose layers are kept in several precisions has the first of them: it decides nothing.

    Args:
        family: of the network.
        choices: names that end in `.precision`.
        graph: the largest network's.
        keep: see `quant_policy`.

    Raises:
        ConfigError: `keep` names an unknown precision, or layers that there are not.
    """
    weighted = list(dict.fromkeys(o.layer for o in graph.operators if is_layer(o)))
    for named, precision in keep.items():
        if precision not in PRECISIONS:
            raise ConfigError(f"quant.keep: {named!r} is {precision!r}; known: {', '.join(PRECISIONS)}")
        if named not in (FIRST, LAST) and not any(covers(named, layer) for layer in weighted):
            near = difflib.get_close_matches(named, [FIRST, LAST, *weighted], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(weighted[:3])} and so on"
            raise ConfigError(f"quant.keep names {named!r}, which no layer with weights begins with; {hint}")
    kept = kept_layers(graph, keep)
    prefixes = governing(family, choices)
    free: set[str] = set()
    bound: dict[str, str] = {}
    for layer in weighted:
        prefix = most_exact(prefixes, layer)
        if prefix is not None and layer in kept:
            bound.setdefault(prefixes[prefix], kept[layer])
        elif prefix is not None:
            free.add(prefixes[prefix])
    return {choice: precision for choice, precision in bound.items() if choice not in free}
