"""How a network's calls into PyTorch become operators: a recorder, and one table of translations."""

from nestling.models.tracing.recorder import Recorder, Untraceable
from nestling.models.tracing.table import QUERIES, TRANSLATIONS

__all__ = ["QUERIES", "TRANSLATIONS", "Recorder", "Untraceable"]
