"""ReportContent: everything that a report shows, as plain values; also the report's JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from nestling.search import Limit, Objective
from nestling.space import Choice, Value, is_idle

BYTES_PER_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class LayerBits:
    """One convolution or linear layer, and in how many bits it computes."""

    name: str
    kind: str
    """Such as `Conv` or `depthwise Conv`."""
    precision: str
    weight_bits: float
    activation_bits: float
    """Of what it reads."""
    macs: int
    params: int


@dataclass(frozen=True, slots=True)
class Member:
    """One network of the front: what was measured from its file.

    Accuracies are fractions in [0, 1]; paths are relative to the report's folder.

    Raises:
        ValueError: an accuracy outside [0, 1], or a figure that is not finite.
    """

    name: str
    arch_key: str
    decisions: Mapping[str, Value]
    test_top1: float
    test_top1_interval: tuple[float, float]
    """95 % interval of the test accuracy, low and high."""
    search_top1: float
    latency_ms: float | None
    """None where latency was not measured."""
    latency_interval_ms: tuple[float, float] | None
    latency_ratio: float | None
    """To the device's reference model, timed call by call beside this one."""
    unstable: bool
    """The latency varied too much to be trusted."""
    size_bytes: int
    mmacs: float
    params: int
    peak_bytes: int
    resolution: int
    worst_error: float
    """Largest difference of a logit between the file and PyTorch, as a fraction of the logits' scale."""
    onnx_path: str
    weights_path: str
    rebuild_path: str
    precisions: Mapping[str, str]
    """Stage to precision."""
    layers: tuple[LayerBits, ...] = ()
    """In order; none where nobody wrote them down."""

    def __post_init__(self) -> None:
        fractions = {
            "test_top1": self.test_top1,
            "test_top1_interval[0]": self.test_top1_interval[0],
            "test_top1_interval[1]": self.test_top1_interval[1],
            "search_top1": self.search_top1,
        }
        for name, value in fractions.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} of {self.name!r} must be a fraction in [0, 1], not {value!r}")
        for name, value in self.costs.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} of {self.name!r} must be finite and not negative, not {value!r}")

    @property
    def costs(self) -> dict[str, float]:
        """Cost metric to value, for every metric that was measured."""
        costs = {
            "size_mb": self.size_bytes / BYTES_PER_MB,
            "mmacs": self.mmacs,
            "peak_mb": self.peak_bytes / BYTES_PER_MB,
        }
        return costs if self.latency_ms is None else {"latency_ms": self.latency_ms, **costs}

    def cost(self, metric: str) -> float | None:
        """The value of the cost `metric`; None where it was not measured."""
        return self.costs.get(metric)

    def cost_interval(self, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of `metric`; None where it is exact or was not measured."""
        return self.latency_interval_ms if metric == "latency_ms" else None


@dataclass(frozen=True, slots=True)
class Tuned:
    """One network that was trained by itself: what was measured on its file, and on that of before.

    Accuracies are fractions in [0, 1]; paths are relative to the report's folder.
    """

    name: str
    arch_key: str
    from_scratch: bool
    epochs: float
    teacher: str
    """`largest`, `parent` (the network itself, in floats), `none`, or a model's name."""
    search_before: float
    search_after: float
    test_before: float
    test_before_interval: tuple[float, float]
    test_after: float
    test_after_interval: tuple[float, float]
    latency_ms: float | None
    unstable: bool
    onnx_path: str
    before_path: str
    qat: str | None = None
    """How it was trained in its precisions, `lsq` or `ofq`; None: in floats."""


@dataclass(frozen=True, slots=True)
class TriedArch:
    """One trial of the search. Its accuracy `metrics["top1"]` comes from the search split."""

    number: int
    arch_key: str
    decisions: Mapping[str, Value]
    state: Literal["complete", "failed", "duplicate"]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    reason: str = ""
    """Why it failed."""
    seconds: float = 0.0
    """What evaluating it took."""
    on_front: bool = False

    def metric(self, name: str) -> float | None:
        """The value of `name` where the trial is complete and the value finite, else None."""
        value = self.metrics.get(name)
        if self.state != "complete" or value is None or not math.isfinite(value):
            return None
        return value


@dataclass(frozen=True, slots=True)
class TrainingPoint:
    """One line of the training log; None where a figure was not taken."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    largest_top1: float | None = None
    smallest_top1: float | None = None
    lr: float | None = None
    images_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class ReportContent:
    """What a report shows. Every collection may be empty; figures in `training` and `trials` may be missing.

    Raises:
        ValueError: two members with the same arch, or two trials with the same number.
    """

    title: str
    created: str
    """ISO date."""
    command: str
    """Repeats the run."""
    members: tuple[Member, ...] = ()
    improvement: tuple[float, float, float] | None = None
    """The part by which the front is more accurate than networks of the same MACs that nobody chose, and its
    95 % interval, low and high, on the search images; None where nobody looked."""
    tuned: tuple[Tuned, ...] = ()
    """Networks that were trained further, or anew, by themselves."""
    objectives: tuple[Objective, ...] = ()
    limits: tuple[Limit, ...] = ()
    trials: tuple[TriedArch, ...] = ()
    choices: tuple[Choice, ...] = ()
    """The open choices of the space."""
    sensitivity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Layer of the largest network to precision to the divergence, in nats, where it alone is quantized."""
    training: tuple[TrainingPoint, ...] = ()
    shrinking_step: int | None = None
    """The training step at which smaller networks joined the largest; None where they always took part."""
    training_cost: Mapping[str, str] = field(default_factory=dict)
    """What training cost, in words."""
    device_name: str = ""
    device: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    space_summary: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage to the time it took."""
    config: str = ""
    """The configuration, as the run's folder holds it."""
    notes: tuple[str, ...] = ()
    """Warnings that a reader must see."""

    def __post_init__(self) -> None:
        for what, names in (
            ("members share the arch key", [member.arch_key for member in self.members]),
            ("trials share the number", [str(trial.number) for trial in self.trials]),
        ):
            twice = [name for name, times in Counter(names).items() if times > 1]
            if twice:
                raise ValueError(f"two {what} {twice[0]}; each must have its own")

    @property
    def cost_metrics(self) -> tuple[str, ...]:
        """The costs that the search minimised, in order; without any, the latency or else the MACs."""
        costs = tuple(goal.name for goal in self.objectives if goal.direction == "minimise")
        if costs:
            return costs
        measured = any(member.latency_ms is not None for member in self.members)
        return ("latency_ms",) if measured else ("mmacs",)

    @property
    def ordered_members(self) -> tuple[Member, ...]:
        """The members from cheapest to dearest by the first cost; those without it last."""
        metric = self.cost_metrics[0]

        def rank(member: Member) -> tuple[float, float]:
            cost = member.cost(metric)
            return (math.inf if cost is None else cost, member.test_top1)

        return tuple(sorted(self.members, key=rank))

    def idle(self, decisions: Mapping[str, Value]) -> set[str]:
        """The names of the choices that change nothing about the network that `decisions` describe."""
        by_name = {choice.name: choice for choice in self.choices}
        return {name for name, choice in by_name.items() if is_idle(choice, decisions, choices=by_name)}

    def to_json(self) -> str:
        """The whole content as JSON; a number that is not finite is written as null."""
        return _CONTENT.dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str) -> ReportContent:
        """The content that `to_json` wrote.

        Raises:
            ValueError: `text` is not JSON, or a field is missing or of another type; the message names it.
        """
        return _CONTENT.validate_json(text)


_CONTENT: TypeAdapter[ReportContent] = TypeAdapter(ReportContent)
