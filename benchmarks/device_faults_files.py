"""ONNX files that mean harm, and ordinary ones with bytes changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
    numpy_helper,
)

SHAPE = [1, 3, 8, 8]
FUNCTION_LEVELS = 60
MUTATED = "mutated "
"""With this the name of a mutated file begins."""
REFUSED = ("external", "number for")
"""With these the names of files begin that must be refused, whatever the runtime would make of them."""
ENDLESS = ("nested functions", "endless loop", "long loop")
"""Files that nothing but their limit ends, and mutations of them."""


def may_be_ended(name: str) -> bool:
    """Whether a file of this name may cost its worker, by the limit."""
    return name.removeprefix(MUTATED) in ENDLESS


def model(
    nodes: list[NodeProto], *, tensors: list[TensorProto] | None = None, out: str = "out"
) -> ModelProto:
    """A model of `nodes` that reads `images` (1, 3, 8, 8)."""
    graph = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        tensors or [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outside(location: str, *, offset: int = 0, length: int = 4) -> TensorProto:
    """A tensor of one float that lies in the file `location`."""
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def external_data(locations: list[str]) -> Iterator[tuple[str, bytes]]:
    """Models whose weights lie elsewhere: as an initialiser, a constant, in a branch, sparse, half hidden."""
    for location in locations:
        tensor = outside(location)
        add = helper.make_node("Add", ["images", "weight"], ["out"])
        yield "external initialiser", model([add], tensors=[tensor]).SerializeToString()
        constant = helper.make_node("Constant", [], ["weight"], value=tensor)
        yield "external constant", model([constant, add]).SerializeToString()
        branch = helper.make_graph(
            [helper.make_node("Constant", [], ["weight"], value=tensor), add],
            "branch",
            [],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        )
        yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
        chosen = helper.make_node("If", ["yes"], ["out"], then_branch=branch, else_branch=branch)
        yield "external in a branch", model([yes, chosen]).SerializeToString()
        sparse = SparseTensorProto(dims=[4])
        sparse.values.CopyFrom(tensor)
        sparse.indices.CopyFrom(outside(location))
        sparse.indices.data_type = TensorProto.INT64
        hidden = model([add])
        hidden.graph.sparse_initializer.append(sparse)
        yield "external sparse", hidden.SerializeToString()
        named_only = model([add], tensors=[tensor])
        named_only.graph.initializer[0].data_location = TensorProto.DEFAULT
        yield "external without saying so", named_only.SerializeToString()
        for beyond in (1 << 32, 7 << 32):
            yield "external behind long keys", _disguised(location, beyond=beyond, value=1)
        yield "external by a long value", _disguised(location, beyond=1 << 32, value=1 + (1 << 32))
        for name in (1 << 40, 1 << 63):
            yield "external with a number for its name", _disguised(location, beyond=0, value=1, name=name)


def _field(number: int, content: bytes | int, *, beyond: int = 0) -> bytes:
    """A field as protobuf writes it, with `beyond` added to its key."""
    if isinstance(content, int):
        return _varint((number << 3) + beyond) + _varint(content)
    return _varint((number << 3 | 2) + beyond) + _varint(len(content)) + content


def _disguised(location: str, *, beyond: int, value: int, name: int | None = None) -> bytes:
    """A model whose weight lies elsewhere, told by keys that protobuf cuts to 32 bits.

    With a `name` that is a number, which protobuf passes over and a reader may take for a count of bytes.
    """
    # so many numbers that no optimization looks at them, and fails before the file is read
    whole = model([helper.make_node("Max", ["images", "weight"], ["out"])]).SerializeToString()
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=SHAPE[2:]).SerializeToString()
    for key, text in (("location", location), ("offset", "0"), ("length", "256")):
        tensor += _field(13, _field(1, key.encode()) + _field(2, text.encode()), beyond=beyond)
    tensor += b"" if name is None else _field(8, name)
    # a second graph is merged with the first
    return bytes(whole + _field(7, _field(5, tensor + _field(14, value, beyond=beyond))))


def misread() -> Iterator[tuple[str, bytes]]:
    """Models in which a number stands where text or a message is read."""
    whole = model([helper.make_node("Identity", ["images"], ["out"])]).SerializeToString()
    for number in (1, 1 << 40, (1 << 64) - 1):
        yield "number for a tensor's name", bytes(whole + _field(7, _field(5, _field(8, number))))
        for place in (1, 3, 4, 7):
            yield "number for a node's text", bytes(whole + _field(7, _field(1, _field(place, number))))
        yield "number for a graph", bytes(whole + _field(7, number))


def nested_functions(levels: int = FUNCTION_LEVELS) -> bytes:
    """A few kilobytes that become 2 ** `levels` nodes when they are loaded."""
    functions: list[FunctionProto] = []
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    for level in range(levels):
        inner, domain = ("Identity", "") if level == 0 else (f"f{level - 1}", "mine")
        nodes = [
            helper.make_node(inner, ["x"], ["y"], domain=domain),
            helper.make_node(inner, ["y"], ["z"], domain=domain),
        ]
        functions.append(helper.make_function("mine", f"f{level}", ["x"], ["z"], nodes, imports))
    made = model([helper.make_node(f"f{levels - 1}", ["images"], ["out"], domain="mine")])
    made.opset_import.extend(imports[1:])
    made.functions.extend(functions)
    return bytes(made.SerializeToString())


def endless_loop(turns: int = 2**62) -> bytes:
    """A loop that doubles its input for ever."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["c", "c"], ["twice"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("c", TensorProto.FLOAT, SHAPE),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("twice", TensorProto.FLOAT, SHAPE),
        ],
    )
    tensors = [
        numpy_helper.from_array(np.array(turns, np.int64), "turns"),
        numpy_helper.from_array(np.array(True), "go"),
    ]
    node = helper.make_node("Loop", ["turns", "go", "images"], ["out"], body=body)
    return bytes(model([node], tensors=tensors).SerializeToString())


def giants() -> Iterator[tuple[str, bytes]]:
    """Models that ask for more memory than there is."""
    for power in (34, 40, 61, 62):
        shape = numpy_helper.from_array(np.array([2**power], np.int64), "shape")
        node = helper.make_node("ConstantOfShape", ["shape"], ["out"])
        yield "giant constant", model([node], tensors=[shape]).SerializeToString()
        far = numpy_helper.from_array(
            np.array([2 ** (power // 2), 1, 1, 2 ** (power // 2)], np.int64), "shape"
        )
        one = helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=1)
        grow = helper.make_node("Expand", ["mean", "shape"], ["out"])
        yield "giant expansion", model([one, grow], tensors=[far]).SerializeToString()
        liar = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[2**power], raw_data=b"1234")
        add = helper.make_node("Add", ["images", "weight"], ["out"])
        yield "giant initialiser", model([add], tensors=[liar]).SerializeToString()
        wide = model([helper.make_node("Identity", ["images"], ["out"])])
        wide.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**power
        yield "giant input", wide.SerializeToString()


def malformed() -> Iterator[tuple[str, bytes]]:
    """What is no network, or hardly one."""
    identity = helper.make_node("Identity", ["images"], ["out"])
    cycle = [helper.make_node("Add", ["images", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    yield "cycle", model(cycle, out="b").SerializeToString()
    negative = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[-4], raw_data=b"1234")
    add = helper.make_node("Add", ["images", "weight"], ["out"])
    yield "negative size", model([add], tensors=[negative]).SerializeToString()
    overflow = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[2**32, 2**32], raw_data=b"")
    yield "size that overflows", model([add], tensors=[overflow]).SerializeToString()
    nested = AttributeProto(name="then_branch", type=AttributeProto.GRAPH, g=GraphProto(name="deepest"))
    for _ in range(25):
        outer = AttributeProto(name="then_branch", type=AttributeProto.GRAPH)
        node = outer.g.node.add(op_type="If", output=["x"])
        node.attribute.append(nested)
        nested = outer
    deep = NodeProto(op_type="If", input=["images"], output=["out"])
    deep.attribute.append(nested)
    yield "deep branches", model([deep]).SerializeToString()
    yield "deep protobuf", b"".join(_wrapped(50_000))
    yield "unknown operator", model([helper.make_node("NoSuchOp", ["images"], ["out"])]).SerializeToString()
    yield (
        "unknown domain",
        model([helper.make_node("F", ["images"], ["out"], domain="../x")]).SerializeToString(),
    )
    loud = model([identity])
    loud.graph.node[0].name = "../../canary\n\x1b[2J" * 1000
    loud.producer_name = "/etc/passwd"
    yield "names like paths", loud.SerializeToString()
    heavy = model([identity])
    heavy.doc_string = "x" * 30_000_000
    yield "30 MB of comment", heavy.SerializeToString()
    future = model([identity])
    future.ir_version = 2**31
    yield "future version", future.SerializeToString()
    recursive = model([helper.make_node("f", ["images"], ["out"], domain="mine")])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    recursive.opset_import.extend(imports[1:])
    again = [helper.make_node("f", ["x"], ["y"], domain="mine")]
    recursive.functions.append(helper.make_function("mine", "f", ["x"], ["y"], again, imports))
    yield "recursive function", recursive.SerializeToString()
    yield "empty", b""
    yield "zeros", bytes(10_000)
    yield "endless number", b"\xff" * 10_000
    yield "a script", b"#!/bin/sh\ntouch canary\n"


def _wrapped(levels: int) -> list[bytes]:
    """The pieces of a message in a message in a message, field 7 of each."""
    pieces: list[bytes] = []
    size = 0
    for _ in range(levels):
        head = b"\x3a" + _varint(size)
        pieces.append(head)
        size += len(head)
    return pieces[::-1]


def _varint(number: int) -> bytes:
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """`content` with bytes changed, cut out, put in or doubled, at a few places."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        place = rng.randrange(len(changed))
        act = rng.random()
        if act < 0.5:
            changed[place] = rng.randrange(256)
        elif act < 0.7:
            changed[place] ^= 1 << rng.randrange(8)
        elif act < 0.8:
            del changed[place : place + rng.randrange(1, 40)]
        elif act < 0.9:
            changed[place:place] = rng.randbytes(rng.randrange(1, 40))
        else:
            start = rng.randrange(len(changed))
            changed[place:place] = changed[start : start + rng.randrange(1, 200)]
        if not changed:
            return b""
    return bytes(changed)


def hostile(canaries: list[Path], folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every hostile file, with what it tries.

    Args:
        canaries: files that none of them may read.
        folder: the one that the worker may have as its current one.
    """
    locations = ["canary", "./canary", "a/../canary", "/proc/self/environ", "/etc/passwd", ""]
    for canary in canaries:
        up = Path(*[".."] * (len(folder.parts) - 1))
        locations += [str(canary), f"{up}{canary}", f"file://{canary}", f"{canary}\0.bin"]
    yield from external_data(locations)
    yield from giants()
    yield from malformed()
    yield from misread()
    yield "nested functions", nested_functions()
    yield "nested functions", nested_functions(40)
    yield "endless loop", endless_loop()
    yield "long loop", endless_loop(2**40)


def files(
    count: int, *, whole: list[bytes], canaries: list[Path], folder: Path, seed: int
) -> Iterator[tuple[str, bytes]]:
    """`count` files, the hostile ones first, then mutations of those in `whole` and of the hostile ones."""
    rng = random.Random(seed)
    named = list(hostile(canaries, folder))[:count]
    yield from named
    small = [(name, content) for name, content in named if 0 < len(content) < 1_000_000]
    for _ in range(count - len(named)):
        if rng.random() < 0.8:
            yield f"{MUTATED}network", mutated(rng.choice(whole), rng)
        else:
            name, content = rng.choice(small)
            yield f"{MUTATED}{name}", mutated(content, rng)
