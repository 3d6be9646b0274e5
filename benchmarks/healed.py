"""What static paths, healed or not, change about a model on questions that nothing was fitted on.

Of each task it asks the questions that `drllm tune` and `drllm heal` leave to be tested on, or
those that certify. Where there are options: accuracy, and the right option's log-probability among
them. Of all tasks: the next-token loss of questions with their right answers, and of the right
answers alone where they are read. Everything is a difference from the full path, with its 95 %
interval.

    python benchmarks/healed.py --paths FILE[:NAME],... [--tasks TASKS] [--part test|certify]
        [--questions N] [--texts N] [--quick] [--json FILE] [--data-dir DIR] [--model MODEL]
        [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import common

from drllm.config import TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.models.healed import load_path
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.static_paths import CERTIFY, TEST, read_path_list
from drllm.statistics.intervals import mean_interval
from drllm.statistics.paired import maximum_loss, mcnemar_exact, paired_interval, won_lost
from drllm.tasks.base import Prompt, choose
from drllm.tuning.judge import Judge, items_of, texts_of
from drllm.tuning.parts import GOLD, LOSS, TaskParts, objective_of, parts_of_tasks, prompt_of

QUICK = {"questions": 8, "texts": 4}
WHOLE = {"questions": 1000, "texts": 100}
SEED, STATE_CACHE_GB = 0, 1.0


def change(ours: Sequence[float], full: Sequence[float]) -> dict[str, Any]:
    """Return the mean of what is measured, its mean change from the full path, and the interval."""
    changes = [one - other for one, other in zip(ours, full, strict=True)]
    return {
        "mean": fmean(ours),
        "change": fmean(changes),
        "interval": mean_interval(changes, SEED),
        "n": len(changes),
    }


def accuracy(ours: Sequence[float], full: Sequence[float]) -> dict[str, Any]:
    """Return the share of right answers, its change from the full path, and which loss is excluded.

    `excluded` is what `drllm tune --epsilon` compares: with 95 % probability less is lost.
    """
    won, lost = won_lost(ours, full)
    return {
        "mean": fmean(ours),
        "change": fmean(ours) - fmean(full),
        "interval": paired_interval(won, lost, len(full)),
        "won": won,
        "lost": lost,
        "p": mcnemar_exact(won, lost),
        "excluded": maximum_loss(won, lost, len(full)),
        "n": len(full),
    }


def measured(
    routed: RoutedModel, parts: TaskParts, part: str, paths: Sequence[StaticPath], sizes: Any
) -> dict[str, list[dict[str, Any]]]:
    """Return each quantity along each path, the full one first."""
    objective = objective_of(parts.task, TuneConfig())

    def prompts(num: int) -> list[Prompt]:
        chosen = choose(parts.examples[part], num, SEED)
        return [prompt_of(parts.task, example, objective) for example in chosen]

    def scored(items: Any, what: str) -> Any:
        return Judge(routed, items, what, STATE_CACHE_GB).scores(paths)

    found: dict[str, list[dict[str, Any]]] = {}
    if objective == GOLD:
        scores = scored(items_of(routed, prompts(sizes["questions"]), GOLD), GOLD)
        found["accuracy"] = [accuracy(own, scores.right[0]) for own in scores.right]
        golds = scores.objective
        found["gold log-probability"] = [change(own, golds[0]) for own in golds]
    texts = prompts(sizes["texts"])
    read = {"loss of texts": texts_of(routed, texts)}
    if objective == LOSS:
        read["loss of right answers"] = items_of(routed, texts, LOSS)
    for name, items in read.items():
        losses = [[-value for value in own] for own in scored(items, LOSS).objective]
        found[name] = [change(own, losses[0]) for own in losses]
    return found


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--paths", required=True, help="static paths, as drllm evaluate takes them")
    parser.add_argument("--tasks", default=TuneConfig().tasks, help="comma list")
    parser.add_argument("--part", choices=(TEST, CERTIFY), default=TEST, help="which questions")
    parser.add_argument("--questions", type=int, help="with options, of a task at most")
    parser.add_argument("--texts", type=int, help="whose next-token loss is read, of a task")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    # A healing trains on all questions that may be fitted on, so none of these certifies.
    config = TuneConfig(data_dir=options.data_dir, num_fit=LARGEST_INT)
    divided = parts_of_tasks(config, options.tasks)
    files = read_path_list(options.paths)
    base = common.base_of(options)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    paths = {"full": StaticPath(range(base.num_layers))}
    paths |= {name: load_path(routed, file) for name, file in files.items()}
    options.clock = "none"
    figures: dict[str, Any] = {"of": common.of(base, options), "part": options.part, "tasks": {}}
    for parts in divided:
        found = measured(routed, parts, options.part, [*paths.values()], sizes)
        figures["tasks"][parts.task.name] = {
            quantity: dict(zip(paths, rows, strict=True)) for quantity, rows in found.items()
        }
        for quantity, rows in found.items():
            scale = 100 if quantity == "accuracy" else 1
            print(f"{parts.task.name}, {quantity}, {rows[0]['n']} questions of {options.part}:")
            for name, row in zip(paths, rows, strict=True):
                low, high = (scale * end for end in row["interval"])
                said = f"  {name:24} {scale * row['mean']:8.3f}"
                if name != "full":
                    said += f"  {scale * row['change']:+.3f} ({low:+.3f} to {high:+.3f})"
                    if "p" in row:
                        said += f"  {row['won']} won, {row['lost']} lost, p = {row['p']:.2g}"
                        said += f"; a loss of {100 * row['excluded']:.2f} is excluded"
                print(said, flush=True)
    common.write(options, figures)


if __name__ == "__main__":
    main()
