from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import Tensor

from nestling.quant import calibration
from nestling.quant.calibration import METHODS, Method, entropy, largest_of_rows, moving, mse, percentile
from nestling.quant.formats import Format
from nestling.quant.statistics import HALF, Bounds, Histogram, histogram

UNSIGNED = Format(bits=8, signed=False, symmetric=False, per_channel=False)
SIGNED = Format(bits=8, signed=True, symmetric=True, per_channel=False)
Floats = NDArray[np.float64]


def numbers(kind: str, count: int = 20_000) -> Tensor:
    normal = torch.randn(count, generator=torch.Generator().manual_seed(3))
    return {
        "normal": normal,
        "rectified": normal.relu(),
        "swish": torch.nn.functional.silu(2 * normal),
        "heavy": normal**3,
        "negative": -normal.abs() - 0.1,
    }[kind]


KINDS = ("normal", "rectified", "swish", "heavy", "negative")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [99.9, 99.99, 60.0, 100.0])
def test_percentiles_are_those_of_numpy_to_a_bin(kind: str, percent: float) -> None:
    raw = numbers(kind)
    found = histogram(raw)
    low, high = percentile(found, UNSIGNED, percent=percent)
    wanted = np.percentile(raw.numpy(), [100 - percent, percent], method="inverted_cdf")
    assert max(high, 0.0) == pytest.approx(max(wanted[1], 0.0), abs=found.width)
    # Bounds are zero or beyond. From below, the rank that the lower percentile takes may be its neighbour's.
    near = np.sort(raw.numpy())
    rank = int(np.searchsorted(near, wanted[0]))
    neighbours = near[max(rank - 1, 0)], near[min(rank + 1, len(near) - 1)]
    least, most = (min(float(each), 0.0) for each in neighbours)
    assert least - found.width <= min(low, 0.0) <= most + found.width
    magnitude = np.percentile(raw.abs().numpy(), percent, method="inverted_cdf")
    assert percentile(found, SIGNED, percent=percent)[1] == pytest.approx(magnitude, abs=found.width)


@pytest.mark.parametrize("percent", [50.0, 0.1, 100.1])
def test_no_percentile_below_the_middle(percent: float) -> None:
    with pytest.raises(ValueError, match="above 50"):
        percentile(histogram(numbers("normal")), UNSIGNED, percent=percent)


def test_moving_follows_batches_by_a_tenth() -> None:
    found = Histogram(((-1.0, 1.0), (-21.0, 11.0)))
    assert moving(found, UNSIGNED) == pytest.approx((-3.0, 2.0))


def squared_error(raw: Tensor, bounds: Bounds, format: Format) -> float:
    """By rounding every number."""
    low, high = bounds
    if format.symmetric:
        scale, zero, least = high / format.high, 0, -format.high
    else:
        scale = (high - low) / (format.high - format.low)
        zero, least = format.low + round(-low / scale), format.low
    rounded = (raw.double() / scale).round_().add_(zero).clamp_(least, format.high)
    return float((rounded.sub_(zero).mul_(scale) - raw).square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("signed", [False, True])
def test_no_bounds_of_a_grid_have_a_smaller_error(kind: str, bits: int, signed: bool) -> None:
    raw = numbers(kind, 2_000)
    format = Format(bits=bits, signed=signed, symmetric=signed, per_channel=False)
    found = squared_error(raw, mse(histogram(raw), format), format)
    low, high = min(float(raw.min()), 0.0), max(float(raw.max()), 0.0)
    if signed:
        high = max(-low, high)
        grid = [(-high * part, high * part) for part in np.linspace(0.02, 1, 100)]
    else:
        parts = np.linspace(0.05, 1, 12 if low and high else 100)
        pairs = itertools.product(parts, parts) if low and high else zip(parts, parts, strict=True)
        grid = [(low * below, high * above) for below, above in pairs]
    # Half a percent: the finest step of the search, and numbers taken to lie evenly in their bins.
    assert found <= 1.005 * min(squared_error(raw, bounds, format) for bounds in grid)


def divergence(counts: Floats, start: int, stop: int, levels: int) -> float:
    """Kullback-Leibler, bin by bin as it is written down."""
    reference = counts[start:stop].copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    spread = np.zeros(stop - start)
    for level in range(levels):
        cell = slice((stop - start) * level // levels, (stop - start) * (level + 1) // levels)
        filled = reference[cell] > 0
        if filled.any():
            spread[cell] = filled * counts[start:stop][cell].sum() / filled.sum()
    there = reference > 0
    if (spread[there] == 0).any():
        return float("inf")
    p, q = reference[there] / reference.sum(), spread[there] / spread.sum()
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_bounds_lose_much_less_information(kind: str) -> None:
    format = Format(bits=6, signed=False, symmetric=False, per_channel=False)
    raw = histogram(numbers(kind))
    assert raw.counts is not None
    counts = raw.counts.double().numpy()

    def lost(low: float, high: float) -> float:
        start, stop = (int(np.floor(low / raw.width)) + HALF, int(np.ceil(high / raw.width)) + HALF)
        return divergence(counts, start, stop, 64)

    low, high = min(raw.bounds[0], 0.0), max(raw.bounds[1], 0.0)
    parts = np.linspace(0.1, 1, 7)
    others = [lost(low * below, high * above) for below, above in itertools.product(parts, parts)]
    assert lost(*entropy(raw, format)) <= min(others) + 1e-3


@pytest.mark.parametrize(("power", "outlier"), [(1, 15.0), (2, 60.0)])
def test_entropy_drops_the_outliers_that_onnx_runtime_drops(
    power: int, outlier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, bits = 128, 6
    monkeypatch.setattr("nestling.quant.calibration.HALF", half)
    normal = numbers("normal", 200_000)
    raw = torch.cat((normal * normal.abs() ** (power - 1), torch.full((9,), outlier))).numpy()
    exponent = int(np.ceil(np.log2(outlier))) - 7
    edges = ((np.arange(2 * half + 1) - half) * 2.0**exponent).astype(np.float32)
    counts, _ = np.histogram(raw, edges)
    collector = HistogramCollector("entropy", True, 2 * half, 2**bits, 0.0, "same")
    ends = np.float32(raw.min()), np.float32(raw.max())
    _, expected = collector.get_entropy_threshold((counts, edges, *ends, edges[-1]), 2**bits)
    format = Format(bits=bits, signed=True, symmetric=True, per_channel=False)
    seen = Histogram(((-outlier, outlier),), torch.from_numpy(counts), exponent)
    assert entropy(seen, format)[1] == pytest.approx(float(expected), rel=0.1)
    assert float(expected) < 0.5 * outlier


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_within_what_was_seen(method: Method, kind: str) -> None:
    found = histogram(numbers(kind))
    low, high = METHODS[method](found, UNSIGNED)
    assert min(found.bounds[0], 0.0) <= low <= high <= max(found.bounds[1], 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", [UNSIGNED, SIGNED])
def test_zeros_alone_and_one_number_alone_have_bounds(method: Method, format: Format) -> None:
    assert METHODS[method](histogram(torch.zeros(5)), format) == (0.0, 0.0)
    low, high = METHODS[method](histogram(torch.full((5,), 3.0)), format)
    assert low <= 0.0 or low == 3.0
    assert high == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"minmax", "moving"}))
def test_methods_that_read_counts_refuse_extremes(method: Method) -> None:
    with pytest.raises(ValueError, match="extremes only"):
        METHODS[method](histogram(torch.ones(3), counts=False), UNSIGNED)


def test_clipped_weights_have_the_least_error_of_each_row() -> None:
    rows = numbers("heavy", 300).reshape(6, 50)
    rows[2] = 0
    for low, levels in ((-128, 127), (-64, 63), (-8, 7), (-4, 3), (-2, 1)):
        found = largest_of_rows(rows, (low, levels), method="mse")
        for row, largest in zip(rows, found.tolist(), strict=True):
            whole = float(row.abs().max())

            def error(limit: float, row: Tensor = row, low: int = low, levels: int = levels) -> float:
                scale = limit / levels if limit else 1.0
                return float(((row / scale).round().clamp(low, levels) * scale - row).square().sum())

            assert error(largest) <= 1.02 * min(error(whole * part) for part in np.linspace(0.2, 1, 40))


@pytest.mark.parametrize("held", [1, 46 * 50, 46 * 50 * 3, 2**20])
def test_how_much_is_looked_at_in_one_go_changes_no_range(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = numbers("heavy", 350).reshape(7, 50)
    rows[2] = 0
    whole = rows.abs().amax(1)
    best, least = whole, torch.full_like(whole, torch.inf)
    for ratio in torch.linspace(1.0, 0.1, 46).tolist():
        scale = torch.where(whole > 0, whole * ratio / 7, 1.0)[:, None]
        error = ((rows / scale).round().clamp(-8, 7) * scale - rows).square().sum(1)
        best, least = torch.where(error < least, whole * ratio, best), torch.minimum(error, least)
    monkeypatch.setattr(calibration, "_HELD", held)
    assert torch.equal(largest_of_rows(rows, (-8, 7), method="mse"), best)


def test_weights_span_all_unless_asked() -> None:
    rows = numbers("heavy", 600).reshape(6, 100)
    assert torch.equal(largest_of_rows(rows, (-128, 127)), rows.abs().amax(1))
