"""Latencies of networks that were not measured, predicted from networks that were: a filter, never a result.

Latencies here are ratios to the device's reference model, which repeat better than milliseconds.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

LEAST = 8
"""Networks that a model needs at least."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1)
GROUPS = 5
SHARES = (0.0, 0.2, 0.5, 0.8)
LENGTHS = (0.7, 1.4, 2.8)
NOISES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a network, as far as its time depends on it.

    Attributes:
        kind: the operator with its kernel, such as `depthwise Conv 3x3`.
        signature: what makes it the same work as another one: kind, shapes, precision.
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
    """

    sums: Mapping[str, float]
    counts: Mapping[str, int]


def describe(steps: Sequence[Step]) -> Description:
    """What a model knows of a network of these operators.

    Multiply-accumulates are summed by kind, kernel and precision; operators and bytes by precision alone.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    for step in steps:
        sums[f"{step.kind} {step.precision} calls"] += 1
        for name, amount in (
            (f"{step.kind} {step.precision} macs", step.macs),
            (f"{step.precision} activation bytes", step.activation_bytes),
            (f"{step.precision} weight bytes", step.weight_bytes),
            ("converted bytes", step.converted_bytes),
        ):
            if amount:
                sums[name] += amount
    return Description(dict(sums), dict(Counter(step.signature for step in steps)))


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """What `fit` found; `predict` reads it.

    Attributes:
        names: of the sums that count, in the order of the following.
        scales: what each is divided by.
        weights: what each adds to the latency; the first is a constant.
        signatures: operators that were seen, in the order of the columns of `seen_counts`.
        seen: the sums of the networks that were measured, divided by their scales (N, sums).
        seen_counts: their operators (N, signatures).
        corrections: how much each of these says about another one (N,).
        share: of the likeness that is having the same operators; the rest is having like sums.
        length: how far sums may differ and still be alike.
    """

    names: tuple[str, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    signatures: tuple[str, ...]
    seen: tuple[tuple[float, ...], ...]
    seen_counts: tuple[tuple[int, ...], ...]
    corrections: tuple[float, ...]
    share: float
    length: float

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
            return cls(
                names=tuple(told["names"]),
                scales=tuple(told["scales"]),
                weights=tuple(told["weights"]),
                signatures=tuple(told["signatures"]),
                seen=tuple(tuple(row) for row in told["seen"]),
                seen_counts=tuple(tuple(row) for row in told["seen_counts"]),
                corrections=tuple(told["corrections"]),
                share=told["share"],
                length=told["length"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a latency model ({type(error).__name__}: {error})") from None


def fit(described: Sequence[Description], latencies: Sequence[float]) -> LatencyModel:
    """A model of `latencies`, those of the networks `described`.

    It is a sum over operators, whose weights follow from all networks, times what a Gaussian process makes of
    the networks that are alike: because they have operators of the same shapes, or about the same sums. How
    much each part counts is what predicts a network best from the others.

    Args:
        described: at least `LEAST` networks.
        latencies: of each, above zero, in any unit.

    Raises:
        ValueError: too few networks, not as many latencies, or one that is not above zero.
    """
    measured = np.array(latencies, dtype=np.float64)
    if len(described) != len(measured):
        raise ValueError(f"{len(described)} networks and {len(measured)} latencies; there must be as many")
    if len(measured) < LEAST:
        raise ValueError(f"{len(measured)} networks were measured; a latency model needs at least {LEAST}")
    if not (np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError(f"a latency must be above zero, not {measured.min():g}")
    names = tuple(sorted({name for one in described for name in one.sums}))
    signatures = tuple(sorted({signature for one in described for signature in one.counts}))
    sums = _table([one.sums for one in described], names)
    scales = sums.max(axis=0)
    seen = sums / scales
    counts = _table([one.counts for one in described], signatures)
    weights, left_out = _cheapest(seen, measured)
    # what the sum gets wrong where it has not seen the network: within what it has, it is too good
    wrong = np.log(measured / np.maximum(left_out, _least(measured)))
    share, length, corrections = _process(seen, counts, wrong)
    return LatencyModel(
        names=names,
        scales=tuple(scales.tolist()),
        weights=tuple(weights.tolist()),
        signatures=signatures,
        seen=tuple(tuple(row) for row in seen.tolist()),
        seen_counts=tuple(tuple(map(int, row)) for row in counts.tolist()),
        corrections=tuple(corrections.tolist()),
        share=share,
        length=length,
    )


def predict(model: LatencyModel, described: Sequence[Description]) -> Floats:
    """The latencies (N,) of the networks `described`, in the unit that the model was fitted in.

    Raises:
        ValueError: a network with a kind of operator, or a precision, that none of those measured had.
    """
    for one in described:
        unknown = sorted(set(one.sums) - set(model.names))
        if unknown:
            raise ValueError(
                f"no network that the latency model knows has {unknown[0]!r}; measure some that have"
            )
    sums = _table([one.sums for one in described], model.names) / np.array(model.scales)
    counts = _table([one.counts for one in described], model.signatures)
    seen, seen_counts = np.array(model.seen), np.array(model.seen_counts, dtype=np.float64)
    like = _likeness(sums, counts, seen, seen_counts, share=model.share, length=model.length)
    rough = _with_constant(sums) @ np.array(model.weights)
    measured = _with_constant(seen) @ np.array(model.weights)
    result: Floats = np.maximum(rough, _least(measured)) * np.exp(like @ np.array(model.corrections))
    return result


def _table(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Floats:
    return np.array([[row.get(name, 0.0) for name in names] for row in rows], dtype=np.float64)


def _with_constant(sums: Floats) -> Floats:
    return np.concatenate([np.ones((len(sums), 1)), sums], axis=1)


def _least(latencies: Floats) -> float:
    """A latency that no network is held to go below: the logarithm needs one above zero."""
    return 0.2 * float(np.abs(latencies).min())


def _cheapest(sums: Floats, latencies: Floats) -> tuple[Floats, Floats]:
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
            told[group] = _with_constant(sums[group]) @ _above_zero(sums[rest], latencies[rest], ridge)
        score = float(np.mean((told / latencies - 1) ** 2))
        if score < best[0]:
            best = (score, ridge, told)
    _, ridge, told = best
    return _above_zero(sums, latencies, ridge), told


def _above_zero(sums: Floats, latencies: Floats, ridge: float) -> Floats:
    """Non-negative least squares (Lawson and Hanson 1974) of relative errors, drawn to zero by `ridge`."""
    rows = _with_constant(sums) / latencies[:, None]
    drawn = ridge * math.sqrt(len(rows)) * np.eye(rows.shape[1])
    wanted = np.concatenate([np.ones(len(rows)), np.zeros(rows.shape[1])])
    weights: Floats = nnls(np.concatenate([rows, drawn * np.median(rows[:, 0])]), wanted)[0]
    return weights


def _process(sums: Floats, counts: Floats, wrong: Floats) -> tuple[float, float, Floats]:
    """Share, length and corrections (N,) of the Gaussian process that tells `wrong` of a network best.

    Each is judged by leaving out one network at a time, for which there is a closed form (Rasmussen and
    Williams 2006, section 5.4.2). No correction at all is among what is tried.
    """
    best = (float(np.mean(wrong**2)), 0.0, LENGTHS[0], np.zeros_like(wrong))
    for share in SHARES:
        for length in LENGTHS:
            like = _likeness(sums, counts, sums, counts, share=share, length=length)
            values, vectors = np.linalg.eigh(like)
            turned = vectors.T @ wrong
            for noise in NOISES:
                inverse = 1 / (np.maximum(values, 0) + noise)
                corrections = vectors @ (inverse * turned)
                errors = corrections / ((vectors**2) @ inverse)
                score = float(np.mean(errors**2))
                if score < best[0]:
                    best = (score, share, length, corrections)
    return best[1:]


def _likeness(
    sums: Floats, counts: Floats, other: Floats, other_counts: Floats, *, share: float, length: float
) -> Floats:
    """How alike networks are to others (N, M), from 0 to 1.

    By operators it is the cosine of their counts. By sums it falls with their distance, in units of `length`
    times the root of how many sums there are, each being divided by its largest value.
    """
    distance = ((sums[:, None, :] - other[None, :, :]) ** 2).sum(axis=2)
    by_sums = np.exp(-distance / (2 * (0.25 * length) ** 2 * sums.shape[1]))
    lengths = np.linalg.norm(counts, axis=1)[:, None] * np.linalg.norm(other_counts, axis=1)[None, :]
    by_operators = (counts @ other_counts.T) / np.maximum(lengths, 1.0)
    result: Floats = share * by_operators + (1 - share) * by_sums
    return result
