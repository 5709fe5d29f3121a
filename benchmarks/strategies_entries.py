"""What `strategies.py` trains: the sizes, and the recipes that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RAMP = 0.05
"""The part of a run over which delayed shrinking lets its subnets' weight rise."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is the same for all strategies.

    Attributes:
        resolutions: of the space, in px.
        train_images: of the training split.
        test_images: that networks are scored on.
        batch_size: of training.
        budget: multiply-accumulates of a training.
        lr: the highest learning rate.
        subnets: how many are scored, smallest and largest among them.
        seeds: of first weights, batches and subnets.
        sampled: steps from which the cost of a strategy's mean step is taken.
        device: where networks are.
        judge: the split whose images networks are scored on; settings are chosen by `search` alone.
    """

    resolutions: tuple[int, ...]
    train_images: int
    test_images: int
    batch_size: int
    budget: float
    lr: float
    subnets: int
    seeds: int
    sampled: int
    device: str = "cpu"
    judge: Literal["test", "search"] = "test"


SIZES = {
    "cpu": Size((16, 20, 24), 10_000, 5000, 64, 2.4e12, 0.2, 9, 3, 400),
    "quick": Size((16, 20, 24), 10_000, 2000, 64, 3e11, 0.2, 5, 2, 100),
    "gpu": Size((16, 20, 24, 28, 32), 45_000, 10_000, 512, 1e14, 0.4, 17, 1, 400, "cuda"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table.

    Attributes:
        about: the recipe, for a person.
        train: keys of `TrainConfig` that differ from all others'.
        share: of the budget.
        ramp: the part of the run in which the weight of delayed shrinking's subnets rises.
    """

    about: str
    train: Mapping[str, Any]
    share: float = 1.0
    ramp: float = RAMP


@dataclass(frozen=True, slots=True)
class Names:
    """The entries that claims are about."""

    deps: str = "delayed-shrinking"
    deps_cheap: str = "delayed-shrinking at 0.6x"
    no_ramp: str = "delayed-shrinking, no ramp"
    from_start: str = "sandwich, cosine"
    progressive: str = "progressive-shrinking"


N = Names()
DEPS = {"strategy": "delayed-shrinking"}
ENTRIES: Mapping[str, Entry] = {
    "alone": Entry("the largest network alone: the reference for it", {"strategy": "alone"}),
    "single-path": Entry("SPOS, arXiv 1904.00420", {"strategy": "single-path"}),
    "single-path, coarse first": Entry(
        "SPOS, the lowest resolution alone in the first half", {"strategy": "single-path", "coarse": 0.5}
    ),
    "sorted-net": Entry("SortedNet, arXiv 2309.00255", {"strategy": "sorted-net"}),
    "fixed-list": Entry(
        "Starbucks, arXiv 2410.13230, 4 networks from smallest to largest",
        {"strategy": "fixed-list", "spread": 4},
    ),
    N.from_start: Entry(
        "BigNAS's sandwich, arXiv 2003.11142, with DepS's schedule",
        {"strategy": "sandwich", "constant_tail": False},
    ),
    "sandwich, constant tail": Entry("BigNAS, arXiv 2003.11142", {"strategy": "sandwich"}),
    "sandwich, alpha-divergence": Entry(
        "AlphaNet, arXiv 2102.07954",
        {"strategy": "sandwich", "constant_tail": False, "divergence": "alpha", "clip_value": 1.0},
    ),
    N.progressive: Entry("once-for-all, arXiv 1908.09791", {"strategy": "progressive-shrinking"}),
    "attentive, best": Entry(
        "AttentiveNAS BestUp, arXiv 2011.09011",
        {"strategy": "attentive", "keeps": "best", "clip_value": 1.0},
    ),
    "attentive, worst": Entry(
        "AttentiveNAS WorstUp, arXiv 2011.09011",
        {"strategy": "attentive", "keeps": "worst", "clip_value": 1.0},
    ),
    "shifting": Entry("after ShiftNAS, arXiv 2307.08300", {"strategy": "shifting"}),
    N.deps: Entry("DepS, arXiv 2407.06167", DEPS),
    N.no_ramp: Entry("DepS, subnets at full weight at once", DEPS, ramp=0.0),
    "delayed-shrinking, no sorting": Entry("DepS, channels not sorted", {**DEPS, "sort_channels": False}),
    N.deps_cheap: Entry("DepS, 0.6 of the compute", DEPS, share=0.6),
}
"""The table, in its order."""
MORE: Mapping[str, Entry] = {
    "delayed-shrinking, switch at 0.25": Entry("DepS, joining earlier", {**DEPS, "switch": 0.25}),
    "delayed-shrinking, switch at 0.75": Entry("DepS, joining later", {**DEPS, "switch": 0.75}),
    "delayed-shrinking, ramp of 0.2": Entry("DepS, a longer ramp", DEPS, ramp=0.2),
    "delayed-shrinking, alpha-divergence": Entry(
        "DepS with AlphaNet's loss", {**DEPS, "divergence": "alpha", "clip_value": 1.0}
    ),
}
"""Trained where `--only` names them."""
