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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
from common.comparison import compare_each
from common.search_rounds import make_search_rounds
from torch import nn

from drllm.models.base.load import load
from drllm.models.routed_model import RoutedModel
from drllm.search.evaluator import Evaluator, JudgedOutcome
from drllm.tasks.examples import choose
from drllm.tasks.registry import get_task

QUICK = {"questions": 6, "paths": 4}
WHOLE = {"questions": 64, "paths": 16}


def precisions(name: str) -> dict[str, Any]:
    """Return ways to load a model, by what they are called."""
    ways: dict[str, Any] = {
        "float32": lambda: load(name, device="cpu", dtype="float32").model,
        "bfloat16": lambda: load(name, device="cpu", dtype="bfloat16").model,
        "int8 weights and activations (torch)": lambda: quantise(
            load(name, device="cpu", dtype="float32").model
        ),
    }
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
        ways["int8 weights (torchao)"] = lambda: (
            load(name, device="cpu", dtype="float32", quantization_config=config).model
        )
    return ways


def quantise(model: Any) -> Any:
    """Return a model whose layers' linear maps are torch's dynamic int8 ones."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated for torchao's
        decoder = quantize_dynamic(copy.deepcopy(model.model), {nn.Linear})
    model.model = decoder
    return model


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
    sizes, clock = common.sizes_of(options, QUICK, WHOLE), common.clock_of(options)
    base, task = common.base_of(options), get_task(options.task)
    examples = choose(task.examples("search", options.data_dir), sizes["questions"], 0)
    prompts = [task.prompt(example, "loglikelihood") for example in examples]
    rounds = make_search_rounds(base.num_layers, len(prompts), sizes["paths"])
    pairs = list(itertools.chain.from_iterable(rounds))
    found: dict[str, list[JudgedOutcome]] = {}
    seconds: dict[str, float] = {}
    for name, loaded in precisions(options.model).items():
        routed = RoutedModel(loaded(), tokenizer=base.tokenizer)
        Evaluator(routed, prompts[:2], 1.0).evaluate([p for p in pairs if p[0] < 2][:4])  # warm
        started = clock()
        found[name] = Evaluator(routed, prompts, 4.0).evaluate(pairs)
        seconds[name] = clock() - started
    figures: dict[str, Any] = {
        **common.describe_run(base, options),
        "task": task.name,
        "repeats": 1,
    }
    figures |= {"ours": "the other precisions", "theirs": "float32", "precisions": {}}
    figures |= {"questions": len(prompts), "verdicts": len(pairs)}
    figures["speedup"] = {name: seconds["float32"] / took for name, took in seconds.items()}
    right = [one.reward for one in found["float32"]]
    for name, outcomes in found.items():
        both = list(zip(found["float32"], outcomes, strict=True))
        moved = [abs((a.margin or 0.0) - (b.margin or 0.0)) for a, b in both]
        figures["precisions"][name] = {
            "differ": sum(a.reward != b.reward for a, b in both),
            "full_path_differs": sum(
                a.reward != b.reward
                for (a, b), (_, path) in zip(both, pairs, strict=True)
                if set(path) == {1}
            ),
            "accuracy": statistics.fmean(one.reward for one in outcomes),
            "median_margin_moved": statistics.median(moved),
        }
    print(f"{len(pairs)} verdicts on {len(prompts)} questions of {task.name}; ", end="")
    print(f"in float32 {100 * statistics.fmean(right):.1f} % are right")
    for name, row in figures["precisions"].items():
        print(
            f"{name:38} {row['differ']:5} differ, {row['full_path_differs']} of the full path's; "
            f"{100 * row['accuracy']:.1f} % right; margins move by "
            f"{row['median_margin_moved']:.3f} nats (median); "
            f"speedup {figures['speedup'][name]:.2f}"
        )
    comparisons = compare_each("score paths in another precision", figures["speedup"])
    common.write_figures(options, figures, comparisons)


if __name__ == "__main__":
    main()
