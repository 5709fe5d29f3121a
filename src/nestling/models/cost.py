"""Cost of a plain network: multiply-accumulates, parameters, activation bytes and their peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Cost:
    """What one image costs.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products.
        params: trainable numbers.
        activation_bytes: bytes written by convolutions and matrix products in 32-bit floats, the quantity
            that Dollár et al. 2021 (arXiv 2103.06877) tie to run time.
        peak_bytes: the most bytes that activations take at once, the input included. A tensor takes memory
            from the operator that writes it to the last one that reads it; an elementwise operator (and
            batch normalization) writes over an input that nobody reads later, as in an inference runtime.
    """

    macs: int
    params: int
    activation_bytes: int
    peak_bytes: int


def cost(network: nn.Module, resolution: int) -> Cost:
    """The cost of one `resolution` x `resolution` colour image through `network`.

    Runs the network on the meta device: nothing is computed, and `network` may be on the meta device itself.
    Its floats count as 32-bit ones, whatever they are.
    """
    training = network.training
    meta = on_meta(network)
    network.eval()
    try:
        with torch.no_grad():
            image = torch.empty(1, 3, resolution, resolution, device="meta")
            with _Recorder(image) as recorder:
                logits = torch.func.functional_call(network, meta, (image,), tie_weights=False)
    finally:
        network.train(training)
    params = sum(p.numel() for p in network.parameters())
    return Cost(recorder.macs, params, recorder.activation_bytes, recorder.peak_bytes(logits))


def on_meta(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of `network` without numbers.

    Those of a layer that has two names are given once: `functional_call` would put its own back in place of
    the layer's, where it is given both. Parameters that two layers share are given to both.
    """
    return {
        f"{prefix}.{name}" if prefix else name: torch.empty_like(
            tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None
        )
        for prefix, module in network.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


@dataclass(frozen=True, slots=True)
class _Event:
    """An operator that ran: the memory it read and wrote, and whether it can write over what it read."""

    reads: tuple[int, ...]
    writes: int
    size: int
    in_place: bool


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators as they run, and notes which memory each reads and writes."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = self.activation_bytes = 0
        self._events = [_Event((), _memory(image), _size(image), in_place=False)]
        # all tensors are kept until the end (on the meta device they are free): memory that is given back
        # could be handed out again under the same address
        self._tensors: list[Tensor] = [image]
        self._activations = {_memory(image)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read = _tensors((*args, *(kwargs or {}).values()))
        if any(t.is_meta for t in read) and not all(t.is_meta for t in read):
            # what the network keeps or makes elsewhere, neither parameter nor buffer, has numbers
            args, kwargs = tree_map(_without_numbers, (args, kwargs))
        # shape and type are known without the meta kernels of these, which take most of the time
        result: Any
        if func in _ACTIVATIONS:
            result = torch.empty_like(args[0])
        elif func in _ACTIVATIONS_IN_PLACE:
            result = args[0]
        elif func in _NORMALIZATION:
            result = (torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0))
        elif func is _aten.convolution.default and not args[6]:
            result = args[0].new_empty(_convolved(*args[:2], *args[3:6]))
        else:
            result = func(*args, **(kwargs or {}))
        written = _tensors(result if isinstance(result, tuple | list) else (result,))
        if written:
            count = _MACS.get(func)
            if count is not None:
                self.macs += count(args, written[0])
                self.activation_bytes += _size(written[0])
            self._note(func, read, written)
        return result

    def _note(self, func: Any, read: list[Tensor], written: list[Tensor]) -> None:
        self._tensors += written
        reads = tuple(m for m in dict.fromkeys(map(_memory, read)) if m in self._activations)
        if reads:  # else it computes with weights alone: that is done once, not for each image
            memory = _memory(written[0])
            in_place = torch.Tag.pointwise in func.tags or func in _NORMALIZATION or func in _ACTIVATIONS
            self._events.append(_Event(reads, memory, _size(written[0]), in_place))
            self._activations.update(map(_memory, written))

    def peak_bytes(self, logits: Tensor) -> int:
        """The most bytes alive at once, where `logits` is what the network gave."""
        last: dict[int, int] = {}
        for time, event in enumerate(self._events):
            last.update(dict.fromkeys((*event.reads, event.writes), time))
        last[_memory(logits)] = len(self._events)
        alive: dict[int, int] = {}
        peak = 0
        for time, event in enumerate(self._events):
            if event.writes not in alive:
                ending = (m for m in event.reads if last[m] == time and alive.get(m) == event.size)
                written_over = next(ending, None) if event.in_place else None
                if written_over is not None:
                    del alive[written_over]
                alive[event.writes] = event.size
            peak = max(peak, sum(alive.values()))
            alive = {memory: size for memory, size in alive.items() if last[memory] > time}
        return peak


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among `values` and in lists among them: an operator reads and writes nothing deeper."""
    flat = (leaf for value in values for leaf in (value if isinstance(value, tuple | list) else (value,)))
    return [leaf for leaf in flat if isinstance(leaf, Tensor)]


def _convolved(
    image: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The shape of what a convolution writes."""
    rank = weight.ndim - 2
    every = (tuple(values) * rank if len(values) == 1 else values for values in (stride, padding, dilation))
    sides = zip(image.shape[-rank:], weight.shape[2:], *every, strict=True)
    written = ((side + 2 * pad - gap * (taps - 1) - 1) // step + 1 for side, taps, step, pad, gap in sides)
    return (*image.shape[: -rank - 1], weight.shape[0], *written)


def _without_numbers(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _convolution(args: tuple[Any, ...], result: Tensor) -> int:
    image, weight, transposed = args[0], args[1], args[6]
    return int((image if transposed else result).numel() * math.prod(weight.shape[1:]))


def _matrix_product(left: int) -> Callable[[tuple[Any, ...], Tensor], int]:
    def count(args: tuple[Any, ...], result: Tensor) -> int:
        return int(result.numel() * args[left].shape[-1])

    return count


def _summed_products(args: tuple[Any, ...], result: Tensor) -> int:
    batch, _, inner = args[1].shape
    return int(result.numel() * batch * inner)


def _bilinear(args: tuple[Any, ...], result: Tensor) -> int:
    return int(result.numel() * math.prod(args[1].shape[1:]))


_MACS: dict[Any, Callable[[tuple[Any, ...], Tensor], int]] = {
    _aten.convolution.default: _convolution,
    _aten.addmm.default: _matrix_product(1),
    _aten.mm.default: _matrix_product(0),
    _aten.bmm.default: _matrix_product(0),
    _aten.baddbmm.default: _matrix_product(1),
    _aten.addbmm.default: _summed_products,
    _aten.mv.default: _matrix_product(0),
    _aten.addmv.default: _matrix_product(1),
    _aten.dot.default: _matrix_product(0),
    _aten._trilinear.default: _bilinear,
}

_NORMALIZATION = {
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit_no_training.default,
    _aten.cudnn_batch_norm.default,
}
_ACTIVATIONS = {
    _aten.relu.default,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten.hardtanh.default,
    _aten.silu.default,
    _aten.sigmoid.default,
    _aten.gelu.default,
}
_ACTIVATIONS_IN_PLACE = {
    _aten.relu_.default,
    _aten.hardswish_.default,
    _aten.hardsigmoid_.default,
    _aten.hardtanh_.default,
    _aten.silu_.default,
    _aten.sigmoid_.default,
}
