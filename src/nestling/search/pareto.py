"""Dominance: which points no other point beats, and how much of the space points cover. Less is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
BEYOND_WORST = 0.1
"""How far a hypervolume's reference lies beyond the worst trial, in spans, so that the ends count too."""


def nondominated(points: Points) -> NDArray[np.bool_]:
    """For each row of `points` (N, objectives), whether no other row beats it.

    A row beats another that it equals or undercuts everywhere, and undercuts somewhere; equal rows do not.
    """
    points = np.asarray(points, dtype=np.float64)
    keep = np.zeros(len(points), dtype=bool)
    # in lexicographic order what beats a row stands before it: the first of those left is beaten by none
    left = np.lexsort(points.T[::-1])
    while len(left):
        best = points[left[0]]
        keep[left[(points[left] == best).all(axis=1)]] = True
        left = left[(points[left] < best).any(axis=1)]
    return keep


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """The volume that `points` (N, objectives) dominate below `reference`, exactly.

    For any number of objectives (Zitzler & Thiele 1998). Points beyond the reference count nothing.
    """
    limit = np.asarray(reference, dtype=np.float64)
    points = np.asarray(points, dtype=np.float64).reshape(-1, len(limit))
    points = points[(points < limit).all(axis=1)]
    if not len(points):
        return 0.0
    points = points[nondominated(points)]
    if len(limit) == 1:
        return float(limit[0] - points.min())
    # slices along the last objective, each as thick as the step to the next point
    points = points[np.argsort(points[:, -1], kind="stable")]
    edges = np.append(points[1:, -1], limit[-1])
    if len(limit) == 2:
        return float(((limit[0] - points[:, 0]) * (edges - points[:, 1])).sum())
    volume = 0.0
    for index, (point, edge) in enumerate(zip(points, edges, strict=True)):
        if edge > point[-1]:
            volume += (edge - point[-1]) * hypervolume(points[: index + 1, :-1], limit[:-1].tolist())
    return volume


def spread(points: Points, count: int) -> list[int]:
    """The indices, ascending, of at most `count` rows of `points` (N, objectives) that lie far apart.

    Each objective is scaled to its range. The best row in each objective is taken first, then again and again
    the row farthest from those taken so far.
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) <= count:
        return list(range(len(points)))
    width = np.ptp(points, axis=0)
    scaled = (points - points.min(axis=0)) / np.where(width > 0, width, 1.0)
    taken = list(dict.fromkeys(int(index) for index in scaled.argmin(axis=0)))[:count]
    while len(taken) < count:
        distance = np.linalg.norm(scaled[:, None] - scaled[taken][None], axis=2).min(axis=1)
        distance[taken] = -1.0
        taken.append(int(distance.argmax()))
    return sorted(taken)
