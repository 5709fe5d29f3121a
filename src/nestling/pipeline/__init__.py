"""The stages of a run in their order: the only code that knows them all."""

from nestling.pipeline.evaluation import evaluate_supernet
from nestling.pipeline.finetuning import finetune, tuning
from nestling.pipeline.forecast import Forecast
from nestling.pipeline.latency import LatencyPredictor, learn_latency, load_predictor, predict_latency
from nestling.pipeline.listening import Listener, Silent
from nestling.pipeline.lookup import convert_space, find_arch, propose_space, space_axes, space_summary
from nestling.pipeline.precisions import probe as probe_precisions
from nestling.pipeline.precisions import table_facts
from nestling.pipeline.profiling import write_profile_page
from nestling.pipeline.searching import join_search, search_supernet
from nestling.pipeline.stages import (
    begin_from,
    export_arch,
    export_best,
    export_front,
    make_report,
    open_run,
    prepare,
    run_all,
)
from nestling.pipeline.studies import is_searched, limit_overrides, searched
from nestling.pipeline.training import join_ranks, train_supernet
from nestling.profile import Comparison, DeviceSummary, FileProfile, Refusal
from nestling.quant import PRECISIONS
from nestling.report import ReportFiles
from nestling.search import SearchResult, Trial, end_with_input
from nestling.train.account import Spent
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Progress as TrainingProgress

__all__ = [
    "PRECISIONS",
    "Comparison",
    "DeviceSummary",
    "FileProfile",
    "Forecast",
    "LatencyPredictor",
    "Listener",
    "Refusal",
    "ReportFiles",
    "SearchResult",
    "Silent",
    "Spent",
    "TrainingProgress",
    "TrainingRecord",
    "Trial",
    "begin_from",
    "convert_space",
    "end_with_input",
    "evaluate_supernet",
    "export_arch",
    "export_best",
    "export_front",
    "find_arch",
    "finetune",
    "is_searched",
    "join_ranks",
    "join_search",
    "learn_latency",
    "limit_overrides",
    "load_predictor",
    "make_report",
    "open_run",
    "predict_latency",
    "prepare",
    "probe_precisions",
    "propose_space",
    "run_all",
    "search_supernet",
    "searched",
    "space_axes",
    "space_summary",
    "table_facts",
    "train_supernet",
    "tuning",
    "write_profile_page",
]
