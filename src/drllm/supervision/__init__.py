"""Supervision: which of the paths that a search tried becomes a question's target.

`rules` picks one question's target or says why there is none, `quotas` limits how many targets a
task has, `select` applies both to all questions and writes `supervision.jsonl`, `summary` counts
what was found and what became of it. Loads no torch.
"""

from drllm.records import rejected_path
from drllm.supervision.rules import (
    REASONS,
    TARGETS,
    choose,
    is_improving,
    is_saving,
    is_valid,
    survived,
)
from drllm.supervision.select import Supervision, check_settings, supervise, targets
from drllm.supervision.summary import summarise

__all__ = [
    "REASONS",
    "TARGETS",
    "Supervision",
    "check_settings",
    "choose",
    "is_improving",
    "is_saving",
    "is_valid",
    "rejected_path",
    "summarise",
    "supervise",
    "survived",
    "targets",
]
