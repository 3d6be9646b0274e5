"""What paths are worth on questions of a task that nothing was fitted on, quantity by quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.compare import ACCURACY, SEED
from drllm.config import TuneConfig
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tasks.base import Prompt, choose
from drllm.tuning.judge import Item, Judge, items_of, texts_of
from drllm.tuning.parts import GOLD, LOSS, TaskParts, objective_of, prompt_of

QUICK = {"questions": 8, "texts": 4}
WHOLE = {"questions": 1000, "texts": 100}
STATE_CACHE_GB = 1.0


class Quantity(NamedTuple):
    """One of them: the questions as they are asked, N, and what P paths are worth, `[P][N]`."""

    asked: list[Item]
    values: list[list[float]]


def quantities(
    routed: RoutedModel,
    parts: TaskParts,
    part: str,
    paths: Sequence[StaticPath],
    sizes: Mapping[str, int],
) -> dict[str, Quantity]:
    """Return each quantity along each path: where there are options, accuracy and log-probability.

    Of all tasks the next-token loss of texts, and of right answers where they are read.
    """
    objective = objective_of(parts.task, TuneConfig())

    def prompts(num: int) -> list[Prompt]:
        chosen = choose(parts.examples[part], num, SEED)
        return [prompt_of(parts.task, example, objective) for example in chosen]

    def scores(items: Sequence[Item], what: str) -> tuple[list[list[float]], list[list[float]]]:
        found = Judge(routed, items, what, STATE_CACHE_GB).scores(paths)
        return found.objective, found.right

    found = {}
    if objective == GOLD:
        asked = items_of(routed, prompts(sizes["questions"]), GOLD)
        objectives, right = scores(asked, GOLD)
        found[ACCURACY] = Quantity(asked, right)
        found["gold log-probability"] = Quantity(asked, objectives)
    texts = prompts(sizes["texts"])
    asked = items_of(routed, texts, objective)
    read = {"loss of texts": texts_of(routed, texts)}
    if objective == LOSS:
        read["loss of right answers"] = asked
    for name, items in read.items():
        values, _ = scores(items, LOSS)
        found[name] = Quantity(asked, [[-value for value in own] for own in values])
    return found
