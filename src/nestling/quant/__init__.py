"""Integer arithmetic: which layers (policy), which numbers (ranges), in PyTorch (fake) and in ONNX (qdq)."""

from nestling.quant.fake import Simulation, simulate
from nestling.quant.formats import Format
from nestling.quant.observing import observe
from nestling.quant.policy import PRECISIONS, Precision, QuantPolicy
from nestling.quant.qdq import insert_qdq
from nestling.quant.ranges import Range

__all__ = [
    "PRECISIONS",
    "Format",
    "Precision",
    "QuantPolicy",
    "Range",
    "Simulation",
    "insert_qdq",
    "observe",
    "simulate",
]
