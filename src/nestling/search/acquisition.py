"""Which candidates to validate next: those that are expected to add the most hypervolume together.

Metrics of all candidates are drawn together from the models' posterior; in each draw a candidate adds
what it dominates beyond the front of that draw. Candidates are taken one after the other, each given those
taken before and those being evaluated, so that a batch is spread along the front (Daulton et al. 2020,
arXiv 2006.05078; fronts of noisy trials are drawn as well: 2021, arXiv 2105.08195). The volume is that of
random directions (Zhang & Golovin 2020, arXiv 2006.04655), exact on average for any number of objectives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Rows

Draws = NDArray[np.float64]
"""Losses in each draw (draws, candidates, objectives), less is better."""


def reach(losses: Draws, reference: NDArray[np.float64], directions: Draws) -> Draws:
    """How far each candidate pushes the front along each direction, to the power of the objectives.

    The mean over directions of the greatest reach is the hypervolume below `reference`, up to a factor.

    Args:
        losses: (draws, candidates, objectives).
        reference: (objectives,).
        directions: positive unit vectors (draws, directions, objectives).

    Returns:
        (draws, candidates, directions); 0 for what lies beyond the reference.
    """
    far = np.full((losses.shape[0], losses.shape[1], directions.shape[1]), np.inf)
    for objective in range(losses.shape[2]):
        room = reference[objective] - losses[:, :, objective]
        np.minimum(far, room[:, :, None] / directions[:, None, :, objective], out=far)
    reached: Draws = np.maximum(far, 0.0) ** losses.shape[2]
    return reached


def draw_directions(draws: int, count: int, objectives: int, rng: np.random.Generator) -> Draws:
    """Unit vectors spread evenly over the positive part of the sphere (draws, count, objectives)."""
    drawn = np.abs(rng.standard_normal((draws, count, objectives))) + 1e-9
    directions: Draws = drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
    return directions


def choose(
    candidates: Draws,
    allowed: NDArray[np.bool_],
    reached: Draws,
    *,
    reference: NDArray[np.float64],
    directions: Draws,
    count: int,
) -> list[int]:
    """The places of at most `count` candidates that are expected to add the most together, the best first.

    Ends early where none is expected to add anything.

    Args:
        candidates: their losses in each draw (draws, N, objectives).
        allowed: whether they keep all limits in each draw (draws, N).
        reached: how far the front reaches without them (draws, directions).
        reference: (objectives,).
        directions: (draws, directions, objectives).
        count: how many.
    """
    pushed = reach(candidates, reference, directions) * allowed[:, :, None]
    reached = reached.copy()
    chosen: list[int] = []
    while len(chosen) < min(count, candidates.shape[1]):
        added = np.maximum(pushed - reached[:, None, :], 0.0).mean(axis=(0, 2))
        added[chosen] = 0.0
        place = int(added.argmax())
        if added[place] <= 0.0:
            break
        chosen.append(place)
        np.maximum(reached, pushed[:, place], out=reached)
    return chosen


def scaling(
    front: Rows, everything: Rows
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Least and width of the losses of a front (N, objectives), and the reference in their scale.

    An objective that does not change along the front is scaled by its range over `everything`.
    """
    least = front.min(axis=0)
    width = np.ptp(front, axis=0)
    width = np.where(width > 0, width, np.ptp(everything, axis=0))
    return least, np.where(width > 0, width, 1.0), np.full(front.shape[1], 1.1)
