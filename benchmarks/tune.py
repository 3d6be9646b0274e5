"""How many candidates a second a tuning scores, against plain evaluation of each of them.

Ours: all candidates of a step in passes that share the beginnings of their paths, all options of a
question in one row.
Theirs: the plain model with its layers listed along each path, a forward pass for each option; and
beside it the same with all options of several questions in a padded batch.
All score the same paths on the same questions, taking turns in one run; values are compared.

    python benchmarks/tune.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR] [--task TASK]
        [--model MODEL] [--device DEVICE] [--dtype DTYPE] [--questions N] [--candidates N]
        [--repeats N]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import bound, operations
from common.comparison import Comparison

from drllm.model.load import BaseModel
from drllm.model.prompts import pad_left
from drllm.models.check import replace_layers
from drllm.models.routed_model import RoutedModel
from drllm.paths import Decisions, StaticPath
from drllm.tasks.examples import OPTIONS_REWARD, choose
from drllm.tasks.registry import get_task
from drllm.tuning.beam import skip_one_layer
from drllm.tuning.objectives import GOLD
from drllm.tuning.path_scorer import Item, log_share, make_items, score_paths

QUICK = {"repeats": 1, "questions": 4, "candidates": 6}
WHOLE = {"repeats": 3, "questions": 6, "candidates": 30}
BATCH_SIZE = 16
"""Questions of a plain batch."""

OURS = "drllm: all candidates of a step in passes that share their beginnings"
THEIRS = "the listed layers of each candidate, one forward pass an option"
BATCHED = "the listed layers of each candidate, questions and options in padded batches"
TOLERANCE = 1e-3
"""Nats that two ways may differ by on a question."""

Values = list[list[float]]


def make_candidates(num_layers: int, num: int) -> list[StaticPath]:
    """Return paths as a search has them in its second step: without the middle layer, and one."""
    full = StaticPath(range(num_layers))
    middle = [path for path in skip_one_layer(full) if num_layers // 2 not in path.layers]
    return list(skip_one_layer(middle[0]))[:num]


def one_by_one(base: BaseModel, items: Sequence[Item], path: StaticPath) -> list[float]:
    """Score every option of every question in a forward pass of its own."""
    values = []
    with replace_layers(base.model, path.decisions(base.num_layers)), torch.no_grad():
        for item in items:
            context = list(item.request.context)
            sums = []
            for option in item.request.continuations:
                ids = torch.tensor([context + list(option)], device=base.model.device)
                logits = base.model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
                logprobs = logits.float().log_softmax(-1)
                sums.append(float(logprobs[range(len(option)), list(option)].sum()))
            values.append(log_share(sums, item.gold or 0))
    return values


def score_in_batches(base: BaseModel, items: Sequence[Item], path: StaticPath) -> list[float]:
    """Score all options of several questions of like length at once."""
    values = [0.0] * len(items)
    order = sorted(range(len(items)), key=lambda place: items[place].request.length)
    with replace_layers(base.model, path.decisions(base.num_layers)), torch.no_grad():
        for start in range(0, len(order), BATCH_SIZE):
            places = order[start : start + BATCH_SIZE]
            rows = [
                (place, list(items[place].request.context), list(option))
                for place in places
                for option in items[place].request.continuations
            ]
            texts = [context + option for _, context, option in rows]
            ids, mask = pad_left(texts, base.model.device)
            longest = max(len(option) for _, _, option in rows)
            logits = base.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=longest + 1,
            ).logits.float()
            sums: dict[int, list[float]] = {place: [] for place in places}
            for (place, _, option), kept in zip(rows, logits, strict=True):
                logprobs = kept[-len(option) - 1 : -1].log_softmax(-1)
                sums[place].append(float(logprobs[range(len(option)), option].sum()))
            for place in places:
                values[place] = log_share(sums[place], items[place].gold or 0)
    return values


def compare(
    base: BaseModel, items: Sequence[Item], paths: Sequence[StaticPath], repeats: int, clock: Any
) -> dict[str, Any]:
    """Let each way score all candidates, in turns, and compare what they found."""

    def ours() -> Values:
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        try:
            return score_paths(routed, items, paths, GOLD, 1.0).objective
        finally:
            routed.detach()

    ways: dict[str, Callable[[], Values]] = {
        "ours": ours,
        "theirs": lambda: [one_by_one(base, items, path) for path in paths],
        "batched": lambda: [score_in_batches(base, items, path) for path in paths],
    }
    values: dict[str, Values] = {}

    def seconds_of(name: str) -> float:
        started = clock()
        values[name] = ways[name]()
        return clock() - started

    runs = common.run_in_turns({name: partial(seconds_of, name) for name in ways}, repeats)
    away = {
        name: float(np.abs(np.subtract(values[name], values["ours"])).max())
        for name in ("theirs", "batched")
    }
    if max(away.values()) > TOLERANCE:
        raise SystemExit(f"the ways differ by up to {away} nats; no figure is given")
    medians = {name: statistics.median(run[name] for run in runs) for name in ways}
    read = [item.request for item in items]
    after = [sum(len(option) - 1 for option in question.continuations) for question in read]
    plans = [tuple(path.decisions(base.num_layers)) for path in paths]
    pairs: dict[tuple[int, Decisions], list[int]] = {
        (place, plan): [] for plan in plans for place in range(len(items))
    }
    prompts = [list(question.context) for question in read]
    bound_s = bound.seconds_to_search(base, prompts, after, pairs, clock)
    share = bound_s / medians["ours"]
    return {
        "speedup": statistics.median(run["theirs"] / run["ours"] for run in runs),
        "bound": statistics.median(run["theirs"] / bound_s for run in runs),
        "rest": operations.explain_rest(ways["ours"], base, len(prompts[0]), share),
        "speedup_over_batches": statistics.median(run["batched"] / run["ours"] for run in runs),
        "candidates_per_second": {name: len(paths) / medians[name] for name in ways},
        "largest_difference": away,
        "runs": runs,
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__, "few questions and candidates, under a minute")
    common.add_clock(parser)
    parser.add_argument("--data-dir", type=Path, help="of the task, where it needs one")
    parser.add_argument("--task", default="builtin_facts", help="with options")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--candidates", type=int, help="paths scored together")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    clock = common.clock_of(options)
    base = common.base_of(options)
    task = get_task(options.task)
    examples = choose(task.examples("search", options.data_dir), sizes["questions"], seed=0)
    prompts = [task.prompt(example, OPTIONS_REWARD) for example in examples]
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    items = make_items(routed, prompts, GOLD)
    routed.detach()
    paths = make_candidates(base.num_layers, sizes["candidates"])
    result = compare(base, items, paths, sizes["repeats"], clock)
    rates = result["candidates_per_second"]
    print(
        f"{len(paths)} candidates on {len(items)} questions of {options.task}: "
        f"{rates['ours']:.2f} a second by ours, {rates['theirs']:.2f} one option a pass "
        f"(speedup {result['speedup']:.1f}), {rates['batched']:.2f} in batches (speedup "
        f"{result['speedup_over_batches']:.1f}); largest difference "
        f"{max(result['largest_difference'].values()):.1e} nats\n  {bound.in_words(result)}"
    )
    figures = {
        **result,
        "repeats": sizes["repeats"],
        "ours": OURS,
        "theirs": THEIRS,
        "batched": BATCHED,
        "task": options.task,
        **common.describe_run(base, options),
        **sizes,
    }
    comparison = Comparison(
        "tune: score candidate paths on questions",
        result["speedup"],
        result["bound"],
        result["rest"],
    )
    common.write_figures(options, figures, [comparison])


if __name__ == "__main__":
    main()
