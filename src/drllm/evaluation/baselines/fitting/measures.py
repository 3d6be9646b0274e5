"""How good decisions are on questions that a setting may be chosen on, as a tuning judges paths.

Two measures, both in nats and the larger the better: the gold option's log-probability among the
options, and the log-probability of a text's tokens. They raise `ModelError` where that of the full
path isn't finite; other decisions are the worst then.
"""

from collections.abc import Callable, Sequence

import numpy as np

from drllm.evaluation.baselines.base import Material, Measure
from drllm.models.scoring.packing import Question
from drllm.paths import Decisions, StaticPath, to_path
from drllm.tuning.judge import Item, Judge
from drllm.tuning.parts import GOLD, LOSS

STATE_CACHE_GB = 1.0


def by_loss(material: Material) -> Measure:
    """Return the mean log-probability of a token of the calibration prompts, but their first ones.

    Source: SLEB (arXiv 2402.09025), which chooses by perplexity.
    """
    texts = [Question(ids[:1], [ids[1:]]) for ids in material.prompts if len(ids) > 1]
    num_tokens = [len(text.continuations[0]) for text in texts]
    return _measure(material, list(map(Item, texts)), LOSS, num_tokens)


def by_answers(material: Material) -> Measure:
    """Return the mean log-probability of the gold options, of the options and not of the text.

    Source: TALE (arXiv 2510.22767), by log-probability (D-18).
    """
    items = list(map(Item, material.questions, material.golds))
    return _measure(material, items, GOLD, [1] * len(items))


def _measure(
    material: Material, items: Sequence[Item], objective: str, weights: Sequence[int]
) -> Measure:
    judge = Judge(material.routed, items, objective, STATE_CACHE_GB)

    def measure(candidates: Sequence[Decisions]) -> list[float]:
        paths = [StaticPath(to_path(decisions)) for decisions in candidates]
        values = judge.scores(paths).objective  # [N][Q]
        means: list[float] = np.average(values, axis=1, weights=weights).tolist()
        return means

    return measure


MEASURES: dict[str, Callable[[Material], Measure]] = {
    "loss": by_loss,
    "answers": by_answers,
}
