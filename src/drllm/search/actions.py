"""Actions: the edits of decisions that a search makes, starting from the full path.

An action edits only layers that the decisions execute once, so every layer is edited at most once.
Edits never lead back to earlier decisions, and no layer runs more than twice. All decisions within
the budget can be reached from the full path.
"""

from typing import NamedTuple

from drllm.paths import Decision, Decisions, num_executions

MAX_SKIPPED_AT_ONCE = 2


class Action(NamedTuple):
    """One edit: skip one layer, skip two neighbouring layers, or repeat one layer.

    Source: Dr.LLM section 3.1.
    """

    layer: int  # the first layer that is edited
    span: int  # number of edited layers: 1 or 2 for a skip, 1 for a repeat
    decision: Decision  # the new decision of these layers: `SKIP` or `REPEAT`

    def __str__(self) -> str:
        layers = str(self.layer)
        if self.span > 1:
            layers = f"{self.layer}-{self.layer + self.span - 1}"
        return f"{self.decision.name.lower()} {layers}"


def legal_actions(decisions: Decisions, limit: int) -> tuple[Action, ...]:
    """List the edits of decisions whose result has between 1 and `limit` executions.

    Skips of one layer come first, then skips of two layers, then repeats. Each kind is sorted by
    layer.
    """
    executions = num_executions(decisions)
    actions: list[Action] = []
    for span in range(1, MAX_SKIPPED_AT_ONCE + 1):
        if executions - span < 1:  # at least one execution must stay
            break
        for layer in range(len(decisions) - span + 1):
            skipped_layers = decisions[layer : layer + span]
            if all(decision == Decision.EXECUTE for decision in skipped_layers):
                actions.append(Action(layer, span, Decision.SKIP))
    if executions < limit:
        actions += [
            Action(layer, 1, Decision.REPEAT)
            for layer, decision in enumerate(decisions)
            if decision == Decision.EXECUTE
        ]
    return tuple(actions)


def apply(decisions: Decisions, action: Action) -> Decisions:
    """Return the decisions after an edit."""
    before = decisions[: action.layer]
    edited = (int(action.decision),) * action.span
    after = decisions[action.layer + action.span :]
    return before + edited + after
