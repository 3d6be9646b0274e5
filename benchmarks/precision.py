"""How many verdicts change where the base model runs in another precision than float32.

The same paths of the same questions with options are judged by the model in float32 and in each
other precision: bfloat16, int8 weights (torchao, where it is installed), and int8 weights and
activations (torch's dynamic quantisation, whose scale is that of the whole batch). Told are the
verdicts that differ, how far the right option's lead moves, and the time of each beside float32.

    python benchmarks/precision.py [--quick] [--json FILE] [--clock cpu] [--task TASK]
        [--data-dir DIR] [--model MODEL] [--questions N] [--paths N]
"""

from __future__ import annotations

import copy
import itertools
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from common import int8
from common.comparison import compare_each
from common.search_rounds import make_search_rounds
from torch import nn

from drllm.model.load import load
from drllm.models.routed_model import RoutedModel
from drllm.paths import Decisions
from drllm.search.evaluator import Evaluator, JudgedOutcome
from drllm.tasks.examples import OPTIONS_REWARD, choose
from drllm.tasks.registry import get_task

QUICK = {"questions": 6, "paths": 4}
WHOLE = {"questions": 64, "paths": 16}
REFERENCE = "float32"
NUM_WARM_UP = 2  # prompts

Pair = tuple[int, Decisions]
"""The place of a prompt, and a path."""


def list_precisions(name: str) -> dict[str, Any]:
    """Return ways to load a model, by what they are called."""
    ways: dict[str, Any] = {
        REFERENCE: lambda: load(name, device="cpu", dtype=REFERENCE).model,
        "bfloat16": lambda: load(name, device="cpu", dtype="bfloat16").model,
        "int8 weights and activations (torch)": lambda: quantise(
            load(name, device="cpu", dtype="float32").model
        ),
    }
    if int8.is_available():
        ways[int8.LABEL] = lambda: int8.load_int8(name).model
    return ways


def quantise(model: Any) -> Any:
    """Return a model whose layers' linear maps are torch's dynamic int8 ones."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated for torchao's
        decoder = quantize_dynamic(copy.deepcopy(model.model), {nn.Linear})
    model.model = decoder
    return model


def judge_in_each(
    model: str, tokenizer: Any, prompts: Sequence[Any], pairs: Sequence[Pair], clock: common.Clock
) -> tuple[dict[str, list[JudgedOutcome]], dict[str, float]]:
    """Judge the same paths in each precision; return the outcomes and the seconds of each."""
    outcomes = {}
    seconds = {}
    first_pairs = [pair for pair in pairs if pair[0] < NUM_WARM_UP]
    for name, load_it in list_precisions(model).items():
        routed = RoutedModel(load_it(), tokenizer=tokenizer)
        warm_up = Evaluator(routed, prompts[:NUM_WARM_UP], 1.0)
        warm_up.evaluate(first_pairs[:4])
        started = clock()
        outcomes[name] = Evaluator(routed, prompts, 4.0).evaluate(pairs)
        seconds[name] = clock() - started
    return outcomes, seconds


def compare_outcomes(
    ours: Sequence[JudgedOutcome], theirs: Sequence[JudgedOutcome], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Return how many verdicts differ from those of float32, and how far margins move."""
    num_different = 0
    num_different_full = 0  # of the full path
    moves = []
    for own, other, (_, path) in zip(ours, theirs, pairs, strict=True):
        differs = own.reward != other.reward
        num_different += differs
        num_different_full += differs and set(path) == {1}
        moves.append(abs((own.margin or 0.0) - (other.margin or 0.0)))
    return {
        "differ": num_different,
        "full_path_differs": num_different_full,
        "accuracy": statistics.fmean(outcome.reward for outcome in ours),
        "median_margin_moved": statistics.median(moves),
    }


def report(figures: Mapping[str, Any]) -> None:
    """Print the figures."""
    right = figures["precisions"][REFERENCE]["accuracy"]
    print(
        f"{figures['verdicts']} verdicts on {figures['questions']} questions of "
        f"{figures['task']}; in {REFERENCE} {100 * right:.1f} % are right"
    )
    for name, row in figures["precisions"].items():
        print(
            f"{name:38} {row['differ']:5} differ, {row['full_path_differs']} of the full path's; "
            f"{100 * row['accuracy']:.1f} % right; margins move by "
            f"{row['median_margin_moved']:.3f} nats (median); "
            f"speedup {figures['speedup'][name]:.2f}"
        )


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser)
    common.add_clock(parser)
    parser.add_argument("--task", default="builtin_facts", help="whose search questions are asked")
    parser.add_argument("--data-dir", type=Path, help="folder with SPLIT.jsonl[.gz] files by task")
    parser.add_argument("--questions", type=int, help="drawn with seed 0")
    parser.add_argument("--paths", type=int, help="of each question")
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    clock = common.clock_of(options)
    base = common.base_of(options)
    task = get_task(options.task)
    examples = choose(task.examples("search", options.data_dir), sizes["questions"], 0)
    prompts = [task.prompt(example, OPTIONS_REWARD) for example in examples]
    rounds = make_search_rounds(base.num_layers, len(prompts), sizes["paths"])
    pairs = list(itertools.chain.from_iterable(rounds))
    outcomes, seconds = judge_in_each(options.model, base.tokenizer, prompts, pairs, clock)
    compared = {
        name: compare_outcomes(found, outcomes[REFERENCE], pairs)
        for name, found in outcomes.items()
    }
    figures: dict[str, Any] = {
        **common.describe_run(base, options),
        "task": task.name,
        "repeats": 1,
        "ours": "the other precisions",
        "theirs": REFERENCE,
        "precisions": compared,
        "questions": len(prompts),
        "verdicts": len(pairs),
        "speedup": {name: seconds[REFERENCE] / each for name, each in seconds.items()},
    }
    report(figures)
    others = {name: value for name, value in figures["speedup"].items() if name != REFERENCE}
    comparisons = compare_each("score paths in another precision", others)
    common.write_figures(options, figures, comparisons)


if __name__ == "__main__":
    main()
