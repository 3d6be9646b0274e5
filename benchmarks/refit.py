"""How long a refit takes and how much memory, against one solve on the states of all tokens.

Ours: sums over batches; between two gaps only the layers in between run.
Theirs: for each gap both paths run from the embeddings, the activations of all tokens are kept, and
one least-squares problem is solved with the same λ.
Both solve the same gaps on the same texts, taking turns in one run; the new weights are compared.
The bound is the time of the layers that have to run and of the products that have to be summed up,
each at the speed that this machine has for it.

    python benchmarks/refit.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR]
        [--tasks NAMES] [--model MODEL] [--device DEVICE] [--dtype DTYPE] [--tokens N]
        [--without LAYERS] [--repeats N]
"""

from __future__ import annotations

import random
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import bound, operations
from common.comparison import Comparison
from torch import Tensor

from drllm.model.load import BaseModel
from drllm.model.prompts import encode
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tasks.registry import get_tasks
from drllm.tasks.texts import Tokens
from drllm.tuning.layer_states import GapTokens, LayerRunner, Stream, make_batches
from drllm.tuning.refit import RefittedGap, check_path, find_projections, refit
from drllm.tuning.ridge import TokenSums

QUICK = {"tokens": 2000, "repeats": 1}
WHOLE = {"tokens": 50_000, "repeats": 3}
WITHOUT = "12,13,14,15,17"
"""The layers that are left out by default: of SmolLM2, five of 30 in two gaps."""
MAX_TOKENS = 512
"""Tokens of a text; longer ones are cut."""
TOLERANCE = 1e-3
"""Largest difference of the new weights, as a share of their change."""

OURS = "drllm: sums over batches, states advanced from gap to gap"
THEIRS = "both paths from the embeddings for each gap, one least-squares problem on all tokens"


def read_texts(options: Any, tokenizer: Any, num_tokens: int) -> list[Tokens]:
    """Return texts of so many tokens: questions of the tasks with their right answers, shuffled."""
    texts = []
    for task in get_tasks(options.tasks):
        for example in task.examples("search", options.data_dir):
            answer = example.solution or example.answer
            text = f"Question: {example.question}\nAnswer: {answer}"
            texts.append(tuple(encode(tokenizer, text))[:MAX_TOKENS])
    random.Random(0).shuffle(texts)
    chosen: list[Tokens] = []
    total = 0
    while total < num_tokens:  # a small task's texts come again
        for text in texts:
            chosen.append(text)
            total += len(text)
            if total >= num_tokens:
                break
    return chosen


def solve_plainly(
    routed: RoutedModel, path: StaticPath, texts: Sequence[Tokens], ridges: Sequence[float]
) -> dict[str, Tensor]:
    """Return the new weights by the obvious way, with the λ of each gap given."""
    gaps = check_path(path, routed.num_layers)
    projections = find_projections(routed, gaps)
    runner = LayerRunner(routed)
    weights: dict[str, Tensor] = {}
    for gap, ridge in zip(gaps, ridges, strict=True):
        projection = projections[gap.layer]
        parts: list[GapTokens] = []
        for batch in make_batches(texts, routed.device):
            full = Stream(range(routed.num_layers))
            repaired = Stream(path.layers, weights)
            runner.advance(batch, full, gap.next_layer)
            runner.advance(batch, repaired, gap.layer)
            assert full.state is not None
            assert repaired.state is not None
            parts.append(runner.read_gap(batch, projection, repaired.state, full.state))
        inputs = torch.cat([part.inputs for part in parts]).double()
        residuals = torch.cat([part.residuals for part in parts]).double()
        squares = torch.cat([part.targets for part in parts]).double().square().sum(dim=1)
        is_first = torch.cat([part.is_first for part in parts])
        roots = torch.ones(len(inputs), dtype=torch.float64, device=inputs.device)
        roots[is_first] = (squares[~is_first].mean() / squares[is_first]).sqrt()
        scales = inputs[~is_first].square().mean(dim=0).sqrt()
        penalty = torch.diag(scales) * (ridge * len(inputs)) ** 0.5
        rows = torch.cat([inputs * roots[:, None], penalty])
        zeros = residuals.new_zeros(len(scales), residuals.shape[1])
        values = torch.cat([residuals * roots[:, None], zeros])
        change = torch.linalg.lstsq(rows, values).solution.T
        weight = projection.weight
        weights[projection.name] = (weight.double() + change).to(weight.dtype)
    return weights


def seconds_at_least(
    base: BaseModel, routed: RoutedModel, path: StaticPath, num_tokens: int, clock: Any
) -> float:
    """Return the time of the layers and of the products that no way can do without."""
    gaps = path.gaps(routed.num_layers)
    projections = find_projections(routed, gaps)
    last = gaps[-1]
    executions = last.next_layer  # of the full path
    executions += len([layer for layer in path.layers if gaps[0].layer <= layer <= last.layer])
    layer_s = bound.cheapest(base, MAX_TOKENS // 2, clock).layers
    product_s = 0.0
    size = 4096
    for gap in gaps:
        outputs, inputs = projections[gap.layer].weight.shape
        sums = TokenSums(inputs, outputs, torch.device("cpu"))
        tokens = torch.randn(size, inputs, dtype=torch.float64)
        states = torch.randn(size, outputs, dtype=torch.float64)
        is_first = torch.zeros(size, dtype=torch.bool)
        times = []
        for _ in range(3):
            started = clock()
            sums.add(tokens, states, states, is_first)
            times.append(clock() - started)
        product_s += min(times) / size
    return num_tokens * (executions * layer_s + product_s)


def compare(
    base: BaseModel,
    routed: RoutedModel,
    path: StaticPath,
    texts: Sequence[Tokens],
    repeats: int,
    clock: Any,
) -> dict[str, Any]:
    """Let both ways solve all gaps, in turns, and compare the new weights."""
    results: dict[str, list[RefittedGap]] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def ours() -> float:
        started = clock()
        results["ours"] = refit(routed, path, texts)
        return clock() - started

    first_s = ours()
    memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before
    ridges = [gap.ridge for gap in results["ours"]]

    def theirs() -> float:
        started = clock()
        weights["theirs"] = solve_plainly(routed, path, texts, ridges)
        return clock() - started

    runs = common.run_in_turns({"ours": ours, "theirs": theirs}, repeats)
    differences = []
    for gap in results["ours"]:
        change = gap.weight - find_projections(routed, [gap.gap])[gap.gap.layer].weight
        difference = gap.weight - weights["theirs"][gap.name]
        differences.append(float(difference.norm() / change.norm()))
    if max(differences) > TOLERANCE:
        raise SystemExit(f"the new weights differ by {max(differences):.1e} of their change")
    num_tokens = sum(map(len, texts))
    bound_s = seconds_at_least(base, routed, path, num_tokens, clock)
    seconds = statistics.median(run["ours"] for run in runs)
    rest = operations.explain_rest(ours, base, MAX_TOKENS // 2, bound_s / seconds)
    return {
        "speedup": statistics.median(run["theirs"] / run["ours"] for run in runs),
        "bound": statistics.median(run["theirs"] / bound_s for run in runs),
        "rest": rest,
        "seconds": {"ours": seconds, "first": first_s, "bound": bound_s},
        "memory_mb": memory_kb / 1024,
        "ridges": ridges,
        "unexplained": [gap.unexplained for gap in results["ours"]],
        "largest_difference": max(differences),
        "runs": runs,
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__, "few tokens, under a minute")
    common.add_clock(parser)
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--data-dir", type=Path, help="of the tasks, where they need one")
    parser.add_argument("--tasks", default="builtin_facts", help="separated by commas")
    parser.add_argument("--tokens", type=int, help="calibration tokens")
    parser.add_argument("--without", default=WITHOUT, help="the layers to leave out")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    clock = common.clock_of(options)
    base = common.base_of(options)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    without = set(map(int, options.without.split(",")))
    path = StaticPath(layer for layer in range(base.num_layers) if layer not in without)
    texts = read_texts(options, base.tokenizer, sizes["tokens"])
    result = compare(base, routed, path, texts, sizes["repeats"], clock)
    seconds = result["seconds"]
    print(
        f"{len(without)} of {base.num_layers} layers out, {len(result['ridges'])} gaps, "
        f"{sum(map(len, texts))} tokens: {seconds['ours']:.1f} s (speedup {result['speedup']:.1f} "
        f"over one solve on all tokens), {result['memory_mb']:.0f} MB more memory at the peak; "
        f"the new weights differ by {result['largest_difference']:.1e} of their change\n"
        f"  {bound.in_words(result)}"
    )
    figures = {
        **result,
        "ours": OURS,
        "theirs": THEIRS,
        "without": sorted(without),
        "tasks": options.tasks,
        **common.describe_run(base, options),
        **sizes,
    }
    what = f"refit {len(without)} left-out layers on {sum(map(len, texts))} tokens"
    comparison = Comparison(what, result["speedup"], result["bound"], result["rest"])
    common.write_figures(options, figures, [comparison])


if __name__ == "__main__":
    main()
