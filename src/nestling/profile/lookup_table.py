"""Latencies as sums of those of blocks measured alone, as once-for-all has them (arXiv 1908.09791)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nestling.profile.prediction import Floats


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A network's latency as the sum of its blocks' and an overhead.

    Attributes:
        blocks: the latency of each block alone, by its signature.
        overhead: what a network takes besides.
        per_block: what each block takes besides in a network: less than nothing, as a block alone pays for a
            call and for turning its input and output into its precision.
    """

    blocks: Mapping[str, float]
    overhead: float
    per_block: float


def fit_table(
    blocks: Mapping[str, float], networks: Sequence[Sequence[str]], latencies: Sequence[float]
) -> LookupTable:
    """The table whose overheads have the least relative error, in squares, on networks that were measured.

    Args:
        blocks: the latency of each block alone, by its signature.
        networks: the signatures of each network's blocks.
        latencies: of the networks, above zero.

    Raises:
        ValueError: no networks, or a block that was not measured.
    """
    if not networks:
        raise ValueError("a lookup table needs at least one measured network for its overhead")
    measured = np.array(latencies, dtype=np.float64)
    sums = _sums(blocks, networks)
    counts = np.array([len(network) for network in networks], dtype=np.float64)
    rows = np.stack([np.ones_like(counts), counts], axis=1) / measured[:, None]
    (overhead, per_block), *_ = np.linalg.lstsq(rows, (measured - sums) / measured, rcond=None)
    return LookupTable(dict(blocks), float(overhead), float(per_block))


def look_up(table: LookupTable, networks: Sequence[Sequence[str]]) -> Floats:
    """The latencies (N,) of networks, given by the signatures of their blocks.

    Raises:
        ValueError: a block that was not measured.
    """
    counts = np.array([len(network) for network in networks], dtype=np.float64)
    result: Floats = _sums(table.blocks, networks) + table.overhead + table.per_block * counts
    return result


def _sums(blocks: Mapping[str, float], networks: Sequence[Sequence[str]]) -> Floats:
    missing = sorted({signature for network in networks for signature in network} - blocks.keys())
    if missing:
        raise ValueError(f"the lookup table has no block {missing[0]!r}; measure it first")
    return np.array([sum(blocks[signature] for signature in network) for network in networks])
