"""Searching a space: objectives and limits, dominance, and the study that asks, evaluates and remembers."""

from nestling.search.correcting import correct_trial
from nestling.search.database import StudyMismatch, StudyUnavailable, study_url
from nestling.search.ending import load_stop
from nestling.search.guided import batch_size
from nestling.search.limits import change_limits, parse_limits
from nestling.search.objectives import InfeasibleLimit, Limit, Metrics, Objective, Problem, check_limits
from nestling.search.opening import agree, amend, evaluated, suspects
from nestling.search.pareto import BEYOND_WORST, hypervolume, nondominated
from nestling.search.proposing import Proposer, make_proposer
from nestling.search.record import is_begun
from nestling.search.result import SearchResult, Trial, spread_along_front
from nestling.search.samplers import check_sampler, make_sampler
from nestling.search.stopping import Stop, Stopping
from nestling.search.study import EvaluationFailed, load_result, search, watch
from nestling.search.workers import Workers, WorkersLost, end_with_input

__all__ = [
    "BEYOND_WORST",
    "EvaluationFailed",
    "InfeasibleLimit",
    "Limit",
    "Metrics",
    "Objective",
    "Problem",
    "Proposer",
    "SearchResult",
    "Stop",
    "Stopping",
    "StudyMismatch",
    "StudyUnavailable",
    "Trial",
    "Workers",
    "WorkersLost",
    "agree",
    "amend",
    "batch_size",
    "change_limits",
    "check_limits",
    "check_sampler",
    "correct_trial",
    "end_with_input",
    "evaluated",
    "hypervolume",
    "is_begun",
    "load_result",
    "load_stop",
    "make_proposer",
    "make_sampler",
    "nondominated",
    "parse_limits",
    "search",
    "spread_along_front",
    "study_url",
    "suspects",
    "watch",
]
