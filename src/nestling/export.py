"""ONNX files: a graph written operator by operator, checked, and refused where it computes something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nestling.file_keys import file_key
from nestling.models.graph import Graph, Operator
from nestling.run import write_atomically

OPSET = 21
IR_VERSION = 10

Logits = NDArray[np.float32]


class ExportMismatch(ValueError):  # noqa: N818 the word says it
    """An ONNX file that does not compute what the network computes; the message gives the figures."""


class Unwritable(ValueError):  # noqa: N818 the word says it
    """A network that no ONNX file can hold, or that no writer covers."""


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A file that was checked against its network.

    Attributes:
        path: the file; it is one file, without external data.
        resolution: side of its images in pixels.
        worst_error: the largest difference from the network's logits, as a fraction of their scale.
    """

    path: Path
    resolution: int
    worst_error: float

    @property
    def key(self) -> str:
        """The SHA-256 of the file's bytes, in hexadecimal."""
        return file_key(self.path)

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        return self.path.stat().st_size


def to_onnx(graph: Graph, *, dynamic_batch: bool = False) -> onnx.ModelProto:
    """`graph` as an ONNX model: one node for each operator, tensors named as in the graph.

    Its opset is 21; where the graph casts to bfloat16, 22, the first in which convolutions have that type.

    It takes `images` (1, 3, R, R), float32, normalised, and gives `logits` (1, classes). A fixed batch lets a
    runtime plan its memory ahead; `dynamic_batch` makes it (N, 3, R, R) and (N, classes).
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    readers = graph.readers()
    types: dict[str, int] = {graph.input: TensorProto.FLOAT}
    for operator in graph.operators:
        operands = list(operator.inputs)
        attributes = dict(operator.attributes)
        type_ = operator.integer("to") if operator.kind == "Cast" else types[operator.inputs[0]]
        types[operator.name] = type_
        if operator.kind == "Pad" and any(reader.kind == "MaxPool" for reader in readers[operator.name]):
            # ONNX Runtime 1.31 folds zeros into the pooling, which then ignores them: so not quite zero.
            attributes.setdefault("value", _LEAST[type_])
        if operator.kind == "Expand":
            operands = [_expanded_shape(operator, nodes, constants, dynamic_batch=dynamic_batch)]
        for role, tensor in (("weight", operator.weight), ("bias", operator.bias)):
            if tensor is not None:
                constants.append(_constant(f"{operator.name}.{role}", _array(tensor)))
                operands.append(constants[-1].name)
        if operator.kind == "Expand":
            operands.reverse()
        for key in _AS_OPERANDS.get(operator.kind, ()):
            if key not in attributes:
                operands.append("")
                continue
            value = np.asarray(attributes.pop(key))
            dtype = helper.tensor_dtype_to_np_dtype(type_) if value.dtype.kind == "f" else np.dtype(np.int64)
            constants.append(_constant(f"{operator.name}.{key}", value.astype(dtype)))
            operands.append(constants[-1].name)
        while not operands[-1]:
            operands.pop()
        node = helper.make_node(operator.kind, operands, [operator.name], name=operator.name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        nodes.append(node)
    batch = "N" if dynamic_batch else 1
    body = helper.make_graph(
        nodes,
        "nestling",
        [_described(graph, graph.input, batch)],
        [_described(graph, graph.output, batch)],
        constants,
    )
    opsets = [helper.make_opsetid("", OPSET + (TensorProto.BFLOAT16 in types.values()))]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="nestling")


def with_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """A copy of `model` that carries `metadata`, in place of its entries of the same names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    merged = {entry.key: entry.value for entry in model.metadata_props} | dict(metadata)
    del copy.metadata_props[:]
    helper.set_model_props(copy, merged)
    return copy


def constant_bytes(path: Path) -> dict[str, int]:
    """Initializer -> the bytes of its numbers, of the file at `path`, which is one of our own."""
    return {constant.name: len(constant.raw_data) for constant in load_onnx(path).graph.initializer}


def load_onnx(path: Path) -> onnx.ModelProto:
    """The model in the file at `path`."""
    return onnx.load(path)


def export_weights(network: nn.Module, path: Path) -> None:
    """Writes `network`'s parameters and buffers to `path` as safetensors, in one step."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state))


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Writes `model` to `path` in one step: whoever reads it sees the old file or the whole new one.

    Raises:
        Unwritable: the model is larger than the 2 GiB that one file can hold.
    """
    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise Unwritable(f"{path}: {model.ByteSize()} bytes; one ONNX file holds less than 2 GiB")
    write_atomically(path, model.SerializeToString(deterministic=True))


def check_logits(expected: Logits, got: Logits, *, tolerance: float, typical: float | None = None) -> float:
    """The largest difference between two sets of logits, as a fraction of the largest magnitude expected.

    `tolerance` bounds it, and `typical`, where it is given, bounds the median difference in the same unit: of
    two ways to compute in few bits, a value between two steps may fall either way and move single logits far.

    Raises:
        ExportMismatch: another shape, a number that is not finite, or a difference beyond a bound.
    """
    if expected.shape != got.shape:
        raise ExportMismatch(f"the file gives logits of shape {got.shape}, the network {expected.shape}")
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        raise ExportMismatch("logits that are not finite; was the network trained to the end?")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    worst = float(np.abs(expected - got).max(initial=0.0)) / scale
    if worst > tolerance:
        raise ExportMismatch(
            f"the file's logits differ from the network's by up to {worst:.2e} of their scale "
            f"(at most {tolerance:.0e} will do)"
        )
    middle = float(np.median(np.abs(expected - got))) / scale
    if typical is not None and middle > typical:
        raise ExportMismatch(
            f"half of the file's logits differ from the network's by {middle:.2e} of their scale or more "
            f"(at most {typical:.0e} will do)"
        )
    return worst


def verify(
    path: Path,
    images: Tensor,
    *,
    expected: Tensor,
    run: Callable[[Path, NDArray[np.float32]], Logits],
    tolerance: float = 1e-4,
    typical: float | None = None,
) -> OnnxModel:
    """The file at `path` as an `OnnxModel`, once the ONNX checker and a comparison of logits have passed.

    Args:
        path: the file.
        images: (N, 3, R, R), normalised; N must be 1 where the file's batch is fixed at 1.
        expected: (N, classes), the network's logits for `images`.
        run: the logits that a runtime computes from the file for `images`.
        tolerance, typical: see `check_logits`.

    Raises:
        ExportMismatch: the file is not a valid model, or computes something else.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportMismatch(f"{path.name} is not a valid ONNX file: {error}") from error
    got = run(path, images.detach().cpu().numpy())
    worst = check_logits(expected.detach().cpu().numpy(), got, tolerance=tolerance, typical=typical)
    return OnnxModel(path, images.shape[-1], worst)


def official_export(network: nn.Module, path: Path, *, resolution: int, dynamic_batch: bool = False) -> None:
    """Writes `network` to `path` by PyTorch's own exporter: for networks that `trace` does not cover.

    Takes seconds, where `to_onnx` takes a fraction of one. Names and shapes of input and output are the same.
    """
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    images = torch.zeros(2 if dynamic_batch else 1, 3, resolution, resolution, device=place)
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("N")},) if dynamic_batch else None,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    save_onnx(program.model_proto, path)


# The least number of each type that padding may have in place of zero.
_LEAST: dict[int, float] = {
    TensorProto.FLOAT: 2.0**-126,
    TensorProto.FLOAT16: 2.0**-24,
    TensorProto.BFLOAT16: 2.0**-126,
}

# What ONNX wants as operands of a node, in this order, though it is fixed when the graph is made. An operand
# that an operator has no attribute for is left out.
_AS_OPERANDS = {
    "Clip": ("min", "max"),
    "Gather": ("indices",),
    "Pad": ("pads", "value"),
    "ReduceL2": ("axes",),
    "ReduceMax": ("axes",),
    "ReduceMean": ("axes",),
    "ReduceSum": ("axes",),
    "Reshape": ("shape",),
    "Resize": ("roi", "scales", "sizes"),
    "Slice": ("starts", "ends", "axes", "steps"),
    "Squeeze": ("axes",),
    "Tile": ("repeats",),
    "Unsqueeze": ("axes",),
}


def _array(tensor: Tensor) -> NDArray[np.generic]:
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))


def _constant(name: str, value: NDArray[np.generic]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)


def _described(graph: Graph, name: str, batch: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *graph.shapes[name][1:]])


def _expanded_shape(
    operator: Operator,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    *,
    dynamic_batch: bool,
) -> str:
    """The name of a tensor with the shape to which `operator`, an Expand, repeats its constant."""
    rest = np.asarray(operator.constant().shape[1:], dtype=np.int64)
    name = f"{operator.name}.shape"
    if not dynamic_batch:
        constants.append(_constant(name, np.concatenate([np.ones(1, dtype=np.int64), rest])))
        return name
    constants.append(_constant(f"{name}.rest", rest))
    nodes.append(helper.make_node("Shape", list(operator.inputs), [f"{name}.batch"], start=0, end=1))
    nodes.append(helper.make_node("Concat", [f"{name}.batch", f"{name}.rest"], [name], axis=0))
    return name
