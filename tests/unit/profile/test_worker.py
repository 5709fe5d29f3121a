from __future__ import annotations

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

from nestling.profile import WorkerDevice, worker
from nestling.profile.transport_local import LocalProcess
from nestling.profile.worker import RefusalError, interleave, messages, refuse_external_data


class FakeMachine:
    """A clock, and two models that move it by what they cost; every call is noted."""

    def __init__(self, candidate_ms: Callable[[], float], reference_ms: Callable[[], float]) -> None:
        self.now, self.calls = 0, ""
        self.costs = {"c": candidate_ms, "r": reference_ms}

    def clock(self) -> int:
        return self.now

    def call(self, name: str) -> Callable[[], None]:
        def run() -> None:
            self.calls += name
            self.now += int(self.costs[name]() * 1e6)

        return run

    def measure(self, *, seconds: float, tolerance: float) -> tuple[list[int], list[int]]:
        timed = interleave(
            self.call("c"), self.call("r"), seconds=seconds, tolerance=tolerance, clock=self.clock
        )
        assert (timed.left_out, timed.interrupted) == (0, 0)
        return timed.candidate, timed.reference


def test_candidate_and_reference_take_turns_and_the_order_alternates() -> None:
    machine = FakeMachine(lambda: 3.0, lambda: 1.0)
    candidate, reference = machine.measure(seconds=1e-9, tolerance=1e-9)
    assert candidate == [3_000_000] * worker.LEAST_PAIRS
    assert reference == [1_000_000] * worker.LEAST_PAIRS
    # 4 untimed calls of 3 ms pass 10 ms, 8 of 1 ms reach the most; then comes the timed one.
    turns = ("c" * 5 + "r" * 9, "r" * 9 + "c" * 5)
    expected = "".join(itertools.islice(itertools.cycle(turns), worker.LEAST_PAIRS))
    assert machine.calls.endswith(expected)
    warm_up = machine.calls.removesuffix(expected)
    assert warm_up
    assert warm_up == "cr" * (len(warm_up) // 2)


def test_a_steady_machine_is_believed_as_soon_as_there_are_enough_pairs() -> None:
    candidate, _ = FakeMachine(lambda: 3.0, lambda: 1.0).measure(seconds=1e9, tolerance=0.01)
    assert len(candidate) == worker.TRUSTED_PAIRS


def test_a_restless_machine_is_timed_until_the_interval_is_tight() -> None:
    rng = np.random.default_rng(0)
    machine = FakeMachine(lambda: rng.lognormal(1.0, 0.1), lambda: rng.lognormal(0.0, 0.1))
    candidate, reference = machine.measure(seconds=1e9, tolerance=0.03)
    ratios = np.array(candidate) / np.array(reference)
    low, middle, high = worker.median_interval(ratios)
    assert worker.TRUSTED_PAIRS < len(candidate) < worker.MOST_PAIRS
    assert high - low <= 2 * 0.03 * middle
    assert middle == pytest.approx(np.e, rel=0.06)


def test_timing_ends_with_its_budget() -> None:
    rng = np.random.default_rng(0)
    machine = FakeMachine(lambda: rng.lognormal(0.0, 1.0), lambda: rng.lognormal(0.0, 1.0))
    candidate, _ = machine.measure(seconds=2.0, tolerance=1e-6)
    assert worker.LEAST_PAIRS < len(candidate) < worker.MOST_PAIRS
    assert 2.0 <= machine.now / 1e9 < 2.7  # warm-up included


def test_warming_up_lasts_while_calls_become_faster() -> None:
    costs = itertools.chain([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0], itertools.repeat(1.0))
    candidate, _ = FakeMachine(lambda: next(costs), lambda: 1.0).measure(seconds=1.0, tolerance=0.01)
    assert set(candidate) == {1_000_000}


@pytest.mark.parametrize(("call_ms", "pairs"), [(5_000.0, worker.LEAST_PAIRS), (13_000.0, 4), (70_000.0, 1)])
def test_a_slow_file_is_timed_without_priming_until_half_of_the_limit(call_ms: float, pairs: int) -> None:
    machine = FakeMachine(lambda: call_ms, lambda: 1.0)
    timed = interleave(
        machine.call("c"),
        machine.call("r"),
        seconds=1.5,
        tolerance=0.01,
        limit_seconds=115.0,
        clock=machine.clock,
    )
    assert len(timed.candidate) == len(timed.reference) == pairs
    assert machine.calls.count("c") == 1 + pairs


class SlowedMachine:
    """A machine that another one slows: the candidate takes 3 ms or 3.9, the reference and gauge 1 or 1.5."""

    def __init__(self, slow: Callable[[int], bool]) -> None:
        self.now, self.calls = 0, ""
        self.slow = slow

    def call(self, name: str, quiet: float, slowed: float) -> Callable[[], None]:
        def run() -> None:
            self.calls += name
            self.now += int((slowed if self.slow(self.now) else quiet) * 1e6)

        return run

    def measure(self, *, seconds: float, gauge: bool = False, best: float = 1e6) -> worker.Timed:
        return interleave(
            self.call("c", 3, 3.9),
            self.call("r", 2, 2.2) if gauge else self.call("r", 1, 1.5),
            seconds=seconds,
            tolerance=1e-9,
            gauge=self.call("g", 1, 1.5) if gauge else None,
            best=best,
            clock=lambda: self.now,
        )


def in_turns(now: int, *, quiet_ms: int, slow_ms: int) -> bool:
    return now // 10**6 % (quiet_ms + slow_ms) >= quiet_ms


def test_pairs_count_from_moments_in_which_the_device_is_at_its_best() -> None:
    machine = SlowedMachine(partial(in_turns, quiet_ms=300, slow_ms=500))
    timed = machine.measure(seconds=1.5)
    assert set(timed.candidate) == {3_000_000}
    assert set(timed.reference) == {1_000_000}
    assert timed.slowed > worker.LEAST_PAIRS
    assert timed.gauged == 1e6


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_between_a_fast_look_and_a_slow_one_does_not_count(seed: int) -> None:
    # phases of any length above that of a pair, so that they begin and end at every point of one
    rng = np.random.default_rng(seed)
    changes = np.cumsum(rng.integers(45, 200, 10_000)) * 10**6
    machine = SlowedMachine(lambda now: int(np.searchsorted(changes, now)) % 2 == 1)
    timed = machine.measure(seconds=20)
    assert len(timed.candidate) == worker.TRUSTED_PAIRS
    assert timed.slowed >= 8
    assert set(timed.candidate) == {3_000_000}


def test_a_device_that_stays_slow_costs_the_patience_and_all_pairs_count() -> None:
    machine = SlowedMachine(lambda _: True)
    timed = machine.measure(seconds=1.0)
    assert set(timed.candidate) == {3_900_000}
    assert len(timed.candidate) >= worker.TRUSTED_PAIRS
    assert (timed.slowed, timed.gauged) == (0, 1.5e6)
    assert worker.PATIENCE <= machine.now / 1e9 < worker.PATIENCE + 0.7
    # it looks at the reference alone
    assert machine.calls.count("c") < machine.calls.count("r") / 2


def test_a_device_at_its_best_is_timed_as_if_that_were_not_known() -> None:
    known, unknown = SlowedMachine(lambda _: False), SlowedMachine(lambda _: False)
    timed, others = known.measure(seconds=9.0), unknown.measure(seconds=9.0, best=float("inf"))
    assert timed == others
    assert len(timed.candidate) == worker.TRUSTED_PAIRS
    # it looks once at the beginning and once after every pair
    assert known.calls.count("c") == unknown.calls.count("c")
    assert known.calls.count("r") == unknown.calls.count("r") + 9 * (1 + worker.TRUSTED_PAIRS)


def test_what_the_pairs_are_chosen_by_does_not_change_their_ratio() -> None:
    # a best that was seen once in a month, and references that often take more than 1.15 times that
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(20):
        machine = FakeMachine(lambda: 3 * rng.normal(1, 0.1), lambda: rng.normal(1, 0.1))
        timed = interleave(
            machine.call("c"),
            machine.call("r"),
            seconds=20,
            tolerance=1e-9,
            best=0.95e6,
            clock=machine.clock,
        )
        assert timed.slowed > len(timed.candidate) / 10
        ratios.append(np.median(np.array(timed.candidate) / np.array(timed.reference)))
    assert np.mean(ratios) == pytest.approx(3, rel=0.006)


def test_two_files_beside_each_other_are_timed_in_moments_that_a_gauge_tells() -> None:
    machine = SlowedMachine(partial(in_turns, quiet_ms=300, slow_ms=500))
    timed = machine.measure(seconds=1.5, gauge=True)
    assert set(timed.candidate) == {3_000_000}
    assert set(timed.reference) == {2_000_000}
    assert timed.gauged == 1e6
    told = SlowedMachine(lambda _: True).measure(seconds=0.5, gauge=True)
    assert (set(told.reference), told.gauged) == ({2_200_000}, 1.5e6)


def test_a_worker_answers_what_the_gauge_took(tiny: Path) -> None:
    asked = worker.Worker()
    for name in ("m", "g"):
        asked.load({"model": name}, bytearray(tiny.read_bytes()))
    request = {"model": "m", "reference": "m", "seconds": 0.01, "tolerance": 1, "limit_seconds": 9}
    answer, _ = asked.time({**request, "gauge": "g", "best": 1e12}, bytearray())
    assert 0 < answer["gauged"] < 1e9
    assert answer["conditions"]["slow_pairs"] == 0


def test_a_file_that_missed_pairs_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = worker.Worker()
    asked.load({"model": "m"}, bytearray(tiny.read_bytes()))
    monkeypatch.setattr(worker, "LEAST_PAIRS", 500)
    request = {"model": "m", "reference": "m", "seconds": 1e-3, "tolerance": 1e-9, "limit_seconds": 1e-9}
    answer, times = asked.time(request, bytearray())
    assert answer["count"] == 1
    assert len(times) == 16
    assert answer["conditions"]["missed"] == 499


def test_the_worker_goes_first_where_memory_runs_out(cpu: WorkerDevice) -> None:
    cpu.start()
    assert isinstance(cpu.transport, LocalProcess)
    assert Path(f"/proc/{cpu.transport.pid}/oom_score_adj").read_text().strip() == "1000"


def external(model: onnx.ModelProto, name: str, *, inside: str) -> onnx.ModelProto:
    """`model` with a tensor that lies in another file, hidden in the named place."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    if inside == "marked only":
        del tensor.external_data[:]
        inside = "initializer"
    branch = helper.make_graph([], "branch", [], [])
    if inside == "initializer":
        model.graph.initializer.append(tensor)
    elif inside == "constant":
        model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    elif inside == "subgraph":
        branch.initializer.append(tensor)
        model.graph.node.append(helper.make_node("If", ["q"], ["o"], then_branch=branch, else_branch=branch))
    elif inside == "function":
        function = helper.make_function("own", "f", [], ["c"], [], [helper.make_opsetid("", 17)])
        function.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
        model.functions.append(function)
    elif inside == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif inside == "training":
        model.training_info.add().algorithm.initializer.append(tensor)
    return model


@pytest.mark.parametrize(
    "inside", ["initializer", "constant", "subgraph", "function", "sparse", "training", "marked only"]
)
def test_external_data_is_found_wherever_it_hides(
    inside: str, tiny_model: Callable[[int | str], onnx.ModelProto]
) -> None:
    model = external(tiny_model(1), "secret", inside=inside)
    with pytest.raises(RefusalError, match="'secret' is stored outside the file"):
        refuse_external_data(model.SerializeToString())


def number(value: int) -> bytes:
    """`value` as protobuf writes it."""
    coded = bytearray()
    while value > 0x7F:
        coded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*coded, value))


def field(place: int, content: bytes | int, *, beyond: int = 0) -> bytes:
    """A field, with `beyond` added to what a key may be: protobuf leaves it away."""
    wire, value = (0, number(content)) if isinstance(content, int) else (2, number(len(content)) + content)
    return number((place << 3 | wire) + beyond) + value


def disguised(*fields: bytes) -> bytes:
    """A model of the larger of `images` and the tensor `weight`, whose last fields are those given.

    The tensor has so many numbers that no optimization looks at them, and none fails before they are read.
    """
    larger = helper.make_node("Max", ["images", "weight"], ["out"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in ("images", "out")]
    graph = helper.make_graph([larger], "hostile", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[64]).SerializeToString()
    return bytes(model.SerializeToString() + field(7, field(5, tensor + b"".join(fields))))


LOCATION = field(1, b"location") + field(2, b"canary")
PAST = 1 << 32
DISGUISES = {
    "keys of more than 32 bits": (field(13, LOCATION, beyond=PAST), field(14, 1, beyond=PAST)),
    "the highest such keys": (field(13, LOCATION, beyond=7 * PAST), field(14, 1, beyond=7 * PAST)),
    "one such key": (field(13, LOCATION, beyond=PAST), field(14, 1)),
    "a value of more than 32 bits": (field(13, LOCATION, beyond=PAST), field(14, 1 + PAST)),
    "a value that is not known after it": (field(13, LOCATION, beyond=PAST), field(14, 1), field(14, 7)),
}


@pytest.mark.parametrize("how", DISGUISES)
def test_external_data_is_found_however_it_is_written(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = disguised(*DISGUISES[how])
    (tmp_path / "canary").write_bytes(np.full(64, 42, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    [read] = session.run(None, {"images": np.zeros(64, np.float32)})
    assert (read == 42).all()  # or this would be no disguise
    with pytest.raises(RefusalError):
        refuse_external_data(model)


@pytest.mark.parametrize("fields", [(field(14, 1 + PAST),), (field(14, 1), field(14, 0)), (field(14, b""),)])
def test_a_tensor_that_may_lie_elsewhere_is_refused(fields: tuple[bytes, ...]) -> None:
    with pytest.raises(RefusalError, match="'weight' is stored outside the file"):
        refuse_external_data(disguised(*fields))


NUMBER, WORD = 1 << 63, number(8 << 3 | 1) + bytes(8)
MISREAD = {
    "a tensor's name": disguised(field(8, NUMBER), field(13, LOCATION), field(14, 1)),
    "a tensor's name, of a terabyte": disguised(field(8, 1 << 40), field(13, LOCATION)),
    "a tensor's name, of eight bytes": disguised(WORD),
    "a node's operator": field(7, field(1, field(4, NUMBER))),
    "a node's first operand": field(7, field(1, field(1, 5))),
    "a graph": field(7, 0),
    "a tensor of an attribute": field(7, field(1, field(5, number(5 << 3 | 5) + bytes(4)))),
}


@pytest.mark.parametrize("what", MISREAD)
def test_what_should_be_bytes_and_is_a_number_is_refused(what: str) -> None:
    with pytest.raises(RefusalError, match=r"not an ONNX model: field \d of a \w+ has wire type \d, not 2"):
        refuse_external_data(MISREAD[what])


def test_a_tensor_that_says_that_it_lies_inside_is_accepted() -> None:
    refuse_external_data(disguised(field(9, bytes(256)), field(14, 0)))


def test_the_runtime_s_own_format_is_no_onnx_model(tmp_path: Path, tiny: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "tiny.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(tiny), options, providers=["CPUExecutionProvider"])
    content = (tmp_path / "tiny.ort").read_bytes()
    assert content[4:8] == b"ORTM"
    with pytest.raises(Exception, match="protobuf parsing failed"):
        worker.OrtRuntime("cpu", 1).open(content, with_nodes=False)


def test_a_model_with_its_weights_inside_is_accepted(
    tiny_model: Callable[[int | str], onnx.ModelProto],
) -> None:
    refuse_external_data(tiny_model(1).SerializeToString())


def test_the_reader_sees_the_nodes_and_tensors_that_onnx_sees(
    tiny_model: Callable[[int | str], onnx.ModelProto],
) -> None:
    model = tiny_model(1)
    found = list(messages(model.SerializeToString()))
    operators = [bytes(held[4]).decode() for kind, held in found if kind == "node"]
    assert operators[::-1] == [node.op_type for node in model.graph.node]
    assert [bytes(held[8]).decode() for kind, held in found if kind == "tensor"] == ["weight"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 20,
        b"\x3a\x7fshort",
        b"\x42\x7fshort",
        b"\x3a",
        b"\x0b",
        b"\x00\x01",
        field(1, 8, beyond=PAST),
        b"\x88\x80\x80\x80\x80\x00\x08",
        b"\x3a\x80\x80\x80\x80\x80\x00",
        b"\x08" + b"\x80" * 10 + b"\x00",
    ],
)
def test_what_is_not_protobuf_is_refused(content: bytes) -> None:
    with pytest.raises(RefusalError, match="not an ONNX model"):
        list(messages(content))


def test_the_saturation_probe_is_the_model_that_its_comment_describes() -> None:
    def constant(name: str, value: np.generic) -> TensorProto:
        return numpy_helper.from_array(np.asarray(value), name)

    inputs = ["x", "one", "zero", "weight", "one", "middle", "scale", "zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", inputs, ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 1, 2, 2])],
        [
            constant("one", np.float32(1)),
            constant("zero", np.uint8(0)),
            numpy_helper.from_array(np.full((1, 4, 1, 1), 127, np.int8), "weight"),
            constant("middle", np.int8(0)),
            constant("scale", np.float32(4 * 255 * 127 / worker.SATURATION_EXACT)),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made)
    assert onnx.load_from_string(worker.SATURATION_PROBE) == made


def probe(value: int, **entries: str) -> float:
    options = onnxruntime.SessionOptions()
    for name, entry in entries.items():
        options.add_session_config_entry(f"session.{name}", entry)
    session = onnxruntime.InferenceSession(worker.SATURATION_PROBE, options, ["CPUExecutionProvider"])
    [product] = session.run(None, {"x": np.full((1, 4, 2, 2), value, np.uint8)})
    return float(product.max())


def test_the_probe_is_exact_where_two_products_fit_16_bits() -> None:
    assert probe(128) == pytest.approx(worker.SATURATION_EXACT * 128 / 255, abs=0.5)


def test_the_probe_is_exact_where_the_runtime_is_told_to_be() -> None:
    assert probe(255, x64quantprecision="1") == worker.SATURATION_EXACT


def test_the_machine_s_saturation_is_what_the_probe_says(cpu: WorkerDevice) -> None:
    assert cpu.fingerprint.int8_saturates == (probe(255) != worker.SATURATION_EXACT)


def test_a_worker_that_nobody_watches_ends_itself(endless: Path) -> None:
    # What a search that was killed leaves behind: nobody reads, nobody kills, stdin stays open.
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-P", worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        model = endless.read_bytes()
        process.stdin.write(worker.pack({"verb": "load", "model": "m", "limit_seconds": -1.5}, len(model)))
        process.stdin.write(model)
        process.stdin.flush()
        assert process.wait(30) == -signal.SIGALRM
    assert time.monotonic() - begun < 10


def test_one_session_serves_all_that_is_asked_of_a_model(
    tiny: Path, tiny_model: Callable[[int | str], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = worker.OrtRuntime.open

    def counted(self: worker.OrtRuntime, model: bytes, *, with_nodes: bool) -> worker.OrtSession:
        opened.append(with_nodes)
        return real(self, model, with_nodes=with_nodes)

    monkeypatch.setattr(worker.OrtRuntime, "open", counted)
    asked, model = worker.Worker(), tiny.read_bytes()
    asked.hold({"array": "images", "shape": (2, 3, 8, 8), "dtype": "<f4"}, bytearray(2 * 3 * 8 * 8 * 4))
    nodes, _ = asked.optimized({}, bytearray(model))
    assert {"Conv", "com.microsoft.nchwc.Conv"} & {node["op"] for node in nodes["nodes"]}
    asked.predict({"array": "images"}, bytearray(model))
    first, _ = asked.load({"model": "a"}, bytearray(model))
    again, _ = asked.load({"model": "b"}, bytearray(model))
    assert opened == [True]
    assert first == again  # what opening took is told of the one time that it was done
    assert first["load_seconds"] > 0
    assert first["first_seconds"] > 0
    asked.load({"model": "c"}, bytearray(tiny_model("N").SerializeToString()))
    asked.load({"model": "a"}, bytearray(model))
    asked.optimized({}, bytearray(model))
    assert opened == [True, False, False, True]


COMPILED = (
    "[ONNXRuntimeError] : 1 : FAIL : Unable to serialize model as it contains compiled nodes. Please disable "
    "any execution providers which generate compiled nodes."
)
"""What onnxruntime 1.31 says with onnxruntime-ep-openvino 1.8 where its optimized graph is asked for."""


def _refusing_to_write(monkeypatch: pytest.MonkeyPatch, text: str) -> list[bool]:
    """Has ONNX Runtime refuse with `text` to write a graph; tells of each session whether it was asked to."""
    real, asked = onnxruntime.InferenceSession, list[bool]()

    def session(model: bytes, options: Any, **further: Any) -> Any:
        asked.append(bool(options.optimized_model_filepath))
        if asked[-1]:
            raise native.Fail(text)
        return real(model, options, **further)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


def test_a_provider_that_compiles_does_not_tell_its_graph_and_runs_all_the_same(
    tiny: Path, tiny_model: Callable[[int | str], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, model = worker.Worker(), tiny.read_bytes()
    sessions = _refusing_to_write(monkeypatch, COMPILED)
    assert told.optimized({}, bytearray(model)) == ({"nodes": None}, b"")
    loaded, _ = told.load({"model": "a"}, bytearray(model))
    assert loaded["first_seconds"] > 0
    assert sessions == [True, False]
    assert told.optimized({}, bytearray(model))[0] == {"nodes": None}  # once was enough: compiling is slow
    told.optimized({}, bytearray(tiny_model("N").SerializeToString()))
    assert sessions == [True, False]


def test_another_refusal_to_write_the_graph_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing_to_write(monkeypatch, "No space left on device")
    with pytest.raises(native.Fail, match="No space left"):
        worker.Worker().optimized({}, bytearray(tiny.read_bytes()))


def test_importing_the_worker_loads_no_runtime() -> None:
    code = "import sys, nestling.profile; sys.exit('onnxruntime' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0


def test_the_worker_runs_from_its_source_alone() -> None:
    source = Path(worker.__file__).read_text()
    frame = worker.pack({"verb": "bye", "limit_seconds": 30}, 0)
    ended = subprocess.run([sys.executable, "-I", "-c", source], input=frame, capture_output=True, check=True)
    assert ended.stdout == worker.pack({}, 0)


def spoken(stream: bytes) -> list[dict[str, Any]]:
    """The JSON objects of answers without blobs."""
    found = []
    while stream:
        size, _ = worker.LENGTHS.unpack(stream[:16])
        found.append(json.loads(stream[16 : 16 + size]))
        stream = stream[16 + size :]
    return found


RUNTIME = b"""
class ForeignRuntime:
    def __init__(self, threads, options, *, refusal):
        self.name = f"mine on {options['target']}"

    def facts(self):
        return {"int8_saturates": False}

    def spoilt(self, error):
        return "spoilt" in str(error)
"""
"""A runtime that says who it is."""


def test_other_runtimes_do_without_onnxruntime() -> None:
    about = {"runtime": "cpu", "threads": 1, "limit_seconds": 30}
    requests = [
        ({"verb": "hello", "engine": "mine", **about}, RUNTIME),
        ({"verb": "hello", "engine": "torch", **about}, b"import no_such.part"),
        ({"verb": "hello", "engine": "ort", **about}, b""),
        ({"verb": "runtimes", "limit_seconds": 30}, b""),
        ({"verb": "bye", "limit_seconds": 30}, b""),
    ]
    frames = b"".join(worker.pack(request, len(blob)) + blob for request, blob in requests)
    source = "import sys; sys.modules['onnxruntime'] = None\n" + Path(worker.__file__).read_text().replace(
        "from __future__ import annotations", ""
    )
    source = f"from __future__ import annotations\n{source}"
    ended = subprocess.run(
        [sys.executable, "-I", "-c", source], input=frames, capture_output=True, check=True
    )
    mine, lacking, ours, runtimes, _ = spoken(ended.stdout)
    assert mine["runtime"] == "mine on cpu"
    assert lacking == {"refused": "torch needs the package no_such; pip install no_such"}
    assert ours == {"refused": "ort:cpu needs the package onnxruntime; pip install onnxruntime"}
    assert runtimes["providers"] == []
    assert "onnxruntime" not in runtimes["versions"]


ODD = (
    RUNTIME
    + b"""
    def open(self, model, *, with_nodes):
        return {}["key"]
"""
)


def test_an_error_that_nobody_foresaw_is_an_answer_and_the_worker_lives_on() -> None:
    requests = [
        ({"verb": "hello", "engine": "mine", "runtime": "cpu", "threads": 1, "limit_seconds": 30}, ODD),
        ({"verb": "load", "model": "m", "limit_seconds": 30}, b""),
        ({"verb": "drop", "limit_seconds": 30}, b""),
        ({"verb": "bye", "limit_seconds": 30}, b""),
    ]
    frames = b"".join(worker.pack(request, len(blob)) + blob for request, blob in requests)
    command = [sys.executable, "-P", worker.__file__]
    ended = subprocess.run(command, input=frames, capture_output=True, check=True)
    _, odd, *others = spoken(ended.stdout)
    assert odd == {"refused": "KeyError: 'key' (nestling_mine_runtime, line 13)"}
    assert others == [{}, {}]


SPOILT = (
    RUNTIME
    + b"""
    def open(self, model, *, with_nodes):
        raise RuntimeError("the context is spoilt")
"""
)


def test_a_worker_whose_runtime_is_spoilt_answers_and_ends() -> None:
    requests = [
        ({"verb": "hello", "engine": "mine", "runtime": "cpu", "threads": 1, "limit_seconds": 30}, SPOILT),
        ({"verb": "load", "model": "m", "limit_seconds": 30}, b""),
        ({"verb": "drop", "limit_seconds": 30}, b""),
    ]
    frames = b"".join(worker.pack(request, len(blob)) + blob for request, blob in requests)
    command = [sys.executable, "-P", worker.__file__]
    ended = subprocess.run(command, input=frames, capture_output=True, check=True)
    _, *others = spoken(ended.stdout)
    assert others == [{"refused": "RuntimeError: the context is spoilt", "ends": True}]


@pytest.mark.parametrize(
    ("text", "spoilt"),
    [
        ("Fail: CUDA failure 710: device-side assert triggered ; GPU=0 ; expr=cudaStreamSynchronize", True),
        ("Fail: CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0 ; expr=cublasGemmHelper(", True),
        ("Fail: CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0 ; expr=cudnnConvolution", True),
        ("Fail: Failed to allocate memory for requested buffer of size 1099511627776", False),
    ],
)
def test_onnx_runtime_is_spoilt_by_a_failure_of_cuda(text: str, spoilt: bool) -> None:
    assert worker.OrtRuntime("cpu", 1).spoilt(RuntimeError(text)) is spoilt


def test_events_of_a_profile_that_tell_little_are_kernels_all_the_same() -> None:
    told = {"node_index": "0", "op_name": "Conv", "provider": "P", "input_type_shape": [{"float": [1]}]}
    node = {"cat": "Node", "dur": 4}
    found = worker.kernels_of(
        [{"ph": "M"}, {**node, "name": "a_kernel_time", "args": told}, {**node, "name": "b_kernel_time"}],
        runs=1,
    )
    bare = {"name": "b", "op": "", "provider": "", "reads": [], "writes": [], "microseconds": 4.0}
    assert found[0] == {**bare, "name": "a", "op": "Conv", "provider": "P", "reads": ["float"]}
    assert found[1] == bare


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "object"])
def test_an_input_of_a_type_that_cannot_be_made_up_is_refused(kind: str) -> None:
    with pytest.raises(RefusalError, match=f"input 'x' is a {kind}; float32, .* can be fed"):
        worker.made_up([worker.Input("x", kind, [1, 3])])


def test_a_peak_of_memory_is_the_model_s_and_not_of_sessions_that_opened_later(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [7_000]
    real = worker.OrtRuntime.profile

    def profile(self: worker.OrtRuntime, *given: Any, runs: int) -> list[dict[str, Any]]:
        taken.append(90_000)
        return real(self, *given, runs=runs)

    monkeypatch.setattr(worker.OrtRuntime, "profile", profile)
    monkeypatch.setattr(worker, "_memory", lambda _: taken[-1])
    monkeypatch.setattr(worker, "forget_peak", lambda: 2_000)
    asked = worker.Worker()
    asked.load({"model": "m", "shares": True}, bytearray(tiny.read_bytes()))
    asked.load({"model": "r"}, bytearray(tiny.read_bytes()))
    limits = {"seconds": 0.01, "tolerance": 0.5, "limit_seconds": 30.0}
    told, _ = asked.time({"model": "m", "reference": "r", **limits}, bytearray())
    assert told["conditions"]["peak_bytes"] == 5_000


@pytest.mark.parametrize("name", ["worker", "torch_runtime", "openvino_runtime"])
def test_what_runs_on_boards_is_written_for_python_3_9(name: str) -> None:
    source = Path(worker.__file__).with_name(f"{name}.py").read_text()
    newer = {"strict", "slots", "kw_only"}  # of zip and of dataclass
    for node in ast.walk(ast.parse(source, feature_version=(3, 9))):
        assert not isinstance(node, ast.Match)
        if isinstance(node, ast.Call):
            assert not newer & {keyword.arg for keyword in node.keywords}, f"{name}.py, line {node.lineno}"
            assert "pairwise" not in ast.unparse(node.func), f"{name}.py, line {node.lineno}"
