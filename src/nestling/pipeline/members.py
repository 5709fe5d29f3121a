"""Handing over: a folder for each member, with ONNX file, plain weights, a rebuilding script, figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestling.export import (
    check_logits,
    export_weights,
    file_key,
    load_onnx,
    save_onnx,
    to_onnx,
    with_metadata,
)
from nestling.pipeline.candidate import (
    CHECKED_IMAGES,
    FP32_TOLERANCE,
    Candidate,
    measure,
    score,
    write_candidate,
)
from nestling.pipeline.workbench import Workbench
from nestling.run import RunError, write_atomically
from nestling.search import EvaluationFailed, SearchResult, spread_along_front
from nestling.space import Arch

TEST_SPLIT = "test_split.npz"

_LOAD_WEIGHTS = """
# The weights, batch-normalization statistics included. Input: (N, 3, {resolution}, {resolution}), normalised
# as the metadata of model.onnx says.
from pathlib import Path

from safetensors.torch import load_file

network.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
network.eval()
"""


def export_members(
    bench: Workbench, result: SearchResult, *, on_member: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """The figures of the front's members, each handed over in a folder of its own.

    Where the front has more members than `export.members`, a spread along it is taken.

    Raises:
        RunError: the front is empty.
    """
    front = result.front
    if not front:
        failed = "; ".join(sorted({trial.reason for trial in result.failed})[:3])
        raise RunError(
            f"no candidate of {bench.run.folder} keeps the limits"
            + (f"; reasons of failed ones: {failed}" if failed else "; loosen search.limits")
        )
    chosen = spread_along_front(result, bench.config.export.members)
    members = []
    for number, trial in enumerate(chosen, start=1):
        name = f"{number:02d}-{trial.arch.key}"
        members.append(write_member(bench, trial.arch, name=name, searched=trial.metrics))
        on_member(name, number, len(chosen))
    bench.run.write_json("members.json", members)
    return members


def write_member(bench: Workbench, arch: Arch, *, name: str, searched: Mapping[str, float]) -> dict[str, Any]:
    """The figures of `arch`, now handed over in `exports/<name>`: each was measured on the file there.

    `searched` holds the metrics of the search, which go into the file's metadata; but for that the file is
    the one that the search timed.

    Raises:
        EvaluationFailed: the file does not compute what PyTorch computes, or is not the one that was timed.
    """
    folder = bench.run.exports / name
    path = folder / "model.onnx"
    candidate = write_candidate(bench, arch, path)
    _check_same(bench, candidate)
    figures = {f"nestling.search.{metric}": repr(value) for metric, value in searched.items()}
    save_onnx(with_metadata(load_onnx(path), figures), path)
    if candidate.is_quantized:
        _write_float_sibling(bench, candidate, folder / "model_fp32.onnx")
    export_weights(candidate.network, folder / "weights.safetensors")
    source = bench.family.rebuild(arch) + _LOAD_WEIGHTS.format(resolution=candidate.resolution)
    write_atomically(folder / "rebuild.py", source.encode())

    test = bench.data.test()
    split = bench.run.folder / TEST_SPLIT
    if not split.exists():
        test.save_split(split)
    accuracy = score(bench.device, path, test, resolution=candidate.resolution)
    measurement = measure(bench.device, path)
    card: dict[str, Any] = {
        "name": name,
        "arch_key": arch.key,
        "decisions": dict(arch),
        "file": "model.onnx",
        "sha256": file_key(path),
        "test_correct": accuracy.correct,
        "test_total": accuracy.total,
        "test_top1": accuracy.top1,
        "test_top1_interval": accuracy.interval,
        "search_top1": searched.get("top1"),
        "latency_ms": measurement.latency_ms,
        "latency_interval_ms": measurement.interval_ms,
        "latency_ratio": measurement.ratio,
        "unstable": measurement.unstable,
        "device": bench.device.name,
        "size_bytes": path.stat().st_size,
        "mmacs": candidate.cost.macs / 1e6,
        "params": candidate.cost.params,
        "peak_bytes": candidate.peak_bytes,
        "resolution": candidate.resolution,
        "worst_error": candidate.worst_error,
        "quantized": candidate.is_quantized,
        "preprocessing": bench.data.search.preprocessing(candidate.resolution),
        "precisions": {
            key.removesuffix(".precision"): str(value)
            for key, value in arch.items()
            if key.endswith(".precision")
        },
    }
    write_atomically(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    return card


def _check_same(bench: Workbench, candidate: Candidate) -> None:
    """Refuses a file that is not, to the last byte, the one that the search timed."""
    searched = bench.run.folder / "candidates" / f"{candidate.arch.key}.onnx"
    if searched.exists() and searched.read_bytes() != candidate.path.read_bytes():
        raise EvaluationFailed(
            f"{candidate.path} is not the file that the search scored and timed ({searched}); "
            "this happens when torch's threads or version changed in between: search again with the same ones"
        )


def _write_float_sibling(bench: Workbench, candidate: Candidate, path: Path) -> None:
    """The network of a quantized member without quantization, compared with PyTorch on real images."""
    save_onnx(to_onnx(candidate.graph), path)
    images = bench.data.search.take(CHECKED_IMAGES).array(candidate.resolution)
    with torch.no_grad():
        expected = candidate.network(torch.from_numpy(images)).numpy()
    check_logits(expected, np.asarray(bench.device.predict(path, images)), tolerance=FP32_TOLERANCE)
