"""Scored networks, and what they tell of the supernet that they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestling.space import Arch
from nestling.train.evaluate import Accuracy
from nestling.train.quality import (
    Estimate,
    along_cost,
    area,
    bootstrap,
    improvement_along,
    improvement_of_choice,
    kendall_tau,
    neighbours,
    partial_tau,
)


@dataclass(frozen=True, slots=True)
class Scored:
    """A network and which of the search split's images it gets right, recalibrated, in float."""

    arch: Arch
    macs: int
    hits: NDArray[np.bool_]
    seconds: float
    """What it took, since it was last continued, to train where it was trained, and to score."""

    @property
    def accuracy(self) -> Accuracy:
        """On those images."""
        return Accuracy(int(self.hits.sum()), len(self.hits))


def area_under(rows: Sequence[Scored], extremes: tuple[int, int], *, seed: int) -> dict[str, float] | None:
    """The area under the accuracy-MACs curve of `rows`, cheapest first; `extremes` are where its axis ends.

    The interval keeps the first and the last, the smallest and the largest network, in every draw.
    """
    places, hits = _places(rows, extremes), _stacked(rows)
    estimate = bootstrap(
        lambda drawn, weights: area(places[drawn], (hits @ weights)[drawn]),
        rows=len(rows),
        images=hits.shape[1],
        kept=(0, len(rows) - 1),
        seed=seed,
    )
    return _told(estimate)


def gained(
    rows: Sequence[Scored], front: Sequence[Scored], extremes: tuple[int, int], *, seed: int
) -> dict[str, float] | None:
    """The front's relative improvement over subnets of the same cost that nobody chose."""
    places, hits = _places(rows, extremes), _stacked(rows)
    at, found = _places(front, extremes), _stacked(front)
    estimate = bootstrap(
        lambda drawn, weights: improvement_along(
            places[drawn], (hits @ weights)[drawn], at=at, found=found @ weights
        ),
        rows=len(rows),
        images=hits.shape[1],
        kept=(0, len(rows) - 1),
        seed=seed,
    )
    return _told(estimate)


def compared(shared: Sequence[Scored], alone: Sequence[Scored], *, seed: int) -> dict[str, Any]:
    """Shared weights against training alone: the same networks in both, in the same order.

    The intervals of the rankings are over networks only: drawing the images anew as well would add to each
    accuracy a noise that it has already, and noise can only lower a ranking.
    """
    inherited, own = _stacked(shared), _stacked(alone)
    # by counting, so that equal accuracies are equal to the last bit
    scores, reached = (np.array([s.accuracy.top1 for s in networks]) for networks in (shared, alone))
    macs = np.array([scored.macs for scored in alone], dtype=np.float64)
    count, images, pairs = len(alone), own.shape[1], neighbours(macs)

    def ranking(of: Callable[[NDArray[np.int64]], float]) -> Any:
        return _told(bootstrap(lambda drawn, _: of(drawn), rows=count, bounds=(-1, 1), seed=seed))

    def choice(by: NDArray[np.float64]) -> Any:
        if not len(pairs):
            return None
        return _told(
            bootstrap(
                lambda drawn, weights: improvement_of_choice(pairs[drawn], by, own @ weights),
                rows=len(pairs),
                images=images,
                seed=seed,
            )
        )

    return {
        "tau": ranking(lambda d: kendall_tau(scores[d], reached[d])),
        "tau_of_macs": ranking(lambda d: kendall_tau(macs[d], reached[d])),
        "partial_tau": ranking(lambda d: partial_tau(scores[d], reached[d], given=macs[d])),
        "gap": _told(
            bootstrap(
                lambda drawn, weights: float(((inherited - own) @ weights)[drawn].mean()),
                rows=count,
                images=images,
                seed=seed,
            )
        ),
        "improvement": choice(scores),
        "improvement_of_macs": choice(macs),
    }


def row(scored: Scored) -> dict[str, Any]:
    """What a summary says of one network."""
    return {
        "arch_key": scored.arch.key,
        "decisions": dict(scored.arch),
        "macs": scored.macs,
        "top1": scored.accuracy.top1,
        "top1_interval": list(scored.accuracy.interval),
        "seconds": scored.seconds,
    }


def _places(rows: Sequence[Scored], extremes: tuple[int, int]) -> NDArray[np.float64]:
    return along_cost([scored.macs for scored in rows], least=extremes[0], most=extremes[1])


def _stacked(rows: Sequence[Scored]) -> NDArray[np.float64]:
    """Hits (networks, images) as numbers."""
    return np.stack([scored.hits for scored in rows]).astype(np.float64)


def _told(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)
