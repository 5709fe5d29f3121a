"""How each subnet of a supernet is called that trains in the precisions of its arch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from nestling.config import ConfigError
from nestling.models.compiling import Call
from nestling.models.families import Family
from nestling.models.graph import trace
from nestling.pipeline.policies import chosen_policy, is_precision, kept_layers, quant_policy
from nestling.quant import PRECISIONS
from nestling.quant.calibration import WeightMethod
from nestling.quant.lent import rounded_call
from nestling.space import Arch, SearchSpace


def rounded_calls(
    family: Family, space: SearchSpace, *, keep: Mapping[str, str], weights: WeightMethod = "minmax"
) -> Callable[[Arch], Call | None]:
    """For an arch of `space` the call that rounds its layers, or None where all are in floats.

    Args:
        family: of the networks.
        space: of the archs.
        keep: as `[quant] keep` has it; `first` and `last` are those layers of the largest network.
        weights: as `[quant] weights` has it.

    Raises:
        ConfigError: no arch has layers in integers or codes.
    """
    chosen = {str(value) for choice in space.choices if is_precision(choice.name) for value in choice.values}
    if all(PRECISIONS[name].weight is None for name in chosen | set(keep.values()) if name in PRECISIONS):
        raise ConfigError(
            "train.quantize is true, but no precision of the space has weights in few bits; give its stages "
            "some, such as w8a8, or leave it out"
        )
    if not keep:
        return lambda arch: rounded_call(chosen_policy(family, arch), weights=weights)
    with torch.random.fork_rng(devices=[]):
        largest = family.build(space.largest).eval()
    # a subnet's layers are called as the largest network's
    graph = trace(largest, resolution=space.largest.integer("resolution"))
    kept = kept_layers(graph, keep)
    return lambda arch: rounded_call(quant_policy(family, arch, graph, keep=kept), weights=weights)
