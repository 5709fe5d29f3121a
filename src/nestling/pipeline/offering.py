"""Precisions that the run's device cannot use are dropped from its space before it is trained."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from nestling.config import ConfigError
from nestling.models.building import build_shapes
from nestling.models.graph import Graph, Untraceable, trace
from nestling.pipeline.listening import Listener
from nestling.pipeline.policies import is_precision, kept_choices, kept_layers, quant_policy
from nestling.pipeline.precisions import probe, usable
from nestling.pipeline.probes import WEIGHTED
from nestling.pipeline.workbench import OFFERED, Workbench
from nestling.profile import MeasurementStore
from nestling.quant import PRECISIONS, Unquantizable, check_policy, covers
from nestling.quant.layers import convolution_kind, kind_of
from nestling.quant.regions import is_layer
from nestling.space import SearchSpace, Value

DRAWN_MIXES = 64
"""Mixes of precisions that are tried where signed activations may come beside unsigned ones."""
MOST_MIXED = 0.95
"""The part of them that may fail: with more, a search would find next to nothing."""


def offer_precisions(bench: Workbench, *, listener: Listener) -> None:
    """Settles once which precisions the run's device can use; from then on its space has no others.

    The device runs a tiny network of each kind of layer in each precision. A value that it cannot use is
    dropped, and the listener told; of networks that cannot be traced all but fp32 is. A choice of which
    `quant.keep` keeps every layer decides nothing: it gets the precision that these are kept in.

    Raises:
        ConfigError: a choice of which no precision is left, an unknown precision, precisions of which nearly
            every mix puts signed beside unsigned activations, or kept layers that there are not or whose
            precision the device cannot use.
        DeviceError: the device cannot be had.
    """
    if bench.run.space_file.exists():
        return  # settled when the run began
    space = bench.given_space
    keep = bench.config.quant.keep
    asked = {choice.name: choice.values for choice in space.choices if is_precision(choice.name)}
    largest = _largest_graph(bench, space) if keep else None
    kept_to = {} if largest is None else _kept(bench, list(asked), largest)
    asked = {name: values for name, values in asked.items() if name not in kept_to}
    named = (*asked.values(), tuple(keep.values()))
    names = list(dict.fromkeys(str(value) for values in named for value in values))
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown:
        raise ConfigError(f"unknown precision {unknown[0]!r}; known: {', '.join(PRECISIONS)}")
    if all(name == "fp32" for name in names):
        if kept_to:
            bench.run.write_json(OFFERED, {"kept": kept_to})
        return
    largest = largest or _largest_graph(bench, space)
    if isinstance(largest, Untraceable):
        offered, dropped = _in_floats(asked, largest)
        _settle(bench, offered=offered, dropped=dropped, kept_to=kept_to, listener=listener)
        return
    kinds, kept_kinds = layer_kinds(bench, space, list(asked)), _kept_kinds(largest, keep)
    concerned = frozenset(chain(*kinds.values(), *kept_kinds.values()))
    needed = [kind for kind in WEIGHTED if kind in concerned]
    store = MeasurementStore(bench.run.folder / "measurements.db")
    findings = probe(bench.device, names, kinds=needed, store=store)
    config = bench.config.search
    timed = "latency_ms" in (*config.objectives, *config.limits)
    for layer, precision in keep.items():
        _, gone = usable([precision], findings, kinds=kept_kinds[layer], research=not timed)
        if gone:
            raise ConfigError(
                f"quant.keep: {bench.device.name} cannot use {precision!r} for {layer!r}: {gone[precision]}"
            )
    offered, dropped = {}, {}
    for name, values in asked.items():
        kept, gone = usable([str(value) for value in values], findings, kinds=kinds[name], research=not timed)
        if not kept:
            reasons = "; ".join(f"{value}: {reason}" for value, reason in gone.items())
            raise ConfigError(
                f"{bench.device.name} can use no precision of {name} ({reasons}); add 'fp32' to its values"
            )
        if gone:
            offered[name], dropped[name] = list(kept), gone
    left: dict[str, Sequence[Value]] = {**asked, **{name: (kept,) for name, kept in kept_to.items()}}
    warning = _mixed_signs(bench, space, {**left, **offered}, graph=largest)
    if warning is not None:
        listener.note(warning)
    _settle(bench, offered=offered, dropped=dropped, kept_to=kept_to, listener=listener)


def _mixed_signs(
    bench: Workbench, space: SearchSpace, left: Mapping[str, Sequence[Value]], *, graph: Graph
) -> str | None:
    """What to say of mixes of the precisions that are `left` of which no file is made; None where all can be.

    Of signed activations beside unsigned ones, that is; mixes of the largest network, whose `graph` it is,
    are drawn and tried.

    Raises:
        ConfigError: nearly all mixes are such.
    """
    keep = bench.config.quant.keep
    formats = (PRECISIONS[str(value)].activation for value in chain(*left.values(), keep.values()))
    if len({format.signed for format in formats if format is not None}) < 2:
        return None
    largest = bench.fitted(space).largest
    rng, failed, why = random.Random(bench.config.seed), 0, ""
    for _ in range(DRAWN_MIXES):
        mix = {name: rng.choice(values) for name, values in left.items()}
        policy = quant_policy(bench.family, {**largest, **mix}, graph, keep=keep)
        try:
            check_policy(graph, policy)
        except Unquantizable as error:
            failed, why = failed + 1, why or str(error)
    if not failed:
        return None
    told = f"{failed} of {DRAWN_MIXES} drawn mixes of precisions cannot be had: {why}"
    if failed > MOST_MIXED * DRAWN_MIXES:
        raise ConfigError(f"{told}; offer signed or unsigned activations, not both")
    return f"{told}. Such candidates fail, and the search goes on without them"


def _settle(
    bench: Workbench,
    *,
    offered: Mapping[str, list[str]],
    dropped: Mapping[str, Mapping[str, str]],
    kept_to: Mapping[str, str],
    listener: Listener,
) -> None:
    """Keeps in the run's folder what was found, and tells what was dropped."""
    facts: dict[str, Any] = {
        "device": str(bench.device.fingerprint),
        "offered": offered,
        "dropped": dropped,
        "kept": kept_to,
    }
    bench.run.write_json(OFFERED, facts)
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, gone in dropped.items():
        for value, reason in gone.items():
            by_reason.setdefault((value, reason), []).append(name)
    for (value, reason), choices in by_reason.items():
        listener.note(f"dropped {value} from {', '.join(choices)}: {reason}")


def _in_floats(
    asked: Mapping[str, Sequence[Value]], why: Untraceable
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """Of every choice fp32 alone, and why the others are dropped.

    Raises:
        ConfigError: a choice without fp32.
    """
    reason = f"{why}; torch.onnx.export writes such networks, in floats"
    dropped = {}
    for name, values in asked.items():
        if "fp32" not in values:
            raise ConfigError(f"no precision of {name} can be had: {reason}; add 'fp32' to its values")
        if len(values) > 1:
            dropped[name] = {str(value): reason for value in values if value != "fp32"}
    return {name: ["fp32"] for name in dropped}, dropped


def layer_kinds(bench: Workbench, space: SearchSpace, choices: list[str]) -> dict[str, frozenset[str]]:
    """Precision choice -> the kinds of layers with weights that it governs in the largest network.

    A choice that governs none by name is held to govern all.
    """
    largest = bench.fitted(space).largest
    kinds = {}
    for layer, module in build_shapes(bench.family.build, largest).named_modules():
        if isinstance(module, nn.Linear):
            kinds[layer] = "Gemm"
        elif isinstance(module, nn.Conv2d):
            kinds[layer] = convolution_kind(groups=module.groups, inputs=module.weight.shape[1])
    found = {}
    for choice in choices:
        prefixes = bench.family.layers(choice.removesuffix(".precision"))
        governed = {
            kind for layer, kind in kinds.items() if any(covers(prefix, layer) for prefix in prefixes)
        }
        found[choice] = frozenset(governed or WEIGHTED)
    return found


def _kept_kinds(graph: Graph, keep: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """What `quant.keep` names -> the kinds of layers with weights of `graph` that it decides about."""
    kinds: dict[str, set[str]] = {named: set() for named in keep}
    decided = {layer: named for named in keep for layer in kept_layers(graph, {named: keep[named]})}
    for operator in graph.operators:
        if operator.layer in decided and is_layer(operator):
            # a linear layer's, over rows of numbers
            kinds[decided[operator.layer]].add("Gemm" if operator.kind == "MatMul" else kind_of(operator))
    return {named: frozenset(found) for named, found in kinds.items()}


def _kept(bench: Workbench, choices: list[str], largest: Graph | Untraceable) -> dict[str, str]:
    """Those of `choices` of which the configuration keeps every layer -> the precision of these.

    None where the largest network cannot be traced: all of it is in fp32.

    Raises:
        ConfigError: kept layers that there are not, an unknown precision, or another than fp32 where the
            largest network cannot be traced.
    """
    keep = bench.config.quant.keep
    if isinstance(largest, Graph):
        return kept_choices(bench.family, choices, largest, keep=keep)
    asked = next(((layer, precision) for layer, precision in keep.items() if precision != "fp32"), None)
    if asked is not None:
        raise ConfigError(
            f"quant.keep: {asked[0]} is {asked[1]!r}, but {largest}; torch.onnx.export writes such networks, "
            "in floats: keep it in 'fp32'"
        ) from largest
    return {}


def _largest_graph(bench: Workbench, space: SearchSpace) -> Graph | Untraceable:
    """The graph of the largest network of `space`, its weights random ones, or why it has none."""
    largest = bench.fitted(space).largest
    try:
        with torch.random.fork_rng(devices=[]):
            return trace(bench.family.build(largest).eval(), resolution=bench.resolution(largest))
    except Untraceable as error:
        return error.with_traceback(None)
