"""What a person sees in the terminal: progress on stderr, results on stdout."""

from nestling.console.devices import (
    print_comparisons,
    print_devices,
    print_latency,
    print_precisions,
    print_profiles,
)
from nestling.console.networks import (
    print_best,
    print_evaluation,
    print_finetuned,
    print_front,
    print_members,
    print_next,
    print_space,
    print_trials,
)
from nestling.console.progress import display

__all__ = [
    "display",
    "print_best",
    "print_comparisons",
    "print_devices",
    "print_evaluation",
    "print_finetuned",
    "print_front",
    "print_latency",
    "print_members",
    "print_next",
    "print_precisions",
    "print_profiles",
    "print_space",
    "print_trials",
]
