"""Slow but exact functions of archs made fast: learned from a few hundred archs, the error told.

Counting what a network costs takes milliseconds, as it has to be built; an evolution on models asks for
thousands. Costs of networks are close to sums over blocks and products of widths, which the kernel of
`nestling.search.gaussian` is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Codes, Encoding
from nestling.search.evolution import evolve
from nestling.search.features import FeatureMap
from nestling.search.gaussian import Posterior, fit
from nestling.space import Arch, SearchSpace

SAMPLES = 300
LEAST = 10
"""Values from which a stand-in can be learned, of a space that has more archs than are asked for."""
MORE = 2
"""Times as many archs are asked for, where some have no value."""
HELD_OUT = 0.2
POPULATION, GENERATIONS = 100, 40
"""Of the evolution that looks for the cheapest archs."""


@dataclass(frozen=True)
class Learned:
    """A fast stand-in for a function of archs; what was asked for while learning is answered exactly.

    Attributes:
        features: of codes.
        posterior: what was learned.
        known: the value of each code that was asked for, by its bytes.
        typical: the median error on archs it was not shown, as a part of the value.
        worst: the largest such error.
    """

    features: FeatureMap
    posterior: Posterior
    known: dict[bytes, float]
    typical: float
    worst: float

    def __call__(self, codes: Codes) -> NDArray[np.float64]:
        """The values of codes (N,)."""
        told = self.posterior.mean(self.features(codes))
        for place, row in enumerate(np.ascontiguousarray(codes, dtype=np.int64)):
            told[place] = self.known.get(row.tobytes(), told[place])
        return told


def learn(
    space: SearchSpace, function: Callable[[Arch], float | None], *, samples: int = SAMPLES, seed: int = 0
) -> Learned:
    """A stand-in for `function`, which is asked `samples` times, for archs of every size.

    The error is that on a fifth of them, learned from the rest; then all are learned from. Of a space that
    has no more archs than `samples` all are asked for, and the error is 0. Archs of which the function gives
    None are passed over for others, which are drawn as well: at most `MORE` times as many as samples.

    Raises:
        ValueError: fewer than 10 samples, or a value that is not finite; or fewer than 10 values of a larger
            space, or none at all.
    """
    if samples < LEAST:
        raise ValueError(f"{samples} samples; give at least {LEAST}")
    encoding = Encoding(space)
    rng = np.random.default_rng(seed)
    # of every size, and with small beside large: the one teaches the range, the other the products
    tilted = encoding.sample(samples // 3, rng, tilted=True)
    plain = encoding.sample(samples - len(tilted), rng)
    ends = encoding.codes([space.smallest, space.largest])
    whole = space.size <= samples
    codes = encoding.codes(space.walk()) if whole else np.concatenate([ends, tilted, plain])
    codes = np.unique(codes, axis=0)
    codes = codes[rng.permutation(len(codes))]
    spare = codes[:0] if whole else encoding.sample(MORE * samples, rng)
    codes, values = _with_values(encoding, function, codes, spare)
    if len(codes) < (1 if whole else LEAST):
        raise ValueError(f"only {len(codes)} archs have a value")
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        (arch,) = encoding.archs(codes[place : place + 1])
        raise ValueError(f"arch {arch.to_json()} has the value {values[place]}; it must be finite")
    features = FeatureMap(encoding)
    seen = features(codes)
    known = {row.tobytes(): value for row, value in zip(codes, values.tolist(), strict=True)}
    if whole:
        return Learned(features, fit(seen, values, weighed=len(values)), known, 0.0, 0.0)
    shown = len(codes) - max(1, round(HELD_OUT * len(codes)))
    trial = fit(seen.take(slice(shown)), values[:shown], weighed=shown)
    wrong = np.abs(trial.mean(seen.take(slice(shown, None))) - values[shown:])
    parts = wrong / np.maximum(np.abs(values[shown:]), 1e-300)
    posterior = fit(seen, values, weighed=len(values))
    return Learned(features, posterior, known, float(np.median(parts)), float(parts.max()))


def _with_values(
    encoding: Encoding, function: Callable[[Arch], float | None], codes: Codes, spare: Codes
) -> tuple[Codes, NDArray[np.float64]]:
    """Those of `codes` whose archs have a value, as many of `spare` as are missing, and all their values."""
    values: dict[bytes, float | None] = {}
    had = 0
    for place, row in enumerate(np.concatenate([codes, spare])):
        if place >= len(codes) and had == len(codes):
            break
        if row.tobytes() not in values:
            (arch,) = encoding.archs(row[None])
            value = values[row.tobytes()] = function(arch)
            had += value is not None
    found = {key: value for key, value in values.items() if value is not None}
    kept = [np.frombuffer(key, dtype=codes.dtype) for key in found]
    return np.array(kept, dtype=codes.dtype).reshape(-1, codes.shape[1]), np.array(
        list(found.values()), dtype=float
    )


def cheapest(space: SearchSpace, told: Callable[[Codes], NDArray[np.float64]], *, count: int) -> list[Arch]:
    """`count` archs of the least value of `told`, as far as an evolution finds them, the least first."""
    encoding = Encoding(space)
    codes = evolve(
        encoding,
        lambda asked: (told(asked)[:, None], np.zeros(len(asked))),
        encoding.codes([space.smallest, space.largest]),
        population=POPULATION,
        generations=GENERATIONS,
        rng=np.random.default_rng(0),
    )
    return encoding.archs(codes[told(codes).argsort(kind="stable")[:count]])
