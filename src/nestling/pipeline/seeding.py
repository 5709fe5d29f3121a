"""Where bits are best saved, from the sensitivity of one network: archs with which a search begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nestling.config import QuantConfig
from nestling.models.graph import Graph, Untraceable
from nestling.pipeline.candidate import float_network
from nestling.pipeline.listening import Listener
from nestling.pipeline.policies import is_precision, quant_policy
from nestling.pipeline.workbench import Workbench
from nestling.quant import PRECISIONS, QuantPolicy, Unquantizable, check_policy, weight_bits
from nestling.quant.equalization import equalize
from nestling.quant.layers import bit_operations
from nestling.quant.sensitivity import Sensitivity, measure_sensitivity
from nestling.run import write_atomically
from nestling.search import Problem
from nestling.space import Arch, Value

SENSITIVITY = "sensitivity.json"
"""The run's file of what quantizing each layer of its largest network does, and of the archs made of that."""
PARTS = "sensitivity.safetensors"
"""The run's file of what that is made of: of it mixes are made, and anew where other metrics are weighed."""
MIXES = 3
"""Mixes of precisions that are tried, spread from none quantized to all."""
DRAWS = 2

Assignment = Mapping[str, Value]
"""Choice -> value."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A point of a trade-off.

    Attributes:
        values: choice -> value.
        cost: in whatever unit was saved.
    """

    values: Assignment
    cost: float


def seeds(bench: Workbench, problem: Problem, *, listener: Listener | None = None) -> list[Arch]:
    """Archs of mixed precisions, for a search to begin with; none where it is not asked, or none are open.

    They are the largest network of the space and, where choices have one, that of middle values, each in
    `MIXES` mixes. What is found out is kept in the run's `sensitivity.json`, also layer by layer, for the
    report. Mixes are made anew where limits that were changed make them save something else.

    Raises:
        RunError: training is not finished.
        Untraceable: an operation of the largest network without a translation.
        Unquantizable: what it computes, or its mixes of precisions, cannot be had; also where it was found
            untraceable or so before, which is not tried again.
    """
    space = bench.space
    opened = {c.name: c.values for c in space.open_choices if is_precision(c.name)}
    if not bench.config.search.sensitivity or not opened:
        return []
    known = bench.run.read_json(SENSITIVITY) or {}
    timed = "latency_ms" in problem.needed()
    if "mixes" not in known or known.get("timed", timed) != timed:  # runs of before do not tell
        if "refused" in known:  # by another process of this search, maybe
            raise Unquantizable(known["refused"])
        if listener is not None and (left_out := _left_out(bench.config.quant)):
            listener.note(
                f"sensitivity, which archs to begin with come from, leaves out what {' and '.join(left_out)} "
                "of [quant] mend: candidates are made with it, and lose less than it tells"
            )
        before = known
        try:
            measured = kept_sensitivity(bench)
            known = layer_facts(bench, measured)
            bench.run.write_json(SENSITIVITY, known)  # for the report, whatever comes of mixes
            found = mixes(bench, measured, opened, timed=timed)
            known["timed"] = timed
            known["mixes"] = [mix_facts(bench, measured, mix) for mix in found]
        except (Untraceable, Unquantizable) as error:
            # the limits may be taken away again, and then those of before serve
            bench.run.write_json(
                SENSITIVITY, before if "mixes" in before else {**known, "refused": str(error)}
            )
            raise
        bench.run.write_json(SENSITIVITY, known)
    hosts = space.spread(3)[1:]
    archs = (space.canonical({**host, **mix["values"]}) for mix in known["mixes"] for host in hosts)
    return list(dict.fromkeys(archs))


def kept_sensitivity(bench: Workbench) -> Sensitivity:
    """The sensitivity of the largest network to every precision of the space, on the calibration images.

    Those that `quant.keep` keeps layers in are among them, also where no choice has them. Channels are
    equalized and scales shared as candidates' are; `awq`, `rounding` and `correct_biases` are left out. It is
    kept in the run, as measuring it may take long.

    Raises:
        RunError, Untraceable, Unquantizable: see `seeds`.
    """
    graph, precisions = _asked(bench)
    kept = bench.run.folder / PARTS
    if kept.exists():
        with suppress(ValueError):  # of a version that rounded otherwise, or damaged
            return Sensitivity.from_bytes(graph, precisions, kept.read_bytes())
    found = _measured(bench, graph, precisions)
    write_atomically(kept, found.to_bytes())
    return found


def _asked(bench: Workbench) -> tuple[Graph, list[str]]:
    """The graph of the largest network, equalized where candidates are, and the precisions it is tried in."""
    arch, config = bench.space.largest, bench.config.quant
    graph = float_network(bench, arch).traced
    if isinstance(graph, Untraceable):
        raise graph
    choices = [choice for choice in bench.space.choices if is_precision(choice.name)]
    chosen = dict.fromkeys(str(value) for choice in choices for value in choice.values)
    precisions = list(chosen | dict.fromkeys(config.keep.values()))
    if config.equalize and any(PRECISIONS[name].activation is not None for name in precisions):
        graph = equalize(graph)
    return graph, precisions


def _measured(bench: Workbench, graph: Graph, precisions: Sequence[str]) -> Sensitivity:
    config = bench.config.quant
    return measure_sensitivity(
        graph,
        precisions,
        bench.calibration_images(graph.resolution),
        method=config.calibration,
        weights=config.weights,
        shared=config.shared,
        reduce_range=bench.device.fingerprint.int8_saturates,
        draws=DRAWS,
        seed=bench.config.seed,
    )


def _left_out(config: QuantConfig) -> list[str]:
    """Of what `config` asks, by key, what sensitivity does not tell of."""
    asked = {
        "awq": config.awq,
        "rounding": config.rounding != "nearest",
        "correct_biases": config.correct_biases,
    }
    return [name for name, on in asked.items() if on]


def mixes(
    bench: Workbench, found: Sensitivity, opened: Mapping[str, Sequence[Value]], *, timed: bool
) -> list[Mix]:
    """`MIXES` mixes of precisions of the largest network, the last with all that saves anything.

    Those of which no file is made are not among them. What is saved are products of bits where the search
    weighs latency (`timed`), otherwise bits of weights.
    """
    largest = bench.space.largest

    def policy(values: Assignment) -> QuantPolicy:
        return _policy(bench, found, values)

    def cost(values: Assignment) -> float:
        return (bit_operations if timed else weight_bits)(found.graph, policy(values))

    def possible(values: Assignment) -> bool:
        try:
            check_policy(found.graph, policy(values))
        except Unquantizable:
            return False
        return True

    path = trade_off(
        opened,
        start={name: largest[name] for name in opened},
        loss=lambda values: found.divergence(policy(values)),
        cost=cost,
        possible=possible,
    )
    return spread(path, MIXES)


def trade_off(
    choices: Mapping[str, Sequence[Value]],
    *,
    start: Assignment,
    loss: Callable[[Assignment], float],
    cost: Callable[[Assignment], float],
    possible: Callable[[Assignment], bool] = lambda _: True,
) -> list[Mix]:
    """The mixes from `start` to the cheapest, each with one choice changed: what loses least per cost saved.

    Each choice is tried by itself, the others at `start`; were losses and costs sums over choices, as they
    nearly are, no mix of the same cost would lose less, but for those between two neighbours (Shoham and
    Gersho 1988).

    Args:
        choices: choice -> values.
        start: a value of each.
        loss: of a mix.
        cost: of a mix.
        possible: whether there is such a mix. A step to one that there is not is left out; where there is
            none at the start, nothing is tried.
    """
    if not possible(start):
        return []
    steps: list[tuple[float, int, str, Value]] = []
    for name, values in choices.items():
        tried = {value: {**start, name: value} for value in values}
        points = {value: (cost(mix), loss(mix)) for value, mix in tried.items() if possible(mix)}
        here = start[name]
        while cheaper := [value for value in points if points[value][0] < points[here][0]]:
            slopes = {value: _slope(points[here], points[value]) for value in cheaper}
            # of values on one line the nearest comes first
            here = min(cheaper, key=lambda value: (slopes[value], -points[value][0]))
            steps.append((slopes[here], len(steps), name, here))
    path = [Mix(dict(start), cost(start))]
    for _, _, name, value in sorted(steps, key=lambda step: step[:2]):
        changed = {**path[-1].values, name: value}
        if possible(changed):
            path.append(Mix(changed, cost(changed)))
    return path


def spread(path: Sequence[Mix], count: int) -> list[Mix]:
    """At most `count` mixes of `path`, evenly spread over the costs below its first, its last among them."""
    if not path:
        return []
    first, last = path[0].cost, path[-1].cost
    chosen = []
    for number in range(1, count + 1):
        wanted = first + (last - first) * number / count
        nearest = min(path[1:], key=lambda mix: abs(mix.cost - wanted), default=None)
        if nearest is not None and nearest not in chosen:
            chosen.append(nearest)
    return chosen


def layer_facts(bench: Workbench, found: Sensitivity) -> dict[str, Any]:
    """What `sensitivity.json` holds of layers."""
    return {
        "arch_key": bench.space.largest.key,
        "precisions": list(found.precisions),
        "layers": found.by_layer(),
    }


def mix_facts(bench: Workbench, found: Sensitivity, mix: Mix) -> dict[str, Any]:
    """What it holds of a mix."""
    divergence = found.divergence(_policy(bench, found, mix.values))
    return {"values": dict(mix.values), "cost": mix.cost, "divergence": divergence}


def _policy(bench: Workbench, found: Sensitivity, values: Assignment) -> QuantPolicy:
    """The policy of the largest network with `values` for some of its precisions."""
    arch = bench.space.canonical({**bench.space.largest, **values})
    return quant_policy(bench.family, arch, found.graph, keep=bench.config.quant.keep)


def _slope(here: tuple[float, float], there: tuple[float, float]) -> float:
    return (there[1] - here[1]) / (here[0] - there[0])
