"""How well latencies are told of networks that were left out when it was learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import kendalltau

from nestling.profile.lookup_table import fit_table, look_up
from nestling.profile.prediction import Description, Floats, fit, predict

LEAST_TOLD = 2
"""Networks that have an order."""
Learner = Callable[[Sequence[int], Sequence[int]], Floats]
"""Learns from the networks of some numbers, and gives the latencies of those of others."""


def by_model(
    described: Sequence[Description],
    latencies: Sequence[float],
    *,
    noises: Sequence[float | None] | None = None,
) -> Learner:
    """Learns a `LatencyModel`, see `fit`. A network of which it knows not every operator has nan."""
    trusted = [None] * len(latencies) if noises is None else noises

    def learn(known: Sequence[int], asked: Sequence[int]) -> Floats:
        model = fit(
            [described[index] for index in known],
            [latencies[index] for index in known],
            noises=[trusted[index] for index in known],
        )
        told = np.full(len(asked), np.nan)
        for place, index in enumerate(asked):
            if described[index].sums.keys() <= set(model.names):
                told[place] = predict(model, [described[index]])[0]
        return told

    return learn


def by_macs(macs: Sequence[float], latencies: Sequence[float]) -> Learner:
    """Learns a constant and a factor of the multiply-accumulates, of least relative error in squares."""
    counted, measured = np.array(macs, dtype=np.float64), np.array(latencies, dtype=np.float64)

    def learn(known: Sequence[int], asked: Sequence[int]) -> Floats:
        rows = np.stack([np.ones(len(known)), counted[list(known)]], axis=1) / measured[list(known), None]
        (constant, factor), *_ = np.linalg.lstsq(rows, np.ones(len(known)), rcond=None)
        told: Floats = constant + factor * counted[list(asked)]
        return told

    return learn


def by_table(
    blocks: Mapping[str, float], networks: Sequence[Sequence[str]], latencies: Sequence[float]
) -> Learner:
    """Learns a lookup table's overheads; what `blocks` take alone is known beforehand, see `fit_table`.

    A network with a block that was not measured teaches nothing, and has nan; so have all where none teaches.
    """
    whole = [set(network) <= blocks.keys() for network in networks]

    def learn(known: Sequence[int], asked: Sequence[int]) -> Floats:
        taught = [index for index in known if whole[index]]
        told = np.full(len(asked), np.nan)
        if not taught:
            return told
        table = fit_table(blocks, [networks[i] for i in taught], [latencies[i] for i in taught])
        for place, index in enumerate(asked):
            if whole[index]:
                told[place] = look_up(table, [networks[index]])[0]
        return told

    return learn


def held_out(count: int, learn: Learner, *, parts: int = 5, seed: int = 0) -> Floats:
    """The latency (count,) of every network as it is learnt from the others: without those of its group.

    Args:
        count: of the networks.
        learn: from which networks to which.
        parts: random groups of about the same size.
        seed: of the groups.

    Raises:
        ValueError: what `learn` raises of too few networks.
    """
    told = np.full(count, np.nan)
    for group in np.array_split(np.random.default_rng(seed).permutation(count), parts):
        asked = set(group.tolist())
        told[group] = learn([index for index in range(count) if index not in asked], group.tolist())
    return told


@dataclass(frozen=True, slots=True)
class Quality:
    """How well latencies are told.

    Attributes:
        mape: the mean absolute error, as a part of what was measured.
        tau: Kendall's tau-b with what was measured: 1 where the order is the same.
        told: of how many networks something is told; it may be judged on fewer, see `qualities`.
    """

    mape: float
    tau: float
    told: int


def quality(told: Floats, measured: Sequence[float]) -> Quality:
    """How well the latencies `told` (N,), nan where none is told, agree with the `measured` ones (N,)."""
    known = np.isfinite(told)
    right = np.array(measured, dtype=np.float64)[known]
    errors = np.abs(told[known] / right - 1)
    tau = kendalltau(told[known], right).statistic
    return Quality(float(errors.mean()), float(tau), int(known.sum()))


def qualities(told: Mapping[str, Floats], measured: Sequence[float]) -> dict[str, Quality]:
    """How well each way tells latencies, all of them judged on the networks that all of them can tell.

    A way that cannot tell what is hard to tell would look better than one that tries. One that tells fewer
    than two networks has nan, and leaves the others as they are.

    Args:
        told: latencies (N,) by the way's name, nan where it tells none.
        measured: the right ones (N,).
    """
    counts = {name: int(np.isfinite(one).sum()) for name, one in told.items()}
    useful = [np.isfinite(one) for name, one in told.items() if counts[name] >= LEAST_TOLD]
    common = np.logical_and.reduce(useful) if useful else np.zeros(len(measured), dtype=bool)
    found = {}
    for name, one in told.items():
        judged = np.where(common, one, np.nan)
        figures = Quality(math.nan, math.nan, 0)
        if np.isfinite(judged).sum() >= LEAST_TOLD:
            figures = quality(judged, measured)
        found[name] = replace(figures, told=counts[name])
    return found
