"""Which loss of a path do all questions of several sets exclude together?

Each set is divided in halves, drawn with a seed. The full path answers the first half: a set counts
where it is shown to be better than guessing there. The questions of the second halves of these sets
are pooled, and the full path and the shorter one answer each of them: the difference in accuracy,
its 95 % interval by Tango's score and McNemar's exact test. The loss of texts is measured on
questions with their right answers from the second halves of all sets.

The path must not have seen these sets. What is measured is kept in `--output-dir`, so the same
command goes on after a kill.

    python benchmarks/pooled.py --path FILE[:NAME] --tasks TASKS [--texts N] [--questions N]
        [--output-dir DIR] [--quick] [--json FILE] [--data-dir DIR] [--model MODEL]
        [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import msgspec
from common.compare import ACCURACY, SEED, average_kinds, compare_paired, in_words
from common.path_values import hash_path
from common.questions import read_all_examples

from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.healed import install_path
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.records.static_paths import load_path
from drllm.statistics.intervals import wilson_interval
from drllm.tasks.examples import OPTIONS_REWARD, Prompt
from drllm.tasks.registry import get_task
from drllm.tuning.objectives import GOLD, LOSS
from drllm.tuning.path_scorer import make_items, make_text_items, score_paths
from drllm.work.store import ResultStore

QUICK = {"texts": 4, "questions": 24}
WHOLE = {"texts": 300, "questions": 1_000_000}
BLOCK = 50
"""Questions that are answered before the result is kept."""
CACHE_GB = 1.0
FULL = "full"
SHORTER = "path"


class BlockResult(msgspec.Struct, frozen=True, kw_only=True):
    """The values of the questions of a block along one path: 1 for right, or a loss in nats."""

    values: list[float]


@dataclass(frozen=True)
class Halves:
    """A set of questions in two halves.

    Attributes:
        name: The set's name.
        first: The prompts that decide whether the full path is better than guessing.
        second: The prompts that are pooled.
        chance: The share of right answers of guessing on the first half.
    """

    name: str
    first: list[Prompt]
    second: list[Prompt]
    chance: float


def divide_set(name: str, data_dir: str | None, num_questions: int) -> Halves:
    """Return all questions of a set, each text once, divided in random halves."""
    task = get_task(name)
    chosen = read_all_examples(task, data_dir)
    random.Random(SEED).shuffle(chosen)
    chosen = chosen[:num_questions]
    middle = len(chosen) // 2
    prompts = [task.prompt(example, OPTIONS_REWARD) for example in chosen]
    return Halves(
        name=task.name,
        first=prompts[:middle],
        second=prompts[middle:],
        chance=fmean(1 / len(prompt.continuations) for prompt in prompts[:middle]),
    )


class Measurer:
    """Answers questions along paths in blocks, and keeps what is measured.

    Args:
        routed: The model, routed.
        base: The model.
        paths: The paths by name, of which healed ones are already installed.
        sets: The sets of questions.
        labels: What each path's measurements are kept under; that of a shorter path has the hash
            of its files, so that another path goes on with the same answers of the full one.
        folder: Where measurements are kept.
    """

    def __init__(
        self,
        routed: RoutedModel,
        base: BaseModel,
        paths: Mapping[str, StaticPath],
        sets: Sequence[Halves],
        labels: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.routed = routed
        self.paths = paths
        self.labels = labels
        identity = {
            "model": base.identity,
            "runtime": base.runtime,
            "prompts_sha256": hash_values(
                prompt for each in sets for prompt in (*each.first, *each.second)
            ),
        }
        self.store = ResultStore(folder, identity, stage="benchmark")
        self.store.open()

    def answer(self, name: str, label: str, prompts: Sequence[Prompt]) -> list[float]:
        """Return for each question 1 if the path answers it right, else 0."""
        return self._in_blocks(name, f"{label}, answers", prompts, self._find_right)

    def read(self, name: str, label: str, prompts: Sequence[Prompt]) -> list[float]:
        """Return the next-token loss of each question with its right answer."""
        return self._in_blocks(name, f"{label}, texts", prompts, self._find_loss)

    def _in_blocks(
        self, name: str, label: str, prompts: Sequence[Prompt], measure: Any
    ) -> list[float]:
        values = []
        for start in range(0, len(prompts), BLOCK):
            block = prompts[start : start + BLOCK]
            key = f"{self.labels[name]}, {label}, {len(block)} from {start}"
            make = partial(measure, self.paths[name], block)
            values += self.store.get_or_make(key, BlockResult, make).values
            print(f"{name}, {label}: {len(values)} of {len(prompts)}", flush=True)
        return values

    def _find_right(self, path: StaticPath, prompts: Sequence[Prompt]) -> BlockResult:
        items = make_items(self.routed, prompts, GOLD)
        [right] = score_paths(self.routed, items, [path], GOLD, CACHE_GB).right
        return BlockResult(values=list(right))

    def _find_loss(self, path: StaticPath, prompts: Sequence[Prompt]) -> BlockResult:
        items = make_text_items(self.routed, prompts)
        [values] = score_paths(self.routed, items, [path], LOSS, CACHE_GB).objective
        return BlockResult(values=[-value for value in values])


def find_sets_that_count(measurer: Measurer, sets: Sequence[Halves]) -> list[dict[str, Any]]:
    """Tell of each set whether the full path is better than guessing on the first half."""
    rows = []
    for each in sets:
        right = measurer.answer(FULL, f"{each.name}, first half", each.first)
        low, high = wilson_interval(round(sum(right)), len(right))
        rows.append(
            {
                "set": each.name,
                "questions": len(each.first) + len(each.second),
                "accuracy": fmean(right),
                "interval": [low, high],
                "chance": each.chance,
                "counts": low > each.chance,
            }
        )
    return rows


def compare_answers(measurer: Measurer, sets: Sequence[Halves]) -> dict[str, Any]:
    """Compare the answers along both paths to the second halves, of each set and pooled."""
    figures: dict[str, Any] = {}
    pooled: dict[str, list[float]] = {FULL: [], SHORTER: []}
    for each in sets:
        values = {
            name: measurer.answer(name, f"{each.name}, second half", each.second)
            for name in (FULL, SHORTER)
        }
        figures[each.name] = compare_paired(ACCURACY, values[SHORTER], values[FULL])
        for name in pooled:
            pooled[name] += values[name]
    if pooled[FULL]:
        figures["pooled"] = compare_paired(ACCURACY, pooled[SHORTER], pooled[FULL])
    return figures


def compare_texts(measurer: Measurer, sets: Sequence[Halves], num_texts: int) -> dict[str, Any]:
    """Compare the loss of texts of the second halves, of each set and the mean over sets."""
    increases = {}
    for each in sets:
        prompts = each.second[:num_texts]
        label = f"{each.name}, second half"
        losses = {name: measurer.read(name, label, prompts) for name in (FULL, SHORTER)}
        pairs = zip(losses[SHORTER], losses[FULL], strict=True)
        increases[each.name] = [shorter - full for shorter, full in pairs]
    mean, interval = average_kinds(increases)
    return {
        "by_set": {name: fmean(values) for name, values in increases.items()},
        "mean": mean,
        "interval": interval,
    }


def report(figures: Mapping[str, Any]) -> None:
    """Print what came out."""
    for row in figures["sets"]:
        low, high = row["interval"]
        verdict = "counts" if row["counts"] else "isn't pooled"
        print(
            f"{row['set']}: {row['questions']} questions; on the first half the full path has "
            f"{100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}), guessing "
            f"{100 * row['chance']:.1f} %: {verdict}"
        )
    for name, row in figures["answers"].items():
        print(f"{name}, {row['n']} questions: {in_words(ACCURACY, row)} points")
    texts = figures["texts"]
    low, high = texts["interval"]
    print(f"loss of texts: {texts['mean']:+.4f} nats a token ({low:+.4f} to {high:+.4f})")
    for name, increase in texts["by_set"].items():
        print(f"  {name}: {increase:+.4f}")


def measure_all(
    base: BaseModel, options: Any, sizes: Mapping[str, int], folder: Path
) -> dict[str, Any]:
    """Measure what isn't kept in the folder, and return the figures."""
    names = options.tasks.split(",")
    sets = [divide_set(name, options.data_dir, sizes["questions"]) for name in names]
    if len({each.name for each in sets}) < len(sets):
        raise SystemExit(f"--tasks: two of {options.tasks} have the same name; rename a file")
    path = load_path(options.path)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    paths = {
        FULL: StaticPath(range(base.num_layers)),
        SHORTER: install_path(routed.injection, path),
    }
    labels = {FULL: FULL, SHORTER: hash_path(path)}
    measurer = Measurer(routed, base, paths, sets, labels, folder)
    rows = find_sets_that_count(measurer, sets)
    counting = [each for each, row in zip(sets, rows, strict=True) if row["counts"]]
    return {
        "sets": rows,
        "answers": compare_answers(measurer, counting),
        "texts": compare_texts(measurer, sets, sizes["texts"]),
    }


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "", "few questions of each set, under a minute")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--path", required=True, help="a folder of drllm heal, or another path")
    parser.add_argument("--tasks", required=True, help="sets with options, separated by commas")
    parser.add_argument("--texts", type=int, help="whose loss is measured, of each set")
    parser.add_argument("--questions", type=int, help="of each set at most")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/pooled"))
    options = parser.parse_args()
    options.clock = "none"
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    with common.measurement_folder(options) as folder:
        figures = measure_all(base, options, sizes, folder)
    report(figures)
    common.write_figures(options, {**common.describe_run(base, options), **figures})


if __name__ == "__main__":
    main()
