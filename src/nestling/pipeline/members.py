"""Handing over: a folder for each member, with ONNX file, plain weights, a rebuilding script, figures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nestling.export import export_weights, load_onnx, save_onnx, to_onnx, with_metadata
from nestling.file_keys import file_key
from nestling.pipeline.candidate import Candidate, file_metadata, write_candidate
from nestling.pipeline.islands import float_islands
from nestling.pipeline.measuring import measure, score
from nestling.pipeline.policies import is_precision
from nestling.pipeline.verifying import verify_candidate
from nestling.pipeline.workbench import Workbench
from nestling.quant import Quantized, QuantPolicy
from nestling.quant.layers import layers
from nestling.run import RunError, write_atomically
from nestling.search import SearchResult, spread_along_front
from nestling.space import Arch

TEST_SPLIT = "test_split.npz"
MEMBER = re.compile(r"\d{2,}-[0-9a-f]{12}")

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
    for old in member_folders(bench.run.exports):
        shutil.rmtree(old)
    members = []
    for number, trial in enumerate(chosen, start=1):
        name = f"{number:02d}-{trial.arch.key}"
        members.append(write_member(bench, trial.arch, name=name, searched=trial.metrics))
        on_member(name, number, len(chosen))
    bench.run.write_json("members.json", members)
    return members


def member_folders(exports: Path) -> list[Path]:
    """The folders of the front's members in `exports`: `01-KEY` and on; none where it is missing."""
    # a fine-tuned network's folder, KEY-tuned-HASH, may begin with digits too
    return sorted(path for path in exports.glob("*-*") if MEMBER.fullmatch(path.name))


def write_member(bench: Workbench, arch: Arch, *, name: str, searched: Mapping[str, float]) -> dict[str, Any]:
    """The figures of `arch`, now handed over in `exports/<name>`: each was measured on the file there.

    `searched` holds the metrics of the search, which go into the file's metadata; but for that the file is
    the one that the search timed.

    Raises:
        EvaluationFailed: the file does not compute what PyTorch computes.
    """
    folder = bench.run.exports / name
    path = folder / "model.onnx"
    candidate = write_candidate(bench, arch, path)
    timed = bench.candidate_path(arch)
    figures = {f"nestling.search.{metric}": repr(value) for metric, value in searched.items()}
    save_onnx(with_metadata(load_onnx(timed if timed.exists() else path), figures), path)
    candidate = replace(candidate, worst_error=verify_candidate(bench, candidate))
    return hand_over(bench, candidate, search_top1=searched.get("top1"))


def hand_over(
    bench: Workbench,
    candidate: Candidate,
    *,
    search_top1: float | None,
    told: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of `candidate`, each measured on its file, beside which all else is now written.

    Args:
        bench: the run.
        candidate: its file is `model.onnx` in a folder of its own.
        search_top1: of the search.
        told: metadata that the file of the unquantized sibling has beside a candidate's.
        more: stands in `card.json` as well, which is written last: a folder with one is whole.

    Raises:
        EvaluationFailed: the file of the unquantized sibling does not compute what PyTorch computes.
    """
    arch, path = candidate.arch, candidate.path
    folder, name = path.parent, path.parent.name
    graph, quantized = candidate.graph, candidate.quantized
    if candidate.is_quantized and graph is not None:
        sibling = folder / "model_fp32.onnx"
        model = to_onnx(graph, dynamic_batch=bench.config.export.dynamic_batch)
        save_onnx(with_metadata(model, file_metadata(bench, arch) | dict(told or {})), sibling)
        plain = replace(candidate, path=sibling, policy=QuantPolicy(), quantized=Quantized(graph, {}))
        verify_candidate(bench, plain)
    export_weights(candidate.network, folder / "weights.safetensors")
    source = bench.family.rebuild(arch) + _LOAD_WEIGHTS.format(resolution=candidate.resolution)
    write_atomically(folder / "rebuild.py", source.encode())

    test = bench.data.test()
    split = bench.run.folder / TEST_SPLIT
    if not split.exists():
        test.save_split(split)
    accuracy = score(bench.device, path, test, resolution=candidate.resolution)
    # of a precision for research the file is wider than what it stands for, and so is its latency another
    measurement = None if candidate.policy.simulated else measure(bench.device, path)
    islands = () if quantized is None else float_islands(bench.device, path, quantized)
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
        "search_top1": search_top1,
        "latency_ms": None if measurement is None else measurement.latency_ms,
        "latency_interval_ms": None if measurement is None else measurement.interval_ms,
        "latency_ratio": None if measurement is None else measurement.ratio,
        "unstable": measurement is not None and measurement.unstable,
        "elsewhere": None
        if measurement is None or measurement.elsewhere is None
        else asdict(measurement.elsewhere),
        "simulated": list(candidate.policy.simulated),
        "device": bench.device.name,
        "size_bytes": candidate.size_bytes,
        "weight_bytes": candidate.weight_bytes,
        "mmacs": candidate.cost.macs / 1e6,
        "params": candidate.cost.params,
        "peak_bytes": candidate.peak_bytes,
        "resolution": candidate.resolution,
        "worst_error": candidate.worst_error,
        "float_islands": None if islands is None else [asdict(node) for node in islands],
        "quantized": candidate.is_quantized,
        "writer": candidate.writer,
        "preprocessing": bench.data.search.preprocessing(candidate.resolution),
        "precisions": {
            key.removesuffix(".precision"): str(value)
            for key, value in arch.items()
            if is_precision(key) and not bench.space.is_idle(bench.space.by_name[key], arch)
        },
        "layers": [] if graph is None else [asdict(layer) for layer in layers(graph, candidate.policy)],
        "policy": dict(candidate.policy.rules),
        **(more or {}),
    }
    write_atomically(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    return card
