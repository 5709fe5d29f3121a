"""The reference model: the fixed network that every measurement is interleaved with, as ONNX bytes.

A small mobile network: a strided stem, then inverted residual blocks whose maps shrink as channels grow.
It is written here, byte for byte, without the `onnx` package: the protobuf encoding of a handful of nodes is
short, and a file that is made the same way everywhere needs no shipping. Its hash is part of a device's
fingerprint, so ratios to two different reference models are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

SIDE = 96
EXPANSION = 4
STAGES = ((16, 1), (24, 2), (40, 2), (80, 2), (160, 2))
"""Channels and blocks of each stage; every stage after the first halves the map."""
OPSET = 17
IR_VERSION = 8
FLOAT32 = 1  # TensorProto.DataType.FLOAT
INTS = 7  # AttributeProto.AttributeType.INTS
INT = 2  # AttributeProto.AttributeType.INT


@cache
def reference_model() -> bytes:
    """A serialized ONNX model: `images` (1, 3, 96, 96) in, `features` (1, 160, 1, 1) out, both float32."""
    nodes: list[bytes] = []
    weights: list[bytes] = []

    def conv(source: str, target: str, shape: tuple[int, int, int, int], *, stride: int, groups: int) -> None:
        weight, pad = f"{target}.weight", shape[2] // 2
        weights.append(_tensor(weight, _weights(shape, seed=len(weights))))
        attributes = [
            _ints("strides", [stride, stride]),
            _ints("pads", [pad] * 4),
            _attribute("group", INT, _integer(3, groups)),
        ]
        nodes.append(_node("Conv", [source, weight], target, attributes))

    def relu(source: str) -> str:
        nodes.append(_node("Relu", [source], f"{source}.relu", []))
        return f"{source}.relu"

    carried, width = "images", STAGES[0][0]
    conv("images", "stem", (width, 3, 3, 3), stride=2, groups=1)
    carried = relu("stem")
    for stage, (channels, blocks) in enumerate(STAGES):
        for block in range(blocks):
            name, wide = f"stage{stage}.block{block}", width * EXPANSION
            stride = 2 if stage > 0 and block == 0 else 1
            conv(carried, f"{name}.expand", (wide, width, 1, 1), stride=1, groups=1)
            conv(relu(f"{name}.expand"), f"{name}.depthwise", (wide, 1, 3, 3), stride=stride, groups=wide)
            conv(relu(f"{name}.depthwise"), f"{name}.project", (channels, wide, 1, 1), stride=1, groups=1)
            if stride == 1 and width == channels:
                nodes.append(_node("Add", [carried, f"{name}.project"], name, []))
                carried = name
            else:
                carried = f"{name}.project"
            width = channels
    nodes.append(_node("GlobalAveragePool", [carried], "features", []))

    graph = b"".join(
        [_field(1, node) for node in nodes]
        + [_field(2, b"reference")]
        + [_field(5, weight) for weight in weights]
        + [_field(11, _value("images", [1, 3, SIDE, SIDE])), _field(12, _value("features", [1, width, 1, 1]))]
    )
    return _integer(1, IR_VERSION) + _field(7, graph) + _field(8, _integer(2, OPSET))


def _weights(shape: tuple[int, int, int, int], *, seed: int) -> NDArray[np.float32]:
    """Uniform numbers whose spread keeps activations near 1, the same on every platform and NumPy version.

    Hashed counters (the 32-bit finaliser of MurmurHash3) rather than `np.random`, whose streams may change.
    """
    count = int(np.prod(shape))
    bits = np.arange(count, dtype=np.uint32) + np.uint32(seed * 1_000_003 + 1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    centred = bits.astype(np.float64) / 2**31 - 1.0
    spread = (6.0 / (shape[1] * shape[2] * shape[3])) ** 0.5
    weights: NDArray[np.float32] = (centred * spread).reshape(shape).astype(np.float32)
    return weights


# Protobuf's encoding: a field is a key, (number << 3 | wire type), then a varint (type 0) or length and bytes
# (type 2). The field numbers are those of onnx.proto.


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _attribute(name: str, kind: int, value: bytes) -> bytes:
    return _field(5, _field(1, name.encode()) + value + _integer(20, kind))


def _ints(name: str, values: Sequence[int]) -> bytes:
    return _attribute(name, INTS, b"".join(_integer(8, value) for value in values))


def _node(kind: str, inputs: Sequence[str], output: str, attributes: Sequence[bytes]) -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    return names + _field(3, output.encode()) + _field(4, kind.encode()) + b"".join(attributes)


def _tensor(name: str, values: NDArray[np.float32]) -> bytes:
    numbers = values.astype("<f4").tobytes()
    sizes = b"".join(_integer(1, size) for size in values.shape)
    return sizes + _integer(2, FLOAT32) + _field(8, name.encode()) + _field(9, numbers)


def _value(name: str, shape: Sequence[int]) -> bytes:
    sizes = b"".join(_field(1, _integer(1, size)) for size in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _integer(1, FLOAT32) + _field(2, sizes)))
