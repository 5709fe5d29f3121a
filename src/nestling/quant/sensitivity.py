"""How far a network's answers move where layers are quantized, for every policy at once, from one pass.

To second order the divergence of a quantized network's answers from those in floats is `c' F c / 2`, `c` the
change of the logits and `F` their Fisher information. HAWQ-V2 (arXiv 1911.03852) and FIT (arXiv 2210.08502)
estimate it for each layer from the mean curvature and the size of the rounding errors. Here the errors
themselves are followed, image by image: `F` is `L L'`, so with random signs `v` the gradient of
`(L v)' logits` in a tensor, times the change of that tensor, is its part of `v' L' c`, whose mean square is
`c' F c`. Parts add up, so that errors of several layers which cancel or strengthen one another are told.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.models.operators import compute
from nestling.quant.calibration import METHODS, WITHOUT_COUNTS, Method, WeightMethod
from nestling.quant.constants import stored_weight
from nestling.quant.formats import Format
from nestling.quant.gates import EVERYWHERE, split_gates
from nestling.quant.mixed import TYPES
from nestling.quant.policy import PRECISIONS, Floats, Precision, QuantPolicy
from nestling.quant.ranges import Range, activation_range
from nestling.quant.regions import (
    MOVING_KINDS,
    WEIGHT_AXES,
    activation_formats,
    is_integer,
    is_layer,
    sources_of,
)
from nestling.quant.sharing import shared_groups, with_shared_bounds
from nestling.quant.statistics import Bounds, collect

Part = tuple[str, Format | Floats | Precision]
"""What is rounded, and to what: a tensor, or the weight of an operator, called `<operator>.weight`."""

_NEVER_ROUNDING = MOVING_KINDS | {"Relu", "Abs", "Expand", "Concat"}
"""Kinds that write no number which they have not read, so that nothing is rounded anew."""

_AT_ONCE = 32
"""Images whose tensors are held for the way back."""


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """What every rounding does to the answers of one network.

    Attributes:
        graph: the float network; its gates are split for each policy as they are where it is quantized.
        precisions: those that were looked at.
        parts: part -> (draws x images,): how far it alone moves the answers, in the directions drawn.
    """

    graph: Graph
    precisions: tuple[str, ...]
    parts: Mapping[Part, Tensor]

    def divergence(self, policy: QuantPolicy) -> float:
        """The expected divergence (KL, in nats) of the answers under `policy` from those in floats.

        It holds while errors are small: where they are not, as with 2 bits, it tells the order of layers
        rather than a size, and lies too high.

        Raises:
            Unquantizable: a mix of precisions of which no file is made, see `activation_formats`.
            ValueError: a precision that was not looked at.
        """
        strange = {policy.precision(operator.layer).name for operator in self.graph.operators}
        strange -= {*self.precisions, "fp32"}
        if strange:
            raise ValueError(
                f"the sensitivity to {min(strange)!r} was not measured; only to {', '.join(self.precisions)}"
            )
        moved = [self.parts[part] for part in _parts(self.graph, policy) if part in self.parts]
        return float(torch.stack(moved).sum(0).square().mean()) / 2 if moved else 0.0

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Layer with weights -> precision -> the `divergence` where it alone is quantized, in order."""
        layers = dict.fromkeys(operator.layer for operator in self.graph.operators if is_layer(operator))
        return {
            layer: {name: self.divergence(QuantPolicy(((layer, name),))) for name in self.precisions}
            for layer in layers
        }

    def to_bytes(self) -> bytes:
        """`parts` in the format of safetensors, with a digest of what was asked for and what was found."""
        parts = {_key(part): moved.contiguous() for part, moved in self.parts.items()}
        asked = map(_key, _wanted(self.graph, self.precisions))
        return safetensors.torch.save(parts, metadata={"digest": _digest(asked, parts)})

    @classmethod
    def from_bytes(cls, graph: Graph, precisions: Collection[str], data: bytes) -> Sensitivity:
        """The sensitivity of which `to_bytes` gave `data`: that of `graph` to `precisions`.

        Raises:
            ValueError: it is of another graph, to other precisions, or damaged.
        """
        names = _rounding_names(precisions)
        wanted = {_key(part): part for part in _wanted(graph, names)}
        try:
            found, digest = safetensors.torch.load(data), _metadata(data).get("digest")
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f"a sensitivity that cannot be read ({error})") from None
        if digest != _digest(wanted, found):
            raise ValueError(
                f"a sensitivity of another graph or version, or not to {', '.join(names)}; measure it again"
            )
        return cls(graph, names, {part: found[key] for key, part in wanted.items() if key in found})


def measure_sensitivity(
    graph: Graph,
    precisions: Collection[str],
    images: Iterable[Tensor],
    *,
    method: Method = "minmax",
    weights: WeightMethod = "minmax",
    shared: Collection[str] = (),
    reduce_range: bool = False,
    draws: int = 1,
    seed: int = 0,
) -> Sensitivity:
    """What rounding to each of `precisions` does to the answers of `graph`, tensor by tensor.

    One pass finds the ranges; a second one, there and back, the sensitivity: each layer is computed once more
    for every precision, and nothing else is. Weights are rounded to the nearest; the rounding of biases,
    which have 32 bits, is left out. Equalize `graph` first where its copies are; what AWQ, a rounding by
    images or corrected biases mend is not told.

    Args:
        graph: the float network.
        precisions: names.
        images: batches (N, 3, R, R) on the device of the graph's weights. The estimate's own error is about
            `sqrt(2 / (images x draws))` of it, 9 % with 256; more where a few images make up most of it.
        method: see `ranges` of `nestling.quant.observing`.
        weights: see there.
        shared: see there; with groups as where the whole network is in one of the precisions.
        reduce_range: see there.
        draws: ways back for each image.
        seed: of the directions that are drawn.

    Raises:
        KeyError: an unknown precision.
        Unquantizable: tensors that are not finite.
        ValueError: no images.
    """
    names = _rounding_names(precisions)
    batches = tuple(images)
    if not batches:
        raise ValueError("no images; sensitivity needs at least one batch")
    on_integers = any(PRECISIONS[name].activation is not None for name in names)
    exact = split_gates(graph, EVERYWHERE) if on_integers else graph
    wanted = _wanted(graph, names)
    tensors = {name for name, to in wanted if isinstance(to, Format)}
    seen = collect(exact, batches, tensors, counts=method not in WITHOUT_COUNTS) if tensors else {}
    bounds = {(name, to): METHODS[method](seen[name], to) for name, to in wanted if isinstance(to, Format)}
    for name in names if shared else ():
        bounds |= _shared_bounds(graph, name, bounds, kinds=shared)
    ranges: dict[Part, Range] = {(name, to): activation_range(*two, to) for (name, to), two in bounds.items()}
    operators = {f"{operator.name}.weight": operator for operator in graph.operators}
    errors: dict[Part, Operator] = {
        (name, to): _error(operators[name], to, weights=weights, reduce_range=reduce_range)
        for name, to in wanted
        if isinstance(to, Precision)
    }
    generator = torch.Generator().manual_seed(seed)
    found: dict[Part, list[Tensor]] = defaultdict(list)
    for few in (few for batch in batches for few in torch.split(batch, _AT_ONCE)) if wanted else ():
        for part, moved in _moved(exact, few, ranges, errors, wanted, draws=draws, generator=generator):
            found[part].append(moved)
    return Sensitivity(graph, names, {part: torch.cat(moved) for part, moved in found.items()})


def _rounding_names(precisions: Collection[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in precisions if name != "fp32"))


def _wanted(graph: Graph, names: Collection[str]) -> dict[Part, None]:
    """What any policy of the precisions `names` may round."""
    wanted: dict[Part, None] = {}
    for name in names:
        wanted |= dict.fromkeys(_possible_parts(graph, PRECISIONS[name]))
    return wanted


def _key(part: Part) -> str:
    """`part` as it is called in a file."""
    name, to = part
    return f"{name} to {to.name if isinstance(to, Precision) else to}"


def _digest(asked: Iterable[str], found: Iterable[str]) -> str:
    """What tells whether a file has all of what is asked for; of that some may reach no answer."""
    told = json.dumps([sorted(asked), sorted(found)])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _metadata(data: bytes) -> dict[str, str]:
    """What `safetensors.torch.save` was given as `metadata`; its `load` tells tensors alone.

    The file begins with the length of a JSON object, in 8 bytes, and that object.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: dict[str, str] = header.get("__metadata__", {})
    return found


def _is_rounded(operator: Operator, precision: Precision) -> bool:
    """Whether `precision` rounds the weight of `operator`: a layer's; in 16 bits that of any product."""
    multiplies = operator.kind in WEIGHT_AXES and operator.weight is not None
    return is_layer(operator) if precision.floats == "float32" else multiplies


def _parts(graph: Graph, policy: QuantPolicy) -> Iterable[Part]:
    """What `policy` rounds: each tensor once, where it comes to be."""
    graph = split_gates(graph, policy)
    integer = [operator for operator in graph.operators if is_integer(operator, policy)]
    formats = activation_formats(graph, integer, policy)
    found: dict[Part, None] = {
        (source, formats[source]): None for source in sources_of(graph, formats).values()
    }
    carried: set[Part] = set()
    for operator in graph.operators:
        precision = policy.precision(operator.layer)
        if precision.name != "fp32" and _is_rounded(operator, precision):
            found[f"{operator.name}.weight", precision] = None
        if precision.floats != "float32":
            if operator.kind in _NEVER_ROUNDING:
                carried.add((operator.name, precision.floats))
            written = dict.fromkeys((name, precision.floats) for name in (*operator.inputs, operator.name))
            found |= {part: None for part in written if part not in carried}
    return found


def _possible_parts(graph: Graph, precision: Precision) -> Iterable[Part]:
    """What any policy may round to `precision`: also tensors whose numbers come rounded in this one."""
    policy = QuantPolicy((("", precision.name),))
    graph = split_gates(graph, policy)
    integer = [operator for operator in graph.operators if is_integer(operator, policy)]
    found: dict[Part, None] = dict.fromkeys(activation_formats(graph, integer, policy).items())
    if precision.floats != "float32":
        found |= dict.fromkeys((name, precision.floats) for name in graph.shapes)
    return found | dict.fromkeys(_parts(graph, policy))


def _shared_bounds(
    graph: Graph,
    precision: str,
    bounds: Mapping[tuple[str, Format], Bounds],
    *,
    kinds: Collection[str],
) -> dict[tuple[str, Format], Bounds]:
    """Of `bounds` those that tensors have when all layers are in `precision`, and groups of them share."""
    policy = QuantPolicy((("", precision),))
    graph = split_gates(graph, policy)
    integer = [operator for operator in graph.operators if is_integer(operator, policy)]
    formats = activation_formats(graph, integer, policy)
    sources = sources_of(graph, formats)
    own = {source: bounds[source, formats[source]] for source in sources.values()}
    found = with_shared_bounds(own, shared_groups(graph, integer, sources, kinds=kinds))
    return {(source, formats[source]): two for source, two in found.items()}


def _error(
    operator: Operator, precision: Precision, *, weights: WeightMethod, reduce_range: bool
) -> Operator:
    """`operator`, which is linear, with the error of its weight in the weight's place."""
    weight, axis = operator.constant().detach(), WEIGHT_AXES[operator.kind]
    stored = stored_weight(weight, precision, axis=axis, weights=weights, reduce_range=reduce_range)
    return replace(operator, weight=stored - weight, bias=None)


def _moved(
    graph: Graph,
    images: Tensor,
    ranges: Mapping[Part, Range],
    errors: Mapping[Part, Operator],
    wanted: Collection[Part],
    *,
    draws: int,
    generator: torch.Generator,
) -> list[tuple[Part, Tensor]]:
    """For every part and draw, (images,): the change of the drawn sum of logits when it alone is rounded."""
    found: list[tuple[Part, Tensor]] = []
    by_name: dict[str, list[Part]] = defaultdict(list)
    for part in wanted:
        by_name[part[0]].append(part)
    reads = {operator.name: operator.inputs for operator in graph.operators}
    read_by_weights = {
        reads[operator.name][0] for operator in graph.operators if f"{operator.name}.weight" in by_name
    }
    kept: dict[str, Tensor] = {}

    def watch(name: str, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        exact = tensor.detach()
        changes: list[tuple[Part, Callable[[], Tensor]]] = [
            (part, partial(_rounding, exact, part[1], ranges.get(part))) for part in by_name[name]
        ]
        for part in by_name[f"{name}.weight"]:
            changes.append((part, partial(compute, errors[part], kept[reads[name][0]])))
        if name in read_by_weights:
            kept[name] = exact
        shape = graph.shapes[name]

        def note(gradient: Tensor) -> None:
            for part, change in changes:
                found.append((part, _per_image(gradient * change(), shape, len(images))))

        if changes:
            tensor.register_hook(note)  # type: ignore[no-untyped-call]
        return tensor

    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        logits = graph.run(leaf, after=watch)
        chances = logits.detach().softmax(1)
        roots = chances.sqrt()
        for draw in range(draws):
            signs = torch.randint(0, 2, chances.shape, generator=generator).to(chances).mul_(2).sub_(1)
            direction = roots * signs - chances * (roots * signs).sum(1, keepdim=True)
            # the images' own gradient is what all others are on the way to
            torch.autograd.grad((logits * direction).sum(), leaf, retain_graph=draw < draws - 1)
    return found


def _rounding(tensor: Tensor, to: Format | Floats | Precision, range: Range | None) -> Tensor:
    """What rounding to `to`, with `range` where those are integers, adds to `tensor`."""
    if range is not None:
        return range.nearest(tensor) - tensor
    assert isinstance(to, str)
    return tensor.to(TYPES[to]).to(tensor.dtype) - tensor


def _per_image(numbers: Tensor, shape: tuple[int, ...], images: int) -> Tensor:
    """(images,): the sums over each image of a tensor that has `shape` for a single one."""
    axis = next((axis for axis, size in enumerate(shape) if size != numbers.shape[axis]), 0)
    return numbers.movedim(axis, 0).reshape(images, -1).sum(1).double().cpu()
