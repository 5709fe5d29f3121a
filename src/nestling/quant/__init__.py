"""Arithmetic in few bits: which layers (policy), which numbers (ranges), in PyTorch (fake) and ONNX (qdq)."""

from nestling.quant.fake import Simulation, simulate
from nestling.quant.formats import Format
from nestling.quant.gates import split_gates
from nestling.quant.mixed import halve
from nestling.quant.observing import observe
from nestling.quant.placing import place
from nestling.quant.policy import PRECISIONS, Precision, QuantPolicy, covers, most_exact
from nestling.quant.qdq import insert_qdq, with_integers
from nestling.quant.quantizing import Quantized, Recipe, check_policy, quantize
from nestling.quant.ranges import Range, Unquantizable
from nestling.quant.size import weight_bits

__all__ = [
    "PRECISIONS",
    "Format",
    "Precision",
    "QuantPolicy",
    "Quantized",
    "Range",
    "Recipe",
    "Simulation",
    "Unquantizable",
    "check_policy",
    "covers",
    "halve",
    "insert_qdq",
    "most_exact",
    "observe",
    "place",
    "quantize",
    "simulate",
    "split_gates",
    "weight_bits",
    "with_integers",
]
