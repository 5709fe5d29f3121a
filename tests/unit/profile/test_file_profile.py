from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestling.profile import DeviceError, WorkerDevice, connect, profile_file


def test_a_profile_tells_where_the_time_goes(cpu: WorkerDevice, tiny: Path) -> None:
    found = profile_file(cpu, tiny, nodes=True)
    assert [str(given) for given in found.inputs] == ["images: float32 1x3x8x8"]
    assert {"Conv"} <= {node.op for node in found.nodes}
    assert all(node.microseconds is not None and node.microseconds >= 0 for node in found.nodes)
    told = found.by_operator()
    assert sum(count for _, count, _ in told) == len(found.nodes)
    assert sum(ms for _, _, ms in told) == pytest.approx(found.nodes_ms)
    assert [ms for _, _, ms in told] == sorted((ms for _, _, ms in told), reverse=True)
    held = json.loads(json.dumps(found.to_json()))
    assert held["latency_ms"] == found.measurement.latency_ms
    assert held["nodes"][0]["name"] == found.nodes[0].name


def test_nodes_are_timed_only_where_they_are_asked_for(cpu: WorkerDevice, tiny: Path) -> None:
    assert profile_file(cpu, tiny).nodes == ()


def test_a_worker_tells_of_the_machine_and_of_the_file_s_memory(cpu: WorkerDevice, tiny: Path) -> None:
    told = cpu.measure(tiny).conditions
    assert told.waited is not None
    assert told.interrupted is not None
    assert told.waited >= 0
    assert 0 <= told.interrupted <= 1
    assert told.peak_bytes is None or 0 <= told.peak_bytes < 2**30


def test_a_provider_that_cannot_run_a_node_is_an_error_that_names_the_way_out() -> None:
    # onnxruntime lists a provider that computes in the cloud, and takes no ordinary node
    with pytest.raises(DeviceError, match=r"AzureExecutionProvider cannot run every node.*allow_fallback=1"):
        connect("ort:azure")


def test_what_ran_elsewhere_is_told_where_that_was_allowed(tiny: Path) -> None:
    with connect("ort:azure?allow_fallback=1", seconds=0.05) as device:
        taken = device.measure(tiny)
    assert taken.device == "ort:azure?threads=1&allow_fallback=1"
    assert taken.elsewhere is not None
    assert (taken.elsewhere.kernels, taken.elsewhere.time) == (1.0, 1.0)
