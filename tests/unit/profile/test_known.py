from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from nestling.profile import (
    DeviceSummary,
    Fingerprint,
    Measurement,
    MeasurementStore,
    devices_in,
    with_aa_spread,
)


def test_a_store_tells_its_devices_and_how_noisy_each_was(
    tmp_path: Path, measured: Callable[..., Measurement]
) -> None:
    store = MeasurementStore(tmp_path / "measurements.db")
    quiet = measured(*([2.0] * 20))
    other = dataclasses.replace(quiet.fingerprint, device="ort:cpu?threads=2")
    for number, reference in enumerate((1.0, 1.1, 0.9)):
        taken = measured(*([2.0] * 20), reference=(reference,) * 20)
        store.put(taken, file=f"file{number}", settings="")
    restless = dataclasses.replace(measured(*([1.0, 1.2] * 10)), fingerprint=other)
    store.put(restless, file="file0", settings="")
    found = {one.address: one for one in devices_in(store.path)}
    assert found.keys() == {"ort:cpu?threads=1", "ort:cpu?threads=2"}
    one, two = found["ort:cpu?threads=1"], found["ort:cpu?threads=2"]
    assert (one.measurements, two.measurements) == (3, 1)
    assert one.interval == pytest.approx(0)
    assert one.reference_spread == pytest.approx(0.1)
    low, high = restless.ratio_interval
    assert two.interval == pytest.approx((high - low) / 2 / restless.ratio)
    assert two.reference_spread is None  # of one measurement
    assert one.to_json()["fingerprint_key"] == quiet.fingerprint.key


def test_a_device_whose_noise_cannot_be_told_says_why(fingerprint: Fingerprint) -> None:
    found = with_aa_spread(DeviceSummary("ort:gpu", fingerprint, "here"))
    assert found.aa_spread is None
    assert "ort:gpu" in found.refusal
