from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nestling.profile import DeviceError, connect, parse_address
from nestling.profile.reference import reference_model
from nestling.profile.torch_runtime import OPERATORS, SETTINGS, ForeignRuntime

Array = NDArray[Any]
RNG = np.random.default_rng(0)


class Refused(Exception):  # noqa: N818 - it stands for the worker's
    pass


def runtime(dtype: str = "f32") -> ForeignRuntime:
    return ForeignRuntime(1, {"target": "cpu", "dtype": dtype}, refusal=Refused)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def whole(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def one_node(
    op: str, x: Array, *constants: Array | None, opset: int = 21, outputs: int = 1, **attributes: Any
) -> bytes:
    """A file of one node that reads the input `x` and constants; None leaves an operand out."""
    names = [f"c{number}" if constant is not None else "" for number, constant in enumerate(constants)]
    kinds = helper.np_dtype_to_tensor_dtype(x.dtype)
    made = [f"y{number}" for number in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], made, name="node", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", kinds, x.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made],
        [
            numpy_helper.from_array(constant, name)
            for name, constant in zip(names, constants, strict=True)
            if constant is not None
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return bytes(model.SerializeToString())


IMAGES = normal(1, 4, 9, 9)
CASES: list[tuple[str, Array, tuple[Any, ...], Mapping[str, Any]]] = [
    ("Abs", IMAGES, (), {}),
    ("Add", IMAGES, (normal(1, 4, 1, 1),), {}),
    ("AveragePool", IMAGES, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", IMAGES, (), {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}),
    ("BatchNormalization", IMAGES, (normal(4), normal(4), normal(4), np.abs(normal(4))), {}),
    ("Clip", IMAGES, (np.float32(0), np.float32(6)), {}),
    ("Clip", IMAGES, (None, np.float32(0.5)), {}),
    ("Concat", IMAGES, (normal(1, 2, 9, 9),), {"axis": 1}),
    ("Conv", IMAGES, (normal(6, 4, 3, 3), normal(6)), {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", IMAGES, (normal(4, 1, 3, 3),), {"group": 4, "pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    ("Div", IMAGES, (np.float32(3),), {}),
    ("Elu", IMAGES, (), {"alpha": 0.7}),
    ("Erf", IMAGES, (), {}),
    ("Exp", IMAGES, (), {}),
    ("Expand", normal(1, 4, 1), (whole(2, 4, 3),), {}),
    ("Flatten", IMAGES, (), {"axis": 2}),
    ("Gather", IMAGES, (whole(2, -1),), {"axis": 1}),
    ("Gather", IMAGES, (np.array(1),), {"axis": 2}),
    ("Gelu", IMAGES, (), {"approximate": "tanh"}),
    ("Gemm", normal(2, 5), (normal(7, 5), normal(7)), {"transB": 1}),
    ("Gemm", normal(5, 2), (normal(5, 7), normal(2, 7)), {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("GlobalAveragePool", IMAGES, (), {}),
    ("HardSigmoid", IMAGES, (), {"alpha": 1 / 6, "beta": 0.5}),
    ("HardSwish", IMAGES, (), {}),
    ("Identity", IMAGES, (), {}),
    ("InstanceNormalization", IMAGES, (normal(4), normal(4)), {}),
    ("LayerNormalization", normal(2, 3, 8), (normal(8), normal(8)), {"axis": -1, "epsilon": 1e-6}),
    ("LeakyRelu", IMAGES, (), {"alpha": 0.2}),
    ("Log", np.abs(IMAGES) + 1, (), {}),
    ("MatMul", normal(2, 3, 4), (normal(4, 5),), {}),
    ("MaxPool", IMAGES, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Mul", IMAGES, (normal(9),), {}),
    ("Neg", IMAGES, (), {}),
    ("PRelu", IMAGES, (normal(4, 1, 1),), {}),
    ("Pad", IMAGES, (whole(0, 0, 1, 2, 0, 0, 2, 1), np.float32(0.5)), {}),
    ("Pad", IMAGES, (whole(0, 0, 1, 2, 0, 0, 2, 1),), {"mode": "reflect"}),
    ("Pow", np.abs(IMAGES), (np.float32(1.5),), {}),
    ("Reciprocal", np.abs(IMAGES) + 1, (), {}),
    ("ReduceMax", IMAGES, (whole(2, 3),), {"keepdims": 0}),
    ("ReduceMean", IMAGES, (whole(-1),), {}),
    ("ReduceSum", IMAGES, (whole(1),), {}),
    ("Relu", IMAGES, (), {}),
    ("Reshape", IMAGES, (whole(0, 2, -1),), {}),
    ("Sigmoid", IMAGES, (), {}),
    ("Slice", IMAGES, (whole(1, 0), whole(-1, 2**31), whole(2, 3), whole(1, 2)), {}),
    ("Softmax", IMAGES, (), {"axis": 1}),
    ("Softplus", IMAGES, (), {}),
    ("Split", IMAGES, (whole(1, 3),), {"axis": 1, "outputs": 2}),
    ("Split", IMAGES, (), {"axis": 3, "num_outputs": 2, "outputs": 2}),
    ("Sqrt", np.abs(IMAGES), (), {}),
    ("Squeeze", IMAGES, (whole(0),), {}),
    ("Sub", IMAGES, (np.float32(1),), {}),
    ("Tanh", IMAGES, (), {}),
    ("Tile", IMAGES, (whole(2, 1, 1, 3),), {}),
    ("Transpose", IMAGES, (), {"perm": [0, 2, 3, 1]}),
    ("Unsqueeze", IMAGES, (whole(0, -1),), {}),
]


@pytest.mark.parametrize(("op", "x", "constants", "attributes"), CASES, ids=[case[0] for case in CASES])
def test_an_operator_computes_what_onnx_runtime_computes(
    op: str, x: Array, constants: tuple[Array | None, ...], attributes: Mapping[str, Any]
) -> None:
    model = one_node(op, x, *(None if c is None else np.asarray(c) for c in constants), **attributes)
    expected = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    found = runtime().open(model, with_nodes=False).run({"x": x})
    assert [array.shape for array in found] == [array.shape for array in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_every_operator_has_a_case() -> None:
    assert {case[0] for case in CASES} | {"Dropout"} == set(OPERATORS)


@pytest.mark.parametrize(
    ("op", "constants", "attributes", "said"),
    [
        ("Cos", (), {}, "operator ONNX:Cos"),
        ("Conv", (normal(4, 4, 3, 3),), {"auto_pad": "SAME_UPPER"}, "auto_pad"),
        ("Slice", (whole(-1), whole(-9), whole(2), whole(-1)), {}, "runs backwards"),
    ],
)
def test_what_it_does_not_run_is_named(
    op: str, constants: tuple[Array, ...], attributes: Mapping[str, Any], said: str
) -> None:
    model = one_node(op, IMAGES, *constants, **attributes)
    with pytest.raises((Refused, NotImplementedError), match=said):
        runtime().open(model, with_nodes=False).run({"x": IMAGES})


@pytest.mark.parametrize(
    ("op", "x", "constants", "said"),
    [
        ("Conv", IMAGES, (), r"node 'node' \(Conv\): TypeError: .*missing.*weight"),
        ("Conv", IMAGES, (None,), r"node 'node' \(Conv\): AttributeError: 'NoneType'"),
        ("Relu", IMAGES, (normal(4),), r"node 'node' \(Relu\): TypeError"),
        ("Concat", IMAGES, (), r"node 'node' \(Concat\): KeyError: 'axis'"),
    ],
)
def test_an_odd_node_is_named(op: str, x: Array, constants: tuple[Array | None, ...], said: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=said):
        runtime().open(one_node(op, x, *constants), with_nodes=False).run({"x": x})


def with_opsets(*opsets: tuple[str, int]) -> bytes:
    model = onnx.load_model_from_string(one_node("Relu", IMAGES))
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*one) for one in opsets)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("opsets", [[("com.microsoft", 1), ("", 17)], [("ai.onnx", 17), ("mine", 3)]])
def test_the_opset_is_that_of_onnx_s_own_operators(opsets: list[tuple[str, int]]) -> None:
    runtime().open(with_opsets(*opsets), with_nodes=False)


@pytest.mark.parametrize(
    ("opsets", "said"),
    [([], "no opset"), ([("mine", 17)], "no opset"), ([("mine", 17), ("", 11)], "opset 11; 13 or later")],
)
def test_an_opset_that_is_old_or_missing_is_refused(opsets: list[tuple[str, int]], said: str) -> None:
    with pytest.raises(Refused, match=rf"torch:cpu does not run this file: .*{said}"):
        runtime().open(with_opsets(*opsets), with_nodes=False)


@pytest.fixture
def rounding() -> Iterator[tuple[Any, Any]]:
    """The parts of PyTorch that say whether factors are rounded, restored afterwards."""
    parts: tuple[Any, Any] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [part.allow_tf32 for part in parts]
    yield parts
    for part, was in zip(parts, before, strict=True):
        part.allow_tf32 = was


@pytest.mark.parametrize(("dtype", "rounded"), [("f32", False), ("tf32", True), ("bf16", False)])
def test_factors_of_32_bits_are_rounded_where_the_address_asks_alone(
    dtype: str, rounded: bool, rounding: tuple[Any, Any]
) -> None:
    for part in rounding:
        part.allow_tf32 = not rounded
    runtime(dtype)
    assert [part.allow_tf32 for part in rounding] == [rounded, rounded]


ASSERT = "CUDA error: device-side assert triggered"


@pytest.mark.parametrize(
    ("error", "answer_of_gpu", "spoilt"),
    [
        (RuntimeError(ASSERT), None, True),
        (ValueError("node 'a' (Gather): IndexError: 7"), ASSERT, True),  # the GPU's own came too late
        (ValueError("node 'a' (Gather): IndexError: 7"), None, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB."), None, False),
    ],
)
def test_a_failure_of_cuda_spoils_all_that_comes_after(
    error: Exception, answer_of_gpu: str | None, spoilt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        if answer_of_gpu is not None:
            raise RuntimeError(answer_of_gpu)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    made = runtime()
    assert not made.spoilt(error)
    made.device = torch.device("cuda")
    assert made.spoilt(error) is spoilt


def test_how_pytorch_is_told_to_compute_has_its_number(
    rounding: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    made = runtime()
    assert made.name == f"torch {torch.__version__} (settings {SETTINGS})"
    # Whoever changes these raises SETTINGS: what was measured with others is another measurement.
    told = (threads, made.dtype, made.graph, [part.allow_tf32 for part in rounding])
    weight = made.open(reference_model(), with_nodes=False).weights["stem.weight"]
    assert (SETTINGS, *told) == (1, [1], torch.float32, True, [False, False])
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_rounded_factors_are_offered_on_gpus_alone() -> None:
    assert parse_address("torch:cuda?dtype=tf32").options == (("dtype", "tf32"),)
    with pytest.raises(DeviceError, match=r"dtype='tf32' must be one of: f32, bf16, f16$"):
        parse_address("torch:cpu?dtype=tf32")


def test_a_whole_network_is_right_in_32_and_near_in_16_bits() -> None:
    model, images = reference_model(), normal(1, 3, 96, 96)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    [expected] = session.run(None, {"images": images})
    [found] = runtime().open(model, with_nodes=False).run({"images": images})
    assert found == pytest.approx(expected, abs=1e-4 * float(np.abs(expected).max()))
    [rough] = runtime("bf16").open(model, with_nodes=False).run({"images": images})
    assert 1e-4 < np.abs(rough - expected).max() / np.abs(expected).max() < 0.1


def test_each_node_has_a_time_and_the_file_s_name() -> None:
    made = runtime()
    kernels = made.profile(reference_model(), lambda _: {"images": normal(1, 3, 96, 96)}, runs=2)
    names = [node.name for node in onnx.load_model_from_string(reference_model()).graph.node]
    assert [kernel["name"] for kernel in kernels] == names
    assert all(math.isfinite(kernel["microseconds"]) for kernel in kernels)
    assert made.elsewhere(kernels) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_said() -> None:
    with pytest.raises(Refused, match=r"torch:cuda needs a GPU, and a PyTorch for it; torch .* finds none"):
        ForeignRuntime(1, {"target": "cuda"}, refusal=Refused)


@pytest.mark.slow
def test_a_worker_measures_with_it(tiny: Path, tiny_logits: Callable[[Array], Array]) -> None:
    images = normal(5, 3, 8, 8)
    with connect("torch:cpu", seconds=0.1) as device:
        assert device.measure(tiny).latency_ms > 0
        assert device.predict(tiny, images) == pytest.approx(tiny_logits(images), abs=1e-5)
        assert {op.precision for op in device.optimized_ops(tiny) or ()} == {"float32"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_an_error_with_its_cause() -> None:
    with pytest.raises(DeviceError, match=r"torch:cuda.*needs a GPU"):
        connect("torch:cuda?dtype=bf16")


@pytest.mark.gpu
def test_a_replayed_graph_computes_what_eager_calls_do() -> None:
    images = {"images": normal(1, 3, 96, 96)}
    found = []
    for graph in ("0", "1"):
        made = ForeignRuntime(1, {"target": "cuda", "graph": graph}, refusal=Refused)
        output: Any = made.open(reference_model(), with_nodes=False).bound(images)()
        torch.cuda.synchronize()
        found.append(output[0].cpu().numpy())
    assert found[0] == pytest.approx(found[1], abs=1e-4)
