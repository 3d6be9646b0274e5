"""Whether layers are given up as by a peer library, and how much faster they are chosen.

Ours: the baselines `block influence` and `greedy by loss`, candidates of a step measured together.
Theirs: ShortGPT and SLEB in economize (Apache-2.0, `pip install economize==0.3.2`, which needs
transformers 5), texts of equal length in one batch.
Both read the same texts, taking turns in one run; influences and chosen layers are compared.

    python benchmarks/baselines.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR]
        [--task TASK] [--model MODEL] [--device DEVICE] [--texts N] [--skipped K] [--repeats N]
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import bound
from common.comparison import compare_each

from drllm.cost import distinct_executions
from drllm.evaluation.baselines.layer_dropping import (
    block_influence,
    drop_greedily,
    drop_layers,
    order_by_influence,
)
from drllm.evaluation.baselines.material import Material, make_measure
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.tasks.examples import OPTIONS_REWARD, choose
from drllm.tasks.registry import get_task

Tokens = list[int]

QUICK = {"repeats": 1, "texts": 8, "skipped": 1}
WHOLE = {"repeats": 3, "texts": 64, "skipped": 6}

OURS = "drllm: all candidates of a step in passes that share their beginnings"
THEIRS = "economize: one candidate after the other, behind a shared beginning"


def texts_of(base: BaseModel, task_name: str, num: int, data_dir: Path | None) -> list[Tokens]:
    """Return questions with their right answers, as tokens."""
    task = get_task(task_name)
    examples = choose(task.examples("select", data_dir), num, seed=0)
    texts = []
    for example in examples:
        prompt = task.prompt(example, OPTIONS_REWARD)
        texts.append(base.tokenizer(prompt.text + prompt.continuations[prompt.gold])["input_ids"])
    return texts


def by_length(texts: Sequence[Tokens]) -> list[torch.Tensor]:
    """Return the texts as batches without padding."""
    of_length = defaultdict(list)
    for text in texts:
        of_length[len(text)].append(text)
    return [torch.tensor(batch) for batch in of_length.values()]


def ours(
    base: BaseModel, texts: Sequence[Tokens], num_skipped: int, clock: common.Clock
) -> dict[str, Any]:
    """Choose layers by both of our baselines."""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        started = clock()
        influence = block_influence(routed, texts)
        measured = clock()
        ends = (0, base.num_layers - 1)
        measure = make_measure(routed, Material(prompts=texts), "loss")
        by_loss = drop_greedily(measure, base.num_layers, num_skipped, keep=ends)
        return {
            "influence": influence,
            "by_influence": sorted(order_by_influence(influence)[:num_skipped]),
            "by_loss": sorted(by_loss),
            "order": by_loss,
            "seconds": {"block influence": measured - started, "by loss": clock() - measured},
        }
    finally:
        routed.detach()


def theirs(
    model: Any, texts: Sequence[Tokens], num_skipped: int, clock: common.Clock
) -> dict[str, Any]:
    """Choose layers by both of economize's criteria, which count them from 1."""
    from economize.arch import adapter_for  # type: ignore[import-not-found]
    from economize.techniques.prune import depth  # type: ignore[import-not-found]

    adapter = adapter_for(model)
    batches = [batch.to(model.device) for batch in by_length(texts)]
    started = clock()
    influence = depth.block_influence(adapter, batches)
    measured = clock()
    by_loss = depth.sleb_select(adapter, batches, num_skipped, range(2, adapter.num_layers))
    return {
        "influence": influence.tolist(),
        "by_influence": [layer - 1 for layer in depth.shortgpt_select(influence, num_skipped)],
        "by_loss": [layer - 1 for layer in by_loss],
        "seconds": {"block influence": measured - started, "by loss": clock() - measured},
    }


def seconds_at_least(
    base: BaseModel, texts: Sequence[Tokens], order: Sequence[int], clock: common.Clock
) -> dict[str, float]:
    """Return the time of what each criterion has to run, at the least that it costs.

    Influences take every layer once. The loss takes each state that a candidate of any step has,
    once, and the head for each candidate.

    Args:
        base: The model.
        texts: What is read.
        order: The layers in the order in which they are dropped by loss.
        clock: Which time is measured.
    """
    num_layers = base.num_layers
    num_tokens = sum(map(len, texts))
    cost = bound.cheapest(base, round(num_tokens / len(texts)), clock)
    candidates = []
    for num_dropped in range(len(order)):
        dropped = order[:num_dropped]
        inner = set(range(1, num_layers - 1))  # the ends are kept
        candidates += [drop_layers([*dropped, layer], num_layers) for layer in inner - {*dropped}]
    by_loss = distinct_executions(candidates) * cost.layers + len(candidates) * cost.head
    return {
        "block influence": num_tokens * num_layers * cost.layers,
        "by loss": num_tokens * by_loss,
    }


def compare(
    base: BaseModel, texts: Sequence[Tokens], sizes: dict[str, int], clock: common.Clock
) -> dict[str, Any]:
    """Let both choose, in turns, and compare what they found."""
    stock = copy.deepcopy(base.model)
    ways = {
        "ours": lambda: ours(base, texts, sizes["skipped"], clock),
        "theirs": lambda: theirs(stock, texts, sizes["skipped"], clock),
    }
    runs = common.run_in_turns(ways, sizes["repeats"])
    mine, other = runs[-1]["ours"], runs[-1]["theirs"]
    pairs = zip(mine["influence"], other["influence"], strict=True)
    least = seconds_at_least(base, texts, mine["order"], clock)
    speedups = {}
    bounds = {}
    for criterion in mine["seconds"]:
        times = [
            (run["ours"]["seconds"][criterion], run["theirs"]["seconds"][criterion]) for run in runs
        ]
        speedups[criterion] = statistics.median(theirs / ours for ours, theirs in times)
        bounds[criterion] = statistics.median(theirs / least[criterion] for _, theirs in times)
    return {
        "speedup": speedups,
        "bound": bounds,
        "largest_difference_of_influence": max(abs(one - two) for one, two in pairs),
        "equal_by_influence": mine["by_influence"] == other["by_influence"],
        "equal_by_loss": mine["by_loss"] == other["by_loss"],
        "runs": runs,
    }


def report(result: dict[str, Any]) -> None:
    """Print what was found."""
    found = result["runs"][-1]
    for name, chosen in (("block influence", "by_influence"), ("by loss", "by_loss")):
        mine, other = found["ours"], found["theirs"]
        verdict = "equal" if mine[chosen] == other[chosen] else "DIFFERENT"
        print(
            f"{name}: layers {mine[chosen]} by ours, {other[chosen]} by theirs, {verdict}; "
            f"speedup {result['speedup'][name]:.2f} (last: {other['seconds'][name]:.1f} s theirs, "
            f"{mine['seconds'][name]:.1f} s ours); bound {result['bound'][name]:.2f}, of which "
            f"{result['speedup'][name] / result['bound'][name]:.0%} is reached"
        )
    print(f"largest difference of an influence {result['largest_difference_of_influence']:.1e}")


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__, "few texts, under a minute")
    common.add_clock(parser)
    parser.add_argument("--data-dir", type=Path, help="of the task, where it needs one")
    parser.add_argument("--task", default="builtin_facts", help="with options")
    common.add_model(parser, devices=True)
    parser.add_argument("--texts", type=int, help="questions with their right answers")
    parser.add_argument("--skipped", type=int, help="layers to give up")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    if importlib.util.find_spec("economize") is None:
        sys.exit(
            "economize isn't installed; pip install economize==0.3.2 (transformers 5 or newer)"
        )
    sizes = common.sizes_of(options, QUICK, WHOLE)
    clock = common.clock_of(options)
    base = common.base_of(options)
    texts = texts_of(base, options.task, sizes["texts"], options.data_dir)
    result = compare(base, texts, sizes, clock)
    report(result)
    figures = {
        "speedup": result["speedup"],
        "bound": result["bound"],
        "repeats": sizes["repeats"],
        "ours": OURS,
        "theirs": THEIRS,
        "task": options.task,
        **common.describe_run(base, options),
        **sizes,
        "result": result,
    }
    comparisons = compare_each("choose layers", result["speedup"], result["bound"])
    common.write_figures(options, figures, comparisons)


if __name__ == "__main__":
    main()
