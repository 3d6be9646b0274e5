"""Actions: the edits that lead from the full path to every path of a search.

An edit skips or repeats layers that are executed once so far. So each layer changes at most once on
the way from the full path. Every edit changes something, there are no cycles, and no layer runs
more than twice. Every decision vector within the budget can be reached.
"""

from typing import NamedTuple

from drllm.paths import Decision, Decisions, num_executions

MAX_SKIPPED_AT_ONCE = 2


class Action(NamedTuple):
    """One edit: skip one or two neighbouring layers, or repeat one layer.

    Each of these layers is executed once so far.

    Source: Dr.LLM section 3.1 (skip one or two neighbouring layers, repeat one).
    """

    layer: int  # the first of the layers
    span: int  # 1, or 2 for a skip
    decision: Decision  # `SKIP` or `REPEAT`

    def __str__(self) -> str:
        last = self.layer + self.span - 1
        where = f"{self.layer}" if self.span == 1 else f"{self.layer}-{last}"
        return f"{self.decision.name.lower()} {where}"


def legal_actions(decisions: Decisions, limit: int) -> tuple[Action, ...]:
    """List the legal edits of decisions, for paths of at most `limit` executions.

    Single skips come first, then double skips, then repeats. Each kind is sorted by layer.
    """
    spent = num_executions(decisions)
    actions: list[Action] = []
    for span in range(1, MAX_SKIPPED_AT_ONCE + 1):
        if spent - span < 1:  # at least one execution must stay
            break
        actions += [
            Action(layer, span, Decision.SKIP)
            for layer in range(len(decisions) - span + 1)
            if decisions[layer] == decisions[layer + span - 1] == Decision.EXECUTE
        ]
    if spent < limit:
        actions += [
            Action(layer, 1, Decision.REPEAT)
            for layer, count in enumerate(decisions)
            if count == Decision.EXECUTE
        ]
    return tuple(actions)


def apply(decisions: Decisions, action: Action) -> Decisions:
    """Return the decisions after a legal edit."""
    before = decisions[: action.layer]
    edited = (int(action.decision),) * action.span
    after = decisions[action.layer + action.span :]
    return before + edited + after
