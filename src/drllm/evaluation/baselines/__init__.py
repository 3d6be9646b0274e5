"""Baselines at equal executions: what a router must beat to have learned anything.

One module an baseline, or a kind of them; `evaluation.roster` lists them all. Each gives decisions
`[Q, L]`, a policy, or a path to export, and is fitted on questions that no result is reported on.
Leaves running and scoring them to the evaluator.
"""

from drllm.evaluation.baselines.bisection import Setting
from drllm.evaluation.baselines.early_exit import (
    ExitPolicy,
    confidences,
    executions_at,
    find_threshold,
)
from drllm.evaluation.baselines.first_layer import UpFrontPolicy, find_bias, first_inputs
from drllm.evaluation.baselines.fitting import FitSettings
from drllm.evaluation.baselines.greedy import Greedy
from drllm.evaluation.baselines.influence import block_influence, order_by_influence
from drllm.evaluation.baselines.layer_dropping import (
    evenly_spaced,
    last_layers,
    mixture,
    nested,
    skipping,
)
from drllm.evaluation.baselines.measures import (
    gold_logprob,
    gold_logprob_along,
    text_question,
    token_logprob,
)
from drllm.evaluation.baselines.program import BestProgram, best_program, programs_in, reach
from drllm.evaluation.baselines.random_routes import (
    expected_executions,
    label_frequency,
    permuted,
    random_like,
    share_unchanged,
    tilted,
)
from drllm.evaluation.baselines.repeat import RepeatedBlock, best_block
from drllm.evaluation.baselines.segments import programs_of, train_predictor
from drllm.evaluation.baselines.sequence import train_sequence_router

__all__ = [
    "BestProgram",
    "ExitPolicy",
    "FitSettings",
    "Greedy",
    "RepeatedBlock",
    "Setting",
    "UpFrontPolicy",
    "best_block",
    "best_program",
    "block_influence",
    "confidences",
    "evenly_spaced",
    "executions_at",
    "expected_executions",
    "find_bias",
    "find_threshold",
    "first_inputs",
    "gold_logprob",
    "gold_logprob_along",
    "label_frequency",
    "last_layers",
    "mixture",
    "nested",
    "order_by_influence",
    "permuted",
    "programs_in",
    "programs_of",
    "random_like",
    "reach",
    "share_unchanged",
    "skipping",
    "text_question",
    "tilted",
    "token_logprob",
    "train_predictor",
    "train_sequence_router",
]
