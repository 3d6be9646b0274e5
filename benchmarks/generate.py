"""What routing costs and saves when a model (SmolLM2-135M) reads a prompt and answers.

Models that share their weights take turns (A B C, then C B A, …), so that what else the machine
does hits all of them alike, and are compared round by round; figures are medians over the rounds.

(a) attached, every layer executed once, against the untouched model; the control is a second
    untouched copy, and shows how far the machine's noise goes
(b) plans that skip k of L layers against the untouched model; from both, the time of a model
    without layers is taken off
(c) routers whose every answer is to execute, against an attached model without routers
(d) K/V rows and bytes in the cache against those of the plan, counted
(e) many prompts under three plans: `generate_many`, which routes all prompts first and then
    decodes those of one plan together, against batches of mixed plans
(f) models of `shorten` without k of L layers, and the same layers skipped by an attached model,
    both against the untouched model, head and all; shortened, at least 0.8 of the share of
    multiply-adds that is saved has to be saved in time

    python benchmarks/generate.py [--quick] [--json FILE] [--clock cpu] [--model MODEL]
        [--device DEVICE] [--dtype DTYPE] [--rows N]
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import common
import torch
from common.bound import seconds_to_search, share_of_work
from common.comparison import Comparison
from torch import Tensor

from drllm.evaluation.latency import (
    Clock,
    Rounds,
    copy_sharing_weights,
    empty_cache,
    prepare_decoding,
    prepare_reading,
    time_in_turns,
)
from drllm.model.load import BaseModel
from drllm.model.prompts import encode, pad_left
from drllm.model.submodel import shorten
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.kv_cache import RoutedCacheLayer
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy, PromptView, RouterPolicy
from drllm.tasks.registry import get_task

PROMPT_TOKENS = 100
ROWS = 8
"""Prompts of the larger batch of (a), (b) and (c), beside one alone."""
DECODED = 8
"""Tokens that a decoding is timed for."""
NUM_SKIPPED = (3, 6, 10)
MOST_OVERHEAD = 1.02
MOST_FOR_A_PLAN = 1.03  # times the share of the layers that it runs
MOST_FOR_ROUTERS = 1.01
LEAST_OF_THE_SAVING = 0.8
NUM_PROMPTS = 16

OURS = {
    "a": "RoutedModel(model), every layer executed once",
    "b": "RoutedModel(model) under a plan that skips k layers",
    "c": "RoutedModel(model, policy=RouterPolicy(routers)), which execute every layer",
    "e": "generate_many: routed first, then decoded in batches of one plan",
    "f": "the model that shorten returns, and RoutedModel(model) under the same plan",
}
THEIRS = {
    "a": "the untouched model, the same weights",
    "b": "the untouched model; both without the time of a model that has no layer",
    "c": "RoutedModel(model) without routers",
    "e": "routed.generate on batches of mixed plans, in the prompts' order",
    "f": "the untouched model",
}

QUICK = {
    "prompt": 5,
    "batch": 2,
    "decode": 3,
    "routers": 8,
    "many": 1,
    "new_tokens": 8,
    "shortened": 3,
}
WHOLE = {
    "prompt": 30,
    "batch": 8,
    "decode": 40,
    "routers": 60,
    "many": 5,
    "new_tokens": 32,
    "shortened": 60,
}


Way = Callable[..., Any]
"""Makes what is timed, from a model and tokens."""
Answers = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A ratio of times in every round, and the most that its median may be.

    Attributes:
        question: (a) to (f), as above.
        name: What was compared.
        ratios: One of each round.
        limit: What the median may be at most; None where any value is an answer.
        least: The least that any way could take. None if that isn't known.
    """

    question: str
    name: str
    ratios: list[float]
    limit: float | None = None
    least: float | None = None

    @property
    def quartiles(self) -> list[float]:
        """The first, the median and the third."""
        if len(self.ratios) == 1:
            return self.ratios * 3
        return statistics.quantiles(self.ratios, n=4, method="inclusive")

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps within the limit."""
        return None if self.limit is None else self.quartiles[1] <= self.limit

    def __str__(self) -> str:
        low, middle, high = self.quartiles
        limit = "" if self.limit is None else f"{self.limit:.3f}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.is_met]
        return (
            f"({self.question}) {self.name:<42} {middle:6.3f}  {low:6.3f} to {high:6.3f}  "
            f"{len(self.ratios):6}  {limit:>5}  {verdict}"
        ).rstrip()


def without_layers(model: Any) -> Any:
    """Return a copy whose loop runs no layer: embeddings, last norm and output weights alone."""
    bare = copy_sharing_weights(model)
    for config in (bare.config, bare.get_decoder().config):
        config.num_hidden_layers = 0
    return bare


def skipping(num_layers: int, num_skipped: int) -> list[int]:
    """Return a plan that skips some layers, drawn at random."""
    skipped = random.Random(num_skipped).sample(range(num_layers), num_skipped)
    return [0 if layer in skipped else 1 for layer in range(num_layers)]


def ratios(rounds: Rounds, above: str, below: str) -> list[float]:
    """Return how many times as long one call took as another, in each round."""
    return [times[above] / times[below] for times in rounds]


def token_ids(base: BaseModel, num_rows: int, num_tokens: int) -> Tensor:
    """Return rows of random tokens, `[B, T]`: what they are doesn't change the time they take."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(base.tokenizer), (num_rows, num_tokens), generator=generator)
    return ids.to(base.model.device)


def variants(base: BaseModel) -> dict[str, Any]:
    """Return the models of (a), (b) and (c), all on the same weights."""
    L = base.num_layers
    config = RouterConfig(num_layers=L, hidden_size=base.model.config.hidden_size)
    stack = RouterStack(config, torch.Generator().manual_seed(0))
    executing = RouterPolicy(common.make_executing(stack))
    policies: dict[str, Policy] = {"attached": FullPolicy(), "routers": executing}
    policies |= {f"skip {k}": FixedPolicy(skipping(L, k), L) for k in NUM_SKIPPED}
    models = {"untouched": base.model, "control": copy_sharing_weights(base.model)}
    models["bare"] = without_layers(base.model)
    for name, policy in policies.items():
        models[name] = RoutedModel(copy_sharing_weights(base.model), policy=policy).model
    return models


def passes(
    base: BaseModel, repeats: Mapping[str, int], clock: Clock, num_rows: int
) -> list[Figure]:
    """Measure (a), (b) and (c), on one prompt and on a batch of `num_rows`."""
    models = variants(base)
    one = token_ids(base, 1, PROMPT_TOKENS)
    several = token_ids(base, num_rows, PROMPT_TOKENS)
    decode = partial(prepare_decoding, num_tokens=DECODED)

    def time_models(way: Way, ids: Tensor, names: Sequence[str], num_rounds: int) -> Rounds:
        return time_in_turns({name: way(models[name], ids) for name in names}, num_rounds, clock)

    models["untouched"](several)  # not timed: makes room
    most = [name for name in models if name != "routers"]
    without_control = [name for name in models if name != "control"]
    read = time_models(prepare_reading, one, most, repeats["prompt"])
    decoded = time_models(decode, one, most, repeats["decode"])
    read_batch = time_models(prepare_reading, several, without_control, repeats["batch"])
    decoded_batch = time_models(decode, several, without_control, repeats["batch"])
    routed = time_models(prepare_reading, one, ("attached", "routers"), repeats["routers"])
    rounds_by_name = {
        "prefill_batch_1": read,
        f"prefill_batch_{num_rows}": read_batch,
        "decode_batch_1": decoded,
        f"decode_batch_{num_rows}": decoded_batch,
    }
    figures = []
    for name, rounds in rounds_by_name.items():
        figures += overhead_figures(name, rounds)
        figures += plan_figures(name, rounds, base.num_layers)
    figures.append(router_figure("routers_prefill_batch_1", routed, MOST_FOR_ROUTERS))
    figures.append(router_figure(f"routers_prefill_batch_{num_rows}", read_batch, None))
    return figures


def overhead_figures(name: str, rounds: Rounds) -> list[Figure]:
    """Compare a model with every layer executed with the untouched one (a)."""
    figures = [Figure("a", name, ratios(rounds, "attached", "untouched"), MOST_OVERHEAD, 1.0)]
    if "control" in rounds[0]:
        control = ratios(rounds, "control", "untouched")
        figures.append(Figure("a", f"{name}_control", control))
    return figures


def plan_figures(name: str, rounds: Rounds, num_layers: int) -> list[Figure]:
    """Compare plans that skip layers with the untouched model, both without the bare one (b)."""
    figures = []
    for k in NUM_SKIPPED:
        shares = []
        for times in rounds:
            plan_s = times[f"skip {k}"] - times["bare"]
            untouched_s = times["untouched"] - times["bare"]
            shares.append(plan_s / untouched_s)
        least = 1 - k / num_layers
        label = f"{name}_skip_{k}_of_{num_layers}"
        figures.append(Figure("b", label, shares, MOST_FOR_A_PLAN * least, least))
    return figures


def router_figure(name: str, rounds: Rounds, limit: float | None) -> Figure:
    """Compare a model with routers with one without (c)."""
    return Figure("c", name, ratios(rounds, "routers", "attached"), limit, 1.0)


def count_held(cache: Any) -> tuple[int, int]:
    """Count the K/V rows that a routed cache holds, and the bytes of any; without shadows."""
    num_rows = 0
    num_bytes = 0
    for layer in cache.layers:
        parts = [layer]
        if isinstance(layer, RoutedCacheLayer):
            num_rows += sum(len(rows) for rows in layer.rows)
            parts = layer.passes
        num_bytes += sum(part.keys.nbytes + part.values.nbytes for part in parts)
    return num_rows, num_bytes


def count_stored(base: BaseModel) -> list[dict[str, Any]]:
    """Count (d): what plans leave in the cache after a prompt and eight more tokens."""
    L = base.num_layers
    rng = random.Random(0)
    mixed = [[rng.choice((0, 1, 1, 1, 2)) for _ in range(L)] for _ in range(8)]
    cases = {
        "1 prompt, every layer": [[1] * L],
        "1 prompt, 10 layers skipped": [skipping(L, 10)],
        "1 prompt, every layer repeated": [[2] * L],
        "4 prompts, layer 0 skipped by all": [[0] + [1] * (L - 1)] * 4,
        "8 prompts, 8 plans": mixed,
    }
    routed = RoutedModel(copy_sharing_weights(base.model))
    counts = []
    for case, plan in cases.items():
        ids = token_ids(base, len(plan), 20)
        _, untouched = count_held(fill_cache(base.model, ids))
        with routed.fixed(plan):
            rows, size = count_held(fill_cache(routed.model, ids))
        planned_rows = sum(sum(decisions) for decisions in plan)
        planned_bytes = untouched * planned_rows // (len(plan) * L)
        counts.append(
            {
                "case": case,
                "rows": rows,
                "rows_of_the_plan": planned_rows,
                "bytes": size,
                "bytes_of_the_plan": planned_bytes,
                "bytes_untouched": untouched,
                "is_exact": (rows, size) == (planned_rows, planned_bytes),
            }
        )
    return counts


def fill_cache(model: Any, ids: Tensor) -> Any:
    """Return the cache after a prompt of 12 tokens, and the others one by one."""
    [(name, cache)] = empty_cache(model).items()
    for part in (ids[:, :12], *ids[:, 12:].split(1, dim=1)):
        model(part, logits_to_keep=1, **{name: cache})
    return cache


class ThreePlans(Policy):
    """Gives a prompt one of three plans, by its number of tokens."""

    def __init__(self, num_layers: int) -> None:
        self.plans = [skipping(num_layers, k) for k in NUM_SKIPPED]

    def plan_of(self, num_tokens: int) -> list[int]:
        """Return the plan of a prompt of so many tokens."""
        return self.plans[num_tokens % len(self.plans)]

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Return the layer's decision in each prompt's plan."""
        return [self.plan_of(num)[layer] for num in prompts.readable.sum(dim=1).tolist()]


class ManyPrompts:
    """The prompts of (e), and the ways to answer all of them, in batches of a size."""

    def __init__(self, base: BaseModel, num_new: int) -> None:
        task = get_task("builtin_facts")
        examples = task.examples("search")[:NUM_PROMPTS]
        self.texts = [task.prompt(example, "loglikelihood").text for example in examples]
        self.rows = [encode(base.tokenizer, text) for text in self.texts]
        policy = ThreePlans(base.num_layers)
        self.plans = [policy.plan_of(len(row)) for row in self.rows]
        self.given = FixedPolicy(self.plans, base.num_layers)
        self.routed = RoutedModel(
            copy_sharing_weights(base.model), policy=policy, tokenizer=base.tokenizer
        )
        self.length = {"max_new_tokens": num_new, "min_new_tokens": num_new}

    def mixed(self, size: int) -> Answers:
        """Answer in the prompts' order, so that a batch has several plans."""
        answers: Answers = []
        for start in range(0, len(self.rows), size):
            ids, mask = pad_left(self.rows[start : start + size], "cpu")
            output = self.routed.generate(ids, attention_mask=mask, do_sample=False, **self.length)
            answers += [tuple(row) for row in output[:, ids.shape[1] :].tolist()]
        return answers

    def routed_and_grouped(self, size: int) -> Answers:
        """Route all prompts, then answer those of one plan together."""
        answers = generate_many(self.routed, self.texts, batch_size=size, chat=False, **self.length)
        return [answer.tokens for answer in answers]

    def grouped(self, size: int) -> Answers:
        """Answer the prompts of one plan together, the plans being given."""
        with self.routed.using(self.given):
            return self.routed_and_grouped(size)


@dataclass
class ManyFigures:
    """What came out of (e).

    Attributes:
        figures: The ratios of times.
        differ: How many answers of a way aren't those of mixed batches.
        reached: Each way's share of its bound: what the plans must run, at the least that it costs
            (see `common.bound`), divided by its time.
    """

    figures: list[Figure] = field(default_factory=list)
    differ: dict[str, int] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)


def many_prompts(base: BaseModel, repeats: Mapping[str, int], clock: Clock) -> ManyFigures:
    """Measure (e), with the pass that routes and with plans given."""
    prompts = ManyPrompts(base, repeats["new_tokens"])
    ways = {
        "mixed": prompts.mixed,
        "routed_and_grouped": prompts.routed_and_grouped,
        "grouped": prompts.grouped,
    }
    results = ManyFigures()
    for size in (NUM_PROMPTS, NUM_PROMPTS // 4):
        answers: dict[str, Answers] = {}

        def prepare(name: str, size: int, answers: dict[str, Answers]) -> Callable[[], None]:
            return lambda: answers.update({name: ways[name](size)})

        calls = {name: partial(prepare, name, size, answers) for name in ways}
        rounds = time_in_turns(calls, repeats["many"], clock)
        for name in ("routed_and_grouped", "grouped"):
            label = f"{name}_batches_of_{size}"
            results.figures.append(Figure("e", label, ratios(rounds, "mixed", name)))
            pairs = zip(answers[name], answers["mixed"], strict=True)
            results.differ[label] = sum(ours != theirs for ours, theirs in pairs)
        paths = {
            (place, tuple(plan)): answers["mixed"][place]
            for place, plan in enumerate(prompts.plans)
        }
        least = seconds_to_search(base, prompts.rows, [0] * len(prompts.rows), paths, clock)
        for name in ways:
            seconds = statistics.median(times[name] for times in rounds)
            results.reached[f"{name}_batches_of_{size}"] = least / seconds
    return results


def models_without_layers(base: BaseModel) -> dict[str, Any]:
    """Return the models of (f): untouched, and without k layers in either way."""
    L = base.num_layers
    models = {"untouched": base.model, "control": copy_sharing_weights(base.model)}
    for k in NUM_SKIPPED:
        plan = skipping(L, k)
        models[f"routed {k}"] = RoutedModel(
            copy_sharing_weights(base.model), policy=FixedPolicy(plan, L)
        ).model
        models[f"shortened {k}"] = shorten(
            base.model, [layer for layer in range(L) if not plan[layer]]
        )
    return models


def time_shortened(base: BaseModel, repeats: Mapping[str, int], clock: Clock) -> list[Figure]:
    """Measure (f)."""
    ids = token_ids(base, 1, PROMPT_TOKENS)
    models = models_without_layers(base)
    decode = partial(prepare_decoding, num_tokens=DECODED)
    figures = []
    for name, way, num_tokens in (
        ("prefill", prepare_reading, PROMPT_TOKENS),
        ("decode", decode, 1),
    ):
        calls = {model_name: way(model, ids) for model_name, model in models.items()}
        rounds = time_in_turns(calls, repeats["shortened"], clock)
        control = ratios(rounds, "control", "untouched")
        figures.append(Figure("f", f"{name}_shortened_control", control))
        for k in NUM_SKIPPED:
            saved = 1 - share_of_work(base, skipping(base.num_layers, k), num_tokens)
            for kind in ("shortened", "routed"):
                limit = 1 - LEAST_OF_THE_SAVING * saved if kind == "shortened" else None
                label = f"{name}_{kind}_without_{k}_of_{base.num_layers}"
                ours = ratios(rounds, f"{kind} {k}", "untouched")
                figures.append(Figure("f", label, ours, limit, 1 - saved))
    return figures


def print_table(
    figures: Sequence[Figure], counts: Sequence[Mapping[str, Any]], many: ManyFigures
) -> None:
    """Print every figure with its limit, what caches hold, and what (e) reached."""
    head = "(a) to (c), (f): ours / theirs; (e): theirs / ours"
    print(f"{head:<46} median  quartiles         rounds  limit")
    print(*figures, sep="\n")
    for count in counts:
        verdict = "exact" if count["is_exact"] else "MISSED"
        print(
            f"(d) {count['case']:<42} {count['rows']} K/V rows of {count['rows_of_the_plan']} "
            f"planned, {count['bytes']:,} bytes of {count['bytes_of_the_plan']:,}  {verdict}"
        )
    num_different = sum(many.differ.values())
    print(f"(e) answers that differ: {num_different}; share of the bound that is reached:")
    for name, share in many.reached.items():
        print(f"    {name:<42} {share:6.0%}")


def list_comparisons(figures: Sequence[Figure], many: ManyFigures) -> list[Comparison]:
    """Return the figures that have a bound on what any way could reach, as comparisons."""
    comparisons = []
    for figure in figures:
        what = figure.name.replace("_", " ")
        median = figure.quartiles[1]
        if figure.least is not None:
            comparisons.append(Comparison(what, 1 / median, 1 / figure.least))
        elif figure.name in many.reached:
            comparisons.append(Comparison(what, median, median / many.reached[figure.name]))
    return comparisons


def medians(figures: Sequence[Figure], questions: str) -> dict[str, float]:
    """Return the medians of the figures of some questions, by name."""
    return {f.name: f.quartiles[1] for f in figures if f.question in questions}


def main() -> None:
    """Measure, print a table, and write the figures if asked to."""
    parser = common.parser_of(__doc__, "few rounds, under a minute")
    common.add_clock(parser)
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--rows", type=int, default=ROWS, help="prompts of the larger batch")
    options = parser.parse_args()
    if options.rows < 2:
        parser.error(f"--rows {options.rows} is no batch; give 2 or more")
    repeats = QUICK if options.quick else WHOLE
    clock = common.clock_of(options)
    base = common.base_of(options)
    if base.num_layers <= max(NUM_SKIPPED):
        parser.error(f"{options.model} has {base.num_layers} layers; give a model of more than 10")
    with torch.no_grad():
        figures = passes(base, repeats, clock, options.rows)
        counts = count_stored(base)
        many = many_prompts(base, repeats, clock)
        figures += time_shortened(base, repeats, clock)
        figures += many.figures
    print_table(figures, counts, many)
    common.refuse_differences(base, "answers of (e)", sum(many.differ.values()))
    common.refuse_differences(base, "caches of (d)", sum(not count["is_exact"] for count in counts))
    with_limits = [figure for figure in figures if figure.limit is not None]
    result = {
        "overhead": medians(figures, "ac"),
        "share_of_the_time": medians(figures, "bf"),
        "speedup": medians(figures, "e"),
        "limits": {figure.name: figure.limit for figure in with_limits},
        "is_met": {figure.name: figure.is_met for figure in with_limits},
        "quartiles": {figure.name: figure.quartiles for figure in figures},
        "stored": counts,
        "answers_that_differ": many.differ,
        "share_of_the_bound": many.reached,
        "repeats": repeats,
        "ours": OURS,
        "theirs": THEIRS,
        **common.describe_run(base, options),
    }
    common.write_figures(options, result, list_comparisons(figures, many))


if __name__ == "__main__":
    main()
