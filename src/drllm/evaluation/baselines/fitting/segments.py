"""Trained baseline: the whole program predicted up front, segment by segment.

Axes: N questions, B rows, D hidden, L layers, H width, C = 3 operations.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drllm.errors import RecordError
from drllm.evaluation.baselines.fitting.planners import Planner, fit, linear
from drllm.paths import Decisions, full_decisions
from drllm.records import SearchRecord
from drllm.supervision.rules import is_saving, is_valid

LONGEST = {0: 4, 1: 4, 2: 1}
"""Maximum layers of a segment, by what is done with it. A decision of 2 runs one layer twice in
succession, so two repeated neighbours are two segments: repeating both as a block is another path,
which the search log can't hold."""
MAXIMUM_PATHS = 50
"""Maximum valid paths of a question that are learned from."""
FULL_PATH_WEIGHT = 0.30
"""Weight of the full path beside shorter valid paths, whose weight is 1."""
WIDTH = 128


# --- what is learned -----------------------------------------------------------------------------


def segments_of(decisions: Decisions) -> list[tuple[int, int]]:
    """Cut decisions `[L]` into the fewest segments, long ones first: first layers and decisions.

    Example:
        >>> segments_of((1, 1, 1, 1, 1, 0, 2, 2))
        [(0, 1), (4, 1), (5, 0), (6, 2), (7, 2)]
    """
    segments: list[tuple[int, int]] = []
    for layer, decision in enumerate(decisions):
        start, before = segments[-1] if segments else (0, -1)
        if decision != before or layer - start == LONGEST[decision]:
            segments.append((layer, decision))
    return segments


@dataclass(frozen=True, slots=True)
class Programs:
    """The valid programs of searched questions, added up by question.

    A program's loss is linear in what the program says of each layer, so the weighted sums over a
    question's programs say all that is needed to learn them.

    Attributes:
        questions: `[N]`: the places, among the records, of the questions with a valid program.
        starts: `[N, L]`: the weight of those with a segment that starts at the layer. All start
            one at layer 0, whose weight, at most 1, is that of all together.
        operations: `[N, L, C]`: the weight of those that do this from there, each divided by its
            number of segments.
    """

    questions: Tensor
    starts: Tensor
    operations: Tensor


def programs_of(records: Sequence[SearchRecord], seed: int = 0) -> Programs:
    """Collect the valid programs of a search log.

    A question without a valid path teaches nothing and is left out. Of more than `MAXIMUM_PATHS`
    that many are drawn. If a shorter path is valid too, the full path counts `FULL_PATH_WEIGHT`, so
    that the predictor isn't drawn to it; each weight is then divided by the question's number of
    paths, so that no question counts more than another.

    Raises:
        RecordError: No record has a valid path.

    Source: PoLar (arXiv 2606.06574), and the published code for what 0.30 is a weight of.
    """
    rng = random.Random(seed)
    places = [i for i, record in enumerate(records) if any(map(is_valid, record.paths))]
    if not places:
        raise RecordError(
            "no question of these search records has a valid path, so there is no program to "
            "learn; search more questions"
        )
    L = records[0].num_layers
    starts, operations = torch.zeros(len(places), L), torch.zeros(len(places), L, 3)
    for row, place in enumerate(places):
        record = records[place]
        valid = [path.decisions for path in record.paths if is_valid(path)]
        if len(valid) > MAXIMUM_PATHS:
            valid = rng.sample(valid, MAXIMUM_PATHS)
        has_shorter = any(is_saving(path, record) for path in record.paths)
        for decisions in valid:
            is_lighter = has_shorter and decisions == full_decisions(L)
            weight = (FULL_PATH_WEIGHT if is_lighter else 1.0) / len(valid)
            segments = segments_of(decisions)
            for layer, decision in segments:
                starts[row, layer] += weight
                operations[row, layer, decision] += weight / len(segments)
    return Programs(torch.tensor(places), starts, operations)


# --- the predictor -------------------------------------------------------------------------------


class ProgramPredictor(Planner):
    """Gives, for every layer, the logit of a segment's start and those of its operation.

    Source: PoLar (arXiv 2606.06574), much simplified; docs/differences.md (D-18) says how.
    """

    def __init__(self, inputs: Tensor, num_layers: int, generator: torch.Generator) -> None:
        super().__init__(inputs)
        self.project = linear(inputs.shape[1], WIDTH, generator)
        self.queries = nn.Parameter(torch.randn(num_layers, WIDTH, generator=generator))
        self.start = linear(WIDTH, 1, generator)
        self.operation = linear(WIDTH, 3, generator)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of starts `[B, L]` and of operations `[B, L, C]`."""
        prompt = self.project(self.scaled(inputs))  # [B, H]
        inner = nn.functional.gelu(prompt[:, None] + self.queries)  # [B, L, H]
        return self.start(inner)[..., 0], self.operation(inner)

    def likeliest(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """See `Planner.likeliest`."""
        starts, operations = self(inputs)
        return best_programs(starts, operations, depth_bias)


def best_programs(starts: Tensor, operations: Tensor, depth_bias: float) -> Tensor:
    """Return the likeliest program of each row, by dynamic programming over its segments.

    A program's log-probability is the sum, over layers, of that of a segment starting there or
    not, and, over segments, of that of the operation at its first layer; the first layer always
    starts one. The bias is taken off for each execution.

    Args:
        starts: `[B, L]` logits.
        operations: `[B, L, C]` logits.
        depth_bias: The price of an execution.

    Returns:
        `[B, L]` decisions; they may skip every layer.
    """
    B, L = starts.shape
    start = nn.functional.logsigmoid(starts)
    inside = nn.functional.logsigmoid(-starts).cumsum(dim=1)  # [B, L], of no start up to here
    operation = operations.log_softmax(dim=-1)
    choices = [(d, n) for d, longest in LONGEST.items() for n in range(1, longest + 1)]
    best = [starts.new_zeros(B)]  # by layers decided: the best score so far
    taken: list[Tensor] = []  # likewise: which choice the last segment was
    for end in range(1, L + 1):
        scores = []
        for decision, length in choices:
            first = end - length
            if first < 0:
                scores.append(torch.full_like(best[0], -torch.inf))
                continue
            score = best[first] + operation[:, first, decision] + inside[:, end - 1]
            score = score - inside[:, first] - depth_bias * decision * length
            scores.append(score + start[:, first] if first else score)
        highest = torch.stack(scores).max(dim=0)
        best.append(highest.values)
        taken.append(highest.indices)
    rows = []
    for row in torch.stack(taken, dim=1).tolist():
        decisions: list[int] = []
        while len(decisions) < L:  # from the last segment to the first
            decision, length = choices[row[L - 1 - len(decisions)]]
            decisions += [decision] * length
        rows.append(decisions[::-1])
    return torch.tensor(rows)


def train_predictor(
    inputs: Tensor, programs: Programs, *, seed: int = 0, **settings: Any
) -> ProgramPredictor:
    """Train a predictor on the valid programs of a search log; an example is a question.

    Inputs are `first_inputs` of all records' prompts; settings are `planners.fit`'s.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = inputs[programs.questions]
    predictor = ProgramPredictor(inputs, programs.starts.shape[1], generator)

    def loss(rows: Tensor) -> Tensor:
        starts, operations = predictor(inputs[rows])
        losses = program_losses(starts, operations, programs, rows)
        return losses.sum() / programs.starts[rows, 0].sum()

    fit(predictor, loss, len(inputs), generator, **settings)
    return predictor


def program_losses(starts: Tensor, operations: Tensor, programs: Programs, rows: Tensor) -> Tensor:
    """Return the weighted losses of some questions' programs, added up by question, `[B]`.

    The loss of a program is the mean binary cross-entropy of the starts (but the first layer's,
    which always is one) plus the mean cross-entropy of the operations where its segments start.
    Logits are `[B, L]` and `[B, L, C]`; `rows` are the places of the questions.
    """
    starting = programs.starts[rows]
    log_start, log_inside = nn.functional.logsigmoid(starts), nn.functional.logsigmoid(-starts)
    of_starts = starting * log_start + (starting[:, :1] - starting) * log_inside  # [B, L]
    of_operations = programs.operations[rows] * operations.log_softmax(dim=-1)  # [B, L, C]
    return -(of_starts[:, 1:].mean(dim=1) + of_operations.sum(dim=(1, 2)))
