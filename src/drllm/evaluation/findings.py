"""The sentences under the table: what the numbers allow to be said, and nothing more.

Owns the wording and the rules for when a difference is called one. Every sentence is computed
from per-question outcomes; none can claim a gain that its paired test doesn't show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drllm.cost import share_saved
from drllm.evaluation.statistics import mcnemar_exact, paired_bootstrap

ALPHA = 0.05


def findings(
    *,
    task: str,
    rows: Mapping[str, Mapping[str, Any]],
    correct: Mapping[str, Sequence[float]],
    gold_logprob: Mapping[str, Sequence[float]],
    chance: float,
    num_layers: int,
    seed: int,
) -> list[str]:
    """Return what a reader may conclude, one sentence per question asked.

    Args:
        task: The task's name.
        rows: The table's rows by system.
        correct: Per question, the share of draws answered right, by system.
        gold_logprob: Per question, the gold option's log-probability in nats, by system.
        chance: Accuracy of guessing.
        num_layers: L.
        seed: Of the bootstrap.

    Returns:
        Sentences on: whether the base is above chance, routed against base in accuracy, in gold
        log-probability, and routed against its own routes permuted.
    """
    base, routed = rows["base"], rows["routed"]
    n = len(correct["base"])
    saved = 100 * share_saved(routed["executions"], num_layers)
    sentences = []
    if base["interval"][0] <= chance:
        sentences.append(
            f"On {task} the base model is not shown to be above chance ({100 * chance:.1f} %), so "
            f'no gain and no "no loss" can be claimed here.'
        )
    sentences.append(
        f"The routed model runs {routed['executions']:.2f} of {num_layers} layers a forward pass "
        + (f"({saved:.1f} % saved)" if saved >= 0 else f"({-saved:.1f} % more than the base)")
        + f" and answers {100 * routed['accuracy']:.1f} % of {n} questions right, the base model "
        f"{100 * base['accuracy']:.1f} %: {_accuracy_verdict(correct, seed)}"
    )
    lower, upper, mean = _difference(gold_logprob["routed"], gold_logprob["base"], seed)
    what = "lower" if upper < 0 else "higher" if lower > 0 else "not shown to differ"
    sentences.append(
        f"The gold answer's log-probability among the options is {what} under routing "
        f"({mean:+.3f} nats a question, 95 % interval {lower:+.3f} to {upper:+.3f})."
    )
    if "permuted routes" in correct:
        lower, upper, mean = _difference(correct["routed"], correct["permuted routes"], seed)
        if lower > 0:
            said = "the match of route and question matters"
        elif upper < 0:
            said = "the routes do better on other questions than on their own"
        else:
            said = "it is not shown that reading the question matters"
        sentences.append(
            f"Against its own routes permuted over the questions the routed model is "
            f"{100 * mean:+.1f} points ({100 * lower:+.1f} to {100 * upper:+.1f}): {said}."
        )
    return sentences


def _difference(
    first: Sequence[float], second: Sequence[float], seed: int
) -> tuple[float, float, float]:
    differences = [a - b for a, b in zip(first, second, strict=True)]
    lower, upper = paired_bootstrap(differences, seed)
    return lower, upper, sum(differences) / len(differences)


def _accuracy_verdict(correct: Mapping[str, Sequence[float]], seed: int) -> str:
    pairs = list(zip(correct["routed"], correct["base"], strict=True))
    won, lost = sum(r > b for r, b in pairs), sum(r < b for r, b in pairs)
    p = mcnemar_exact(won, lost)
    lower, upper, mean = _difference(correct["routed"], correct["base"], seed)
    numbers = (
        f"{100 * mean:+.1f} points, 95 % interval {100 * lower:+.1f} to {100 * upper:+.1f}, "
        f"won {won}, lost {lost}, exact McNemar p = {p:.3g}"
    )
    if p < ALPHA:
        return f"routing {'gains' if mean > 0 else 'loses'} accuracy ({numbers})."
    return (
        f"no difference is shown ({numbers}); a loss of up to {max(0.0, -100 * lower):.1f} points "
        f"is not excluded."
    )
