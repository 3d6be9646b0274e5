"""How the time of each stage grows: with questions, paths, the length of answers, layers, batch.

One size at a time is changed, the others stay as `REST` has them; each point is one run, the
smallest after another one to warm up. Along the dotted line time would grow as the size does;
flatter is better. Layers are those of a model of the same shape with random weights, since what it
says changes no time; answers are written to their full length.

    python benchmarks/growth.py [--quick] [--json FILE] [--png FILE] [--clock cpu] [--model MODEL]
        [--only AXES]
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common.search_rounds import make_search_rounds
from evaluation import make_option_requests
from search import routing
from training import CONFIG, collect, draw_targets
from transformers import AutoModelForCausalLM

from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.model.load import BaseModel
from drllm.models.scoring.answers import AnswerBatch
from drllm.reporting import drawing
from drllm.search.evaluator import Evaluator, tokenize_prompt
from drllm.tasks.examples import OPTIONS_REWARD, Prompt
from drllm.tasks.registry import get_task
from drllm.training.stage import train_seed

Sizes = dict[str, int]
Stage = Callable[[BaseModel, Sizes, Path], Callable[[], None]]
"""Makes what is timed, from a model, sizes and an empty folder."""
Growth = dict[str, dict[str, dict[int, float]]]
"""Axis → stage → size → seconds."""

REST: Sizes = {"questions": 8, "paths": 10, "answer tokens": 16, "batch": 8}
WHOLE: dict[str, list[int]] = {
    "questions": [8, 16, 32, 64, 128, 256],
    "paths": [10, 25, 50, 100, 200],
    "answer tokens": [16, 64, 128, 256, 512],
    "layers": [12, 24, 36, 48, 60],
    "batch": [1, 2, 4, 8, 16, 32, 64],
}
QUICK = {axis: values[:2] for axis, values in WHOLE.items()} | {"paths": [3, 6]}
BLOCK = 32
"""Questions searched or evaluated together."""
PROMPT_TOKENS = 100
SKIPPED = 10
"""A generated answer's plan skips one of so many layers."""


def search_by_options(base: BaseModel, sizes: Sizes, _: Path) -> Callable[[], None]:
    """Score the options of all questions under their paths, a block after the other.

    Without their KL and without re-tests.
    """
    prompts = prompts_of(sizes["questions"])

    def run() -> None:
        for start in range(0, len(prompts), BLOCK):
            block = prompts[start : start + BLOCK]
            with routing(base) as routed:
                evaluator = Evaluator(routed, block, None)
                for pairs in make_search_rounds(base.num_layers, len(block), sizes["paths"]):
                    evaluator.evaluate(pairs)

    return run


def search_by_answers(base: BaseModel, sizes: Sizes, _: Path) -> Callable[[], None]:
    """Write an answer to every question under each of its paths."""
    prompts = prompts_of(sizes["questions"])
    length = sizes["answer tokens"]

    def run() -> None:
        with routing(base) as routed:
            contexts = [tokenize_prompt(routed, prompt).tokens for prompt in prompts]
            batch = AnswerBatch(routed, base.tokenizer, contexts, None)
            batch._end_tokens.clear()  # so that each is written to its length
            for pairs in make_search_rounds(base.num_layers, len(prompts), sizes["paths"]):
                batch.answers(pairs, [length] * len(pairs), lambda _p, _t, over: over or None)

    return run


def evaluation_by_options(base: BaseModel, sizes: Sizes, _: Path) -> Callable[[], None]:
    """Score the options of all questions with the full path."""
    requests = make_option_requests("builtin_facts", prompts_of(sizes["questions"]))

    def run() -> None:
        lm = RoutedLM(base, batch_size=BLOCK)
        try:
            lm.loglikelihood(requests, disable_tqdm=True)
        finally:
            lm.routed.detach()

    return run


def feature_pass(base: BaseModel, sizes: Sizes, folder: Path) -> Callable[[], None]:
    """Read what the routers learn from."""
    records = draw_targets(base, sizes["questions"], None)

    def run() -> None:
        collect(base, records, folder / "features")

    return run


def router_fit(base: BaseModel, sizes: Sizes, folder: Path) -> Callable[[], None]:
    """Train routers for the paper's 25 epochs."""
    features = collect(base, draw_targets(base, sizes["questions"], None), folder / "features")

    def run() -> None:
        train_seed(features, base.identity, CONFIG, folder / "routers")

    return run


def generation(base: BaseModel, sizes: Sizes, _: Path) -> Callable[[], None]:
    """Answer a batch of prompts along a plan that skips some layers."""
    tokens = torch.arange(PROMPT_TOKENS) % base.model.get_input_embeddings().num_embeddings
    ids = tokens.expand(sizes["batch"], -1)
    plan = [0 if layer % SKIPPED == SKIPPED // 2 else 1 for layer in range(base.num_layers)]
    length = sizes["answer tokens"]

    def run() -> None:
        with routing(base) as routed, routed.fixed(plan):
            mask = torch.ones_like(ids)
            settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            routed.generate(input_ids=ids, attention_mask=mask, **settings)

    return run


STAGES: Mapping[str, tuple[Stage, Sequence[str]]] = {
    "search by options": (search_by_options, ("questions", "paths", "layers")),
    "search by answers": (search_by_answers, ("paths", "answer tokens", "layers")),
    "evaluation by options": (evaluation_by_options, ("questions", "layers")),
    "train: the pass": (feature_pass, ("questions", "layers")),
    "train: the fit": (router_fit, ("questions", "layers")),
    "generation": (generation, ("answer tokens", "layers", "batch")),
}
"""Each with the sizes that it grows with."""
MARKS = {stage: f"s{number}" for number, stage in enumerate(STAGES)}
"""The colour of each stage's line."""


def prompts_of(num: int) -> list[Prompt]:
    """Return the prompts of so many built-in questions, whose answers are options."""
    task = get_task("builtin_facts")
    examples = task.examples("search")
    assert num <= len(examples), "there are fewer built-in questions"
    return [task.prompt(example, OPTIONS_REWARD) for example in examples[:num]]


def with_layers(base: BaseModel, num: int) -> BaseModel:
    """Return a model of the same shape but for its layers, with random weights."""
    config = copy.deepcopy(base.model.config)
    config.num_hidden_layers = num
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * num)[:num]
    model = AutoModelForCausalLM.from_config(config).to(base.model.dtype).eval()
    model.requires_grad_(False).generation_config = base.model.generation_config
    return BaseModel(model, base.tokenizer, f"{base.name} of {num} layers")


def points(
    base: BaseModel, axes: Mapping[str, Sequence[int]], clock: common.Clock
) -> Iterator[tuple[str, str, int, float]]:
    """Yield axis, stage, size and seconds, as they are measured."""
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in axes.items():
            for size in values:
                model = with_layers(base, size) if axis == "layers" else base
                sizes = REST if axis == "layers" else REST | {axis: size}
                for stage, (make, grows) in STAGES.items():
                    if axis not in grows:
                        continue
                    if size == values[0]:  # once more, to warm up
                        time_stage(make, model, sizes, folder, clock)
                    yield axis, stage, size, time_stage(make, model, sizes, folder, clock)


def time_stage(
    make: Stage, model: BaseModel, sizes: Sizes, folder: str, clock: common.Clock
) -> float:
    """Run a stage in an empty folder and return the seconds, without those to prepare it."""
    run = make(model, sizes, Path(tempfile.mkdtemp(dir=folder)))
    started = clock()
    run()
    return clock() - started


def draw_growth(growth: Growth, colours: drawing.Colours, width: float) -> Any:
    """Draw a panel for each axis: seconds by size, both logarithmic."""
    figure, panels = drawing.make_panels(1, len(growth), width, 2.8, sharey=True)
    for axes, (axis, stages) in zip(panels, growth.items(), strict=True):
        for stage, seconds in stages.items():
            look = {"color": colours[MARKS[stage]], "markersize": 3.5, "linewidth": 1.2}
            axes.plot(list(seconds), list(seconds.values()), "o-", label=stage, **look)
            ends = min(seconds), max(seconds)
            proportional = [seconds[ends[0]] * end / ends[0] for end in ends]
            axes.plot(ends, proportional, ":", color=colours["faint"], linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel=axis)
        sizes = list(next(iter(stages.values())))
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("seconds")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    legend = {stage: lines[stage] for stage in STAGES if stage in lines}
    figure.legend(legend.values(), legend, loc="outside upper center", ncols=len(legend))
    return figure


def main() -> None:
    """Measure, print and draw."""
    parser = common.parser_of(__doc__)
    common.add_clock(parser)
    common.add_model(parser)
    parser.add_argument("--only", default=",".join(WHOLE), help="comma list of axes")
    parser.add_argument("--png", type=Path, help="also draw them to this file")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = set(names) - set(WHOLE)
    if unknown:
        parser.error(f"--only takes {', '.join(WHOLE)}; not {', '.join(sorted(unknown))}")
    clock = common.clock_of(options)
    base = common.base_of(options)
    sizes = QUICK if options.quick else WHOLE
    axes = {axis: sizes[axis] for axis in names}
    growth: Growth = {}
    for axis, stage, size, seconds in points(base, axes, clock):
        growth.setdefault(axis, {}).setdefault(stage, {})[size] = seconds
        print(f"{size} {axis}: {stage} {seconds:.2f} s", flush=True)
    if options.png:
        width = 1.3 * drawing.WIDE
        options.png.write_bytes(drawing.draw_png(partial(draw_growth, growth), width))
    common.write_figures(options, {**common.describe_run(base, options), "seconds": growth})


if __name__ == "__main__":
    main()
