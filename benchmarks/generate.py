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
(f) checkpoints exported without k of L layers, loaded by transformers, and the same layers skipped
    by an attached model, plain and with an adapter on those that run (exported it is merged), all
    against the untouched model, head and all; exported, at least 0.8 of the share of multiply-adds
    that is saved has to be saved in time

    python benchmarks/generate.py [--quick] [--json FILE] [--clock cpu] [--model MODEL]
        [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import importlib.metadata
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import torch
from common.bound import seconds_to_search
from torch import Tensor
from transformers import AutoModelForCausalLM

from drllm.config import HealConfig
from drllm.evaluation.flops import ModelShape, prompt_flops
from drllm.evaluation.latency import (
    Clock,
    Rounds,
    decoding,
    empty_cache,
    reading,
    take_turns,
    twin,
)
from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import encode, left_padded
from drllm.models.export import export_path
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.kv_cache import RoutedCacheLayer
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy, PromptView, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import StaticPath, to_path
from drllm.tasks.registry import get_task

PROMPT_TOKENS = 100
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
    "f": "the checkpoint that export_path writes, and RoutedModel(model) under the same plan",
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
    "exported": 3,
}
WHOLE = {
    "prompt": 30,
    "batch": 8,
    "decode": 40,
    "routers": 60,
    "many": 5,
    "new_tokens": 32,
    "exported": 60,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A ratio of times in every round, and the most that its median may be.

    Attributes:
        question: (a) to (f), as above.
        name: What was compared.
        ratios: One of each round.
        bound: None where any value is an answer.
    """

    question: str
    name: str
    ratios: list[float]
    bound: float | None = None

    @property
    def quartiles(self) -> list[float]:
        """The first, the median and the third."""
        if len(self.ratios) == 1:
            return self.ratios * 3
        return statistics.quantiles(self.ratios, n=4, method="inclusive")

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps within the bound."""
        return None if self.bound is None else self.quartiles[1] <= self.bound

    def __str__(self) -> str:
        low, middle, high = self.quartiles
        bound = "" if self.bound is None else f"{self.bound:.3f}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.is_met]
        return (
            f"({self.question}) {self.name:<42} {middle:6.3f}  {low:6.3f} to {high:6.3f}  "
            f"{len(self.ratios):6}  {bound:>5}  {verdict}"
        ).rstrip()


def without_layers(model: Any) -> Any:
    """Return a copy whose loop runs no layer: embeddings, last norm and output weights alone."""
    bare = twin(model)
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
    executing = RouterPolicy(common.that_execute(stack))
    policies: dict[str, Policy] = {"attached": FullPolicy(), "routers": executing}
    policies |= {f"skip {k}": FixedPolicy(skipping(L, k), L) for k in NUM_SKIPPED}
    models = {"untouched": base.model, "control": twin(base.model)}
    models["bare"] = without_layers(base.model)
    for name, policy in policies.items():
        models[name] = RoutedModel(twin(base.model), policy=policy).model
    return models


def passes(base: BaseModel, repeats: Mapping[str, int], clock: Clock) -> list[Figure]:
    """Measure (a), (b) and (c)."""
    L, models = base.num_layers, variants(base)
    one, eight = token_ids(base, 1, PROMPT_TOKENS), token_ids(base, 8, PROMPT_TOKENS)

    def turns(way: Callable[..., Any], ids: Tensor, names: Sequence[str], num: int) -> Rounds:
        return take_turns({name: way(models[name], ids) for name in names}, num, clock)

    models["untouched"](eight)  # not timed: makes room
    most = [name for name in models if name != "routers"]
    read = turns(reading, one, most, repeats["prompt"])
    decode = turns(partial(decoding, num_tokens=DECODED), one, most, repeats["decode"])
    batch = turns(reading, eight, ("untouched", "attached", "routers"), repeats["batch"])
    routed = turns(reading, one, ("attached", "routers"), repeats["routers"])

    figures = []
    passed = {"prefill_batch_1": read, "prefill_batch_8": batch, "decode_batch_1": decode}
    for name, rounds in passed.items():
        ours = ratios(rounds, "attached", "untouched")
        figures.append(Figure("a", name, ours, MOST_OVERHEAD))
        if "control" in rounds[0]:
            figures.append(Figure("a", f"{name}_control", ratios(rounds, "control", "untouched")))
    for name, rounds in (("prefill", read), ("decode", decode)):
        for k in NUM_SKIPPED:
            shares = [(r[f"skip {k}"] - r["bare"]) / (r["untouched"] - r["bare"]) for r in rounds]
            bound = MOST_FOR_A_PLAN * (1 - k / L)
            figures.append(Figure("b", f"{name}_batch_1_skip_{k}_of_{L}", shares, bound))
    cost = ratios(routed, "routers", "attached")
    figures.append(Figure("c", "routers_prefill_batch_1", cost, MOST_FOR_ROUTERS))
    cost = ratios(batch, "routers", "attached")
    return [*figures, Figure("c", "routers_prefill_batch_8", cost)]


def held(cache: Any) -> tuple[int, int]:
    """Count the K/V rows that a routed cache holds, and the bytes of any; without shadows."""
    routed = [entry for entry in cache.layers if isinstance(entry, RoutedCacheLayer)]
    entries = [e.passes if isinstance(e, RoutedCacheLayer) else [e] for e in cache.layers]
    return (
        sum(len(rows) for entry in routed for rows in entry.rows),
        sum(part.keys.nbytes + part.values.nbytes for parts in entries for part in parts),
    )


def stored(base: BaseModel) -> list[dict[str, Any]]:
    """Count (d): what plans leave in the cache after a prompt and eight more tokens."""
    L, rng = base.num_layers, random.Random(0)
    mixed = [[rng.choice((0, 1, 1, 1, 2)) for _ in range(L)] for _ in range(8)]
    cases = {
        "1 prompt, every layer": [[1] * L],
        "1 prompt, 10 layers skipped": [skipping(L, 10)],
        "1 prompt, every layer repeated": [[2] * L],
        "4 prompts, layer 0 skipped by all": [[0] + [1] * (L - 1)] * 4,
        "8 prompts, 8 plans": mixed,
    }
    routed = RoutedModel(twin(base.model))
    counts = []
    for case, plan in cases.items():
        ids = token_ids(base, len(plan), 20)
        caches = []
        for model, decisions in ((base.model, [1] * L), (routed.model, plan)):
            cache = empty_cache(model)
            with routed.fixed(decisions):
                for part in (ids[:, :12], *ids[:, 12:].split(1, dim=1)):
                    model(part, logits_to_keep=1, **cache)
            caches += cache.values()
        untouched, executions = held(caches[0])[1], sum(map(sum, plan))
        planned = (executions, untouched * executions // (len(plan) * L))
        rows, size = held(caches[1])
        counts.append(
            {
                "case": case,
                "rows": rows,
                "rows_of_the_plan": planned[0],
                "bytes": size,
                "bytes_of_the_plan": planned[1],
                "bytes_untouched": untouched,
                "is_exact": (rows, size) == planned,
            }
        )
    return counts


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


def many_prompts(
    base: BaseModel, repeats: Mapping[str, int], clock: Clock
) -> tuple[list[Figure], dict[str, int], dict[str, float]]:
    """Measure (e), with the pass that routes and with plans given.

    Beside the figures there is how many answers differ, and each way's share of its bound: what
    the plans must run, at the least that it costs (see `common.bound`), divided by its time.
    """
    task, L = get_task("builtin_facts"), base.num_layers
    texts = [task.prompt(e, "loglikelihood").text for e in task.examples("search")[:NUM_PROMPTS]]
    rows = [encode(base.tokenizer, text) for text in texts]
    policy = ThreePlans(L)
    routed = RoutedModel(twin(base.model), policy=policy, tokenizer=base.tokenizer)
    known = FixedPolicy([policy.plan_of(len(row)) for row in rows], L)
    length = dict.fromkeys(("max_new_tokens", "min_new_tokens"), repeats["new_tokens"])

    def mixed(size: int) -> list[tuple[int, ...]]:
        answers = []
        for start in range(0, len(rows), size):
            ids, mask = left_padded(rows[start : start + size], "cpu")
            output = routed.generate(ids, attention_mask=mask, do_sample=False, **length)
            answers += [tuple(row) for row in output[:, ids.shape[1] :].tolist()]
        return answers

    def routed_and_grouped(size: int) -> list[tuple[int, ...]]:
        answers = generate_many(routed, texts, batch_size=size, chat=False, **length)
        return [answer.tokens for answer in answers]

    def grouped(size: int) -> list[tuple[int, ...]]:
        with routed.using(known):
            return routed_and_grouped(size)

    ways = {way.__name__: way for way in (mixed, routed_and_grouped, grouped)}
    said: dict[str, list[tuple[int, ...]]] = {}

    def prepare(name: str, size: int) -> Callable[[], None]:
        def answer() -> None:
            said[name] = ways[name](size)

        return answer

    figures, differ, reached = [], {}, {}
    for size in (NUM_PROMPTS, NUM_PROMPTS // 4):
        calls = {name: partial(prepare, name, size) for name in ways}
        rounds = take_turns(calls, repeats["many"], clock)
        for name in ("routed_and_grouped", "grouped"):
            label = f"{name}_batches_of_{size}"
            figures.append(Figure("e", label, ratios(rounds, "mixed", name)))
            differ[label] = sum(a != b for a, b in zip(said[name], said["mixed"], strict=True))
        plans = [tuple(policy.plan_of(len(row))) for row in rows]
        answers = {(place, plan): said["mixed"][place] for place, plan in enumerate(plans)}
        least = seconds_to_search(base, rows, [0] * len(rows), answers, clock)
        for name in ways:
            seconds = statistics.median(each[name] for each in rounds)
            reached[f"{name}_batches_of_{size}"] = least / seconds
    return figures, differ, reached


def with_adapter(base: BaseModel, path: StaticPath) -> RoutedModel:
    """Return a routed copy that runs a path with an adapter; its values don't matter here."""
    routed = RoutedModel(twin(base.model))
    rank = HealConfig().rank
    maps = routed.injection.linear_maps
    routed.injection.lora.create("healed", rank, rank, path.layers, maps, seed=0)
    routed.driver.policy = routed.policy_of(path.with_adapter("healed"))
    return routed


def exported(base: BaseModel, repeats: Mapping[str, int], clock: Clock) -> list[Figure]:
    """Measure (f)."""
    L, shape, ids = base.num_layers, ModelShape.of(base.model), token_ids(base, 1, PROMPT_TOKENS)
    models = {"untouched": base.model, "control": twin(base.model)}
    for k in NUM_SKIPPED:
        plan = skipping(L, k)
        models[f"routed {k}"] = RoutedModel(twin(base.model), policy=FixedPolicy(plan, L)).model
        models[f"healed {k}"] = with_adapter(base, StaticPath(to_path(plan))).model
        with tempfile.TemporaryDirectory() as folder:
            export_path(base, [layer for layer in range(L) if plan[layer]], folder)
            models[f"exported {k}"] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=base.model.dtype
            )
            models[f"exported {k}"].to(base.model.device).eval()
    figures = []
    decode = partial(decoding, num_tokens=DECODED)
    for name, way, num_tokens in (("prefill", reading, PROMPT_TOKENS), ("decode", decode, 1)):
        calls = {each: way(model, ids) for each, model in models.items()}
        rounds = take_turns(calls, repeats["exported"], clock)
        figures.append(
            Figure("f", f"{name}_exported_control", ratios(rounds, "control", "untouched"))
        )
        flops = [prompt_flops(shape, tuple(skipping(L, k)), num_tokens) for k in (0, *NUM_SKIPPED)]
        whole, *left = [each.weights + each.attention for each in flops]
        for k, executed in zip(NUM_SKIPPED, left, strict=True):
            saved = 1 - executed / whole
            bounds = {"exported": 1 - LEAST_OF_THE_SAVING * saved, "routed": None, "healed": None}
            for kind, bound in bounds.items():
                label = f"{name}_{kind}_without_{k}_of_{L}"
                figures.append(
                    Figure("f", label, ratios(rounds, f"{kind} {k}", "untouched"), bound)
                )
    return figures


def main() -> None:
    """Measure, print a table, and write the figures if asked to."""
    parser = common.parser_of(__doc__, "few rounds, under a minute")
    common.add_clock(parser)
    common.add_model(parser, devices=True, dtypes=True)
    options = parser.parse_args()
    repeats = QUICK if options.quick else WHOLE
    clock = common.clock_of(options)
    base = common.base_of(options)
    if base.num_layers <= max(NUM_SKIPPED):
        parser.error(f"{options.model} has {base.num_layers} layers; give a model of more than 10")
    with torch.no_grad():
        figures = passes(base, repeats, clock)
        counts = stored(base)
        many, differ, reached = many_prompts(base, repeats, clock)
        figures += [*exported(base, repeats, clock), *many]
    head = "(a) to (c), (f): ours / theirs; (e): theirs / ours"
    print(f"{head:<46} median  quartiles         rounds  bound")
    print(*figures, sep="\n")
    for count in counts:
        print(
            f"(d) {count['case']:<42} {count['rows']} K/V rows of {count['rows_of_the_plan']} "
            f"planned, {count['bytes']:,} bytes of {count['bytes_of_the_plan']:,}  "
            f"{'exact' if count['is_exact'] else 'MISSED'}"
        )
    print(f"(e) answers that differ: {sum(differ.values())}; share of the bound that is reached:")
    print(*(f"    {name:<42} {share:6.0%}" for name, share in reached.items()), sep="\n")
    common.refuse(base, "answers of (e)", sum(differ.values()))
    common.refuse(base, "caches of (d)", sum(not count["is_exact"] for count in counts))
    medians = {figure.name: figure.quartiles[1] for figure in figures}
    result = {
        "overhead": {f.name: medians[f.name] for f in figures if f.question in "ac"},
        "share_of_the_time": {f.name: medians[f.name] for f in figures if f.question in "bf"},
        "speedup": {f.name: medians[f.name] for f in figures if f.question == "e"},
        "bounds": {f.name: f.bound for f in figures if f.bound is not None},
        "is_met": {f.name: f.is_met for f in figures if f.bound is not None},
        "quartiles": {f.name: f.quartiles for f in figures},
        "stored": counts,
        "answers_that_differ": differ,
        "share_of_the_bound": reached,
        "repeats": repeats,
        "ours": OURS,
        "theirs": THEIRS,
        **common.of(base, options),
        "drllm": f"{importlib.metadata.version('drllm')} at {common.commit_of()}",
    }
    common.write(options, result)


if __name__ == "__main__":
    main()
