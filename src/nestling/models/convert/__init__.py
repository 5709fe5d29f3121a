"""An existing network with no builder becomes a supernet."""

from nestling.models.convert.conversion import Conversion, convert
from nestling.models.convert.coverage import Coverage, Row
from nestling.models.convert.timm_models import build, convert_timm, layers, layout, pretrained, rebuild

__all__ = [
    "Conversion",
    "Coverage",
    "Row",
    "build",
    "convert",
    "convert_timm",
    "layers",
    "layout",
    "pretrained",
    "rebuild",
]
