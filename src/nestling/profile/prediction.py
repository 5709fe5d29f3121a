"""Latencies of networks that were not measured, predicted from networks that were: a filter, never a result.

Latencies here are ratios to the device's reference model, which repeat better than milliseconds.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

LEAST = 8
"""Networks that a model needs at least."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1)
GROUPS = 5
MIXTURES = (
    (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5),
    (0.4, 0.4, 0.2),
)  # fmt: skip
"""How much of the corrections is each operator's own, that of operators alike, that of networks alike."""
OPERATOR_LENGTHS = (0.5, 1.5)
SUMS_LENGTHS = (0.15, 0.35, 0.7)
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
USUAL_NOISE = 0.01
"""The standard error of a ratio of which nothing else is known."""
PROCESS_NOISE = 0.015
"""What a ratio changes by from process to process, however long it is measured."""
LEAST_PART = 0.1
"""An operator's time may be off by this part of the mean operator's, even where it is told to take none."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a network, as far as its time depends on it.

    Attributes:
        kind: the operator with its kernel, such as `depthwise Conv 3x3`.
        signature: what makes it the same work as another one: kind, shapes, precision, what is converted.
        precision: of its layer, such as `w8a8`.
        macs: multiply-accumulates of one image.
        activation_bytes: read and written.
        weight_bytes: of its constants.
        converted_bytes: those read that an operator of another type wrote.
    """

    kind: str
    signature: str
    precision: str
    macs: float
    activation_bytes: float
    weight_bytes: float
    converted_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Description:
    """What a model knows of a network.

    Attributes:
        sums: over its operators, by kind and precision.
        counts: how often it has each signature.
        operators: what one operator of each signature adds to the sums.
    """

    sums: Mapping[str, float]
    counts: Mapping[str, int]
    operators: Mapping[str, Mapping[str, float]]


def describe(steps: Sequence[Step]) -> Description:
    """What a model knows of a network of these operators.

    Multiply-accumulates are summed by kind, kernel and precision; operators and bytes by precision alone.

    Raises:
        ValueError: operators that differ, and have one signature.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    operators = _each_once((step.signature, _amounts(step)) for step in steps)
    counts = Counter(step.signature for step in steps)
    for signature, count in counts.items():
        for name, amount in operators[signature].items():
            sums[name] += count * amount
    return Description(dict(sums), dict(counts), operators)


def _amounts(step: Step) -> dict[str, float]:
    amounts = {
        f"{step.kind} {step.precision} calls": 1.0,
        f"{step.kind} {step.precision} macs": step.macs,
        f"{step.precision} activation bytes": step.activation_bytes,
        f"{step.precision} weight bytes": step.weight_bytes,
        "converted bytes": step.converted_bytes,
    }
    return {name: amount for name, amount in amounts.items() if amount}


def _each_once(told: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, Mapping[str, float]]:
    """Signature -> what an operator of it adds to the sums, from such pairs."""
    found: dict[str, Mapping[str, float]] = {}
    for signature, amounts in told:
        if found.setdefault(signature, amounts) != amounts:
            raise ValueError(
                f"{signature!r} is the signature of operators that differ: {dict(found[signature])} and "
                f"{dict(amounts)}"
            )
    return found


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """What `fit` found; `predict` reads it.

    Attributes:
        names: of the sums that count, in the order of the following.
        scales: what each is divided by.
        weights: what each adds to the latency; the first is a constant.
        least: a latency that the weights are never taken to tell less than.
        floor: the least time that an operator's correction is a part of.
        signatures: operators that were seen.
        operators: what each of these adds to the sums (signatures, sums).
        operator_corrections: how much each of these says about operators (signatures,).
        own: how much of that is about the same operator alone.
        alike: how much is about those alike.
        operator_length: how far the logarithms of amounts may differ and operators still be alike.
        seen: the sums of the networks that were measured, divided by their scales (N, sums).
        network_corrections: how much each of these says about networks alike (N,).
        sums_length: how far sums may differ and networks still be alike.
    """

    names: tuple[str, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    least: float
    floor: float
    signatures: tuple[str, ...]
    operators: tuple[tuple[float, ...], ...]
    operator_corrections: tuple[float, ...]
    own: float
    alike: float
    operator_length: float
    seen: tuple[tuple[float, ...], ...]
    network_corrections: tuple[float, ...]
    sums_length: float

    def to_json(self) -> str:
        """Every field as one JSON object."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> LatencyModel:
        """The model that `to_json` wrote.

        Raises:
            ValueError: `text` is something else.
        """
        try:
            told = json.loads(text)
            tables = {name: tuple(tuple(row) for row in told[name]) for name in ("operators", "seen")}
            lists = (
                "names",
                "scales",
                "weights",
                "signatures",
                "operator_corrections",
                "network_corrections",
            )
            return cls(**{**told, **tables, **{name: tuple(told[name]) for name in lists}})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a latency model ({type(error).__name__}: {error})") from None


def fit(
    described: Sequence[Description],
    latencies: Sequence[float],
    *,
    noises: Sequence[float | None] | None = None,
) -> LatencyModel:
    """A model of `latencies`, those of the networks `described`.

    It is a sum over operators, whose weights follow from all networks, times what a Gaussian process makes of
    what that gets wrong: of an operator's time, by the same and by like operators elsewhere, each as far as
    it is a part of the network's time; and of networks whose sums are alike. How much each counts is what
    predicts a network best from the others.

    Args:
        described: at least `LEAST` networks.
        latencies: of each, above zero, in any unit.
        noises: the standard error of each, as a part of it; None where it is not known.

    Raises:
        ValueError: too few networks, not as many latencies or noises, a latency that is not above zero, a
            noise below it, or operators that differ, and have one signature.
    """
    measured = np.array(latencies, dtype=np.float64)
    if len(described) != len(measured):
        raise ValueError(f"{len(described)} networks and {len(measured)} latencies; there must be as many")
    if len(measured) < LEAST:
        raise ValueError(f"{len(measured)} networks were measured; a latency model needs at least {LEAST}")
    if not (np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError(f"a latency must be above zero, not {measured.min():g}")
    trust = _trust([None] * len(measured) if noises is None else noises, len(measured))
    names = tuple(sorted({name for one in described for name in one.sums}))
    operators = _each_once(pair for one in described for pair in one.operators.items())
    signatures = tuple(sorted(operators))
    sums = _table([one.sums for one in described], names)
    scales = sums.max(axis=0)
    seen = sums / scales
    own_sums = _table([operators[signature] for signature in signatures], names)
    counts = _table([one.counts for one in described], signatures)
    weights, left_out = _cheapest(seen, measured, trust)
    rough = _with_constant(seen) @ weights
    least = 0.2 * float(np.abs(rough).min())
    # what the sum gets wrong where it has not seen the network: within what it has, it is too good
    wrong = np.log(measured / np.maximum(left_out, 0.2 * measured.min()))
    floor = LEAST_PART * float(np.mean(measured / counts.sum(axis=1)))
    parts = _parts(counts, own_sums / scales, np.maximum(rough, least), weights, floor)
    found = _process(parts, own_sums, seen, wrong, trust)
    return LatencyModel(
        names=names,
        scales=tuple(scales.tolist()),
        weights=tuple(weights.tolist()),
        least=least,
        floor=floor,
        signatures=signatures,
        operators=tuple(tuple(row) for row in own_sums.tolist()),
        operator_corrections=tuple((parts.T @ found.corrections).tolist()),
        own=found.shares[0],
        alike=found.shares[1],
        operator_length=found.operator_length,
        seen=tuple(tuple(row) for row in seen.tolist()),
        network_corrections=tuple((found.shares[2] * found.corrections).tolist()),
        sums_length=found.sums_length,
    )


def predict(model: LatencyModel, described: Sequence[Description]) -> Floats:
    """The latencies (N,) of the networks `described`, in the unit that the model was fitted in.

    Raises:
        ValueError: a network with a kind of operator, or a precision, that none of those measured had; or
            operators that differ, and have one signature.
    """
    operators = _each_once(pair for one in described for pair in one.operators.items())
    for one in described:
        unknown = sorted(set(one.sums) - set(model.names))
        if unknown:
            raise ValueError(
                f"no network that the latency model knows has {unknown[0]!r}; measure some that have"
            )
    own_sums = _table(list(operators.values()), model.names)
    counts = _table([one.counts for one in described], list(operators))
    sums = _table([one.sums for one in described], model.names) / np.array(model.scales)
    weights = np.array(model.weights)
    rough = np.maximum(_with_constant(sums) @ weights, model.least)
    parts = _parts(counts, own_sums / np.array(model.scales), rough, weights, model.floor)
    known = dict(zip(model.signatures, model.operator_corrections, strict=True))
    same = np.array([known.get(signature, 0.0) for signature in operators])
    like = _like_operators(own_sums, np.array(model.operators), model.operator_length)
    of_operators = model.own * same + model.alike * (like @ np.array(model.operator_corrections))
    of_networks = _like_sums(sums, np.array(model.seen), model.sums_length) @ model.network_corrections
    result: Floats = rough * np.exp(parts @ of_operators + of_networks)
    return result


def _trust(noises: Sequence[float | None], count: int) -> Floats:
    """How much each network counts (N,), 1 on average: the inverse of the variance of its latency."""
    if len(noises) != count:
        raise ValueError(f"{count} latencies and {len(noises)} noises; there must be as many")
    told = np.array([USUAL_NOISE if noise is None else noise for noise in noises], dtype=np.float64)
    if not (np.isfinite(told).all() and (told >= 0).all()):
        raise ValueError(f"a noise must be 0 or above, not {told.min():g}")
    inverse = 1 / (told**2 + PROCESS_NOISE**2)
    result: Floats = inverse / inverse.mean()
    return result


def _table(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Floats:
    return np.array([[row.get(name, 0.0) for name in names] for row in rows], dtype=np.float64)


def _with_constant(sums: Floats) -> Floats:
    return np.concatenate([np.ones((len(sums), 1)), sums], axis=1)


def _parts(counts: Floats, operators: Floats, rough: Floats, weights: Floats, floor: float) -> Floats:
    """The part (N, signatures) of each network's time that it spends in each operator, as the sum has it."""
    result: Floats = counts * (operators @ weights[1:] + floor) / rough[:, None]
    return result


def _cheapest(sums: Floats, latencies: Floats, trust: Floats) -> tuple[Floats, Floats]:
    """The weights (1 + sums,) of the least relative error, and what each latency would be without itself.

    No weight is below zero, as no operator gives time back: with as many sums as networks, that is what keeps
    the weights sensible. How far they are drawn to zero is judged on groups that are left out, and what these
    are told is the second result.
    """
    groups = np.array_split(np.random.default_rng(0).permutation(len(latencies)), GROUPS)
    best = (np.inf, RIDGES[0], latencies)
    for ridge in RIDGES:
        told = np.empty_like(latencies)
        for group in groups:
            rest = np.setdiff1d(np.arange(len(latencies)), group)
            found = _above_zero(sums[rest], latencies[rest], trust[rest], ridge)
            told[group] = _with_constant(sums[group]) @ found
        score = float(np.mean(trust * (told / latencies - 1) ** 2))
        if score < best[0]:
            best = (score, ridge, told)
    _, ridge, told = best
    return _above_zero(sums, latencies, trust, ridge), told


def _above_zero(sums: Floats, latencies: Floats, trust: Floats, ridge: float) -> Floats:
    """Non-negative least squares (Lawson and Hanson 1974) of relative errors, drawn to zero by `ridge`."""
    rows = _with_constant(sums) / latencies[:, None]
    drawn = ridge * math.sqrt(len(rows)) * np.eye(rows.shape[1]) * np.median(rows[:, 0])
    counted = np.sqrt(trust)
    wanted = np.concatenate([counted, np.zeros(rows.shape[1])])
    weights: Floats = nnls(np.concatenate([rows * counted[:, None], drawn]), wanted)[0]
    return weights


@dataclass(frozen=True, slots=True)
class _Process:
    """A Gaussian process: what each of its three parts counts, its lengths, its corrections (N,)."""

    shares: tuple[float, float, float]
    operator_length: float
    sums_length: float
    corrections: Floats


def _process(parts: Floats, operators: Floats, sums: Floats, wrong: Floats, trust: Floats) -> _Process:
    """The Gaussian process that tells `wrong` of a network best.

    Each is judged by leaving out one network at a time, for which there is a closed form (Rasmussen and
    Williams 2006, section 5.4.2). No correction at all is among what is tried. A network's noise is the
    larger the less it is to be trusted.
    """
    none = _Process((0.0, 0.0, 0.0), OPERATOR_LENGTHS[0], SUMS_LENGTHS[0], np.zeros_like(wrong))
    best = (float(np.mean(trust * wrong**2)), none)
    counted = np.sqrt(trust)
    own = parts @ parts.T
    alike = {
        length: parts @ _like_operators(operators, operators, length) @ parts.T for length in OPERATOR_LENGTHS
    }
    by_sums = {length: _like_sums(sums, sums, length) for length in SUMS_LENGTHS}
    for mixture in MIXTURES:
        # a length counts only where its part does
        for operator_length in OPERATOR_LENGTHS if mixture[1] else OPERATOR_LENGTHS[:1]:
            for sums_length in SUMS_LENGTHS if mixture[2] else SUMS_LENGTHS[:1]:
                kinds = (own, alike[operator_length], by_sums[sums_length])
                shares = tuple(
                    part / float(np.mean(np.diag(kind))) for part, kind in zip(mixture, kinds, strict=True)
                )
                like = sum(share * kind for share, kind in zip(shares, kinds, strict=True))
                values, vectors = np.linalg.eigh(counted[:, None] * like * counted)
                turned = vectors.T @ (counted * wrong)
                for noise in NOISES:
                    inverse = 1 / (np.maximum(values, 0) + noise)
                    weighted = vectors @ (inverse * turned)
                    errors = weighted / ((vectors**2) @ inverse)
                    score = float(np.mean(errors**2))
                    if score < best[0]:
                        first, second, third = shares
                        best = (
                            score,
                            _Process(
                                (first, second, third), operator_length, sums_length, counted * weighted
                            ),
                        )
    return best[1]


def _like_operators(operators: Floats, others: Floats, length: float) -> Floats:
    """How alike operators are to others (S, T), from 0 to 1, by the logarithms of what each adds to the sums.

    Operators of another kind or precision add to other sums, and are not alike.
    """
    result: Floats = np.exp(-_distances(np.log1p(operators), np.log1p(others)) / (2 * length**2))
    return result


def _like_sums(sums: Floats, others: Floats, length: float) -> Floats:
    """How alike networks are to others (N, M), from 0 to 1, by their sums, each divided by its largest value.

    It falls with their distance, in units of `length` times the root of how many sums there are.
    """
    result: Floats = np.exp(-_distances(sums, others) / (2 * length**2 * sums.shape[1]))
    return result


def _distances(rows: Floats, others: Floats) -> Floats:
    """The squares of the distances (N, M) between rows."""
    squares = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None, :] - 2 * rows @ others.T
    result: Floats = np.maximum(squares, 0.0)
    return result
