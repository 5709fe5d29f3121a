from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnxruntime

from nestling.profile.reference import reference_model


def test_the_reference_model_is_the_same_bytes_everywhere() -> None:
    assert hashlib.sha256(reference_model()).hexdigest().startswith("e55401b7c4240628")


def test_the_reference_model_is_valid_onnx_with_correct_shapes() -> None:
    onnx.checker.check_model(onnx.load_from_string(reference_model()), full_check=True)


def test_the_reference_model_computes_ordinary_numbers() -> None:
    # Not numbers, infinities or denormals would take another time than those of a real network.
    session = onnxruntime.InferenceSession(reference_model(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((1, 3, 96, 96)).astype(np.float32)
    [features] = session.run(None, {"images": images})
    assert features.shape == (1, 160, 1, 1)
    assert 1e-3 < np.abs(features).max() < 1e3
