"""OpenVINO's own runtime, for the worker: its source is sent along with `hello`, so it imports none of ours.

Needs the package `openvino` where the worker runs. It is tuned for latency: one request at a time, one
stream, as many threads as the address says. Files in 32-bit floats are computed in 32-bit floats, unless the
address asks for `dtype=bf16`: left to itself OpenVINO takes bfloat16 wherever the processor has it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SETTINGS = 1
"""Of OpenVINO's configuration: what was measured with another is measured anew."""
PROFILED_SECONDS = 2.0
"""No further run is profiled after so long."""
NOT_RUN = {"Input", "Parameter", "Const", "Constant", "Output", "Result"}
"""Layers of the runtime's model that compute nothing."""


TYPES = {"u8": "uint8", "i8": "int8", "bf16": "bfloat16", "f16": "float16", "f32": "float"}
"""OpenVINO's names of types, and ONNX Runtime's."""


@dataclass(frozen=True)
class Input:
    """An input of a model; open sizes are None."""

    name: str
    dtype: str
    shape: Sequence[int | None]


class Session:
    """A compiled model."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.inputs = [
            Input(
                port.any_name,
                str(np.dtype(port.element_type.to_dtype())),
                [size.get_length() if size.is_static else None for size in port.partial_shape],
            )
            for port in compiled.inputs
        ]
        self.nodes: list[dict[str, Any]] | None = None

    def run(self, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs for `feed`."""
        request = self.requested(feed)
        request.infer(share_outputs=True)
        return [np.array(tensor.data) for tensor in request.output_tensors]

    def bound(self, feed: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """Computes the outputs for `feed` whenever it is called; the inputs are copied once, now."""
        # not `start_async`: that hands over to another thread, whose waking up would be timed too
        infer = self.requested(feed).infer
        return lambda: infer(share_outputs=True)

    def requested(self, feed: Mapping[str, NDArray[Any]]) -> Any:
        """A request of its own with these inputs."""
        import openvino

        request = self.compiled.create_infer_request()
        for name, array in feed.items():
            request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(array)))
        return request


class ForeignRuntime:
    """OpenVINO on the CPU; other devices of OpenVINO have addresses of ONNX Runtime (`ort:openvino`)."""

    def __init__(self, threads: int, options: Mapping[str, Any], *, refusal: type[Exception]) -> None:
        try:
            import openvino
        except ImportError:
            raise refusal("openvino:cpu needs the package openvino; pip install openvino") from None

        self._refusal, self.instructions = refusal, options.get("instructions", ())
        self.name = f"openvino {openvino.__version__.partition('-')[0]} (settings {SETTINGS})"
        self.core = openvino.Core()
        # SETTINGS names these in fingerprints: raise it with every change of how a model is run.
        self.config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # the worker has chosen its cores; OpenVINO would choose others
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": options.get("dtype", "f32"),
        }

    def facts(self) -> dict[str, Any]:
        """What the device can compute in, and whether its sums of 8-bit products may be cut to 16 bits.

        OpenVINO's documents say that they are on x86 processors without VNNI; here that is not probed.
        """
        able = list(self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        exact = any("vnni" in name or name == "amx_int8" for name in self.instructions)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return {"capabilities": able, "int8_saturates": x86 and not exact}

    def open(self, model: bytes, *, with_nodes: bool) -> Session:
        """The compiled model; with the layers of the runtime's own model of it."""
        session = self._compile(model)
        if with_nodes:
            session.nodes = layers(session.compiled)
        return session

    def profile(
        self, model: bytes, feed: Callable[[Session], Mapping[str, NDArray[Any]]], *, runs: int
    ) -> list[dict[str, Any]]:
        """The layers of one run, each with the median of its microseconds over `runs`."""
        session = self._compile(model, PERF_COUNT=True)
        request = session.requested(feed(session))
        request.infer(share_outputs=True)
        taken: dict[str, list[float]] = {}
        end = time.monotonic() + PROFILED_SECONDS
        for _ in range(runs):
            request.infer(share_outputs=True)
            for layer in request.get_profiling_info():
                if layer.status == layer.Status.EXECUTED:
                    taken.setdefault(layer.node_name, []).append(layer.real_time.total_seconds() * 1e6)
            if time.monotonic() >= end:
                break
        described = {layer["layer"]: layer for layer in layers(session.compiled)}
        kernels = []
        for name, times in taken.items():
            layer = described.get(name, {"name": name, "op": "", "precision": "", "primitive": ""})
            kernels.append(
                {
                    "name": layer["name"],
                    "op": layer["op"],
                    "provider": layer["primitive"] or "CPU",
                    "reads": [TYPES.get(layer["precision"], layer["precision"])],
                    "writes": [],
                    "microseconds": float(np.median(times)),
                }
            )
        return kernels

    def timer(self) -> None:
        """The processor's clock: a call returns when its outputs are there."""

    def elsewhere(self, kernels: Sequence[Mapping[str, Any]]) -> list[str]:
        """Nothing: all runs on the CPU."""
        del kernels
        return []

    def spoilt(self, error: Exception) -> bool:
        """Never: an error on the CPU that this process outlives leaves the runtime sound."""
        del error
        return False

    def _compile(self, model: bytes, **config: Any) -> Session:
        try:
            compiled = self.core.compile_model(self.core.read_model(model), "CPU", {**self.config, **config})
        except RuntimeError as error:
            raise self._refusal(f"OpenVINO: {' '.join(str(error).split())}") from None
        return Session(compiled)


def computed_in(primitive: str, runtime_precision: str) -> str:
    """What a layer computes in, such as `u8`, `i8`, `bf16` or `f32`.

    The name of its code tells, `brgconv_avx512_amx_I8`. The precision that the runtime states is that of what
    it reads: a convolution of signed bytes was found that reads `i8` and computes by `brgconv_avx512_f32`.
    """
    code = primitive.rpartition("_")[2].lower()
    if code not in TYPES or (code == "i8" and runtime_precision == "u8"):
        return runtime_precision
    return code


def layers(compiled: Any) -> list[dict[str, Any]]:
    """The layers that compute something, in order, as the runtime's model of `compiled` tells them.

    A layer into which others were fused has the name of the first of them.
    """
    found = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        told = {name: value.astype(str) for name, value in operation.get_rt_info().items()}
        if told.get("layerType", "") in NOT_RUN:
            continue
        # OpenVINO takes biases out of convolutions and products, and renames what is left
        original = told.get("originalLayersNames", "").split(",")[0].partition("/WithoutBiases")[0]
        found.append(
            {
                "layer": operation.friendly_name,
                "name": original or operation.friendly_name,
                "op": told.get("layerType", ""),
                "precision": computed_in(told.get("primitiveType", ""), told.get("runtimePrecision", "")),
                "primitive": told.get("primitiveType", ""),
                "reads": [value.get_source_output().get_node().friendly_name for value in operation.inputs()],
                "writes": [operation.friendly_name],
            }
        )
    return found
