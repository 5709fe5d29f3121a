"""Archs that cover a space's cost, where choices drawn one by one crowd its middle.

The cost of an arch is close to a product over its choices, so drawing each choice uniformly gives costs that
pile up like a sum of dice: of 45 choices, all small or all large is never seen. AttentiveNAS (Wang et al.
2021, arXiv 2011.09011) draws a target cost and rejects what misses it; ShiftNAS (Zhang et al. 2023,
arXiv 2307.08300) shows that the training of each cost follows from how often it is drawn. Here a model that
adds up what each value does to the logarithm of the cost proposes archs near the target, and the cost itself
decides.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nestling.space.arch import Arch, Value
from nestling.space.search_space import SearchSpace

CostOf = Callable[[Arch], float]

_TRIES = 32
_REPEAT = 8  # tries that an arch seen before counts for: there are few near the bin
_PROPOSALS = 64
_DRAWN_FROM_A_BIN = 16  # archs, until one is allowed
_SAMPLES_PER_TILT = 16
_COSTS_KEPT = 4096
_RIDGE = 0.03
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# tilts to either side of none, from hardly any to one value alone
_TILTS = (0.0, *(2.0**power for power in range(-1, 10)))


@dataclass(frozen=True, slots=True)
class CostSampler:
    """Draws archs of `space` whose cost is uniform between those of its smallest and its largest.

    Attributes:
        space: where the archs come from.
        cost: what an arch costs, in any unit.
        edges: the borders of the cost bins, ascending, one more than there are bins; a bin holds its lower
            border, the last one its upper border too.
        model: guesses the cost of an arch without asking for it.
        tilts: for each bin, how strongly dear values are preferred (below 0: cheap ones), so that the
            guesses centre on the bin.
    """

    space: SearchSpace
    cost: CostOf
    edges: tuple[float, ...]
    model: CostModel
    tilts: tuple[float, ...]

    def draw(self, rng: random.Random) -> Arch:
        """A random arch from a bin that is itself drawn uniformly; asks for a few costs."""
        return self.within(rng.randrange(len(self.tilts)), rng)

    def within(self, index: int, rng: random.Random) -> Arch:
        """A random arch whose cost lies in bin `index`; the nearest one seen where none was found in it.

        Raises:
            IndexError: no such bin.
        """
        if not 0 <= index < len(self.tilts):
            raise IndexError(f"there is no cost bin {index}; they are 0 to {len(self.tilts) - 1}")
        low, high = self.edges[index], self.edges[index + 1]
        weights = self.model.weights(self.space, self.tilts[index])
        seen: dict[Arch, float] = {}
        shift, tries = 0.0, _TRIES
        while tries > 0:
            arch, guess = self._proposal(weights, (low, high), shift, rng)
            tries -= _REPEAT if arch in seen else 1
            if arch in seen:
                continue
            seen[arch] = self.cost(arch)
            if self.bin_of(seen[arch]) == index:
                return arch
            # what the model gets wrong hereabouts: the next guesses are put right by it
            shift += (self.model.scaled(seen[arch]) - guess - shift) / (len(seen) + 1)
        for arch in (self.space.smallest, self.space.largest):
            seen[arch] = self.cost(arch)
        return min(seen, key=lambda arch: max(low - seen[arch], seen[arch] - high))

    def bin_of(self, cost: float) -> int:
        """The bin that holds `cost`: the first or the last one for a cost beyond the edges."""
        index = int(np.searchsorted(self.edges, cost, side="right")) - 1
        return min(max(index, 0), len(self.tilts) - 1)

    def _proposal(
        self,
        weights: Mapping[str, Sequence[float]],
        bounds: tuple[float, float],
        shift: float,
        rng: random.Random,
    ) -> tuple[Arch, float]:
        """An arch that the model places in `bounds`, or the nearest of some; with its guess."""
        low, high = self.model.scaled(bounds[0]), self.model.scaled(bounds[1])
        best: tuple[float, Arch, float] | None = None
        for _ in range(_PROPOSALS):
            arch = _tilted(self.space, weights, rng)
            guess = self.model.guess(arch)
            miss = max(low - guess - shift, guess + shift - high, 0.0)
            if best is None or miss < best[0]:
                best = (miss, arch, guess)
            if miss == 0.0:
                break
        assert best is not None
        return best[1], best[2]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Guesses a power of a cost: a polynomial of the sum of what each value adds.

    Values drawn with weights `exp(tilt * effect)` and kept when their sum falls into a narrow band are
    uniform over all archs whose sum falls into it, whatever the tilt: it only saves tries.

    Attributes:
        effects: for each open choice, what each of its values adds.
        curve: coefficients of the polynomial, highest power first.
        power: which power of the cost is guessed; 0 for its logarithm.
    """

    effects: Mapping[str, Mapping[Value, float]]
    curve: tuple[float, ...]
    power: float

    def guess(self, arch: Arch) -> float:
        """The cost of `arch`, to the power."""
        total = sum(effect[arch[name]] for name, effect in self.effects.items())
        return float(np.polyval(self.curve, total))

    def scaled(self, cost: float) -> float:
        """`cost` to the power."""
        return math.log(cost) if self.power == 0 else cost**self.power

    def weights(self, space: SearchSpace, tilt: float) -> dict[str, list[float]]:
        """For each open choice of `space`, how likely a value up to each is to be drawn, unnormalised."""
        weights = {}
        for choice in space.open_choices:
            pull = [tilt * self.effects[choice.name][value] for value in choice.values]
            weights[choice.name] = list(itertools.accumulate(math.exp(p - max(pull)) for p in pull))
        return weights


def cost_uniform(
    space: SearchSpace, cost: CostOf, *, rng: random.Random, bins: int = 16, evaluations: int = 200
) -> CostSampler:
    """A sampler over `bins` equal bins between the cost of the smallest and that of the largest arch.

    Asks for about `evaluations` costs now, and for a few in each draw; costs are kept, not asked for twice.

    Raises:
        ValueError: fewer than 1 bin or 2 evaluations, a cost that is not above 0, or a largest arch that
            costs no more than the smallest.
    """
    if bins < 1 or evaluations < 2:
        raise ValueError(f"{bins} bins and {evaluations} evaluations; give at least 1 and 2")
    known = lru_cache(maxsize=_COSTS_KEPT)(cost)
    least, most = known(space.smallest), known(space.largest)
    if not 0 < least < most:
        raise ValueError(
            f"the smallest arch costs {least:g} and the largest {most:g}; "
            "a cost is above 0, and grows with the arch"
        )
    archs = [space.smallest, space.largest, *_probes(space, evaluations - 2, rng)]
    model = _fit(space, {arch: known(arch) for arch in archs})
    edges = tuple(float(edge) for edge in np.linspace(least, most, bins + 1))
    centres = [model.scaled((low + high) / 2) for low, high in itertools.pairwise(edges)]
    return CostSampler(space, known, edges, model, _fitted_tilts(space, model, centres, rng))


def stratified(
    space: SearchSpace,
    cost: CostOf,
    count: int,
    *,
    seed: int = 0,
    allowed: Callable[[Arch], bool] = lambda _: True,
) -> list[Arch]:
    """`count` archs, one from each of `count` equal cost bins, cheapest first; the same for the same `seed`.

    Fewer where bins are empty, or none of some archs drawn from one is `allowed`: an arch is listed once.

    Raises:
        ValueError: see `cost_uniform`.
    """
    rng = random.Random(seed)
    sampler = cost_uniform(space, cost, rng=rng, bins=count)
    archs: dict[Arch, None] = {}
    for index in range(count):
        drawn = (sampler.within(index, rng) for _ in range(_DRAWN_FROM_A_BIN))
        archs |= dict.fromkeys(itertools.islice(filter(allowed, drawn), 1))
    return sorted(archs, key=sampler.cost)


def _tilted(space: SearchSpace, weights: Mapping[str, Sequence[float]], rng: random.Random) -> Arch:
    drawn = {c.name: c.values[0] for c in space.choices}
    for choice in space.open_choices:
        drawn[choice.name] = rng.choices(choice.values, cum_weights=weights[choice.name])[0]
    return space.canonical(drawn)


def _probes(space: SearchSpace, count: int, rng: random.Random) -> list[Arch]:
    """Archs from nearly smallest to nearly largest: a fit of the middle alone is wrong at the ends."""
    archs = []
    for step in range(count):
        tilt = 12 * (step + 0.5) / count - 6
        weights = {
            c.name: list(
                itertools.accumulate(math.exp(tilt * n / (len(c.values) - 1)) for n in range(len(c.values)))
            )
            for c in space.open_choices
        }
        archs.append(_tilted(space, weights, rng))
    return archs


def _fit(space: SearchSpace, costs: Mapping[Arch, float]) -> CostModel:
    """The model that fits `costs` best.

    MACs of blocks add up, those of widths and resolutions multiply: of several powers of the cost, the one
    that a sum over choices tells best, as judged by leaving out each arch in turn.
    """
    places = {c.name: {value: place for place, value in enumerate(c.values)} for c in space.open_choices}
    steps = [(c.name, place) for c in space.open_choices for place in range(1, len(c.values))]
    rows = np.array(
        [[places[name][arch[name]] >= place for name, place in steps] for arch in costs], dtype=float
    )
    paid = np.array(list(costs.values()), dtype=float)
    if not (paid > 0).all():
        worst = min(costs, key=lambda arch: costs[arch])
        raise ValueError(f"arch {worst.to_json()} costs {costs[worst]:g}; a cost is above 0")
    paid /= paid.max()
    centred = rows - rows.mean(axis=0)
    # effects of values that the archs do not tell apart are held small
    solve = np.linalg.solve(centred.T @ centred + _RIDGE * np.eye(len(steps)), centred.T)
    leverage = np.einsum("ij,ji->i", centred, solve) + 1 / len(paid)
    best = (math.inf, 0.0, np.zeros(len(steps)))
    for power in _POWERS:
        wanted = np.log(paid) if power == 0 else paid**power
        gains = solve @ wanted
        left_out = (wanted - wanted.mean() - centred @ gains) / np.maximum(1 - leverage, 1e-6)
        relative = left_out / (1.0 if power == 0 else power * paid**power)
        best = min(best, (float(np.mean(relative**2)), power, gains), key=lambda tried: tried[0])
    return _model(space, dict(zip(steps, best[2].tolist(), strict=True)), best[1], costs)


def _model(
    space: SearchSpace, gains: Mapping[tuple[str, int], float], power: float, costs: Mapping[Arch, float]
) -> CostModel:
    """The model whose value number `place` adds the `gains` of its choice up to there, its curve fitted."""
    effects: dict[str, dict[Value, float]] = {}
    for choice in space.open_choices:
        total = 0.0
        effects[choice.name] = {}
        for place, value in enumerate(choice.values):
            total += gains.get((choice.name, place), 0.0)
            effects[choice.name][value] = total
    line = CostModel(effects, (1.0, 0.0), power)
    sums = [line.guess(arch) for arch in costs]
    degree = min(3, len({round(value, 9) for value in sums}) - 1)
    curve = np.polyfit(sums, [line.scaled(cost) for cost in costs.values()], degree)
    return CostModel(effects, tuple(float(c) for c in curve), power)


def _fitted_tilts(
    space: SearchSpace, model: CostModel, centres: Sequence[float], rng: random.Random
) -> tuple[float, ...]:
    """For each of `centres`, the tilt under which guesses average to it."""
    tilts = sorted({sign * tilt for tilt in _TILTS for sign in (-1, 1)})
    means = []
    for tilt in tilts:
        weights = model.weights(space, tilt)
        guesses = [model.guess(_tilted(space, weights, rng)) for _ in range(_SAMPLES_PER_TILT)]
        means.append(sum(guesses) / len(guesses))
    rising = np.maximum.accumulate(means)
    return tuple(float(tilt) for tilt in np.interp(centres, rising, tilts))
