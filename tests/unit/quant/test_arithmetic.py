"""Every rule of `nestling.quant.arithmetic` against ONNX Runtime: no integer may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from nestling.models.operators import Attribute, Operator
from nestling.quant import Range, insert_qdq
from nestling.quant.arithmetic import EXACT, exact_sums, integer_rule


def range_of(scale: float, zero_point: int = 0, dtype: str = "uint8") -> Range:
    return Range(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), dtype, None)


def steps_of(found: Range, *shape: int, seed: int = 0) -> Tensor:
    """Random steps of `found`, its ends among them."""
    low, high = found.limits
    integers = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))
    integers.flatten()[:2] = torch.tensor([low, high])
    return integers.float() - found.zero_point


def by_runtime(
    operator: Operator, ranges: Mapping[str, Range], steps: Mapping[str, Tensor], kinds: set[str], path: Path
) -> Tensor:
    """What ONNX Runtime computes, as floats, in no operators but `kinds`."""
    numbers = {name: ranges[name].numbers(tensor) for name, tensor in steps.items()}
    constants = {
        f"{operator.name}.{role}": tensor
        for role, tensor in (("weight", operator.weight), ("bias", operator.bias))
        if tensor is not None
    }
    node = helper.make_node(operator.kind, [*operator.inputs, *constants], [operator.name], operator.name)
    node.attribute.extend(helper.make_attribute(*item) for item in operator.attributes.items())
    last = helper.make_node("Identity", [operator.name], ["result"])
    model = helper.make_model(
        helper.make_graph(
            [node, last],
            "one",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, tensor.shape)
                for name, tensor in numbers.items()
            ],
            [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(path / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        insert_qdq(model, ranges).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    used = {node.op_type for node in onnx.load(path / "optimized.onnx").graph.node}
    assert used <= {"QuantizeLinear", "DequantizeLinear", "Transpose", "Squeeze", "Identity"} | kinds
    assert used & kinds
    [got] = session.run(None, {name: tensor.numpy() for name, tensor in numbers.items()})
    return torch.from_numpy(np.asarray(got))


def assert_exact(
    operator: Operator, ranges: Mapping[str, Range], steps: Mapping[str, Tensor], kinds: set[str], path: Path
) -> None:
    written = ranges.get(operator.name)
    rule = integer_rule(operator, ranges, written)
    assert rule is not None
    before = {name: tensor.clone() for name, tensor in steps.items()}
    result = rule(*(steps[name] for name in operator.inputs))
    assert all(torch.equal(steps[name], before[name]) for name in steps)  # it changes nothing in place
    if written is not None:
        assert len(torch.bincount((result - result.min()).flatten().int()).nonzero()) > 20
        result = written.numbers(result)
    got = by_runtime(operator, ranges, steps, kinds, path)
    assert int((got != result).sum()) == 0


SCALES = [(0.031, 0.017, 0.029), (0.5, 0.25, 0.5), (0.004, 0.3, 0.2), (0.07, 0.07, 0.14), (0.11, 0.013, 0.1)]
ZEROS = [("uint8", (0, 0, 0)), ("uint8", (3, 130, 77)), ("int8", (-128, 5, -3))]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("dtype", "zeros"), ZEROS)
@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_sums_and_products_of_every_pair_of_bytes(
    kind: str, dtype: str, zeros: tuple[int, int, int], scales: tuple[float, float, float], tmp_path: Path
) -> None:
    spread = 1.0 if kind == "Add" else scales[1] * 40
    read = [range_of(scale, zero, dtype) for scale, zero in zip(scales[:2], zeros[:2], strict=True)]
    written = range_of(scales[2] * spread, zeros[2], dtype)
    low, high = written.limits
    every = torch.arange(low, high + 1).float()
    steps = {
        "a": every.repeat_interleave(256) - read[0].zero_point,
        "b": every.repeat(256) - read[1].zero_point,
    }
    ranges = {"a": read[0], "b": read[1], "y": written}
    assert_exact(Operator(kind, "y", ("a", "b"), ""), ranges, steps, {f"QLinear{kind}"}, tmp_path)


def test_a_product_of_maps_with_a_number_for_each_channel(tmp_path: Path) -> None:
    ranges = {"a": range_of(0.03, 12), "b": range_of(1 / 255), "y": range_of(0.021, 9)}
    steps = {"a": steps_of(ranges["a"], 2, 7, 9, 9), "b": steps_of(ranges["b"], 2, 7, 1, 1)}
    assert_exact(Operator("Mul", "y", ("a", "b"), ""), ranges, steps, {"QLinearMul"}, tmp_path)


@pytest.mark.parametrize("scale", [0.01, 1 / 32, 0.0625, 0.3])
@pytest.mark.parametrize(("dtype", "zero", "out"), [("uint8", 128, 0), ("uint8", 31, 0), ("int8", 3, -128)])
def test_gates_of_every_byte(scale: float, dtype: str, zero: int, out: int, tmp_path: Path) -> None:
    ranges = {"a": range_of(scale, zero, dtype), "y": range_of(1 / 255, out, dtype)}
    low, high = ranges["a"].limits
    steps = {"a": torch.arange(low, high + 1).float() - zero}
    gate = Operator("HardSigmoid", "y", ("a",), "", {"alpha": 1 / 6, "beta": 0.5})
    assert_exact(gate, ranges, steps, {"QLinearAdd"}, tmp_path)


def layer(
    operator: Operator, *, read: Range, written: Range | None, weight_scale: Tensor, axis: int | None
) -> tuple[Operator, dict[str, Range]]:
    """`operator` with weights and a bias of whole numbers, and the ranges of all that it meets."""
    zeros = torch.zeros(weight_scale.shape, dtype=torch.int32)
    shape = [-1 if found == axis else 1 for found in range(operator.constant().ndim)]
    floats = operator.constant() * weight_scale.reshape(shape if axis is not None else ())
    ranges = {"a": read, "y.weight": Range(weight_scale, zeros, "int8", axis)}
    bias = operator.bias
    if bias is not None:
        scale = read.scale * weight_scale
        ranges["y.bias"] = Range(scale, zeros, "int32", None if axis is None else 0)
        bias = bias * scale
    if written is not None:
        ranges["y"] = written
    return replace(operator, weight=floats, bias=bias), ranges


def whole(*shape: int, most: int, seed: int = 0) -> Tensor:
    """Random whole numbers, as many above zero as below; 7 bits are exact on every CPU."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "group", "stride", "pad"),
    [
        (8, 16, 1, 1, 1, 0),
        (3, 8, 3, 1, 2, 1),
        (16, 16, 3, 16, 1, 1),
        (8, 8, 3, 2, 1, 0),
        (12, 12, 5, 12, 2, 2),
    ],
)
def test_convolutions(
    channels: int,
    out: int,
    kernel: int,
    group: int,
    stride: int,
    pad: int,
    per_channel: bool,
    dtype: str,
    tmp_path: Path,
) -> None:
    attributes: dict[str, Attribute] = {
        "pads": (pad,) * 4, "strides": (stride,) * 2, "dilations": (1, 1), "group": group,
        "kernel_shape": (kernel, kernel),
    }  # fmt: skip
    weight = whole(out, channels // group, kernel, kernel, most=63)
    bias = whole(out, most=9999)
    # Powers of two make ties; between two powers, no product of scales is one.
    scale = torch.exp2(-torch.arange(out) % 3 - 7.0) if per_channel else torch.tensor(0.0123)
    written = range_of(0.25 if per_channel else 0.31, 100 if dtype == "uint8" else -7, dtype)
    read = range_of(0.03125 if per_channel else 0.0417, 120 if dtype == "uint8" else 1, dtype)
    operator, ranges = layer(
        Operator("Conv", "y", ("a",), "", attributes, weight, bias),
        read=read,
        written=written,
        weight_scale=scale,
        axis=0 if per_channel else None,
    )
    steps = {"a": steps_of(read, 2, channels, 9, 9)}
    assert_exact(operator, ranges, steps, {"QLinearConv"}, tmp_path)


@pytest.mark.parametrize("written", [None, range_of(0.5, 41), range_of(0.613, 0)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
def test_linear_layers(kind: str, per_channel: bool, written: Range | None, tmp_path: Path) -> None:
    scale = torch.exp2(-torch.arange(24) % 3 - 7.0) if per_channel else torch.tensor(0.0123)
    read = range_of(0.0625 if per_channel else 0.0417, 120)
    attributes: dict[str, Attribute] = {"transB": 1} if kind == "Gemm" else {}
    weight = whole(24, 40, most=63) if kind == "Gemm" else whole(40, 24, most=63)
    bias = whole(24, most=9999) if kind == "Gemm" else None
    axis = (0 if kind == "Gemm" else 1) if per_channel else None
    operator = Operator(kind, "y", ("a",), "", attributes, weight, bias)
    operator, ranges = layer(operator, read=read, written=written, weight_scale=scale, axis=axis)
    kinds = {"QGemm"} if kind == "Gemm" else {"QLinearMatMul", "MatMulIntegerToFloat"}
    assert_exact(operator, ranges, {"a": steps_of(read, 50, 40)}, kinds, tmp_path)


@pytest.mark.parametrize("inner", [17, 300])
@pytest.mark.parametrize("written", [None, range_of(0.25, 101), range_of(0.31, 101)])
def test_products_of_two_matrices(inner: int, written: Range | None, tmp_path: Path) -> None:
    ranges = {"a": range_of(0.0125, 120), "b": range_of(0.02, 101)}
    if written is not None:
        ranges["y"] = written
    steps = {"a": steps_of(ranges["a"], 2, 3, 20, inner), "b": steps_of(ranges["b"], 2, 3, inner, 16, seed=1)}
    kinds = {"QLinearMatMul", "MatMulIntegerToFloat"}
    assert_exact(Operator("MatMul", "y", ("a", "b"), ""), ranges, steps, kinds, tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("side", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.1, 0.0731])
def test_means_of_maps(scale: float, side: int, dtype: str, tmp_path: Path) -> None:
    ranges = {"a": range_of(0.1, 3, dtype), "y": range_of(scale, 5, dtype)}
    steps = {"a": steps_of(ranges["a"], 8, 40, side, side)}
    mean = Operator("GlobalAveragePool", "y", ("a",), "")
    assert_exact(mean, ranges, steps, {"QLinearGlobalAveragePool"}, tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("kernel", "pad", "counted"), [(2, 0, 0), (3, 1, 0), (3, 1, 1)])
@pytest.mark.parametrize("scale", [0.1, 0.0731])
def test_means_of_windows(
    scale: float, kernel: int, pad: int, counted: int, dtype: str, tmp_path: Path
) -> None:
    ranges = {"a": range_of(0.1, 3, dtype), "y": range_of(scale, 5, dtype)}
    attributes: dict[str, Attribute] = {
        "kernel_shape": (kernel, kernel), "strides": (2, 2), "pads": (pad,) * 4, "ceil_mode": 0,
        "count_include_pad": counted,
    }  # fmt: skip
    operator = Operator("AveragePool", "y", ("a",), "", attributes)
    steps = {"a": steps_of(ranges["a"], 4, 20, 8, 8)}
    assert_exact(operator, ranges, steps, {"QLinearAveragePool"}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "weight", "bias", "steps", "group"),
    [
        ("Conv", (4, 4096, 1, 1), 9, (1, 4096, 2, 2), 1),
        ("Conv", (2, 3000, 1, 1), 2**29 + 1, (1, 6000, 2, 2), 2),
        ("Gemm", (4, 5001), 2**29 + 1, (3, 5001), 1),
        ("MatMul", (4096, 4), 0, (2, 3, 4096), 1),
    ],
)
def test_sums_beyond_what_float32_holds_are_rounded_once(
    kind: str, weight: tuple[int, ...], bias: int, steps: tuple[int, ...], group: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(20, 64, weight, generator=generator).float()
    read = torch.randint(0, 256, steps, generator=generator).float()
    attributes: dict[str, Attribute] = {
        "pads": (0,) * 4,
        "strides": (1, 1),
        "dilations": (1, 1),
        "group": group,
    }
    constant = torch.full((weight[0],), float(bias), dtype=torch.float64) if bias else None
    operator = Operator(kind, "y", ("a",), "", attributes if kind == "Conv" else {}, numbers, constant)
    got = exact_sums(operator, range_of(1.0))(read)
    if kind == "Conv":
        pairs = zip(numbers.double().chunk(group), read.double().chunk(group, 1), strict=True)
        sums = [torch.einsum("ocij,nchw->nohw", kernel, part) for kernel, part in pairs]
        expected = torch.cat(sums, 1) + bias
    else:
        expected = read.double() @ (numbers.double().T if kind == "Gemm" else numbers.double()) + bias
    assert got.dtype == torch.float32
    assert float(expected.max()) > EXACT
    assert torch.equal(got, expected.float())


def tied_scales() -> tuple[Tensor, Tensor, Tensor]:
    """Scales of two operands and of their product: `a * b / y` is 1/16, and just less in any other order."""
    a, b = torch.tensor(0.0125), torch.tensor(0.0212)
    y = a * b * 16
    assert a * b / y == 0.0625
    assert max(a * (b / y), a / y * b) < 0.0625
    return a, b, y


@pytest.mark.parametrize("kind", ["Mul", "MatMul", "Conv", "Gemm"])
def test_scales_are_multiplied_from_left_to_right(kind: str, tmp_path: Path) -> None:
    a, b, y = (float(scale) for scale in tied_scales())
    ranges = {"a": range_of(a, 100), "b": range_of(b, 90), "y": range_of(y, 40)}
    if kind in ("Mul", "MatMul"):
        operator = Operator(kind, "y", ("a", "b"), "")
        steps = {"a": steps_of(ranges["a"], 90, 90), "b": steps_of(ranges["b"], 90, 90, seed=1)}
        assert_exact(operator, ranges, steps, {f"QLinear{kind}"}, tmp_path)
        return
    attributes: dict[str, Attribute] = {"transB": 1}
    if kind == "Conv":
        attributes = {"pads": (0,) * 4, "strides": (1, 1), "dilations": (1, 1), "group": 1}
    shape = (64, 3, 1, 1) if kind == "Conv" else (64, 3)
    operator, found = layer(
        Operator(kind, "y", ("a",), "", attributes, whole(*shape, most=31)),
        read=ranges["a"], written=ranges["y"], weight_scale=torch.tensor(b), axis=None,
    )  # fmt: skip
    steps = {"a": steps_of(ranges["a"], 60, 3, 9, 9) if kind == "Conv" else steps_of(ranges["a"], 900, 3)}
    kinds = {"QLinearConv", "QGemm"}
    assert_exact(operator, found, steps, kinds, tmp_path)


def test_a_mean_is_scaled_by_one_quotient(tmp_path: Path) -> None:
    """Of the sums of 9 bytes, 18 would give another integer if scale and count were divided by in turn."""
    ranges = {"a": range_of(0.1869, 3), "y": range_of(0.1602, 5)}
    sums = torch.arange(9 * 255 + 1)
    maps = sums[:, None].add(torch.arange(9)).div(9, rounding_mode="floor")  # nine bytes of this sum
    steps = {"a": maps.reshape(1, -1, 3, 3).float() - 3}
    mean = Operator("GlobalAveragePool", "y", ("a",), "")
    assert_exact(mean, ranges, steps, {"QLinearGlobalAveragePool"}, tmp_path)


@pytest.mark.parametrize("missing", ["a", "y", "y.weight", "y.bias"])
def test_a_layer_of_which_a_part_is_floats_has_no_rule(missing: str) -> None:
    attributes: dict[str, Attribute] = {"pads": (0,) * 4, "strides": (1, 1), "dilations": (1, 1), "group": 1}
    operator = Operator("Conv", "y", ("a",), "", attributes, whole(2, 3, 1, 1, most=9), whole(2, most=9))
    operator, ranges = layer(
        operator, read=range_of(0.1), written=range_of(0.1), weight_scale=torch.tensor(0.1), axis=None
    )
    assert integer_rule(operator, ranges, ranges["y"]) is not None
    left = {name: found for name, found in ranges.items() if name != missing}
    assert integer_rule(operator, left, left.get("y")) is None


def test_signed_and_unsigned_bytes_have_no_rule() -> None:
    ranges = {"a": range_of(0.1), "b": range_of(0.1, dtype="int8"), "y": range_of(0.2)}
    assert integer_rule(Operator("Add", "y", ("a", "b"), ""), ranges, ranges["y"]) is None
    assert integer_rule(Operator("Add", "y", ("a", "a"), ""), ranges, ranges["y"]) is not None
