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
from drllm.models.routed_model import RoutedModel
from drllm.paths import Decisions, num_executions, to_path
from drllm.records.codec import write_atomically
from drllm.search import actions, retest, strategies
from drllm.search.evaluator import Evaluator, JudgedOutcome, tokenize_prompt
from drllm.search.questions import build_question
from drllm.search.strategies import Evaluation, mcts, new_search, path_score, walk
from drllm.statistics.intervals import mean_interval
from drllm.statistics.paired import mcnemar_exact
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, choose
from drllm.tasks.registry import get_task

UNBOUNDED = 1_000_000
"""Simulations: more than any allowance of executions pays for."""

Pair = tuple[int, Decisions]
"""The place of a question in its block, and a path on it."""
Row = dict[str, Any]
"""A question under one strategy: `id`, `executions`, and `paths`, the full path first."""


class BlockSearch:
    """The searches of a block of questions, each until it has spent its executions.

    Attributes:
        outcomes: What each path gave on its question: (place of the question, decisions) → outcome.
        states: For each question the states that its paths passed through, each counted once.
    """

    def __init__(
        self,
        routed: RoutedModel,
        examples: Sequence[Example],
        task: Task,
        config: SearchConfig,
        allowance: int,
    ) -> None:
        self.config = config
        self.allowance = allowance
        reward = task.check_reward(config.reward)
        questions = [build_question(task, example, reward) for example in examples]
        self.retest_prompts = [
            [tokenize_prompt(routed, prompt) for prompt in question.retests]
            for question in questions
        ]
        prompts = [question.prompt for question in questions]
        self.evaluator = Evaluator(routed, prompts, config.state_cache_gb, kl=config.kl)
        self.searches = [
            new_search(routed.num_layers, config, Random(f"{config.seed}:{task.name}:{example.id}"))
            for example in examples
        ]
        self.outcomes: dict[Pair, JudgedOutcome] = {}
        self.states: list[set[tuple[int, ...]]] = [set() for _ in examples]

    def run(self) -> None:
        """Evaluate paths round by round, until no search can pay for another one."""
        proposals = {place: search.start() for place, search in enumerate(self.searches)}
        while proposals:
            pairs: list[Pair] = []
            paid: list[int] = []  # places of the questions that can pay for all of their proposals
            for place, paths in proposals.items():
                paths_paid = self.pay_for(place, paths)
                pairs += [(place, path) for path in paths_paid]
                if len(paths_paid) == len(paths):
                    paid.append(place)
            outcomes = self.evaluator.evaluate(pairs)
            self.outcomes.update(zip(pairs, outcomes, strict=True))
            proposals = {place: self.advance(place, proposals[place]) for place in paid}
            proposals = {place: paths for place, paths in proposals.items() if paths}

    def pay_for(self, place: int, proposals: Sequence[Decisions]) -> list[Decisions]:
        """Return the first of the proposals that a question's allowance pays for."""
        paths: list[Decisions] = []
        for decisions in proposals:
            states = self.states[place] | beginnings(decisions)
            if len(states) > self.allowance:
                break
            self.states[place] = states
            paths.append(decisions)
        return paths

    def advance(self, place: int, paths: Sequence[Decisions]) -> list[Decisions]:
        """Tell a search what its paths are worth; return the next ones that it proposes."""
        evaluations = []
        for decisions in paths:
            outcome = self.outcomes[place, decisions]
            score = path_score(outcome.margin, outcome.kl)
            evaluations.append(Evaluation(outcome.reward, score))
        return self.searches[place].advance(evaluations)

    def retest_all(self) -> dict[Pair, Any]:
        """Complete the margins, and test paths that may become targets in other ways too."""
        pairs = sorted(self.outcomes, key=lambda pair: pair[0])
        outcomes = [self.outcomes[pair] for pair in pairs]
        completed = self.evaluator.with_margins(pairs, outcomes)
        self.outcomes = dict(zip(pairs, completed, strict=True))
        retests: dict[Pair, Any] = retest.retest_paths(
            self.evaluator, self.retest_prompts, self.config, self.outcomes
        )
        return retests


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
    block = BlockSearch(routed, examples, task, config, allowance)
    block.run()
    executions_run = block.evaluator.states.executions_run
    retests = block.retest_all()
    rows: list[Row] = []
    for example, states in zip(examples, block.states, strict=True):
        rows.append({"id": example.id, "executions": len(states), "paths": []})
    for (place, decisions), outcome in block.outcomes.items():
        retested = retests.get((place, decisions))
        rows[place]["paths"].append(
            {
                "decisions": decisions,
                "reward": outcome.reward,
                "margin": outcome.margin,
                "kl": outcome.kl,
                "retest": None if retested is None else msgspec.structs.asdict(retested),
            }
        )
    return {"executions_run": executions_run, "rows": rows}


def beginnings(decisions: Decisions) -> set[tuple[int, ...]]:
    """Return the states that a path passes through: one of each execution."""
    path = to_path(decisions)
    return {path[:length] for length in range(1, len(path) + 1)}


# --- what was found ----------------------------------------------------------------------------


def list_right_paths(row: Row, *, survived: bool) -> list[Row]:
    """Return the right paths of a question, or those of them that survived the re-test."""
    if survived:
        return [path for path in row["paths"] if path["retest"] and path["retest"]["survived"]]
    return [path for path in row["paths"] if path["reward"] >= 1]


def has_valid(row: Row, *, survived: bool) -> bool:
    """Tell whether a question has a valid path."""
    return bool(list_right_paths(row, survived=survived))


def has_saving(row: Row, *, survived: bool) -> bool:
    """Tell whether a question has a valid path that is shorter than the full one."""
    return find_shortest(row, survived=survived) < len(row["paths"][0]["decisions"])


def has_improving(row: Row, *, survived: bool) -> bool:
    """Tell whether the full path fails on a question and another path doesn't."""
    return row["paths"][0]["reward"] < 1 and has_valid(row, survived=survived)


def list_lengths(row: Row, *, survived: bool) -> list[int]:
    """Return the executions of each right path of a question."""
    paths = list_right_paths(row, survived=survived)
    return [num_executions(path["decisions"]) for path in paths]


def count_saving_paths(row: Row, *, survived: bool) -> int:
    """Return how many valid paths of a question are shorter than the full one."""
    lengths = list_lengths(row, survived=survived)
    return sum(length < len(row["paths"][0]["decisions"]) for length in lengths)


def count_saved_layers(row: Row) -> int:
    """Return the layers that the shortest surviving path saves; 0 without a saving one."""
    return len(row["paths"][0]["decisions"]) - find_shortest(row, survived=True)


def find_shortest(row: Row, *, survived: bool) -> int:
    """Return the executions of the shortest valid path; the full path's where none is shorter."""
    lengths = list_lengths(row, survived=survived)
    return min([*lengths, len(row["paths"][0]["decisions"])])


def find_kl_of_shortest(row: Row) -> float | None:
    """Return the least KL among the shortest surviving paths; None without a saving one."""
    if not has_saving(row, survived=True):
        return None
    shortest = find_shortest(row, survived=True)
    paths = list_right_paths(row, survived=True)
    paths = [path for path in paths if num_executions(path["decisions"]) == shortest]
    values = [path["kl"] for path in paths if path["kl"] is not None]
    return min(values, default=None)


def find_best_margin(row: Row, *, again: bool) -> float | None:
    """Return the largest margin of a right path, in the re-test if `again`; None without one."""
    margins = []
    for path in list_right_paths(row, survived=False):
        test = path["retest"] if again else path
        if test is not None and test["margin"] is not None:
            margins.append(test["margin"])
    return max(margins, default=None)


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
    counted: dict[str, float | None] = {}
    for name, has in counts.items():
        counted[name] = float(sum(has(row, survived=False) for row in rows))
        counted[f"{name} after"] = float(sum(has(row, survived=True) for row in rows))
    return {
        "paths": mean([len(row["paths"]) for row in rows]),
        "executions": mean([row["executions"] for row in rows]),
        "executions_run": executions_run / len(rows),
        **counted,
        "saving paths": mean([count_saving_paths(row, survived=False) for row in rows]),
        "saving paths after": mean([count_saving_paths(row, survived=True) for row in rows]),
        "margin": mean([find_best_margin(row, again=False) for row in rows]),
        "margin after": mean([find_best_margin(row, again=True) for row in rows]),
        "shortest": mean([find_shortest(row, survived=False) for row in rows]),
        "shortest after": mean([find_shortest(row, survived=True) for row in rows]),
        "kl": mean([find_kl_of_shortest(row) for row in rows]),
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


SeedFigures = Mapping[str, float | None]


def table(by_strategy: Mapping[str, Sequence[SeedFigures]]) -> str:
    """Return the Markdown table: means over the seeds, before → after the re-test."""
    lines = [
        f"| strategy | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for strategy, by_seed in by_strategy.items():
        cells = [cell(by_seed, name) for name in COLUMNS]
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(by_seed: Sequence[SeedFigures], name: str) -> str:
    """Write a figure's mean over the seeds, and that after the re-test where there is one."""
    means = []
    for part in (name, f"{name} after"):
        if part in by_seed[0]:
            value = mean([figures[part] for figures in by_seed])
            means.append("–" if value is None else f"{value:.3g}")
    return " → ".join(means)


def compare_strategies(
    ours: Sequence[Sequence[Row]], theirs: Sequence[Sequence[Row]]
) -> dict[str, Any]:
    """Compare two strategies on the same questions, by seed and question.

    A question is one observation, however many seeds there are: questions are counted with the
    first seed, and the layers that a question saves are a mean over the seeds.
    """
    by_question = [average_saved_layers(ours), average_saved_layers(theirs)]
    differences = [mine - other for mine, other in zip(*by_question, strict=True)]
    mine = statistics.fmean(by_question[0])
    other = statistics.fmean(by_question[1])
    return {
        "saved_ratio": mine / other if other else None,
        "saved_more": statistics.fmean(differences),
        "saved_more_interval": mean_interval(differences, seed=0),
        "saving": count_won(ours[0], theirs[0], has_saving),
        "improving": count_won(ours[0], theirs[0], has_improving),
    }


def average_saved_layers(by_seed: Sequence[Sequence[Row]]) -> list[float]:
    """Return the layers that each question saves, means over the seeds."""
    by_question = zip(*by_seed, strict=True)
    return [statistics.fmean(count_saved_layers(row) for row in rows) for rows in by_question]


def count_won(
    ours: Sequence[Row], theirs: Sequence[Row], has: Callable[..., bool]
) -> dict[str, float]:
    """Count the questions that only one of two strategies has such a path for, and test it."""
    won = 0
    lost = 0
    for mine, other in zip(ours, theirs, strict=True):
        we_have = has(mine, survived=True)
        they_have = has(other, survived=True)
        won += we_have and not they_have
        lost += they_have and not we_have
    return {"won": won, "lost": lost, "p": mcnemar_exact(won, lost)}


# --- the run -----------------------------------------------------------------------------------


def strategy_settings(text: str) -> dict[str, Any]:
    """Read `tree` or `tree:length_penalty=0+exploration_constant=0.3`."""
    name, _, settings = text.partition(":")
    values: dict[str, Any] = {"strategy": name}
    if settings:
        for setting in settings.split("+"):
            key, value = setting.split("=")
            values[key] = json.loads(value)
    return values


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
    names = options.strategies
    seeds = options.seeds
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
    by_strategy = {}
    for name, by_seed in rows.items():
        pairs = zip(by_seed, run[name], strict=True)
        by_strategy[name] = [figures(questions, executions) for questions, executions in pairs]
    ours, *others = rows
    comparisons = {}
    for name in others:
        comparisons[f"{ours} / {name}"] = compare_strategies(rows[ours], rows[name])
    questions = rows[ours][0]
    num_right = sum(row["paths"][0]["reward"] >= 1 for row in questions)
    print(
        f"\n{len(questions)} questions, {num_right} of them right under the full path; at most "
        f"{options.executions} executions a question; means over {len(options.seeds)} seeds; "
        f"before → after the re-test\n\n{table(by_strategy)}\n"
    )
    for name, comparison in comparisons.items():
        print_comparison(name, comparison, options.seeds[0])
    return {
        "speedup": {name: comparison["saved_ratio"] for name, comparison in comparisons.items()},
        "repeats": len(options.seeds),
        "ours": f"strategy {ours}",
        "theirs": f"{', '.join(others)}, for the same executions a question",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}",
        "questions": len(questions),
        "right_under_full_path": num_right,
        "executions_a_question": options.executions,
        "strategies": by_strategy,
        "comparisons": comparisons,
    }


def print_comparison(name: str, comparison: Mapping[str, Any], seed: int) -> None:
    """Print how many layers one strategy saves beside another, and the questions it wins."""
    low, high = comparison["saved_more_interval"]
    print(
        f"{name}: the shortest surviving path saves {comparison['saved_more']:+.2f} layers "
        f"({low:+.2f} to {high:+.2f})"
    )
    for kind in ("saving", "improving"):
        counts = comparison[kind]
        print(
            f"  questions with a surviving {kind} path, seed {seed}: won {counts['won']}, "
            f"lost {counts['lost']}, McNemar p = {counts['p']:.3f}"
        )


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
        options.questions = 3
        options.executions = 120
        options.seeds = "0"
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
    common.write_figures(options, result)


if __name__ == "__main__":
    main()
