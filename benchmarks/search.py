"""How much faster paths are evaluated with shared prefixes than one by one.

Ours: `BlockEvaluator`, all choices packed behind one context, states shared across paths.
Obvious way: for every path a plain forward per choice (loglikelihood) or one greedy generation
(boxed) of a model whose layer list is the path, batch 1, without sharing anything.
Both evaluate the same paths of the same questions in one run; verdicts are compared.

    python benchmarks/search.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drllm.config import ModelConfig, SearchConfig
from drllm.models.base.loading import load
from drllm.models.prompts import encode, render
from drllm.models.routed import RoutedModel
from drllm.paths import to_path
from drllm.search.evaluator import BlockEvaluator
from drllm.search.strategies import new_search
from drllm.tasks.base import Prompt, get_task
from drllm.tasks.grading import grade, score_choices

Pairs = list[tuple[int, tuple[int, ...]]]


def searched_paths(num_layers: int, num_questions: int, num_paths: int) -> list[Pairs]:
    """Return the rounds of a tree search: in each, one new path of every question.

    Rewards are drawn, so that both ways evaluate the same paths whatever the model answers.
    """
    config = SearchConfig(num_simulations=num_paths - 1)
    searches = [new_search(num_layers, config, random.Random(q)) for q in range(num_questions)]
    rng = random.Random(0)
    rounds: list[Pairs] = []
    for _ in range(num_paths):
        pairs: Pairs = []
        for question, search in enumerate(searches):
            decisions = search.propose()
            if decisions is not None:
                search.observe(decisions, float(rng.random() < 0.5))
                pairs.append((question, decisions))
        rounds.append(pairs)
    return rounds


def listed(model: Any, decisions: tuple[int, ...]) -> Any:
    """Return a plain model whose layer list is the path; weights are shared, not copied."""
    plain = copy.copy(model)
    plain._modules = dict(model._modules)
    plain.model = copy.copy(model.model)
    plain.model._modules = dict(model.model._modules)
    plain.config = plain.model.config = copy.deepcopy(model.config)
    layers = [copy.copy(model.model.layers[index]) for index in to_path(decisions)]
    for index, layer in enumerate(layers):  # a cache slot per execution
        layer._modules = dict(layer._modules)
        layer.self_attn = copy.copy(layer.self_attn)
        layer.self_attn.layer_idx = index
    plain.model.layers = nn.ModuleList(layers)
    plain.config.num_hidden_layers = len(layers)
    return plain


def one_by_one(model: Any, tokenizer: Any, prompt: Prompt, decisions: tuple[int, ...]) -> float:
    """Return a path's reward the obvious way."""
    plain = listed(model, decisions)
    text = render(tokenizer, prompt.text, chat=prompt.chat)
    context = encode(tokenizer, text)
    if prompt.reward != "loglikelihood":
        output = plain.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.long),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        return grade(prompt, tokenizer.decode(output[0, len(context) :], skip_special_tokens=True))
    sums = []
    for continuation in prompt.continuations:
        row = encode(tokenizer, text + continuation)
        logprobs = plain(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        sums.append(sum(float(logprobs[i - 1, row[i]]) for i in range(len(context), len(row))))
    return score_choices(sums, prompt)[0]


def compare(base: Any, task_name: str, num_questions: int, num_paths: int) -> dict[str, Any]:
    """Time both ways on one task, and count the verdicts on which they differ."""
    task = get_task(task_name)
    examples = task.examples("search")[:num_questions]
    prompts = [task.prompt(example, task.rewards[0]) for example in examples]
    rounds = searched_paths(base.num_layers, len(prompts), num_paths)
    with torch.no_grad():
        started = time.perf_counter()
        slow = [
            one_by_one(base.model, base.tokenizer, prompts[question], decisions)
            for pairs in rounds
            for question, decisions in pairs
        ]
        theirs = time.perf_counter() - started
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        started = time.perf_counter()
        evaluator = BlockEvaluator(routed, prompts, 2.0)
        fast = [o.reward for pairs in rounds for o in evaluator.evaluate(pairs)]
        ours = time.perf_counter() - started
        routed.detach()
    return {
        "reward": prompts[0].reward,
        "paths": len(slow),
        "theirs_s": theirs,
        "ours_s": ours,
        "verdicts_that_differ": sum(a != b for a, b in zip(slow, fast, strict=True)),
        "right": sum(slow),
        "executions_run": evaluator.states.executions_run,
        "executions_asked": evaluator.states.executions_asked,
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small sample, under a minute")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    repeats, questions, paths = (1, 4, 4) if options.quick else (3, 8, 20)
    base = load(ModelConfig(dtype="float32", device="cpu"))
    runs = [
        compare(base, task, questions, paths)
        for _ in range(repeats)
        for task in ("builtin_facts", "builtin_arithmetic")
    ]
    speedup = {}
    for reward in dict.fromkeys(run["reward"] for run in runs):
        ratios = [run["theirs_s"] / run["ours_s"] for run in runs if run["reward"] == reward]
        speedup[reward] = statistics.median(ratios)
        run = next(run for run in runs if run["reward"] == reward)
        print(
            f"{reward:<14} speedup {speedup[reward]:.2f} (median of {repeats}); "
            f"{run['paths']} paths, {run['executions_run']} of {run['executions_asked']} "
            f"executions run, {run['verdicts_that_differ']} verdicts differ"
        )
    result = {
        "speedup": speedup,
        "repeats": repeats,
        "ours": "BlockEvaluator: packed choices, shared prefixes",
        "theirs": "one plain forward per choice, or one generate, for each path, batch 1",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}",
        "runs": runs,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
