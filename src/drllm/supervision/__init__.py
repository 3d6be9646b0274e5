"""Supervision: which of the paths that a search tried becomes a question's target.

`rules` picks one question's target or says why there is none, `quotas` limits how many targets a
task has, `selection` applies both to all questions, `summary` counts what was found and what
became of it, `files` reads search files and writes
`supervision.jsonl`; `agreement` counts how far decisions agree with targets, and `baselines` what
those that ignore the question would. Leaves trying and re-testing paths to the search, the file
format to `records`, and what is learnt from a target to the training. Loads no torch.
"""

from drllm.supervision.files import write
from drllm.supervision.rules import (
    REASONS,
    choose,
    is_improving,
    is_saving,
    is_valid,
    survived,
)
from drllm.supervision.select import Supervision, check_settings, targets
from drllm.supervision.summary import summarise

__all__ = [
    "REASONS",
    "Supervision",
    "check_settings",
    "choose",
    "is_improving",
    "is_saving",
    "is_valid",
    "summarise",
    "survived",
    "targets",
    "write",
]
