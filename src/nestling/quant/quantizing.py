"""From a float graph and a policy to what is simulated and written: one recipe, in its order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nestling.models.graph import Graph
from nestling.models.operators import Operator
from nestling.quant.adaround import ITERATIONS, round_by_gradients
from nestling.quant.awq import awq
from nestling.quant.calibration import WITHOUT_COUNTS, Method, WeightMethod
from nestling.quant.constants import stored_range
from nestling.quant.correction import correct_biases
from nestling.quant.equalization import equalize
from nestling.quant.gates import EVERYWHERE, split_gates
from nestling.quant.mixed import halve
from nestling.quant.observing import needed, ranges
from nestling.quant.placing import place
from nestling.quant.policy import QuantPolicy
from nestling.quant.ranges import Range
from nestling.quant.regions import WEIGHT_AXES, is_layer
from nestling.quant.rounding import round_by_moments
from nestling.quant.statistics import Statistics, collect, statistics

RoundingMethod = Literal["nearest", "moments", "gradients"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How numbers get their integers where a policy asks for some.

    Attributes:
        calibration: how the range of an activation follows from what was seen.
        weights: whether a channel's integers span its weights, or have the least squared error; a group's,
            of layers that compute on floats, span them.
        equalize: bring channels to one size between layers first (arXiv 1906.04721).
        awq: scale what weight-only layers read by its size first (AWQ, arXiv 2306.00978).
        rounding: weights go to the `nearest` integer, or to those that keep a layer's output: by second
            `moments` (GPTQ, arXiv 2210.17323) or by `gradients` (AdaRound, arXiv 2004.10568).
        rounding_iterations: steps of `gradients` for each layer.
        correct_biases: take the mean error off each layer's bias last (arXiv 1906.04721).
        shared: kinds of operators that read and write tensors of one range, see
            `nestling.quant.observing.ranges`.
    """

    calibration: Method = "minmax"
    weights: WeightMethod = "minmax"
    equalize: bool = False
    awq: bool = False
    rounding: RoundingMethod = "nearest"
    rounding_iterations: int = ITERATIONS
    correct_biases: bool = False
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """What a file holds.

    Attributes:
        graph: with casts at the borders of 16-bit regions, and weights as they are to be rounded.
        ranges: of its tensors and constants; none where nothing is in integers.
        statistics: that the ranges were taken from, or that were given and not used.
    """

    graph: Graph
    ranges: Mapping[str, Range]
    statistics: Statistics | None = None


def quantize(
    graph: Graph,
    policy: QuantPolicy,
    images: Iterable[Tensor],
    *,
    recipe: Recipe | None = None,
    reduce_range: bool = False,
    kept: Statistics | None = None,
) -> Quantized:
    """`graph` in the precisions of `policy`.

    Activations are observed in the float network whose every hard swish is split, whichever of them the
    policy splits: so its statistics are good for all policies of integers. Where weights are on the codes of
    research precisions, or layers in 16-bit floats, that very graph is observed.

    Args:
        graph: the float network.
        policy: which layers.
        images: batches (N, 3, R, R) on the device of the graph's weights, no iterator: read at most once by
            the plain recipe, several times by others.
        recipe: how; the plain one where it is None.
        reduce_range: see `nestling.quant.observing.ranges`.
        kept: statistics of another policy of this network and these images; the result is the same.

    Raises:
        Unquantizable: activations that are not finite, constants that 16 bits cannot hold, or an operator
            between signed and unsigned integers.
        ValueError: no images.
    """
    how = recipe or Recipe()
    precisions = {policy.precision(operator.layer) for operator in graph.operators}
    if how.equalize and any(precision.activation is not None for precision in precisions):
        graph = equalize(graph)
    if how.awq and any(p.integers is not None and p.activation is None for p in precisions):
        graph = awq(graph, images, rounding=lambda operator: _stored(operator, policy))
    split = split_gates(graph, policy)
    exact = halve(split, policy)
    placed = place(exact, policy)
    names = needed(placed, policy)
    counts = how.calibration not in WITHOUT_COUNTS
    if placed is split:
        kept = statistics(split_gates(graph, EVERYWHERE), images, names, kept=kept, counts=counts)
        seen = kept.histograms
    else:
        seen = collect(placed, images, names, counts=counts) if names else {}
    graph = placed
    found = ranges(
        graph,
        policy,
        seen,
        method=how.calibration,
        weights=how.weights,
        shared=how.shared,
        reduce_range=reduce_range,
    )
    if not found:
        return Quantized(graph, found, kept)
    if how.rounding == "moments":
        graph = round_by_moments(graph, found, images)
    elif how.rounding == "gradients":
        graph = round_by_gradients(graph, found, images, iterations=how.rounding_iterations)
    if how.correct_biases:
        graph, found = correct_biases(graph, found, images, exact=exact)
    return Quantized(graph, found, kept)


def prepared(graph: Graph, policy: QuantPolicy) -> Graph:
    """`graph` with the operators and casts that its precisions need, its weights as they are."""
    return halve(split_gates(graph, policy), policy)


def check_policy(graph: Graph, policy: QuantPolicy) -> None:
    """Refuses a policy of which `quantize` makes nothing, whatever the images are.

    Raises:
        Unquantizable: as `quantize`: an operator between signed and unsigned integers, or constants that 16
            bits cannot hold.
    """
    needed(prepared(graph, policy), policy)


def _stored(operator: Operator, policy: QuantPolicy) -> Tensor | None:
    """The weight of a weight-only layer as it is stored; None of other operators."""
    precision = policy.precision(operator.layer)
    if not is_layer(operator) or precision.activation is not None:
        return None
    weight = operator.constant()
    found = stored_range(weight, precision, axis=WEIGHT_AXES[operator.kind])
    return None if found is None else found.nearest(weight)
