from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.config import load_config
from nestling.models.graph import Graph
from nestling.pipeline.candidate import Candidate, cost_metrics, float_network, write_candidate
from nestling.pipeline.floats import KEPT, FloatNetwork, FloatNetworks
from nestling.pipeline.workbench import Workbench
from nestling.profile import OptimizedOp
from nestling.quant import QuantPolicy
from nestling.quant.regions import WEIGHT_AXES
from nestling.run import Run
from nestling.search import EvaluationFailed
from nestling.space import Arch

TESTS = Path(__file__).parents[2]


class Runtime:
    """Stands for a device: runs files here, and claims to compute on integers what a file stores so."""

    fingerprint = SimpleNamespace(int8_saturates=False, device="fake", instructions=())

    def optimized_ops(self, path: Path) -> tuple[OptimizedOp, ...]:
        nodes = onnx.load(path).graph.node
        integers = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
        return tuple(
            OptimizedOp(node.name, "QLinearConv")
            for node in nodes
            if len(node.input) > 1 and node.input[1] in integers
        )

    def predict(self, path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        rows = [np.asarray(session.run(None, {"images": image[None]})[0]) for image in images]
        return np.concatenate(rows)


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """A run of the toy, its supernet untrained."""
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    vars(bench)["supernet"] = bench.new_supernet().eval()
    vars(bench)["device"] = Runtime()
    return bench


def arch_with(bench: Workbench, precision: str) -> Arch:
    """The smallest arch of the toy's space, all of whose precisions are `precision`."""
    space = bench.space
    precisions = {c.name: precision for c in space.choices if c.name.endswith(".precision")}
    return space.canonical({**space.smallest, **precisions})


def written(bench: Workbench, arch: Arch) -> bytes:
    path = bench.candidate_path(arch)
    write_candidate(bench, arch, path)
    return path.read_bytes()


def mixed(bench: Workbench) -> Arch:
    """The arch in w8a8 but for one choice."""
    arch = arch_with(bench, "w8a8")
    name = next(name for name in arch if name.endswith(".precision"))
    return bench.space.canonical({**arch, name: "fp32"})


def test_a_file_does_not_depend_on_which_came_before(bench: Workbench) -> None:
    archs = [mixed(bench), arch_with(bench, "w8a8"), arch_with(bench, "fp32")]
    fresh = []
    for arch in archs:
        bench.floats.clear()
        fresh.append(written(bench, arch))
    assert len(set(fresh)) == len(archs)
    bench.floats.clear()
    for order in (archs, archs[::-1]):
        assert [written(bench, arch) for arch in order] == [fresh[archs.index(arch)] for arch in order]


def test_pytorch_leaves_a_core_to_the_worker_and_takes_it_back(bench: Workbench) -> None:
    threads: list[int] = []
    network = float_network(bench, arch_with(bench, "fp32")).network
    network.register_forward_hook(lambda *_: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        written(bench, arch_with(bench, "fp32"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads[0] == 3  # traced
    assert set(threads[1:]) == {2}  # compared, counted


def test_another_policy_of_a_network_reads_no_images(bench: Workbench) -> None:
    read = 0
    images, again = bench.calibration_images, bench.recalibration_images

    def counted(of: Any) -> Any:
        def batches(resolution: int) -> Iterator[Tensor]:
            nonlocal read
            read += 1
            return iter(of(resolution))

        return batches

    vars(bench).update(calibration_images=counted(images), recalibration_images=counted(again))
    written(bench, arch_with(bench, "w8a8"))
    assert read == 2
    written(bench, mixed(bench))
    written(bench, arch_with(bench, "fp32"))
    assert read == 2


def test_archs_that_differ_in_precisions_are_one_network(bench: Workbench) -> None:
    first = float_network(bench, arch_with(bench, "w8a8"))
    assert float_network(bench, arch_with(bench, "fp32")) is first
    assert float_network(bench, bench.space.largest) is not first


def test_the_networks_used_last_are_kept() -> None:
    kept = FloatNetworks()
    made: list[Arch] = []

    def get(number: int) -> None:
        arch = Arch((("width", number), ("s1.precision", "fp32")))

        def make() -> FloatNetwork:
            made.append(arch)
            return FloatNetwork(nn.Identity(), resolution=4, image=torch.zeros(1, 3, 4, 4))

        kept.get(arch, make)

    for number in range(KEPT):
        get(number)
    get(0)
    get(KEPT)
    assert len(made) == KEPT + 1
    get(0)
    assert len(made) == KEPT + 1
    get(1)
    assert len(made) == KEPT + 2


class Waves(nn.Module):
    """What no translation covers, between two layers."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * (pixels - 2) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.sin(self.stem(images)).flatten(1))
        return logits


@pytest.fixture
def odd(bench: Workbench) -> Workbench:
    """The toy, all of whose networks hold an operation that cannot be traced."""
    arch = bench.space.smallest
    torch.manual_seed(0)
    network = Waves(bench.resolution(arch), len(bench.data.classes)).eval()
    vars(bench)["supernet"] = SimpleNamespace(materialize=lambda _: network)
    return bench


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_network_that_cannot_be_traced_is_written_by_the_official_exporter(odd: Workbench) -> None:
    arch = arch_with(odd, "fp32")
    candidate = write_candidate(odd, arch, odd.candidate_path(arch))
    model = onnx.load(candidate.path)
    assert candidate.writer == "torch.onnx.export"
    assert candidate.worst_error < 1e-5
    assert "Sin" in {node.op_type for node in model.graph.node}
    assert {entry.key for entry in model.metadata_props} >= {"nestling.arch", "nestling.classes"}
    assert candidate.graph is None
    assert not candidate.is_quantized
    assert candidate.weight_bytes == 4 * sum(p.numel() for p in candidate.network.parameters())
    assert candidate.peak_bytes > 0


def test_precisions_of_a_network_that_cannot_be_traced_are_refused(odd: Workbench) -> None:
    arch = arch_with(odd, "w8a8")
    with pytest.raises(EvaluationFailed, match=r"'w8a8', but .*sin cannot be traced.* only in fp32"):
        write_candidate(odd, arch, odd.candidate_path(arch))
    assert not odd.candidate_path(arch).exists()


def test_a_traced_candidate_is_written_by_nestling(bench: Workbench) -> None:
    arch = arch_with(bench, "fp32")
    candidate: Candidate = write_candidate(bench, arch, bench.candidate_path(arch))
    assert candidate.writer == "nestling"
    assert isinstance(candidate.graph, Graph)


def test_a_size_for_research_is_that_of_a_file_with_constants_of_few_bits(bench: Workbench) -> None:
    arch = arch_with(bench, "w8a8")
    exact = write_candidate(bench, arch, bench.candidate_path(arch))
    sizes = {}
    for name in ("w8a8", "w4a8", "w2a8"):
        sizes[name] = cost_metrics(replace(exact, policy=QuantPolicy((("", name),))))["size_mb"] * 1e6
    of_four_bits = replace(exact, policy=QuantPolicy((("", "w4a8"),)))
    assert of_four_bits.size_bytes < exact.size_bytes == exact.path.stat().st_size
    of_two_bits = replace(exact, policy=QuantPolicy((("", "w2a8"),))).weight_bytes
    assert sizes["w8a8"] == exact.path.stat().st_size
    # the file's nodes and names count for all
    assert of_two_bits < sizes["w2a8"] < sizes["w4a8"] < sizes["w8a8"]
    assert exact.graph is not None
    layers = [o.weight for o in exact.graph.operators if o.weight is not None and o.kind in WEIGHT_AXES]
    saved = sum(weight.numel() / 2 for weight in layers)
    assert sizes["w8a8"] - sizes["w4a8"] == pytest.approx(saved, abs=len(layers))
