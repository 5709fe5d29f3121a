"""How a new network's weights begin, where that is not as its constructor leaves them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

_SUMS: set[Any] = {operator.add, operator.iadd, torch.add}
_PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul}


def zero_last_norms(network: nn.Module) -> int:
    """Sets the scale of each residual branch's last batch normalization to 0, in place; returns how many.

    A block whose shortcut is its input then begins as that shortcut alone, which lets deep networks learn at
    a high rate (Goyal et al. 2017, arXiv 1706.02677; BigNAS, Yu et al. 2020, arXiv 2003.11142). Blocks whose
    shortcut is computed, and branches that do not end with a batch normalization (squeeze-and-excitation,
    dropout and stochastic depth may follow it; an activation would hold back its gradient), are left alone.

    Raises:
        ValueError: the network's data flow cannot be followed.
    """
    try:
        graph = _Tracer().trace(network)
    except (fx.proxy.TraceError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"zero_last_norms is on, but the data flow of {type(network).__name__} cannot be followed: "
            f"{error}; set it to false"
        ) from error
    modules = dict(network.named_modules())
    found = {
        id(norm): norm
        for node in graph.nodes
        if (branch := _branch(node)) is not None and (norm := _last_norm(branch, modules)) is not None
    }
    for norm in found.values():
        nn.init.zeros_(norm.weight)
    return len(found)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # timm's norms with an activation are no part of torch.nn
        is_norm = isinstance(m, nn.modules.batchnorm._NormBase)
        return is_norm or super().is_leaf_module(m, module_qualified_name)


def _branch(node: fx.Node) -> fx.Node | None:
    """What `node` adds to a value that it was itself computed from; None where it does no such thing."""
    is_sum = node.target in _SUMS or (node.op == "call_method" and node.target in ("add", "add_"))
    if not is_sum or len(node.all_input_nodes) != 2:
        return None
    left, right = node.all_input_nodes
    if left in _ancestors(right):
        return right
    return left if right in _ancestors(left) else None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _last_norm(node: fx.Node, modules: dict[str, nn.Module]) -> nn.modules.batchnorm._BatchNorm | None:
    """The batch normalization that `node` ends with; None where its scale at 0 would not make it 0."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module if module.affine else None
    sources = node.all_input_nodes
    if isinstance(module, nn.Identity | nn.Dropout) and len(sources) == 1:
        return _last_norm(sources[0], modules)
    if node.target in _PRODUCTS and len(sources) == 2:  # squeeze-and-excitation: a map times its gate
        value, gate = sources
        return _last_norm(value, modules) if value in _ancestors(gate) else None
    return None
