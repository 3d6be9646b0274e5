"""What paths are worth on questions of a task that nothing was fitted on, quantity by quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.compare import ACCURACY, SEED, compared, in_words
from drllm.config import TuneConfig
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tasks.examples import Prompt, choose
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.objectives import GOLD, LOSS, choose_objective, make_prompt
from drllm.tuning.path_scorer import Item, PathScorer, make_items, make_text_items

QUICK = {"questions": 8, "texts": 4}
WHOLE = {"questions": 1000, "texts": 100}
STATE_CACHE_GB = 1.0


class Quantity(NamedTuple):
    """One of them: the questions as they are asked, N, and what P paths are worth, `[P][N]`."""

    asked: list[Item]
    values: list[list[float]]


def measure_quantities(
    routed: RoutedModel,
    parts: TaskSplits,
    part: str,
    paths: Sequence[StaticPath],
    sizes: Mapping[str, int],
) -> dict[str, Quantity]:
    """Return each quantity along each path: where there are options, accuracy and log-probability.

    Of all tasks the next-token loss of texts, and of right answers where they are read.
    """
    objective = choose_objective(parts.task, TuneConfig())

    def prompts(num: int) -> list[Prompt]:
        chosen = choose(parts.examples[part], num, SEED)
        return [make_prompt(parts.task, example, objective) for example in chosen]

    def scores(items: Sequence[Item], what: str) -> tuple[list[list[float]], list[list[float]]]:
        found = PathScorer(routed, items, what, STATE_CACHE_GB).score(paths)
        return found.objective, found.right

    found = {}
    if objective == GOLD:
        asked = make_items(routed, prompts(sizes["questions"]), GOLD)
        objectives, right = scores(asked, GOLD)
        found[ACCURACY] = Quantity(asked, right)
        found["gold log-probability"] = Quantity(asked, objectives)
    texts = prompts(sizes["texts"])
    asked = make_items(routed, texts, objective)
    read = {"loss of texts": make_text_items(routed, texts)}
    if objective == LOSS:
        read["loss of right answers"] = asked
    for name, items in read.items():
        values, _ = scores(items, LOSS)
        found[name] = Quantity(asked, [[-value for value in own] for own in values])
    return found


def compare_with_full(
    task: str, part: str, found: Mapping[str, Quantity], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Compare the named paths with the full one, which comes first, and print what is found."""
    figures: dict[str, dict[str, Any]] = {}
    for quantity, (_, values) in found.items():
        rows = [compared(quantity, own, values[0]) for own in values]
        figures[quantity] = dict(zip(names, rows, strict=True))
        scale = 100 if quantity == ACCURACY else 1
        print(f"{task}, {quantity}, {rows[0]['n']} questions of {part}:")
        for name, row in figures[quantity].items():
            change = "" if name == "full" else f"  {in_words(quantity, row)}"
            print(f"  {name:24} {scale * row['mean']:8.3f}{change}", flush=True)
    return figures
