"""Training strategies: which subnets a step visits, what each learns from, and how much it counts."""

from nestling.train.strategies.by_cost import Attentive, Shifting, guessing, histogram
from nestling.train.strategies.labels_only import Alone, FixedList, SinglePath, SortedNet
from nestling.train.strategies.making import make_strategy
from nestling.train.strategies.progressive import PUBLISHED, Phase, ProgressiveShrinking, phases_of
from nestling.train.strategies.sandwich import DelayedShrinking, Sandwich
from nestling.train.strategies.visits import Progress, Strategy, Visit

__all__ = [
    "PUBLISHED",
    "Alone",
    "Attentive",
    "DelayedShrinking",
    "FixedList",
    "Phase",
    "Progress",
    "ProgressiveShrinking",
    "Sandwich",
    "Shifting",
    "SinglePath",
    "SortedNet",
    "Strategy",
    "Visit",
    "guessing",
    "histogram",
    "make_strategy",
    "phases_of",
]
