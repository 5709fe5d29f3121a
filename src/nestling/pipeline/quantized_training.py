"""One subnet trained in few bits: what it becomes is written as it stands, without calibration afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nestling.config import ConfigError, TrainConfig
from nestling.models.building import build_shapes
from nestling.models.graph import Graph, Untraceable, trace
from nestling.pipeline.alone import train_network
from nestling.pipeline.candidate import Candidate, file_metadata
from nestling.pipeline.listening import Listener
from nestling.pipeline.policies import quant_policy
from nestling.pipeline.verifying import verify_candidate
from nestling.pipeline.workbench import Workbench
from nestling.pipeline.writing import write_file
from nestling.quant import PRECISIONS, Quantized, Range, observe, place
from nestling.quant.attention import Factors, reparameterize
from nestling.quant.layers import bits
from nestling.quant.learning import LearnedGraph, Learning, Scales
from nestling.quant.quantizing import prepared
from nestling.search import EvaluationFailed
from nestling.space import Arch
from nestling.train.strategies import Alone
from nestling.train.teachers import SoftLabels

Method = Literal["lsq", "ofq"]
METHODS: tuple[Method, ...] = ("lsq", "ofq")

LEARNING, ANNEALING = "learning", "annealing"
"""The folders of checkpoints of each part of a training."""
SCALES: Mapping[Method, Scales] = {"lsq": "learned", "ofq": "statistical"}
ANNEALED_PART = 0.1
"""Of the epochs, the last ones of OFQ, in which only undecided weights learn: 30 after 300 in its recipes."""
MARGIN = 0.005
"""How far from the middle between two integers a weight is undecided, as a part of a step; OFQ's."""
EPOCHS, LR_PART = 25.0, 0.1
EPOCHS_8_BITS, LR_PART_8_BITS = 1.0, 0.01
"""LSQ (arXiv 1902.08153) trains with a tenth of the learning rate for 90 epochs, and networks of 8 bits with
a hundredth of it for one. Once-for-all's 25 epochs take the place of the 90."""


@dataclass(frozen=True, slots=True)
class Anew:
    """A quantized network as it begins, and what its training goes by.

    Attributes:
        plain: in 32-bit floats, queries and keys of attention as one product where `learning` says so.
        graph: the same with its regions in 16-bit floats.
        ranges: of `graph`, as observed.
        learning: how, without a margin.
    """

    plain: Graph
    graph: Graph
    ranges: Mapping[str, Range]
    learning: Learning

    def network(self, *, margin: float | None = None) -> LearnedGraph:
        """The network to train."""
        return LearnedGraph(self.graph, self.ranges, replace(self.learning, margin=margin))


def defaults(bench: Workbench, arch: Arch) -> tuple[float, float]:
    """The epochs and the part of the run's learning rate for `arch`: by the fewest bits that it computes in.

    Raises:
        ConfigError: all of it is in floats.
    """
    try:  # what the network has: choices of layers that it lacks count nothing
        graph = trace(build_shapes(bench.family.build, arch).eval(), resolution=bench.resolution(arch))
        rules = quant_policy(bench.family, arch, graph, keep=bench.config.quant.keep).rules
    except Untraceable:  # all of it is in floats
        rules = ()
    quantized = [PRECISIONS[name] for _, name in rules if PRECISIONS[name].weight is not None]
    if not quantized:
        raise ConfigError(
            f"{arch.key} has no layers in integers, so there is nothing to train in few bits; choose a "
            "precision for some, or fine-tune it as it is"
        )
    fewest = min(min(bits(precision)) for precision in quantized)
    return (EPOCHS, LR_PART) if fewest < 8 else (EPOCHS_8_BITS, LR_PART_8_BITS)


def train_quantized(
    bench: Workbench,
    candidate: Candidate,
    path: Path,
    *,
    method: Method,
    strategy: Alone,
    config: TrainConfig,
    teachers: SoftLabels | None,
    folder: Path,
    listener: Listener,
    told: Mapping[str, str],
) -> tuple[Candidate, dict[str, Any]]:
    """`candidate` after training in its precisions, its file at `path`; and what training cost.

    Weights begin as they are in floats, with batch normalization folded, and scales as the run's `[quant]
    calibration` finds them; what else `[quant]` says of rounding is left to training. The file holds what
    was trained, to the last bit. The plain network and its weights stay those of `candidate`, since
    normalization is no more: what was learned is in the graph, and in the file.

    Args:
        bench: the run.
        candidate: whose float network is trained.
        path: of the new file.
        method: `lsq`: scales are learned (arXiv 1902.08153). `ofq` (arXiv 2302.02210): scales of weights
            below 8 bits are statistics; queries and keys of vision transformers become one product where
            their layers have fewer than 8 bits; in the last tenth of the epochs only undecided weights learn.
        strategy: what it learns from.
        config: how.
        teachers: outside the network.
        folder: for checkpoints; the same call continues from them.
        listener: hears of every step.
        told: what the file says of itself, besides its arch.

    Raises:
        TrainingStopped: the loss runs away.
        EvaluationFailed: the file does not compute what was trained.
    """
    begins = begin(bench, candidate, method=method)
    annealed = ANNEALED_PART if method == "ofq" else 0.0
    plain = config.model_copy(update={**_WITHOUT, "epochs": config.epochs * (1 - annealed)})
    learn = partial(
        train_network, bench, candidate.arch, strategy=strategy, teachers=teachers, listener=listener
    )
    network = learn(
        begins=begins.network(),
        build=lambda _: begins.network(),
        config=plain,
        folder=folder / LEARNING,
    )
    if annealed:
        state = network.state_dict()
        network = begins.network(margin=MARGIN)
        network.load_state_dict(state)
        # sure weights stay: none decays, and the rate is as low as a cosine's end
        last = {"epochs": config.epochs * annealed, "lr": config.lr * ANNEALED_PART, "weight_decay": 0.0}
        network = learn(
            begins=network,
            build=lambda _: begins.network(margin=MARGIN),
            config=plain.model_copy(update=last),
            folder=folder / ANNEALING,
        )
    assert isinstance(network, LearnedGraph)
    quantized = network.settled()
    _write(bench, candidate.arch, quantized, path, told)
    more = macs(begins.plain) - macs(_graph(candidate))
    counted = replace(candidate.cost, macs=candidate.cost.macs + more)
    floats = candidate.floats.changed(graph=begins.plain, counted=counted)
    trained = replace(candidate, path=path, floats=floats, quantized=quantized)
    return replace(trained, worst_error=verify_candidate(bench, trained)), _cost(record_folders(folder))


def record_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints within `folder`, a training's, in the order of its parts."""
    parts = [folder / name for name in (LEARNING, ANNEALING) if (folder / name).exists()]
    return parts or [folder]


def _graph(candidate: Candidate) -> Graph:
    """Of what is to be trained as it is written.

    Raises:
        EvaluationFailed: it cannot be traced.
    """
    traced = candidate.floats.traced
    if not isinstance(traced, Graph):
        raise EvaluationFailed(f"{candidate.arch.key} cannot be trained in its precisions: {traced}")
    return traced


def begin(bench: Workbench, candidate: Candidate, *, method: Method) -> Anew:
    """`candidate` as it begins to train in its precisions."""
    policy, quant = candidate.policy, bench.config.quant
    graph, factors = _graph(candidate), dict[str, Factors]()
    if method == "ofq":
        graph, factors = reparameterize(graph, only=lambda layer: min(bits(policy.precision(layer))) < 8)
    narrow = bench.device.fingerprint.int8_saturates
    exact = prepared(graph, policy)
    ranges = observe(
        place(exact, policy),
        policy,
        tuple(bench.calibration_images(candidate.resolution)),
        method=quant.calibration,
        weights=quant.weights,
        shared=quant.shared,
        reduce_range=narrow,
    )
    how = Learning(policy, scales=SCALES[method], weights=quant.weights, reduce_range=narrow, factors=factors)
    return Anew(graph, exact, ranges, how)


_WITHOUT: Mapping[str, object] = {
    "amp": "off",  # what is rounded in halves is not what the file rounds
    "average": 0.0,  # the average of weights that change sides is on neither
    "compile": False,
    "curriculum": "none",
    "dropout": 0.0,
    "drop_path": 0.0,
    "warmup_epochs": 0.0,
    "zero_last_norms": False,
    "quantize": False,
}
"""Of a recipe, what is not for a graph that learns in few bits."""


def _write(bench: Workbench, arch: Arch, quantized: Quantized, path: Path, told: Mapping[str, str]) -> None:
    metadata = {**file_metadata(bench, arch), **told}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(quantized, path, dynamic_batch=bench.config.export.dynamic_batch, metadata=metadata)


def macs(graph: Graph) -> int:
    """The multiply-accumulates of `graph`, for one image."""
    return sum(graph.macs(operator) for operator in graph.operators)


def _cost(parts: list[Path]) -> dict[str, Any]:
    """What all parts of a training cost together."""
    spent = [json.loads((part / "training.json").read_text())["spent"] for part in parts]
    total = {key: sum(one[key] for one in spent) for key in spent[0] if key != "joules"}
    joules = {
        part: None
        if any(one["joules"].get(part) is None for one in spent)
        else sum(one["joules"][part] for one in spent)
        for part in spent[0]["joules"]
    }
    return {**total, "joules": joules}
