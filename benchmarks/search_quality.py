"""What the strategies of the search find on the same questions for the same executions.

Each strategy may have so many layer executions a question, not so many simulations. What paths of
a question have in common counts once, as `Evaluator` runs it once: a strategy whose paths
share more tries more of them. What the evaluator really ran stands beside; it differs where it
reads a beginning that all prompts of a block have in common by itself, or gave states up. Paths
that may become targets are re-tested, as in a search; re-tests aren't counted. Ours is the strategy
named first, theirs are the others; `speedup` is the ratio of the layers that the shortest path that
survived saves.

    python benchmarks/search_quality.py --data-dir DIR [--questions 60] [--executions 600]
    python benchmarks/search_quality.py --quick [--json FILE]

A strategy may come with settings: --strategies tree,tree:length_penalty=0+exploration_constant=0.3
Finished blocks are kept in --output-dir; run the same command to resume. On two cores,
run it with --seeds 0,1 and with --seeds 2 at the same time, then with all seeds for the table.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import common
import msgspec
import torch

from drllm.config import SearchConfig
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import Decisions, num_executions, to_path
from drllm.records.codec import write_atomically
from drllm.search import actions, retest, strategies
from drllm.search.evaluator import Evaluator, Outcome, tokenize_prompt
from drllm.search.questions import build_question
from drllm.search.strategies import mcts, new_search, path_score, walk
from drllm.statistics.intervals import mean_interval
from drllm.statistics.paired import mcnemar_exact
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, choose
from drllm.tasks.registry import get_task

UNBOUNDED = 1_000_000
"""Simulations: more than any allowance of executions pays for."""

Row = dict[str, Any]
"""A question under one strategy: `id`, `executions`, and `paths`, the full path first."""


def search(
    routed: RoutedModel,
    examples: Sequence[Example],
    task: Task,
    config: SearchConfig,
    allowance: int,
) -> dict[str, Any]:
    """Search a block of questions until each has spent its executions.

    Returns:
        `rows`, one a question, and `executions_run`, what the evaluator had to run for all of them.
    """
    reward = task.check_reward(config.reward)
    asked = [build_question(task, example, reward) for example in examples]
    prompts = [question.prompt for question in asked]
    others = [
        [tokenize_prompt(routed, prompt) for prompt in question.retests] for question in asked
    ]
    evaluator = Evaluator(routed, prompts, config.state_cache_gb, kl=config.kl)
    searches = [
        new_search(routed.num_layers, config, Random(f"{config.seed}:{task.name}:{example.id}"))
        for example in examples
    ]
    found: dict[tuple[int, Decisions], Outcome] = {}
    known: list[set[tuple[int, ...]]] = [set() for _ in examples]
    going = set(range(len(examples)))
    while going:
        pairs = []
        for place in sorted(going):
            asked_for = searches[place].ask(config.leaves_per_round)
            for decisions in asked_for:
                if len(more := known[place] | beginnings(decisions)) > allowance:
                    asked_for = []  # the search is over, as for one that asks path by path
                    break
                known[place] = more
                pairs.append((place, decisions))
            if not asked_for:
                going.remove(place)
        for (place, decisions), outcome in zip(pairs, evaluator.evaluate(pairs), strict=True):
            found[place, decisions] = outcome
            score = path_score(outcome.margin, outcome.kl)
            searches[place].tell(decisions, outcome.reward, score)
    executions_run = evaluator.states.executions_run
    tried = sorted(found, key=lambda pair: pair[0])
    completed = evaluator.with_margins(tried, [found[pair] for pair in tried])
    found = dict(zip(tried, completed, strict=True))
    retests = retest.retest_paths(evaluator, others, config, found)
    return {
        "executions_run": executions_run,
        "rows": [
            {
                "id": example.id,
                "executions": len(known[place]),
                "paths": [
                    {
                        "decisions": decisions,
                        "reward": outcome.reward,
                        "margin": outcome.margin,
                        "kl": outcome.kl,
                        "retest": msgspec.structs.asdict(retests[place, decisions])
                        if (place, decisions) in retests
                        else None,
                    }
                    for (asked_place, decisions), outcome in found.items()
                    if asked_place == place
                ],
            }
            for place, example in enumerate(examples)
        ],
    }


def beginnings(decisions: Decisions) -> set[tuple[int, ...]]:
    """Return the states that a path passes through: one of each execution."""
    path = to_path(decisions)
    return {path[:length] for length in range(1, len(path) + 1)}


# --- what was found ----------------------------------------------------------------------------


def right(row: Row, *, survived: bool) -> list[Row]:
    """Return the right paths of a question, or those of them that survived the re-test."""
    if survived:
        return [path for path in row["paths"] if path["retest"] and path["retest"]["survived"]]
    return [path for path in row["paths"] if path["reward"] >= 1]


def has_valid(row: Row, *, survived: bool) -> bool:
    """Tell whether a question has a valid path."""
    return bool(right(row, survived=survived))


def has_saving(row: Row, *, survived: bool) -> bool:
    """Tell whether a question has a valid path that is shorter than the full one."""
    return shortest(row, survived=survived) < len(row["paths"][0]["decisions"])


def has_improving(row: Row, *, survived: bool) -> bool:
    """Tell whether the full path fails on a question and another path doesn't."""
    return row["paths"][0]["reward"] < 1 and has_valid(row, survived=survived)


def saving_paths(row: Row, *, survived: bool) -> int:
    """Return how many valid paths of a question are shorter than the full one."""
    lengths = [num_executions(path["decisions"]) for path in right(row, survived=survived)]
    return sum(length < len(row["paths"][0]["decisions"]) for length in lengths)


def saved(row: Row) -> int:
    """Return the layers that the shortest surviving path saves; 0 without a saving one."""
    return len(row["paths"][0]["decisions"]) - shortest(row, survived=True)


def shortest(row: Row, *, survived: bool) -> int:
    """Return the executions of the shortest valid path; the full path's where none is shorter."""
    lengths = [num_executions(path["decisions"]) for path in right(row, survived=survived)]
    return min([*lengths, len(row["paths"][0]["decisions"])])


def kl_of_shortest(row: Row) -> float | None:
    """Return the least KL among the shortest surviving paths; None without a saving one."""
    length = shortest(row, survived=True)
    kls = [
        path["kl"]
        for path in right(row, survived=True)
        if num_executions(path["decisions"]) == length and path["kl"] is not None
    ]
    return min(kls) if kls and has_saving(row, survived=True) else None


def best_margin(row: Row, *, again: bool) -> float | None:
    """Return the largest margin of a right path, in the re-test if `again`; None without one."""
    margins = [
        path["retest"]["margin"] if again else path["margin"]
        for path in right(row, survived=False)
        if path["retest"] or not again
    ]
    return max((margin for margin in margins if margin is not None), default=None)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that there are; None where there is none."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def figures(rows: Sequence[Row], executions_run: int) -> dict[str, float | None]:
    """Return what one strategy found with one seed."""
    counts: dict[str, Callable[..., bool]] = {
        "valid": has_valid,
        "saving": has_saving,
        "improving": has_improving,
    }
    counted = {
        f"{name}{suffix}": float(sum(has(row, survived=survived) for row in rows))
        for name, has in counts.items()
        for suffix, survived in (("", False), (" after", True))
    }
    return {
        "paths": mean([len(row["paths"]) for row in rows]),
        "executions": mean([row["executions"] for row in rows]),
        "executions_run": executions_run / len(rows),
        **counted,
        "saving paths": mean([saving_paths(row, survived=False) for row in rows]),
        "saving paths after": mean([saving_paths(row, survived=True) for row in rows]),
        "margin": mean([best_margin(row, again=False) for row in rows]),
        "margin after": mean([best_margin(row, again=True) for row in rows]),
        "shortest": mean([shortest(row, survived=False) for row in rows]),
        "shortest after": mean([shortest(row, survived=True) for row in rows]),
        "kl": mean([kl_of_shortest(row) for row in rows]),
    }


COLUMNS = {
    "paths": "paths",
    "executions": "executions",
    "executions_run": "run",
    "valid": "valid",
    "saving": "saving",
    "improving": "improving",
    "saving paths": "saving paths",
    "margin": "best margin",
    "shortest": "shortest",
    "kl": "its KL",
}


def table(found: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    """Return the Markdown table: means over the seeds, before → after the re-test."""
    lines = [
        f"| strategy | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for strategy, by_seed in found.items():
        cells = []
        for name in COLUMNS:
            parts = [
                mean([one[part] for one in by_seed])
                for part in (name, f"{name} after")
                if part in by_seed[0]
            ]
            cells.append(" → ".join("–" if part is None else f"{part:.3g}" for part in parts))
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(ours: Sequence[Sequence[Row]], theirs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Compare two strategies on the same questions, by seed and question.

    A question is one observation, however many seeds there are: questions are counted with the
    first seed, and the layers that a question saves are a mean over the seeds.
    """
    first = [*zip(ours[0], theirs[0], strict=True)]
    counted = {}
    for name, has in (("saving", has_saving), ("improving", has_improving)):
        pairs = [(has(mine, survived=True), has(other, survived=True)) for mine, other in first]
        won, lost = (sum(pair == way for pair in pairs) for way in ((True, False), (False, True)))
        counted[name] = {"won": won, "lost": lost, "p": mcnemar_exact(won, lost)}
    by_question = [
        [statistics.fmean(saved(row) for row in rows) for rows in zip(*side, strict=True)]
        for side in (ours, theirs)
    ]
    differences = [mine - other for mine, other in zip(*by_question, strict=True)]
    mine, other = (statistics.fmean(side) for side in by_question)
    return {
        "saved_ratio": mine / other if other else None,
        "saved_more": statistics.fmean(differences),
        "saved_more_interval": mean_interval(differences, seed=0),
        **counted,
    }


# --- the run -----------------------------------------------------------------------------------


def strategy_settings(text: str) -> dict[str, Any]:
    """Read `tree` or `tree:length_penalty=0+exploration_constant=0.3`."""
    name, _, settings = text.partition(":")
    pairs = [one.split("=") for one in settings.split("+")] if settings else []
    return {"strategy": name, **{key: json.loads(value) for key, value in pairs}}


def block_file(folder: Path, config: SearchConfig, *others: object) -> Path:
    """Return where a block's result lies; other settings, questions or code are another file."""
    sources = [inspect.getsource(module) for module in (actions, mcts, strategies, walk)]
    what = repr([config, others, sources])
    return folder / f"{config.strategy}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def search_all(
    routed: RoutedModel, task: Task, examples: Sequence[Example], options: argparse.Namespace
) -> tuple[dict[str, list[list[Row]]], dict[str, list[int]]]:
    """Search with every strategy and seed, block by block; blocks that lie there are read.

    Returns:
        By strategy and seed: the questions, and the executions that were run for them.
    """
    names, seeds = options.strategies, options.seeds
    blocks = [
        examples[start : start + options.block_size]
        for start in range(0, len(examples), options.block_size)
    ]
    work = list(itertools.product(blocks, range(len(seeds)), names))
    rows: dict[str, list[list[Row]]] = {name: [[] for _ in seeds] for name in names}
    run = {name: [0] * len(seeds) for name in names}
    started = time.perf_counter()
    for done, (block, place, name) in enumerate(work, start=1):
        config = SearchConfig(
            num_simulations=UNBOUNDED, seed=seeds[place], **strategy_settings(name)
        )
        ids = [example.id for example in block]
        file = block_file(options.output_dir, config, ids, options.executions, options.model)
        if not file.exists():
            result = search(routed, block, task, config, options.executions)
            write_atomically(file, json.dumps(result) + "\n")
            spent = time.perf_counter() - started
            print(f"{done} of {len(work)} blocks, {spent:.0f} s: {name}, seed {seeds[place]}")
        result = json.loads(file.read_text(encoding="utf-8"))
        rows[name][place] += result["rows"]
        run[name][place] += result["executions_run"]
    return rows, run


def report(
    rows: Mapping[str, list[list[Row]]], run: Mapping[str, list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """Print the comparison and return what `--json` writes."""
    found = {
        name: [figures(*one) for one in zip(rows[name], run[name], strict=True)] for name in rows
    }
    ours, *others = rows
    comparisons = {f"{ours} / {name}": compared(rows[ours], rows[name]) for name in others}
    questions = rows[ours][0]
    num_right = sum(row["paths"][0]["reward"] >= 1 for row in questions)
    print(
        f"\n{len(questions)} questions, {num_right} of them right under the full path; at most "
        f"{options.executions} executions a question; means over {len(options.seeds)} seeds; "
        f"before → after the re-test\n\n{table(found)}\n"
    )
    for name, one in comparisons.items():
        low, high = one["saved_more_interval"]
        print(
            f"{name}: the shortest surviving path saves {one['saved_more']:+.2f} layers "
            f"({low:+.2f} to {high:+.2f})"
        )
        for what in ("saving", "improving"):
            print(
                f"  questions with a surviving {what} path, seed {options.seeds[0]}: "
                f"won {one[what]['won']}, lost {one[what]['lost']}, "
                f"McNemar p = {one[what]['p']:.3f}"
            )
    return {
        "speedup": {name: one["saved_ratio"] for name, one in comparisons.items()},
        "repeats": len(options.seeds),
        "ours": f"strategy {ours}",
        "theirs": f"{', '.join(others)}, for the same executions a question",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}",
        "questions": len(questions),
        "right_under_full_path": num_right,
        "executions_a_question": options.executions,
        "strategies": found,
        "comparisons": comparisons,
    }


def main() -> None:
    """Search, or read what was searched before, and print the comparison."""
    parser = common.parser_of(__doc__, "few built-in questions, one seed")
    parser.add_argument("--data-dir", type=Path, help="folder with arc_easy/train.jsonl[.gz]")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--executions", type=int, default=600, help="allowance of a question")
    parser.add_argument("--seeds", default="0,1,2", help="comma list")
    parser.add_argument("--strategies", default="tree,walk", help="comma list, ours first")
    parser.add_argument("--block-size", type=int, default=4, help="questions evaluated together")
    common.add_model(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/search_quality"))
    options = parser.parse_args()
    if options.quick:
        options.questions, options.executions, options.seeds = 3, 120, "0"
    elif options.data_dir is None:
        parser.error("give --data-dir DIR, or --quick for built-in questions")
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.strategies = options.strategies.split(",")
    task = get_task("builtin_facts" if options.quick else "arc_easy")
    examples = choose(task.examples("search", options.data_dir), options.questions, 0)
    examples.sort(key=lambda example: len(example.question))  # little of a batch is then padding
    base = common.base_of(options)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:  # a quick run measures anew, whatever was measured before
            options.output_dir = Path(folder)
        result = report(*search_all(routed, task, examples, options), options)
    common.write(options, result)


if __name__ == "__main__":
    main()
