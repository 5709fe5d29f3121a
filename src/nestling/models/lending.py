"""How a large network lends its weights to a smaller one: pure functions over names and shapes.

A smaller network's tensor is the leading channels, and the centre of the kernel, of the large network's
tensor of the same name (once-for-all, Cai et al. 2020, arXiv 1908.09791; BigNAS, Yu et al. 2020,
arXiv 2003.11142). A lent tensor is a view: gradients flow back into the large network.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class LendingError(ValueError):
    """A tensor that cannot be lent; the message names it and both shapes."""


def cut(tensor: Tensor, shape: tuple[int, ...], *, name: str) -> Tensor:
    """The part of `tensor` that a network of `shape` uses: leading channels, the centre of kernels; a view.

    Raises:
        LendingError: `shape` has other axes than `tensor`, or is larger.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.ndim != len(shape) or any(
        small > large for small, large in zip(shape, tensor.shape, strict=True)
    ):
        raise LendingError(
            f"{name}: the large network's shape {tuple(tensor.shape)} cannot be cut to {tuple(shape)}; "
            "a subnet may be no larger than the largest network in any axis"
        )
    for axis, (small, large) in enumerate(zip(shape, tensor.shape, strict=True)):
        if small < large:
            is_kernel = tensor.ndim == 4 and axis >= 2
            tensor = tensor.narrow(axis, (large - small) // 2 if is_kernel else 0, small)
    return tensor


def lend(large: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`large`'s parameters, each cut to the shape of `small`'s parameter of the same name.

    Raises:
        LendingError: `small` has a parameter that the large network lacks, or a larger one.
    """
    return {name: cut(_find(large, name), tuple(p.shape), name=name) for name, p in small.items()}


def lend_buffers(large: Mapping[str, Tensor], borrower: nn.Module) -> dict[str, Tensor]:
    """`large`'s buffers for `borrower`: statistics of normalization cut to shape, everything else whole.

    A table of indices (relative positions, say) has no leading part that means the same for a smaller
    network: it is lent only where the shapes agree.

    Raises:
        LendingError: a buffer is missing, or one that is not a normalization's statistics has another shape.
    """
    statistics = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in borrower.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }
    lent = {}
    for name, buffer in borrower.named_buffers():
        tensor, shape = _find(large, name), tuple(buffer.shape)
        if name not in statistics and tuple(tensor.shape) != shape:
            raise LendingError(
                f"{name}: this buffer would change from {tuple(tensor.shape)} to {shape}; a table of indices "
                "cannot be cut, so the choice that changes it must stay constant"
            )
        lent[name] = cut(tensor, shape, name=name)
    return lent


def _find(large: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return large[name]
    except KeyError:
        raise LendingError(f"{name}: the largest network has no such tensor to lend") from None
