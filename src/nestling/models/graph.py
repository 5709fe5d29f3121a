"""A network as a small graph of operators: this one graph is run, written to ONNX, observed and quantized."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nestling.models.operators import Operator, compute
from nestling.models.tracing import QUERIES, TRANSLATIONS, Recorder, Untraceable

__all__ = ["Graph", "Operator", "Untraceable", "trace"]

INPUT = "images"
OUTPUT = "logits"
_AGREES_WITHIN = 1e-3
_IN_PLACE = {
    "Abs", "Add", "Clip", "Div", "Elu", "Exp", "Flatten", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu",
    "Log", "Mul", "PRelu", "Pow", "Reciprocal", "Relu", "Reshape", "Sigmoid", "Softplus", "Sqrt", "Squeeze",
    "Sub", "Tanh", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A network's operators in the order in which they run.

    Attributes:
        operators: each reads tensors that the input or an earlier operator wrote.
        input: name of the images, (N, 3, resolution, resolution), normalised.
        output: name of the logits, (N, classes).
        shapes: the shape of every tensor for one image.
        resolution: side of the images in pixels. The graph holds for this resolution only.
    """

    operators: tuple[Operator, ...]
    input: str
    output: str
    shapes: Mapping[str, tuple[int, ...]]
    resolution: int

    def run(self, images: Tensor, *, after: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        """The logits of `images` (N, 3, resolution, resolution).

        A tensor is let go as soon as its last reader has run.

        Args:
            images: on the device of the weights. Of a part of a network, what that part reads.
            after: is given every tensor with its name, the images first, and returns what to go on with.

        Raises:
            ValueError: images of another shape.
        """
        reads = self.shapes[self.input][1:]
        if tuple(images.shape[1:]) != reads:
            wanted = f"(N, {', '.join(map(str, reads))})"
            raise ValueError(f"this graph takes images {wanted}, not {tuple(images.shape)}")
        return _run(self.operators, images, source=self.input, output=self.output, after=after)

    def macs(self, operator: Operator) -> int:
        """The multiply-accumulates of `operator`, one of this graph's, for one image; 0 where it has none."""
        written = math.prod(self.shapes[operator.name])
        if operator.kind == "MatMul":
            return written * self.shapes[operator.inputs[0]][-1]
        if operator.weight is None or operator.kind not in ("Conv", "Gemm", "ConvTranspose"):
            return 0
        read = math.prod(self.shapes[operator.inputs[0]])
        return (read if operator.kind == "ConvTranspose" else written) * operator.weight[0].numel()

    def readers(self) -> dict[str, list[Operator]]:
        """Tensor name -> the operators that read it, in order."""
        found: dict[str, list[Operator]] = {name: [] for name in self.shapes}
        for operator in self.operators:
            for name in dict.fromkeys(operator.inputs):
                found[name].append(operator)
        return found

    def peak_bytes(self, *, bytes_per_number: Mapping[str, int] | None = None) -> int:
        """The most bytes that the tensors of one image take at once, as an inference runtime keeps them.

        A tensor lives from the operator that writes it to its last reader; an operator that changes each
        number by itself writes over what it reads where nobody reads that later.

        Args:
            bytes_per_number: for tensors that are not 32-bit floats.
        """
        widths = bytes_per_number or {}
        size = {name: math.prod(shape) * widths.get(name, 4) for name, shape in self.shapes.items()}
        waiting = {name: len(readers) for name, readers in self.readers().items()}
        live = peak = size[self.input]
        for operator in self.operators:
            done = []
            for name in dict.fromkeys(operator.inputs):
                waiting[name] -= 1
                if not waiting[name] and name != self.output:
                    done.append(name)
            over = operator.kind in _IN_PLACE and any(size[name] == size[operator.name] for name in done)
            peak = max(peak, live if over else live + size[operator.name])
            live += size[operator.name] - sum(size[name] for name in done)
        return peak

    def to(self, device: torch.device | str) -> Graph:
        """This graph with its weights on `device`."""
        moved = tuple(
            replace(
                operator,
                weight=None if operator.weight is None else operator.weight.to(device),
                bias=None if operator.bias is None else operator.bias.to(device),
            )
            for operator in self.operators
        )
        return replace(self, operators=moved)


@torch.no_grad()
def trace(network: nn.Module, *, resolution: int, image: Tensor | None = None) -> Graph:
    """The graph of `network` for images of `resolution` pixels a side.

    The network is run once on one image while its calls into PyTorch are recorded. Then batch
    normalization is folded into the convolution or linear layer before it (elsewhere it is a scale and a
    shift for each channel) and padding into the convolution after it; kernels lose the taps that can only
    meet padding; dropout, stochastic depth and identities vanish. The graph is run on the same image beside
    another one, and must give the same logits. Of a network on the meta device, which has no numbers,
    the graph has shapes alone and nothing is compared: it is for what is counted, not for a file.

    Args:
        network: in evaluation mode.
        resolution: side of its images in pixels.
        image: (1, 3, R, R), one that the network was made for: of other images a deep network may give
            numbers so large that two ways to compute them part. A random one where it is not given.

    Raises:
        ValueError: the network is in training mode, or the image has another shape.
        Untraceable: an operation without a translation, or a graph that computes something else.
    """
    if network.training:
        raise ValueError("only a network in eval mode can be traced; call .eval() first")
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    shape = (1, 3, resolution, resolution)
    if image is None:
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if image.shape != shape:
        raise ValueError(f"the image has shape {tuple(image.shape)}; it must be {shape}")
    image = image.to(place)
    recorder = Recorder(TRANSLATIONS, queries=QUERIES)
    given = image.clone()  # the network may change it in place
    recorder.bind(given, INPUT)
    hooks = [
        hook
        for name, module in network.named_modules()
        for hook in (
            module.register_forward_pre_hook(lambda _, __, name=name: recorder.layers.append(name)),
            module.register_forward_hook(lambda _, __, ___: _leave(recorder)),
        )
    ]
    try:
        with recorder:
            logits = network(given)
    finally:
        for hook in hooks:
            hook.remove()
    output = recorder.name(logits)
    if output is None or output == INPUT:
        raise Untraceable(f"{type(network).__name__} must return one tensor that it computed from its images")

    operators = _fold(_reaching(recorder.operators, output), output)
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        shapes[name] = tuple(tensor.shape)
        return tensor

    def run(images: Tensor) -> Tensor:
        return _run(operators, images, source=INPUT, output=OUTPUT, after=note)

    if image.is_meta:
        run(image)
        return Graph(tuple(operators), INPUT, OUTPUT, shapes, resolution)
    try:
        pair = run(torch.cat((image, image.flip(-1))))
    except RuntimeError as error:
        _refuse_other_logits(network, logits, run(image), "something else")
        raise Untraceable(f"the graph of {type(network).__name__} is for one image only ({error})") from error
    try:
        _refuse_other_logits(
            network, logits, pair[: len(logits)], "something else when there is a second image"
        )
    except Untraceable:
        _refuse_other_logits(network, logits, run(image), "something else")
        raise
    axes = {name: recorder.images_axis(output if name == OUTPUT else name) for name in shapes}
    halves = {name: _halved(shape, axes[name]) for name, shape in shapes.items()}
    return Graph(tuple(operators), INPUT, OUTPUT, halves, resolution)


def _halved(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape for one image of what has `shape` for two, which are counted along `axis`."""
    return (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])


def _refuse_other_logits(network: nn.Module, wanted: Tensor, got: Tensor, what: str) -> None:
    limit = _AGREES_WITHIN * float(wanted.nan_to_num().abs().max())
    if wanted.shape != got.shape:
        raise Untraceable(
            f"the graph of {type(network).__name__} computes {what} "
            f"(logits of shape {tuple(got.shape)}, not {tuple(wanted.shape)})"
        )
    if not torch.allclose(got, wanted, rtol=0, atol=limit, equal_nan=True):
        worst = float((got - wanted).abs().max())
        raise Untraceable(
            f"the graph of {type(network).__name__} computes {what} (logits differ by {worst:.3g})"
        )


def _leave(recorder: Recorder) -> None:
    recorder.layers.pop()


def _run(
    operators: Sequence[Operator],
    images: Tensor,
    *,
    source: str,
    output: str,
    after: Callable[[str, Tensor], Tensor] | None,
) -> Tensor:
    unread = Counter(name for operator in operators for name in operator.inputs)
    unread[output] += 1
    if images.ndim == 4:  # depthwise and 1x1 convolutions take a third of the time on a CPU
        images = images.contiguous(memory_format=torch.channels_last)
    tensors = {source: after(source, images) if after else images}
    for operator in operators:
        result = compute(operator, *(tensors[name] for name in operator.inputs))
        for name in operator.inputs:
            unread[name] -= 1
            if not unread[name]:
                del tensors[name]
        tensors[operator.name] = after(operator.name, result) if after else result
    return tensors[output]


def _reaching(operators: Sequence[Operator], output: str) -> list[Operator]:
    wanted, kept = {output}, []
    for operator in reversed(operators):
        if operator.name in wanted:
            wanted.update(operator.inputs)
            kept.append(operator)
    return kept[::-1]


def _fold(operators: Sequence[Operator], output: str) -> list[Operator]:
    """`operators` with scales, shifts and padding folded into neighbours; the last one writes `OUTPUT`."""
    reads = Counter(name for operator in operators for name in operator.inputs)
    reads[output] += 1
    done: dict[str, Operator] = {}
    now_called: dict[str, str] = {}
    for operator in operators:
        operator = replace(operator, inputs=tuple(now_called.get(name, name) for name in operator.inputs))
        before = done.get(operator.inputs[0])
        if before is not None and reads[operator.inputs[0]] == 1:
            merged = _merge(before, operator)
            if merged is not None:
                del done[before.name]
                done[merged.name] = merged
                now_called[operator.name] = merged.name
                reads[merged.name] = reads[operator.name]
                continue
        done[operator.name] = operator
    now_called[now_called.get(output, output)] = OUTPUT
    return [
        replace(
            operator,
            name=OUTPUT if now_called.get(operator.name) == OUTPUT else operator.name,
            inputs=tuple(OUTPUT if now_called.get(name) == OUTPUT else name for name in operator.inputs),
        )
        for operator in done.values()
    ]


def _merge(before: Operator, operator: Operator) -> Operator | None:
    """One operator that does what `before` and then `operator` do, or None."""
    if operator.kind == "Conv" and before.kind == "Pad":
        more = before.integers("pads")
        half = len(more) // 2
        sides = (*more[:2], *more[half : half + 2])
        if any(sides) or "mode" in before.attributes or "value" in before.attributes:
            return None
        more = (*more[2:half], *more[half + 2 :])
        pads = tuple(a + b for a, b in zip(operator.integers("pads"), more, strict=True))
        return replace(operator, inputs=before.inputs, attributes={**operator.attributes, "pads": pads})
    if operator.kind not in ("Mul", "Add") or operator.weight is None or before.kind not in ("Conv", "Gemm"):
        return None
    weight = before.constant()
    channels = weight.shape[0]
    per_channel = _per_channel(operator.weight, channels, axes_after=weight.ndim - 2)
    if per_channel is None:
        return None
    if operator.kind == "Add":
        return replace(before, bias=per_channel if before.bias is None else before.bias + per_channel)
    scaled = weight * per_channel.reshape(-1, *(1 for _ in range(weight.ndim - 1)))
    return replace(before, weight=scaled, bias=None if before.bias is None else before.bias * per_channel)


def _per_channel(constant: Tensor, channels: int, *, axes_after: int) -> Tensor | None:
    if constant.ndim > axes_after + 2:
        return None  # what it gives has more axes
    if constant.numel() == 1:
        return constant.reshape(1).expand(channels)
    aligned = constant.shape[-1 - axes_after :] == (channels, *(1 for _ in range(axes_after)))
    return constant.reshape(channels) if aligned and constant.numel() == channels else None
