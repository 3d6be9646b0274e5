"""What paths are worth on questions of a task that nothing was fitted on, quantity by quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.compare import ACCURACY, SEED, compare_paired, in_words
from drllm.config import TuneConfig
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tasks.examples import Prompt, choose
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.objectives import GOLD, LOSS, choose_objective, make_prompt
from drllm.tuning.path_scorer import Item, make_items, make_text_items, score_paths

QUICK = {"questions": 8, "texts": 4}
WHOLE = {"questions": 1000, "texts": 100}
STATE_CACHE_GB = 1.0


class Quantity(NamedTuple):
    """A quantity on N questions along P paths, `[P][N]`."""

    items: list[Item]
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

    results = {}
    if objective == GOLD:
        items = make_items(routed, prompts(sizes["questions"]), GOLD)
        scores = score_paths(routed, items, paths, GOLD, STATE_CACHE_GB)
        results[ACCURACY] = Quantity(items, scores.right)
        results["gold log-probability"] = Quantity(items, scores.objective)
    texts = prompts(sizes["texts"])
    items = make_items(routed, texts, objective)
    read = {"loss of texts": make_text_items(routed, texts)}
    if objective == LOSS:
        read["loss of right answers"] = items
    for name, text_items in read.items():
        scores = score_paths(routed, text_items, paths, LOSS, STATE_CACHE_GB)
        losses = [[-value for value in values] for values in scores.objective]
        results[name] = Quantity(items, losses)
    return results


def compare_with_full(
    task: str, part: str, results: Mapping[str, Quantity], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Compare the named paths with the full one, which comes first, and print what is found."""
    figures: dict[str, dict[str, Any]] = {}
    for quantity, (_, values) in results.items():
        rows = [compare_paired(quantity, path_values, values[0]) for path_values in values]
        figures[quantity] = dict(zip(names, rows, strict=True))
        scale = 100 if quantity == ACCURACY else 1
        print(f"{task}, {quantity}, {rows[0]['n']} questions of {part}:")
        for name, row in figures[quantity].items():
            change = "" if name == "full" else f"  {in_words(quantity, row)}"
            print(f"  {name:24} {scale * row['mean']:8.3f}{change}", flush=True)
    return figures
